"""Controls that are another model, another text, or another place.

A response to a write says little by itself. The same model with random weights shows what the architecture alone does;
the same tokens in random order show what meaning adds; and the same energy written at another depth shows whether the
place matters. (The sham write and the flipped sign are cells of the grid itself.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch

from dynprobe.errors import ModelError
from dynprobe.probes import Perturb, Subject, discover
from dynprobe.probes._noise import uniform

__all__ = ["energy_matched", "scrambled", "twin_of"]

_SITE = "scramble"
#: Not 0, with which small test models are often made: a twin must not be the model itself.
TWIN_SEED = 31415


def scrambled(row: Sequence[int], key: str, seed: int = 0) -> list[int]:
    """Return the tokens of a row in an order drawn under its name; the first token stays, as sinks do.

    Example:
        >>> mixed = scrambled([7, 1, 2, 3, 4, 5], "p")
        >>> mixed[0], sorted(mixed)
        (7, [1, 2, 3, 4, 5, 7])
    """
    rest = list(row[1:])
    order = np.argsort(uniform(seed, key, _SITE, 0, len(rest)), kind="stable")
    return [row[0], *(rest[i] for i in order)]


def twin_of(subject: Subject, seed: int = TWIN_SEED) -> Subject:
    """Return a subject of the same architecture whose weights are drawn anew, as the model's class initialises them.

    Raises:
        ModelError: If the model cannot be built from its configuration.
    """
    config = getattr(subject.model, "config", None)
    if config is None:
        raise ModelError(
            f"{subject.name} has no configuration to build a random twin from; leave twin out of --controls"
        )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        twin = type(subject.model)(config)
    except (TypeError, ValueError) as error:
        raise ModelError(f"no twin of {subject.name} can be built from its configuration: {error}") from error
    finally:
        torch.random.set_rng_state(state)
    twin = twin.to(device=subject.device, dtype=subject.dtype).eval()
    if hasattr(subject.model, "generation_config"):  # its texts end at the same tokens
        twin.generation_config = copy.deepcopy(subject.model.generation_config)
    made = discover(twin, tokenizer=subject.tokenizer, name=f"{subject.name} (random twin, seed {seed})")
    made.resumable = subject.resumable
    return made


def energy_matched(perturb: Perturb, layer: int) -> Perturb:
    """Return the write that takes a perturbation's energy to another layer, its strength still open.

    Noise of the same seed at another layer is another noise. The strength is set per row, in relative norm, such that
    the mean size ‖u‖ over the written states is the one that was written at the first place.
    """
    kind = perturb.kind if perturb.kind in ("gaussian", "direction", "impulse", "sine") else "gaussian"
    return Perturb(
        math.copysign(1.0, perturb.alpha), scale="relnorm", kind=kind, seed=perturb.seed,
        period=perturb.period, direction=perturb.direction,
        where=perturb.where.replace(layers=str(layer)),
    )  # fmt: skip
