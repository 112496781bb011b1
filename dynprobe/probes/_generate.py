"""Let the model write, with instruments on, so that a row's text depends on nothing but the row.

The library's own ``generate`` runs the caches of every architecture. Two things are ours: the checkpoint's sampling
defaults are set aside for the length of the call (and reported), and sampling is the Gumbel-max form with noise from
the same pure function as every other draw, so that batch size and order cannot change a sampled text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, UsageError
from dynprobe.probes._chunks import out_of_memory
from dynprobe.probes._decode import Adjust, can_shrink, decode
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import Batch, pad_token
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._noise import uniform
from dynprobe.probes._outputs import hidden_argument, hidden_of
from dynprobe.probes._subject import Subject

__all__ = ["Sampling", "generate", "ignored_defaults"]

#: Settings of a checkpoint's generation config that change which token is chosen.
_CHOOSING = (
    "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams",
    "repetition_penalty", "no_repeat_ngram_size", "penalty_alpha", "length_penalty", "diversity_penalty",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "min_length", "min_new_tokens", "guidance_scale", "encoder_repetition_penalty", "sequence_bias",
    "exponential_decay_length_penalty", "watermarking_config", "top_h",
)  # fmt: skip


#: Tokens of the trial that decides between the two decoding loops.
_TRIED_TOKENS = 4
#: Largest change of a row's scores when another row leaves, in their standard deviations.
_SAME_SCORES = 0.02


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Upper bound of generated tokens.
        temperature: 0 is greedy.
        top_p: Nucleus; 1 keeps all.
        seed: Seed of the draws.
        replicate: Number of the sample of one prompt.
        stop_at_eos: Whether a row ends at the end-of-sequence token.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    replicate: int = 0
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens}; generation needs at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature={self.temperature}; it is 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}; it lies in (0, 1]")


class _GumbelMax:
    """Add keyed Gumbel noise to the logits, so that their arg-max is a sample of the softmax."""

    def __init__(self, sampling: Sampling, row_keys: Sequence[str], lengths: Sequence[int]) -> None:
        self._sampling, self._keys, self._lengths = sampling, row_keys, lengths
        self._drawn = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.noisy(scores, range(len(self._keys)))

    def noisy(self, scores: Tensor, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Return the scores of the named rows with their noise."""
        site = f"sample/{self._sampling.replicate}"
        draws = np.stack(
            [
                uniform(self._sampling.seed, self._keys[i], site, self._lengths[i] + self._drawn, scores.shape[-1])
                for i in rows
            ]
        )
        self._drawn += 1
        tiny = np.finfo(np.float32).tiny
        gumbel = -np.log(-np.log(np.clip(draws.astype(np.float64), tiny, 1 - 1e-12)))
        return scores + torch.from_numpy(gumbel).to(scores)


def end_tokens(subject: Subject) -> list[int]:
    """Return the ids that end a text, from the checkpoint's generation config, else the tokenizer."""
    config = getattr(subject.model, "generation_config", None)
    value = getattr(config, "eos_token_id", None)
    if value is None:
        value = getattr(subject.tokenizer, "eos_token_id", None)
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple | set) else [int(value)]


def ignored_defaults(subject: Subject) -> dict[str, Any]:
    """Return the checkpoint's sampling defaults that dynprobe sets aside."""
    config = getattr(subject.model, "generation_config", None)
    if config is None:
        return {}
    neutral = type(config)()
    return {
        name: getattr(config, name)
        for name in _CHOOSING
        if getattr(config, name, None) is not None and getattr(config, name) != getattr(neutral, name, None)
    }


@contextmanager
def _neutral_config(subject: Subject, sampling: Sampling) -> Iterator[Any]:
    from transformers import GenerationConfig

    model: Any = subject.model
    eos = end_tokens(subject) if sampling.stop_at_eos else []
    neutral = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
        pad_token_id=pad_token(subject), eos_token_id=eos or None, bos_token_id=None,
    )  # fmt: skip
    before = model.generation_config
    model.generation_config = neutral  # generate() fills unset fields from here, so passing a config is not enough
    try:
        yield neutral
    finally:
        model.generation_config = before


def _refuse_mixed_rows(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Some recurrent models broadcast the rows of a batch against each other in decoding (RWKV in transformers)."""
    before, after = hidden_argument(args, kwargs), hidden_of(output)
    if before.shape[:2] != after.shape[:2]:
        raise ModelError(
            f"{type(block).__name__} made states {tuple(after.shape)} of {tuple(before.shape)}: the model mixes the "
            "rows of a batch when it decodes. Generate one row at a time (--batch-size 1)"
        )


def check_writes(subject: Subject, batch: Batch) -> None:
    """Refuse what cannot write a text that depends on nothing but the row.

    Raises:
        ModelError: If the model cannot generate, or draws its states at random.
        UsageError: If a row is padded on the right.
    """
    if not hasattr(subject.model, "generate"):
        raise ModelError(f"{subject.name} ({type(subject.model).__name__}) has no generate(); use --max-new-tokens 0")
    if not bool(batch.mask[:, -1].all()):
        raise UsageError("generation needs padding on the left (or none): the new token follows the last column")
    if subject.loop is not None and subject.loop.arguments is not None:
        raise ModelError(
            f"{subject.name} draws the first state of every new token at random, so a text that it generates is "
            "another one each time; read texts instead (--max-new-tokens 0)"
        )


def choosers(sampling: Sampling, row_keys: Sequence[str], lengths: Sequence[int]) -> list[Any]:
    """Return what scores go through before the largest is taken: temperature, nucleus, keyed noise; greedy has none.

    Args:
        sampling: How tokens are chosen.
        row_keys: Names of the rows.
        lengths: Real tokens of each row before the first that is chosen.
    """
    if sampling.temperature == 0:
        return []
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    processors: list[Any] = []
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return [*processors, _GumbelMax(sampling, row_keys, lengths)]


def generate(
    subject: Subject, batch: Batch, sampling: Sampling, instrument: Instrument | None = None
) -> list[list[int]]:
    """Generate a continuation of each row and return the new tokens, end token included.

    Args:
        subject: A language model.
        batch: Prompts, padded on the left or all of one length.
        sampling: How tokens are chosen.
        instrument: Readers and writers to keep on the model meanwhile; entered here.

    Returns:
        New token ids of each row.

    Raises:
        ModelError: If the model cannot generate, or mixes the rows of a batch.
        UsageError: If a row is padded on the right.
    """
    check_writes(subject, batch)
    processors = choosers(sampling, batch.row_keys, [int(n) for n in batch.lengths])
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if subject.accepts("attention_mask"):
        inputs["attention_mask"] = batch.mask.long()
    if processors:
        inputs["logits_processor"] = processors
    ends = set(end_tokens(subject)) if sampling.stop_at_eos else set()
    handle = subject.blocks[0].register_forward_hook(_refuse_mixed_rows, with_kwargs=True)
    try:
        with torch.no_grad():
            if _shrinks(subject, batch, ends):
                with evaluating(subject.model), instrument or nullcontext():
                    adjust = adjusting(processors) if processors else None
                    new = decode(
                        subject, batch, sampling.max_new_tokens, sorted(ends), adjust, instrument, pad_token(subject)
                    )
            else:
                new = _by_library(subject, inputs, batch, sampling, ends, instrument)
    finally:
        handle.remove()
    if instrument is not None:
        _check_whole(subject, batch, new, instrument)
    return new


def _check_whole(subject: Subject, batch: Batch, new: list[list[int]], instrument: Instrument) -> None:
    """Refuse a text whose forwards the instrument could not join: positions were counted from 0 again and again."""
    fed = batch.mask.shape[1] + max(len(row) for row in new) - 1
    seen = sum(step.positions.shape[1] for step in instrument.steps)
    if seen < fed:
        raise ModelError(
            f"{subject.name} fed {fed} columns while it wrote, and only {seen} of them could be joined to one text: "
            "what it keeps of earlier tokens has a name that is not known. Read texts instead (--max-new-tokens 0)"
        )


def adjusting(processors: Sequence[Any]) -> Adjust:
    """The processors as the shrinking loop calls them: with the rows that are still there."""

    def adjust(scores: Tensor, rows: np.ndarray) -> Tensor:
        for processor in processors:
            scores = processor.noisy(scores, rows) if isinstance(processor, _GumbelMax) else processor(None, scores)
        return scores

    return adjust


def _shrinks(subject: Subject, batch: Batch, ends: set[int]) -> bool:
    """Whether the loop whose batch shrinks gives the library's texts on this subject; tried once, and noted."""
    known = subject.facts.get("decodes_alone")
    if known is not None:
        return bool(known)
    if not can_shrink(subject):
        subject.facts["decodes_alone"] = False
        return False
    small = _padded_pair(batch)
    sampling = Sampling(max_new_tokens=_TRIED_TOKENS)
    inputs = {"input_ids": small.input_ids, "attention_mask": small.mask.long()}
    try:
        with evaluating(subject.model):
            ours = decode(subject, small, _TRIED_TOKENS, sorted(ends), pad=pad_token(subject))
            theirs = _by_library(subject, inputs, small, sampling, ends, None)
            whole, cut = (_scores_of_second(subject, small, leaves=leaves) for leaves in (False, True))
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError) as error:
        if out_of_memory(error):
            raise
        subject.facts["decodes_alone"] = False
        subject.facts["decodes_alone_not"] = (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]
        return False
    works = ours == theirs and all(
        float((a - b).abs().nan_to_num(0.0).max()) <= _SAME_SCORES * float(a[a.isfinite()].std())
        for a, b in zip(whole, cut, strict=True)
    )
    if not works:
        why = "its texts are not the library's" if ours != theirs else "a row's scores change when another row leaves"
        subject.facts["decodes_alone_not"] = why
    subject.facts["decodes_alone"] = works
    return works


def _padded_pair(batch: Batch) -> Batch:
    """The longest row of a batch and a shorter one, which is padded; one is made shorter where all are equal."""
    order = torch.argsort(batch.lengths)
    tried = [int(order[-1]), int(order[0])]
    chosen = torch.tensor(tried, device=batch.input_ids.device)
    mask = batch.mask[chosen].clone()
    if bool(mask.all()) and mask.shape[1] > 1:
        mask[1, 0] = False
    return Batch(
        batch.input_ids[chosen], mask, tuple(batch.row_keys[i] for i in tried),
        tuple(int(n) for n in mask.sum(1)),
    )  # fmt: skip


def _scores_of_second(subject: Subject, batch: Batch, *, leaves: bool) -> list[Tensor]:
    """Scores of the second of two rows at every step; the first one ends at once, and leaves, if so asked."""
    seen: list[Tensor] = []
    end = 0

    def adjust(scores: Tensor, rows: np.ndarray) -> Tensor:
        scores[:, end] = -torch.inf
        if leaves and not seen:
            scores[0, end] = torch.inf
        seen.append(scores[-1].clone())
        return scores

    decode(subject, batch, _TRIED_TOKENS, [end], adjust, pad=pad_token(subject))
    return seen


def _by_library(
    subject: Subject, inputs: dict[str, Any], batch: Batch, sampling: Sampling, ends: set[int],
    instrument: Instrument | None,
) -> list[list[int]]:  # fmt: skip
    """Decode with the model's own ``generate``."""
    model: Any = subject.model
    with _neutral_config(subject, sampling) as config, instrument or nullcontext():
        out = model.generate(**inputs, generation_config=config)
    rows: list[list[int]] = []
    for new in out[:, batch.input_ids.shape[1] :].tolist():
        stop = next((i for i, token in enumerate(new) if token in ends), len(new) - 1)
        rows.append(new[: stop + 1])
    return rows
