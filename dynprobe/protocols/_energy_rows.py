"""Rows through the energy lens: energies, cosines and slopes of every token, before anything is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import ModelError
from dynprobe.metrics._energy import alignment
from dynprobe.metrics._inputs import eps_of
from dynprobe.metrics._result import Array
from dynprobe.probes import Subject
from dynprobe.probes._attention_descent import Descent, energy_probe
from dynprobe.probes._attention_weights import Refusal

__all__ = ["Seen", "look"]


@dataclass(eq=False)
class Seen:
    """One model's rows.

    Attributes:
        tokens: Per (layer, iteration) a list over prompts of values per token, from the first position that counts.
        heads: Likewise, energies ``[head, pos]``.
        reasons: Why a layer cannot be read.
        weights: The matrices of each layer.
    """

    tokens: dict[tuple[int, int], list[dict[str, Array]]]
    heads: dict[tuple[int, int], list[Array]]
    reasons: dict[int, str]
    weights: Sequence[Any]


def look(subject: Subject, rows: Sequence[Sequence[int]], first: int) -> Seen:
    """Send token rows through a subject's lens.

    Raises:
        ModelError: If no layer can be read.
    """
    lens = energy_probe(subject)
    reasons = {w.layer: w.reason for w in lens.weights if isinstance(w, Refusal)}
    if len(reasons) == len(lens.weights):
        raise ModelError(f"no layer of {subject.name} can be read by the energy lens: {reasons[min(reasons)]}")
    eps = eps_of(subject.dtype)
    seen = Seen({}, {}, reasons, lens.weights)
    for row in rows:
        found = lens.descend(row)
        seen.reasons |= {d.layer: d.reason for d in found if isinstance(d, Refusal)}
        read = [d for d in found if isinstance(d, Descent)]
        elsewhere = _other_layers(read, eps)
        for d in read:
            key = d.layer, d.iteration
            nothing = np.full(d.energy.shape[1], np.nan)
            values = {"energy": d.energy.sum(0), "cos": nothing, "slope": nothing, "cos_other_heads": nothing}
            values["cos_other_layers"] = elsewhere.get(key, nothing)
            if d.force is not None and d.update is not None:
                values["cos"], values["slope"] = alignment(d.force, d.update, eps)
                if d.crossed is not None:
                    values["cos_other_heads"] = alignment(d.crossed, d.update, eps)[0]
            seen.tokens.setdefault(key, []).append({name: v[first:] for name, v in values.items()})
            seen.heads.setdefault(key, []).append(d.energy[:, first:])
    for key in [k for k in seen.tokens if k[0] in seen.reasons]:  # refused on one row, refused
        del seen.tokens[key], seen.heads[key]
    return seen


def _other_layers(read: Sequence[Descent], eps: float) -> dict[tuple[int, int], Array]:
    """Mean cosine of each layer's −∇ε with the updates of the other layers at the same iteration, per token."""
    out: dict[tuple[int, int], Array] = {}
    for iteration in sorted({d.iteration for d in read}):
        pairs = [(d.layer, d.force, d.update) for d in read if d.iteration == iteration]
        units = {layer: (_unit(f, eps), _unit(u, eps)) for layer, f, u in pairs if f is not None and u is not None}
        if len(units) < 2:
            continue
        # The mean of the cosines with a set of unit vectors is the inner product with their mean.
        total = np.sum([u for _, u in units.values()], axis=0)
        for layer, (force, update) in units.items():
            out[layer, iteration] = (force * (total - update)).sum(-1) / (len(units) - 1)
    return out


def _unit(x: Array, eps: float) -> Array:
    """Unit vectors; NaN where there is no direction."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(length > 16 * eps * length.max(initial=0.0), x / length, np.nan))
