"""Clusters: which prompt each run belongs to, and sums inside prompts.

A bootstrap over prompts needs only what each prompt adds to a sum, and how often each prompt was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._crossing import Array

__all__ = ["cluster_index", "cluster_sums", "column"]


def column(x: Any, name: str) -> Array:
    """One number per run, float64; tensors too."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    out = np.asarray(x, dtype=np.float64)
    if out.ndim != 1:
        raise MetricError(f"{name} is one number per run, found shape {list(out.shape)}.")
    return out


def cluster_index(prompts: Sequence[Any] | None, n: int, name: str = "prompts") -> tuple[NDArray[np.int64], list[Any]]:
    """Number of the prompt of each run [n], and the prompts in the order they first come; each its own by default."""
    if prompts is None:
        return np.arange(n), list(range(n))
    labels = list(prompts)
    if len(labels) != n:
        raise MetricError(f"{name} names the prompt of each of {n} runs, found {len(labels)} names.")
    order: dict[Any, int] = {}
    for label in labels:
        order.setdefault(label, len(order))
    return np.array([order[label] for label in labels], dtype=np.int64), list(order)


def cluster_sums(x: Array, index: NDArray[np.int64], n: int) -> Array:
    """Sum of the entries of each cluster [n]."""
    return np.bincount(index, weights=x, minlength=n).astype(np.float64)
