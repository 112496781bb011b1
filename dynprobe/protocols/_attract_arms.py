"""What stands on the model in each arm of an attractor study, and what an arm is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from dynprobe.controllers import AttractorLayer, Controller, Steering
from dynprobe.controllers.attractor import AttractorSite, Recorded, make_baseline
from dynprobe.controllers.attractor._baselines import ContinuousCache
from dynprobe.controllers.attractor._queries import QuerySite
from dynprobe.probes import Subject
from dynprobe.protocols._attract_config import HISTORICAL, UNDOSED, AttractConfig, Cell

__all__ = ["Condition", "Sites", "conditions_of"]


@dataclass(frozen=True)
class Condition:
    """One arm with one choice of settings at one dose.

    Attributes:
        arm: Its name.
        cell: Its settings.
        dose: KL asked for, or raw ε; None for arms without a dose.
        raw: Whether ``dose`` is ε.
        strength: ε, once it is solved.
        reset: ``item`` or ``never``.
        sampled: Whether the bare model writes at temperature 1: what a text of its own looks like.
    """

    arm: str
    cell: Cell
    dose: float | None = None
    raw: bool = False
    strength: float = 0.0
    reset: str = "item"
    sampled: bool = False

    @property
    def condition_id(self) -> str:
        """Name in the tables: ``layer@0.3;slots=8;half_life=46;reset=never``."""
        if self.sampled:
            return f"{self.arm}~sampled"
        dose = "" if self.dose is None else f"@{'eps' if self.raw else ''}{self.dose:g}"
        parts = [self.arm + dose, *([self.cell.name] if self.cell.name and self.arm != "none" else [])]
        return ";".join([*parts, *(["reset=never"] if self.reset == "never" else [])])


def conditions_of(config: AttractConfig) -> list[Condition]:
    """Return all conditions, their strengths still to be solved; the bare model first."""
    cells, found = config.cells, [Condition("none", config.cells[0])]
    if config.task == "generate" and config.temperature < 1:
        found.append(Condition("none", config.cells[0], sampled=True))
    for cell in cells:
        for arm in config.arms:
            if arm == "none":
                continue
            if arm in UNDOSED:
                found.append(Condition(arm, cell))
                continue
            for dose in config.ladder:
                found.append(Condition(arm, cell, dose, bool(config.strengths)))
    if config.task == "generate":
        return found
    kept = [c for c in found if "item" in config.reset or c.arm == "none"]
    if "never" in config.reset:  # the bare model has no memory, and the cache keeps tokens and no state of the layer's
        kept += [replace(c, reset="never") for c in found if c.arm not in ("none", "cache")]
    return kept


class Sites:
    """Makes the controllers of arms; each cell is calibrated once.

    Args:
        subject: The model.
        config: The settings.
    """

    def __init__(self, subject: Subject, config: AttractConfig) -> None:
        self.subject, self.config = subject, config
        self._layers: dict[str, AttractorLayer] = {}

    def controllers(self, condition: Condition, base: Sequence[Any] | None = None) -> list[Controller]:
        """Return what acts, one controller per site.

        Args:
            condition: Which arm.
            base: What each site's memory starts from; None for empty ones.
        """
        cell = condition.cell
        if condition.arm == "cache":
            made = make_baseline("cache", settings=cell.settings)
            assert isinstance(made, ContinuousCache)
            return [made]
        if condition.arm in HISTORICAL or (condition.arm == "none" and cell.settings.site == "query_mean"):
            return []
        settings = cell.settings.replace(strength=condition.strength)
        if condition.arm == "hopfield":
            settings = settings.replace(read="hopfield")
        # One layer per way of centring keeps what was measured; θ depends on the number of slots.
        key = f"{settings.site}/{settings.centring}/{settings.theta}/{settings.slots}"
        layer = self._layers.setdefault(key, AttractorLayer(
            site=settings.site, centre=settings.centring, theta=settings.theta, slots=settings.slots
        ))  # fmt: skip
        found: list[Controller] = []
        for number, site in enumerate(layer.controllers(self.subject, cell.layers)):
            if isinstance(site, QuerySite):
                base_of = None if base is None else base[number]
                found.append(QuerySite(settings, site.site, mean=site.mean, theta=site.theta, base=base_of))
                continue
            made = make_baseline(
                condition.arm, settings=settings, site=site.site, mean=site.mean, theta=site.theta,
                base=None if base is None else base[number],
            )  # fmt: skip
            if hasattr(made, "seed"):
                made.seed = self.config.seed
            found.append(made)
        return found

    def steerings(
        self, condition: Condition, *, slots: bool | None = None, base: Sequence[Any] | None = None
    ) -> list[Steering]:
        """Return the steerings of an arm.

        Args:
            condition: Which arm.
            slots: Whether slots are recorded token by token; False records one line per token, None nothing.
            base: As in :meth:`controllers`.
        """
        found = self.controllers(condition, base)
        if slots is not None:
            found = [Recorded(c, slots=slots) if _recordable(c) else c for c in found]
        return [Steering(c, self.subject) for c in found]


def _recordable(controller: Controller) -> TypeGuard[AttractorSite]:
    """Whether what is stored is the state that is written on; mean queries are another one."""
    return isinstance(controller, AttractorSite) and not isinstance(controller, QuerySite)
