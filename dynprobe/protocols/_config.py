"""The configuration of a run: one flat, typed object; unknown keys are errors with a near match."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from dynprobe._yaml import read_yaml
from dynprobe.errors import UsageError, did_you_mean
from dynprobe.protocols._spread_config import SPREAD, SpreadConfig
from dynprobe.protocols._wrong_value import SettingError, what_is_wrong

__all__ = ["RunConfig", "load_config", "read_config"]

#: Settings that take no part in a run's identity: those that change no number, and those that only say where something
#: comes from that is part of it (the prompts themselves, the direction itself).
NOT_IDENTITY = frozenset({
    "out", "batch_size", "quiet", "force", "prompt", "prompts", "category", "limit", "direction", "contrast",
    *SPREAD,
})  # fmt: skip


class RunConfig(SpreadConfig):
    """Everything that defines a run, with the defaults of the bare command."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description="Hub id, local folder, GGUF file or known name.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = Field("float32", description="Dtype of the weights.")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    device_map: str | None = Field(None, description="Passed to transformers, e.g. 'auto'.")
    quantization: str | None = Field(None, description="int8, nf4, fp4 (bitsandbytes), torchao-int8wo.")
    trust_remote_code: bool = Field(False, description="Run the model's own code; needs a pinned revision.")
    allow_bin: bool = Field(False, description="Load .bin weights (with weights_only=True) where no safetensors exist.")

    prompt: tuple[str, ...] = Field((), description="Prompts given in the call.")
    prompts: str | None = Field(None, description="File of prompts (.txt, .jsonl, .parquet), '-' for stdin.")
    category: tuple[str, ...] = Field((), description="Keep prompts of these categories.")
    limit: int | None = Field(None, ge=1, description="Keep the first prompts only.")
    chat_template: Literal["auto", "none"] = Field("none", description="'auto' wraps prompts as a user turn.")

    perturb: tuple[str, ...] = Field((), description="Perturbations in the mini-language; several act together.")
    direction: str | None = Field(None, description="File of the direction of kind=direction (.npy, .safetensors).")
    contrast: tuple[str, str] | None = Field(None, description="Two texts whose last-token states give the direction.")

    max_new_tokens: int = Field(32, ge=0, description="Tokens to generate; 0 measures the prompts only.")
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of sampling.")
    num_samples: int = Field(1, ge=1, description="Texts per prompt and free arm.")
    seed: int = Field(0, ge=0, description="Seed of sampling; noise has its own in the perturbation.")
    stop_at_eos: bool = Field(True, description="End a text at the end-of-sequence token.")

    where: str = Field("layers=all", description="Which states --states writes.")
    states: bool = Field(False, description="Write the states too.")
    lens: bool = Field(False, description="Add logit-lens entropy and KL at every depth, and prediction depth.")
    metrics: tuple[str, ...] = Field((), description="Ids of metrics to store beside the default ones.")
    span: Literal["auto", "prompt", "new", "all"] = Field("auto", description="Tokens of token-axis and set metrics.")
    padding: Literal["auto", "left", "right", "none"] = Field(
        "auto", description="Padding side; 'none' = exact lengths."
    )
    batch_size: int | Literal["auto"] = Field("auto", description="Rows per batch.")
    compile_metrics: bool = Field(False, description="Compile the reduction of states with torch.compile; no model.")
    backend: Literal["hooks", "nnsight"] = Field("hooks", description="What reads and writes the states.")
    remote: bool | str = Field(False, description="Run on NDIF (True), on a server (its URL), or try it ('local').")
    out: str = Field("runs", description="Folder of runs, or the run folder to continue.")
    force: bool = Field(False, description="Continue a run of another library version.")
    quiet: bool = Field(False, description="No progress.")

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("batch_size is 'auto' or at least 1")
        return value

    @field_validator("remote")
    @classmethod
    def _somewhere(cls, value: bool | str) -> bool | str:
        if isinstance(value, str) and value != "local" and not value.startswith(("http://", "https://")):
            raise ValueError("remote is true, 'local' (a dry run here) or the URL of a server")
        if isinstance(value, str) and "@" in value:
            from dynprobe.probes._server import without_login

            return without_login(value)
        return value

    @field_validator("temperature")
    @classmethod
    def _finite(cls, value: float) -> float:
        if value != value or value == float("inf"):
            raise ValueError("temperature is a finite number")
        return value

    @field_validator("metrics")
    @classmethod
    def _measurable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from dynprobe.metrics import requested

        return requested(part for text in value for part in re.split(r",(?![^{]*\})", text))

    @property
    def measured_metrics(self) -> tuple[str, ...]:
        """Ids of all state metrics of this run."""
        from dynprobe.metrics import DEFAULT

        return (*DEFAULT, *self.metrics)

    @property
    def measured_span(self) -> Literal["prompt", "new", "all"]:
        """Tokens of token-axis and set metrics, with ``auto`` resolved."""
        if self.span != "auto":
            return self.span
        return "new" if self.max_new_tokens > 0 else "prompt"

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this run."""
        settings = {k: v for k, v in self.model_dump(mode="json").items() if k not in NOT_IDENTITY}
        if not settings["metrics"]:  # asking for nothing more is the run it was before one could ask
            del settings["metrics"]
        for name, usual in (("backend", "hooks"), ("remote", False), ("compile_metrics", False)):
            if settings[name] == usual:
                del settings[name]
        if settings["quantization"] is None:
            del settings["quantization"]
        return settings

    @classmethod
    def build(cls, **values: Any) -> RunConfig:
        """Validate settings.

        Raises:
            UsageError: Naming the setting, what was given and what it may be (a :class:`SettingError` where
                one is to blame).
        """
        unknown = [key for key in values if key not in cls.model_fields]
        if unknown:
            raise UsageError(f"unknown setting {unknown[0]!r}.{did_you_mean(unknown[0], cls.model_fields)}")
        values = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in values.items()}
        for key in ("perturb", "prompt", "category", "metrics"):
            if isinstance(values.get(key), str):
                values[key] = (values[key],)
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # settings that do not go together: no one of them is to blame
                raise UsageError(first["msg"].removeprefix("Value error, ")) from error
            name, given = ".".join(str(p) for p in first["loc"][:1]), first["input"]
            # A password perhaps, and not to be said.
            login = isinstance(given, str) and "@" in given and (name == "remote" or "://" in given)
            shown = "a text with an @" if login else repr(given)
            cause = None if login else error
            raise SettingError(f"{name}={shown}: {what_is_wrong(error.errors())}", name) from cause
        except (TypeError, AttributeError, OverflowError) as error:
            # Settings that take several spellings meet a kind of value that none of them has: null, say, in a file.
            name = next((key for key, value in values.items() if cls._stumbles(key, value)), "")
            if not name:
                raise
            given = values[name]
            said = f"{name}={given!r:.80}: a {type(given).__name__} of this kind cannot be read"
            raise SettingError(said, name) from error

    @classmethod
    def _stumbles(cls, key: str, value: Any) -> bool:
        """Whether a setting alone ends its reader."""
        try:
            cls(**{key: value})
        except ValidationError:
            return False
        except (TypeError, AttributeError, OverflowError):
            return True
        return False


def load_config(path: str | Path, kind: type[RunConfig] | None = None) -> dict[str, Any]:
    """Read settings from a YAML file; flags given beside it win.

    Args:
        path: The file.
        kind: Whose settings they are; default those of a run.

    Raises:
        UsageError: If the file is missing, is no mapping, or has a key that no setting answers to.
    """
    return read_config(path, kind or RunConfig)[0]


def read_config(path: str | Path, kind: type[RunConfig]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of a file, and where each of them stands, in words."""
    path = Path(path)
    loaded, tree = read_yaml(path, "config file", same=lambda key: key.replace("-", "_"))
    if not isinstance(loaded, dict):
        raise UsageError(f"config file {path} holds {type(loaded).__name__}; it must be a mapping of settings")
    # YAML reads the bare word null, which threshold has as a setting, as no text.
    settings = {"null" if k is None else str(k).replace("-", "_"): v for k, v in loaded.items()}
    lines = {key.value.replace("-", "_"): key.start_mark.line + 1 for key, _ in tree.value}
    places = {}
    for key in settings:
        where = f"config file {path}{f', line {lines[key]}' if key in lines else ''}"  # a merged key has no line here
        if key not in kind.model_fields:
            raise UsageError(f"{where}: unknown setting {key!r}.{did_you_mean(key, kind.model_fields)}")
        places[key] = where
    return settings, places
