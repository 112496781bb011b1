"""Compare captured states with what the model returns as its ``hidden_states``.

Most decoders return L + 1 of them: the state that enters each block, and at the end the last block's output, which most
have put through the final norm by then. Some return others; then it is said which, and the plain hooks alone decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynprobe.probes import Tape, identical
from dynprobe.testing._own_model import OwnModel

__all__ = ["compare_own_states"]

#: Model type → which other states it returns.
OTHER_STATES: dict[str, str] = {
    "hrm_text": "its own hidden states are those of the layers inside its modules",
    "inkling2_text": "the last of its own hidden states is a mixture of all blocks' outputs, normed",
    "rwkv": "its own hidden states are taken after every second block was halved",
}


def compare_own_states(own: OwnModel, final_norm: str | None, tape: Tape) -> tuple[bool, str]:
    """Compare a tape with the model's own hidden states.

    Args:
        own: The model without dynprobe.
        final_norm: Name of the module behind the last block.
        tape: All depths of a batch.

    Returns:
        Whether nothing contradicts, and what was found where it is not the ordinary L + 1 states.
    """
    assert tape.token_ids is not None
    found = own.hidden_states(tape.token_ids, tape.mask)
    if isinstance(found, str):
        return True, found
    depths = [_depth(entry, tape) for entry in found]
    last = len(tape.states) - 1
    if depths[-1] is None and final_norm is not None and _is_normed(own, final_norm, tape, found[-1]):
        depths[-1] = last + 1
    if depths in ([*range(last + 1)], [*range(last), last + 1]):
        return True, ""
    known = [depth for depth in depths if depth is not None]
    listed = ", ".join("–" if d is None else "norm" if d > last else str(d) for d in depths)
    note = f"its own hidden states are of the depths {listed}"
    shape = tape.states[0].shape
    shapes = [tuple(getattr(entry, "shape", ())) for entry in found]
    others = [other for other, depth in zip(shapes, depths, strict=True) if depth is None and other != shape]
    if others:
        note += f", of shape {', '.join(map(str, dict.fromkeys(others)))} where –"
    strange = len(known) + len(others) < len(depths)
    kind = str(own.model.config.model_type)
    if strange and kind in OTHER_STATES:
        strange, note = False, OTHER_STATES[kind]
    return known == sorted(set(known)) and not strange, note


def _depth(entry: object, tape: Tape) -> int | None:
    """The depth whose captured state an entry is, bit for bit."""
    if not isinstance(entry, Tensor) or entry.shape[:2] != tape.mask.shape:
        return None
    real = tape.mask
    return next((d for d, state in enumerate(tape.states) if identical(entry[real], state[real])), None)


def _is_normed(own: OwnModel, final_norm: str, tape: Tape, entry: object) -> bool:
    with torch.no_grad():
        normed = own.model.get_submodule(final_norm)(list(tape.states)[-1])
    if not isinstance(normed, Tensor) or not isinstance(entry, Tensor) or normed.shape != entry.shape:
        return False
    return torch.allclose(normed[tape.mask], entry[tape.mask])
