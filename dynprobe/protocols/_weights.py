"""What a subject is right now: part of a run's identity, and the key of everything cached about a model.

Weights that this very call loaded from files are known by the hash of the files. A module that the caller holds may
have been edited in any way (a tensor written through ``.data``, a parameter replaced, a constant changed), so it is
known by the hash of what it holds and of its configuration: otherwise two models of one shape would share a
calibration, and the second would be handed the finished run of the first.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dynprobe import models
from dynprobe.probes import Subject
from dynprobe.probes._dispatch import hooks_of_others

__all__ = ["foreign_hooks", "structure_of", "weights_of"]


def weights_of(subject: Subject, *, just_loaded: bool = False) -> str:
    """Hash a subject's weights as they are now and keep the hash in ``subject.facts``, where the rest reads it.

    Args:
        subject: The subject.
        just_loaded: The weights were read from files in this call and nobody else holds them.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> weights_of(tiny_llama(seed=0)) == weights_of(tiny_llama(seed=1))
        False
    """
    if not (just_loaded and subject.facts.get("weights_hash")):
        subject.facts |= {"weights_hash": models.weights_hash(subject.model), "source": "module"}
    return str(subject.facts["weights_hash"])


def structure_of(subject: Subject) -> dict[str, Any]:
    """What is read of a model besides its weights: other blocks of the same weights are another track.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> structure_of(tiny_llama())["blocks"]
        'model.layers.*'
    """
    config = getattr(subject.model, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    # Where the files lie and which library reads them change no layer.
    settings = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "class": type(subject.model).__name__,
        "blocks": subject.block_path,
        "n_layers": subject.n_layers,
        "dim": subject.dim,
        **({"turns": [str(turn) for turn in subject.turns]} if subject.turns else {}),
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def foreign_hooks(subject: Subject) -> int:
    """Number of forward hooks on the model that are not dynprobe's: they change numbers and have no hash."""
    return len(hooks_of_others(subject.model))
