"""How far the four matrices of attention are from the tying under which attention is gradient descent.

A CEM has W_O = W_Qᵀ and W_V = W_K. A Transformer has four matrices, and whether it is near that tying depends on what
counts as near. Per head h, with rows of length D (W_O transposed, so that all four are ``[dh, D]``):

- ``energy.tying{kind=vector}``: 1 − |cos| of the flattened matrices, the distance that is left after the best scalar.
  It compares row by row, in the basis the head happens to have.
- ``energy.tying{kind=subspace}``: normalised chordal distance of the row spaces. It forgets the basis.
- ``energy.circuit``: cos between the whole map W_O W_V that a head writes with and the whole form W_Qᵀ W_K that it
  looks with. A head computes the same with (G W_V, W_O G⁻¹) as with (W_V, W_O), so only this number is a property of
  the function and not of the basis, and it has a sign: descent needs +1.

All are free of scale. None needs data, and chance is not 0: unrelated subspaces of rank r in D dimensions have
distance √(1 − r/D) and not 1, which stands beside the value as ``chance``; ``other_heads`` is what heads of the same
layer that do not belong together have.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array, eps_of
from dynprobe.metrics._range import in_range
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result

__all__ = ["KINDS", "Tying", "circuit_cosine", "tying"]

KINDS = ("vector", "subspace")


class Tying(NamedTuple):
    """Distances of the heads of one layer.

    Args:
        distance: Of each head, ``[head]``; NaN where a matrix is 0.
        cosine: Signed cosine of the flattened matrices ``[head]`` (both kinds).
        other_heads: Mean distance of pairs of different heads; NaN for one head.
        chance: Distance that unrelated matrices of these ranks have (``vector``: expected for Gaussian ones).
    """

    distance: Array
    cosine: Array
    other_heads: float
    chance: float


def _flat_cosines(a: Array, b: Array) -> Array:
    x, y = a.reshape(len(a), -1), b.reshape(len(b), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = x / np.linalg.norm(x, axis=1, keepdims=True), y / np.linalg.norm(y, axis=1, keepdims=True)
    return np.clip(x @ y.T, -1.0, 1.0)


def _bases(a: Array, eps: float) -> list[Array]:
    """Orthonormal rows spanning each head's row space."""
    out = []
    for head in a:
        _, s, vt = np.linalg.svd(head, full_matrices=False)
        out.append(vt[s > max(head.shape) * eps * s.max(initial=0.0)])
    return out


def _chordal(a: list[Array], b: list[Array]) -> Array:
    table = np.full((len(a), len(b)), np.nan)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            rank = min(len(x), len(y))
            if rank:
                table[i, j] = math.sqrt(max(0.0, 1.0 - float(((x @ y.T) ** 2).sum()) / rank))
    return table


def tying(a: Array, b: Array, kind: str = "vector", eps: float = 2.0**-52) -> Tying:
    """Return the distances between two matrices that a CEM would have tied.

    Args:
        a: Matrices of the heads ``[head, row, dim]``, such as W_Q.
        b: The other ones, same shape, such as W_Oᵀ.
        kind: ``vector`` (1 − |cos| of the flattened matrices) or ``subspace`` (√(1 − ‖Q_aQ_bᵀ‖_F²/r), Q orthonormal
            bases of the row spaces, r the smaller rank).
        eps: Rounding unit, for ranks.

    Example:
        >>> w = np.eye(2, 4)[None]
        >>> tying(w, -3 * w).distance, tying(w, w[:, ::-1], "subspace").distance, tying(w, w[:, ::-1]).distance
        (array([0.]), array([0.]), array([1.]))
    """
    if kind not in KINDS:
        raise MetricError(f"energy.tying/1: kind is one of {', '.join(KINDS)}, found {kind!r}.")
    cosines = _flat_cosines(a, b)
    rows, dim = a.shape[1:]
    if kind == "vector":
        table = 1.0 - np.abs(cosines)
        # |cos| of two random directions in n dimensions has the mean Γ(n/2)/(√π Γ((n+1)/2)).
        n = rows * dim
        chance = 1.0 - math.exp(math.lgamma(n / 2) - math.lgamma((n + 1) / 2)) / math.sqrt(math.pi)
    else:
        one, two = _bases(a, eps), _bases(b, eps)
        table = _chordal(one, two)
        larger = [max(len(x), len(y)) for x, y in zip(one, two, strict=True)]
        chance = math.sqrt(max(0.0, 1.0 - float(np.mean(larger)) / dim)) if larger else math.nan
    apart = table[~np.eye(len(a), dtype=bool)]
    other = float(apart[np.isfinite(apart)].mean()) if np.isfinite(apart).any() else math.nan
    return Tying(np.diagonal(table).copy(), np.diagonal(cosines).copy(), other, chance)


def circuit_cosine(w_q: Array, w_k: Array, w_v: Array, w_o: Array) -> Array:
    """Return cos between what each pair of heads writes with and looks with, ``[head (W_O, W_V), head (W_Q, W_K)]``.

    The entry (g, h) is ⟨W_Ogᵀ W_Vg, W_Qhᵀ W_Kh⟩_F over the norms; the D×D products are never formed.

    Args:
        w_q: W_Q ``[head, dh, dim]``.
        w_k: W_K, one per query head, likewise.
        w_v: W_V, likewise.
        w_o: W_O transposed, likewise.

    Example:
        >>> w = np.random.default_rng(0).normal(size=(1, 2, 4))
        >>> circuit_cosine(w, w, w, w).round(12), circuit_cosine(w, w, w, -w).round(12)
        (array([[1.]]), array([[-1.]]))
    """

    def products(p: Array, q: Array, r: Array, s: Array) -> Array:
        """⟨p_gᵀ q_g, r_hᵀ s_h⟩ for all g, h."""
        left = np.einsum("gid,hjd->ghij", p, r, optimize=True)
        right = np.einsum("gid,hjd->ghij", q, s, optimize=True)
        return np.asarray((left * right).sum((-1, -2)))

    writes = np.sqrt(np.diagonal(products(w_o, w_v, w_o, w_v)))
    looks = np.sqrt(np.diagonal(products(w_q, w_k, w_q, w_k)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.clip(products(w_o, w_v, w_q, w_k) / (writes[:, None] * looks), -1.0, 1.0))


def _matrices(inputs: tuple[Any, ...], mask: Any, metric_id: str) -> tuple[list[Array], Any]:
    read = [as_array(x, metric_id) for x in inputs]
    shapes = [list(x.shape) for x, _ in read]
    if mask is not None or any(x.ndim != 3 or x.shape != read[0][0].shape or not x.size for x, _ in read):
        raise MetricError(
            f"{metric_id} takes {len(read)} matrices [head, row, dim] of one shape without mask (W_O transposed, "
            f"grouped keys and values repeated), found {', '.join(map(str, shapes))}."
        )
    return [x for x, _ in read], max((d for _, d in read), key=eps_of)


def _result(values: Array, finite: bool, dtype: Any, metric_id: str, extras: dict[str, Any]) -> Result:
    ok = np.isfinite(values)
    whole = bool(ok.all()) and finite
    reason = None if whole else ("zero-denominator" if finite else "nonfinite")
    value = float(values.mean()) if whole else math.nan
    name = str(dtype).removeprefix("torch.")
    return Result(
        value, reason, float(ok.mean()), int(ok.sum()), 1, metric_id, dtype=name, per_unit=values, extras=extras
    )


def _tying(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (a, b), dtype = _matrices(inputs, mask, metric_id)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return _result(np.full(len(a), np.nan), False, dtype, metric_id, {})
    (a,), (b,) = in_range(a), in_range(b)
    found = tying(a, b, params["kind"], eps_of(dtype))
    extras = {"cosine": found.cosine, "other_heads": found.other_heads, "chance": found.chance}
    return _result(found.distance, True, dtype, metric_id, extras)


def _circuit(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    matrices, dtype = _matrices(inputs, mask, metric_id)
    heads = len(matrices[0])
    if not all(np.isfinite(m).all() for m in matrices):
        return _result(np.full(heads, np.nan), False, dtype, metric_id, {})
    table = circuit_cosine(*(in_range(m)[0] for m in matrices))
    apart = table[~np.eye(heads, dtype=bool)]
    other = float(apart.mean()) if apart.size else math.nan
    return _result(np.diagonal(table).copy(), True, dtype, metric_id, {"other_heads": other})


_COMMON: dict[str, Any] = {
    "unit": "1",
    "source": "dynprobe; the tying is that of Causal Energy Minimization, arXiv 2605.07588",
    "groups": frozenset({"optional", "energy"}),
}
register(
    MetricSpec(
        id="energy.tying/1",
        sentence="Distance of two weight matrices of a head that tied attention would share, whatever their scale.",
        formula=(
            "kind=vector: 1 − |⟨A,B⟩_F|/(‖A‖_F‖B‖_F); kind=subspace: √(1 − ‖Q_A Q_Bᵀ‖_F²/r), Q orthonormal bases of "
            "the row spaces, r the smaller rank; per head, value = mean over heads; A, B = W_Q, W_Oᵀ or W_K, W_V"
        ),
        latex=(
            r"\operatorname*{mean}_{\mathrm{head}} "
            r"\begin{cases} 1-\dfrac{|\langle A,B\rangle_F|}{\lVert A\rVert_F\,\lVert B\rVert_F} & "
            r"\text{kind=vector} \\"
            r"\sqrt{1-\lVert Q_A Q_B^{\mathsf T}\rVert_F^2/r} & \text{kind=subspace} \end{cases}"
        ),
        input="weight[head,row,dim], weight[head,row,dim]",
        value_range="[0, 1]; 0 tied",
        invariances=frozenset({"R", "S", "S_l", "P"}),
        params={"kind": "vector"},
        column="energy_tying",
        vectors=(
            "B = cA, c ≠ 0: 0", "rows swapped: 1 (vector, orthonormal rows), 0 (subspace)",
            "orthogonal row spaces: 1", "(1,0), (1,1): 1 − 1/√2; subspace 1/√2", "A = 0 → NaN zero-denominator",
        ),
        **_COMMON,
    ),
    _tying,
    arity=2,
)  # fmt: skip
register(
    MetricSpec(
        id="energy.circuit/1",
        sentence="Cosine between the map a head writes with and the form it looks with; 1 under tied weights.",
        formula=(
            "⟨W_O W_V, W_Qᵀ W_K⟩_F/(‖W_O W_V‖_F ‖W_Qᵀ W_K‖_F) per head, value = mean over heads; without position "
            "(rotary models: at distance 0)"
        ),
        latex=(
            r"\operatorname*{mean}_{\mathrm{head}}\ "
            r"\frac{\langle W_O W_V,\ W_Q^{\mathsf T}W_K\rangle_F}{\lVert W_O W_V\rVert_F\,\lVert W_Q^{\mathsf "
            r"T}W_K\rVert_F}"
        ),
        input="W_Q, W_K, W_V, W_Oᵀ, each weight[head,row,dim]",
        value_range="[−1, 1]; 1 tied",
        invariances=frozenset({"R", "S", "S_l", "P"}),
        column="energy_circuit",
        vectors=(
            "W_O = W_Qᵀ, W_V = W_K: 1", "W_O = −W_Qᵀ, W_V = W_K: −1", "W_V → G W_V, W_O → W_O G⁻¹: unchanged",
            "a matrix 0 → NaN zero-denominator",
        ),
        **_COMMON,
    ),
    _circuit,
    arity=4,
)  # fmt: skip
