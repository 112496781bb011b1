"""Questions with one right answer: stories that are read, and names that are recalled over a distance.

*Reading* is the task of the first reports: short and long stories, two questions each, greedy, at most 20 new tokens,
exact match. *Recall* is the smallest test of a memory: four people are named, so many tokens of something else follow,
and one name is asked for. All four names stand in the text, so that knowing which names occurred is worth nothing; the
choice is made by likelihood among them, and what is written is compared as well.

Items start from an empty memory, or, with ``reset='never'``, in one session, one after the other, from what the item
before left behind: then the score of an item depends on its neighbours, which is the defect the word stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from dynprobe import metrics
from dynprobe.controllers import Steering
from dynprobe.errors import UsageError
from dynprobe.probes import Instrument, Sampling, Subject, generate, logits_of, make_batch, tokenize
from dynprobe.probes._evaluating import evaluating
from dynprobe.prompts import Prompt, exact_match, load_stories
from dynprobe.protocols._arms import Text, aligned
from dynprobe.protocols._attract_arms import Condition, Sites
from dynprobe.protocols._attract_config import HISTORICAL, AttractConfig
from dynprobe.protocols._attract_doses import arm_logits
from dynprobe.protocols._attract_history import historical_answer, historical_session
from dynprobe.protocols._prompts import learned_positions
from dynprobe.protocols._tables import sample_id

__all__ = ["Asked", "answer_arm", "recall_items", "story_items"]

#: Tokens that are written as an answer.
_ANSWER, _NAME = 20, 6
_RECALL_ITEMS = 12
_ROLES = ("baker", "pilot", "gardener", "teacher")
_NAMES = ("Anna", "Peter", "Maria", "David")


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        prompt: What is read.
        task: Name of its group: ``reading.short``, ``recall.200``.
        answers: What counts as right.
        choices: Texts to choose among by likelihood, the right one first; empty where nothing is chosen.
        cluster: What it shares with other questions: the story, or the assignment of names.
    """

    prompt: Prompt
    task: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    cluster: str


def story_items(subject: Subject, config: AttractConfig) -> list[Asked]:
    """Return the questions about stories, in the order in which an experiment asks them.

    Args:
        subject: The model; stories are texts to any of them.
        config: Its ``stories`` are the lengths, ``limit`` the number of stories of each.
    """
    found = []
    for length in config.stories:
        for story in load_stories(length, limit=config.limit):
            for number, question in enumerate(story.questions):
                name = f"{story.story_id}:{length}:{number}"
                prompt = Prompt(name, question.prompt(story.text), story.category, "builtin")
                found.append(Asked(prompt, f"reading.{length}", question.answers, (), story.story_id))
    return found


def recall_items(subject: Subject, config: AttractConfig) -> list[Asked]:
    """Return the items of recall: for each distance every name in every role in turn.

    The distance is exact: so many tokens of story stand between the last fact and the question.

    Args:
        subject: Its tokenizer reads the texts.
        config: ``distances``, and ``limit`` items of each distance.

    Raises:
        UsageError: If an item is longer than the model's positions.
    """
    filler_text = " ".join(s.text for s in load_stories("long") if not any(n in s.text for n in _NAMES))
    filler = tokenize(subject, [" " + filler_text])[0]
    begin = tokenize(subject, ["x"])[0]
    filler = filler[len(begin) - 1 :] if len(begin) == 2 else filler  # a first token that every text begins with
    count = min(config.limit or _RECALL_ITEMS, len(_ROLES) * len(_NAMES))
    longest, places = max(config.distances), learned_positions(subject)
    found = []
    for distance in config.distances:
        for item in range(count):
            turn, asked = divmod(item, len(_ROLES))
            names = tuple(_NAMES[(i + turn) % len(_NAMES)] for i in range(len(_ROLES)))
            facts = " ".join(f"The name of the {r} is {n}." for r, n in zip(_ROLES, names, strict=True))
            question = f"\n\nThe name of the {_ROLES[asked]} is"
            start = (item * 997) % max(len(filler) - longest, 1)
            between = (filler[start:] + filler)[:distance]
            tail = tokenize(subject, ["x" + question])[0][len(begin) :]
            ids = (*tokenize(subject, [facts])[0], *between, *tail)
            if places is not None and len(ids) + _NAME > places:
                raise UsageError(
                    f"recall over {distance} tokens takes {len(ids) + _NAME} positions; {subject.name} has {places}. "
                    "Give shorter --distances"
                )
            right = names[asked]
            choices = (right, *(n for n in names if n != right))
            text = f"{facts} … {distance} tokens …{question}"
            prompt = Prompt(f"recall:{distance}:{item}", text, str(distance), "builtin", tuple(ids))
            found.append(Asked(
                prompt, f"recall.{distance}", (right,), tuple(f" {n}" for n in choices), f"{turn}:{asked}"
            ))  # fmt: skip
    return found


def answer_arm(subject: Subject, sites: Sites, condition: Condition, asked: Sequence[Asked]) -> dict[str, pd.DataFrame]:
    """Let one arm answer questions; returns ``items`` and ``samples``.

    Args:
        subject: The model.
        sites: Makes the arm's controllers.
        condition: The arm; with ``reset='never'`` the questions are asked one after the other in one session.
        asked: The questions.
    """
    if condition.arm in HISTORICAL:
        lines = _historical(subject, condition, asked, min(_ANSWER, sites.config.max_new_tokens))
    elif condition.reset == "never":
        bases: list[Any] | None = None
        lines = []
        for one in asked:
            steerings = sites.steerings(condition, base=bases)
            lines += _answers(subject, sites, condition, [one], steerings, bases)
            bases = [_carried(s) for s in steerings]
    else:
        lines = _answers(subject, sites, condition, asked, sites.steerings(condition), None)
    items = pd.DataFrame(lines)
    items["correct"] = items["correct"].astype("boolean")
    items["chose_right"] = items["chose_right"].astype("boolean")
    columns = ["sample_id", "prompt_id", "condition_id", "category", "n_prompt", "text"]
    return {"items": items.drop(columns=["n_prompt"]), "samples": items[columns].assign(replicate=0, status="ok")}


def _historical(subject: Subject, condition: Condition, asked: Sequence[Asked], most: int) -> list[dict[str, Any]]:
    """The historical layer answers: one item after the other, each with an empty memory or all with one."""
    leak, lines = condition.arm == "phase2_leak", []
    with ExitStack() as session:
        if condition.reset == "never":
            session.enter_context(historical_session(subject, leak=leak))
        for a in asked:
            row = _ids(subject, a)
            with nullcontext() if condition.reset == "never" else historical_session(subject, leak=leak):
                new = historical_answer(subject, row, _NAME if a.choices else most)
            lines.append(_line(subject, condition, a, row, new, np.zeros(0)))
    return lines


def _ids(subject: Subject, asked: Asked) -> list[int]:
    given = asked.prompt.token_ids
    return tokenize(subject, [list(given)])[0] if given else tokenize(subject, [asked.prompt.text])[0]


def _carried(steering: Steering) -> dict[str, Any]:
    """A memory as the next item finds it; positions begin anew, token counts go on."""
    return {name: value.clone() for name, value in steering.memory.items()}


def _answers(
    subject: Subject, sites: Sites, condition: Condition, asked: Sequence[Asked], steerings: Sequence[Steering],
    bases: list[Any] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    rows = [_ids(subject, a) for a in asked]
    keys = [a.prompt.prompt_id for a in asked]
    config = sites.config
    most = _NAME if asked[0].choices else min(_ANSWER, config.max_new_tokens)
    scores = [_scores(subject, sites, condition, a, row, bases) for a, row in zip(asked, rows, strict=True)]
    batch = make_batch(subject, rows, side="left", row_keys=keys)
    sampling = Sampling(most, config.temperature, config.top_p, config.seed, 0, stop_at_eos=True)
    new = generate(subject, batch, sampling, Instrument(subject, (), steerings, **batch.rows))
    return [
        _line(subject, condition, a, row, text, score)
        for a, row, text, score in zip(asked, rows, new, scores, strict=True)
    ]


def _line(
    subject: Subject, condition: Condition, a: Asked, row: Sequence[int], new: Sequence[int], score: np.ndarray
) -> dict[str, Any]:
    """One row of the items."""
    assert subject.tokenizer is not None
    written, name = subject.tokenizer.decode(list(new), skip_special_tokens=True), condition.condition_id
    margin = float(score[0] - score[1:].max()) if len(score) > 1 else np.nan
    return {
        "task": a.task, "doc_id": a.prompt.prompt_id, "condition_id": name, "prompt_id": a.prompt.prompt_id,
        "sample_id": sample_id(a.prompt.prompt_id, name, 0), "category": a.prompt.category, "cluster": a.cluster,
        "correct": exact_match(written, list(a.answers)),
        "chose_right": bool(margin > 0) if np.isfinite(margin) else None, "choice_margin": margin,
        "n_choices": len(a.choices), "target": a.answers[0], "text": written, "n_prompt": len(row),
        "responses": [float(s) for s in score],
    }  # fmt: skip


def _scores(
    subject: Subject, sites: Sites, condition: Condition, asked: Asked, row: Sequence[int], bases: list[Any] | None
) -> np.ndarray:
    """Summed log-probability of each choice after the prompt, each from the memory the item starts with."""
    if not asked.choices:
        return np.zeros(0)
    whole = [tokenize(subject, ["x" + choice])[0] for choice in asked.choices]
    begin = len(tokenize(subject, ["x"])[0])
    texts = [Text(asked.prompt.prompt_id, tuple(row), tuple(w[begin:])) for w in whole]
    if condition.arm == "cache":  # it changes what is chosen from and no state, so its choices come from its mixture
        return _cache_scores(subject, sites, condition, texts)
    steerings = sites.steerings(condition, base=bases)
    batch = make_batch(subject, [t.fed for t in texts], row_keys=[t.row_key for t in texts],
                       n_prompt=[len(t.prompt) for t in texts])  # fmt: skip
    with torch.no_grad(), evaluating(subject.model), Instrument(subject, (), steerings, **batch.rows):
        logits = logits_of(subject.model(**batch.model_inputs(subject)))
    return _summed(logits, batch.mask, texts)


def _cache_scores(subject: Subject, sites: Sites, condition: Condition, texts: Sequence[Text]) -> np.ndarray:
    logits, _, batch = arm_logits(subject, texts, sites.controllers(condition))
    return _summed(logits, batch.mask, texts)


def _summed(logits: torch.Tensor, mask: torch.Tensor, texts: Sequence[Text]) -> np.ndarray:
    targets = aligned([t.targets for t in texts], mask.cpu())
    nll = metrics.output_metrics(logits, targets.to(logits.device))["nll"]
    real = mask.cpu().numpy()
    return np.array([-float(nll[i][real[i]][len(t.prompt) - 1 :].sum()) for i, t in enumerate(texts)])
