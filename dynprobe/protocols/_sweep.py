"""``sweep``: strengths × layers × scales × kinds × seeds × prompts, with controls, at a fraction of a loop's cost.

One clean forward serves every layer and strength. All strengths, seeds and directions of a layer go in one batch that
starts above the blocks they leave alone (:mod:`dynprobe.probes._fork`). Rows are labelled by their condition and stored
in one table; what is stored of a row is the same as under :func:`dynprobe.run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator
from torch import nn

from dynprobe import metrics
from dynprobe.errors import UsageError, did_you_mean
from dynprobe.probes import Calibration, Perturb, Subject
from dynprobe.probes._perturb_values import number_text
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._call import Call
from dynprobe.protocols._controls import energy_matched, scrambled, twin_of
from dynprobe.protocols._execute import Begin, Listener, Progress, calibration_of, execute
from dynprobe.protocols._grid import Cell, GridConfig, cells_table, grid_of, in_order, parse_strengths, updates_of
from dynprobe.protocols._plan import plan_batches
from dynprobe.protocols._prepare import Prepared, prepare
from dynprobe.protocols._responses import response_table
from dynprobe.protocols._sweep_rows import branch_tables, clean_tables, free_tables, write_texts
from dynprobe.protocols._trunk import Request, Trunk, roads_of
from dynprobe.runs import Run, RunWriter

__all__ = ["CONTROLS", "SweepConfig", "sweep"]

CONTROLS = ("sham", "sign", "energy", "twin", "scrambled")


class SweepConfig(GridConfig):
    """Settings of a sweep."""

    alphas: tuple[float, ...] = Field(parse_strengths("0.01:3:16"), description="Strengths.")
    controls: tuple[str, ...] = Field(("sham",), description=f"Any of {', '.join(CONTROLS)}.")
    tables: Literal["samples", "all"] = Field("samples", description="'all' adds tokens, depths and profiles.")

    @field_validator("controls", mode="before")
    @classmethod
    def _known(cls, value: Any) -> tuple[str, ...]:
        items = tuple(value.replace("+", ",").split(",")) if isinstance(value, str) else tuple(value)
        items = tuple(i.strip() for i in items if i.strip() not in ("", "none"))
        unknown = [i for i in items if i not in CONTROLS]
        if unknown:
            raise ValueError(
                f"unknown control {unknown[0]!r}; known: {', '.join(CONTROLS)}.{did_you_mean(unknown[0], CONTROLS)}"
            )
        return items

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this sweep."""
        return {**super().identity(), "protocol": "sweep", "controls": sorted(self.controls)}


def sweep(
    model: str | nn.Module | Subject,
    prompts: Sequence[Any] | Path | None = None,
    *,
    alphas: str | Sequence[float] = "0.01:3:16",
    layers: str | int | Sequence[int] = "50%",
    seeds: str | int | Sequence[int] = 0,
    scale: str | Sequence[str] = "relnorm",
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Sweep the strength of a perturbation over layers, scales, kinds, seeds and prompts.

    Args:
        model: Hub id, folder, GGUF file, known name, module, or subject.
        prompts: Texts, token ids or prompts, or a path to a file of them; default the 24 built-in ones.
        alphas: Strengths: a list, ``"0.1,0.3,1"``, or ``"0.01:3:16"`` (16 points, equal steps of the logarithm).
        layers: Layers, each written alone: ``15``, ``"6:9"``, ``"25%+75%"``, ``"all"``.
        seeds: Seeds of the noise: ``0``, ``"0:4"``, a list.
        scale: Noise scales; a sweep each.
        listener: Called with :class:`dynprobe.protocols.Progress`.
        **settings: Any field of :class:`SweepConfig`: ``kind``, ``positions``, ``controls``, ``out``, ….

    Returns:
        The run; ``run.samples`` has one row per prompt and condition, ``run.table("conditions")`` says what each is.

    Raises:
        UsageError: If a setting is wrong.
        SelfTestError: If a self-test shows that no number could be trusted.
        InterruptedRunError: If it was stopped by the user; the same call continues it.

    Example:
        >>> import tempfile
        >>> from dynprobe.testing import tiny_llama
        >>> with tempfile.TemporaryDirectory() as out:
        ...     done = sweep(tiny_llama(), [[5, 6, 7, 8], [9, 10, 11]], alphas=[0.1, 0.4], layers="all", out=out)
        ...     done.samples.groupby("condition_id", observed=True).size().head(3)
        condition_id
        clean                         2
        sham|L0                       2
        relnorm|gaussian|L0|s0|0.1    2
        dtype: int64
    """
    if listener is not None:
        listener(Progress("load"))
    settings = {"alphas": alphas, "layers": layers, "seeds": seeds, "scale": scale, **settings}
    return execute(*open_sweep(model, prompts, settings), listener, Call("sweep", model, settings))


def open_sweep(model: Any, prompts: Any, settings: Mapping[str, Any]) -> tuple[Prepared, Begin]:
    """Everything of a sweep but its units."""
    ready = prepare(model, prompts, settings, kind=SweepConfig, resolve=_writes)
    return ready, lambda calibration, exact: _Sweep(ready, calibration, exact)


def _writes(subject: Subject, config: SweepConfig, given: Sequence[Perturb | str]) -> list[Perturb]:
    if given:
        raise UsageError("a sweep takes --alphas, --layers, --scale, --kind, --seeds and --positions, not --perturb")
    if config.num_samples != 1 or config.states or config.lens:
        raise UsageError("a sweep takes no --num-samples, --states or --lens; use dynprobe run for one condition")
    if "energy" in config.controls and "sine" in config.kind:
        raise UsageError(
            "the energy of kind=sine swings with the position and is not matched; leave out control energy"
        )
    return in_order(perturb for _, _, perturb in grid_of(subject, config))


@dataclass(eq=False)
class _Sweep:
    """The experiment: one unit is a group of prompts at one layer."""

    ready: Prepared
    calibration: Calibration | None
    exact: bool

    def __post_init__(self) -> None:
        self.config: SweepConfig = self.ready.config  # type: ignore[assignment]
        self._held: tuple[Any, list[tuple[Trunk, list[Any]]]] | None = None

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers of the grid."""
        return updates_of(self.ready.subject, self.config.layers)

    @cached_property
    def variants(self) -> list[str]:
        """The model as it is, and the controls that are another model or another text."""
        return ["model", *(c for c in ("twin", "scrambled") if c in self.config.controls)]

    def _cells(self, variant: str, layer: int, mode: str = "forced") -> list[Cell]:
        """The conditions of one variant at one layer."""
        before = "" if variant == "model" else f"{variant}:"
        after = "" if mode == "forced" else "|free"
        grid = list(grid_of(self.ready.subject, self.config, layers=[layer]))
        cells = [
            Cell(f"{before}{name}{after}", "perturbed", perturb, layer, variant, mode) for name, _, perturb in grid
        ]
        controls = self.config.controls if variant == "model" and mode == "forced" else ()
        if "sham" in self.config.controls and mode == "forced":
            cells.insert(0, Cell(f"{before}sham|L{layer}", "sham", grid[0][2].replace(alpha=0.0), layer, variant))
        known = {cell.condition_id for cell in cells}
        if "sign" in controls:
            for name, _, perturb in grid:
                flipped = f"{name.rsplit('|', 1)[0]}|{number_text(-perturb.alpha)}"
                if perturb.alpha != 0 and perturb.kind != "dropout" and flipped not in known:
                    cells.append(Cell(flipped, "sign-flip", perturb.replace(alpha=-perturb.alpha), layer))
        return cells

    def _matched(self, layer: int) -> list[Cell]:
        """The same energy at another depth, half the model away."""
        n = self.ready.subject.n_layers
        if "energy" not in self.config.controls or n < 2:
            return []
        other = (layer + n // 2) % n
        return [
            Cell(
                f"energy|L{other}|{cell.condition_id}", "energy-matched",
                energy_matched(cell.perturb, other), other, matched_to=cell.condition_id,
            )
            for cell in self._cells("model", layer) if cell.arm == "perturbed" and cell.perturb is not None
        ]  # fmt: skip

    def conditions(self) -> pd.DataFrame:
        """Return all cells with their controls."""
        cells = []
        for variant in self.variants:
            cells.append(Cell("clean" if variant == "model" else f"{variant}:clean", "clean", variant=variant))
            for layer in self.layers:
                cells += self._cells(variant, layer)
                cells += self._matched(layer) if variant == "model" else []
                cells += self._cells(variant, layer, "free") if self.config.max_new_tokens else []
        return cells_table(cells, self.config)

    def plan(self) -> list[Any]:
        """Return the units: variant × group of prompts × layer, so that a group's trunk is made once."""
        subject, config = self.ready.subject, self.config
        groups = plan_batches(
            [len(r) for r in self.ready.rows], max_new_tokens=config.max_new_tokens, n_layers=subject.n_layers,
            dim=subject.width, vocab=subject.vocab_size or 1, batch_size=config.batch_size, exact=self.exact,
            early=False,
        )  # fmt: skip
        return [
            {"variant": variant, "prompts": group, "layer": layer, "clean": layer == self.layers[0]}
            for variant in self.variants
            for group in groups
            for layer in self.layers
        ]

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Run all cells of a layer on a group of prompts."""
        trunks = self._trunks(unit["variant"], unit["prompts"])
        found = [tables for trunk, prompts in trunks for tables in self._forced(unit, trunk, prompts)]
        if early is not None:
            early(pd.concat([tables["samples"] for tables in found], ignore_index=True))
        if self.config.max_new_tokens:
            free = self._cells(unit["variant"], unit["layer"], "free")
            for trunk, prompts in trunks:
                found += free_tables(trunk, free, prompts, self.config, self.config.tables == "all")
        names = dict.fromkeys(name for tables in found for name in tables)
        tables = {n: pd.concat([t[n] for t in found if n in t], ignore_index=True) for n in names}
        halved = [size for trunk, _ in trunks for size in trunk.halved]
        facts = {"roads": [roads_of(trunk) for trunk, _ in trunks], **({"halved": halved} if halved else {})}
        return Produced(tables, facts=facts)

    def _forced(self, unit: Any, trunk: Trunk, prompts: Sequence[Any]) -> list[dict[str, pd.DataFrame]]:
        """Teacher-forced rows of a unit: clean, all cells, and the cells that repeat their energy."""
        found: list[dict[str, pd.DataFrame]] = []
        if unit["clean"]:
            name = "clean" if unit["variant"] == "model" else f"{unit['variant']}:clean"
            found.append(clean_tables(trunk, name, prompts, self.config.measured_span, self.config.tables == "all"))
        made = self._branches(trunk, self._cells(unit["variant"], unit["layer"]), prompts)
        if unit["variant"] != "model":
            return found + made
        written = pd.concat([tables["samples"] for tables in made], ignore_index=True)
        return found + made + self._branches(trunk, self._matched(unit["layer"]), prompts, written)

    def _branches(
        self, trunk: Trunk, cells: Sequence[Cell], prompts: Sequence[Any], written: pd.DataFrame | None = None
    ) -> list[dict[str, pd.DataFrame]]:
        requests = []
        sizes = {} if written is None else written.set_index(["condition_id", "prompt_id"])["alpha_abs"].to_dict()
        for cell in cells:
            for row, prompt in enumerate(prompts):
                perturb = cell.perturb
                assert perturb is not None
                if cell.matched_to is not None:  # the size that was written elsewhere gives this row's strength
                    size = float(sizes[cell.matched_to, prompt.prompt_id])
                    alpha = math.copysign(trunk.relative(row, perturb, size), perturb.alpha) if size > 0 else 0.0
                    perturb = perturb.replace(alpha=alpha if math.isfinite(alpha) else 0.0)
                requests.append(Request(row, perturb, cell))
        everything, span = self.config.tables == "all", self.config.measured_span
        return [branch_tables(trunk, branch, prompts, span, everything) for branch in trunk.branches(requests)]

    def _trunks(self, variant: str, chosen: Sequence[int]) -> list[tuple[Trunk, list[Any]]]:
        """The trunk of a group of prompts, kept for the units that follow.

        Where only rows of one length may share a forward, texts of a group that ended apart have a trunk each length.
        """
        ready, key = self.ready, (variant, tuple(chosen))
        prompts = [ready.prompts[i] for i in chosen]
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        self._held = None
        rows = [list(ready.rows[i]) for i in chosen]
        subject, calibration = ready.subject, self.calibration
        if variant == "scrambled":
            rows = [scrambled(row, prompt.prompt_id) for row, prompt in zip(rows, prompts, strict=True)]
        if variant == "twin":
            subject, calibration = self._twin
        texts = write_texts(subject, prompts, rows, self.config)
        known = calibration is not None and "limen_ct" in calibration.signals
        together: dict[int, list[int]] = {}
        for at, text in enumerate(texts):
            together.setdefault(len(text.fed) if self.exact else 0, []).append(at)
        trunks = [
            (
                Trunk(
                    subject, [texts[at] for at in group], calibration,
                    partners=[list(ready.rows[(chosen[at] + 1) % len(ready.rows)]) for at in group],
                    which=(*metrics.CORE, *self.config.metrics), span=self.config.measured_span,
                    theta=calibration.quantile("limen_ct", 0.9) if known and calibration is not None else None,
                    side=_side(self.config, ready.perturbs),
                    most_rows=self.config.batch_size if isinstance(self.config.batch_size, int) else None,
                ),
                [prompts[at] for at in group],
            )
            for group in together.values()
        ]  # fmt: skip
        self._held = (key, trunks)
        return trunks

    @cached_property
    def _twin(self) -> tuple[Subject, Calibration | None]:
        twin = twin_of(self.ready.subject)
        return twin, calibration_of(replace(self.ready, subject=twin))

    def rows_of(self, unit: Any) -> Sequence[int]:
        """Return the prompts of a unit."""
        rows: Sequence[int] = unit["prompts"]
        return rows

    def with_rows(self, unit: Any, rows: Sequence[int]) -> Any:
        """Return the unit of some of its prompts."""
        return {**unit, "prompts": list(rows)}

    def first_look(self, samples: pd.DataFrame) -> dict[str, Any]:
        """Summarise the first layer."""
        return {}

    def summarise(self, run: Run, writer: RunWriter) -> dict[str, Any]:
        """Summarise the responses of all cells."""
        return {"protocol": "sweep", "responses": response_table(run).to_dict("records")}


def _side(config: SweepConfig, perturbs: Sequence[Perturb]) -> str:
    """Padding side: left where writes begin near the end, so that rows share what comes before."""
    if config.padding in ("left", "right"):
        return config.padding
    n_prompt, width = np.array([8, 64]), 64
    pos = np.tile(np.arange(width), (2, 1))
    hit = perturbs[0].where.mask(pos, n_prompt, positions="1:") & (pos < n_prompt[:, None])
    first = np.where(hit.any(1), hit.argmax(1), width)
    return "left" if first[1] > first[0] else "right"
