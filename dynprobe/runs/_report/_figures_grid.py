"""Pictures of a sweep or a threshold run: responses against α, the map over layers, thresholds, fragile tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError
from dynprobe.runs._curves import INTERVAL
from dynprobe.runs._grid_data import in_order, mean_responses, on_a_grid, responses
from dynprobe.runs._plot_sweep import CONTROLS, response_blocks
from dynprobe.runs._plot_threshold import headline, open_ends
from dynprobe.runs._quantity import alpha_label, is_threshold, level_of, per_position, prompts_text, quantity
from dynprobe.runs._report._looks import COLOURS, INK, row_of, style_of
from dynprobe.runs._report._parts import Chart, Figure, Frame, axis, axis_of, band, grid, line, points
from dynprobe.runs._token_map import token_texts

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["fragility_figure", "layer_map_figure", "response_figure", "thresholds_figure"]

_CONTROL_COLOURS = {"sign-flip": (COLOURS[3], "dash"), "energy-matched": (COLOURS[2], "dashdot"),
                    "twin": (COLOURS[4], "dot"), "scrambled": (INK, "dot")}  # fmt: skip
_NAMES = {"write": ("scale", "", ""), "value": ("response", "", ""), "alpha": ("α", "scale", ""),
          "prompt_id": ("prompt", "", ""), "n": ("prompts", "", "")}  # fmt: skip


def response_figure(run: Run, key: str, most_rows: int) -> Figure:
    """Return the response against α: every prompt, their mean with its interval, controls, and the criterion."""
    blocks, lacking = response_blocks(run)
    searched = is_threshold(run) and not on_a_grid(run)
    means, every, charts = [], [], []
    for what, rows in blocks:
        level = level_of(run, what)
        own = rows.assign(response=what.column)
        every.append(own)
        if not searched:
            means.append(mean_responses(rows).assign(response=what.column))
        for write in in_order(run, rows["write"]):
            where = {"response": what.column, "write": write}
            traces = _traces(key, own, where, searched, level, rows)
            exponents: dict[str, Any] = {"exponentformat": "e"} if what.log else {}
            layout = {
                "xaxis": axis(alpha_label(write, run=run), type="log"),
                "yaxis": axis(what.label, type="log" if what.log else "linear", **exponents),
            }
            charts.append(Chart(traces, layout, f"{what.words}, {write}" if len(blocks) > 1 else write))
    whole = pd.concat(every, ignore_index=True)
    columns = ["response", "write", "series", "layer", "alpha", "prompt_id", "curve", "value"]
    prompts = Frame(f"{key}-responses", whole[columns].iloc[:most_rows], _NAMES, len(whole))
    frames = [prompts]
    if means:
        frames.insert(0, Frame(f"{key}-response-means", pd.concat(means, ignore_index=True), _NAMES))
    n = whole["prompt_id"].nunique()
    drawn = f"Thin lines are {prompts_text(n)}, thick ones their mean; bands: {INTERVAL}."
    if not means:
        drawn = f"Each line is one of {prompts_text(n)}; a search gave each its own strengths, so there is no mean."
    some = f" {most_rows} of {len(whole)} responses of single prompts are shown." if len(whole) > most_rows else ""
    caption = (f"{drawn} Dashed: the criterion's level. {'; '.join(lacking)}{some}").strip()
    what, rows = blocks[0]
    top = rows[(rows["series"] == "perturbed")]
    strongest = top[top["alpha"] == top["alpha"].max()]
    alt = (
        f"Curves of {what.words} against α from {top['alpha'].min():.3g} to {top['alpha'].max():.3g}; at the largest α "
        f"its mean over prompts and layers is {strongest['value'].mean():.3g} {what.unit}."
    )
    return Figure(
        f"{key}-response",
        "Response against α",
        caption,
        alt,
        frames,
        charts,
        [{"label": "layer written", "column": "layer"}],
    )


def _traces(
    key: str, own: pd.DataFrame, where: dict[str, Any], searched: bool, level: float, rows: pd.DataFrame
) -> list[dict[str, Any]]:
    said = {**where, "series": "perturbed"}
    thin = line(
        "alpha", "value", "trial of a prompt" if searched else "each prompt", COLOURS[0], width=0.8,
        marker=4 if searched else 0, where=said, opacity=0.8 if searched else 0.45,
    )  # fmt: skip
    traces = [{**thin, "$frame": f"{key}-responses", "$gaps": "curve"}]
    if not searched:
        traces += [
            band("alpha", "low", "high", COLOURS[0], where=said, group="mean"),
            line("alpha", "mean", "mean over prompts", COLOURS[0], where=said, width=2.5),
        ]
        for name in [s for s in CONTROLS if (rows["series"] == s).any()]:
            colour, dash = _CONTROL_COLOURS[name]
            traces.append(line("alpha", "mean", CONTROLS[name], colour, dash=dash, where={**where, "series": name}))
    if math.isfinite(level):
        ends = [float(rows.loc[rows["series"] == "perturbed", "alpha"].agg(end)) for end in ("min", "max")]
        traces.append(
            {"type": "scatter", "mode": "lines", "name": f"criterion: {level:g}", "x": ends, "y": [level, level],
             "line": {"color": INK, "dash": "dash", "width": 1}, "hoverinfo": "skip"}
        )  # fmt: skip
    return traces


def layer_map_figure(run: Run, key: str) -> Figure:
    """Return the mean response over layer × α."""
    what = quantity(run, None)
    if what.criterion is not None and not on_a_grid(run):
        raise RunFolderError("every prompt saw strengths of its own, so there is no map over strengths")
    rows = responses(run, what)
    means = mean_responses(rows)
    means = means[means["series"] == "perturbed"].reset_index(drop=True)
    if means["layer"].nunique() < 2:
        raise RunFolderError("a map along the layers needs two of them")
    colours: dict[str, Any] = {"colorscale": "RdBu", "reversescale": True, "zmid": 0} if what.signed else {}
    means["layer"] = means["layer"].astype(int)
    titles = {write: alpha_label(write, run=run) for write in in_order(run, means["write"])}
    chart = Chart(
        [grid("alpha", "layer", "mean", log=what.log, title=f"mean {what.label}", **colours)],
        {"xaxis": axis_of("write", titles, type="category"), "yaxis": axis("layer written (block)", type="category")},
        height=420,
    )  # fmt: skip
    alt = "Heat map without any known mean."
    if means["mean"].notna().any():
        top = row_of(means, means["mean"].argmax())
        alt = (
            f"Heat map; the largest mean, {top['mean']:.3g} {what.unit}, is at layer {top['layer']:g} and "
            f"α {top['alpha']:.3g}."
        )
    caption = (
        f"Mean {what.label} over {prompts_text(rows['prompt_id'].nunique())} by layer and strength; intervals stand in "
        "the numbers."
    )
    return Figure(
        f"{key}-layers", "Layer × α", caption, alt, [Frame(f"{key}-layers", means, _NAMES)], [chart],
        [{"label": "scale", "column": "write"}],
    )  # fmt: skip


def thresholds_figure(run: Run, key: str) -> Figure:
    """Return α50 with its interval against the layer."""
    if is_threshold(run) and per_position(run):
        raise RunFolderError("it has one threshold per position; see the map of fragile tokens")
    fits = open_ends(headline(run))
    columns = [
        "write",
        "criterion",
        "layer",
        "alpha50",
        "low",
        "high",
        "shown_low",
        "shown_high",
        "status",
        "reason",
        "tested_low",
        "tested_high",
        "n",
        "confidence",
        "estimator",
    ]
    fits = fits[[c for c in [*columns, "arrow_high", "arrow_low"] if c in fits]].reset_index(drop=True)
    writes = in_order(run, fits["write"])
    step = (
        min(0.16 * float(np.diff(np.sort(fits["layer"].unique())).min()), 0.5) if fits["layer"].nunique() > 1 else 0.16
    )
    place = {write: (number - (len(writes) - 1) / 2) * step for number, write in enumerate(writes)}
    fits["at"] = fits["layer"] + fits["write"].map(place)  # beside each other, so that no interval hides another
    charts = []
    for criterion in dict.fromkeys(fits["criterion"].astype(str)):
        what = quantity(run, criterion)
        own = fits[fits["criterion"].astype(str) == criterion]
        traces = []
        for number, write in enumerate(writes):
            where = {"criterion": criterion, "write": write}
            colour, dash = style_of(number)
            traces.append(
                line("at", "alpha50", alpha_label(write, "α50", run), colour, dash=dash, where=where, marker=8)
            )
            traces.append(
                {**points("at", "alpha50", "", colour, where=where), "mode": "lines",
                 "line": {"width": 1.5, "color": colour}, "showlegend": False, "hoverinfo": "skip",
                 "$stems": {"x": "at", "low": "shown_low", "high": "shown_high"}}
            )  # fmt: skip
            for side, symbol in (("high", "triangle-up"), ("low", "triangle-down")):
                if own[f"arrow_{side}"].notna().any():
                    traces.append(
                        points("at", f"arrow_{side}", "beyond the tested range", colour, where=where, showlegend=False,
                               marker={"symbol": symbol, "size": 12})
                    )  # fmt: skip
        levels = own.merge(
            run.table("trials", columns=["criterion", "level"]).drop_duplicates().astype({"criterion": str}),
            on="criterion",
        )["level"].unique()
        said = f" ≥ {what.with_unit(float(levels[0]))}" if len(levels) == 1 and math.isfinite(levels[0]) else ""
        layers = sorted(map(int, own["layer"].unique()))
        few: dict[str, Any] = {"tickvals": layers} if len(layers) <= 16 else {}
        if len(layers) == 1:
            few["range"] = [layers[0] - 1, layers[0] + 1]
        layout = {
            "xaxis": axis("layer written (block)", whole=True, **few),
            "yaxis": axis("α50, in units of its scale", type="log", **_roomy(own)),
        }
        charts.append(Chart(traces, layout, f"{what.words}{said}"))
    confidence, n = 100 * float(fits["confidence"].iloc[0]), int(fits["n"].max())
    known = fits[fits["alpha50"].notna()]
    lowest = row_of(known, known["alpha50"].argmin()) if len(known) else None
    alt = (
        "No threshold is inside the tested range."
        if lowest is None
        else (
            f"Thresholds along {fits['layer'].nunique()} layers; the lowest, {lowest['alpha50']:.3g} "
            f"({lowest['write']}), is at layer {lowest['layer']:g}, "
            + (
                f"{confidence:g} % interval {lowest['low']:.3g} to {lowest['high']:.3g}."
                if pd.notna(lowest["low"])
                else "without an interval."
            )
        )
    )
    median = str(fits["estimator"].iloc[0]).startswith("threshold.prompt")
    caption = (
        f"α50: {'median of the first crossings of' if median else 'crossing of the mean response over'} "
        f"{prompts_text(n)} ({fits['estimator'].iloc[0]}); "
        + (
            f"stems: {confidence:g} % interval over prompts; triangles lead out of the range that was tested."
            if fits["low"].notna().any()
            else f"no {confidence:g} % interval: {prompts_text(n)} are too few for one."
        )
    )
    return Figure(
        f"{key}-thresholds",
        "Thresholds",
        caption,
        alt,
        [Frame(f"{key}-thresholds", fits, {"write": ("scale", "", "")})],
        charts,
    )


def _roomy(fits: pd.DataFrame) -> dict[str, Any]:
    """A range for thresholds that lie close together, so that a difference of a percent does not fill the picture."""
    drawn = fits[[c for c in ("alpha50", "shown_low", "shown_high", "arrow_low", "arrow_high") if c in fits]]
    values = drawn.to_numpy(np.float64)
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size or values.max() > 2 * values.min():
        return {}
    middle = 0.5 * (math.log10(values.max()) + math.log10(values.min()))
    return {"range": [middle - 0.3, middle + 0.3]}


def fragility_figure(run: Run, key: str, most_rows: int) -> Figure:
    """Return the map of thresholds over token × layer."""
    if not (is_threshold(run) and per_position(run)):
        raise RunFolderError("it has no thresholds per position (dynprobe threshold --each-position)")
    what = quantity(run, None)
    fits = headline(run)
    fits = fits[fits["criterion"].astype(str) == what.criterion].astype({"prompt_id": str})
    texts, _ = token_texts(run)
    fits = fits.assign(
        token=[
            texts[p][int(i)] if p in texts and int(i) < len(texts[p]) else f"{int(i)}"
            for p, i in zip(fits["prompt_id"], fits["pos"], strict=True)
        ]
    )
    columns = [
        "prompt_id",
        "write",
        "pos",
        "token",
        "layer",
        "alpha50",
        "status",
        "low",
        "high",
        "tested_low",
        "tested_high",
    ]
    fits = fits[columns].sort_values(["prompt_id", "write", "pos", "layer"], kind="stable", ignore_index=True)
    censored = int(fits["status"].astype(str).str.endswith("-censored").sum())
    layout = {
        "xaxis": axis("token written, alone", showgrid=False),
        "yaxis": axis("layer written (block)", whole=True, showgrid=False),
        "$tokens": {"at": "pos", "text": "token"},
    }
    colours: dict[str, Any] = {"log": True, "title": "α50", "why": "status", "reversescale": True}
    known = fits[fits["alpha50"].notna()]
    alt = f"Heat map of thresholds over {fits['pos'].nunique()} tokens and {fits['layer'].nunique()} layers."
    if len(known):
        low = row_of(known, known["alpha50"].argmin())
        alt += (
            f" The most fragile cell is token {low['pos']} ({low['token']}) at layer {low['layer']}: "
            f"{low['alpha50']:.3g}."
        )
    caption = (
        f"α50 of {what.words} where one token alone is written. {censored} of {len(fits)} cells lie outside the tested "
        "range and are empty; their side stands in the numbers."
    )
    return Figure(
        f"{key}-fragility", "Fragile tokens", caption, alt,
        [Frame(f"{key}-fragility", fits.iloc[:most_rows], _NAMES, len(fits))],
        [Chart([grid("pos", "layer", "alpha50", **colours)], layout, height=420)],
        [{"label": "prompt", "column": "prompt_id"}, {"label": "scale", "column": "write"}],
    )  # fmt: skip
