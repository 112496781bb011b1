"""What counts as destabilised: the response of a row, and the level it must reach.

=========== =============================================================================== ==================
``kl``      mean KL(clean ‖ perturbed) over the affected positions, teacher-forced            1 nat
``flip``    share of the affected positions whose top-1 token changed                         0.5
``kappa``   Δκ_phase of the row                                                               q99 of a null
``task``    right when clean minus right when perturbed (answer = top-1 continuation)         accuracy loss 0.2
=========== =============================================================================== ==================

Affected positions are the real ones from max(1, first written position) on. The null of ``kappa`` is the distribution
of Δκ under writes of numerical size (relative norm 1e-6) over prompts and seeds: what the arithmetic alone does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.protocols._trunk import Branch, Trunk

__all__ = ["CRITERIA", "NULL_ALPHA", "NULL_SEEDS", "Criterion", "criterion_named", "null_level"]

#: Relative norm of a write of numerical size, and how many of them each prompt gets.
NULL_ALPHA, NULL_SEEDS = 1e-6, 8


@dataclass(frozen=True)
class Criterion:
    """One definition of "destabilised".

    Attributes:
        name: Short name.
        metric_id: Its id.
        level: Level the response must reach; None is found from a null distribution.
        unit: Unit of response and level.
        which: Metrics that branches must be measured with.
        range: Strengths that are searched by default.
        first_round: Strengths of a search's first round. A KL rises with the strength and three will do; Δκ begins
            with either sign and comes down again at extreme strengths, so its first crossing must be looked for.
    """

    name: str
    metric_id: str
    level: float | None
    unit: str
    which: tuple[str, ...] = ()
    range: tuple[float, float] = (0.01, 10.0)
    first_round: int = 3

    def response(self, branch: Branch, trunk: Trunk) -> np.ndarray:
        """Response of each row of a branch of a trunk, ``[rows]``; NaN where it has none."""
        if self.name == "kl":
            return branch.mean("kl_clean_pert")
        if self.name == "flip":
            return branch.mean("flip")
        if self.name == "task":
            return trunk.right(np.arange(len(trunk.texts)), trunk.logits)[branch.source] - branch.right
        assert branch.paired is not None
        return np.array([float(result.value) for result in branch.paired])


CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion("kl", "crit.kl/1", 1.0, "nats"),
        Criterion("flip", "crit.flip/1", 0.5, "fraction", first_round=5),
        Criterion("kappa", "crit.kappa/1", None, "half-turns", ("kappa.phase/1",), (1e-5, 3.0), 9),
        Criterion("task", "crit.task/1", 0.2, "accuracy loss"),
    )
}


def criterion_named(name: str) -> Criterion:
    """Return a criterion by its short name or its id.

    Raises:
        UsageError: If there is none of that name.

    Example:
        >>> criterion_named("crit.kl/1").level
        1.0
    """
    for criterion in CRITERIA.values():
        if name in (criterion.name, criterion.metric_id):
            return criterion
    bare, given, level = name.partition("=")
    if given and bare in CRITERIA:
        said = f"type --criterion {bare} --level {level or 'NUMBER'}"
        raise UsageError(f"{name!r}: the level is a setting of its own; {said}")
    raise UsageError(f"there is no criterion {name!r}; known: {', '.join(CRITERIA)}.{did_you_mean(name, CRITERIA)}")


def null_level(values: Sequence[float] | np.ndarray, quantile: float = 0.99) -> float:
    """Return the quantile of a null distribution (linear interpolation), NaN where it has no finite value.

    Example:
        >>> null_level([0.0, 1.0, 2.0, 3.0], 0.5)
        1.5
    """
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    return float(np.quantile(finite, quantile)) if len(finite) else float("nan")
