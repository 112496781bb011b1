"""Shapes of analysis: what a claim asks of tables, and on which side of which margin the answer must lie.

There are ten shapes for all claims. Each names rows by the labels of conditions (never by their order), one number per
prompt, and one prediction. Which rows and which margin are data of the claim; how the number and its interval come
about is :mod:`dynprobe.claims._shapes`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dynprobe.metrics import parse_id

__all__ = [
    "STATISTICS", "Contrast", "Correlation", "Dissociation", "Nonlinear", "Part", "Prediction", "Ratio", "Row", "Share",
    "Skeleton", "Steps", "Term", "Threshold", "VarianceShare", "known_metric", "roles_of",
]  # fmt: skip

#: What a claim may rest on that is no metric of a trajectory: statistics of tables, and scores.
STATISTICS = {
    "accuracy": "Share of right answers.",
    "attractor.memory/1": "Strength, hits and cosines of the attractor layer's slots.",
    "corr.spearman/1": "Spearman's rank correlation with a cluster bootstrap.",
    "text.longest_repeat/1": "Longest span of tokens that occurs twice.",
    "text.repetition/1": "Share of 4-grams that occurred before.",
    "threshold.nonlinear/1": "Broken stick against power law, out of sample.",
    "time.seconds": "Wall time.",
    "topology.ari/1": "Adjusted Rand index of two partitions of models.",
    "train.loss": "Loss and stability of training.",
    "varexp.anova/1": "Shares of variance of model, category, interaction, prompt and seed.",
    "varexp.skeleton/1": "R² of model means on parameter count and layer structure.",
}


def known_metric(name: str) -> str:
    """Return a metric id or a declared statistic unchanged, and refuse anything else."""
    if name in STATISTICS:
        return name
    parse_id(name)  # refuses with the nearest id
    return name


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prediction(Row):
    """Which side of which margin a number must lie on.

    ``above``/``below`` one margin; ``within``/``outside`` a pair of them.
    """

    expect: Literal["above", "below", "within", "outside"]
    margin: float | tuple[float, float]
    unit: str = ""

    @model_validator(mode="after")
    def _sides(self) -> Prediction:
        pair = isinstance(self.margin, tuple)
        if pair != (self.expect in ("within", "outside")):
            raise ValueError(f"{self.expect} takes {'two margins' if not pair else 'one margin'}")
        if isinstance(self.margin, tuple) and not self.margin[0] < self.margin[1]:
            raise ValueError("two margins are (lower, upper)")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Both margins; one margin twice."""
        return self.margin if isinstance(self.margin, tuple) else (self.margin, self.margin)


class Term(Row):
    """Rows of one side of a comparison.

    Attributes:
        role: Whose run.
        where: Column → value, list of values, or ``first``/``last`` (of what is left, in the order given),
            ``above 0``;
            ``params.NAME`` looks into the parameters of the condition.
        weight: Weight of the side.
        keep: Only tokens in the ``highest`` or ``lowest`` third of another role's loss at the same place.
    """

    role: str = "subject"
    where: dict[str, Any] = Field(default_factory=dict)
    weight: float = 1.0
    keep: tuple[str, Literal["highest", "lowest"]] | None = None


class _Part(Row):
    metric: str
    prediction: Prediction
    label: str = ""

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        return known_metric(value)


class Contrast(_Part):
    """Σ weight·value of sides that share their prompts: a level, a difference, a difference of differences.

    ``acted`` keeps prompts whose value in that column is above 0 in every side of positive weight that has it.
    """

    shape: Literal["contrast"]
    value: str
    terms: tuple[Term, ...] = Field(min_length=1)
    table: str = "samples"
    cluster: str = "prompt_id"
    acted: str | None = None


class Steps(_Part):
    """Every step of a value along an ordered column, in one run: a monotone course."""

    shape: Literal["steps"]
    value: str
    over: str
    role: str = "subject"
    where: dict[str, Any] = Field(default_factory=dict)
    table: str = "samples"
    cluster: str = "prompt_id"


class Ratio(_Part):
    """Ratio of two models' thresholds; over the ratio of a number of theirs where ``relative_to`` names one."""

    shape: Literal["ratio"]
    of: str
    to: str
    criterion: str = "kl"
    scale: str = "relnorm"
    relative_to: Literal["n_layers", "n_parameters"] | None = None


class Threshold(_Part):
    """A model's threshold itself."""

    shape: Literal["threshold"]
    role: str = "subject"
    criterion: str = "kl"
    scale: str = "relnorm"


class Nonlinear(_Part):
    """Advantage of a broken stick over a power law out of sample, in a sweep of strengths."""

    shape: Literal["nonlinear"]
    value: str
    role: str = "subject"
    where: dict[str, Any] = Field(default_factory=dict)


class Share(_Part):
    """Share of rows for which a condition holds, or for which two conditions agree.

    A condition is (column, ``==`` ``!=`` ``>`` ``<`` ``in``, value).
    """

    shape: Literal["share"]
    holds: tuple[str, Literal["==", "!=", ">", "<", "in"], Any]
    agrees: tuple[str, Literal["==", "!=", ">", "<", "in"], Any] | None = None
    against: Term | None = None
    role: str = "subject"
    where: dict[str, Any] = Field(default_factory=dict)
    table: str = "samples"
    cluster: str = "prompt_id"


class Correlation(_Part):
    """Spearman's ρ of two columns over rows; of differences to another side where ``minus`` names it.

    With ``by_model`` every model is one point: the mean of its prompts.
    """

    shape: Literal["correlation"]
    x: str
    y: str
    role: str = "subject"
    where: dict[str, Any] = Field(default_factory=dict)
    minus: dict[str, Any] | None = None
    table: str = "samples"
    cluster: str = "prompt_id"
    by_model: bool = False


class VarianceShare(_Part):
    """Share η² of a factor in the variance of a value over models × categories × prompts."""

    shape: Literal["variance"]
    value: str
    factor: Literal["model", "category", "rest"]
    where: dict[str, Any] = Field(default_factory=dict)
    table: str = "samples"


class Skeleton(_Part):
    """R² of model means of a value on the skeleton (log₁₀ parameters, layers)."""

    shape: Literal["skeleton"]
    value: str
    covariates: tuple[Literal["log_parameters", "n_layers"], ...] = ("log_parameters", "n_layers")
    where: dict[str, Any] = Field(default_factory=dict)
    table: str = "samples"


class Dissociation(_Part):
    """Recovery fractions of dynamics and meaning on the same items; the number is that of ``of``."""

    shape: Literal["dissociation"]
    of: Literal["dynamic", "semantic"]
    dynamic: str = "kappa_geom"
    semantic: str = "right"
    mode: str | None = None
    role: str = "subject"


Part = Annotated[
    Contrast | Steps | Ratio | Threshold | Nonlinear | Share | Correlation | VarianceShare | Skeleton | Dissociation,
    Field(discriminator="shape"),
]


def roles_of(part: Any) -> set[str]:
    """Roles that a part names."""
    if isinstance(part, Contrast):
        return {t.role for t in part.terms} | {t.keep[0] for t in part.terms if t.keep is not None}
    if isinstance(part, Ratio):
        return {part.of, part.to}
    if isinstance(part, Share) and part.against is not None:
        return {part.role, part.against.role}
    role = getattr(part, "role", None)
    return set() if role is None or getattr(part, "by_model", False) else {role}
