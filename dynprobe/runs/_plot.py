"""``run.plot``: the pictures of a run, by name.

Each method returns a matplotlib ``Figure`` that belongs to the caller, and saves it as well where ``save=`` names a
file. Pictures that belong to what a run did are written into its ``figures/`` when it finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.runs._canvas import save_figure
from dynprobe.runs._figures import depth_figure
from dynprobe.runs._grid_data import on_a_grid
from dynprobe.runs._plot_attract import lengths_figure, slots_figure
from dynprobe.runs._plot_dissociate import dissociation_figure
from dynprobe.runs._plot_heatmap import heatmap_figure
from dynprobe.runs._plot_iterate import iterations_figure
from dynprobe.runs._plot_recover import recovery_figure, signal_figure
from dynprobe.runs._plot_response import bode_figure, impulse_figure
from dynprobe.runs._plot_sweep import response_figure
from dynprobe.runs._plot_threshold import fragility_figure, thresholds_figure
from dynprobe.runs._plot_tokens import heatmap_tokens_figure, pca_figure, regimes_figure
from dynprobe.runs._protocol import protocol_of
from dynprobe.runs._quantity import is_sweep, is_threshold, per_position

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["PICTURES", "Plots"]

#: Names of the pictures.
PICTURES = (
    "depth", "bode", "impulse", "response", "heatmap", "thresholds", "fragility", "iterations", "signal", "recovery",
    "dissociation", "lengths", "slots", "heatmap_tokens", "pca", "regimes",
)  # fmt: skip
#: In this order: a figure that was drawn once is laid out from where it was, and its SVG is another file.
_FORMATS = (".svg", ".png")


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

    def response(
        self,
        column: str | None = None,
        *,
        layer: int | Sequence[int] | None = None,
        scale: str | None = None,
        save: str | Path | None = None,
    ) -> Figure:
        """Response against α of a sweep or a threshold run, one panel per criterion, scale and layer.

        Every prompt is a thin line; the mean over prompts has a 95 % bootstrap band; controls are drawn where the run
        has them. A search shows its trials, the level of the criterion, α50 with its interval, where each prompt
        crossed, and an arrow for each prompt that did not.

        Args:
            column: What answers: ``kl_clean_pert``, ``flip_rate``, ``kappa_phase_d`` …; None takes the KL, or all
                criteria of a threshold run.
            layer: Layer or layers; None takes all, or six of them (of several criteria three), evenly chosen.
            scale: Noise scale; None takes all.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run has no response to draw.
            UsageError: There is no such column, layer or scale, matplotlib is missing, or the file cannot be written.
        """
        return _kept(response_figure(self._run, column, layer, scale), save)

    def heatmap(self, column: str | None = None, *, scale: str | None = None, save: str | Path | None = None) -> Figure:
        """Mean response over layer × α, and the line at which it first reaches the criterion, one panel per scale.

        Args:
            column: What answers; None takes the KL, or the first criterion of a threshold run.
            scale: Noise scale; None takes all.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run has no strengths that all layers and prompts share.
            UsageError: There is no such column or scale, matplotlib is missing, or the file cannot be written.
        """
        return _kept(heatmap_figure(self._run, column, scale), save)

    def thresholds(self, *, scale: str | None = None, save: str | Path | None = None) -> Figure:
        """α50 with its interval against the layer, one line per scale; arrows lead out of the tested range.

        Args:
            scale: Noise scale; None takes all.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run has no thresholds of whole texts.
            UsageError: There is no such scale, matplotlib is missing, or the file cannot be written.
        """
        return _kept(thresholds_figure(self._run, scale), save)

    def fragility(
        self, prompt: str | None = None, *, scale: str | None = None, save: str | Path | None = None
    ) -> Figure:
        """Map of thresholds over token × layer of one prompt; cells outside the tested range are hatched.

        Args:
            prompt: Name of the prompt; None takes the first.
            scale: Noise scale; None takes all.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run has no thresholds per position.
            UsageError: There is no such prompt or scale, matplotlib is missing, or the file cannot be written.
        """
        return _kept(fragility_figure(self._run, prompt, scale), save)

    def iterations(self, *, save: str | Path | None = None) -> Figure:
        """Loss, Δ of the last update, κ, energy and accuracy against the number of iterations of an ``iterate`` run.

        Args:
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run was not read at several numbers of iterations.
            UsageError: Matplotlib is missing, or the file cannot be written.
        """
        return _kept(iterations_figure(self._run), save)

    def signal(self, *, save: str | Path | None = None) -> Figure:
        """The detector's signal over the new tokens of a ``recover`` run, clean, perturbed and with each mode.

        The dashed and dotted lines are the band that switches the detector on and off; below, the share of texts in
        which the mode was acting.

        Args:
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run is no recovery study.
            UsageError: Matplotlib is missing, or the file cannot be written.
        """
        return _kept(signal_figure(self._run), save)

    def recovery(self, *, save: str | Path | None = None) -> Figure:
        """Recovery fractions of a ``recover`` run by mode, timing and metric, beside the same energy at random.

        Metrics that the controller acts on are hollow.

        Args:
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run holds no recovery fractions.
            UsageError: Matplotlib is missing, or the file cannot be written.
        """
        return _kept(recovery_figure(self._run), save)

    def dissociation(self, *, save: str | Path | None = None) -> Figure:
        """Accuracy and the dynamic metric against α of a ``dissociate`` run, and RF_dyn against RF_sem of every mode.

        Args:
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run is no finished study of dissociation.
            UsageError: Matplotlib is missing, or the file cannot be written.
        """
        return _kept(dissociation_figure(self._run), save)

    def lengths(self, *, save: str | Path | None = None) -> Figure:
        """Repetition, NLL under the bare model and drift of an ``attract`` run against length, one line per arm.

        Args:
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run wrote no long texts.
            UsageError: Matplotlib is missing, or the file cannot be written.
        """
        return _kept(lengths_figure(self._run), save)

    def slots(self, prompt: str | None = None, *, save: str | Path | None = None) -> Figure:
        """Strength of every slot of an ``attract`` run over the tokens of one text, and summed over all texts.

        Args:
            prompt: Name of the prompt; None takes the first.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run recorded no slots.
            UsageError: Matplotlib is missing, or the file cannot be written.
        """
        return _kept(slots_figure(self._run, prompt), save)

    def heatmap_tokens(
        self,
        column: str | None = None,
        *,
        prompt: str | None = None,
        condition: str | None = None,
        save: str | Path | None = None,
    ) -> Figure:
        """Map of a column of ``depths`` over depth and token of one text, the tokens as labels.

        Args:
            column: ``angle``, ``delta_rel_prev``, ``norm``, ``diverge_angle`` …; None takes the first there is.
            prompt: Name of the prompt; None takes the first.
            condition: Its condition; None takes the first.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run stored nothing per token and depth.
            UsageError: There is no such column, prompt or condition, matplotlib is missing, or the file cannot be
                written.
        """
        return _kept(heatmap_tokens_figure(self._run, column, prompt, condition), save)

    def pca(
        self, prompt: str | None = None, *, unit: str = "mean over tokens", save: str | Path | None = None
    ) -> Figure:
        """The state at every depth in the plane of the first two principal components of the clean states.

        Args:
            prompt: Name of the prompt; None takes the first.
            unit: ``mean over tokens`` or ``last prompt token``.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run holds no states (``--states``).
            UsageError: There is no such prompt or unit, matplotlib is missing, or the file cannot be written.
        """
        return _kept(pca_figure(self._run, prompt, unit), save)

    def regimes(self, *, save: str | Path | None = None) -> Figure:
        """Share of texts in each regime of LIMEN's ratio, one bar per condition.

        Args:
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: No regime was called.
            UsageError: Matplotlib is missing, or the file cannot be written.
        """
        return _kept(regimes_figure(self._run), save)

    def draw(self, name: str | None = None, *, save: str | Path | None = None) -> Figure:
        """Draw a picture by its name; None takes the one that fits what the run did.

        Args:
            name: One of ``depth``, ``bode``, ``impulse``, ``response``, ``heatmap``, ``thresholds``, ``fragility``,
                ``iterations``, ``signal``, ``recovery``, ``dissociation``, ``lengths``, ``slots``,
                ``heatmap_tokens``, ``pca``, ``regimes``.
            save: File to write as well; its ending chooses the format.

        Raises:
            RunFolderError: The run holds nothing to draw.
            UsageError: There is no such picture, matplotlib is missing, or the file cannot be written.
        """
        if name is None:
            name = next(iter(self.own()), "depth")
        if name not in PICTURES:
            raise UsageError(
                f"there is no picture {name!r}; known: {', '.join(PICTURES)}.{did_you_mean(name, PICTURES)}"
            )
        return _kept(getattr(self, name)(), save)

    def own(self) -> dict[str, Callable[[], Figure]]:
        """The pictures that belong to what this run did, by name, the one that fits best first."""
        if is_threshold(self._run) or is_sweep(self._run):
            return {name: getattr(self, name) for name in _of_a_grid(self._run)}
        if protocol_of(self._run.manifest.config) == "iterate":
            return {"iterations": self.iterations}
        if protocol_of(self._run.manifest.config) == "attract":
            rows = self._run.manifest.rows()
            return {name: getattr(self, name) for name in ("lengths", "slots") if rows.get(name)}
        if protocol_of(self._run.manifest.config) == "dissociate":
            return {"dissociation": self.dissociation}
        if protocol_of(self._run.manifest.config) == "recover":
            result = {"recovery": self.recovery} if self._run.manifest.rows().get("fits") else {}
            return {**result, "signal": self.signal}
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
        names = [n for n in vars(type(self)) if not n.startswith("_") and n not in ("draw", "own", "write")]
        return f"run.plot: {', '.join(f'{n}()' for n in names)}; each takes save='file.png'"


def _of_a_grid(run: Run) -> list[str]:
    """Names of the pictures of a sweep or threshold run: a line or a map along the layers needs two of them."""
    if is_threshold(run) and per_position(run):
        return ["fragility"]
    conditions = run.conditions
    several = conditions[conditions["arm"] == "perturbed"]["layer"].nunique() > 1
    if is_threshold(run):
        return [*(["thresholds"] if several else []), "response", *(["heatmap"] if several and on_a_grid(run) else [])]
    return ["response", *(["heatmap"] if several else [])]


def _kept(figure: Figure, save: str | Path | None) -> Figure:
    if save is not None:
        save_figure(figure, save)
    return figure
