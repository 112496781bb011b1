"""A regression task to try an architecture on in seconds: functions drawn from a Gaussian process, learned in context.

Of the published experiment with Gaussian processes only the caption is known (ten input dimensions, RMSE), so this is a
stand-in of ours and reproduces nothing. A sequence is one function f ~ GP(0, k), k(x, x') = exp(−‖x − x'‖² / 2ℓ²) with
ℓ² = 10, at points x_i ~ N(0, I) in ten dimensions; token i is (x_i, y_{i−1}), y_0 = 0, and y_i is to be predicted. Two
numbers say what an RMSE is worth: 1 without looking at anything, and that of the exact predictor, which knows k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["DIMENSIONS", "exact_rmse", "functions", "regressor", "rmse", "tokens_of"]

DIMENSIONS, LENGTH_SCALE_SQUARED, _JITTER = 10, 10.0, 1e-6


def functions(rng: np.random.Generator, count: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return places [function, point, 10] and values [function, point]."""
    x = rng.standard_normal((count, points, DIMENSIONS))
    factor = np.linalg.cholesky(_kernel(x) + _JITTER * np.eye(points))
    return x, np.einsum("fij,fj->fi", factor, rng.standard_normal((count, points)))


def tokens_of(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a model reads [function, point, 11] and what it is to predict [function, point]."""
    before = np.concatenate([np.zeros_like(y[:, :1]), y[:, :-1]], 1)
    return torch.from_numpy(np.concatenate([x, before[..., None]], -1)).float(), torch.from_numpy(y).float()


def regressor(config: dict[str, Any], seed: int) -> Any:
    """Return a CEM of this configuration that reads tokens of eleven numbers and writes one number."""
    from dynprobe.models import CemConfig, CemForCausalLM

    torch.manual_seed(seed)
    model = CemForCausalLM(CemConfig(**{**config, "vocab_size": 1}))
    width = model.config.hidden_size
    model.model.embed_tokens = nn.Identity()  # nothing is looked up
    model.read_in, model.lm_head = nn.Linear(DIMENSIONS + 1, width, bias=False), nn.Linear(width, 1, bias=False)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


def predict(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the predicted values [function, point]."""
    return model(inputs_embeds=model.read_in(tokens), use_cache=False).logits[..., 0]


@torch.no_grad()
def rmse(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Return the root of the mean squared error over all points of all functions."""
    tokens, wanted = tokens_of(x, y)
    model.eval()
    found = torch.cat([predict(model, part) for part in tokens.split(64)])
    model.train()
    return float((found - wanted).square().mean().sqrt())


def exact_rmse(x: np.ndarray, y: np.ndarray) -> float:
    """Return the error of the exact predictor E[y_i | y_1 … y_{i−1}].

    With K = L Lᵀ, the innovations are L_ii z_i where L z = y.
    """
    factor = np.linalg.cholesky(_kernel(x) + _JITTER * np.eye(x.shape[1]))
    z = np.linalg.solve(factor, y[..., None])[..., 0]
    return float(np.sqrt(np.mean((np.diagonal(factor, axis1=1, axis2=2) * z) ** 2)))


def _kernel(x: np.ndarray) -> np.ndarray:
    square = (x**2).sum(-1)
    distance = square[:, :, None] + square[:, None, :] - 2.0 * np.einsum("fid,fjd->fij", x, x)
    return np.exp(-np.maximum(distance, 0.0) / (2.0 * LENGTH_SCALE_SQUARED))
