"""The columns of the energy lens that need no data: how near a layer's four matrices are to those of a CEM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dynprobe.metrics._energy_tying import circuit_cosine, tying
from dynprobe.metrics._inputs import eps_of
from dynprobe.metrics._result import Array
from dynprobe.probes._attention_weights import AttentionWeights, Refusal

__all__ = ["tying_columns"]


def tying_columns(
    weights: AttentionWeights | Refusal, twins: Sequence[AttentionWeights | Refusal] = ()
) -> tuple[dict[str, float], dict[str, Array]]:
    """Return the columns of one layer, means over heads with their nulls, and the values of each query head.

    Args:
        weights: The layer's matrices.
        twins: Those of models with random weights.

    Example:
        >>> from dynprobe.probes._attention_weights import attention_weights
        >>> from dynprobe.testing import tiny_llama
        >>> columns, heads = tying_columns(attention_weights(tiny_llama())[0])
        >>> sorted(heads), heads["circuit"].shape
        (['circuit', 'subspace_kv', 'subspace_qo', 'tying_kv', 'tying_qo'], (4,))
    """
    if isinstance(weights, Refusal):
        return {}, {}
    columns, heads = _columns(weights)
    random = [_columns(t)[0] for t in twins if isinstance(t, AttentionWeights)]
    if random:
        columns |= {f"{name}_random": _mean(np.array([r.get(name, np.nan) for r in random])) for name in heads}
    return columns, heads


def _columns(w: AttentionWeights) -> tuple[dict[str, float], dict[str, Array]]:
    q, k, v, o = (_numpy(m) for m in (w.w_q, w.w_k, w.w_v, w.w_o))
    eps = eps_of(w.w_q.dtype)
    columns: dict[str, float] = {}
    heads: dict[str, Array] = {}
    if v.shape == q.shape:
        cosines = circuit_cosine(q, k, v, o)
        heads["circuit"] = np.diagonal(cosines).copy()
        apart = cosines[~np.eye(len(q), dtype=bool)]
        columns |= {"circuit": _mean(heads["circuit"]), "circuit_other_heads": _mean(apart)}
    # Key heads that several query heads share count once, or their repetitions would pass for other heads.
    kept = np.array(w.key_heads)
    group = np.searchsorted(kept, np.arange(len(q)), side="right") - 1
    for pair, a, b, spread in (("qo", q, o, np.arange(len(q))), ("kv", k[kept], v[kept], group)):
        if a.shape != b.shape:
            continue
        for name, kind in (("tying", "vector"), ("subspace", "subspace")):
            found = tying(a, b, kind, eps)
            heads[f"{name}_{pair}"] = found.distance[spread]
            columns |= {f"{name}_{pair}": _mean(found.distance), f"{name}_{pair}_other_heads": found.other_heads}
            if kind == "subspace":
                columns[f"{name}_{pair}_chance"] = found.chance
    return columns, heads


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size and np.isfinite(values).all() else float("nan")


def _numpy(t: torch.Tensor) -> Array:
    return np.asarray(t.detach().double().cpu().numpy())
