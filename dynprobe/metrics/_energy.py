"""The interaction energy of an attention head, and whether attention moves the state down it.

Attention with tied weights is one step of gradient descent on

    ε(q_i) = −τ log Σ_j exp s_ij,   s_ij = q_iᵀk_j/τ + b_ij,   −∂ε/∂q_i = Σ_j α_ij k_j,   α = softmax_j s

with keys held constant (Causal Energy Minimization). Any softmax attention has queries and keys, so ε and its gradient
exist for it too; whether its *update* follows −∇ε is a question, because values and output have weights of their own.
``energy.interaction`` is the height, ``energy.align`` the cosine between what descent would add and what was added.

An energy is comparable along the iterations of one layer and between models at one layer and position. It is not
comparable between layers (each has its own landscape), nor between positions: over n equal logits it is −τ log n lower.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import _mask as as_mask
from dynprobe.metrics._inputs import as_array, eps_of
from dynprobe.metrics._range import in_range
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result

__all__ = ["alignment", "interaction"]


def interaction(
    q: Tensor, k: Tensor, *, scale: float | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the interaction energy of every head and query, and its negative gradient by the query.

    ε_ih = −τ log Σ_j exp(q_ihᵀk_jh/τ + b_ijh) and −∂ε_ih/∂q_ih = Σ_j α_ijh k_jh, in float32 or better.

    Args:
        q: Queries as they meet the keys (rotated, normalised), ``[…, head, query, dh]``.
        k: Keys, one set per query head, ``[…, head, key, dh]``.
        scale: 1/τ, the factor on the dot products; None for 1/√dh.
        bias: Added to the logits, −∞ where the query may not look, ``[…, head or 1, query, key]``; None for a causal
            mask (query i sees keys 0…i).

    Returns:
        Energies ``[…, head, query]`` in the unit of qᵀk, and pulls ``[…, head, query, dh]``. A query that may look at
        nothing has NaN.

    Source: Causal Energy Minimization, arXiv 2605.07588, eqs. 1–2.

    Example:
        >>> energy, pull = interaction(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]]), scale=1.0)
        >>> energy, pull[..., 0]
        (tensor([[-0.0000, -0.6931]]), tensor([[1., 2.]]))
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = scale * (q @ k.mT)
    if bias is None:
        seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~seen, -torch.inf)
    else:
        s = s + bias.to(wide)
    energy = -torch.logsumexp(s, -1) / scale
    energy = torch.where(torch.isposinf(energy), torch.nan, energy)
    return energy, torch.softmax(s, -1) @ k


def alignment(force: Array, update: Array, eps: float = 2.0**-52) -> tuple[Array, Array]:
    """Return the cosine and the inner product of two vectors, row by row.

    Args:
        force: −∇ε, ``[…, dim]``.
        update: What was added, same shape.
        eps: Rounding unit; a vector not longer than 16 of them times the largest of its kind has no direction.

    Returns:
        Cosines (NaN where a vector has no direction) and slopes ⟨force, update⟩, ``[…]``.

    Example:
        >>> alignment(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 0.0]]))
        (array([0.70710678,        nan]), array([1., 0.]))
    """
    f, u = np.asarray(force, np.float64), np.asarray(update, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        slope = (f * u).sum(-1)
    (f,), (u,) = in_range(f), in_range(u)
    nf, nu = np.linalg.norm(f, axis=-1), np.linalg.norm(u, axis=-1)
    flat = (nf <= 16 * eps * nf.max(initial=0.0)) | (nu <= 16 * eps * nu.max(initial=0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = ((f / nf[..., None]) * (u / nu[..., None])).sum(-1)
    return np.where(flat, np.nan, np.clip(cosine, -1.0, 1.0)), slope


def _interaction(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, *, scale: Any = None, bias: Any = None
) -> Result:
    (q, q_dtype), (k, _) = (as_array(x, metric_id) for x in inputs)
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or mask is not None:
        raise MetricError(
            f"{metric_id} takes queries[head, query, dh] and keys[head, key, dh] without mask (use bias), found "
            f"{list(q.shape)} and {list(k.shape)}; repeat grouped keys to one set per query head."
        )
    if not q.shape[2]:
        raise MetricError(f"{metric_id} takes queries and keys of at least one dimension, found {list(q.shape)}.")
    if bias is None and q.shape[1] != k.shape[1]:
        raise MetricError(f"{metric_id}: {q.shape[1]} queries and {k.shape[1]} keys have no causal mask; give bias=.")
    if scale is not None and not scale > 0:
        raise MetricError(f"{metric_id}: scale is 1/τ, a number above 0, found {scale!r}.")
    table = None if bias is None else torch.from_numpy(as_array(bias, metric_id)[0])
    if table is not None:
        wanted = (q.shape[0], q.shape[1], k.shape[1])
        try:
            table = table.expand(wanted)
        except RuntimeError:
            raise MetricError(
                f"{metric_id}: bias is [head or 1, query, key] = {list(wanted)}, found {list(table.shape)}."
            ) from None
    energy, _ = interaction(torch.from_numpy(q), torch.from_numpy(k), scale=scale, bias=table)
    heads = energy.numpy()
    dtype = str(q_dtype).removeprefix("torch.")
    if not heads.size:
        return Result(math.nan, "empty", math.nan, q.shape[1], 0, metric_id, dtype=dtype)
    ok = np.isfinite(heads).all(0)
    tokens = np.where(ok, heads.sum(0), np.nan)
    value = float(tokens[ok].mean()) if 2 * ok.sum() >= len(ok) else math.nan
    reason = None if math.isfinite(value) else "coverage"
    per_head = heads[:, ok].mean(1) if ok.any() else np.full(len(heads), np.nan)
    return Result(
        value, reason, float(ok.mean()), int(ok.sum()), 1, metric_id, dtype=dtype, per_unit=tokens,
        extras={"per_head": per_head, "grid": heads},
    )  # fmt: skip


def _align(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    shaped = [as_array(x, metric_id) for x in inputs]
    if any(x.ndim != 2 or x.shape != shaped[0][0].shape for x, _ in shaped):
        found = " and ".join(str(list(x.shape)) for x, _ in shaped)
        raise MetricError(f"{metric_id} takes force[pos, dim] and update[pos, dim] of one shape, found {found}.")
    coarse = max((d for _, d in shaped), key=eps_of)
    keep = as_mask(mask, shaped[0][0].shape[:1], metric_id)
    cos, slope = alignment(shaped[0][0][keep], shaped[1][0][keep], eps_of(coarse))
    ok = np.isfinite(cos)
    per_unit = np.full(len(keep), np.nan)
    per_unit[keep] = cos
    dtype = str(coarse).removeprefix("torch.")
    if not keep.any():
        return Result(math.nan, "empty", math.nan, 0, 1, metric_id, dtype=dtype, per_unit=per_unit)
    value, reason = (float(cos[ok].mean()), None) if 2 * ok.sum() >= len(ok) else (math.nan, "coverage")
    if not ok.any():
        finite = np.isfinite(slope).any()
        reason = "zero-denominator" if finite else "nonfinite"
    return Result(
        value, reason, float(ok.mean()), int(ok.sum()), 1, metric_id, dtype=dtype, per_unit=per_unit,
        extras={"slope": float(slope[ok].mean()) if ok.any() else math.nan},
    )  # fmt: skip


register(
    MetricSpec(
        id="energy.interaction/1",
        sentence="Interaction energy of attention: minus the log-sum-exp of a query's logits, sum over heads.",
        formula=(
            "ε_i = Σ_k −τ log Σ_j exp(q_ikᵀk_jk/τ + b_ijk), 1/τ = scale (default 1/√dh), b causal by default; q "
            "and k as they meet (rotated, normalised); value = mean over queries"
        ),
        latex=(
            r"\varepsilon_i = -\tau\sum_k\log\sum_j\exp\Bigl(\frac{q_{ik}^{\mathsf T}k_{jk}}{\tau}+b_{ijk}\Bigr), "
            r"\qquad \frac{1}{\tau} = \mathrm{scale} = \frac{1}{\sqrt{d_h}} \text{ by default}, \qquad "
            r"\operatorname*{mean}_{i}\varepsilon_i"
        ),
        input="queries[head,query,dh], keys[head,key,dh]",
        value_range="(−∞, ∞); ≤ −Σ_k max_j (qᵀk + τb)",
        unit="qᵀk",
        invariances=frozenset({"R"}),
        source="Causal Energy Minimization, arXiv 2605.07588, eq. 1",
        column="energy",
        vectors=(
            "one key: −qᵀk", "q = 0, causal, n-th query: −τ log n", "qᵀk = 0, ln 3, τ = 1, both seen: −ln 4",
            "keys + v: ε − qᵀv", "no key seen → NaN coverage",
        ),
        groups=frozenset({"optional", "energy"}),
    ),
    _interaction,
    arity=2,
)  # fmt: skip
register(
    MetricSpec(
        id="energy.align/1",
        sentence="Cosine between the negative gradient of the energy and the update that was made, mean over tokens.",
        formula=(
            "cos_i = ⟨s_i, Δ_i⟩/(‖s_i‖‖Δ_i‖), s = −∇ε at the point the layer reads (its normalised input), Δ what the "
            "layer adds; NaN where a norm is ≤ 16·eps of the largest; value = mean over tokens; companion slope = mean "
            "⟨s_i, Δ_i⟩, the decrease of ε to first order"
        ),
        latex=(
            r"s_i = -\nabla\varepsilon, \qquad \operatorname*{mean}_{i}\frac{\langle s_i,\,\Delta_i\rangle}{\lVert "
            r"s_i\rVert\,\lVert\Delta_i\rVert}"
        ),
        input="force[pos,dim], update[pos,dim]",
        value_range="[−1, 1]; 1 for tied weights without preconditioner",
        unit="1",
        invariances=frozenset({"R", "S", "S_l", "P", "T", "scale-per-state"}),
        source="dynprobe, after Causal Energy Minimization, arXiv 2605.07588",
        column="energy_align",
        vectors=("Δ = c s, c > 0: 1", "Δ = −s: −1", "(1,0), (1,1): 1/√2, slope 1", "Δ = 0 → NaN zero-denominator"),
        groups=frozenset({"optional", "energy"}),
    ),
    _align,
    arity=2,
)
