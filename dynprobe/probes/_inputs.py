"""Turn texts or token ids into one padded batch whose positions are right whichever side the padding is on.

Models with learned positions silently read the wrong embedding for every token of a left-padded row unless the
position ids are derived from the mask; so they always are, wherever the forward takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynprobe.errors import PromptError, UsageError
from dynprobe.probes._noise import row_key_from_tokens
from dynprobe.probes._subject import Subject

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

__all__ = ["Batch", "make_batch", "pad_token", "tokenize"]

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Batch:
    """One padded batch.

    Attributes:
        input_ids: ``[batch, pos]`` on the subject's device.
        mask: ``[batch, pos]`` bool, True at real tokens.
        row_keys: Names of the rows for the noise function.
        n_prompt: Prompt length of each row; columns beyond are teacher-forced continuation.
    """

    input_ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    row_keys: tuple[str, ...]
    n_prompt: tuple[int, ...]

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, ``[batch]``."""
        return self.mask.sum(1)

    @property
    def rows(self) -> dict[str, Any]:
        """What an instrument wants to know of the rows: their names, prompt lengths and mask."""
        return {"row_keys": self.row_keys, "n_prompt": self.n_prompt, "mask": self.mask}

    def model_inputs(self, subject: Subject, *, cache: bool = False) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward."""
        inputs: dict[str, Any] = {subject.token_argument: self.input_ids}
        if subject.accepts("attention_mask"):
            inputs["attention_mask"] = self.mask.to(torch.long)
        if subject.accepts("position_ids"):
            inputs["position_ids"] = (self.mask.long().cumsum(1) - 1).clamp_min(0)
        if subject.accepts("use_cache"):
            inputs["use_cache"] = cache
        if subject.loop is not None and subject.loop.arguments is not None:
            return subject.loop.arguments(subject.model, inputs, self.mask)
        return inputs


def pad_token(subject: Subject) -> int:
    """Return a token id to pad with; its value never matters because the mask hides it.

    A padding token that was added to the tokenizer after training has no row in the embedding and is not taken.
    """
    vocab = subject.vocab_size
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(subject.tokenizer, name, None)
        if isinstance(value, int) and (vocab is None or value < vocab):
            return value
    return 0


def tokenize(subject: Subject, prompts: Prompts, *, chat_template: str = "none") -> list[list[int]]:
    """Return the token ids of each prompt, as the model will see them.

    Args:
        subject: Its tokenizer is used for texts.
        prompts: Texts, lists of token ids, or a LongTensor ``[batch, pos]``.
        chat_template: ``"none"`` feeds the text as it is; ``"auto"`` wraps it as one user turn where the tokenizer has
            a template (which then brings its own special tokens).

    Raises:
        PromptError: If there is nothing to tokenise, a prompt is empty, or there is no tokenizer for texts.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    rows: list[list[int]]
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            raise PromptError(f"token ids are a LongTensor [batch, pos], not {prompts.dtype} {tuple(prompts.shape)}")
        rows = prompts.tolist()
    elif all(isinstance(prompt, str) for prompt in prompts):
        rows = [_encode(subject, str(text), chat_template) for text in prompts]
    elif any(isinstance(prompt, str | int) for prompt in prompts):
        raise PromptError("prompts are texts, or lists of token ids, one list a prompt: [[5, 6, 7], [8, 9]]")
    else:
        rows = [[int(token) for token in row] for row in prompts]
    if not rows:
        raise PromptError("no prompt was given; pass at least one text")
    vocab = subject.vocab_size
    for number, row in enumerate(rows):
        if not row:
            raise PromptError(f"prompt {number} has no tokens; every prompt needs at least one")
        outside = [token for token in row if token < 0 or (vocab is not None and token >= vocab)]
        if outside:
            last = "" if vocab is None else f"; the vocabulary of {subject.name} is 0…{vocab - 1}"
            raise PromptError(f"prompt {number} has token id {outside[0]}{last}")
    return rows


def _encode(subject: Subject, text: str, chat_template: str) -> list[int]:
    tokenizer = subject.tokenizer
    if tokenizer is None:
        raise PromptError(f"{subject.name} has no tokenizer; pass token ids (lists of integers) instead of texts")
    if chat_template not in ("none", "auto"):
        raise UsageError(f"chat_template={chat_template!r}; it is 'none' or 'auto'")
    if chat_template == "auto" and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


def make_batch(
    subject: Subject,
    rows: Sequence[Sequence[int]],
    *,
    side: str = "right",
    row_keys: Sequence[str] | None = None,
    n_prompt: Sequence[int] | None = None,
) -> Batch:
    """Pad rows of token ids into one batch.

    Args:
        subject: Gives device and padding token.
        rows: Token ids, one list a row.
        side: Where padding goes, ``"left"`` or ``"right"``.
        row_keys: Names of the rows; None hashes the first tokens.
        n_prompt: Prompt lengths where rows carry a continuation; None means all of each row.
    """
    if side not in ("left", "right"):
        raise UsageError(f"padding side {side!r}; it is 'left' or 'right'")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token(subject), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, span] = torch.as_tensor(row, dtype=torch.long)
        mask[i, span] = True
    keys = tuple(row_keys) if row_keys is not None else tuple(row_key_from_tokens(row) for row in rows)
    prompt = tuple(int(n) for n in n_prompt) if n_prompt is not None else tuple(len(row) for row in rows)
    return Batch(ids.to(subject.device), mask.to(subject.device), keys, prompt)
