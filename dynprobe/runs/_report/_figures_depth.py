"""Pictures of any run: profiles along depth, layers × tokens, the road in its principal plane, regimes, accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from dynprobe.errors import RunFolderError
from dynprobe.runs._curves import (
    INTERVAL,
    accuracy_numbers,
    main_track,
    profile_numbers,
    regime_numbers,
    shown_conditions,
)  # fmt: skip
from dynprobe.runs._pca import MEAN_UNIT, pca_numbers
from dynprobe.runs._quantity import prompts_text
from dynprobe.runs._report._looks import (
    COLOURS,
    INK,
    SHAPES,
    curves,
    facts_for,
    id_notes,
    ids_of,
    in_order,
    metrics_said,
    style_of,
)
from dynprobe.runs._report._parts import Chart, Figure, Frame, axis, band, bars, diamonds, grid, line, points
from dynprobe.runs._token_map import MAPPED, map_columns, token_map

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["accuracy_figure", "depth_label", "pca_figure", "profile_figure", "regime_figure", "token_figure"]

#: Columns of ``profiles`` that are drawn, the likeliest first: words and whether the axis is logarithmic.
_PROFILES = {
    "kappa_phase": ("κ phase of the step", False), "delta_rel_prev": ("Δ, relative step", True),
    "norm": ("norm", True), "kappa_geom": ("κ geom", False), "curv_depth": ("turn between steps", False),
    "cka": ("CKA", False), "erank_rv": ("effective rank", False), "energy": ("energy", False),
}  # fmt: skip
#: Ticks of an axis of shares; left alone, Plotly omits the one at the very end.
_SHARES = [0, 0.25, 0.5, 0.75, 1]


def depth_label(run: Run, track: str) -> str:
    """Return what depth counts in this run."""
    if track == "resid":
        return "depth (state entering block d)"
    return f"depth (updates of {track})"


def profile_figure(run: Run, key: str) -> Figure:
    """Return κ and what else the run stored per depth, with intervals over prompts."""
    if not run.manifest.rows().get("profiles"):
        raise RunFolderError("the run stored no profiles (dynprobe sweep does with --tables all)")
    facts = run.columns()
    held = set(facts[facts["table"] == "profiles"]["column"])
    columns = [c for c in _PROFILES if c in held]
    values = run.table("profiles", columns=columns)
    columns = [c for c in columns if values[c].notna().any()]
    conditions, total = shown_conditions(run, "profiles")
    numbers = profile_numbers(run, columns, conditions)
    said = facts_for(run, "profiles", columns)
    charts = []
    x = depth_label(run, main_track(run, "profiles"))
    for measure in in_order(numbers["measure"]):
        base = measure.removesuffix("_d")
        words, log = _PROFILES[base]
        paired = measure != base
        unit = said[base][1]
        own = numbers[numbers["measure"] == measure]
        names = {diamonds(c): {"measure": measure, "condition": c} for c in in_order(own["condition"])}
        log = log and not paired and bool((own["mean"] > 0).all())
        heading = f"paired change of {words}" if paired else words
        traces = curves("depth", names)
        if paired:  # colours follow the condition, not its place in this chart
            order = {diamonds(c): i for i, c in enumerate(conditions)}
            traces = [_recoloured(t, style_of(order[str(t["legendgroup"])])) for t in traces]
        name = f"change of {words.partition(' of ')[0].partition(',')[0]}" if paired else words
        layout = {
            "xaxis": axis(x, whole=True),
            "yaxis": axis(f"{name} ({unit})" if unit else name, type="log" if log else "linear"),
        }
        charts.append(Chart(traces, layout, heading))
    n = int(numbers["n"].max())
    some = f" {len(conditions)} of {total} conditions are shown." if len(conditions) < total else ""
    known = ids_of(said, columns)
    rename = {"condition": ("condition", "", ""), "measure": ("measure", "", ""), "n": ("prompts", "", "")}
    caption = (
        f"Mean over {prompts_text(n)} at each depth; bands: {INTERVAL}. Paired changes are taken inside a prompt, from "
        f"the clean text.{metrics_said(known)}{some}"
    )
    return Figure(
        f"{key}-profiles", "κ and other metrics along depth", caption, _described(numbers, "kappa_phase"),
        [Frame(f"{key}-profiles", numbers, rename)], charts, notes=id_notes(known),
    )  # fmt: skip


def _recoloured(trace: dict, style: tuple[str, str]) -> dict:
    colour, dash = style
    if "$band" in trace:
        where, group = trace["$where"], trace["legendgroup"]
        return band(**trace["$band"], colour=colour, where=where, group=group, dash=dash)
    return {
        **trace,
        "line": {**trace["line"], "color": colour, "dash": dash},
        "marker": {**trace["marker"], "color": colour},
    }


def _described(numbers: pd.DataFrame, measure: str) -> str:
    own = numbers[numbers["measure"] == measure]
    own = own if len(own) else numbers[numbers["measure"] == numbers["measure"].iloc[0]]
    first = own[own["condition"] == own["condition"].iloc[0]]
    top = first.loc[first["mean"].idxmax()]
    return (
        f"Line charts along depth. In condition {first['condition'].iloc[0]}, {first['measure'].iloc[0]} is "
        f"{first['mean'].iloc[0]:.3g} at depth {first['depth'].iloc[0]:g}, at most {top['mean']:.3g} at depth "
        f"{top['depth']:g} and {first['mean'].iloc[-1]:.3g} at depth {first['depth'].iloc[-1]:g}."
    )


def token_figure(run: Run, key: str, most_rows: int) -> Figure:
    """Return the map over layers and tokens, of as many prompts and conditions as fit."""
    columns = map_columns(run)
    if not columns:
        raise RunFolderError("nothing that is stored per token and depth has a value")
    conditions, n_conditions = shown_conditions(run, "depths", most=4)
    every = [str(p) for p in run.prompts["prompt_id"]]
    rows = token_map(run, every, conditions, columns)
    sizes = rows.groupby("prompt_id", sort=False).size()
    fits = [p for p, n in sizes.cumsum().items() if n <= most_rows] or [str(sizes.index[0])]
    rows = rows[rows["prompt_id"].isin(fits)].reset_index(drop=True)
    rows["new"] = ["new" if n else "prompt" for n in rows["new"]]
    said = facts_for(run, "depths", columns)
    facts = {
        **{c: (MAPPED[c][0], said[c][1], said[c][2]) for c in columns},
        **facts_for(run, "depths", ["prompt_id", "condition_id", "pos", "depth"]), "token": ("token", "", ""),
        "new": ("part", "", ""),
    }  # fmt: skip
    measures = [{"column": c, "log": MAPPED[c][1]} for c in columns]
    track = main_track(run, "depths")
    layout = {
        "xaxis": axis("token", type="linear", showgrid=False),
        "yaxis": axis(depth_label(run, track), whole=True, showgrid=False),
        "$tokens": {"at": "pos", "text": "token", "part": "new"},
    }  # fmt: skip
    some = "" if len(fits) == len(every) else f" {len(fits)} of {len(every)} prompts are shown."
    some += "" if len(conditions) == n_conditions else f" {len(conditions)} of {n_conditions} conditions are shown."
    by_id = rows["token"].astype(str).str.fullmatch(r"#\d+") & (rows["new"] == "new")
    unknown = "; a generated token whose text the run did not store is shown by its id" if by_id.any() else ""
    known = ids_of(said, columns)
    caption = (
        "One cell per token and depth, as stored, without any averaging. Depths at which a metric has no value in any "
        "text (a step has no state before the first) are not drawn. The dashed line marks where the prompt ends and "
        f"generated tokens begin{unknown}.{metrics_said(known)}{some}"
    )
    alt = (
        f"Heat map of {rows['pos'].nunique()} token positions by {rows['depth'].nunique()} depths; choose prompt, "
        "condition and metric above it, or read the numbers below."
    )
    return Figure(
        f"{key}-tokens", "Layer × token", caption, alt, [Frame(f"{key}-tokens", rows, facts, int(sizes.sum()))],
        [Chart([grid("pos", "depth", "@measure", log="@measure", trim=True)], layout, height=440)],
        [
            {"label": "prompt", "column": "prompt_id"}, {"label": "condition", "column": "condition_id"},
            {"label": "metric", "measures": measures},
        ], id_notes(known),
    )  # fmt: skip


def pca_figure(run: Run, key: str) -> Figure:
    """Return the trajectories in the plane of the clean states."""
    numbers, facts = pca_numbers(run)
    conditions = in_order(numbers["condition_id"])[:6]
    numbers = numbers[numbers["condition_id"].isin(conditions)].reset_index(drop=True)
    traces = []
    for number, condition in enumerate(conditions):
        colour, dash = style_of(number)
        traces.append(
            line(
                "pc1", "pc2", diamonds(condition), colour, dash=dash, marker=7, where={"condition_id": condition},
                text={"$": "depth"}, hovertemplate="depth %{text}<br>PC1 %{x:.4g}<br>PC2 %{y:.4g}",
            )
        )  # fmt: skip
    ends = {"depth": int(numbers["depth"].min())}
    traces.append(
        points(
            "pc1", "pc2", "first state", INK, where=ends,
            marker={"symbol": "circle-open", "size": 14, "line": {"width": 2}},
        )
    )  # fmt: skip
    layout = {
        "xaxis": axis(f"PC1 ({100 * facts['share1']:.1f} % of the variance)", zeroline=False, constrain="domain"),
        "yaxis": axis(f"PC2 ({100 * facts['share2']:.1f} %)", zeroline=False, scaleanchor="x", constrain="domain"),
        "$plane": True,
    }
    said = {"pc1": ("PC1", "state", ""), "pc2": ("PC2", "state", ""), "n": ("tokens", "", ""), "unit": ("of", "", "")}
    said |= facts_for(run, "depths", ["prompt_id", "condition_id", "depth"])
    caption = (
        f"The state at every depth, in the plane of the two widest directions of {facts['rows']:.0f} clean states of "
        f"{prompts_text(int(facts['prompts']))} (centred; position 0 left out). Both axes have one scale, unless the "
        "title of the second says how far it is stretched, where one scale would leave a strip. Lines join "
        f"depths; the ring is depth {ends['depth']}. No interval: each point is one state or the mean over tokens."
    )
    alt = (
        f"Trajectories of {len(conditions)} conditions in the plane of the first two principal components, which hold "
        f"{100 * (facts['share1'] + facts['share2']):.0f} % of the variance."
    )
    return Figure(
        f"{key}-pca", "Trajectory in its principal plane", caption, alt, [Frame(f"{key}-pca", numbers, said)],
        [Chart(traces, layout, height=460)],
        [{"label": "of", "column": "unit", "first": MEAN_UNIT}, {"label": "prompt", "column": "prompt_id"}],
    )  # fmt: skip


def regime_figure(run: Run, key: str) -> Figure:
    """Return the share of texts in each regime, by condition."""
    numbers = regime_numbers(run)
    regimes = in_order(numbers["regime"].sort_values())
    order = in_order(numbers["condition"])
    traces = [
        bars(
            "share", "condition", regime, COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)],
            where={"regime": regime}, customdata={"$": "count"}, hovertemplate="%{y}: %{x:.0%} (%{customdata} texts)",
        )
        for i, regime in enumerate(regimes)
    ]  # fmt: skip
    layout = {
        "barmode": "stack", "xaxis": axis("share of texts", range=[0, 1.004], tickformat=".0%", tickvals=_SHARES),
        "yaxis": {"automargin": True, "categoryorder": "array", "categoryarray": order[::-1], "type": "category"},
    }  # fmt: skip
    first = numbers[numbers["condition"] == order[0]].sort_values("share").iloc[-1]
    said = facts_for(run, "samples", ["limen_regime"])["limen_regime"][2]
    caption = (
        f"Share of texts in each regime of LIMEN's ratio ({said}); no interval. Texts with a remark on their ratio are "
        "left out."
    )
    alt = f"Stacked bars; in {order[0]}, {first['regime']} holds {first['share']:.0%} of {first['n']} texts."
    height = max(220, 110 + 26 * len(order))
    return Figure(
        f"{key}-regimes", "Regimes", caption, alt, [Frame(f"{key}-regimes", numbers, {"n": ("texts", "", "")})],
        [Chart(traces, layout, height=height)],
    )  # fmt: skip


def accuracy_figure(run: Run, key: str) -> Figure:
    """Return the share of right answers by task and condition."""
    numbers = accuracy_numbers(run)
    tasks, order = in_order(numbers["task"]), in_order(numbers["condition"])
    traces = [
        points(
            "mean", "condition", task, COLOURS[i % len(COLOURS)], where={"task": task}, left="low", right="high",
            marker={"symbol": i},
        )
        for i, task in enumerate(tasks)
    ]  # fmt: skip
    layout = {
        "xaxis": axis("share of right answers", range=[-0.02, 1.02], tickformat=".0%", tickvals=_SHARES),
        "yaxis": {"automargin": True, "type": "category", "categoryorder": "array", "categoryarray": order[::-1]},
    }
    first = numbers.iloc[0]
    caption = (
        "Share of right answers; bars: 95 % Wilson interval over items (Clopper–Pearson where all or none are right)."
    )
    alt = (
        f"{len(tasks)} tasks under {len(order)} conditions; {first['task']} under {first['condition']}: "
        f"{first['mean']:.0%} of {first['n']}."
    )
    return Figure(
        f"{key}-accuracy", "Right answers", caption, alt, [Frame(f"{key}-accuracy", numbers, {"n": ("items", "", "")})],
        [Chart(traces, layout, height=max(240, 120 + 28 * len(order)))],
    )  # fmt: skip
