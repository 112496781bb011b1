"""Read-outs of the output distribution: entropy, margin, NLL, and KL and flips between two runs.

A vocabulary row is a hundred thousand numbers, so everything is done on a few rows at a time, inside the cache: one
pass for the maximum, one for the shifted logits, one for their exponentials, two sums. The two largest logits come from
group maxima, not from a sort.

KL(clean ‖ arm) is not taken as a difference of two log-normalisers, which would leave 1e-6 nats of rounding in float32.
With δ = (difference of log-probabilities up to a constant) − c, KL = log(1 + Σ p·expm1(−δ)) + Σ p·δ for any constant c;
with c near Σ p·δ both terms are of the size of the KL itself. Rows with differences beyond 60 nats are done in float64.

A row with a logit that is not finite has no read-out: NaN, not a guess.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._result import Array

__all__ = ["lens_output", "output_metrics", "paired_output"]

CHUNK_BYTES = 1 << 20
CHUNK_BYTES_DEVICE = 1 << 28
GROUP = 192
FAR = 60.0


def _arithmetic(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(n_rows: int, vocab: int, device: torch.device, size: int) -> Iterator[slice]:
    budget = CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_DEVICE
    rows = max(1, budget // max(1, vocab * size))
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def _top_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest, second largest, and the first index of the largest, per row of [r, V]."""
    rows, vocab = x.shape
    if vocab < 4 * GROUP:
        first, where = x.max(-1)
        rest = x.scatter(1, where[:, None], -torch.inf) if vocab > 1 else x.new_full((rows, 1), -torch.inf)
        return first, rest.amax(-1), where
    whole = vocab // GROUP * GROUP
    tops = x[:, :whole].unflatten(1, (-1, GROUP)).amax(-1)
    if whole < vocab:
        tops = torch.cat([tops, x[:, whole:].amax(-1, keepdim=True)], 1)
    first, group = tops.max(-1)
    members = (group * GROUP).clamp(max=vocab - GROUP)[:, None] + torch.arange(GROUP, device=x.device)
    inside = x.gather(1, members)
    where = inside.argmax(-1)
    other = tops.scatter(1, group[:, None], -torch.inf)
    second = torch.maximum(inside.scatter(1, where[:, None], -torch.inf).amax(-1), other.amax(-1))
    return first, second, members.gather(1, where[:, None])[:, 0]


def _flat(logits: torch.Tensor) -> torch.Tensor:
    return logits.detach().reshape(-1, logits.shape[-1])


def _double(x: torch.Tensor) -> Array:
    return x.double().cpu().numpy()


def output_metrics(logits: torch.Tensor, targets: torch.Tensor | None = None) -> dict[str, Array]:
    """Entropy, margin and NLL of every position.

    Args:
        logits: [B, T, V], any float dtype; half types are computed in float32.
        targets: [B, T] token ids that were to be predicted there; −1 = none (NLL is NaN).

    Returns:
        ``entropy`` (nats), ``margin`` (p1 − p2) and ``nll`` (nats), float64 [B, T]; NaN where a logit is not finite.

    Raises:
        MetricError: Shapes do not fit, or a target lies outside the vocabulary.

    Example:
        >>> import torch
        >>> out = output_metrics(torch.zeros(1, 1, 4), torch.tensor([[2]]))
        >>> round(float(out["entropy"][0, 0]), 4), float(out["margin"][0, 0])
        (1.3863, 0.0)
    """
    if logits.ndim != 3:
        raise MetricError(f"output_metrics takes logits[batch, pos, vocab], found {list(logits.shape)}.")
    shape, vocab = tuple(logits.shape[:2]), logits.shape[-1]
    if targets is not None and tuple(targets.shape) != shape:
        raise MetricError(f"output_metrics: targets have shape {list(targets.shape)}, logits need {list(shape)}.")
    if targets is not None and targets.numel() and int(targets.max()) >= vocab:
        raise MetricError(f"output_metrics: target id {int(targets.max())} with a vocabulary of {vocab}.")
    x, dtype = _flat(logits), _arithmetic(logits)
    top = np.empty((4, len(x)))
    goal = None if targets is None else targets.detach().reshape(-1).to(x.device)
    size = 8 if dtype == torch.float64 else 4
    z = e = x.new_empty((0, vocab), dtype=dtype)
    with torch.no_grad():
        for rows in _chunks(len(x), vocab, x.device, size):
            block = x[rows].to(dtype)
            first, second, _ = _top_two(block)
            if len(z) != len(block):
                z, e = torch.empty_like(block), torch.empty_like(block)
            torch.sub(block, first[:, None], out=z)
            torch.exp(z, out=e)
            picked = first.new_full(first.shape, torch.nan)
            if goal is not None:
                wanted = goal[rows]
                picked = z.gather(1, wanted.clamp(min=0)[:, None])[:, 0].where(wanted >= 0, torch.nan)
            total = e.sum(-1)
            moment = torch.mul(e, z, out=e).sum(-1)
            top[:, rows] = _double(torch.stack([total, moment, second - first, picked]))
    total_, moment_, gap, at_target = top
    with np.errstate(invalid="ignore", divide="ignore"):
        log_total = np.log(np.where(np.isfinite(moment_), total_, np.nan))
        return {
            "entropy": (log_total - moment_ / total_).reshape(shape),
            "margin": np.where(np.isnan(log_total), np.nan, np.abs(np.expm1(gap)) / total_).reshape(shape),
            "nll": (log_total - at_target).reshape(shape),
        }


def _kl_rows(clean: torch.Tensor, arm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and flips of [r, V] rows, in the dtype they have."""
    top_c, _, best_c = _top_two(clean)
    top_a, _, best_a = _top_two(arm)
    z = clean - top_c[:, None]
    delta = z - (arm - top_a[:, None])
    p = z.exp_()
    p /= p.sum(-1, keepdim=True)
    delta -= torch.linalg.vecdot(p, delta)[:, None]
    far = ~(delta.amin(-1) > -FAR)
    lift = torch.linalg.vecdot(p, delta).double()
    growth = torch.linalg.vecdot(p, torch.expm1(-delta.clamp(min=-FAR))).double()
    kl = lift + torch.log1p(growth)
    if bool(far.any()):
        c = torch.log_softmax(clean[far].double(), -1)
        a = torch.log_softmax(arm[far].double(), -1)
        kl[far] = torch.linalg.vecdot(c.exp(), c - a)
    kl = kl.clamp(min=0.0).where(torch.isfinite(kl), torch.nan)
    return kl, (best_c != best_a).double().where(torch.isfinite(kl), torch.nan)


def paired_output(logits_clean: torch.Tensor, logits_arm: torch.Tensor) -> dict[str, Array]:
    """KL(clean ‖ arm) and top-1 flips at every position.

    Args:
        logits_clean: [B, T, V].
        logits_arm: [B, T, V], same positions under teacher forcing.

    Returns:
        ``kl_clean_pert`` (nats) and ``flip`` (1 where the top token differs, else 0), float64 [B, T]; NaN where a logit
        is not finite.

    Raises:
        MetricError: The shapes differ.

    Example:
        >>> import torch
        >>> same = paired_output(torch.ones(1, 1, 5), torch.ones(1, 1, 5))
        >>> float(same["kl_clean_pert"][0, 0]), float(same["flip"][0, 0])
        (0.0, 0.0)
    """
    if logits_clean.ndim != 3 or logits_clean.shape != logits_arm.shape:
        raise MetricError(
            f"paired_output takes two logits[batch, pos, vocab] of one shape, found {list(logits_clean.shape)} and "
            f"{list(logits_arm.shape)}."
        )
    shape = tuple(logits_clean.shape[:2])
    clean, arm = _flat(logits_clean), _flat(logits_arm)
    dtype = max(_arithmetic(logits_clean), _arithmetic(logits_arm), key=lambda d: d == torch.float64)
    kl, flip = np.empty(len(clean)), np.empty(len(clean))
    with torch.no_grad():
        for rows in _chunks(len(clean), clean.shape[-1], clean.device, 8 if dtype == torch.float64 else 4):
            k, f = _kl_rows(clean[rows].to(dtype), arm[rows].to(clean.device, dtype))
            kl[rows], flip[rows] = _double(k), _double(f)
    return {"kl_clean_pert": kl.reshape(shape), "flip": flip.reshape(shape)}


def lens_output(lens_logits: torch.Tensor, model_logits: torch.Tensor) -> dict[str, Array]:
    """Lens entropy, KL(model ‖ lens) and disagreement about the top token at one depth.

    Args:
        lens_logits: [B, T, V], the states of one depth through the model's own tail.
        model_logits: [B, T, V], the model's own logits.

    Returns:
        ``lens_entropy`` and ``lens_kl``, nats, and ``lens_flip``, 1 where the top tokens differ, float64 [B, T].
    """
    paired = paired_output(model_logits, lens_logits)
    return {
        "lens_entropy": output_metrics(lens_logits)["entropy"],
        "lens_kl": paired["kl_clean_pert"],
        "lens_flip": paired["flip"],
    }
