"""Settings of a study of dissociation."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dynprobe import metrics
from dynprobe.errors import MetricError, UsageError, did_you_mean
from dynprobe.metrics._registry import loaded
from dynprobe.protocols._recover_config import RecoverConfig
from dynprobe.protocols._recover_summary import acted_on

__all__ = ["ALPHAS", "SEMANTIC", "DissociateConfig", "by_construction"]

#: Strengths of the task's own dose–response.
ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0)
#: Semantic readings of an item: column → what it is.
SEMANTIC = {
    "right": "accuracy", "nll_right": "NLL of the right answer", "choice_margin": "margin of the right answer",
    "kl_clean_pert": "KL to clean at the answer",
}  # fmt: skip
#: Settings of a recovery study that mean nothing here: items are read, and bring their own texts.
_NOT_HERE = ("prompt", "prompts", "temperature", "top_p", "stop_at_eos", "padding", "span", "chat_template")
#: Metrics of single steps along the depth, which actuators turn or shorten.
_STEPS = ("kappa.phase", "delta.", "influence.", "curv.depth")
#: Detector → metrics made of what it follows.
_FOLLOWED = {"limen_ct": ("limen.", "debt.", "collapse."), "norm_step_zmax": ("resid.norm",)}


def by_construction(column: str, detector: str, mode: str | None = None) -> bool:
    """Whether a metric recovers because a controller acts on it, so that its recovery is no evidence.

    Example:
        >>> by_construction("delta_angle", "entropy"), by_construction("kappa_geom", "kappa_phase_zmax")
        (True, False)
    """
    known = metrics.columns().get(column)
    name = known.metric_id if known is not None else ""
    return acted_on(column, detector, mode) or name.startswith((*_STEPS, *_FOLLOWED.get(detector, ())))


def _of_states(metric: str) -> bool:
    if metric.startswith("output."):
        return False
    try:
        metrics.requested((metric,))
    except MetricError:
        return False
    return True


class DissociateConfig(RecoverConfig):
    """Settings of :func:`dynprobe.dissociate`."""

    items: str = Field("cloze", description="Built-in set of items, or a .jsonl file of question, choices, answer.")
    alphas: tuple[float, ...] = Field(ALPHAS, description="Strengths of the task's own dose–response.")
    scale: str = Field("relnorm", description="What the strengths multiply.")
    layers: str = Field("50%", description="Where the noise is written.")
    mode: tuple[str, ...] = Field(("slerp",), description="Recovery modes; 'all' for every one that can run.")
    dynamic: str = Field("kappa_geom", description="Metric of the dynamics; one that no actuator acts on.")
    semantic: Literal["right", "nll_right", "choice_margin"] = Field(
        "right", description="Reading of the task that the verdict is about: right is accuracy."
    )
    prefill: int = Field(1, ge=1, description="Tokens of a question that are read in one forward, undisturbed.")
    budget: float = Field(1.0, gt=0, le=1, description="Share of the longest item's tokens that may be active.")
    decode: Literal["forced", "free", "both"] = Field("forced", description="Items are read, not written.")
    max_new_tokens: int = Field(4, ge=4, description="Tokens of the longest row after the prefill; filled in.")
    fixed: bool = Field(False, description="Whether the dose was given, not chosen; filled in.")
    content: str = Field("", description="Hash of questions, choices and answers; filled in.")

    @field_validator("alphas", mode="before")
    @classmethod
    def _strengths(cls, value: Any) -> tuple[float, ...]:
        items = str(value).split(",") if isinstance(value, str | int | float) else list(value)
        try:
            found = sorted({float(item) for item in items if str(item).strip()})
        except ValueError as error:
            raise ValueError("numbers such as 0,0.5,1,2") from error
        if not found or found[-1] <= 0 or found[0] < 0 or not all(map(math.isfinite, found)):
            raise ValueError("strengths from 0 on, at least one above it, such as 0,0.5,1,2")
        return tuple(found)

    @field_validator("dynamic")
    @classmethod
    def _a_metric(cls, value: str) -> str:
        asked = [value] if "/" in value and _of_states(value) else []  # one of another package is loaded by its id
        columns = {metrics.column_name(i): i for i in (*loaded(), *asked) if _of_states(i)}
        name = next((column for column, i in columns.items() if value in (column, i)), value.replace("-", "_"))
        if name not in columns:
            near = did_you_mean(name, columns)
            raise ValueError(f"a metric of the states of one run, such as kappa_geom, kappa_sync, erank.{near}")
        return name

    @field_validator("decode")
    @classmethod
    def _read(cls, value: str) -> str:
        if value != "forced":
            raise ValueError("items are read, not written; dynprobe recover has free arms")
        return value

    @model_validator(mode="after")
    def _nothing_by_construction(self) -> DissociateConfig:
        if any(by_construction(self.dynamic, self.detector, mode) for mode in (None, *self.mode)):
            raise ValueError(
                f"{self.dynamic} is what the controller acts on, so it recovers by arithmetic and its recovery would "
                "say nothing; take kappa_geom, or another metric that is left alone"
            )
        return self

    @property
    def measured_metrics(self) -> tuple[str, ...]:
        """Ids of all state metrics of this study."""
        return tuple(dict.fromkeys((*super().measured_metrics, metrics.columns()[self.dynamic].metric_id)))

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this study."""
        settings = {k: v for k, v in super().identity().items() if k != "items"}  # their content is hashed
        return {**settings, "protocol": "dissociate"}

    def refuse(self) -> None:
        """Refuse settings that belong to another protocol.

        Raises:
            UsageError: Naming one.
        """
        for name in _NOT_HERE:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UsageError(f"{name} does not belong to dynprobe dissociate, which reads items; see --items")
