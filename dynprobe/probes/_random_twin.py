"""The same architecture with random weights: what a number is when nothing has been learned."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dynprobe.errors import ModelError
from dynprobe.probes._discover import discover
from dynprobe.probes._subject import Subject

__all__ = ["random_twin"]


def random_twin(subject: Subject, *, seed: int = 0) -> Subject:
    """Build the subject's model anew from its configuration, initialised as its class initialises it.

    Args:
        subject: A subject whose model is a ``PreTrainedModel``; it is left alone.
        seed: Seed of the weights.

    Returns:
        A subject of the same shape, dtype, device and tokenizer.

    Raises:
        ModelError: If the model has no configuration to be built from.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> trained = tiny_llama()
        >>> twin = random_twin(trained, seed=1)
        >>> twin.n_layers, bool((twin.model.lm_head.weight == trained.model.lm_head.weight).all())
        (3, False)
    """
    model: Any = subject.model
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "init_weights"):
        raise ModelError(
            f"{subject.name} ({type(model).__name__}) is no transformers model, so its random twin cannot be built "
            "from a configuration; pass baseline=<a module with random weights>, or baseline=None"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(model)(copy.deepcopy(config))
    twin = twin.to(subject.device, subject.dtype).eval()
    return discover(twin, tokenizer=subject.tokenizer, name=f"{subject.name} (random)")
