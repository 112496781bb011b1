"""What a run says of the metrics that were asked for by id: their means, or where their curves are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dynprobe.cli._render_head import mean_intervals
from dynprobe.runs._stored_number import stored_number

if TYPE_CHECKING:
    from rich.console import Console

    from dynprobe.runs import Run

__all__ = ["asked"]


def asked(found: Run, console: Console) -> None:
    """Print one line per metric and column that ``--metrics`` added, with its mean and interval in each arm."""
    ids = list(found.manifest.config.get("metrics") or ())
    if not ids:
        return
    facts = found.columns()
    facts = facts[facts["id"].isin(ids) & facts["table"].isin(["samples", "tokens", "depths", "profiles"])]
    arms = {name: entry for name, entry in found.summary["conditions"].items() if not entry.get("equal_to")}
    caption = f"means; in brackets: {mean_intervals(found.summary)}; _d: paired change"
    shown = Table(title="asked with --metrics", caption=caption)
    for name in ("column", "metric", "unit"):
        shown.add_column(name)
    for arm in arms:
        shown.add_column(arm, justify="right")
    for row in facts[facts["table"] == "samples"].itertuples():
        if any(row.column in entry for entry in arms.values()):
            named = (str(row.column), str(row.id), str(row.unit))
            shown.add_row(*named, *[_cell(entry.get(row.column)) for entry in arms.values()])
    if shown.row_count:
        console.print(shown)
    for table, rows in facts[facts["table"] != "samples"].groupby("table", sort=False, observed=True):
        console.print(f"in table {table!r}: " + ", ".join(rows["column"]), soft_wrap=True)


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    mean, low, high = (stored_number(entry[name]) for name in ("mean", "low", "high"))
    if math.isnan(mean):
        return f"– {entry.get('reason') or ''}".rstrip()
    said = f"{mean:.4g}" + ("" if math.isnan(low) else f"\n[{low:.4g}, {high:.4g}]")
    if entry["missing"]:
        why = ", ".join(entry.get("reasons") or ()) or "no value"
        said += f"\n{entry['n']} of {entry['n'] + entry['missing']} prompts; others: {why}"
    return said
