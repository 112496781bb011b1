"""Writing: from a perturbation and a batch of states to the update u and the new states, pure and without surprise.

What is written is the **kind**: ``gaussian`` noise or a fixed ``direction`` under one of the noise scales (an
``impulse`` is either of them at one place, a ``sine`` is a direction whose strength is α·sin(2π·pos/period)), or one of
three writes with a unit of their own::

    scale     h' = (1 + α) h                                    α a factor
    rotate    h' = ‖h‖ (cos α · ĥ + sin α · ê⊥)                 α an angle in radians, the norm is kept
    dropout   h' = h ⊙ m/(1 − α),  m_i = [υ_i ≥ α]              α a probability, the mean is kept

Rules that hold for all of them. *Nothing is written in place*: the input may be a stored tape. *Where nothing is asked,
nothing changes*: unselected entries, and all entries at α = 0, come back bit for bit (signed zeros, NaN and Inf
included), because the new value is chosen by a mask and never computed as h + 0. *One state, one answer*: noise depends
on its address only, and every number on its own state only, so batch size and order cannot matter. *Float32 inside,
the model's dtype outside* (float64 stays float64). *What cannot be displaced is left alone and counted*: a state
without norm has no relative noise, a state with NaN or Inf is evidence and is not touched. Gradients flow through the
states and through the units that depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.probes._draw import GAUSSIAN, UNIFORM, Draw
from dynprobe.probes._noise import NoiseSource
from dynprobe.probes._perturb import Perturb
from dynprobe.probes._scales import ScaleStats
from dynprobe.probes._site_stats import SiteStats

__all__ = ["Displacement", "apply", "displacement", "realised"]


@dataclass(frozen=True)
class Displacement:
    """An update and what could not be done.

    Args:
        u: Update of the shape of the states, float32 (float64 for float64 states); exactly 0 wherever nothing is
            written.
        written: Bool mask of the states that were asked for and have a unit (at α = 0 their update is 0).
        n_asked: int64 [batch]: states selected by the mask.
        n_zero: int64 [batch]: of those, states without a unit (zero norm under relnorm, isokl and rotate; zero MAD).
        n_nonfinite: int64 [batch]: of those, states with NaN or Inf, or too large for float32 norms.
    """

    u: Tensor
    written: Tensor
    n_asked: Tensor
    n_zero: Tensor
    n_nonfinite: Tensor

    @property
    def flagged(self) -> bool:
        """Whether any selected state was left alone."""
        return bool((self.n_zero + self.n_nonfinite).any())


def displacement(
    perturb: Perturb,
    h: Tensor,
    *,
    mask: Tensor,
    noise_source: NoiseSource | None = None,
    site_stats: SiteStats | None = None,
    donor: Tensor | None = None,
    lengths: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Displacement:
    """Compute the update of a perturbation at one site.

    Args:
        perturb: What to write; its ``where`` is not looked at, ``mask`` is.
        h: States [batch, pos, dim] or [batch, pos, slot, dim], any float dtype; not changed.
        mask: Which states to write, bool [batch, pos] or with slots.
        noise_source: Address of the noise (row keys, site, positions); needed by every kind that draws.
        site_stats: Calibration of the site, for ``coordstd`` and ``cov``.
        donor: States of the shape of ``h``, for ``interp``.
        lengths: Real tokens of each row's prompt [batch], for ``neftune``.
        magnitude: One strength per row [batch] in place of ``perturb.alpha``: a sweep in one batch, or the relative
            norm that a solver found for ``isokl``.

    Returns:
        The update with its counts.

    Raises:
        CalibrationError: The scale needs a calibration that is not there.
        UsageError: An argument that the scale or kind needs is missing or has the wrong shape.

    Example:
        >>> h = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
        >>> source = NoiseSource(["p1"], "resid_post.6", [[0, 1]])
        >>> d = displacement(Perturb(alpha=0.1), h, mask=torch.tensor([[True, True]]), noise_source=source)
        >>> round(float(d.u[0, 0].norm()), 6), int(d.n_zero[0])
        (0.5, 1)
    """
    mask = _checked_mask(h, mask)
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    full = bool(mask.all())

    def pick(x: Tensor) -> Tensor:
        """Take the selected states out of something that broadcasts over ``h`` without its last axis or with it."""
        return x.reshape(-1, x.shape[-1]) if full else x[mask]

    states = pick(h).to(dtype)
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    strengths = _strengths(perturb, h, magnitude, dtype)
    alpha = strengths if strengths.ndim > 1 else pick(_per_state(strengths, mask))
    draw = Draw(perturb, h, mask, noise_source, pick, dtype)
    u, dead = _write(perturb, states, norm, alpha, draw, site_stats, donor, lengths)
    u = u.expand(states.shape)  # a fixed direction under a fixed unit is one vector for all states
    # An infinite entry makes a norm infinite, a NaN makes it NaN: one small test instead of one over all entries.
    good = torch.isfinite(norm[:, 0] + torch.linalg.vector_norm(u, dim=-1))
    if dead is not None:
        good &= ~dead
    n_asked = _row_counts(mask)
    n_zero = n_nonfinite = torch.zeros_like(n_asked)
    written = mask
    if not bool(good.all()):
        u = torch.where(good[:, None], u, 0.0)
        written = _spread(good, mask)
        if dead is not None:
            n_zero = _row_counts(_spread(dead & torch.isfinite(norm[:, 0]), mask))
        n_nonfinite = n_asked - n_zero - _row_counts(written)
    if full:
        return Displacement(u.reshape(h.shape), written, n_asked, n_zero, n_nonfinite)
    everywhere = torch.zeros(h.shape, dtype=dtype, device=h.device)
    everywhere[mask] = u
    return Displacement(everywhere, written, n_asked, n_zero, n_nonfinite)


def apply(h: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """Return h + u where the mask selects and u ≠ 0, and h itself, bit for bit, everywhere else.

    The sum is formed in the dtype of ``u`` and rounded once to that of ``h``.

    Args:
        h: States [batch, pos, dim] or [batch, pos, slot, dim]; not changed.
        u: Update of the same shape.
        mask: Bool [batch, pos] or with slots.

    Returns:
        New states of the dtype of ``h``.

    Example:
        >>> h = torch.tensor([[[-0.0, 1.0]]])
        >>> apply(h, torch.tensor([[[0.0, 0.5]]]), torch.tensor([[True]]))
        tensor([[[-0.0000, 1.5000]]])
    """
    mask = _checked_mask(h, mask)
    changed = u != 0
    if not bool(mask.all()):
        changed &= mask[..., None]
    return torch.where(changed, (h.to(u.dtype) + u).to(h.dtype), h)


def realised(h: Tensor, h_new: Tensor) -> Tensor:
    """Return h_new − h in float32 or better: the update the model really received after rounding to its dtype."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h_new.to(dtype) - h.to(dtype)


def _write(
    perturb: Perturb,
    states: Tensor,
    norm: Tensor,
    alpha: Tensor,
    draw: Draw,
    stats: SiteStats | None,
    donor: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Dispatch to the formula; returns u [n, dim] and which states have no unit."""
    kind, scale = perturb.kind, perturb.noise_scale
    if kind == "scale":
        return alpha * states, None
    if kind == "dropout":
        return torch.where(draw(UNIFORM) >= alpha, (alpha / (1 - alpha)) * states, -states), None
    if kind == "rotate":
        return _rotate(states, norm, alpha, draw(GAUSSIAN))
    if kind == "sine":
        alpha = alpha * draw.wave()
    eps = None if scale.law is None else draw.direction() if draw.directed else draw(scale.law)
    rows = None if lengths is None else _per_state(torch.as_tensor(lengths).to(states), draw.mask)
    place = draw.source.site if draw.source else ""
    known = ScaleStats(norm, scale.name, stats, place, draw.h.shape, draw.pick, donor, rows)
    return scale.written(states, eps, alpha, known)


def _rotate(h: Tensor, norm: Tensor, alpha: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    if h.shape[-1] < 2:
        raise UsageError("kind=rotate needs states of at least two dimensions.")
    unit = h / norm
    across = eps
    for _ in range(2):  # once leaves a rounding remainder along h that grows when ε happens to lie near it
        across = across - (across * unit).sum(-1, keepdim=True) * unit
    across = across / torch.linalg.vector_norm(across, dim=-1, keepdim=True)
    # cos α − 1 = −2 sin²(α/2) keeps small angles exact and makes α = 0 an exact zero.
    return (-2 * torch.sin(alpha / 2).square()) * h + (norm * torch.sin(alpha)) * across, norm[:, 0] == 0


def _strengths(perturb: Perturb, h: Tensor, magnitude: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return α as [1, 1], or one per row as [batch]."""
    if magnitude is None:
        if perturb.noise_scale.solved and perturb.alpha != 0:
            raise UsageError(
                f"scale={perturb.scale} needs a magnitude per row, solved so that the KL is alpha; alpha is the target."
            )
        return torch.full((1, 1), perturb.alpha, dtype=dtype, device=h.device)
    rows = torch.as_tensor(magnitude).to(h.device, dtype)
    if rows.shape != (h.shape[0],) or not bool(torch.isfinite(rows).all()):
        raise UsageError(f"magnitude takes {h.shape[0]} finite numbers, one per row, not shape {tuple(rows.shape)}.")
    if perturb.kind == "dropout" and not bool(((rows >= 0) & (rows < 1)).all()):
        raise UsageError("dropout takes probabilities, 0 ≤ magnitude < 1.")
    return rows


def _checked_mask(h: Tensor, mask: Tensor) -> Tensor:
    if not h.is_floating_point() or h.ndim not in (3, 4):
        raise UsageError(
            f"states are [batch, pos, dim] or [batch, pos, slot, dim] floats, not {h.dtype} {tuple(h.shape)}."
        )
    if mask.dtype != torch.bool or mask.shape not in (h.shape[:2], h.shape[:-1]):
        raise UsageError(f"mask is bool {tuple(h.shape[:2])}, not {mask.dtype} {tuple(mask.shape)}.")
    mask = mask.to(h.device)
    return mask if mask.ndim == h.ndim - 1 else mask[..., None].expand(h.shape[:-1])


def _per_state(rows: Tensor, mask: Tensor) -> Tensor:
    """Spread one number per row over the states: [batch] → [batch, pos(, slot), 1]."""
    return rows.reshape(-1, *(1,) * mask.ndim).expand(*mask.shape, 1)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    table = torch.zeros_like(mask)
    table[mask] = values
    return table


def _row_counts(mask: Tensor) -> Tensor:
    return mask.flatten(1).sum(1)
