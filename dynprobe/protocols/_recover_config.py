"""Settings of a recovery study."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dynprobe.controllers import Controller, why_not
from dynprobe.controllers.recovery import MODES, SIGNALS, Deadband, Never, adopt, make_mode, mode_name
from dynprobe.errors import UsageError, did_you_mean
from dynprobe.probes import Sampling, load_calibration
from dynprobe.protocols._config import RunConfig

__all__ = ["DEFAULT_PERTURB", "Modes", "RecoverConfig", "listed"]

#: Names of recovery modes, and controllers that are none yet.
Modes = str | Controller | type[Controller] | Sequence[str | Controller | type[Controller]]
#: What a recovery study recovers from where nothing else is asked for: about the median KL threshold of a small model.
DEFAULT_PERTURB = "alpha=0.6,scale=relnorm,layers=50%,phase=decode"


class RecoverConfig(RunConfig):
    """Settings of :func:`dynprobe.recover`."""

    operators: str | None = Field(None, description="File of the operators of mode 'dom' (.safetensors).")
    mode: tuple[str, ...] = Field(("hybrid",), description="Recovery modes; 'all' for every one that can run.")
    detector: str = Field("kappa_phase_zmax", description=f"Signal that is watched: {', '.join(SIGNALS)}.")
    m: int = Field(3, ge=1, description="Tokens above the upper level before the detector fires.")
    m_off: int = Field(5, ge=1, description="Tokens below the lower level before it lets go.")
    q_lo: float = Field(0.75, ge=0, lt=1, description="Quantile of the lower level on clean text.")
    q_hi: float = Field(0.99, gt=0, le=1, description="Quantile of the upper level on clean text.")
    gain: float = Field(0.5, gt=0, le=1, description="Largest gain of an actuator.")
    budget: float = Field(0.25, gt=0, le=1, description="Share of the new tokens that may be active.")
    site: str | None = Field(
        None, description="Where actuators act, e.g. 'layers=60%'; default where the signal points."
    )
    decode: Literal["forced", "free", "both"] = Field(
        "both", description="Read a given text, write an own one, or both."
    )
    timings: tuple[Literal["detector", "always", "oracle"], ...] = Field(
        ("detector", "always", "oracle"), description="When modes act: by the detector, always, or where the noise is."
    )
    calibration: str | None = Field(None, description="Folder of a calibration of this model; default: made here.")
    max_new_tokens: int = Field(48, ge=4, description="Tokens that are read or written after the prompt.")
    stop_at_eos: bool = Field(False, description="Texts of one length can be compared; true ends them at EOS.")

    @field_validator("mode", mode="before")
    @classmethod
    def _modes(cls, value: Any, info: ValidationInfo) -> tuple[str, ...]:
        try:
            names = listed(value)
            chosen = [mode_name(name) for name in names if name != "all"]
        except UsageError as error:
            raise ValueError(str(error)) from error
        if not names:
            raise ValueError(f"name at least one mode: {', '.join(MODES)}, or all")
        controls = [name for name in chosen if name.startswith("random:")]
        if controls:
            raise ValueError(
                f"{controls[0]} is run beside {controls[0].removeprefix('random:')} anyway; name that mode"
            )
        if "all" in names:
            chosen += [name for name in MODES.builtin if name != "none" and not _idle(name, info.data)]
        return tuple(dict.fromkeys(chosen))

    @field_validator("timings", mode="before")
    @classmethod
    def _timings(cls, value: Any) -> tuple[str, ...]:
        return tuple(dict.fromkeys(listed(value)))

    @field_validator("detector")
    @classmethod
    def _signal(cls, value: str) -> str:
        name = value.replace("-", "_").replace(".", "_").removesuffix("/1")
        if name not in SIGNALS:
            raise ValueError(f"one of {', '.join(SIGNALS)}.{did_you_mean(name, SIGNALS)}")
        return name

    @model_validator(mode="after")
    def _one_prompt_one_row(self) -> RecoverConfig:
        if not self.q_lo < self.q_hi:
            raise ValueError(f"q_lo={self.q_lo} must lie below q_hi={self.q_hi}; both are quantiles of clean text")
        if self.num_samples != 1 or self.states or self.lens:
            raise ValueError("recover takes one text per prompt, and no --states or --lens; dynprobe run stores states")
        return self

    def deadband(self) -> Deadband:
        """Return a new detector with these settings."""
        return Deadband(
            self.detector, self.m, self.m_off, self.q_lo, self.q_hi, self.gain, self.budget, self.max_new_tokens
        )

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this study.

        A calibration or operators that are handed in count by what they hold, wherever they lie.
        """
        settings = {**super().identity(), "protocol": "recover"}
        if self.calibration is not None:
            settings["calibration"] = load_calibration(Path(self.calibration)).hash
        if self.operators is not None:
            settings["operators"] = _digest(Path(self.operators))
        return settings


def listed(value: Any) -> list[str]:
    """Names of a list, with commas or without, in the order given; a controller has the name it is adopted under."""
    one = isinstance(value, str | type) or not isinstance(value, Iterable)
    items = [item if isinstance(item, str) else adopt(item) for item in ([value] if one else value)]
    return [name.strip() for text in items for name in str(text).split(",") if name.strip()]


def _idle(mode: str, settings: Mapping[str, Any]) -> bool:
    """Whether a mode could do nothing under these settings."""
    if mode == "dom" and settings.get("operators") is None:
        return True
    sampling = Sampling(max_new_tokens=settings.get("max_new_tokens", 4), temperature=settings.get("temperature", 0.0))
    return why_not(make_mode(mode, Never, operators=settings.get("operators")), sampling) is not None


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"--operators {file} cannot be read: {error.strerror or error}") from error
