"""Settings of a study of the attractor layer."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dynprobe.controllers.attractor import BASELINES, Settings, attractor_spec, parse_attractor
from dynprobe.errors import UsageError, did_you_mean
from dynprobe.protocols._config import RunConfig

__all__ = ["ARMS", "DEFAULT_ARMS", "HISTORICAL", "TASKS", "UNDOSED", "AttractConfig", "Cell"]

#: Arms in the order in which they are run.
DEFAULT_ARMS = ("none", "layer", "constant", "random", "frozen", "leaky", "hopfield", "fast_weights", "cache")
#: The historical layer without and with its cache defect: for the task that it was reported on.
HISTORICAL = ("phase2", "phase2_leak")
ARMS = (*DEFAULT_ARMS, *HISTORICAL)
#: Arms that have no ε: what they inject is fixed.
UNDOSED = ("none", "cache", *HISTORICAL)
#: Arms that can stand at the site of mean queries, whose field is not made of what is written on.
_OF_QUERIES = {"none", "layer", "hopfield", "cache", *HISTORICAL}
TASKS = ("generate", "reading", "recall")
#: Grid of a study: setting → how it is written in the name of a condition.
_GRID = ("slots", "half_life", "burn_in", "layers")


@dataclass(frozen=True)
class Cell:
    """One choice of settings.

    Attributes:
        settings: The layer's; its strength is what a dose is solved for.
        layers: Where it goes, as a spec.
        name: What tells it from the other cells, empty where there is one.
    """

    settings: Settings
    layers: str
    name: str


class AttractConfig(RunConfig):
    """Settings of :func:`dynprobe.attract`."""

    task: Literal["generate", "reading", "recall"] = Field(
        "generate", description="Write long texts; answer questions about stories; recall names over a distance."
    )
    arms: tuple[str, ...] = Field(DEFAULT_ARMS, description=f"Arms, or all: {', '.join(ARMS)}.")
    attractor: str = Field("default", description="The layer, e.g. slots=16,read=match,layers=50%; grids go over it.")
    slots: tuple[int, ...] = Field((), description="Numbers of slots; default the layer's.")
    half_life: tuple[float, ...] = Field((), description="Half-lives in tokens; default the layer's.")
    layers: tuple[str, ...] = Field((), description="Places, each one block or several joined by +; default 50%.")
    burn_in: tuple[float, ...] = Field((), description="Tokens, or strength, before anything is injected.")
    doses: tuple[float, ...] = Field((0.03, 0.3, 1.0), description="Mean KL(bare ‖ layer), nats per token.")
    strengths: tuple[float, ...] = Field((), description="Raw ε in place of doses.")
    match: Literal["strength", "kl"] = Field(
        "strength", description="Arms get the layer's ε, or each one the ε of the same KL."
    )
    dose_texts: int = Field(8, ge=1, description="Texts that ε is solved on.")
    dose_tokens: int = Field(128, ge=2, description="Tokens after the prompt that a dose text has at most.")
    largest: float = Field(64.0, gt=0, description="Largest ε that is tried.")
    lengths: tuple[int, ...] = Field((50, 100, 200, 500, 1000), description="Lengths at which a text is read.")
    max_new_tokens: int = Field(200, ge=8, description="Tokens that are written; of lengths the shorter ones are kept.")
    stop_at_eos: bool = Field(False, description="Texts of one length are compared, so nothing ends them.")
    reset: tuple[Literal["item", "never"], ...] = Field(
        ("item",), description="Empty the memory before each item, or never (tasks reading and recall)."
    )
    stories: tuple[Literal["short", "long"], ...] = Field(
        ("short", "long"), description="Lengths of the stories of task reading."
    )
    distances: tuple[int, ...] = Field(
        (50, 100, 200, 500, 1000), description="Tokens between fact and question of task recall."
    )
    record: Literal["layer", "all", "none"] = Field("layer", description="Arms whose slots are written token by token.")
    attention: bool = Field(True, description="Measure attention mass on the prompt; needs eager attention.")

    @field_validator("arms", mode="before")
    @classmethod
    def _arms(cls, value: Any) -> tuple[str, ...]:
        names = [name.replace("-", "_") for name in _listed(value)]
        wrong = next((name for name in names if name not in (*ARMS, "all")), None)
        if wrong is not None:
            raise ValueError(f"no arm {wrong!r}; known: {', '.join(ARMS)}, all.{did_you_mean(wrong, ARMS)}")
        chosen = (*DEFAULT_ARMS, *names) if "all" in names else names
        return tuple(arm for arm in ARMS if arm in ("none", *chosen))

    @field_validator(
        "slots", "half_life", "burn_in", "doses", "strengths", "lengths", "distances", "reset", "stories", "layers",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _lists(cls, value: Any) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_listed(value)))

    @field_validator("doses", "strengths", "lengths", "distances")
    @classmethod
    def _rising(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if any(not math.isfinite(x) or x <= 0 for x in value):
            raise ValueError(f"{info.field_name} are positive numbers")
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _possible(self) -> AttractConfig:
        try:
            cells = self.cells
        except UsageError as error:
            raise ValueError(str(error)) from error
        if self.stop_at_eos or self.states or self.lens or self.perturb:
            raise ValueError("attract compares texts of one length without noise, states or lens: leave stop_at_eos, "
                             "perturb, states and lens out")  # fmt: skip
        if not self.doses and not self.strengths:
            raise ValueError("give --doses or --strengths")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError("several samples of one prompt are all the same under greedy decoding; give a temperature")
        if self.task == "generate" and set(self.arms) & set(HISTORICAL):
            raise ValueError("phase2 and phase2_leak mix the rows of a batch and stand outside the contract of "
                             "controllers; they are for tasks reading and recall")  # fmt: skip
        beside = [a for a in self.arms if a not in _OF_QUERIES]
        if beside and any(c.settings.site == "query_mean" for c in cells):
            raise ValueError(f"arm {beside[0]} has no meaning at site=query_mean; leave it out, or take another site")
        if self.task == "generate" and "never" in self.reset:
            raise ValueError("reset='never' is for tasks reading and recall; generated texts always start empty")
        if "layer" not in self.arms and self.match == "strength" and not self.strengths and len(self.arms) > 1:
            raise ValueError("the other arms get the layer's ε, so arm layer is needed; or take --match kl")
        if "cache" in self.arms and any(c.settings.burn != "tokens" for c in cells):
            raise ValueError("arm cache begins after a number of tokens; leave it out with burn=strength")
        return self

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All choices of settings, the given ones over the layer's own."""
        layer, place = parse_attractor(self.attractor)
        own: dict[str, Any] = {
            "slots": layer.settings.slots, "half_life": layer.settings.half_life, "burn_in": layer.settings.burn_in,
            "layers": place or "50%",
        }  # fmt: skip
        grid = {name: tuple(getattr(self, name)) or (own[name],) for name in _GRID}
        several = [name for name in _GRID if len(grid[name]) > 1]
        cells = []
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            name = ";".join(f"{key}={_short(chosen[key])}" for key in several)
            layers = str(chosen.pop("layers"))
            cells.append(Cell(layer.settings.replace(**chosen), layers, name))
        return tuple(cells)

    @property
    def read_lengths(self) -> tuple[int, ...]:
        """Lengths at which a text is read: those asked for, cut at the largest that is written."""
        kept = [n for n in self.lengths if n < self.max_new_tokens]
        return (*kept, self.max_new_tokens)

    @property
    def ladder(self) -> tuple[float, ...]:
        """Doses in nats, or raw strengths."""
        return self.strengths or self.doses

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this study."""
        settings = {**super().identity(), "protocol": "attract"}
        settings["attractor"] = [attractor_spec(cell.settings, cell.layers) for cell in self.cells]
        return settings


def _listed(value: Any) -> list[str]:
    """Items of a list, with commas or without, in the order given."""
    items = [value] if isinstance(value, str | int | float) else list(value)
    return [part.strip() for item in items for part in str(item).split(",") if part.strip()]


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


assert set(BASELINES) < {*ARMS}
