"""Every metric with what defines it, as data and for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.metrics import MetricSpec

__all__ = ["metric_facts", "metric_in_full", "metric_list"]

_UNCHANGED = {
    "R": "global rotation", "R_l": "rotation per depth", "S": "global scale", "S_l": "scale per depth",
    "P": "permutation of units", "T": "length (intensive)", "scale-per-state": "a factor for each state",
    "shift": "an added constant vector",
}  # fmt: skip


def metric_facts(spec: MetricSpec) -> dict[str, Any]:
    """Return a definition as plain data."""
    return {
        "id": spec.id, "measures": spec.sentence, "formula": spec.formula, "input": spec.input,
        "range": spec.value_range, "unit": spec.unit, "invariances": sorted(spec.invariances),
        "params": dict(spec.params), "column": spec.column,
        "levels": dict(spec.levels), "source": spec.source, "digest": spec.digest, "vectors": list(spec.vectors),
    }  # fmt: skip


def _stored(metric: str, core: Collection[str], default: Collection[str]) -> str:
    return "core, default" if metric in core else "default" if metric in default else "on request"


def metric_in_full(facts: Mapping[str, Any], *, core: Collection[str], default: Collection[str]) -> None:
    """Print one definition with everything that belongs to it, conformance vectors included."""
    console = new_console()
    console.print(Text(f"{facts['id']}  ({_stored(facts['id'], core, default)})", style="bold"), soft_wrap=True)
    rows = [("", facts["measures"]), ("formula", facts["formula"]), ("input", facts["input"])]
    rows += [("range", facts["range"]), ("unit", facts["unit"])]
    rows += [("unchanged", f"{key}: {_UNCHANGED.get(key, key)}") for key in facts["invariances"]] or [
        ("unchanged", "by nothing declared")
    ]
    rows += [("param", f"{key} = {value}") for key, value in facts["params"].items()] or [("param", "none")]
    rows += [("column", facts["column"] or "none")]
    rows += [("table", f"{level}: {how}") for level, how in facts["levels"].items()]
    rows += [("vector", vector) for vector in facts["vectors"]]
    rows += [("source", facts["source"]), ("digest", facts["digest"])]
    before = None
    for name, value in rows:
        shown = "" if name == before else name
        console.print(Text(f"  {shown:<10} {' '.join(str(value).split())}" if name else f"  {value}"), soft_wrap=True)
        before = name


def metric_list(specs: Sequence[MetricSpec], *, core: Collection[str], default: Collection[str]) -> None:
    """Print every metric with formula, range, unit, invariances and source."""
    console = new_console()
    for spec in specs:
        console.print(Text(f"{spec.id}  ({_stored(spec.id, core, default)})", style="bold"), soft_wrap=True)
        console.print(f"  {spec.sentence}", soft_wrap=True)
        facts = (
            ("formula", spec.formula), ("input", spec.input), ("range", spec.value_range), ("unit", spec.unit),
            ("unchanged", ", ".join(sorted(spec.invariances)) or "by nothing declared"),
            ("column", spec.column or "none"), ("source", spec.source), ("digest", spec.digest),
        )  # fmt: skip
        for name, value in facts:
            console.print(f"  {name:<9} {' '.join(str(value).split())}", soft_wrap=True)
    console.print(
        "unchanged under: R rotation · R_l rotation per depth · S scale · S_l scale per depth · "
        "P permutation of units · T length", soft_wrap=True,
    )  # fmt: skip
