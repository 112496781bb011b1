"""The skeleton of a model: what stands on its box, as covariates of a comparison between models.

Read from the model itself, never from its name. What is not found is None, and a comparison then does without that
covariate or that model.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dynprobe.probes import Subject

__all__ = ["COVARIATES", "skeleton_of"]

#: Covariates of a model, in the order in which they are entered.
COVARIATES = ("log10_parameters", "depth", "width", "heads", "norm", "positions")

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_LEARNED = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def skeleton_of(subject: Subject) -> dict[str, Any]:
    """Return the covariates of a subject.

    ``depth`` is the number of updates on the track, so a looped model counts its iterations; ``norm`` and
    ``positions`` are words.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> found = skeleton_of(tiny_llama())
        >>> found["norm"], found["positions"]
        ('rms', 'rope')
    """
    config = getattr(subject.model, "config", None)
    parameters = sum(p.numel() for p in subject.model.parameters())
    if subject.facts.get("quantization"):  # packed weights count several to a number
        parameters = subject.facts["n_parameters"]
    heads = next((v for key in _HEADS if isinstance(v := getattr(config, key, None), int)), None)
    return {
        "log10_parameters": math.log10(parameters) if parameters else None,
        "depth": subject.n_layers,
        "width": subject.dim,
        "heads": heads,
        "norm": _norm(subject.model),
        "positions": _positions(subject.model, config),
    }


def _norm(model: nn.Module) -> str | None:
    kinds = set()
    for module in model.modules():
        name = type(module).__name__.lower()
        if "rmsnorm" in name:
            kinds.add("rms")
        elif "layernorm" in name:
            kinds.add("layer")
        elif name.endswith("norm"):
            kinds.add(name.removesuffix("norm").rstrip("_") or "norm")
    return "+".join(sorted(kinds)) or _own(model, "norm")


def _positions(model: nn.Module, config: Any) -> str | None:
    named = getattr(config, "position", None)
    if isinstance(named, str):
        return named
    own = _own(model, "positions")
    if own is not None:
        return own
    if getattr(config, "alibi", False):
        return "alibi"
    if any(getattr(config, key, None) for key in ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim")):
        return "rope"
    if any(name.rsplit(".", 1)[-1] in _LEARNED for name, _ in model.named_modules()):
        return "learned"
    return None


def _own(model: nn.Module, what: str) -> str | None:
    """What a CSM-style model has in place of modules of its own: functions on its 16 states, and a recurrence."""
    if getattr(getattr(model, "config", None), "model_type", None) != "dynprobe_csm":
        return None
    return {"norm": "rms", "positions": "recurrent"}[what]
