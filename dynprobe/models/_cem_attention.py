"""The interaction energy, whose descent is attention with tied weights.

With n the block's normalised input (constant), A_k = diag(d_k) + W_Qᵀ W_K and causal j ≤ i,

    ε(u_i)   = −τ Σ_k log Σ_j exp s_ijk,      s_ijk = (1/τ) n_jᵀ A_kᵀ u_i + b_ijk
    −∂ε/∂u_i = Σ_k [ W_Qᵀ Σ_j α_ij^k k_j + d_k ∘ Σ_j α_ij^k n_j ],      k = W_K n,  α = softmax_j s

so values are keys and the output projection is W_Qᵀ (or P_k W_Qᵀ, folded once per forward). ε is concave: a step along
the force never raises it, whatever the step size, and only the norm keeps the state from running away.

Decisions and known limits. RoPE rotates queries and keys; its exact gradient then rotates the output back, which is
done on the weighted sum, at the cost of one rotation. The diagonal's part of the update needs explicit weights and,
with one P per head, K sums of width D: about D/dh times the cost of the weighted keys. Without it (``diagonal="none"``
or ``diag_in_update=False``) the fused kernel of PyTorch is used, with energies asked for or not: they are computed
beside it and change nothing. The cache holds keys and, with a diagonal, n (as the "values"); without one, keys alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.errors import UsageError
from dynprobe.models._cem_frame import Frame, alibi_slopes, rotate, rotate_back
from dynprobe.models._cem_preconditioner import Preconditioner
from dynprobe.models._cem_step import EnergyStep, Field, wide

if TYPE_CHECKING:
    from dynprobe.models._cem_config import CemConfig

__all__ = ["InteractionField", "InteractionStep"]


@dataclass
class InteractionField(Field):
    """What attention's recursion does not change.

    Args:
        keys: k = W_K n, [batch, K, T, dh], rotated where RoPE is on.
        inputs: n, [batch, T, D]; None without a diagonal.
        output: P_k W_Qᵀ of all heads, [K dh, D]; None where the preconditioner is not folded.
        bias: b with −∞ where the query may not look, [batch or 1, K or 1, S, T]; None where the causal kernel serves.
        angles: Rotary angles of the queries, or None.
        frame: The forward it belongs to.
    """

    keys: Tensor
    inputs: Tensor | None
    output: Tensor | None
    bias: Tensor | None
    angles: tuple[Tensor, Tensor] | None
    frame: Frame


class InteractionStep(EnergyStep):
    """One descent step on the interaction energy of one layer.

    Args:
        config: The model's configuration.
        layer: Index of the layer, which is its place in the cache.
    """

    kind = "attention"

    def __init__(self, config: CemConfig, layer: int) -> None:
        super().__init__(config, config.step_size_attention)
        D, K = config.hidden_size, config.num_attention_heads
        self.layer, self.heads, self.head_dim, self.tau = layer, K, config.head_dim, config.tau_value
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.exact = config.diag_in_update
        sizes = {"none": None, "shared": (1, D), "per_head": (K, D)}
        shape = sizes[config.diagonal]
        self.diagonal = None if shape is None else nn.Parameter(torch.zeros(shape))
        self.biases = nn.Parameter(torch.zeros(2, K)) if config.self_bias else None
        self.preconditioner: Preconditioner | None = None
        if config.preconditioner != "none":
            rank = config.rank_attention if config.preconditioner == "diag_low_rank" else 0
            self.preconditioner = Preconditioner(D, rank, K, config.psd, config.prec_init)
        self.fold = config.fold_preconditioner
        self.rope_base = config.rope_base if config.position == "rope" else None
        self.slopes = alibi_slopes(config.alibi_slopes, K) if config.position == "alibi" else None

    def field(self, n: Tensor, frame: Frame) -> InteractionField:
        """Return keys, folded output weights and biases; takes the keys into the cache."""
        keys = self._split(self.k_proj(n))
        angles = None if self.rope_base is None else frame.angles(self.rope_base, self.head_dim)
        if angles is not None:
            keys = rotate(keys, angles)
        inputs = None if self.diagonal is None else n
        if frame.cache is not None:
            # Without a diagonal nothing but keys is needed again; the cache then holds values of width 0.
            kept = keys[..., :0] if inputs is None else self._split(inputs)
            keys, kept = frame.cache.update(keys, kept, self.layer)
            if keys.shape[-2] != frame.n_key:
                raise UsageError(
                    f"the cache of layer {self.layer} holds {keys.shape[-2]} positions, the attention mask and the "
                    f"tokens say {frame.n_key}. CEM takes a DynamicCache (cache_implementation='dynamic') and the "
                    "mask of all tokens, cached ones included."
                )
            inputs = None if inputs is None else self._merge(kept)
        return InteractionField(keys, inputs, self._output(), self._bias(frame), angles, frame)

    def logits(self, u: Tensor, field: InteractionField, precise: bool = False) -> Tensor:
        """Return s_ijk, [batch, K, S, T], −∞ where the query may not look; ``precise`` for float32 or better."""
        cast: Callable[[Tensor], Tensor] = wide if precise else (lambda t: t)
        q = self._split(functional.linear(cast(u), cast(self.q_proj.weight)) if precise else self.q_proj(u))
        if field.angles is not None:
            q = rotate(q, (cast(field.angles[0]), cast(field.angles[1])))
        s = q @ cast(field.keys).mT / self.tau
        if self.diagonal is not None:
            s = s + cast(self._diagonal_logits(cast(u), field))
        return s + cast(field.frame.bias(None) if field.bias is None else field.bias)

    def energy_per_head(self, u: Tensor, field: InteractionField) -> Tensor:
        """Return −τ log Σ_j exp s_ijk, [batch, K, S]."""
        return -self.tau * torch.logsumexp(self.logits(u, field, precise=True), -1)

    def energy(self, u: Tensor, field: InteractionField) -> Tensor:
        """Return ε(u_i), [batch, S]."""
        return self.energy_per_head(u, field).sum(1)

    def move(self, u: Tensor, field: InteractionField) -> Tensor:
        """Return Σ_k P_k s_k."""
        if field.output is None:
            return self.force(u, field, lambda s: s)
        weights = self._weights_if_needed(u, field)
        update = self._merge(self._mixed(u, field, weights)) @ field.output
        if weights is None or self.diagonal is None or not self.exact:
            return update
        return update + self._diagonal_move(weights, field)

    def force(self, u: Tensor, field: InteractionField, through: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return Σ_k s_k, or Σ_k P_k through(s_k); forms K vectors of width D per token."""
        weights = self._weights_if_needed(u, field)
        s = self._mixed(u, field, weights) @ self.q_proj.weight.view(self.heads, self.head_dim, -1)
        if weights is not None and self.diagonal is not None and self.exact:
            s = s + self.diagonal[:, None] * self._mean_inputs(weights, field)
        if through is None:
            return s.sum(1)
        if self.preconditioner is None:
            return through(s.sum(1))
        return self.preconditioner(through(s)).sum(1)

    def curvature_bound(self, field: InteractionField) -> float:
        """Return 0: ε is a sum of minus log-sum-exps, hence concave."""
        return 0.0

    def _weights_if_needed(self, u: Tensor, field: InteractionField) -> Tensor | None:
        """α, [batch, K, S, T], where the diagonal's update or the forward asks for it; else a fused kernel serves."""
        if not field.frame.eager and (self.diagonal is None or not self.exact):
            return None
        s = self.logits(u, field)
        return torch.softmax(wide(s), -1).to(s.dtype)

    def _mixed(self, u: Tensor, field: InteractionField, weights: Tensor | None) -> Tensor:
        """Σ_j α_ij k_j, [batch, K, S, dh], rotated back where RoPE is on."""
        if weights is not None:
            o = weights @ field.keys
        else:
            q = self._split(self.q_proj(u))
            q = q if field.angles is None else rotate(q, field.angles)
            bias = field.bias
            if self.diagonal is not None:
                bias = self._diagonal_logits(u, field) + (field.frame.bias(None) if bias is None else bias)
            causal = bias is None and field.frame.n_query > 1
            o = functional.scaled_dot_product_attention(
                q, field.keys, field.keys, attn_mask=bias, is_causal=causal, scale=1 / self.tau
            )
        return o if field.angles is None else rotate_back(o, field.angles)

    def _diagonal_logits(self, u: Tensor, field: InteractionField) -> Tensor:
        """(1/τ) n_jᵀ (d_k ∘ u_i), [batch, K or 1, S, T]."""
        assert self.diagonal is not None
        assert field.inputs is not None
        scaled = u[:, None] * (self.diagonal.to(u.dtype) / self.tau)[:, None]
        return scaled @ field.inputs[:, None].to(u.dtype).mT

    def _diagonal_move(self, weights: Tensor, field: InteractionField) -> Tensor:
        """Σ_k P_k (d_k ∘ Σ_j α_ij n_j)."""
        assert self.diagonal is not None
        n = field.inputs
        assert n is not None
        if self.preconditioner is None and self.diagonal.shape[0] == 1:
            return self.diagonal[0] * (weights.sum(1) @ n)
        if self.preconditioner is None:
            return torch.einsum("bksd,kd->bsd", self._mean_inputs(weights, field), self.diagonal)
        scale = self.diagonal * self.preconditioner.diagonal()
        move = torch.einsum("bksd,kd->bsd", self._mean_inputs(weights, field), scale)
        factors = self.preconditioner.factors()
        if factors is None:
            return move
        U, V = factors
        # The low-rank part is brought down to R numbers per key before it is averaged, never up to D.
        scaled = n[:, None] * self.diagonal[:, None]
        return move + ((weights @ (scaled @ U)) @ V.mT + (weights @ (scaled @ V)) @ U.mT).sum(1)

    def _mean_inputs(self, weights: Tensor, field: InteractionField) -> Tensor:
        """Σ_j α_ij^k n_j, [batch, K, S, D], as one product per row of the batch."""
        assert field.inputs is not None
        return (weights.flatten(1, 2) @ field.inputs).unflatten(1, weights.shape[1:3])

    def _output(self) -> Tensor | None:
        if self.preconditioner is None:
            return self.q_proj.weight
        if not self.fold:
            return None
        return self.preconditioner(self.q_proj.weight.view(self.heads, self.head_dim, -1)).flatten(0, 1)

    def _bias(self, frame: Frame) -> Tensor | None:
        if self.biases is None and self.slopes is None and frame.plain:
            return None
        bias = frame.bias(self.slopes)
        if self.biases is None:
            return bias
        own, other = self.biases[:, :, None, None].to(bias.dtype)
        return bias + torch.where(frame.own(), own, other)

    def _split(self, t: Tensor) -> Tensor:
        return t.view(*t.shape[:-1], self.heads, self.head_dim).transpose(1, 2)

    def _merge(self, t: Tensor) -> Tensor:
        return t.transpose(1, 2).flatten(2)
