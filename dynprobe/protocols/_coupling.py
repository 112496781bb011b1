"""Block coupling of a real model: do all its blocks act along the same directions?

For each block l the Jacobian of its residual part, J^l = ∂f^l(X)_{t2}/∂x_{t1}, is taken through the model's own
forward: unit tangents are put on token t1 at every depth, and what arrives at token t2 one block later, less the
tangent itself where t1 = t2, is a column of J^l. One pass over the model gives a stretch of columns of every block's
Jacobian. The table holds ``coupling.mk/1`` of every pair of blocks.

The work is dim rows of the whole text per prompt: meant for widths up to about a thousand, and refused above
``max_dim``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import SiteError, UsageError
from dynprobe.metrics._coupling import coupling_mk, singular
from dynprobe.metrics._inputs import eps_of
from dynprobe.metrics._registry import format_id
from dynprobe.metrics._result import Array
from dynprobe.probes import Subject, as_subject, capture, tokenize
from dynprobe.probes._inputs import Prompts
from dynprobe.probes._noise import row_key_from_tokens
from dynprobe.probes._tangent import carry, check_chain

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CouplingResult", "coupling"]


@dataclass(frozen=True, eq=False)
class CouplingResult:
    """Coupling of all pairs of blocks.

    Attributes:
        matrix: m_K ``[prompt, layer_1, layer_2]``: layer_1's Jacobian in layer_2's frame; NaN where undefined.
        reasons: Why, same shape, None beside a number.
        gap: Smallest relative gap of the frame ``[prompt, layer]``; the value moves by about rounding/gap.
        sigma: Top K singular values ``[prompt, layer, K]``.
        jacobians: ``[prompt, layer, out, in]`` where they were kept, else None.
        head: One entry per prompt with what every row of the table repeats.
    """

    matrix: Array
    reasons: Any
    gap: Array
    sigma: Array
    jacobians: Array | None
    head: tuple[dict[str, Any], ...]

    def frame(self) -> pd.DataFrame:
        """Return one row per prompt and ordered pair of layers, with ``m_k``, ``reason`` and ``gap``."""
        import pandas as pd

        return pd.DataFrame(
            {
                **head, "layer_1": i, "layer_2": j, "m_k": self.matrix[p, i, j], "reason": self.reasons[p, i, j],
                "gap": self.gap[p, j],
            }
            for p, head in enumerate(self.head)
            for i in range(self.matrix.shape[1])
            for j in range(self.matrix.shape[2])
        )  # fmt: skip


class _Columns:
    """Collects what arrives at one token and puts the same unit tangents down again."""

    def __init__(self, frame: Tensor, target: int) -> None:
        self.frame, self.target = frame, target
        self.columns: list[Array] = []

    def placed(self, frame: Tensor) -> None:
        """Unit tangents are exact in every dtype."""

    def meet(self, depth: int, state: Tensor, tangents: Tensor) -> Tensor:
        own = self.frame[:, self.target].to(tangents.device).double()  # zero unless source and target are one token
        self.columns.append((tangents[:, self.target].double() - own).cpu().numpy().T)
        return self.frame


def _jacobians(subject: Subject, row: list[int], source: int, target: int, chunk: int) -> Array:
    state = capture(subject, [row], logits=None).states[0][0]
    dim = state.shape[-1]
    depths = range(1, subject.n_layers + 1)
    parts = []
    for first in range(0, dim, chunk):
        width = min(chunk, dim - first)
        frame = torch.zeros(width, len(row), dim)
        frame[torch.arange(width), source, first + torch.arange(width)] = 1.0
        turn = _Columns(frame, target)
        carry(subject, row, state, frame, turn, at=0, depths=depths)
        parts.append(np.stack(turn.columns))
    return np.concatenate(parts, axis=-1)


def coupling(
    model: Subject | nn.Module,
    prompts: Prompts,
    *,
    k: int = 8,
    position: int = -1,
    source: int | None = None,
    chunk: int = 64,
    max_dim: int = 1024,
    keep: bool = False,
    chat_template: str = "none",
) -> CouplingResult:
    """Measure how far the blocks of a model share their top singular directions.

    m_K(J^i, J^j) = ‖U_{j,K}ᵀ J^i V_{j,K} − S_{i,K}‖_F/‖S_{i,K}‖_F for every pair of layers i, j.

    Args:
        model: A subject or a module.
        prompts: Texts or lists of token ids; each is run alone.
        k: Singular directions that are compared, K.
        position: Token t2 whose update is looked at, negative from the end.
        source: Token t1 whose state is varied; default the same.
        chunk: Columns per forward; more need more memory.
        max_dim: Width above which the work is refused.
        keep: Keep the Jacobians in the result, ``[prompt, layer, dim, dim]`` in float64.
        chat_template: ``"auto"`` wraps texts as a user turn.

    Returns:
        The layer × layer matrix of each prompt.

    Raises:
        UsageError: If the model is wider than ``max_dim``, or ``k`` is larger than its width.
        SiteError: If a prompt has no such token, or the source comes after the target.

    Source: arXiv 2407.07810; 9A.6 of the metric definitions.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> result = coupling(tiny_llama(), [[5, 6, 7, 8]], k=4)
        >>> result.matrix.shape, bool((np.diagonal(result.matrix[0]) < 1e-6).all())
        ((1, 3, 3), True)
    """
    subject = as_subject(model)
    dim = subject.dim or 0
    if dim > max_dim:
        raise UsageError(
            f"{subject.name} has width {dim}; its Jacobians take {dim} rows a prompt. Allow it: max_dim={dim}"
        )
    if not 1 <= k <= dim or chunk < 1:
        raise UsageError(f"k={k} singular directions were asked for; {subject.name} has width {dim}")
    rows = tokenize(subject, prompts, chat_template=chat_template)
    check_chain(subject)
    eps = eps_of(subject.state_dtype or torch.float32)
    n = subject.n_layers
    matrix, reasons = np.full((len(rows), n, n), np.nan), np.full((len(rows), n, n), None, dtype=object)
    gap, sigma = np.full((len(rows), n), np.nan), np.full((len(rows), n, k), np.nan)
    kept, heads = [], []
    for p, row in enumerate(rows):
        target, start = _token(position, row, p), _token(position if source is None else source, row, p)
        if start > target:
            raise SiteError(f"token {start} comes after token {target} and cannot act on it")
        found = _jacobians(subject, row, start, target, chunk)
        kept.append(found)
        heads.append({
            "prompt": p, "row_key": row_key_from_tokens(row), "model": subject.name,
            "metric_id": format_id("coupling.mk/1", {"K": k}), "k": k, "source": start, "target": target, "n": dim,
            "dtype": str(subject.state_dtype).removeprefix("torch."),
        })  # fmt: skip
        finite = [bool(np.isfinite(j).all()) for j in found]
        parts = [singular(j, k) if ok else None for j, ok in zip(found, finite, strict=True)]
        for i, one in enumerate(parts):
            if one is not None:
                gap[p, i], sigma[p, i] = one.gap, one.s
            for j, two in enumerate(parts):
                if one is None or two is None:
                    reasons[p, i, j] = "nonfinite"
                else:
                    matrix[p, i, j], reasons[p, i, j] = coupling_mk(found[i], one, found[j], two, eps)
    return CouplingResult(matrix, reasons, gap, sigma, np.stack(kept) if keep else None, tuple(heads))


def _token(position: int, row: list[int], number: int) -> int:
    index = position + len(row) if position < 0 else position
    if not 0 <= index < len(row):
        raise SiteError(f"position {position} was asked for; prompt {number} has {len(row)} tokens")
    return index
