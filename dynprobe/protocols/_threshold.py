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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Perturb, Subject
from dynprobe.protocols._arms import Text
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._call import Call
from dynprobe.protocols._criteria import NULL_SEEDS, Criterion, criterion_named, null_level
from dynprobe.protocols._execute import Begin, Listener, Progress, execute
from dynprobe.protocols._fits import fits_table
from dynprobe.protocols._grid import Cell, cells_table, grid_of
from dynprobe.protocols._halving import in_parts
from dynprobe.protocols._null import numerical_null, paraphrase_null
from dynprobe.protocols._plan import plan_batches
from dynprobe.protocols._prepare import Prepared, prepare
from dynprobe.protocols._prompts import answer_tokens
from dynprobe.protocols._threshold_asked import refuse_impossible, writes_of
from dynprobe.protocols._threshold_config import ThresholdConfig
from dynprobe.protocols._trials import FEW, Trials, positions_of, rows_to_try
from dynprobe.protocols._trunk import Trunk, roads_of
from dynprobe.runs import Run, RunWriter

__all__ = ["ThresholdConfig", "threshold"]


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
    return execute(*open_threshold(model, prompts, settings), listener, Call("threshold", model, settings))


def open_threshold(model: Any, prompts: Any, settings: Mapping[str, Any]) -> tuple[Prepared, Begin]:
    """Everything of a threshold but its units."""
    ready = prepare(model, prompts, settings, kind=ThresholdConfig, resolve=writes_of)
    refuse_impossible(ready)
    return ready, lambda calibration, exact: _Threshold(ready, calibration, exact)


@dataclass(eq=False)
class _Threshold:
    """The experiment: one unit is one write at one layer, under one criterion, on one group of prompts."""

    ready: Prepared
    calibration: Calibration | None
    exact: bool

    def __post_init__(self) -> None:
        self.config: ThresholdConfig = self.ready.config  # type: ignore[assignment]
        self._held: tuple[Any, Trunk] | None = None
        self._floors: dict[tuple[Any, ...], float] = {}
        self._levels: dict[str, dict[str, dict[str, Any]]] = {}

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
        """Return the units; a group's trunk is made once, and a null is made here, for whoever does the units."""
        groups = self._groups()
        return [
            {"criterion": criterion, "prompts": group, "write": name, **level}
            for criterion, levels in ((c, self._null_levels(criterion_named(c), groups)) for c in self.config.criterion)
            for group in groups
            for name, level in levels.items()
        ]

    def _groups(self) -> list[list[int]]:
        subject = self.ready.subject
        lengths = [len(r) for r in self.ready.rows]
        groups = plan_batches(
            lengths, max_new_tokens=0, n_layers=subject.n_layers, dim=subject.width, vocab=subject.vocab_size or 1,
            batch_size=self.config.batch_size, exact=self.exact, early=False,
        )  # fmt: skip
        if self.config.placement == "quest":  # one posterior learns from all prompts
            if self.exact and len(set(lengths)) > 1:
                raise UsageError(
                    f"placement=quest puts all prompts into one batch, and {subject.name} reads padded rows otherwise "
                    "than rows alone; give prompts of one length, or leave --placement quest out"
                )
            groups = [list(range(len(lengths)))]
        return groups

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Search the thresholds of a group of prompts."""
        criterion, config = criterion_named(unit["criterion"]), self.config
        layer, perturbs = self.writes[unit["write"]]
        level = self._level(criterion, unit)
        every = bool(config.alphas) or config.placement == "quest"
        telling, floor = self._floor_of_the_whole(criterion, unit, every=every)
        trunk = self._trunk(criterion, unit["prompts"])
        rows = rows_to_try(trunk, perturbs, unit["write"], each_position=config.each_position)
        if not rows:  # each position, and these texts have none that is written
            return Produced({})
        trials = Trials(trunk, criterion, rows)
        own = trials.sham(every=every, telling=telling)
        floor = own if floor is None else floor
        if config.alphas:
            trials.grid([a for a in sorted(config.alphas) if a > 0])
        elif math.isfinite(level) and config.placement == "quest":
            trials.quest(level, config)
        elif math.isfinite(level):
            trials.search(level, floor, config)
        if not config.alphas and config.placement != "quest":
            trials.note_untried()
        table = pd.DataFrame(trials.table)
        names = [self.ready.prompts[i].prompt_id for i in unit["prompts"]]
        table.insert(0, "prompt_id", [names[text] for text in table.pop("text")])
        table["remark"] = [trials.remarks.get(row) for row in table.pop("row")]
        scale = unit["write"].split("|")[0]
        table = table.assign(
            write=unit["write"], criterion=criterion.name, scale=scale, layer=layer, level=level, floor=floor
        )
        facts: dict[str, Any] = {"halved": list(trunk.halved)} if trunk.halved else {}
        return Produced({"trials": table}, facts={**facts, "roads": roads_of(trunk)})

    def _floor_of_the_whole(
        self, criterion: Criterion, unit: Any, *, every: bool
    ) -> tuple[Collection[int] | None, float | None]:
        """Of a part of a unit: its texts that tell a floor, and the floor of the unit; None twice of a whole unit.

        Memory decides into how many parts a unit is cut, and may not decide which strengths are tried.
        """
        whole: Sequence[int] | None = unit.get("whole")
        if whole is None:
            return None, None
        perturbs, rows, each = self.writes[unit["write"]][1], self.ready.rows, self.config.each_position
        tried = [i for i in whole if not each or any(positions_of(p, len(rows[i])) for p in perturbs)]
        telling = tried[-FEW:]
        key = (criterion.name, unit["write"], tuple(whole))
        if key not in self._floors:
            wanted, size, found = tried if every else telling, len(unit["prompts"]), [0.0]
            for some in (wanted[at : at + size] for at in range(0, len(wanted), size)):
                trunk = self._trunk(criterion, some)
                trials = Trials(trunk, criterion, rows_to_try(trunk, perturbs, unit["write"], each_position=each))
                found.append(trials.sham(every=every, telling=_among(some, telling), note=False))
            self._floors[key] = max(found)
        return _among(unit["prompts"], telling), self._floors[key]

    def _level(self, criterion: Criterion, unit: Any) -> float:
        """The level a response must reach; for ``kappa`` the 99 % quantile of its null."""
        if self.config.level is not None:
            return self.config.level
        if criterion.level is not None:
            return criterion.level
        if "level" not in unit:  # planned by an older version
            if criterion.name not in self._levels:
                self._levels[criterion.name] = self._null_levels(criterion, self._groups())
            unit = self._levels[criterion.name][unit["write"]]
        return math.nan if unit["level"] is None else float(unit["level"])

    def _null_levels(self, criterion: Criterion, groups: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
        """What a unit of each write is told of its level: nothing where it is known, else what the null says."""
        if self.config.level is not None or criterion.level is not None:
            return {name: {} for name in self.writes}
        if self.config.null == "paraphrase":
            same = _told(self._null(criterion, groups, None))
            return dict.fromkeys(self.writes, same)
        return {name: _told(self._null(criterion, groups, perturbs[0])) for name, (_, perturbs) in self.writes.items()}

    def _null(self, criterion: Criterion, groups: Sequence[Sequence[int]], perturb: Perturb | None) -> float:
        """The quantile of the null, over the groups in as many parts as fit into memory."""

        def part(some: Sequence[int]) -> list[float]:
            trunk = self._trunk(criterion, some)
            if perturb is not None:
                return numerical_null([trunk], criterion, perturb)
            return paraphrase_null(
                self.ready.subject, self.ready.prompts, [(some, trunk)],
                lambda texts: self._new_trunk(texts, criterion), self.config.chat_template,
            )  # fmt: skip

        values = [value for group in groups for made in in_parts(self.ready, group, part) for value in made]
        self._held = None  # nothing is kept on the device between the plan and the units
        return null_level(values)

    def _trunk(self, criterion: Criterion, chosen: Sequence[int]) -> Trunk:
        ready, key = self.ready, (criterion.which, criterion.name == "task", tuple(chosen))
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        self._held = None
        texts = [
            Text(ready.prompts[i].prompt_id, tuple(ready.rows[i]), self._answer(i) if criterion.name == "task" else ())
            for i in chosen
        ]
        partners = [list(ready.rows[(i + 1) % len(ready.rows)]) for i in chosen]
        self._held = (key, self._new_trunk(texts, criterion, partners))
        return self._held[1]

    def _answer(self, index: int) -> tuple[int, ...]:
        ready = self.ready
        return answer_tokens(ready.subject, ready.prompts[index], ready.rows[index], self.config.chat_template)

    def _new_trunk(self, texts: Sequence[Text], criterion: Criterion, partners: Sequence[Sequence[int]] = ()) -> Trunk:
        return Trunk(
            self.ready.subject, texts, self.calibration, partners=partners, which=criterion.which,
            most_rows=self.config.batch_size if isinstance(self.config.batch_size, int) else None,
        )  # fmt: skip

    def rows_of(self, unit: Any) -> Sequence[int]:
        """Return the prompts of a unit; none under ``quest``, whose one posterior learns from all of them."""
        return () if self.config.placement == "quest" else unit["prompts"]

    def with_rows(self, unit: Any, rows: Sequence[int]) -> Any:
        """Return the unit of some of its prompts, which knows what it is a part of."""
        return {**unit, "prompts": list(rows), "whole": unit["prompts"]}

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
            "sham_rows": int((trials["alpha"] == 0).sum()), "null_values": self._null_values(),
        }  # fmt: skip

    def _null_values(self) -> int | None:
        """How many values the quantile of a null is read from; None where no criterion has one."""
        if self.config.level is not None or all(criterion_named(c).level is not None for c in self.config.criterion):
            return None
        return len(self.ready.rows) * (2 if self.config.null == "paraphrase" else NULL_SEEDS)


def _among(prompts: Sequence[int], telling: Sequence[int]) -> set[int]:
    """Places of some prompts among others."""
    return {place for place, index in enumerate(prompts) if index in telling}


def _told(level: float) -> dict[str, Any]:
    """A level as a unit holds it; a null without a value has none."""
    return {"level": level if math.isfinite(level) else None}
