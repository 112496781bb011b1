"""The part of a page that sets several runs beside each other, made from :func:`dynprobe.runs.compare`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from dynprobe.runs._comparison import TABLES_OF
from dynprobe.runs._report._looks import bands_said, curves, id_notes, in_order, metrics_said
from dynprobe.runs._report._parts import Chart, Figure, Frame, Section, Table, axis, axis_of, points
from dynprobe.runs._report._warned import put_together

if TYPE_CHECKING:
    from dynprobe.runs._comparison import Comparison

__all__ = ["comparison_section"]

_FILTERS = ("condition", "metric", "run", "a", "b", "measure", "criterion", "scale")
#: Tables that are unfolded at first: what a reader came for.
_OPEN = ("pairs",)
#: Tables that are shown, the ones a reader wants first.
_SHOWN = ("means", "pairs", "depth_means", "depth_pairs", "contrasts", "matched_means", "matched_pairs", "thresholds",
          "correlations", "conditions", "refused")  # fmt: skip


def comparison_section(found: Comparison) -> Section:
    """Return the section: profiles on normalised depth and as paths, means, every table, and the warnings."""
    figures = [f for f in (_profiles(found), _means(found)) if f is not None]
    runs = found.runs.drop(columns=["path"], errors="ignore")
    said = "The runs, in the order in which they were given."
    tables = [Table("Runs", Frame("compare-runs", runs), said, open=True)]
    for name in _SHOWN:
        rows = getattr(found, name)
        if len(rows):
            kept = [c for c in _FILTERS if c in rows]
            tables.append(
                Table(
                    name.replace("_", " "),
                    Frame(f"compare-{name}", rows.reset_index(drop=True)),
                    TABLES_OF[name],
                    kept,
                    open=name in _OPEN,
                )
            )
    facts = [
        ("common prompts", str(found.facts["prompts"])),
        (
            "intervals",
            f"{found.facts['intervals']}, {found.facts['n_boot']} replicates, seed {found.facts['seed']}",
        ),
    ]
    names = [*found.runs["run"], *found.conditions["condition"]] if len(found.conditions) else list(found.runs["run"])
    warnings, n_grave, several = put_together(found.warnings, len(found.grave), names)
    return Section(
        "compare", "Comparison", facts, figures, tables, warnings=warnings, n_grave=n_grave, several=several
    )  # fmt: skip


def _profiles(found: Comparison) -> Figure | None:
    table = found.profiles
    if not len(table):
        return None
    rows = table.reset_index(drop=True)
    names = {run: {"run": run} for run in in_order(rows["run"])}
    n = found.facts["prompts"]
    depth = axis("normalised depth, first to last state", range=[0, 1])
    means = found.depth_means
    units: dict[tuple[str, str], str] = {}
    if len(means):
        units = {(m, x): u for m, x, u in zip(means["metric"], means["measure"], means["unit"], strict=True)}
    at = {m: _with_unit(m, units.get((m, "area"))) for m in in_order(rows["metric"])}
    summed = {m: _with_unit(f"{m}, summed", units.get((m, "path"))) for m in at}
    charts = [
        Chart(curves("s", names, marker=0), {"xaxis": depth, "yaxis": axis_of("metric", at)}, "at normalised depth")
    ]
    if "path" in rows and rows["path"].notna().any():
        path = [
            {
                **t,
                **({"y": {"$": "path"}} if "y" in t else {"$band": {"x": "s", "low": "path_low", "high": "path_high"}}),
            }
            for t in curves("s", names, marker=0)
        ]
        charts.append(Chart(path, {"xaxis": depth, "yaxis": axis_of("metric", summed)}, "the same steps as a path"))
    steps = [
        f"{r['run']}: {r['steps']:g}"
        for _, r in found.runs.iterrows()
        if "steps" in found.runs and not math.isnan(r["steps"])
    ]
    known = in_order(rows["metric_id"])
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
        f"Means over {n} common prompts; {bands_said(found.facts['intervals'], len(names))}, pointwise."
        f"{metrics_said(known)}"
    )
    first = "kappa_phase" if (rows["metric"] == "kappa_phase").any() else str(rows["metric"].iloc[0])
    return Figure(
        "compare-profiles", "Profiles on normalised depth, and as paths", caption, alt,
        [Frame("compare-profiles", rows)], charts,
        [{"label": "metric", "column": "metric", "first": first}, {"label": "condition", "column": "condition"}],
        [*([("Steps of every run", steps)] if steps else []), *id_notes(known)],
    )  # fmt: skip


def _with_unit(words: str, unit: object) -> str:
    return f"{words} ({unit})" if isinstance(unit, str) and unit not in ("", "1") else words


def _means(found: Comparison) -> Figure | None:
    rows: pd.DataFrame = found.means.reset_index(drop=True)
    if not len(rows) or not {"metric", "condition", "run", "mean", "low", "high", "unit"} <= set(rows):
        return None
    runs = in_order(rows["run"])
    titles = {str(m): _with_unit(str(m), u) for m, u in zip(rows["metric"], rows["unit"], strict=True)}
    trace = points("mean", "run", "mean", "#0072B2", left="low", right="high", marker={"size": 10}, showlegend=False)
    layout = {
        "xaxis": axis_of("metric", titles),
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
