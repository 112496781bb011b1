"""The prompts of a run: which ones, and what the model sees of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from dynprobe.errors import PromptError, UsageError, did_you_mean
from dynprobe.probes import Subject, tokenize
from dynprobe.prompts import Prompt, from_texts, load_prompts, read_prompts
from dynprobe.protocols._config import RunConfig

__all__ = ["answer_tokens", "as_prompts", "choose_prompts", "learned_positions", "token_rows"]


def choose_prompts(config: RunConfig, prompts: Sequence[Any] | None = None) -> list[Prompt]:
    """Return the prompts of a run: those handed in, of a file, typed, or the built-in ones.

    Raises:
        PromptError: If none is left.
    """
    if prompts is not None:
        chosen = as_prompts(prompts)
    elif config.prompts is not None:
        chosen = read_prompts(config.prompts)
        if config.prompt:
            chosen += from_texts(list(config.prompt))
    elif config.prompt:
        chosen = from_texts(list(config.prompt))
    else:
        chosen = load_prompts(source="default" if config.category == () else "all")
    if config.category:
        known = {p.category for p in chosen if p.category}
        missing = [c for c in config.category if c not in known]
        if missing:
            there = ", ".join(sorted(known)) or "none"
            near = did_you_mean(missing[0], sorted(known))
            raise PromptError(f"no prompt of category {missing[0]!r}; there are: {there}.{near}")
        chosen = [p for p in chosen if p.category in config.category]
    name, times = Counter(p.prompt_id for p in chosen).most_common(1)[0] if chosen else ("", 0)
    if times > 1:
        raise PromptError(f"{times} prompts are called {name!r}; ids join the tables of a run, so each must be unique")
    chosen = chosen[: config.limit]
    if not chosen:
        raise PromptError("no prompt is left to run; give --prompt TEXT or --prompts FILE")
    return chosen


def as_prompts(prompts: Sequence[Any]) -> list[Prompt]:
    """Return prompts from texts, lists of token ids, or prompts.

    Raises:
        PromptError: If there is none, or they are of different kinds.
    """
    items = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
    if not items:
        raise PromptError("an empty list of prompts was given")
    ready = [i for i in items if isinstance(i, Prompt)]
    if len(ready) == len(items):
        return ready
    if all(isinstance(i, str) for i in items):
        return from_texts(list(items))
    if any(isinstance(i, str | Prompt) for i in items):
        raise PromptError("prompts are all texts, all lists of token ids, or all Prompt objects; they were mixed")
    rows = [tuple(int(t) for t in row) for row in items]
    named = from_texts([" ".join(map(str, row)) for row in rows])
    return [Prompt(p.prompt_id, "", p.category, "token ids", row) for p, row in zip(named, rows, strict=True)]


def token_rows(
    subject: Subject, prompts: Sequence[Prompt], *, chat_template: str = "none", grow: int = 0
) -> list[list[int]]:
    """Return the token ids of each prompt, as the model will see them.

    Args:
        subject: Its tokenizer is used for prompts without token ids.
        prompts: The prompts.
        chat_template: As in :class:`RunConfig`.
        grow: Tokens that will be fed after each prompt.

    Raises:
        PromptError: If a prompt cannot be fed to this model: no tokenizer, an unknown id, too long for its positions.
    """
    rows: list[list[int]] = []
    places = learned_positions(subject)
    for prompt in prompts:
        try:
            given = [list(prompt.token_ids)] if prompt.token_ids else [prompt.text]
            row = tokenize(subject, given, chat_template=chat_template)[0]
        except PromptError as error:
            raise PromptError(f"prompt {prompt.prompt_id!r}: {str(error).removeprefix('prompt 0 ')}") from error
        if places is not None and len(row) + grow > places:
            raise PromptError(
                f"prompt {prompt.prompt_id!r} has {len(row)} tokens and grows by {grow}; {subject.name} has "
                f"{places} positions. Shorten the prompt or --max-new-tokens"
            )
        rows.append(row)
    return rows


def answer_tokens(subject: Subject, prompt: Prompt, row: Sequence[int], chat_template: str = "none") -> tuple[int, ...]:
    """Return the tokens of an item's answer, as they follow its prompt.

    Args:
        subject: Its tokenizer reads prompt and answer together.
        prompt: A prompt with an answer.
        row: Token ids of the prompt alone.
        chat_template: As in :class:`RunConfig`.

    Raises:
        UsageError: If prompt and answer share a token, or the prompt is no plain text.
    """
    assert prompt.answer is not None
    if prompt.token_ids is not None or chat_template != "none":
        raise UsageError(
            f"prompt {prompt.prompt_id!r} is not read as plain text, so the tokens of its answer are not known; give "
            "texts without a chat template"
        )
    row, whole = list(row), tokenize(subject, [prompt.text + prompt.answer])[0]
    if whole[: len(row)] != row or len(whole) == len(row):
        raise UsageError(
            f"the answer of prompt {prompt.prompt_id!r} ({prompt.text!r:.60} + {prompt.answer!r:.40}) does not begin "
            'at a token boundary; move the space between prompt and answer into the answer (" Paris")'
        )
    return tuple(whole[len(row) :])


def learned_positions(subject: Subject) -> int | None:
    """Positions a model can look up in a table; None where they are computed and have no hard end."""
    limit = getattr(getattr(subject.model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    tokens = subject.model.get_submodule(subject.embedding) if subject.embedding else None
    tables = (m for m in subject.model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    # OPT and its kin keep two rows of the table for padding.
    return limit if any(m.num_embeddings in (limit, limit + 2) for m in tables) else None
