"""Ask a model for the last token's logits only, where that changes nothing else.

The head is a third of a small model's work, so it is left out for positions nobody reads. Some models take the wish
further and narrow the states of their upper blocks too; then states of the other positions would be missing. So one
forward of a few tokens is watched before the wish is made.
"""

from __future__ import annotations

import torch

from dynprobe.errors import ModelError
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._outputs import hidden_of
from dynprobe.probes._subject import Subject
from dynprobe.probes._trial_calls import trial_ids

__all__ = ["last_only"]

_FACT = "narrows_for_last_logits"


def last_only(subject: Subject) -> dict[str, int]:
    """Return the argument that asks for the last position's logits; empty where it would narrow states."""
    if not subject.accepts("logits_to_keep"):
        return {}
    if _FACT not in subject.facts:
        subject.facts[_FACT] = _narrows(subject)
    return {} if subject.facts[_FACT] else {"logits_to_keep": 1}


def _narrows(subject: Subject) -> bool:
    """Whether any block hands on fewer positions than it would for all logits."""
    ids = trial_ids(subject.model).to(subject.device)
    widths: list[int] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, output: widths.append(hidden_of(output).shape[-2]))
        for block in subject.blocks
    ]
    try:
        with evaluating(subject.model), torch.no_grad():
            subject.model(**{subject.token_argument: ids, "logits_to_keep": 1})
    except (ModelError, RuntimeError, TypeError, ValueError, IndexError):
        return True  # a model that cannot run this text may run the user's: then with all logits
    finally:
        for handle in handles:
            handle.remove()
    return any(width != ids.shape[1] for width in widths)
