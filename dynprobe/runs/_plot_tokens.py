"""Pictures of the state itself: every layer and token of one text, the road in its principal plane, and regimes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.runs._canvas import BLUE, RED, canvas
from dynprobe.runs._curves import regime_numbers, shown_conditions
from dynprobe.runs._pca import MEAN_UNIT, pca_numbers
from dynprobe.runs._plot_axes import COLUMN, PAGE, SMALL, TICK, dress, ends, legend, plain, spread, title
from dynprobe.runs._token_map import MAPPED, map_columns, token_map
from dynprobe.runs._tokens import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["heatmap_tokens_figure", "pca_figure", "regimes_figure"]

_COLOURS = (BLUE, RED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STROKES = ("-", "--", ":", "-.")
_HATCHES = ("", "//", "xx", "--", "..", "||", "++", "\\\\")
_MOST_TOKENS = 80


def heatmap_tokens_figure(
    run: Run, column: str | None = None, prompt: str | None = None, condition: str | None = None
) -> Figure:
    """Return the map of a column of ``depths`` over depth and token of one text.

    Args:
        run: A run with ``depths``.
        column: What is mapped; None takes the angle of each step, else the first there is.
        prompt: Name of the prompt; None takes the first.
        condition: Its condition; None takes the first, which is the clean one.

    Raises:
        RunFolderError: The run stored nothing per token and depth.
        UsageError: There is no such column, prompt or condition, or matplotlib is missing.
    """
    columns, (conditions, _) = map_columns(run), shown_conditions(run, "depths", most=10_000)
    column = columns[0] if column is None else column
    condition = conditions[0] if condition is None else condition
    for value, known, word in ((column, columns, "column"), (condition, conditions, "condition")):
        if value not in known:
            near = did_you_mean(value, known)
            raise UsageError(f"{run.path} has no {word} {value!r} to map.{near} There are: {', '.join(known)}")
    prompt = str(run.prompts["prompt_id"].iloc[0]) if prompt is None else prompt
    rows = token_map(run, [prompt], [condition], [column])
    cells = rows.pivot(index="depth", columns="pos", values=column)
    words, log = MAPPED[column]
    figure = canvas(float(np.clip(1.8 + 0.16 * cells.shape[1], COLUMN, 14.0)), 3.6)
    panel = figure.subplots()
    dress(panel)
    values = np.ma.masked_invalid(cells.to_numpy(np.float64))
    norm: dict[str, Any] = {}
    if log:
        from matplotlib.colors import LogNorm

        values = np.ma.masked_less_equal(values, 0)
        low, high = ends(values.compressed(), log=True, air=0.0)
        norm = {"norm": LogNorm(low, max(high, low * 1.01))}
    at, depth = cells.columns.to_numpy(), cells.index.to_numpy()
    x, y = np.append(at - 0.5, at[-1] + 0.5), np.append(depth - 0.5, depth[-1] + 0.5)
    mesh = panel.pcolormesh(x, y, values, cmap="viridis", rasterized=True, **norm)
    unit = run.columns().query("table == 'depths' and column == @column")["unit"].iloc[0]
    bar = figure.colorbar(mesh, ax=panel, pad=0.01, aspect=20)
    plain(bar.ax.set_ylabel(f"{words}, {unit}" if unit not in ("", "1") else words, fontsize=SMALL))
    bar.ax.tick_params(which="both", labelsize=TICK)
    labels = rows.drop_duplicates("pos").set_index("pos")["token"]
    shown = spread([int(p) for p in at], _MOST_TOKENS)
    names = [visible(str(labels[p])) if isinstance(labels[p], str) else str(p) for p in shown]
    for label in panel.set_xticks(shown, names, rotation=90, fontsize=TICK - 0.5):
        plain(label.label1)
    new = rows.loc[rows["new"], "pos"]
    if len(new) and new.min() > at[0]:
        panel.axvline(new.min() - 0.5, color="white", linewidth=2.4)
        panel.axvline(new.min() - 0.5, color="black", linewidth=1.2, linestyle="--", gid="new")
    panel.set_xlabel("token (dashed: the prompt ends)" if len(new) else "token", fontsize=SMALL)
    panel.set_ylabel("depth", fontsize=SMALL)
    title(figure, f"{run.manifest.model_name}: {words} of {prompt}, {condition}")
    return figure


def pca_figure(run: Run, prompt: str | None = None, unit: str = MEAN_UNIT) -> Figure:
    """Return the trajectories of one prompt in the plane of the clean states.

    Args:
        run: A run with ``--states``.
        prompt: Name of the prompt; None takes the first.
        unit: ``mean over tokens`` or ``last prompt token``.

    Raises:
        RunFolderError: The run holds no states.
        UsageError: There is no such prompt or unit, or matplotlib is missing.
    """
    numbers, facts = pca_numbers(run)
    known = list(dict.fromkeys(numbers["prompt_id"]))
    prompt = known[0] if prompt is None else prompt
    for value, options, word in ((prompt, known, "prompt"), (unit, list(dict.fromkeys(numbers["unit"])), "unit")):
        if value not in options:
            raise UsageError(f"{run.path} has no states of {word} {value!r}.{did_you_mean(value, options)}")
    rows = numbers[(numbers["prompt_id"] == prompt) & (numbers["unit"] == unit)]
    figure = canvas(COLUMN + 1, COLUMN)
    panel = figure.subplots()
    for number, (condition, own) in enumerate(rows.groupby("condition_id", sort=False)):
        panel.plot(
            own["pc1"], own["pc2"], color=_COLOURS[number % len(_COLOURS)], linestyle=_STROKES[number % len(_STROKES)],
            marker="o", markersize=3, linewidth=1.2, label=str(condition), gid=str(condition),
        )  # fmt: skip
        for end in (own.iloc[0], own.iloc[-1]) if not number else ():
            panel.annotate(f"{end['depth']:g}", (end["pc1"], end["pc2"]), xytext=(4, 4), textcoords="offset points",
                           fontsize=TICK)  # fmt: skip
    dress(panel)
    panel.set_aspect("equal", adjustable="datalim")
    panel.set_xlabel(f"PC1 ({100 * facts['share1']:.1f} % of the variance)", fontsize=SMALL)
    panel.set_ylabel(f"PC2 ({100 * facts['share2']:.1f} %)", fontsize=SMALL)
    legend(figure, [panel], 3)
    title(
        figure,
        f"{run.manifest.model_name}: {prompt}, {unit}\naxes of {facts['rows']:.0f} clean states, without position 0",
    )
    return figure


def regimes_figure(run: Run) -> Figure:
    """Return the share of texts in each regime, one bar per condition.

    Raises:
        RunFolderError: No regime was called.
        UsageError: Matplotlib is missing.
    """
    numbers = regime_numbers(run)
    order = list(dict.fromkeys(numbers["condition"]))
    table = numbers.pivot(index="condition", columns="regime", values="share").reindex(order).fillna(0.0)
    figure = canvas(PAGE, 0.9 + 0.28 * len(order))
    panel = figure.subplots()
    start = np.zeros(len(order))
    for number, regime in enumerate(table):
        width = table[regime].to_numpy()
        panel.barh(
            range(len(order)), width, left=start, color=_COLOURS[number % len(_COLOURS)], edgecolor="white",
            hatch=_HATCHES[number % len(_HATCHES)], linewidth=0, label=str(regime), height=0.75,
        )  # fmt: skip
        start = start + width
    dress(panel)
    panel.set_xlim(0, 1)
    panel.set_yticks(range(len(order)), order, fontsize=TICK)
    panel.invert_yaxis()
    panel.set_xlabel("share of texts", fontsize=SMALL)
    legend(figure, [panel], 4)
    title(figure, f"{run.manifest.model_name}: regimes of LIMEN's ratio")
    return figure
