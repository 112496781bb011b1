"""Pictures of an attractor study: how strong the slots are while a text is written, and how texts go on at each dose.

The first shows the memory itself: strength of every slot over the tokens of one text, and below it summed strength and
live slots over all texts of the arm. The second shows what the memory does: repetition, NLL under the bare model and
drift against the length of the text, one line per arm, one row of panels per dose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError
from dynprobe.runs._canvas import BLUE, GREY, canvas, tidy
from dynprobe.runs._curves import curve
from dynprobe.runs._protocol import protocol_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["MEASURES", "dose_rows", "length_numbers", "lengths_figure", "slot_numbers", "slots_figure"]

#: Okabe–Ito, and a stroke for each arm so that lines are told apart without colour.
_ARMS: dict[str, tuple[str, Any]] = {
    "none": (GREY, "-"), "layer": (BLUE, "-"), "constant": ("#D55E00", "--"), "random": ("#E69F00", "--"),
    "frozen": ("#009E73", "-."), "leaky": ("#CC79A7", "-."), "hopfield": ("#56B4E9", ":"),
    "fast_weights": ("#000000", ":"), "cache": ("#999933", (0, (5, 1, 1, 1))),
}  # fmt: skip
MEASURES = {
    "repetition": "4-gram repetition", "nll_bare": "NLL under the\nbare model (nats)",
    "drift": "drift from the bare\nmodel (half-turns)",
}  # fmt: skip
_MOST_ROWS, _MOST_DOSES = 4, 5


def _checked(run: Run, table: str) -> None:
    if protocol_of(run.manifest.config) != "attract":
        raise RunFolderError(f"{run.path} is no study of the attractor layer; see dynprobe attract")
    if not run.manifest.rows().get(table):
        raise RunFolderError(f"{run.path} has no {table}; they belong to --task generate" + (
            " with --record layer or all" if table == "slots" else ""
        ))  # fmt: skip


def slots_figure(run: Run, sample: str | None = None) -> Figure:
    """Return slot strength over the tokens of one text for every dose, above summed strength over all texts.

    Args:
        run: An ``attract`` run.
        sample: Prompt whose texts are shown; None takes the first.

    Raises:
        RunFolderError: The run has no slots.
        UsageError: Matplotlib is missing.
    """
    slots = slot_numbers(run)
    prompt = sample if sample is not None else str(slots["prompt_id"].iloc[0])
    if prompt not in set(slots["prompt_id"]):
        raise RunFolderError(f"{run.path} has no slots of prompt {prompt!r}")
    site = str(slots["site"].iloc[0])
    order = [c for c in run.conditions["condition_id"].astype(str) if c in set(slots["condition_id"])]
    order = order[:_MOST_ROWS]
    figure = canvas(9.0, 2.1 * len(order) + 2.6)
    panels = figure.subplots(len(order) + 1, 1, sharex=True, squeeze=False)[:, 0]
    shown = slots[(slots["prompt_id"] == prompt) & slots["condition_id"].isin(order)]
    top = float(shown["strength"].max())
    image: Any = None
    for panel, condition in zip(panels, order, strict=False):
        mine = shown[shown["condition_id"] == condition]
        image = _heat(panel, mine, top)
        panel.set_title(condition, fontsize=9, loc="left")
        panel.set_ylabel("slot")
        panel.axvline(float(mine["n_prompt"].iloc[0]) - 0.5, color="white", linewidth=1.0, linestyle="--")
    figure.colorbar(image, ax=list(panels[:-1]), label="strength", pad=0.01, aspect=30)
    _totals(panels[-1], slots[slots["condition_id"].isin(order)], order)
    panels[-1].set_xlabel("token (dashed: the prompt ends)")
    figure.suptitle(f"{run.manifest.model_name}: slots at {site} while {prompt} is written", fontsize=10)
    return figure


def slot_numbers(run: Run) -> pd.DataFrame:
    """Return the slots of the first site and replicate, with prompt, condition and length of the prompt.

    Raises:
        RunFolderError: The run has no slots.
    """
    _checked(run, "slots")
    slots = run.table("slots").astype({"sample_id": str, "site": str})
    labels = run.samples[["sample_id", "prompt_id", "condition_id", "n_prompt", "replicate"]]
    labels = labels.astype({"sample_id": str, "prompt_id": str, "condition_id": str})
    slots = slots.merge(labels, on="sample_id")
    return slots[(slots["site"] == slots["site"].iloc[0]) & (slots["replicate"] == 0)]


def length_numbers(run: Run) -> pd.DataFrame:
    """Return how texts go on: ``condition, arm, measure, length, mean, low, high, n``.

    Raises:
        RunFolderError: The run has no lengths.
    """
    _checked(run, "lengths")
    lengths = run.table("lengths").astype({"condition_id": str, "prompt_id": str})
    arms = run.conditions.astype({"condition_id": str, "arm": str}).set_index("condition_id")["arm"]
    frames = []
    for condition in [c for c in arms.index if (lengths["condition_id"] == c).any()]:
        own = lengths[lengths["condition_id"] == condition]
        for measure in MEASURES:
            table = own.groupby(["prompt_id", "length"])[measure].mean().unstack("length")
            frames.append(curve(table).assign(condition=condition, arm=arms[condition], measure=measure))
    found = pd.concat(frames, ignore_index=True).rename(columns={"x": "length"})
    return found[["condition", "arm", "measure", "length", "mean", "low", "high", "n"]]


def _heat(panel: Any, rows: pd.DataFrame, top: float) -> Any:
    grid = rows.pivot_table(index="slot", columns="pos", values="strength")
    grid = grid.reindex(index=range(int(grid.index.max()) + 1), columns=range(int(grid.columns.max()) + 1))
    values = np.ma.masked_invalid(grid.to_numpy(np.float64))  # dead slots have no strength and stay blank
    at = (-0.5, grid.shape[1] - 0.5, grid.shape[0] - 0.5, -0.5)
    return panel.imshow(values, aspect="auto", interpolation="nearest", extent=at, vmin=0, vmax=top, cmap="magma")


def _totals(panel: Any, slots: pd.DataFrame, order: list[str]) -> None:
    for number, condition in enumerate(order):
        mine = slots[slots["condition_id"] == condition]
        table = mine.groupby(["prompt_id", "pos"])["strength"].sum().unstack("pos")
        table = table.loc[:, 2 * table.notna().sum() >= len(table)]  # texts of half the prompts at least are that long
        shade = 0.35 + 0.65 * (number + 1) / len(order)
        panel.plot(table.columns, table.mean(), color=BLUE, alpha=shade, linewidth=1.4, label=condition,
                   linestyle=("-", "--", "-.", ":")[number % 4])  # fmt: skip
    n = slots["prompt_id"].nunique()
    panel.set_ylabel("summed strength,\nmean over texts")
    panel.set_title(f"all {n} texts", fontsize=9, loc="left")
    panel.legend(frameon=False, fontsize=7)
    tidy(panel)


def lengths_figure(run: Run) -> Figure:
    """Return repetition, NLL under the bare model and drift against length, one line per arm, one row per dose.

    Raises:
        RunFolderError: The run has no lengths.
        UsageError: Matplotlib is missing.
    """
    numbers = length_numbers(run)
    conditions = run.conditions.astype({"condition_id": str, "arm": str}).set_index("condition_id")
    rows = dose_rows(list(conditions.index))
    figure = canvas(3.1 * len(MEASURES) + 0.6, 2.3 * len(rows) + 0.9)
    panels = figure.subplots(len(rows), len(MEASURES), sharex=True, sharey="col", squeeze=False)
    handles: dict[str, Any] = {}
    for line, (dose, members) in zip(panels, rows.items(), strict=True):
        for panel, (measure, name) in zip(line, MEASURES.items(), strict=True):
            for condition in members:
                arm = str(conditions.loc[condition, "arm"])
                own = numbers[(numbers["condition"] == condition) & (numbers["measure"] == measure)]
                handles.setdefault(arm, _line(panel, own, arm))
            panel.set_ylabel(name, fontsize=8)
            tidy(panel)
        line[0].set_title(dose, fontsize=9, loc="left")
    for panel in panels[-1]:
        panel.set_xlabel("new tokens")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    n = run.table("lengths", columns=["prompt_id"])["prompt_id"].nunique()
    figure.suptitle(f"{run.manifest.model_name}: {n} prompts, mean and 95 % interval over them", fontsize=10)
    return figure


def dose_rows(conditions: list[str]) -> dict[str, list[str]]:
    """Return conditions by dose and settings; those without a dose stand in every row."""
    always = [c for c in conditions if "@" not in c and c != "none~sampled"]
    doses = list(dict.fromkeys(c.split("@", 1)[1] for c in conditions if "@" in c))[:_MOST_DOSES]
    found: dict[str, list[str]] = {}
    for dose in doses:
        cell = dose.partition(";")[2]
        plain = [c for c in always if c == "none" or c.partition(";")[2] == cell]
        title = f"ε {dose.removeprefix('eps')}" if dose.startswith("eps") else f"dose {dose} nats"
        found[title] = plain + [c for c in conditions if c.endswith(f"@{dose}")]
    return found or {"no dose": always}


def _line(panel: Any, rows: pd.DataFrame, arm: str) -> Any:
    colour, stroke = _ARMS.get(arm, (GREY, "-"))
    wide = 2.0 if arm in ("none", "layer") else 1.1
    at, mean = rows["length"], rows["mean"]
    handle = panel.plot(at, mean, color=colour, linestyle=stroke, linewidth=wide, marker=".")[0]
    if arm in ("none", "layer"):  # the others' bands would hide what they are compared with
        panel.fill_between(at, rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0)
    else:
        ends = np.nan_to_num(np.maximum(np.stack([mean - rows["low"], rows["high"] - mean]), 0.0))
        panel.errorbar(at, mean, ends, fmt="none", ecolor=colour, alpha=0.45, elinewidth=0.8)
    return handle
