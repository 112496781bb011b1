"""Pictures of studies: iterations, recovery, the attractor layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dynprobe.runs._curves import INTERVAL, ITERATED, iteration_numbers
from dynprobe.runs._plot_attract import MEASURES, length_numbers, slot_numbers
from dynprobe.runs._plot_recover import METRICS, SIGNALS, fraction_numbers, signal_numbers
from dynprobe.runs._quantity import prompts_text
from dynprobe.runs._report._looks import (
    COLOURS,
    INK,
    MUTED,
    bands_said,
    curves,
    facts_for,
    id_notes,
    ids_of,
    in_order,
    metrics_said,
    row_of,
    style_of,
)
from dynprobe.runs._report._parts import Chart, Figure, Frame, axis, diamonds, grid, line, points

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = [
    "iteration_figure", "length_figure", "recovery_figure", "signal_figure", "slot_figure",
]  # fmt: skip

_ROAD = {"forced": "given text", "free": "own text"}


def iteration_figure(run: Run, key: str) -> Figure:
    """Return loss, Δ, κ, energy and accuracy against the number of iterations."""
    numbers = iteration_numbers(run)
    measures = in_order(numbers["measure"])
    said = facts_for(run, "samples", measures)
    samples = run.samples
    trained = list(samples["trained_iterations"].dropna()) if "trained_iterations" in samples else []
    charts = []
    for measure in measures:
        words, unit, log = ITERATED[measure]
        own = numbers[numbers["measure"] == measure]
        traces = curves("iterations", {arm: {"measure": measure, "arm": arm} for arm in in_order(own["arm"])})
        shapes = [
            {"type": "line", "x0": float(t), "x1": float(t), "yref": "paper", "y0": 0, "y1": 1,
             "line": {"color": MUTED, "dash": "dot", "width": 1}}
            for t in trained[:1]
        ]  # fmt: skip
        log = log and bool((own["mean"] > 0).all())
        layout = {
            "xaxis": axis("iterations T", whole=True),
            "yaxis": axis(unit or words, type="log" if log else "linear"),
            "shapes": shapes,
        }
        charts.append(Chart(traces, layout, words))
    first = numbers[(numbers["measure"] == measures[0]) & (numbers["arm"] == "clean")]
    alt = f"{ITERATED[measures[0]][0]} against iterations."
    if first["mean"].notna().any():
        best = row_of(first, first["mean"].argmin())
        alt = (
            f"{ITERATED[measures[0]][0]} against iterations; it is least, {best['mean']:.4g}, "
            f"at T = {best['iterations']:g}."
        )
    dotted = " Dotted: the depth the model was trained at." if trained else ""
    known = ids_of(said, measures)
    caption = f"Mean over {prompts_text(int(numbers['n'].max()))}; bands: {INTERVAL}.{metrics_said(known)}{dotted}"
    return Figure(
        f"{key}-iterations", "What more iterations buy", caption, alt, [Frame(f"{key}-iterations", numbers)], charts,
        notes=id_notes(known),
    )  # fmt: skip


def signal_figure(run: Run, key: str) -> Figure:
    """Return the detector's signal over new tokens, and the share of texts in which a mode acts."""
    numbers = signal_numbers(run)
    band_of = (run.manifest.model_extra or {}).get("detector_band") or {}
    unit = SIGNALS.get(str(band_of.get("signal")), str(band_of.get("signal", "signal"))).replace("\n", " ")
    modes = [c for c in in_order(numbers["condition"]) if "+random:" not in c]
    base = [c for c in modes if c.partition(".")[0] in ("clean", "perturbed")]
    wanted = [c for c in modes if c not in base and c.count(".") == 1 and "sham" not in c and "passive" not in c][:8]
    kept = [*base, *wanted]
    total = numbers["condition"].nunique()
    numbers = numbers[numbers["condition"].isin(kept)].reset_index(drop=True)
    roads = [r for r in _ROAD if (numbers["road"] == r).any()]
    charts = []
    for road in roads:
        names = {diamonds(c.rpartition(".")[0]): {"condition": c} for c in kept if c.endswith(f".{road}")}
        traces = curves("token", names, marker=0)
        last = int(numbers["token"].max())
        for end, said, dash in (("q_hi", "upper", "dash"), ("q_lo", "lower", "dot")):
            if end in band_of:
                traces.append(
                    {"type": "scatter", "mode": "lines", "name": f"q{100 * band_of[said]:g} of clean text",
                     "x": [0, last], "y": [float(band_of[end])] * 2, "hoverinfo": "skip",
                     "line": {"color": INK, "dash": dash, "width": 1}}
                )  # fmt: skip
        layout = {"xaxis": axis("new token", whole=True), "yaxis": axis(unit)}
        charts.append(Chart(traces, layout, f"signal, {_ROAD[road]}"))
        acting = [
            line("token", "acting", name, style_of(i)[0], dash=style_of(i)[1], marker=0, where=where, showlegend=False)
            for i, (name, where) in enumerate(names.items()) if "+" in name
        ]  # fmt: skip
        if acting:
            layout = {"xaxis": axis("new token", whole=True), "yaxis": axis("share of texts", range=[-0.02, 1.02])}
            charts.append(Chart(acting, layout, f"mode acting, {_ROAD[road]}", 260))
    n = int(numbers["n"].max())
    lines = max(sum(c.endswith(f".{road}") for c in kept) for road in roads)
    some = f" {len(kept)} of {total} conditions are shown." if len(kept) < total else ""
    caption = (
        f"Mean over {prompts_text(n)}; {bands_said(INTERVAL, lines)}. Lines across: the band that switches the "
        f"detector on and off.{some}"
    )
    alt = f"The signal {unit} over {int(numbers['token'].max()) + 1} new tokens for {len(kept)} conditions."
    return Figure(f"{key}-signal", "Detector and action", caption, alt, [Frame(f"{key}-signal", numbers)], charts)


def recovery_figure(run: Run, key: str) -> Figure:
    """Return recovery fractions by metric, mode and timing, beside the same energy at random."""
    numbers = fraction_numbers(run)
    metrics = [m for m in METRICS if (numbers["metric"] == m).any()]
    lines = in_order(numbers["line"])
    shift = np.where(numbers["kind"] == "mode", -0.14, 0.2)
    numbers = numbers.assign(at=[lines.index(name) for name in numbers["line"]] + shift)
    charts = []
    for metric in metrics:
        traces = []
        for kind, colour, size in (("mode", COLOURS[0], 9), ("same energy, random directions", MUTED, 6)):
            for acted, symbol in (("no", "circle"), ("yes", "circle-open")):
                own = numbers[
                    (numbers["metric"] == metric)
                    & (numbers["kind"] == kind)
                    & (numbers["acted_on"].astype(bool) == (acted == "yes"))
                ]
                if own.empty:
                    continue
                name = kind if acted == "no" else f"{kind}, acted on"
                traces.append(
                    points("shown", "at", name, colour, where={"metric": metric, "kind": kind, "acted_on": acted},
                           left="left", right="right", marker={"symbol": symbol, "size": size}, customdata={"$": "rf"},
                           text={"$": "line"}, hovertemplate="%{text}: %{customdata:.3g}")
                )  # fmt: skip
        shapes = [
            {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1,
             "line": {"color": MUTED, "width": 1, "dash": dash}}
            for x, dash in ((0, "solid"), (1, "dot"))
        ]  # fmt: skip
        layout = {
            "xaxis": axis("recovery fraction", range=[-1.08, 2.08], tickvals=[-1, 0, 1, 2]), "shapes": shapes,
            "yaxis": {"automargin": True, "range": [len(lines) - 0.4, -0.6], "tickvals": list(range(len(lines))),
                      "ticktext": lines},
        }  # fmt: skip
        charts.append(Chart(traces, layout, METRICS[metric].replace("\n", " "), max(240, 130 + 22 * len(lines))))
    known = numbers[(numbers["kind"] == "mode") & numbers["rf"].notna() & ~numbers["acted_on"].astype(bool)]
    alt = "No recovery fraction is known."
    if len(known):
        top = row_of(known, known["rf"].argmax())
        alt = (
            f"Recovery fractions of {len(lines)} modes and timings over {len(metrics)} metrics; the largest that is "
            f"not acted on is {top['rf']:.3g} [{top['low']:.3g}, {top['high']:.3g}], {top['line']} on {top['metric']}."
        )
    caption = (
        "0 is as perturbed, 1 as clean, below 0 harm; bars: 95 % interval over prompts, cut at the ends of the axis. "
        "Hollow: the controller acts on that metric, so it recovers by construction. Points outside −1 … 2 stand at "
        "the end; where no fraction could be formed there is no point, and the reason stands in the numbers. "
        f"Estimator: {numbers['estimator'].iloc[0]}."
    )
    return Figure(
        f"{key}-recovery",
        "Recovery",
        caption,
        alt,
        [Frame(f"{key}-recovery", numbers)],
        charts,
        [{"label": "reading", "column": "road"}],
    )


def length_figure(run: Run, key: str) -> Figure:
    """Return how texts go on at each dose."""
    numbers = length_numbers(run)
    charts = []
    for measure, words in MEASURES.items():
        own = numbers[numbers["measure"] == measure]
        order = in_order(own["condition"])
        words = words.replace("\n", " ")
        if own["length"].nunique() == 1:  # one length makes no course; side by side no interval hides another
            trace = points(
                "mean", "condition", "mean", COLOURS[0], where={"measure": measure}, left="low", right="high",
                showlegend=False,
            )  # fmt: skip
            rows = {"automargin": True, "type": "category", "categoryorder": "array", "categoryarray": order[::-1]}
            heading = f"{words}, {own['length'].iloc[0]:g} new tokens"
            charts.append(Chart([trace], {"xaxis": axis(words), "yaxis": rows}, heading, 130 + 30 * len(order)))
            continue
        names = {diamonds(c): {"measure": measure, "condition": c} for c in order}
        layout = {"xaxis": axis("new tokens", whole=True), "yaxis": axis(words)}
        charts.append(Chart(curves("length", names), layout, words, 380))
    n = int(numbers["n"].max())
    own = numbers[numbers["measure"] == "repetition"]
    last = own[own["length"] == own["length"].max()]
    alt = (
        "Repetition at the longest length: "
        + ", ".join(f"{c} {m:.2g}" for c, m in zip(last["condition"], last["mean"], strict=True))
        + "."
    )
    few = " — missing below three prompts" if n < 3 else ""
    lines = int(numbers.groupby("measure", observed=True)["condition"].nunique().max())
    said = f"bars: {INTERVAL}" if numbers["length"].nunique() == 1 else bands_said(INTERVAL, lines)
    caption = f"Mean over {prompts_text(n)} by length of the text; {said}{few}."
    return Figure(f"{key}-lengths", "How texts go on", caption, alt, [Frame(f"{key}-lengths", numbers)], charts)


def slot_figure(run: Run, key: str, most_rows: int) -> Figure:
    """Return slot strength over the tokens of each text."""
    slots = slot_numbers(run)
    site = str(slots["site"].iloc[0])
    sizes = slots.groupby(["prompt_id"], sort=False).size()
    fits = [p for p, n in sizes.cumsum().items() if n <= most_rows] or [sizes.index[0]]
    columns = [c for c in ("prompt_id", "condition_id", "pos", "slot", "strength", "hits", "cos") if c in slots]
    rows = slots[slots["prompt_id"].isin(fits)][columns]
    rows = rows.sort_values(["prompt_id", "condition_id", "pos", "slot"], kind="stable", ignore_index=True)
    some = f" {len(fits)} of {len(sizes)} prompts are shown." if len(fits) < len(sizes) else ""
    alt = f"Heat map of {rows['slot'].nunique()} slots over tokens."
    if rows["strength"].notna().any():
        top = row_of(rows, rows["strength"].argmax())
        alt = (
            f"Heat map of {rows['slot'].nunique()} slots over tokens; the strongest is slot {top['slot']} at position "
            f"{top['pos']}: {top['strength']:.3g}."
        )
    caption = f"Strength of every slot at {site} while a text is written; a slot that is not alive is empty.{some}"
    layout = {
        "xaxis": axis("position of the token", whole=True, showgrid=False),
        "yaxis": axis("slot", whole=True, showgrid=False),
    }
    measures = [{"column": c, "log": False} for c in ("strength", "hits", "cos") if c in rows]
    return Figure(
        f"{key}-slots", "Slots of the attractor layer", caption, alt,
        [Frame(f"{key}-slots", rows, facts_for(run, "slots", columns), len(slots))],
        [Chart([grid("pos", "slot", "@measure", log="@measure")], layout, height=380)],
        [
            {"label": "prompt", "column": "prompt_id"}, {"label": "condition", "column": "condition_id"},
            {"label": "value", "measures": measures},
        ],
    )  # fmt: skip
