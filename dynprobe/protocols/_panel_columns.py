"""Which columns a panel can decompose: those that the samples of its cells may have, by name.

A misspelt column would be found nowhere after hours of cells, and its table would be missing without a word.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynprobe import metrics
from dynprobe.errors import MetricError, UsageError, did_you_mean
from dynprobe.protocols._columns import column_facts
from dynprobe.protocols._config import RunConfig

__all__ = ["no_column"]

_COUNTS = ("n_prompt", "n_new")
#: Columns that reading at several numbers of iterations adds.
_ITERATED = (
    "delta_last", "delta_last_angle", "delta_last_radial", "energy_last", "best_iteration", "converged_at", "right",
)  # fmt: skip
#: Columns of a criterion of convergence carry its parameters in their names.
_CONVERGED = "converge_iterations"


def no_column(name: str, protocol: str, asked: Sequence[str] = ()) -> str | None:
    """Say what is wrong with a column that is to be decomposed, or None where a cell may have it.

    Args:
        name: The column.
        protocol: ``run`` or ``iterate``.
        asked: Metrics that are stored beside the default ones, by id.

    Example:
        >>> no_column("nlll", "run")
        "nlll is no column of the samples. Did you mean 'nll'?"
        >>> no_column("kappa.phase/1", "run")
        'kappa.phase/1 is the id of a metric; its column is kappa_phase'
    """
    if protocol == "iterate" and name.startswith(_CONVERGED):
        return None
    try:
        facts = column_facts(RunConfig.build(metrics=tuple(asked)))
    except UsageError:  # said of the metrics themselves
        return None
    own = {key.removeprefix("samples.") for key in facts if "." not in key or key.startswith("samples.")}
    known = [*sorted(own), *_COUNTS, *(_ITERATED if protocol == "iterate" else ())]
    if name in known:
        return None
    try:
        column = metrics.column_name(name)
    except MetricError:
        column = ""
    if column in known:
        return f"{name} is the id of a metric; its column is {column}"
    near = did_you_mean(name, known) or " Columns are called like metrics, kappa_phase after kappa.phase/1: see "
    return f"{name} is no column of the samples.{near}" + ("" if near.endswith("?") else "dynprobe metrics")
