"""Table of an ``iterate`` run: one line per number of iterations, then who converged and who was best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table

from dynprobe.cli._console import console as new_console
from dynprobe.cli._render_head import mean_intervals

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["iterate"]

#: Column → heading.
_SHOWN = {
    "ppl": "perplexity", "delta_last": "Δ last", "delta_last_angle": "angle/π", "delta_last_radial": "|ln norm|",
    "kappa_phase": "κ phase", "energy_last": "energy", "right": "right",
}  # fmt: skip


def iterate(found: Run) -> None:
    """Print an ``iterate`` run."""
    console, summary = new_console(), found.summary
    table = pd.DataFrame(summary["iterations"])
    trained = summary.get("trained_iterations")
    for arm, rows in table.groupby("arm", sort=False):
        shown = Table(
            title=f"{found.manifest.model_name} · {arm}",
            caption=f"means; in brackets: {mean_intervals(summary)}; * trained depth",
        )
        shown.add_column("T", justify="right")
        used = [name for name in _SHOWN if name in rows and rows[name].notna().any()]
        for name in used:
            shown.add_column(_SHOWN[name], justify="right")
        shown.add_column("prompts", justify="right")
        for _, row in rows.iterrows():
            T = int(row["iterations"])
            shown.add_row(f"{T}{'*' if trained == T else ''}", *[_cell(row, name) for name in used], str(int(row["n"])))
        console.print(shown)
    best, converged = summary["best_iteration"], summary["converged_at"]
    console.print(
        f"best_iteration (lowest loss): median {best['median']:g} [{best['low']:g}, {best['high']:g}] over prompts "
        "(quartiles); " + _converged(converged, found),
        soft_wrap=True,
    )
    for split, rows in (
        pd.DataFrame(summary.get("hardness") or []).groupby("split", sort=False) if summary.get("hardness") else ()
    ):
        _hardness(console, str(split), rows, mean_intervals(summary))
    for note in summary.get("notes") or ():
        console.print(f"note: {note}", soft_wrap=True)


def _converged(converged: dict[str, Any], found: Run) -> str:
    tol = found.manifest.config.get("tol")
    if converged["censored"] is None:
        return "converged_at: not measured (every layer has a loop of its own)"
    if pd.isna(converged["median"]):
        return f"converged_at (Δ < {tol}): not within the longest run"
    censored = f", {converged['censored']} not within the longest run" if converged["censored"] else ""
    quartiles = f"[{converged['low']:g}, {converged['high']:g}]"
    return f"converged_at (Δ < {tol}): median {converged['median']:g} {quartiles}{censored}"


def _cell(row: pd.Series, name: str) -> str:
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if pd.isna(value):
        return "–"
    return f"{value:.4g}" if low is None or pd.isna(low) else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def _hardness(console: Any, split: str, rows: pd.DataFrame, intervals: str) -> None:
    own = split == "own_loss"
    shown = Table(
        title="tokens split by " + ("the model's own loss at the first T" if own else f"the loss of {split}"),
        caption="regression to the mean alone makes hard tokens improve here: no evidence" if own else
        f"change of perplexity against the first T, {intervals}",
    )  # fmt: skip
    shown.add_column("T", justify="right")
    buckets = list(dict.fromkeys(rows["bucket"]))
    for bucket in buckets:
        shown.add_column(f"{bucket}: perplexity, change", justify="right")
    for T, at in rows.groupby("iterations"):
        cells = []
        for bucket in buckets:
            row = at[at["bucket"] == bucket].iloc[0]
            ends = f" [{row['change_low']:+.1%}, {row['change_high']:+.1%}]" if pd.notna(row["change_low"]) else ""
            cells.append(f"{row['ppl']:.4g}, {row['change']:+.1%}{ends}")
        shown.add_row(str(T), *cells)
    console.print(shown)
