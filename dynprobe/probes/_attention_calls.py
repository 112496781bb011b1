"""What reaches softmax attention: queries, keys, values and biases, as the model itself made them.

Rotations, query and key norms, grouped keys, masks, windows and ALiBi are all done by the time a model calls
``scaled_dot_product_attention``. That one call is watched, so none of them has to be written down a second time and
none can be forgotten. Attention that is computed some other way is not seen, and nothing is guessed about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionCall", "AttentionWatch"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of softmax attention, grouped heads repeated.

    Attributes:
        q: Queries ``[batch, head, query, dh]``, as the model made them, with their graph.
        k: Keys ``[batch, head, key, dh]``.
        v: Values ``[batch, head, key, dv]``.
        bias: Added to the logits, −∞ where the query may not look, broadcastable to ``[batch, head, query, key]``.
        scale: Factor on the dot products, 1/τ.
        kv_heads: Heads of keys and values before they were repeated by the kernel.
        output: What attention returned, ``[batch, head, query, dv]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    scale: float
    kv_heads: int
    output: Tensor

    def mixed(self) -> Tensor:
        """Σ_j α_ij v_j by the plain formula, in float32 or better."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        s = self.scale * (self.q.to(wide) @ self.k.to(wide).mT) + self.bias
        return torch.softmax(s, -1) @ self.v.to(wide)


class AttentionWatch(TorchFunctionMode):
    """While it is entered, every call of ``scaled_dot_product_attention`` is reported; the call itself is untouched.

    Args:
        seen: Called with each call after it was made.
    """

    def __init__(self, seen: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass the call on and report it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self.seen(_read(result, *args, **kwargs))
        return result


def _read(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> AttentionCall:  # fmt: skip
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if enable_gqa and kv_heads != heads:
        key = key.repeat_interleave(heads // kv_heads, -3)
        value = value.repeat_interleave(heads // value.shape[-3], -3)
    elif kv_heads == 1 != heads:  # the kernel broadcasts a single head
        key, value = (t.expand(*t.shape[:-3], heads, *t.shape[-2:]) for t in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    bias = torch.zeros((), dtype=wide, device=query.device)
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        bias = bias.masked_fill(~seen, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = bias.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        bias = bias + attn_mask.to(wide)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return AttentionCall(query, key, value, bias, scale, kv_heads, output)
