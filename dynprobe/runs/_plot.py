"""``run.plot``: the pictures of a run, by name.

Each method returns a matplotlib ``Figure`` that belongs to the caller, and saves it as well where ``save=`` names a
file. Pictures that belong to what a run did are written into its ``figures/`` when it finishes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.runs._canvas import save_figure
from dynprobe.runs._figures import depth_figure
from dynprobe.runs._plot_response import bode_figure, impulse_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["Plots"]

_FORMATS = (".png", ".svg")


class Plots:
    """The pictures of one run; reached as ``run.plot``."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def depth(self, *, save: str | Path | None = None) -> Figure:
        """κ by step, its paired change, and the angle to the clean state, along the depth.

        Args:
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run has no perturbed arm.
            UsageError: Matplotlib is missing, or the file cannot be written.
        """
        return _kept(depth_figure(self._run), save)

    def bode(self, *, condition: str = "perturbed.forced", save: str | Path | None = None) -> Figure:
        """Gain in dB and phase by depth of a ``kind=sine`` run, with bands over prompts.

        Points are hollow where the response does not stand out of the neighbouring frequencies.

        Args:
            condition: The driven condition.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run has no lock-in, or no text was long enough for one.
            UsageError: Matplotlib is missing, or the file cannot be written.
        """
        return _kept(bode_figure(self._run, condition), save)

    def impulse(
        self, *, prompt: str | None = None, condition: str = "perturbed.forced", save: str | Path | None = None
    ) -> Figure:
        """Map of ‖h′−h‖/‖h‖ over depth and position of a ``kind=impulse`` run, in logarithmic colour.

        Args:
            prompt: Name of one prompt; None takes the median over all, aligned at the written position.
            condition: The perturbed condition.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run has no single impulse, or nothing responded.
            UsageError: There is no such prompt, matplotlib is missing, or the file cannot be written.
        """
        return _kept(impulse_figure(self._run, prompt, condition), save)

    def own(self) -> dict[str, Callable[[], Figure]]:
        """The pictures that belong to what this run did, by name."""
        specs = [str(spec) for spec in self._run.manifest.config.get("perturb") or ()]
        found: dict[str, Callable[[], Figure]] = {}
        if any("kind=sine" in spec for spec in specs):
            found["bode"] = self.bode
        if len(specs) == 1 and "kind=impulse" in specs[0]:
            found["impulse"] = self.impulse
        return found

    def write(self) -> list[Path]:
        """Draw the pictures that belong to this run into its ``figures/``, as PNG and SVG, and return the files.

        Raises:
            RunFolderError: The run holds nothing to draw.
            UsageError: Matplotlib is missing, or a file cannot be written.
        """
        files = []
        for name, draw in self.own().items():
            figure, folder = draw(), self._run.path / "figures"
            folder.mkdir(exist_ok=True)
            files += [save_figure(figure, folder / f"{name}{ending}") for ending in _FORMATS]
        return files

    def __repr__(self) -> str:
        names = [n for n in vars(type(self)) if not n.startswith("_") and n not in ("own", "write")]
        return f"run.plot: {', '.join(f'{n}()' for n in names)}; each takes save='file.png'"


def _kept(figure: Figure, save: str | Path | None) -> Figure:
    if save is not None:
        save_figure(figure, save)
    return figure
