"""Picture of a delay diagnosis: false neighbours and first share among surrogates, and the axes beside cosines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.runs._canvas import BLUE, GREY, RED, canvas
from dynprobe.runs._plot_axes import PAGE, SMALL, dress, legend, note, plain, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_delay"]

_KINDS = {
    "ft": ("Fourier", "#56B4E9"), "aaft": ("AAFT", "#CC79A7"), "iaaft": ("IAAFT", "#009E73"),
    "ar1": ("AR(1)", "#E69F00"),
}  # fmt: skip
_COMPONENTS = ((BLUE, "-"), (RED, "-"), ("#009E73", "-"))
#: Half of the width that all surrogates of one dimension take beside each other.
_HALF = 0.27


def draw_delay(table: pd.DataFrame, axes: pd.DataFrame, series: str | None = None, *, accept: float = 0.05) -> Figure:
    """Draw one series of a delay diagnosis.

    Args:
        table: Its table.
        axes: Principal axes of the data.
        series: Name of the series; default the first.
        accept: Share of false neighbours below which a dimension counts as enough; a dotted line.

    Raises:
        UsageError: There is no such series, or matplotlib is missing.
    """
    names = list(dict.fromkeys(table["series"]))
    name = names[0] if series is None else series
    if name not in names:
        raise UsageError(
            f"there is no series {name!r}.{did_you_mean(name, names)} There are {len(names)}, such as {names[0]!r}"
        )
    rows, own = table[table["series"] == name], axes[axes["series"] == name]
    figure = canvas(PAGE, 2.9)
    left, middle, right = figure.subplots(1, 3)
    _among(left, rows, "fnn", 0, "false nearest neighbours", "share", accept)
    _among(middle, rows, "pc_share", 1, "first principal axis", "share of variance", None)
    _axes(right, own)
    facts = rows.iloc[0]
    made = int(rows["n_surrogates"].max())
    r1 = f"{facts['r1']:.2f}".replace("-", "−")
    head = f"{name}: {facts['n']} steps, lag {facts['lag']}, Theiler window {facts['theiler']}"
    under = f"bars: central 95 % and median of {made} surrogates of each kind" if made else "no surrogates: see reasons"
    title(figure, f"{head}, lag-1 autocorrelation {r1}\n{under}")
    legend(figure, [left, right], 8)
    return figure


def _among(
    panel: Any, rows: pd.DataFrame, statistic: str, component: int, heading: str, label: str, accept: float | None
) -> None:
    dress(panel, heading)
    own = rows[(rows["statistic"] == statistic) & (rows["component"] == component)]
    kinds = list(dict.fromkeys(own["surrogate"]))
    for number, kind in enumerate(kinds):
        part = own[own["surrogate"] == kind].dropna(subset=["low"])
        words, colour = _KINDS[kind]
        shift = 0.0 if len(kinds) == 1 else _HALF * (2 * number / (len(kinds) - 1) - 1)
        at = part["dim"].to_numpy(float) + shift
        panel.vlines(at, part["low"], part["high"], color=colour, lw=5, alpha=0.55, label=words)
        panel.plot(at, part["median"], ls="", marker="_", ms=6, color=colour)
    data = own[own["surrogate"] == kinds[0]]
    panel.plot(data["dim"], data["value"], color="black", marker="o", ms=3.5, lw=1.2, label="data", zorder=3)
    dims = data["dim"].to_numpy(float)
    missing = data[data["value"].isna()]
    if len(missing):
        reasons = ", ".join(f"{d}: {r}" for d, r in zip(missing["dim"], missing["reason"], strict=True))
        note(panel, 0.98, 0.98, f"not given for m = {reasons}".replace(", ", "\n"), ha="right", va="top")
    if accept is not None:
        panel.axhline(accept, color=GREY, lw=0.6, ls=":")
    else:
        panel.plot(dims, 1 / dims, color=GREY, lw=0.6, ls=":")
        note(panel, 0.02, 0.02, "dotted: 1/m")
    panel.set_xlim(dims.min() - 0.6, dims.max() + 0.6)
    panel.set_ylim(-0.03, 1.03)
    panel.set_xticks(dims)
    panel.set_xlabel("embedding dimension m", fontsize=SMALL)
    plain(panel.set_ylabel(label, fontsize=SMALL))


def _axes(panel: Any, own: pd.DataFrame) -> None:
    from dynprobe.metrics._delay import reference_axes

    dims = own.dropna(subset=["value"])["dim"]
    dress(panel, "principal axes" if dims.empty else f"principal axes, m = {dims.max()}")
    if dims.empty:
        note(panel, 0.5, 0.5, "no axes: see the reasons in the table", ha="center", va="center")
        panel.set_axis_off()
        return
    m = int(dims.max())
    cosines = reference_axes(m, "cosine")
    for number, (colour, style) in enumerate(_COMPONENTS[: min(m, 3)]):
        axis = own[(own["dim"] == m) & (own["component"] == number + 1)].sort_values("coordinate")["value"].to_numpy()
        if not np.isfinite(axis).all():
            continue
        near = cosines[int(np.abs(cosines @ axis).argmax())]
        panel.plot(range(m), near * np.sign(near @ axis), color=colour, lw=3.5, alpha=0.25)
        panel.plot(range(m), axis, color=colour, ls=style, lw=1.2, marker="o", ms=2.5, label=f"axis {number + 1}")
    panel.plot([], [], color=GREY, lw=3.5, alpha=0.4, label="nearest cosine")
    panel.axhline(0, color=GREY, lw=0.5)
    panel.set_xticks(range(m))
    panel.set_xlim(-0.25, m - 0.75)
    panel.set_xlabel("coordinate of the window", fontsize=SMALL)
    plain(panel.set_ylabel("weight", fontsize=SMALL))
