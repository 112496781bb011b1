"""``threshold``: the strength at which a model is destabilised, with an interval.

A threshold without unit, criterion and population is no number. So it is asked for under a named noise scale (two, if
none is named) and a named criterion, found for each prompt by itself as the first crossing from below, and reported as
the median over prompts with an interval over prompts. Prompts that never cross, or have crossed before the range
begins, stay in the population as such.

The search places a few strengths per prompt and round inside each prompt's own bracket; all prompts and rounds share
the clean forward and start above the blocks the write leaves alone. Every trial is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator
from torch import nn

from dynprobe.errors import UsageError
from dynprobe.metrics.statistics import BracketSearch
from dynprobe.probes import Calibration, Perturb, Subject, tokenize
from dynprobe.protocols._arms import Text
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._criteria import NULL_ALPHA, NULL_SEEDS, Criterion, criterion_named, null_level
from dynprobe.protocols._execute import Listener, Progress, execute
from dynprobe.protocols._fits import fits_table
from dynprobe.protocols._grid import Cell, GridConfig, cells_table, grid_of
from dynprobe.protocols._plan import plan_batches
from dynprobe.protocols._prepare import Prepared, prepare
from dynprobe.protocols._trunk import Branch, Request, Trunk
from dynprobe.runs import Run, RunWriter

__all__ = ["ThresholdConfig", "threshold"]

#: Scales under which a threshold is given when none is named: relative size alone misleads between models.
_BOTH = ("relnorm", "coordstd")
#: Texts whose sham row is run twice, so that the batch has another shape than the clean one and shows its noise.
_SHAM_TWICE = 4
#: First seed of the null, far from those a user would name.
_NULL_SEED = 10_000_019


class ThresholdConfig(GridConfig):
    """Settings of a threshold search."""

    scale: tuple[str, ...] = Field(_BOTH, description="Noise scales.")
    criterion: tuple[str, ...] = Field(("kl",), description="kl, flip, kappa or task.")
    level: float | None = Field(None, description="Level of the response, in place of the criterion's own.")
    alpha_min: float | None = Field(None, gt=0, description="Lowest strength of the search.")
    alpha_max: float | None = Field(None, gt=0, description="Highest strength of the search.")
    each_position: bool = Field(False, description="One threshold per layer and position: a fragility map.")
    tolerance: float = Field(0.05, gt=0, description="Wanted relative precision of each prompt's threshold.")
    max_evaluations: int = Field(7, ge=3, description="Perturbed rows per prompt, at most; one sham row is added.")
    estimand: Literal["prompt", "mean"] = Field(
        "prompt", description="prompt: median over prompts; mean: crossing of the mean response (needs --alphas)."
    )
    n_boot: int = Field(2000, ge=200, description="Bootstrap resamples.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Coverage of the interval.")

    @field_validator("criterion", mode="before")
    @classmethod
    def _criteria(cls, value: Any) -> tuple[str, ...]:
        names = tuple(value.replace("+", ",").split(",")) if isinstance(value, str) else tuple(value)
        return tuple(criterion_named(name.strip()).name for name in names)

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this search."""
        return {**super().identity(), "protocol": "threshold", "alphas": sorted(self.alphas)}

    def strengths(self, criterion: Criterion) -> tuple[float, float]:
        """Range of the search."""
        low, high = criterion.range
        return self.alpha_min or low, self.alpha_max or high


def threshold(
    model: str | nn.Module | Subject,
    prompts: Sequence[Any] | Path | None = None,
    *,
    criterion: str | Sequence[str] = "kl",
    scale: str | Sequence[str] | None = None,
    layers: str | int | Sequence[int] = "50%",
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Find the strength at which a perturbation destabilises a model.

    Args:
        model: Hub id, folder, GGUF file, known name, module, or subject.
        prompts: Texts, token ids or prompts, or a path to a file of them; default the 24 built-in ones.
        criterion: ``kl`` (mean KL ≥ 1 nat), ``flip`` (half of the top-1 tokens change), ``kappa`` (Δκ above its
            null), ``task`` (accuracy loss; prompts need an ``answer``).
        scale: Noise scales; None takes ``relnorm`` and ``coordstd``.
        layers: Layers, each with a threshold of its own.
        listener: Called with :class:`dynprobe.protocols.Progress`.
        **settings: Any field of :class:`ThresholdConfig`; with ``alphas`` a fixed grid is run in place of the search.

    Returns:
        The run: ``run.table("fits")`` has one row per threshold, ``run.table("trials")`` every row that was run.

    Raises:
        UsageError: If a setting is wrong.

    Example:
        >>> import tempfile
        >>> from dynprobe.testing import tiny_llama
        >>> with tempfile.TemporaryDirectory() as out:
        ...     done = threshold(tiny_llama(), [[5, 6, 7, 8], [9, 10, 11, 4, 2]], scale="relnorm", level=0.01, out=out)
        ...     fit = done.table("fits").iloc[0]
        ...     str(fit["status"]), bool(0.01 < fit["alpha50"] < 1)
        ('resolved', True)
    """
    if listener is not None:
        listener(Progress("load"))
    settings = {"criterion": criterion, "layers": layers, **({"scale": scale} if scale else {}), **settings}
    ready = prepare(model, prompts, settings, kind=ThresholdConfig, resolve=_writes)
    _refuse(ready)
    return execute(ready, lambda calibration, exact: _Threshold(ready, calibration, exact), listener)


def _writes(subject: Subject, config: ThresholdConfig, given: Sequence[Perturb | str]) -> list[Perturb]:
    if given:
        raise UsageError("a threshold takes --layers, --scale, --kind, --seeds and --positions, not --perturb")
    if config.scale == _BOTH and subject.tokenizer is None:
        raise UsageError(
            f"thresholds are given under relnorm and coordstd, and coordstd needs a calibration; {subject.name} has no "
            "tokenizer to read the calibration prompts with. Name one scale: --scale relnorm"
        )
    found = [perturb for _, _, perturb in grid_of(subject, config, alphas=[1e-3])]
    for perturb in found:
        if perturb.kind in ("sine", "impulse"):
            raise UsageError(f"kind={perturb.kind} is a probe signal; dynprobe run reads its response")
    return found


def _refuse(ready: Prepared) -> None:
    config: ThresholdConfig = ready.config  # type: ignore[assignment]
    if config.num_samples != 1 or config.states or config.lens or config.max_new_tokens:
        raise UsageError(
            "a threshold takes no --num-samples, --states, --lens or --max-new-tokens: it is teacher-forced"
        )
    if config.estimand == "mean" and not config.alphas:
        raise UsageError("the mean response needs the same strengths for all prompts; add --alphas 0.01:10:32")
    if config.level is not None and len(config.criterion) > 1:
        raise UsageError("--level belongs to one criterion; name one")
    for name in config.criterion:
        low, high = config.strengths(criterion_named(name))
        if not low < high:
            raise UsageError(f"alpha_min={low:g} is not below alpha_max={high:g}")
    if "task" in config.criterion:
        lacking = [p.prompt_id for p in ready.prompts if p.answer is None]
        if lacking:
            raise UsageError(
                f"criterion task needs an answer for every prompt, and {len(lacking)} have none (first: "
                f"{lacking[0]!r}); "
                'give --prompts items.jsonl with {"text": …, "answer": …} on each line'
            )
        if not config.alphas:
            raise UsageError("criterion task reads accuracy over prompts at fixed strengths; add --alphas 0.01:10:16")


@dataclass(eq=False)
class _Threshold:
    """The experiment: one unit is one write at one layer, under one criterion, on one group of prompts."""

    ready: Prepared
    calibration: Calibration | None
    exact: bool

    def __post_init__(self) -> None:
        self.config: ThresholdConfig = self.ready.config  # type: ignore[assignment]
        self._held: tuple[Any, Trunk] | None = None
        self._levels: dict[tuple[str, str], float] = {}

    @cached_property
    def writes(self) -> dict[str, tuple[int, list[Perturb]]]:
        """Name of each write at a layer → its layer and one perturbation per seed."""
        found: dict[str, tuple[int, list[Perturb]]] = {}
        for name, layer, perturb in grid_of(self.ready.subject, self.config, alphas=[1e-3]):
            scale_kind, place, *_ = name.rsplit("|", 3)
            found.setdefault(f"{scale_kind}|{place}", (layer, []))[1].append(perturb)
        return found

    def conditions(self) -> pd.DataFrame:
        """Return the writes that are searched; their strengths stand in the trials."""
        cells = [Cell("clean", "clean")]
        for name, (layer, perturbs) in self.writes.items():
            cells += [Cell(f"{name}|s{p.seed}", "perturbed", p, layer) for p in perturbs]
        table = cells_table(cells, self.config)
        table.loc[table["arm"] == "perturbed", "alpha"] = math.nan
        return table

    def plan(self) -> list[Any]:
        """Return the units; a group's trunk is made once."""
        subject = self.ready.subject
        groups = plan_batches(
            [len(r) for r in self.ready.rows], max_new_tokens=0, n_layers=subject.n_layers, dim=subject.dim or 1,
            vocab=subject.vocab_size or 1, batch_size=self.config.batch_size, exact=self.exact,
        )  # fmt: skip
        return [
            {"criterion": criterion, "prompts": group, "write": name}
            for criterion in self.config.criterion
            for group in groups
            for name in self.writes
        ]

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Search the thresholds of a group of prompts."""
        criterion = criterion_named(unit["criterion"])
        layer, perturbs = self.writes[unit["write"]]
        trunk = self._trunk(criterion, unit["prompts"])
        level = self._level(criterion, unit["write"])
        pairs = self._pairs(trunk, perturbs)
        table: list[dict[str, Any]] = []

        def evaluate(rows: Sequence[int], number: int, alphas: Sequence[float] | None = None) -> np.ndarray:
            alphas = [0.0] * len(rows) if alphas is None else alphas
            requests = [
                Request(pairs[row][0], pairs[row][1].replace(alpha=float(a)), (row, float(a)))
                for row, a in zip(rows, alphas, strict=True)
            ]
            found: dict[Any, float] = {}
            for branch in trunk.branches(requests):
                responses = criterion.response(branch, trunk)
                for i, request in enumerate(branch.requests):
                    found[request.label] = float(responses[i])
                    table.append(self._trial(unit, layer, branch, i, float(responses[i]), number))
            return np.array([found[row, float(a)] for row, a in zip(rows, alphas, strict=True)])

        # What the response reads where nothing is written: the arithmetic of another batch shape.
        shams = list({text: i for i, (text, _) in reversed(list(enumerate(pairs)))}.values())
        floor = float(np.nanmax(np.abs(evaluate([*shams, *shams[:_SHAM_TWICE]], -1)), initial=0.0))
        if criterion.name == "task":
            floor = 0.0
        if self.config.alphas:
            grid = [a for a in sorted(self.config.alphas) if a > 0]
            rows = np.repeat(np.arange(len(pairs)), len(grid))
            evaluate(rows.tolist(), 0, np.tile(grid, len(pairs)).tolist())
        elif math.isfinite(level):
            self._search(criterion, level, floor, len(pairs), evaluate)
        trials = pd.DataFrame(table)
        trials["level"], trials["floor"] = level, floor
        facts: dict[str, Any] = {"halved": list(trunk.halved)} if trunk.halved else {}
        return Produced({"trials": trials}, facts=facts)

    def _pairs(self, trunk: Trunk, perturbs: Sequence[Perturb]) -> list[tuple[int, Perturb]]:
        """The rows to search: text and write, one write per position where each has a threshold of its own."""
        pairs = []
        for text, row in enumerate(trunk.texts):
            for perturb in perturbs:
                if not self.config.each_position:
                    pairs.append((text, perturb))
                    continue
                n = len(row.prompt)
                allowed = perturb.where.mask(np.arange(n)[None], np.array([n]), positions="1:")[0]
                pairs += [
                    (text, perturb.replace(where=perturb.where.replace(positions=str(pos))))
                    for pos in np.flatnonzero(allowed)
                ]
        return pairs

    def _search(
        self, criterion: Criterion, level: float, floor: float, n_rows: int, evaluate: Callable[..., np.ndarray]
    ) -> None:
        low, high = self.config.strengths(criterion)
        search = BracketSearch(
            n_rows, low, high, level, tolerance=self.config.tolerance, max_evaluations=self.config.max_evaluations,
            floor=floor,
        )  # fmt: skip
        number = 0
        while not search.done:
            rows, alphas = search.propose()
            search.observe(rows, alphas, evaluate(rows.tolist(), number, alphas.tolist()))
            number += 1

    def _trial(self, unit: Any, layer: int, branch: Branch, row: int, response: float, number: int) -> dict[str, Any]:
        perturb = branch.requests[row].perturb
        passport = {name: float(values[row]) for name, values in branch.passport.items() if name.startswith("alpha_")}
        return {
            "prompt_id": self.ready.prompts[unit["prompts"][branch.source[row]]].prompt_id,
            "condition_id": f"{unit['write']}|s{perturb.seed}", "write": unit["write"],
            "criterion": unit["criterion"], "scale": unit["write"].split("|")[0], "kind": perturb.kind,
            "layer": layer, "pos": self._position(perturb), "seed": perturb.seed, "alpha": perturb.alpha,
            "response": response, "trial_round": number, "kl_clean_pert": float(branch.mean("kl_clean_pert")[row]),
            "flip_rate": float(branch.mean("flip")[row]), **passport,
        }  # fmt: skip

    def _position(self, perturb: Perturb) -> int:
        """The one position that is written, −1 where a threshold covers all of them."""
        return int(str(perturb.where.positions[0])) if self.config.each_position and perturb.where.positions else -1

    def _level(self, criterion: Criterion, write: str) -> float:
        """The level a response must reach; for ``kappa`` the 99 % quantile under writes of numerical size."""
        if self.config.level is not None:
            return self.config.level
        if criterion.level is not None:
            return criterion.level
        key = (criterion.name, write)
        if key not in self._levels:
            _, perturbs = self.writes[write]
            values: list[float] = []
            groups = {tuple(unit["prompts"]): None for unit in self.plan()}
            for group in groups:
                trunk = self._trunk(criterion, group)
                tiny = Perturb(NULL_ALPHA, scale="relnorm", where=perturbs[0].where)
                requests = [
                    Request(text, tiny.replace(seed=_NULL_SEED + s))
                    for text in range(len(group)) for s in range(NULL_SEEDS)
                ]  # fmt: skip
                for branch in trunk.branches(requests):
                    values += criterion.response(branch, trunk).tolist()
            self._levels[key] = null_level(values)
        return self._levels[key]

    def _trunk(self, criterion: Criterion, chosen: Sequence[int]) -> Trunk:
        ready, key = self.ready, (criterion.which, criterion.name == "task", tuple(chosen))
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        self._held = None
        texts = [Text(ready.prompts[i].prompt_id, tuple(ready.rows[i]), self._answer(criterion, i)) for i in chosen]
        trunk = Trunk(
            ready.subject, texts, self.calibration,
            partners=[list(ready.rows[(i + 1) % len(ready.rows)]) for i in chosen], which=criterion.which,
            most_rows=self.config.batch_size if isinstance(self.config.batch_size, int) else None,
        )  # fmt: skip
        self._held = (key, trunk)
        return trunk

    def _answer(self, criterion: Criterion, index: int) -> tuple[int, ...]:
        """Tokens of an item's answer, as they follow its prompt."""
        if criterion.name != "task":
            return ()
        prompt, subject = self.ready.prompts[index], self.ready.subject
        assert prompt.answer is not None
        whole = tokenize(subject, [prompt.text + prompt.answer])[0]
        row = list(self.ready.rows[index])
        if whole[: len(row)] != row or len(whole) == len(row):
            raise UsageError(
                f"the answer of prompt {prompt.prompt_id!r} does not begin at a token boundary; move the space between "
                'prompt and answer into the answer (" Paris")'
            )
        return tuple(whole[len(row) :])

    def first_look(self, samples: pd.DataFrame) -> dict[str, Any]:
        """There is no first table: a search has no means until it is done."""
        return {}

    def summarise(self, run: Run, writer: RunWriter) -> dict[str, Any]:
        """Fit all thresholds."""
        trials = run.table("trials")
        fits = fits_table(trials, self.config)
        writer.write_table("fits", fits)
        searched = trials[trials["alpha"] > 0]
        per_prompt = searched.groupby(["prompt_id", "pos", "write", "criterion", "seed"], observed=True).size()
        return {
            "protocol": "threshold", "fits": fits.to_dict("records"),
            "rows_per_prompt": float(per_prompt.mean()) if len(per_prompt) else math.nan,
            "sham_rows": int((trials["alpha"] == 0).sum()),
        }  # fmt: skip
