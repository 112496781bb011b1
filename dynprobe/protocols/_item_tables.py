"""The tables of one batch of items: samples, items and actions of every arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from dynprobe.protocols._dissociate_config import DissociateConfig
from dynprobe.protocols._item_arms import ItemArms
from dynprobe.protocols._item_rows import Question, action_lines, item_values, kl_to, laid_out
from dynprobe.protocols._recover_arms import ArmResult
from dynprobe.protocols._tables import sample_id

__all__ = ["ONCE", "ItemTables"]

#: The arm whose difference from the clean stream is arithmetic.
ONCE = "clean.oneforward"


class ItemTables:
    """Gathers what the arms of one batch gave.

    Args:
        config: The settings.
        questions: The batch.
        theta: Level of the debts.
    """

    def __init__(self, config: DissociateConfig, questions: Sequence[Question], theta: float | None) -> None:
        self.config, self.theta = config, theta
        self.batch = laid_out(questions, config.prefill)
        self._made: dict[str, list[pd.DataFrame]] = {}

    def keep(self, result: ArmResult, clean: Tensor | None) -> Tensor:
        """Tabulate one arm; returns the logits of the answers."""
        passage, _ = result.passages[0]
        name, config = result.arm.name, self.config
        values, scores, logits = item_values(self.batch, [passage], config.measured_metrics, self.theta)
        lines, actions = action_lines(self.batch, result.actions, config.m, acted=result.arm.mode is not None)
        samples = pd.concat([self._labels(name), values, lines], axis=1)
        if clean is not None:
            samples["kl_clean_pert"] = kl_to(clean, logits)
        if result.arm.perturbed:
            passport = passage.tape.passport
            for column in ("alpha_relnorm", "alpha_coordstd"):
                if column in passport:
                    samples[column] = passport[column][list(self.batch.first)]
        ids = samples["sample_id"].to_numpy(object)
        actions = actions.assign(sample_id=ids[actions.pop("question").to_numpy(int)]).drop(columns="row")
        self._add("samples", samples)
        self._add("actions", actions)
        self._add("items", self._items(name, values, scores, ids))
        return logits

    def plain(self, runner: ItemArms, clean: Tensor, *, alone: bool) -> None:
        """The clean rows in one forward, whose difference from the stream is the arithmetic's."""
        passages = runner.plain(self.batch.texts, alone=alone)
        values, _, logits = item_values(self.batch, passages, self.config.measured_metrics, self.theta)
        self._add("samples", pd.concat([self._labels(ONCE), values.assign(kl_clean_pert=kl_to(clean, logits))], axis=1))

    def _labels(self, condition: str) -> pd.DataFrame:
        asked = [q.item for q in self.batch.questions]
        return pd.DataFrame({
            "sample_id": [sample_id(i.item_id, condition, 0) for i in asked], "prompt_id": [i.item_id for i in asked],
            "condition_id": condition, "replicate": 0, "category": [i.category for i in asked],
        })  # fmt: skip

    def _items(self, condition: str, values: pd.DataFrame, scores: Sequence[Sequence[float]], ids: Any) -> pd.DataFrame:
        asked = [q.item for q in self.batch.questions]
        right = values["right"].map({1.0: True, 0.0: False}).astype("boolean")
        return pd.DataFrame({
            "task": Path(self.config.items).stem, "doc_id": [i.item_id for i in asked], "condition_id": condition,
            "prompt_id": [i.item_id for i in asked], "sample_id": ids, "category": [i.category for i in asked],
            "correct": right, "chosen": values["chosen"], "target": [i.choices[i.answer] for i in asked],
            "n_choices": [len(i.choices) for i in asked], "choice_margin": values["choice_margin"],
            "responses": [[x if math.isfinite(x) else str(x) for x in s] for s in scores],
        })  # fmt: skip

    def _add(self, name: str, table: pd.DataFrame) -> None:
        self._made.setdefault(name, []).append(table)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables."""
        return {name: pd.concat(parts, ignore_index=True) for name, parts in self._made.items()}
