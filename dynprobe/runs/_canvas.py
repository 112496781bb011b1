"""What all figures share: a canvas without global state, colours, and how a figure is saved.

Figures are made without pyplot, so drawing one neither chooses a backend for the whole process nor keeps it alive.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "RED", "canvas", "save_figure", "tidy"]

#: Okabe–Ito: told apart with any colour vision, and in print.
BLUE, RED, GREY = "#0072B2", "#D55E00", "#666666"


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches.

    Raises:
        UsageError: Matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'dynprobe[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def tidy(panel: Any) -> None:
    """Take away the box and the air at the sides."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.01)


def save_figure(figure: Figure, target: str | Path) -> Path:
    """Save a figure; the ending of the file (``.png``, ``.svg``, ``.pdf``) chooses the format.

    Raises:
        UsageError: The folder is not there, or matplotlib cannot write this format.
    """
    import matplotlib

    target = Path(target)
    # The same figure is the same file: no date in it, and ids that do not change from process to process.
    undated: dict[str, Any] = {"metadata": {"Date": None}} if target.suffix == ".svg" else {}
    try:
        with matplotlib.rc_context({"svg.hashsalt": "dynprobe"}):
            figure.savefig(target, dpi=150, **undated)
    except (ValueError, OSError) as error:
        raise UsageError(f"{target} cannot be written: {error}") from error
    return target
