"""The catalogue of metrics: ids, definitions, columns.

An id is ``family.estimator/major{key=value,…}``. The major number changes when any conformance vector changes, so two
equal ids mean equal numbers. A :class:`MetricSpec` holds the normative text of one definition together with its
conformance vectors, and ``digest`` is the fingerprint of both: what a stored column was made with can be checked years
later. Bare words such as "kappa" or "delta" are never ids, because every field means something else by them.

Estimator parameters (``W=16``) change the number and stay in the metric id. Extraction options (``embed``, ``sink``, …)
say how states were cut out of a model; they may be written in an id as well, but they belong to the extractor and end
up in ``extractor_id``. ``compute`` never acts on them: it takes exactly what it is given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from dynprobe._plugins import Registry
from dynprobe.errors import MetricError, did_you_mean
from dynprobe.metrics._id_values import near_key, show, snake, typed
from dynprobe.metrics._reserved import refuse_names
from dynprobe.metrics._result import Scores

if TYPE_CHECKING:
    from dynprobe.metrics._sample import Context

__all__ = [
    "PLUGINS", "Column", "Metric", "MetricSpec", "ParsedId", "column_name", "columns", "format_id", "ids", "measurable",
    "parse_id", "spec",
]  # fmt: skip

#: Scores a batch from the walk over its states.
Scorer: TypeAlias = Callable[["Context", dict[str, Any]], Scores]

EXTRACTION = MappingProxyType(
    {"embed": 0, "final_norm": "pre", "grain": "layer", "sink": "drop1", "site": "resid_post", "span": ""}
)
_ID = re.compile(r"^(?P<name>[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)+)/(?P<major>\d+)(?:\{(?P<params>[^{}]*)\})?$")


@dataclass(frozen=True)
class MetricSpec:
    """The definition of one metric.

    Args:
        id: ``family.estimator/major`` without parameters.
        sentence: What it measures, in one sentence.
        formula: Normative text of the definition.
        input: Declared input, such as ``trajectory[depth,unit,dim]``, ``tokens[pos,dim]`` or ``series``.
        value_range: Range of the value, as text.
        unit: Unit of the value.
        invariances: Transformations that leave the value unchanged. ``R`` global rotation, ``R_l`` rotation per depth,
            ``S`` global positive scale, ``S_l`` scale per depth, ``P`` unit permutation, ``T`` intensive in length,
            ``scale-per-state`` a positive factor for each single state, ``shift`` an added constant vector.
        source: Where the definition comes from.
        params: Estimator parameters with their defaults; they are part of the id when they differ.
        column: Column name in tables.
        levels: Tables that carry the column, each with the way it is aggregated there.
        vectors: Conformance vectors that belong to the definition.
        groups: Named lists the metric belongs to.
        latex: The formula as LaTeX, for typesetting. The text of ``formula`` is normative; this is no part of the
            digest.
        span: Whether a run narrows it to the span: it reads along the tokens, or compares them as a set.

    Example:
        >>> from dynprobe.metrics import spec
        >>> spec("kappa.phase/1").family, spec("kappa.phase/1").estimator, spec("kappa.phase/1").major
        ('kappa', 'phase', 1)
    """

    id: str
    sentence: str
    formula: str
    input: str
    value_range: str
    unit: str
    invariances: frozenset[str]
    source: str
    params: Mapping[str, Any] = field(default_factory=dict)
    column: str = ""
    levels: Mapping[str, str] = field(default_factory=dict)
    vectors: tuple[str, ...] = ()
    groups: frozenset[str] = frozenset()
    latex: str = ""
    span: bool = False

    @property
    def name(self) -> str:
        """The id without its major number."""
        return self.id.split("/")[0]

    @property
    def family(self) -> str:
        """First part of the name."""
        return self.name.split(".")[0]

    @property
    def estimator(self) -> str:
        """The name after the family."""
        return self.name.split(".", 1)[1]

    @property
    def major(self) -> int:
        """Major version."""
        return int(self.id.split("/")[1])

    @property
    def digest(self) -> str:
        """First 12 hex digits of SHA-256 over the definition and its conformance vectors.

        In a metric of another package ``span`` counts too, because it says which tokens a run gives it.
        """
        narrowed = ["span"] if self.span and self.name not in _OURS else []
        stated = [self.id, self.input, self.formula, repr(sorted(self.params.items())), *narrowed, *self.vectors]
        text = "\n".join(stated)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class ParsedId(NamedTuple):
    """An id taken apart: the bare id, estimator parameters (defaults filled in), extraction options as written."""

    id: str
    params: dict[str, Any]
    extraction: dict[str, Any]

    def __str__(self) -> str:
        return format_id(self.id, self.params, self.extraction)


class Column(NamedTuple):
    """What one table column holds, per level of the run folder."""

    name: str
    metric_id: str
    unit: str
    levels: Mapping[str, str]
    digest: str


@dataclass(frozen=True)
class Metric:
    """A definition together with the functions that compute it.

    Args:
        spec: The definition.
        compute: ``(inputs, mask, params, metric_id) → Result`` of one input, exactly as handed in; further arguments
            are side inputs. :func:`~dynprobe.metrics.trajectory_metric` makes one of plain mathematics.
        arity: Number of inputs.
        score: Scores a whole batch from the walk over its states; with it a run can store the metric.
        needs: What the walk must collect for it beside norms and steps: ``turn sync hop hop_turn ct ct2``.
    """

    spec: MetricSpec
    compute: Callable[..., Any]
    arity: int = 1
    score: Scorer | None = None
    needs: Collection[str] = ()


_ENTRIES: dict[str, Metric] = {}
_EXTRA_COLUMNS: dict[str, tuple[str, str, Mapping[str, str]]] = {}


def register(
    definition: MetricSpec,
    compute: Callable[..., Any],
    arity: int = 1,
    *,
    score: Scorer | None = None,
    needs: Collection[str] = (),
) -> None:
    """Enter a definition and its functions into the catalogue; the arguments are those of :class:`Metric`."""
    _ENTRIES[definition.id] = Metric(definition, compute, arity, score, needs)
    _OURS.add(definition.name)


def register_column(name: str, metric_id: str, unit: str, levels: Mapping[str, str]) -> None:
    """Enter a companion column, one that a metric writes besides its own."""
    _EXTRA_COLUMNS[name] = (metric_id, unit, levels)


def _plugin(name: str, found: Any) -> tuple[Metric, ...]:
    """Check what a plug-in's entry point names: a metric, or several majors of one, and enter them."""
    made = tuple(found) if isinstance(found, list | tuple) else (found,)
    for one in made:
        if not isinstance(one, Metric):
            raise TypeError(f"it is a {type(one).__name__}, not a dynprobe.metrics.Metric")
        if _ID.match(one.spec.id) is None or one.spec.name != name:
            raise ValueError(f"its id {one.spec.id!r} is not {name}/MAJOR, as the entry point says")
        if not one.spec.column.isidentifier() or one.spec.column.lower() != one.spec.column:
            raise ValueError(f"its column {one.spec.column!r} is no name in small letters, digits and underscores")
        refuse_borrowed(one.spec)
    _ENTRIES.update({one.spec.id: one for one in made})
    return made


def refuse_borrowed(definition: MetricSpec) -> None:
    """Refuse a definition of another package whose family or column is somebody else's.

    Raises:
        ValueError: Naming it.
    """
    if definition.name in _OURS:
        return
    others = {s.column: s.id for s in (one.spec for one in _ENTRIES.values()) if s.name != definition.name and s.column}
    taken = others | {name: metric_id for name, (metric_id, *_) in _EXTRA_COLUMNS.items()}
    refuse_names(definition.family, definition.column, {name.split(".")[0] for name in _OURS}, taken)


_OURS: set[str] = set()
#: Metrics of other packages, by the name of their id without the major number.
PLUGINS: Registry[tuple[Metric, ...]] = Registry("dynprobe.metrics", "metric", lambda: _OURS, _plugin)


def _found(metric_id: str) -> Metric | None:
    """The entry of a bare id, brought in where a plug-in has its name."""
    name = metric_id.split("/")[0]
    if metric_id not in _ENTRIES and PLUGINS.plugin(name) is not None:
        PLUGINS[name]
    return _ENTRIES.get(metric_id)


def measurable() -> list[str]:
    """Return the ids that are computed from the states of one run, of those that are loaded."""
    return [key for key, one in _ENTRIES.items() if one.score is not None]


def loaded() -> list[str]:
    """Return the ids that are there: dynprobe's own, then those of plug-ins that were asked for, by name."""
    theirs = sorted(key for key, one in _ENTRIES.items() if one.spec.name not in _OURS)
    return [*(key for key, one in _ENTRIES.items() if one.spec.name in _OURS), *theirs]


def entry(metric_id: str) -> Metric:
    """Return the catalogue entry of a bare id, or refuse with the nearest known one."""
    found = _found(metric_id)
    if found is None:
        said = f"Unknown metric {metric_id!r}.{_near(metric_id)} `dynprobe.metrics.ids()` lists all of them."
        raise MetricError(said)
    return found


def _near(text: str) -> str:
    """Return the ids that a text may mean, as a question: those of its name, those with it inside, or the nearest."""
    known, stem = ids(), text.split("/")[0]
    parts = {k: k.split("/")[0].split(".") for k in known}
    near = get_close_matches(stem, sorted({part for found in parts.values() for part in found}), n=1)
    inside = [k for k in known if k.split("/")[0] == stem]
    inside = inside or [k for k in known if stem in parts[k]]
    inside = inside or ([] if did_you_mean(text, known) or not near else [k for k in known if near[0] in parts[k]])
    if len(inside) == 1:
        return f" Did you mean {inside[0]!r}?"
    return f" Did you mean one of {', '.join(inside)}?" if inside else did_you_mean(text, known)


def ids(level: str | None = None, group: str | None = None) -> list[str]:
    """List metric ids, optionally only those of one table level or one group.

    Args:
        level: ``depth``, ``token``, ``profile`` or ``sample``.
        group: ``core``, ``default``, ``paired``, ``optional``, or a family such as ``kappa``.

    Returns:
        Ids in catalogue order, those of other packages last. Theirs are imported for it, because level and group stand
        in the definition; one that cannot be loaded is warned of.

    Example:
        >>> ids(group="delta")
        ['delta.rel_prev/1', 'delta.rel_next/1', 'delta.rms/1', 'delta.angle/1']
    """
    PLUGINS.warn_of_broken()
    return [
        key
        for key, s in ((key, _ENTRIES[key].spec) for key in loaded())
        if (level is None or level in s.levels) and (group is None or group in s.groups or group == s.family)
    ]


def spec(metric_id: str) -> MetricSpec:
    """Return the definition behind an id (parameters in the id are checked and ignored).

    Raises:
        MetricError: The id is unknown or malformed.

    Example:
        >>> spec("kappa.phase/1").unit, spec("kappa.phase/1").value_range
        ('half-turns', '[0, 1]; 0 in phase, 0.5 quadrature, 1 anti-phase')
    """
    return entry(parse_id(metric_id).id).spec


def parse_id(metric_id: str) -> ParsedId:
    """Take an id apart.

    Args:
        metric_id: Such as ``"kappa.geom/1{W=16}"`` or ``"kappa.phase/1{embed=0,sink=drop1}"``.

    Returns:
        Bare id, estimator parameters with defaults filled in, extraction options as written.

    Raises:
        MetricError: The text is no id, the metric is unknown, or a parameter is not one of its own.

    Example:
        >>> parse_id("kappa.geom/1{W=16}").params
        {'W': 16}
        >>> str(parse_id("kappa.geom/1{W=64}"))
        'kappa.geom/1'
    """
    match = _ID.match(metric_id.strip())
    if match is None:
        said = f"{metric_id!r} is not a metric id; write family.estimator/major{{key=value}}."
        raise MetricError(said + (_near(metric_id.strip()) or " `dynprobe.metrics.ids()` lists all of them."))
    bare = f"{match['name']}/{int(match['major'])}"
    definition = entry(bare).spec
    params, extraction = dict(definition.params), {}
    for part in filter(None, (match["params"] or "").split(",")):
        key, sign, text = (piece.strip() for piece in part.partition("="))
        if not sign or not text:
            raise MetricError(f"In {metric_id!r}, {part!r} is not key=value.")
        if key in definition.params:
            params[key] = typed(key, text, definition.params[key], bare)
        elif key in EXTRACTION:
            extraction[key] = typed(key, text, EXTRACTION[key], bare)
        else:
            known = [*definition.params, *EXTRACTION]
            raise MetricError(
                f"{bare!r} has no parameter {key!r}.{near_key(key, known)} Known: {', '.join(sorted(known))}."
            )
    return ParsedId(bare, params, extraction)


def format_id(
    metric_id: str, params: Mapping[str, Any] | None = None, extraction: Mapping[str, Any] | None = None
) -> str:
    """Write the canonical id: keys sorted, defaults omitted.

    Example:
        >>> format_id("kappa.geom/1", {"W": 16}), format_id("kappa.geom/1", {"W": 64})
        ('kappa.geom/1{W=16}', 'kappa.geom/1')
    """
    defaults = {**EXTRACTION, **entry(metric_id).spec.params}
    shown = {k: v for k, v in {**(params or {}), **(extraction or {})}.items() if v != defaults.get(k)}
    inner = ",".join(f"{k}={show(shown[k])}" for k in sorted(shown))
    return f"{metric_id}{{{inner}}}" if inner else metric_id


def column_name(metric_id: str) -> str:
    """Return the column of an id: the registered name, a suffix per parameter, ``_v2`` for another major.

    Example:
        >>> column_name("kappa.geom/1{W=16}"), column_name("limen.ratio/1{norm=winsor_mad}")
        ('kappa_geom_w16', 'limen_ratio_winsor_mad')
    """
    parsed = parse_id(metric_id)
    definition = entry(parsed.id).spec
    name = definition.column or definition.name.replace(".", "_")
    if definition.major > 1:
        name += f"_v{definition.major}"
    for key in sorted(parsed.params):
        value = parsed.params[key]
        if value != definition.params[key]:
            name += f"_{value}" if isinstance(value, str) else f"_{key.lower()}{snake(value)}"
    return name


def columns() -> dict[str, Column]:
    """Map column names to metric, unit, table levels with their aggregation, and digest.

    Metrics of other packages are among them once they were asked for by id.

    Example:
        >>> columns()["angle"].metric_id, columns()["angle"].unit
        ('delta.angle/1', 'rad')
    """
    out = {
        s.column: Column(s.column, s.id, s.unit, s.levels, s.digest)
        for s in (_ENTRIES[key].spec for key in loaded())
        if s.column and s.levels
    }
    for name, (metric_id, unit, levels) in _EXTRA_COLUMNS.items():
        out[name] = Column(name, metric_id, unit, levels, entry(parse_id(metric_id).id).spec.digest)
    return out
