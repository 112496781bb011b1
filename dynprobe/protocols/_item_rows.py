"""Items with choices as rows of a batch, and what is read from them.

All choices of an item follow the same question, so a row is fed for each continuation that differs before its last
token, and not for each choice: choices of one token are all read off the question's own row, and a shorter choice off
the row of a longer one that begins with it. Since nothing that comes later changes what was there, that is exact. Rows
of an item share their name, so the noise on a question is the same under all its choices.

Dynamics are read on the question alone: tokens after the prefill and before the first token of any choice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dynprobe import metrics
from dynprobe.errors import UsageError
from dynprobe.metrics.statistics import onsets, sustained_max
from dynprobe.probes import Subject
from dynprobe.probes._measured import measure_track
from dynprobe.prompts import Item, Prompt
from dynprobe.protocols._arms import Passage, Text
from dynprobe.protocols._evaluate_rows import item_facts as evaluated
from dynprobe.protocols._prompts import answer_tokens
from dynprobe.protocols._tables import row_status

__all__ = [
    "ItemBatch",
    "Question",
    "action_lines",
    "content_of",
    "item_facts",
    "item_values",
    "kl_to",
    "laid_out",
    "questions_of",
]

#: Columns of the samples: name → (unit, description).
_SAMPLES: dict[str, tuple[str, str]] = {
    "n_prompt": ("tokens", "Tokens of the question."),
    "chosen": ("", "Choice with the highest summed log-probability, 0-based; −1 where a score is not finite."),
    "right": ("share", "1 where the right choice was chosen, else 0; missing where a score is not finite."),
    "nll_right": ("nats", "Negative log-probability of the right choice, summed over its tokens."),
    "choice_margin": ("nats", "Summed log-probability of the right choice minus that of the best wrong one."),
    "kl_clean_pert": ("nats", "KL(clean ‖ arm) of the first token after the question."),
    "duty": ("share", "Share of the streamed tokens of the question at which a controller acted."),
    "n_active": ("tokens", "Tokens of the question at which a controller acted."),
    "energy_written": ("‖u‖²/‖h‖²", "Energy of the controller's writes, summed over the question."),
    "n_watched": ("tokens", "Tokens of the question after the prefill."),
    "signal_score": ("", "Largest level that the detector's signal exceeded for m tokens in a row."),
    "signal_mean": ("", "Mean of the detector's signal."),
    "n_fires": ("", "Times that the detector came on."),
    "detector_duty": ("share", "Share of the streamed tokens at which the detector was on, whether or not it acts."),
}
#: Columns of the fits: name → (unit, dtype or "", description).
_FITS: dict[str, tuple[str, str, str]] = {
    "metric": ("", "label", "What the row is about: a reading of the task, or a metric of the dynamics."),
    "value": ("", "float64", "Mean over items at one strength; of right, the share of right answers."),
    "low": ("", "float64", "Lower end of the 95 % interval; −inf where it is open."),
    "high": ("", "float64", "Upper end of the 95 % interval; +inf where it is open."),
    "n": ("items", "", "Items that took part."),
    "status": ("", "label", "Of the crossing: resolved, left-censored, right-censored, not-resolved or missing."),
    "dynamic": ("", "label", "Metric of RF_dyn."),
    "verdict": ("", "label", "COUPLED, DISSOCIATED, INDETERMINATE or DETECTOR_BLIND."),
    "primary": ("", "", "Whether the study is about this reading of the task."),
    "rf_dyn": ("1", "float64", "Recovery fraction of the dynamic metric."),
    "rf_dyn_low": ("1", "float64", "Lower end of its 95 % interval, joint bootstrap over items."),
    "rf_dyn_high": ("1", "float64", "Upper end of it."),
    "rf_sem": ("1", "float64", "Recovery fraction of the reading of the task."),
    "rf_sem_low": ("1", "float64", "Lower end of its 95 % interval, joint bootstrap over items."),
    "rf_sem_high": ("1", "float64", "Upper end of it."),
    "tost_low": ("1", "float64", "Lower end of the 90 % interval of rf_sem: two one-sided tests at 5 %."),
    "tost_high": ("1", "float64", "Upper end of it."),
}


@dataclass(frozen=True)
class Question:
    """An item in tokens.

    Attributes:
        item: The item.
        question: Token ids of the question.
        choices: Token ids of each choice, as they follow the question.
    """

    item: Item
    question: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    def fed(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """Return the token rows that must be fed, and which of them each choice is read from.

        Example:
            >>> item = Item("a", "q", (" x", " y z", " y w"), 0)
            >>> Question(item, (1, 2), ((3,), (4, 5), (4, 6))).fed()
            ([(1, 2, 4)], [0, 0, 0])
        """
        feeds = [(*self.question, *choice[:-1]) for choice in self.choices]
        unique = list(dict.fromkeys(feeds))
        kept = [a for a in unique if not any(b != a and b[: len(a)] == a for b in unique)]
        return kept, [next(i for i, row in enumerate(kept) if row[: len(feed)] == feed) for feed in feeds]


@dataclass(frozen=True)
class ItemBatch:
    """Questions with the rows they are read from.

    Attributes:
        questions: The questions.
        texts: Rows: a prefill, and the tokens that are fed one by one.
        first: Number of each question's first row, on which its dynamics are read.
        rows: For each question the row of each choice.
        prefill: Tokens of the prefill.
    """

    questions: tuple[Question, ...]
    texts: tuple[Text, ...]
    first: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    prefill: int


def questions_of(
    subject: Subject, items: Sequence[Item], rows: Sequence[Sequence[int]], prefill: int
) -> list[Question]:
    """Return items in tokens.

    Args:
        subject: Whose tokenizer reads them.
        items: The items.
        rows: Token ids of each question alone.
        prefill: Tokens of a question that are read in one forward.

    Raises:
        UsageError: If a choice begins inside a token, or a question has no token after the prefill.
    """
    found = []
    for item, row in zip(items, rows, strict=True):
        if len(row) <= prefill:
            raise UsageError(
                f"the question of item {item.item_id!r} has {len(row)} token{'s' if len(row) > 1 else ''}, and the "
                f"first {prefill} are the prefill, where nothing acts; leave the item out"
                + (" or lower --prefill" if prefill > 1 else "")
            )
        asked = [Prompt(item.item_id, item.question, answer=choice) for choice in item.choices]
        found.append(Question(item, tuple(row), tuple(answer_tokens(subject, p, row) for p in asked)))
    return found


def content_of(items: Sequence[Item]) -> str:
    """Return a hash of all that items ask."""
    listed = [[i.item_id, i.question, list(i.choices), i.answer, i.category] for i in items]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def laid_out(questions: Sequence[Question], prefill: int) -> ItemBatch:
    """Return questions as rows."""
    texts: list[Text] = []
    first, rows = [], []
    for q in questions:
        fed, of_choice = q.fed()
        first.append(len(texts))
        rows.append(tuple(len(texts) + i for i in of_choice))
        # The last token of a text is not fed, so any token can stand there.
        texts += [Text(q.item.item_id, row[:prefill], (*row[prefill:], row[-1])) for row in fed]
    return ItemBatch(tuple(questions), tuple(texts), tuple(first), tuple(rows), prefill)


def item_values(
    batch: ItemBatch, passages: Sequence[Passage], which: Sequence[str], theta: float | None = None
) -> tuple[pd.DataFrame, list[list[float]], Tensor]:
    """Read a batch that went through the model.

    Args:
        batch: The questions.
        passages: What the rows went through, in their order; position p stands in column p.
        which: Metrics of the states.
        theta: Level of the debts.

    Returns:
        One line per question, the log-likelihood of each of its choices, and the logits ``[question, vocab]`` of the
        token after it.
    """
    places = [(passage, i) for passage in passages for i in range(len(passage.texts))]
    lines, scores, after = [], [], []
    for q, rows, first in zip(batch.questions, batch.rows, batch.first, strict=True):
        start = len(q.question) - 1
        told: dict[int, Tensor] = {}
        of_choice = []
        for choice, row in zip(q.choices, rows, strict=True):
            passage, i = places[row]
            assert passage.logits is not None
            if row not in told:
                longest = max(len(c) for c, r in zip(q.choices, rows, strict=True) if r == row)
                told[row] = passage.logits[i, start : start + longest].double().log_softmax(-1)
            of_choice.append(float(told[row][range(len(choice)), list(choice)].sum()))
        passage, i = places[first]
        assert passage.logits is not None
        after.append(passage.logits[i, start])
        scores.append(of_choice)
        lines.append(_judged(q, of_choice))
    table = pd.DataFrame(lines)
    measured = _measured(batch, passages, which, theta)
    return pd.concat([table, measured], axis=1), scores, torch.stack(after)


def _judged(q: Question, scores: Sequence[float]) -> dict[str, Any]:
    """What a model chose; nothing where a score is not finite, since no choice was made."""
    answer, known = q.item.answer, bool(np.isfinite(scores).all())
    wrong = [s for i, s in enumerate(scores) if i != answer]
    return {
        "n_prompt": len(q.question), "chosen": int(np.argmax(scores)) if known else -1,
        "right": float(np.argmax(scores) == answer) if known else np.nan,
        "nll_right": -scores[answer] if known else np.nan,
        "choice_margin": scores[answer] - max(wrong) if known else np.nan,
    }  # fmt: skip


def _measured(batch: ItemBatch, passages: Sequence[Passage], which: Sequence[str], theta: float | None) -> pd.DataFrame:
    """Metrics of the states of each question, with the reasons of what is missing."""
    lines: list[dict[str, Any]] = []
    before = 0
    for passage in passages:
        here = [
            (row - before, len(q.question))
            for row, q in zip(batch.first, batch.questions, strict=True)
            if before <= row < before + len(passage.texts)
        ]
        before += len(passage.texts)
        if not here:
            continue
        rows, pos = [row for row, _ in here], torch.from_numpy(passage.positions)
        asked = torch.tensor([n for _, n in here])[:, None]
        mask = passage.mask[rows].cpu() & (pos[rows] >= 0) & (pos[rows] < asked)
        found = measure_track(
            passage.tape.subject, [state[rows] for state in passage.tape.states], mask, which,
            span=mask & (pos[rows] >= batch.prefill), span_name="question", theta=theta,
        )  # fmt: skip
        status = row_status(found.n_nonfinite)
        for results, broken, how in zip(found.sample, found.n_nonfinite, status, strict=True):
            reasons = {name: r.reason for name, r in results.items() if r.reason}
            lines.append({
                **{name: r.value for name, r in results.items()}, "n_nonfinite": int(broken), "status": how,
                "reasons": json.dumps(reasons, sort_keys=True) if reasons else None,
            })  # fmt: skip
    return pd.DataFrame(lines)


def kl_to(clean: Tensor, arm: Tensor) -> np.ndarray:
    """KL(clean ‖ arm) of the token after each question, nats; both are logits ``[question, vocab]``."""
    return metrics.paired_output(clean[:, None], arm[:, None])["kl_clean_pert"][:, 0]


def action_lines(batch: ItemBatch, actions: pd.DataFrame, m: int, *, acted: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what a detector saw and a controller did on each question, one line each, and the actions behind it.

    Args:
        batch: The questions.
        actions: Of all rows, with ``signal`` and ``detected`` at every token.
        m: Tokens in a row that the detector asks for.
        acted: Whether there was a controller besides the detector.
    """
    by_row: dict[Any, pd.DataFrame] = dict(iter(actions.groupby("row")))
    lines, kept = [], []
    for number, (q, first) in enumerate(zip(batch.questions, batch.first, strict=True)):
        rows = by_row[first]
        rows = rows[(rows["pos"] >= batch.prefill) & (rows["pos"] < len(q.question))]
        seen = rows.drop_duplicates("pos").sort_values("pos")
        signal, detected = seen["signal"].to_numpy(np.float64), seen["detected"].to_numpy(bool)
        on = (rows["active"].to_numpy(bool) | (rows["energy"].to_numpy() > 0)) & acted
        active = pd.Series(on).groupby(rows["pos"].to_numpy()).any()
        lines.append({
            "duty": float(active.mean()), "n_active": int(active.sum()), "energy_written": float(rows["energy"].sum()),
            "n_watched": len(seen), "signal_score": sustained_max(signal, m),
            "signal_mean": float(np.nanmean(signal)) if np.isfinite(signal).any() else np.nan,
            "n_fires": len(onsets(detected)), "detector_duty": float(detected.mean()),
        })  # fmt: skip
        kept.append(rows.assign(question=number))
    return pd.DataFrame(lines), pd.concat(kept, ignore_index=True)


def item_facts() -> dict[str, dict[str, str]]:
    """Return the facts of the columns of ``items`` and ``fits``, and of the samples' that are no metrics of states."""
    facts = evaluated()
    for name, (unit, text) in _SAMPLES.items():
        facts[f"samples.{name}"] = {"unit": unit, "span": "question", "aggregation": "", "description": text}
    for name, (unit, kind, text) in _FITS.items():
        facts[f"fits.{name}"] = {"unit": unit, "description": text, **({"dtype": kind} if kind else {})}
    return facts
