"""The grid of a sweep or a search: strengths × layers × scales × kinds × seeds, as settings and as cells.

A cell is one write at one place with one strength. Its name says all of it, ``relnorm|gaussian|L15|s0|0.1``, so that a
row of a table can be read without the table of conditions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, field_validator

from dynprobe._ranges import whole_numbers
from dynprobe.errors import SiteError, UsageError
from dynprobe.probes import Perturb, PerturbWriter, Subject, Where
from dynprobe.probes._perturb_values import number_text
from dynprobe.probes._scales import SCALES
from dynprobe.protocols._conditions import OWN_UNIT, directed
from dynprobe.protocols._config import RunConfig

__all__ = ["Cell", "GridConfig", "cells_table", "grid_of", "in_order", "parse_strengths", "updates_of"]


#: Strengths of one grid; each is a forward of every prompt at every site.
_MOST = 10_000


def parse_strengths(given: str | float | Sequence[float]) -> tuple[float, ...]:
    """Read strengths: a list, ``"0.1,0.3,1"``, or ``"0.01:3:16"`` (16 points, equal steps of the logarithm).

    Raises:
        UsageError: If it is none of these, or a strength stands twice.

    Example:
        >>> parse_strengths("0.01:1:3"), parse_strengths("0.1,0.3")
        ((0.01, 0.1, 1.0), (0.1, 0.3))
    """
    if isinstance(given, str):
        parts = given.split(":")
        _check_ends(given, parts)
        try:
            if len(parts) == 3:
                low, high, n = float(parts[0]), float(parts[1]), int(parts[2])
                if not (0 < low < high < math.inf and n >= 2):
                    raise ValueError
                if n > _MOST:
                    raise UsageError(f"{given!r} is {n:,} strengths; give at most {_MOST:,}")
                values = [float(f"{a:.6g}") for a in np.geomspace(low, high, n)]
            else:
                values = [float(item) for item in given.replace("+", ",").split(",") if item.strip()]
        except UsageError:
            raise
        except ValueError:
            raise UsageError(
                "write strengths as 0.1,0.3,1 or as low:high:number (0.01:3:16 is 16 of them, in equal steps of the "
                "logarithm)"
            ) from None
    else:
        values = [float(a) for a in np.atleast_1d(np.asarray(given, dtype=np.float64))]
    if not values or not all(math.isfinite(a) for a in values):
        raise UsageError(f"{given!r}: give at least one finite strength, e.g. 0.01:3:16")
    if len(set(values)) < len(values):
        raise UsageError(f"{given!r}: a strength stands there twice")
    return tuple(values)


def _check_ends(given: str, parts: Sequence[str]) -> None:
    """Refuse a range that falls, or that does not say how many strengths, with what was probably meant."""
    if len(parts) not in (2, 3):
        return
    try:
        first, second = float(parts[0]), float(parts[1])
    except ValueError:  # no numbers: said by who reads them
        return
    if not min(first, second) > 0:
        return
    ends = f"{min(first, second):g}:{max(first, second):g}"
    if len(parts) == 2:
        raise UsageError(f"{given!r} lacks the number of strengths; write low:high:number, {ends}:16")
    if first > second:
        raise UsageError(
            f"{given!r} falls from {first:g} to {second:g}; write low:high:number, the smaller strength first: "
            f"{ends}:{parts[2].strip()}"
        )


class GridConfig(RunConfig):
    """Settings of a grid, beside those of a run."""

    alphas: tuple[float, ...] = Field((), description="Strengths: 0.1,0.3,1 or low:high:number.")
    layers: str = Field("50%", description="Layers that are written, one at a time: 15, 6:9, 25%+75%, all.")
    scale: tuple[str, ...] = Field(("relnorm",), description="Noise scales; each is a sweep of its own.")
    kind: tuple[str, ...] = Field(("gaussian",), description="Kinds of write.")
    seeds: tuple[int, ...] = Field((0,), description="Seeds of the noise.")
    positions: str | None = Field(None, description="Positions that are written; default 1: (all but the first).")
    phase: str | None = Field(None, description="prefill, decode or all.")
    component: str = Field("resid_post", description="Component that is written.")
    period: float | None = Field(None, description="Period of kind=sine, in tokens.")
    max_new_tokens: int = Field(0, ge=0, description="Tokens to generate; 0 measures the prompts only.")

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this grid."""
        # The order of a grid's axes is no part of what it is, and how layers are spelt stands in the writes.
        settings = super().identity()
        del settings["layers"]
        for key in ("alphas", "scale", "kind", "seeds"):
            settings[key] = sorted(settings[key])
        return settings

    @field_validator("alphas", mode="before")
    @classmethod
    def _strengths(cls, value: Any) -> tuple[float, ...]:
        return parse_strengths(value)

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> tuple[int, ...]:
        if isinstance(value, str):
            return whole_numbers(value.replace("+", ","))
        return tuple(int(item) for item in np.atleast_1d(value))

    @field_validator("scale", "kind", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(value.replace("+", ",").split(",")) if isinstance(value, str) else value

    @field_validator("layers", mode="before")
    @classmethod
    def _places(cls, value: Any) -> Any:
        if isinstance(value, str | int):
            return str(value)
        return "+".join(str(item) for item in value)

    @field_validator("seeds", "scale", "kind")
    @classmethod
    def _once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("give at least one")
        twice = [item for item in value if value.count(item) > 1]
        if twice:
            raise ValueError(f"{twice[0]} stands there twice; rows of a grid are labelled, so each must be unique")
        return value

    @field_validator("positions", mode="before")
    @classmethod
    def _positions(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Cell:
    """One condition of a grid.

    Attributes:
        condition_id: Its name.
        arm: ``clean``, ``sham``, ``perturbed``, or the control it is: ``sign-flip``, ``energy-matched``.
        perturb: What is written; None for the clean text.
        layer: Layer that is written, None where nothing is.
        variant: ``model``, or the control it belongs to: ``twin``, ``scrambled``.
        decode_mode: ``forced`` or ``free``.
        matched_to: Name of the cell whose energy is written elsewhere.
    """

    condition_id: str
    arm: str
    perturb: Perturb | None = None
    layer: int | None = None
    variant: str = "model"
    decode_mode: str = "forced"
    matched_to: str | None = None
    params: dict[str, Any] = field(default_factory=dict, compare=False)


def in_order(perturbs: Iterable[Perturb]) -> list[Perturb]:
    """The writes of a grid in an order of their own, since the order of a grid's axes is no part of what it is."""
    return sorted(perturbs, key=lambda p: (str(p.replace(alpha=0.0)), p.alpha))


def updates_of(subject: Subject, layers: str) -> tuple[int, ...]:
    """Return the blocks that ``--layers`` names; in a looped model it counts the updates of the track.

    Raises:
        SiteError: If one does not exist.
    """
    try:
        return tuple(Where.parse(f"layers={layers}").resolve_layers(subject.n_layers))
    except SiteError as error:
        if not subject.turns:
            raise
        n = subject.n_layers
        raise SiteError(
            f"--layers {layers} names no update of {subject.name}: it has loops, and --layers counts the {n} updates "
            f"of its track, 0…{n - 1}; update 0 makes the state of depth 1, update {n - 1} the last, of depth {n}"
        ) from error


def grid_of(
    subject: Subject, config: GridConfig, alphas: Sequence[float] | None = None, *, layers: Sequence[int] | None = None
) -> Iterator[tuple[str, int, Perturb]]:
    """Yield name, layer and write of every cell, strengths innermost.

    Args:
        subject: The subject.
        config: The grid.
        alphas: Strengths in place of the grid's.
        layers: Layers in place of the grid's; in a looped model, updates of its track counted from 0.

    Raises:
        UsageError: If a scale, kind or direction cannot be.
        SiteError: If a layer does not exist.
    """
    if layers is None:
        layers = updates_of(subject, config.layers)
    place = {"positions": config.positions, "phase": config.phase, "component": config.component}
    place = {key: value for key, value in place.items() if value is not None}
    if subject.turns and config.component not in (None, "resid_post"):
        raise UsageError(f"{subject.name} is looped: --layers counts the updates of its track; leave --component out")
    given = config.direction is not None or config.contrast is not None
    if given and not set(config.kind) & {"direction", "impulse", "sine"}:
        raise UsageError("a direction was given and no kind needs it; add --kind direction")
    for kind in config.kind:
        if kind == "direction" and not given:
            raise UsageError("kind=direction needs --direction FILE or --contrast 'TEXT A' 'TEXT B'")
        for scale in config.scale if kind not in OWN_UNIT else ("relnorm",):
            if scale in SCALES and SCALES[scale].solved:
                raise UsageError(
                    f"scale={scale} solves for a strength and is not swept; sweep relnorm and read kl_clean_pert, or "
                    "use dynprobe run --perturb alpha=1,scale=isokl"
                )
            name = kind if kind in OWN_UNIT else f"{scale}|{kind}"
            for layer in layers:
                site = subject.where_of((config.component or "resid_post", layer))
                where = site.replace(**place | ({"component": site.component} if subject.turns else {}))
                for seed in config.seeds:
                    bare = Perturb(
                        0.0, scale=scale, kind=kind, seed=seed, where=where,
                        period=config.period if kind == "sine" else None,
                    ).defaults_filled()  # fmt: skip
                    bare = directed(subject, bare, config)
                    PerturbWriter(subject, bare)  # a site that is not there fails here
                    for alpha in config.alphas if alphas is None else alphas:
                        yield f"{name}|L{layer}|s{seed}|{number_text(alpha)}", layer, bare.replace(alpha=alpha)


def cells_table(cells: Sequence[Cell], config: RunConfig) -> pd.DataFrame:
    """Return the conditions table of a grid."""
    rows = []
    for cell in cells:
        p = cell.perturb
        rows.append(
            {
                "condition_id": cell.condition_id, "arm": cell.arm, "decode_mode": cell.decode_mode,
                "scale": p.scale if p is not None and p.kind not in OWN_UNIT else None,
                "alpha": math.nan if cell.matched_to else p.alpha if p is not None else 0.0,
                "kind": p.kind if p is not None else None, "where": str(p.where) if p is not None else None,
                "seed": p.seed if p is not None else None, "controller": None, "variant": cell.variant,
                "layer": cell.layer, "matched_to": cell.matched_to,
                "params": [str(p)] if p is not None else None, "temperature": config.temperature,
                "top_p": config.top_p, "max_new_tokens": config.max_new_tokens,
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    table["seed"], table["layer"] = table["seed"].astype("Int64"), table["layer"].astype("Int64")
    return table
