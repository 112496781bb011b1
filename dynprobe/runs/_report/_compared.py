"""The part of a page that sets several runs beside each other, made from :func:`dynprobe.runs.compare`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from dynprobe.runs._comparison import TABLES_OF
from dynprobe.runs._report._looks import bands_said, curves, in_order
from dynprobe.runs._report._parts import Chart, Figure, Frame, Section, Table, axis, points

if TYPE_CHECKING:
    from dynprobe.runs._comparison import Comparison

__all__ = ["comparison_section"]

_FILTERS = ("condition", "metric", "run", "a", "b", "measure", "criterion", "scale")
#: Tables that are shown, the ones a reader wants first.
_SHOWN = ("means", "pairs", "depth_means", "depth_pairs", "contrasts", "matched_means", "matched_pairs", "thresholds",
          "correlations", "conditions", "refused")  # fmt: skip


def comparison_section(found: Comparison) -> Section:
    """Return the section: profiles on normalised depth and as paths, means, every table, and the warnings."""
    figures = [f for f in (_profiles(found), _means(found)) if f is not None]
    runs = found.runs.drop(columns=["path"], errors="ignore")
    tables = [Table("Runs", Frame("compare-runs", runs), "The runs, in the order in which they were given.")]
    for name in _SHOWN:
        rows = getattr(found, name)
        if len(rows):
            kept = [c for c in _FILTERS if c in rows]
            tables.append(
                Table(
                    name.replace("_", " "), Frame(f"compare-{name}", rows.reset_index(drop=True)), TABLES_OF[name], kept
                )
            )
    facts = [
        ("common prompts", str(found.facts["prompts"])),
        (
            "intervals",
            f"{found.facts['intervals']}, {found.facts['n_boot']} replicates, seed {found.facts['seed']}",
        ),
    ]
    return Section("compare", "Comparison", facts, figures, tables, warnings=found.warnings, n_grave=len(found.grave))


def _profiles(found: Comparison) -> Figure | None:
    table = found.profiles
    if not len(table):
        return None
    rows = table.reset_index(drop=True)
    names = {run: {"run": run} for run in in_order(rows["run"])}
    n = found.facts["prompts"]
    charts = [
        Chart(
            curves("s", names, marker=0),
            {"xaxis": axis("normalised depth, first to last state", range=[0, 1]), "yaxis": axis("@measure")},
            "at normalised depth",
        )
    ]
    if "path" in rows and rows["path"].notna().any():
        path = [
            {
                **t,
                **({"y": {"$": "path"}} if "y" in t else {"$band": {"x": "s", "low": "path_low", "high": "path_high"}}),
            }
            for t in curves("s", names, marker=0)
        ]
        charts.append(
            Chart(
                path,
                {
                    "xaxis": axis("normalised depth, first to last state", range=[0, 1]),
                    "yaxis": axis("summed from the first state"),
                },
                "the same steps as a path",
            )
        )
    steps = ", ".join(
        f"{r['run']} {r['steps']:g}"
        for _, r in found.runs.iterrows()
        if "steps" in found.runs and not math.isnan(r["steps"])
    )
    last = (
        rows[(rows["metric"] == rows["metric"].iloc[0]) & (rows["condition"] == rows["condition"].iloc[0])]
        .groupby("run", sort=False)
        .tail(1)
    )
    alt = (
        f"Profiles of {rows['metric'].iloc[0]}; at the last state: "
        + ", ".join(f"{r} {m:.3g}" for r, m in zip(last["run"], last["mean"], strict=True))
        + "."
    )
    caption = (
        f"Means over {n} common prompts; {bands_said(found.facts['intervals'], len(names))}, pointwise. "
        f"Steps: {steps}. Metric ids: {', '.join(in_order(rows['metric_id']))}."
    )
    first = "kappa_phase" if (rows["metric"] == "kappa_phase").any() else str(rows["metric"].iloc[0])
    return Figure(
        "compare-profiles", "Profiles on normalised depth, and as paths", caption, alt,
        [Frame("compare-profiles", rows)], charts,
        [{"label": "metric", "column": "metric", "first": first}, {"label": "condition", "column": "condition"}],
    )  # fmt: skip


def _means(found: Comparison) -> Figure | None:
    rows: pd.DataFrame = found.means.reset_index(drop=True)
    if not len(rows) or not {"metric", "condition", "run", "mean", "low", "high"} <= set(rows):
        return None
    runs = in_order(rows["run"])
    trace = points("mean", "run", "mean", "#0072B2", left="low", right="high", marker={"size": 10}, showlegend=False)
    layout = {
        "xaxis": axis("@measure"),
        "yaxis": {"automargin": True, "type": "category", "categoryorder": "array", "categoryarray": runs[::-1]},
    }
    first = "kappa_phase" if (rows["metric"] == "kappa_phase").any() else str(rows["metric"].iloc[0])
    own = rows[(rows["metric"] == first) & (rows["condition"] == rows["condition"].iloc[0])]
    alt = f"{first}: " + ", ".join(f"{r} {m:.3g}" for r, m in zip(own["run"], own["mean"], strict=True)) + "."
    caption = (
        f"Mean over common prompts; bars: {found.facts['intervals']}. Whether two "
        "runs differ stands in the table of paired differences, not in overlapping bars."
    )
    return Figure(
        "compare-means", "Means of every run", caption, alt, [Frame("compare-means-figure", rows)],
        [Chart([trace], layout, height=max(220, 120 + 34 * len(runs)))],
        [{"label": "metric", "column": "metric", "first": first}, {"label": "condition", "column": "condition"}],
    )  # fmt: skip
