"""Which numbers of two runs may be set beside each other: those of one metric, to the letter.

A column is a metric where its field metadata holds an id. Two columns of one name are the same metric when the id, the
digest of its definition, the unit, the span of tokens and the aggregation are equal; otherwise the pair is refused for
that column and the message says what differs.

An exception is a registered converter. Tables hold *means*, and only an affine map of a mean is the mean of the mapped
values, so a converter is ``scale·x + offset`` and nothing else: cosine to angle, or Δ over the previous norm to Δ over
the next, cannot be done on means and have no converter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dynprobe.errors import MetricError, UsageError, did_you_mean
from dynprobe.runs._compare_sides import Side

__all__ = ["CORE", "Converter", "Quantity", "common_columns", "converters", "metric_facts", "register_converter"]

#: What a comparison prints first; κ always as both, per step and as a path.
CORE = (
    "kappa_phase", "kappa_path", "delta_rel_prev", "kappa_geom", "norm", "limen_ratio", "entropy", "nll",
    "kappa_phase_d", "kappa_path_d", "kl_clean_pert", "flip_rate", "nll_d",
)  # fmt: skip
#: A statement about the one is a statement about both.
COMPANIONS = {"kappa_phase": "kappa_path", "kappa_path": "kappa_phase"} | {
    "kappa_phase_d": "kappa_path_d", "kappa_path_d": "kappa_phase_d",
}  # fmt: skip
_MUST_AGREE = {"id": "metric id", "digest": "definition", "unit": "unit", "span": "span", "aggregation": "aggregation"}
_SAME_UNIT = {"nats": "nat"}


@dataclass(frozen=True)
class Converter:
    """An affine map from one metric to another, ``scale·x + offset``, of columns in one unit."""

    source: str
    target: str
    unit: str
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Quantity:
    """A metric column of a comparison.

    Attributes:
        column: Name of the column.
        metric_id: Its id.
        unit: Its unit.
        span: Tokens it speaks of.
        sources: Of each run: column to read and the converter to apply; None where the run has no such metric.
        refused: Pairs of runs that may not be compared, with what differs.
    """

    column: str
    metric_id: str
    unit: str
    span: str
    sources: tuple[tuple[str, Converter | None] | None, ...]
    refused: dict[tuple[int, int], str]


_CONVERTERS: dict[tuple[str, str], Converter] = {}


def register_converter(source: str, target: str, *, unit: str, scale: float = 1.0, offset: float = 0.0) -> Converter:
    """Allow a comparison to turn one metric into another.

    Args:
        source: Id of the metric that a run has.
        target: Id of the metric that it becomes.
        unit: Unit of the columns that are converted; one metric may stand in several (an angle in rad and half-turns).
        scale: Factor.
        offset: Added after it.

    Raises:
        MetricError: The ids are equal, or the factor is 0.

    Example:
        >>> register_converter("my.angle_degrees/1", "my.angle/1", unit="°", scale=1 / 180).scale * 90
        0.5
    """
    if source == target or not scale:
        raise MetricError(
            f"a converter needs two ids and a factor that is not 0, found {source!r}, {target!r}, {scale}"
        )
    found = Converter(source, target, unit, scale, offset)
    _CONVERTERS[source, target] = found
    return found


def converters() -> list[Converter]:
    """Return the registered converters."""
    return list(_CONVERTERS.values())


# Both are the angle of a step in half-turns, averaged over units and then over steps.
register_converter("delta.angle/1", "kappa.phase/1", unit="half-turns")
register_converter("kappa.phase/1", "delta.angle/1", unit="half-turns")


#: Facts of the metric columns of a table of a run, by name.
Facts = dict[str, dict[str, str]]


def metric_facts(side: Side, table: str) -> Facts:
    """Return the metric columns of a table of a run: numbers with an id, by name."""
    facts = side.facts
    kept = facts[(facts["table"] == table) & (facts["id"] != "") & facts["dtype"].isin(("float32", "float64"))]
    rows = {str(row["column"]): {str(k): str(v) for k, v in row.items()} for row in kept.to_dict("records")}
    for row in rows.values():
        row["unit"] = _SAME_UNIT.get(row["unit"], row["unit"])
    return rows


def common_columns(sides: Sequence[Side], facts: Sequence[Facts], wanted: Sequence[str] = ()) -> list[Quantity]:
    """Return the metrics that at least two runs have, with the pairs that are refused.

    Args:
        sides: The runs.
        facts: Of each run, its metric columns by name.
        wanted: Columns; empty takes all.

    Raises:
        UsageError: A wanted column is in fewer than two runs.
    """
    names = list(dict.fromkeys(name for frame in facts for name in frame))
    if wanted:
        for name in wanted:
            holders = [s.label for s, f in zip(sides, facts, strict=True) if name in f]
            if len(holders) < 2 and not any(_source(f, name, _id_of(facts, name)) for f in facts if name not in f):
                where = f"only {holders[0]} has" if holders else "no run has"
                raise UsageError(f"{where} a metric column {name!r}.{did_you_mean(name, names)} {_have(facts)}")
        names = list(dict.fromkeys([*wanted, *(COMPANIONS[w] for w in wanted if COMPANIONS.get(w) in names)]))
    found = []
    for name in names:
        target = _id_of(facts, name)
        sources = tuple(_source(frame, name, target) for frame in facts)
        if sum(s is not None for s in sources) < 2:
            continue
        refused = {}
        held = [i for i, s in enumerate(sources) if s is not None]
        for at, i in enumerate(held):
            for j in held[at + 1 :]:
                why = _difference(facts[i], sources[i], facts[j], sources[j])
                if why:
                    refused[i, j] = f"{sides[i].label} and {sides[j].label}: {why}"
        first = facts[next(i for i in held if name in facts[i])][name]
        found.append(Quantity(name, first["id"], first["unit"], first["span"], sources, refused))
    return found


def _id_of(facts: Sequence[Facts], name: str) -> str:
    return next((frame[name]["id"] for frame in facts if name in frame), "")


def _source(frame: Facts, name: str, target: str) -> tuple[str, Converter | None] | None:
    """Return the column that holds the metric in a run: the one of that name, else one with a converter."""
    if name in frame:
        return name, _converter(frame[name], target)
    if name.endswith("_path"):  # a sum over steps, which no map of a mean gives
        return None
    paired = name.endswith("_d")
    for column, row in frame.items():
        known = _converter(row, target)
        if known is not None and column.endswith("_d") == paired and "_d_" not in column:
            # An offset cancels in a difference.
            return column, replace(known, offset=0.0) if paired else known
    return None


def _converter(row: dict[str, str], target: str) -> Converter | None:
    found = _CONVERTERS.get((row["id"], target))
    return found if found is not None and found.unit == row["unit"] else None


def _difference(
    a: Facts,
    left: tuple[str, Converter | None] | None,
    b: Facts,
    right: tuple[str, Converter | None] | None,
) -> str:
    """Return what differs between two columns, or an empty text."""
    if left is None or right is None:
        return ""
    x, y = a[left[0]], b[right[0]]
    converted = left[1] is not None or right[1] is not None
    said = []
    for key, words in _MUST_AGREE.items():
        if converted and key in ("id", "digest", "unit", "aggregation"):
            continue
        # A run of an older version may not have recorded a fact; an id is always there.
        if key != "id" and not (x[key] and y[key]):
            continue
        if x[key] != y[key]:
            said.append(f"{words} {x[key]!r} against {y[key]!r}")
    return "; ".join(said)


def _have(facts: Sequence[Facts]) -> str:
    common = [name for name in facts[0] if sum(name in f for f in facts) > 1]
    return f"Metrics of two runs or more: {', '.join(common) or 'none'}."
