"""Table of an ``eval`` run: one line per task, metric and arm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dynprobe.cli._console import console as new_console
from dynprobe.cli._render_head import mean_intervals

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["evaluation"]

#: What was done to the model, by arm: column of the summary → heading.
_DOSE = {"control_energy": "energy", "duty_cycle": "duty", "alpha_relnorm": "‖u‖/‖h‖"}


def evaluation(found: Run) -> None:
    """Print an ``eval`` run."""
    console, summary = new_console(), found.summary
    arms: Mapping[str, Mapping[str, float]] = summary["arms"]
    dose = [name for name in _DOSE if any(name in arm for arm in arms.values())]
    table = Table(
        title=f"{found.manifest.model_name} · {summary['documents']} items · lm-eval {summary['lm_eval']}",
        caption="share of right answers with its exact (Clopper–Pearson) 95 % interval, other metrics with the "
        f"{mean_intervals(summary, 'documents')}; change from clean paired by document, p exact (McNemar)",
    )
    for name in ("task", "metric", "arm"):
        table.add_column(name, no_wrap=True)
    for name in (*(_DOSE[d] for d in dose), "value", "change from clean", "lost / gained", "p", "chance", "n"):
        table.add_column(name, justify="right")
    before: tuple[Any, ...] = ()
    for row in summary["tasks"]:
        kind = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
        place = (row["task"], kind)
        change = row.get("change") or {}
        table.add_row(
            *(place if place != before else ("", "")), row["arm"], *[_number(arms[row["arm"]].get(d)) for d in dose],
            _with_ends(row, "mean"), _with_ends(change, "difference", "+") if change else "–",
            f"{change['lost']} / {change['gained']}" if "lost" in change else "–",
            f"{change['p']:.2g}" if "p" in change else "–", _number(row.get("chance")), str(row["n"]),
        )  # fmt: skip
        before = place
    console.print(table)
    missing = sum(row["missing"] for row in summary["tasks"])
    if missing:
        console.print(f"{missing} values are missing and enter no mean", soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def _with_ends(entry: Mapping[str, Any], name: str, sign: str = "") -> str:
    value, low, high = (math.nan if entry.get(key) is None else entry[key] for key in (name, "low", "high"))
    if math.isnan(value):
        return "–"
    return f"{value:{sign}.3f}" + ("" if math.isnan(low) else f" [{low:{sign}.3f}, {high:{sign}.3f}]")
