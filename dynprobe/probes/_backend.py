"""Which mechanism reads and writes a subject's states: torch hooks, or nnsight traces.

A backend is a property of the subject, so that everything done with it goes the same way: a capture, the arms of a run,
its self-tests. Hooks are the default and can do everything; nnsight (:mod:`dynprobe.probes._nnsight`) carries reading,
perturbing and generating. What needs more asks for hooks here, and says so instead of taking them in silence.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.probes._subject import Subject

__all__ = ["BACKENDS", "need_hooks", "nnsight_version", "on_backend", "require_nnsight"]

BACKENDS = ("hooks", "nnsight")
#: The versions the adapter was written against; nnsight is rewritten now and then.
_WANTED = ((0, 8, 1), (0, 9))


def nnsight_version() -> str | None:
    """Return the version of the installed nnsight, without importing it; None where there is none."""
    try:
        return version("nnsight")
    except PackageNotFoundError:
        return None


def require_nnsight(why: str) -> str:
    """Return the version of nnsight.

    Args:
        why: What it is needed for.

    Raises:
        UsageError: If it is not installed, or in a version this adapter does not know.
    """
    found = nnsight_version()
    if found is None:
        raise UsageError(f"{why} needs nnsight: pip install 'dynprobe[nnsight]'")
    number = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if not _WANTED[0] <= number < _WANTED[1]:
        raise UsageError(
            f"{why} needs nnsight ≥ 0.8.1 and < 0.9, and {found} is installed: pip install 'dynprobe[nnsight]'"
        )
    return found


def on_backend(subject: Subject, backend: str | None) -> Subject:
    """Return the subject as another backend reads it; the very same one where it is read so already.

    Args:
        subject: The subject.
        backend: ``"hooks"``, ``"nnsight"``, or None for no change.

    Raises:
        UsageError: If there is no such backend, its library is not installed, or it cannot read this model.
    """
    if backend is None or backend == subject.backend:
        return subject
    if backend not in BACKENDS:
        raise UsageError(f"backend={backend!r}; it is {' or '.join(BACKENDS)}.{did_you_mean(str(backend), BACKENDS)}")
    if backend == "hooks":
        return replace(subject, backend=backend)
    found = require_nnsight("backend='nnsight'")
    if subject.turns:
        raise UsageError(
            f"{subject.name} runs its modules in a loop, and backend=nnsight reads models whose blocks run once; leave "
            "the backend out (hooks count the calls)"
        )
    facts = {**subject.facts, "versions": {**subject.facts.get("versions", {}), "nnsight": found}}
    return replace(subject, backend=backend, facts=facts)


def need_hooks(subject: Subject, what: str) -> None:
    """Refuse what only hooks can do.

    Raises:
        UsageError: If the subject is read through another backend.
    """
    if subject.backend != "hooks":
        raise UsageError(
            f"{what} needs backend=hooks, and {subject.name} is read through {subject.backend}; load it without "
            "backend, or capture with backend='hooks'"
        )
