"""The trials of one unit: rows of a trunk under strengths that a search, a posterior or a grid asks for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynprobe.metrics.statistics import BracketSearch, PosteriorSearch
from dynprobe.probes import Perturb
from dynprobe.protocols._criteria import NULL_ALPHA, Criterion
from dynprobe.protocols._threshold_config import ThresholdConfig
from dynprobe.protocols._trunk import Branch, Request, Trunk

__all__ = ["FEW", "Subjected", "Trials", "positions_of", "rows_to_try"]

#: Texts that tell the noise floor: their response to no write and to one of numerical size.
FEW = 4
#: Trials of one round of placement=quest, and how far apart the seeds of its rounds over the prompts lie.
_QUEST_ROUND, _QUEST_SEEDS = 12, 1_000


@dataclass(frozen=True)
class Subjected:
    """One text under one write whose strength is open.

    Attributes:
        text: Number of the text on the trunk.
        perturb: The write.
        condition_id: Name of the write and its seed.
        pos: The one position that is written, −1 where a threshold covers all of them.
    """

    text: int
    perturb: Perturb
    condition_id: str
    pos: int = -1


def positions_of(perturb: Perturb, n: int) -> list[int]:
    """Positions of a prompt of ``n`` tokens that a perturbation writes."""
    return np.flatnonzero(perturb.where.mask(np.arange(n)[None], np.array([n]), positions="1:")[0]).tolist()


def rows_to_try(trunk: Trunk, perturbs: Sequence[Perturb], name: str, *, each_position: bool) -> list[Subjected]:
    """Return the rows of a unit: text and write, one per position where each has a threshold of its own."""
    rows: list[Subjected] = []
    for text, words in enumerate(trunk.texts):
        for perturb in perturbs:
            condition = f"{name}|s{perturb.seed}"
            if not each_position:
                rows.append(Subjected(text, perturb, condition))
                continue
            for pos in positions_of(perturb, len(words.prompt)):
                one = perturb.replace(where=perturb.where.replace(positions=str(pos)))
                rows.append(Subjected(text, one, condition, pos))
    return rows


@dataclass(eq=False)
class Trials:
    """Evaluates rows of one unit and keeps every trial.

    Attributes:
        trunk: The texts.
        criterion: What their response is.
        rows: What can be tried; grows where fresh seeds are asked for.
        table: One entry per trial.
        remarks: What a search says of a row whose threshold it could not make sure of.
    """

    trunk: Trunk
    criterion: Criterion
    rows: list[Subjected]
    table: list[dict[str, Any]] = field(default_factory=list)
    remarks: dict[int, str] = field(default_factory=dict)

    def evaluate(self, rows: Sequence[int], alphas: Sequence[float], number: int, *, note: bool = True) -> np.ndarray:
        """Return the responses of rows under strengths, ``[rows]``, and note them as one round."""
        requests = [
            Request(self.rows[row].text, self.rows[row].perturb.replace(alpha=float(a)), (place, row, float(a)))
            for place, (row, a) in enumerate(zip(rows, alphas, strict=True))
        ]
        found = np.full(len(requests), np.nan)
        for branch in self.trunk.branches(requests):
            responses = self.criterion.response(branch, self.trunk)
            for i, request in enumerate(branch.requests):
                found[request.label[0]] = responses[i]
                if note:
                    self.table.append(self._noted(branch, i, float(responses[i]), number))
        return found

    def _noted(self, branch: Branch, i: int, response: float, number: int) -> dict[str, Any]:
        _, row, alpha = branch.requests[i].label
        tried = self.rows[row]
        sizes = {name: float(values[i]) for name, values in branch.passport.items() if name.startswith("alpha_")}
        return {
            "row": row, "text": tried.text, "condition_id": tried.condition_id, "kind": tried.perturb.kind,
            "pos": tried.pos, "seed": tried.perturb.seed, "alpha": alpha, "response": response, "trial_round": number,
            "kl_clean_pert": float(branch.mean("kl_clean_pert")[i]), "flip_rate": float(branch.mean("flip")[i]),
            **sizes,
        }  # fmt: skip

    def sham(self, *, every: bool = True, telling: Collection[int] | None = None, note: bool = True) -> float:
        """Noise floor: the largest response where nothing is written, or next to nothing.

        A sham row often repeats the clean arithmetic bit for bit. So a few rows are written by a millionth of their
        unit too, whose response is rounding. (That is the null of ``kappa``, and its level; one near-tied token that
        flips would drown a share of flips; and right or wrong has no floor.)

        Args:
            every: One sham row per text, which a base rate is read from; else of a few texts only.
            telling: Numbers of those few on the trunk; None takes the last, which are the longest.
            note: Whether the sham rows stand in the table.
        """
        first = list({row.text: i for i, row in reversed(list(enumerate(self.rows)))}.values())
        few = first[:FEW] if telling is None else [i for i in first if self.rows[i].text in telling]
        shams = first if every else few
        responses = np.abs(self.evaluate(shams, [0.0] * len(shams), -1, note=note))
        if self.criterion.name == "kl":
            tiny = np.abs(self.evaluate(few, [NULL_ALPHA] * len(few), -1, note=False))
            responses = np.concatenate([responses, tiny])
        return 0.0 if self.criterion.name == "task" else float(np.nanmax(responses, initial=0.0))

    def note_untried(self) -> None:
        """Try every row that no round has tried with no write, so that it stands in the table as one without answer."""
        tried = {trial["row"] for trial in self.table}
        rest = [row for row in range(len(self.rows)) if row not in tried]
        if rest:
            self.evaluate(rest, [0.0] * len(rest), -1)

    def grid(self, alphas: Sequence[float]) -> None:
        """Try every row under every strength."""
        rows = np.repeat(np.arange(len(self.rows)), len(alphas))
        self.evaluate(rows.tolist(), np.tile(alphas, len(self.rows)).tolist(), 0)

    def search(self, level: float, floor: float, config: ThresholdConfig) -> None:
        """Bracket each row's first crossing, all rows together."""
        low, high = config.strengths(self.criterion, self.rows[0].perturb.kind)
        first = self.criterion.first_round
        search = BracketSearch(
            len(self.rows), low, high, level, tolerance=config.tolerance, floor=floor, per_round=(first, 2, 2, 1),
            max_evaluations=config.max_evaluations + first - 3,
        )  # fmt: skip
        number = 0
        while not search.done:
            rows, alphas = search.propose()
            search.observe(rows, alphas, self.evaluate(rows.tolist(), alphas.tolist(), number))
            number += 1
        self.remarks = {row: c.reason for row, c in enumerate(search.result()) if c.status == "resolved" and c.reason}

    def quest(self, level: float, config: ThresholdConfig) -> None:
        """Ask where the answer tells most; prompts in an order drawn once, each time around under a new seed."""
        low, high = config.strengths(self.criterion, self.rows[0].perturb.kind)
        search = PosteriorSearch(low, high, per_round=_QUEST_ROUND, stop_sd=config.tolerance, max_trials=config.trials)
        bare = list(self.rows)
        order = np.random.default_rng(config.seed).permutation(len(bare))
        number = 0
        while not search.done:
            alphas = search.propose()
            begin = len(self.rows)
            for asked in range(begin - len(bare), begin - len(bare) + len(alphas)):
                base = bare[order[asked % len(bare)]]
                seed = base.perturb.seed + _QUEST_SEEDS * (asked // len(bare))
                self.rows.append(Subjected(base.text, base.perturb.replace(seed=seed), base.condition_id, base.pos))
            responses = self.evaluate(range(begin, len(self.rows)), alphas.tolist(), number)
            known = np.isfinite(responses)
            if not known.any():  # no answer can come from this model
                return
            search.observe(alphas[known], (responses[known] >= level).astype(int))
            number += 1
