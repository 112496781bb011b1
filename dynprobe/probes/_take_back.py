"""Whether a model's cache can give its last tokens back, tried on a few tokens.

A cache of keys and values per layer can be cut. A recurrent state cannot, a sliding window has let go of what would
come back, and some models keep no cache at all. What a cache says of itself is not believed: tokens are fed, taken back
and fed again, and their logits must be the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynprobe.errors import ModelError
from dynprobe.probes._chunks import out_of_memory
from dynprobe.probes._decode import can_shrink
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import make_batch
from dynprobe.probes._outputs import logits_of
from dynprobe.probes._subject import Subject
from dynprobe.probes._trial_calls import trial_ids

__all__ = ["check_takes_back", "next_inputs"]

#: Largest change of the logits of a token that is fed again, in their standard deviations.
_SAME_LOGITS = 1e-3
#: Tokens of the trial's prompt, and those it feeds and takes back.
_TRIED_PROMPT, _TRIED_TOKENS = 3, 2
_FACT = "takes_back_not"


def next_inputs(subject: Subject, ids: Tensor, mask: Tensor, cache: Any) -> dict[str, Any]:
    """Return the forward's arguments for one more token ``[1, 1]`` of a row with this mask and cache."""
    inputs = {subject.token_argument: ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    if subject.accepts("position_ids"):
        inputs["position_ids"] = mask.sum(1, keepdim=True) - 1
    return inputs


def check_takes_back(subject: Subject) -> None:
    """Refuse a model whose cache cannot give tokens back; tried once on a few tokens, and noted.

    Raises:
        ModelError: With the reason.
    """
    if _FACT not in subject.facts:
        subject.facts[_FACT] = _tried(subject)
    if subject.facts[_FACT]:
        raise ModelError(
            f"{subject.name} ({type(subject.model).__name__}) cannot take tokens back: {subject.facts[_FACT]}. Modes "
            "that restart (guard, hybrid, recync) need a cache of keys and values that can be cut; take another mode "
            "or model"
        )


def _tried(subject: Subject) -> str:
    """Why the cache of a subject cannot be cut; empty where it can."""
    if not can_shrink(subject):
        return "its forward takes no cache (past_key_values, attention_mask, use_cache)"
    try:
        with torch.no_grad(), evaluating(subject.model):
            return _trial(subject)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError, ModelError) as error:
        if out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _trial(subject: Subject) -> str:
    ids = trial_ids(subject.model).to(subject.device)[:, : _TRIED_PROMPT + _TRIED_TOKENS]
    prompt = make_batch(subject, ids[:, :_TRIED_PROMPT].tolist())
    output = subject.model(**prompt.model_inputs(subject, cache=True))
    cache: Any = getattr(output, "past_key_values", None)
    layers: Sequence[Any] = getattr(cache, "layers", None) or ()
    if cache is None or not layers or not hasattr(cache, "crop"):
        return f"it keeps {'no cache' if cache is None else type(cache).__name__}, not one of keys and values per layer"
    for number, layer in enumerate(layers):
        if getattr(layer, "is_sliding", False):
            return f"layer {number} of its cache is a sliding window, which has let go of what would come back"
        if not (hasattr(layer, "keys") and hasattr(layer, "crop") and getattr(layer, "is_croppable", True)):
            return f"layer {number} of its cache is a {type(layer).__name__}, which cannot be cut"
        if hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states"):
            return f"layer {number} of its cache holds a recurrent state, which cannot be cut"
    first, again = (_fed(subject, ids, cache, take_back=_TRIED_TOKENS) for _ in range(2))
    if cache.get_seq_length() != _TRIED_PROMPT:
        return f"its cache holds {cache.get_seq_length()} columns after it was cut to {_TRIED_PROMPT}"
    gap = float((first - again).abs().nan_to_num(0.0).max())
    if gap > _SAME_LOGITS * float(first[first.isfinite()].std()):
        return f"its logits differ by {gap:.3g} when the same tokens are fed again after they were taken back"
    return ""


def _fed(subject: Subject, ids: Tensor, cache: Any, take_back: int) -> Tensor:
    """Logits of the trial's tokens, fed one by one and taken back again."""
    out = []
    for end in range(_TRIED_PROMPT + 1, ids.shape[1] + 1):
        inputs = next_inputs(subject, ids[:, end - 1 : end], torch.ones_like(ids[:, :end]), cache)
        out.append(logits_of(subject.model(**inputs))[:, -1].float())
    cache.crop(-take_back)
    return torch.stack(out)
