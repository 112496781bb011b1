"""Which weights a subject has right now: part of a run's identity, and the key of everything cached about a model.

Weights that came from files are known by the hash of the files, as long as nobody has touched them since. A module
built in memory, and one whose weights were edited after loading, is known by the hash of what it holds: otherwise two
models of one shape would share a calibration, and the second would be handed the finished run of the first.
"""

from __future__ import annotations

from dynprobe import models
from dynprobe.probes import Subject

__all__ = ["weights_of"]


def weights_of(subject: Subject) -> str:
    """Hash a subject's weights as they are now and keep the hash in ``subject.facts``, where the rest reads it.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> weights_of(tiny_llama(seed=0)) == weights_of(tiny_llama(seed=1))
        False
    """
    if _from_files(subject):
        return str(subject.facts["weights_hash"])
    subject.facts |= {"weights_hash": models.weights_hash(subject.model), "source": "module"}
    return str(subject.facts["weights_hash"])


def _from_files(subject: Subject) -> bool:
    """Whether the files' hash still says what is in memory: no tensor was written to, none was added or taken away."""
    if not subject.facts.get("weights_hash") or subject.facts.get("source") == "module":
        return False
    parameters = list(subject.model.parameters())
    known = subject.facts.get("n_parameters")
    return not any(p._version for p in parameters) and known in (None, sum(p.numel() for p in parameters))
