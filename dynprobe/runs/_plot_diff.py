"""The picture of a difference: log10 over depth × token, and its growth along depth beside the noise floor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.runs._canvas import BLUE, GREY, RED, canvas, tidy
from dynprobe.runs._diff_found import APART, place
from dynprobe.runs._plot_axes import SMALL, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._diff_found import Difference

__all__ = ["draw_difference"]


def draw_difference(
    found: Difference, condition: str | None = None, prompt: str | None = None, track: str | None = None
) -> Figure:
    """Return the heat map of one sample, and the profile over all samples of its condition.

    Args:
        found: From :func:`dynprobe.runs.diff`.
        condition: Condition; default the first that parts, else the first.
        prompt: Prompt; default the first of it that parts, else the first.
        track: Track; default the first.

    Raises:
        UsageError: There is no such condition, prompt or track, nothing was compared, or matplotlib is missing.
    """
    if not len(found.cells):
        raise UsageError("the runs have no states and no depths in common, so there is no picture of their difference")
    samples = found.samples
    parting = samples[samples["verdict"].str.startswith(APART) & (samples["n_beyond"] > 0)]
    pool = parting if len(parting) else samples[samples["n_cells"] > 0]
    condition = _choice("condition", condition, samples["condition_id"], pool["condition_id"])
    own = samples[samples["condition_id"] == condition]
    better = pool[pool["condition_id"] == condition]
    prompt = _choice("prompt", prompt, own["prompt_id"], (better if len(better) else own)["prompt_id"])
    row = own[own["prompt_id"] == prompt].iloc[0]
    cells = found.cells[(found.cells["condition_id"] == condition)]
    track = _choice("track", track, cells["track"], cells["track"])
    cells = cells[cells["track"] == track]
    mine = cells[(cells["prompt_id"] == prompt) & (cells["replicate"] == row["replicate"])]
    figure = canvas(9.0, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(2.3, 1))
    _map(figure, left, mine, row, track)
    _profile(right, cells)
    figure.suptitle(
        f"‖a − b‖ / max(‖a‖, ‖b‖){'' if found.basis == 'states' else ', lower bound from metrics'}: "
        f"{condition}, {prompt}" + ("" if track in ("resid", "core") else f", {track}"),
        fontsize=SMALL + 1,
    )
    return figure


def _map(figure: Figure, panel: Any, cells: Any, row: Any, track: str) -> None:
    from matplotlib.colors import Normalize

    grid = cells.pivot_table(index="depth", columns="pos", values="rel", aggfunc="max", dropna=False)
    values = grid.to_numpy(np.float64)
    with np.errstate(divide="ignore"):
        shown = np.ma.masked_invalid(np.log10(values))
    finite = shown.compressed()
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (-8.0, 0.0)
    panel.set_facecolor("#d9d9d9")
    mesh = panel.pcolormesh(
        np.append(grid.columns, grid.columns[-1] + 1) - 0.5, np.arange(len(grid) + 1) - 0.5, shown,
        norm=Normalize(low, max(high, low + 1e-3)), cmap="viridis", rasterized=True,
    )  # fmt: skip
    bar = figure.colorbar(mesh, ax=panel, pad=0.02)
    bar.set_label("log10 of the relative difference (grey: none)", fontsize=SMALL - 1)
    bar.ax.tick_params(labelsize=SMALL - 1)
    beyond = cells.pivot_table(index="depth", columns="pos", values="beyond", aggfunc="max", dropna=False)
    edge = beyond.to_numpy(dtype=object) == True  # noqa: E712 - missing cells are neither
    if edge.any() and not edge.all():
        panel.contour(
            grid.columns, np.arange(len(grid)), edge.astype(float), levels=[0.5], colors="white", linewidths=0.9
        )
    depths = list(grid.index)
    for prefix, mark, word in (("depth_", "o", "first in depth"), ("token_", "s", "first in the text")):
        depth = row.get(f"{prefix}depth")
        if row["n_beyond"] and row.get(f"{prefix}track") == track and depth in depths:
            at = (row[f"{prefix}pos"], depths.index(depth))
            label = f"{word}: {place(row, prefix)}"
            panel.plot(*at, mark, markersize=9 if mark == "o" else 5, mfc="none", mec=RED, mew=1.6, label=label)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=SMALL - 1, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    ticks = spread(list(range(len(depths))), 16)
    panel.set_yticks(ticks, [str(depths[i]) for i in ticks])
    panel.set_xlabel("token", fontsize=SMALL)
    panel.set_ylabel("depth", fontsize=SMALL)
    panel.tick_params(labelsize=SMALL - 1)


def _profile(panel: Any, cells: Any) -> None:
    groups = cells.groupby("depth")["rel"]
    median, largest, floor = groups.median(), groups.max(), cells.groupby("depth")["floor"].first()
    for values, colour, style, label in (
        (largest, RED, "-", "largest"), (median, BLUE, "-", "median"), (floor, GREY, "--", "noise floor"),
    ):  # fmt: skip
        positive = values.where((values > 0) & np.isfinite(values))
        panel.plot(positive.to_numpy(), positive.index.to_numpy(), style, color=colour, label=label, linewidth=1.4)
    panel.set_xscale("log")
    panel.set_xlabel("relative difference", fontsize=SMALL)
    n = cells[["prompt_id", "replicate"]].drop_duplicates().shape[0]
    panel.set_title(f"over {n} sample{'' if n == 1 else 's'}", fontsize=SMALL)
    panel.legend(fontsize=SMALL - 1, frameon=False)
    panel.tick_params(labelsize=SMALL - 1)
    tidy(panel)


def _choice(word: str, asked: str | None, known: Any, preferred: Any) -> str:
    names = list(dict.fromkeys(str(v) for v in known))
    if asked is None:
        return str(next(iter(preferred)))
    if asked not in names:
        raise UsageError(
            f"the difference has no {word} {asked!r}.{did_you_mean(asked, names)} It has: {', '.join(names)}."
        )
    return asked
