"""Every metric with what defines it, as data and for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.metrics import MetricSpec

__all__ = ["metric_facts", "metric_list"]


def metric_facts(spec: MetricSpec) -> dict[str, Any]:
    """Return a definition as plain data."""
    return {
        "id": spec.id, "measures": spec.sentence, "formula": spec.formula, "input": spec.input,
        "range": spec.value_range, "unit": spec.unit, "invariances": sorted(spec.invariances),
        "params": dict(spec.params), "column": spec.column,
        "levels": dict(spec.levels), "source": spec.source, "digest": spec.digest, "vectors": list(spec.vectors),
    }  # fmt: skip


def metric_list(specs: Sequence[MetricSpec], *, core: Collection[str], default: Collection[str]) -> None:
    """Print every metric with formula, range, unit, invariances and source."""
    console = new_console()
    for spec in specs:
        lists = "core, default" if spec.id in core else "default" if spec.id in default else "on request"
        console.print(Text(f"{spec.id}  ({lists})", style="bold"), soft_wrap=True)
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
