"""The settings of a threshold search."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from dynprobe.protocols._criteria import Criterion, criterion_named
from dynprobe.protocols._grid import GridConfig, parse_strengths

__all__ = ["BOTH_SCALES", "ThresholdConfig"]

#: Scales under which a threshold is given when none is named: relative size alone misleads between models.
BOTH_SCALES = ("relnorm", "coordstd")


class ThresholdConfig(GridConfig):
    """Settings of a threshold search."""

    scale: tuple[str, ...] = Field(BOTH_SCALES, description="Noise scales.")
    criterion: tuple[str, ...] = Field(("kl",), description="kl, flip, kappa or task.")
    level: float | None = Field(None, description="Level of the response, in place of the criterion's own.")
    null: Literal["numerical", "paraphrase"] = Field(
        "numerical", description="Null of kappa: writes of relative norm 1e-6, or paraphrases of the prompts."
    )
    alpha_min: float | None = Field(None, gt=0, description="Lowest strength of the search.")
    alpha_max: float | None = Field(None, gt=0, description="Highest strength of the search.")
    each_position: bool = Field(False, description="One threshold per layer and position: a fragility map.")
    placement: Literal["search", "quest"] = Field(
        "search", description="search: a bracket per prompt; quest: one posterior over all prompts and fresh seeds."
    )
    trials: int = Field(200, ge=8, description="Trials of placement=quest, at most.")
    tolerance: float = Field(0.05, gt=0, description="Wanted relative precision of each prompt's threshold.")
    max_evaluations: int = Field(
        10, ge=3, description="Perturbed rows per prompt and threshold, at most; a few sham rows are added."
    )
    estimand: Literal["prompt", "mean"] = Field(
        "prompt", description="prompt: median over prompts; mean: crossing of the mean response (needs --alphas)."
    )
    n_boot: int = Field(2000, ge=200, description="Bootstrap resamples.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Coverage of the interval.")

    @field_validator("alphas", mode="before")
    @classmethod
    def _strengths(cls, value: Any) -> tuple[float, ...]:
        """None of them means the search, which is the default."""
        return () if value is None or (isinstance(value, str | list | tuple) and not value) else parse_strengths(value)

    @field_validator("criterion", mode="before")
    @classmethod
    def _criteria(cls, value: Any) -> tuple[str, ...]:
        names = tuple(value.replace("+", ",").split(",")) if isinstance(value, str) else tuple(value)
        chosen = tuple(criterion_named(name.strip()).name for name in names)
        if len(set(chosen)) < len(chosen) or not chosen:
            raise ValueError("name each criterion once: kl, flip, kappa or task")
        return chosen

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this search."""
        return {**super().identity(), "protocol": "threshold", "criterion": sorted(self.criterion)}

    def strengths(self, criterion: Criterion, kind: str = "gaussian") -> tuple[float, float]:
        """Range of the search; a dropout probability stays below 1."""
        low, high = criterion.range
        return self.alpha_min or low, self.alpha_max or (min(high, 0.95) if kind == "dropout" else high)
