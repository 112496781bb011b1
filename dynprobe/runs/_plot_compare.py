"""Picture of a comparison: one metric on normalised depth, and as a path, for every run with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.runs._canvas import canvas
from dynprobe.runs._plot_axes import PAGE, SMALL, dress, legend, plain, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._comparison import Comparison

__all__ = ["draw_comparison"]

#: Okabe–Ito without yellow, which is lost on white; then lines are dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", ":", "-.")
_WORDS = {
    "kappa_phase": "κ phase",
    "delta_rel_prev": "Δ",
    "norm": "norm",
    "kappa_geom": "κ geom",
    "delta_angle": "Δ angle",
}


def draw_comparison(found: Comparison, metric: str | None = None, condition: str | None = None) -> Figure:
    """Draw a metric along depth.

    Args:
        found: The comparison.
        metric: Metric along depth; default κ phase, else the first.
        condition: Condition; default the first.

    Raises:
        UsageError: There is no such profile.
    """
    table = found.profiles
    if not len(table):
        raise UsageError("these runs have no metric along depth in common, so there is no profile to draw")
    known, conditions = list(dict.fromkeys(table["metric"])), list(dict.fromkeys(table["condition"]))
    metric = metric if metric is not None else "kappa_phase" if "kappa_phase" in known else known[0]
    condition = condition if condition is not None else conditions[0]
    for value, options, word in ((metric, known, "metric along depth"), (condition, conditions, "condition")):
        if value not in options:
            near = did_you_mean(value, options)
            raise UsageError(f"there is no {word} {value!r} in this comparison.{near} There are: {', '.join(options)}")
    rows = table[(table["metric"] == metric) & (table["condition"] == condition)]
    labels = list(dict.fromkeys(rows["run"]))
    with_path = "path" in rows and rows["path"].notna().any()
    figure = canvas(PAGE if with_path else PAGE / 2, 3.2 + 0.15 * (len(labels) > 6))
    panels = figure.subplots(1, 2 if with_path else 1, squeeze=False)[0]
    words = _WORDS.get(metric, metric)
    unit = _unit(found, metric, condition)
    for number, label in enumerate(labels):
        own = rows[rows["run"] == label]
        style = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        }
        steps = _steps(found, label)
        _line(panels[0], own, "mean", "low", "high", f"{label}{f' ({steps} steps)' if steps else ''}", style)
        if with_path:
            _line(panels[1], own, "path", "path_low", "path_high", label, style)
            _end(panels[1], own, style)
    _dress(panels[0], f"{words} at depth", f"{words}{f', {unit}' if unit else ''}")
    if with_path:
        path_unit = next((u for u in rows["path_unit"].dropna() if u not in ("", "1")), "")
        name = f"{words} summed" if metric != "kappa_phase" else "κ path"
        _dress(panels[1], "the same steps as a path", f"{name}{f', {path_unit}' if path_unit else ''}")
    n, confidence = found.facts["prompts"], found.facts["confidence"]
    prompts = f"{n} common prompt{'s' if n != 1 else ''}"
    band = f"bands: {confidence:.0%} bootstrap interval over prompts, pointwise" if rows["low"].notna().any() else ""
    title(figure, f"{condition}: {words} of {len(labels)} models on {prompts}\n{band}".rstrip())
    legend(figure, [panels[0]], 4)
    return figure


def _line(panel: Any, own: pd.DataFrame, mean: str, low: str, high: str, label: str, style: dict[str, Any]) -> None:
    s = own["s"].to_numpy(float)
    panel.plot(s, own[mean].to_numpy(float), lw=1.4, label=label, **style)
    if own[low].notna().any():
        panel.fill_between(
            s, own[low].to_numpy(float), own[high].to_numpy(float), color=style["color"], alpha=0.2, lw=0
        )


def _end(panel: Any, own: pd.DataFrame, style: dict[str, Any]) -> None:
    """Write the length of the path at its end."""
    last = own.iloc[-1]
    if pd.notna(last["path"]):
        panel.annotate(
            f"{last['path']:#.3g}", (1.0, last["path"]), xytext=(3, 0), textcoords="offset points", fontsize=SMALL - 1,
            color=style["color"], va="center", annotation_clip=False,
        )  # fmt: skip


def _dress(panel: Any, heading: str, label: str) -> None:
    dress(panel, heading)
    panel.set_xlim(0, 1)
    panel.set_xlabel("normalised depth, first to last state", fontsize=SMALL)
    plain(panel.set_ylabel(label, fontsize=SMALL))
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 0) if low > 0 and low < 0.5 * high else low, high)


def _steps(found: Comparison, label: str) -> int | None:
    row = found.runs[found.runs["run"] == label]
    value = row["steps"].iloc[0] if "steps" in row and len(row) else None
    return None if value is None or pd.isna(value) else int(value)


def _unit(found: Comparison, metric: str, condition: str) -> str:
    table = found.depth_means
    own = table[(table["metric"] == metric) & (table["condition"] == condition) & (table["measure"] == "area")]
    unit = str(own["unit"].iloc[0]) if len(own) else ""
    return "" if unit == "1" else unit
