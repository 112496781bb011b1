"""``doctor``: what was found in a model, and whether its numbers can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dynprobe.probes import Check, Subject, tokenize
from dynprobe.probes import load as load_subject
from dynprobe.prompts import load_prompts
from dynprobe.protocols._selfchecks import all_checks
from dynprobe.protocols._weights import weights_of

__all__ = ["Diagnosis", "doctor"]


@dataclass(frozen=True)
class Diagnosis:
    """The outcome of ``doctor``.

    Attributes:
        found: Structure of the model.
        checks: The five self-tests.
        provenance: Where the weights came from.
    """

    found: dict[str, Any]
    checks: dict[str, Check]
    provenance: dict[str, Any]

    @property
    def healthy(self) -> bool:
        """Whether all self-tests passed."""
        return all(check.passed for check in self.checks.values())

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "healthy": self.healthy, "found": self.found, "provenance": self.provenance,
            "checks": {name: check.as_dict() for name, check in self.checks.items()},
        }  # fmt: skip


def doctor(model: str | nn.Module | Subject, **options: Any) -> Diagnosis:
    """Examine a model: find its parts and run the five self-tests.

    Args:
        model: Name of a model, a module, or a subject.
        **options: Handed to :func:`dynprobe.load`.

    Returns:
        The diagnosis.

    Raises:
        ModelError: If no chain of blocks is found.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> doctor(tiny_llama()).checks["null"].value
        0.0
    """
    subject = load_subject(model, **options)
    weights_of(subject, just_loaded=isinstance(model, str))
    if subject.tokenizer is not None:
        rows = tokenize(subject, [p.text for p in load_prompts(limit=6)])
    else:
        vocab = subject.vocab_size or 2
        rows = [[(7 * i + 3 * j + 1) % vocab for i in range(6 + 2 * j)] for j in range(4)]
    checks = all_checks(subject, rows, fresh=True)
    keep = (
        "model_id",
        "kind",
        "location",
        "commit",
        "weights_hash",
        "original_dtype",
        "n_parameters",
        "versions",
        "notes",
    )
    return Diagnosis(subject.describe(), checks, {k: subject.facts[k] for k in keep if k in subject.facts})
