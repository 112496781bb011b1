"""Read-outs of the output distribution: entropy, margin, NLL, and KL and flips between two runs.

A vocabulary row is a hundred thousand numbers, so everything is done on a few rows at a time, inside the cache: one
pass for the maximum, one for the shifted logits, one for their exponentials, two sums. The two largest logits come from
group maxima, not from a sort.

KL(clean ‖ arm) is not taken as a difference of two log-normalisers, which would leave 1e-6 nats of rounding in float32.
With d = arm − clean − c, KL = log(1 + Σ p·expm1(d)) − Σ p·d for any constant c; with c near Σ p·(arm − clean) both
terms are of the size of the KL itself, and logits that are near each other are subtracted without rounding. Rows with
differences beyond 60 nats, or with a common shift so large that its rounding shows, are done in float64. Arms of one
clean row share its softmax; everything else is done arm by arm, so no arm sees the others.

A row with a logit that is not finite has no read-out: NaN, not a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._result import Array

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["lens_output", "output_metrics", "paired_arms", "paired_output"]

#: What one core works on at a time: half of a usual second-level cache.
CHUNK_BYTES = 1 << 20
CHUNK_BYTES_DEVICE = 1 << 28
GROUP = 192
#: Differences of log-probabilities beyond which a row is done in float64.
FAR = 60.0
#: Differences up to which float32 rows take the series of expm1.
NEAR = 2.0**-5
#: Differences up to which no growth exceeds a quarter: e^x − 1 − x < 1/4.
MODEST = 0.625
#: Square of a common shift of all logits, in units of the KL, beyond which its rounding shows.
SHIFTED = 2.0**14


def _arithmetic(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(n_rows: int, vocab: int, device: torch.device, size: int) -> Iterator[slice]:
    budget = CHUNK_BYTES * torch.get_num_threads() if device.type == "cpu" else CHUNK_BYTES_DEVICE
    rows = max(1, budget // max(1, vocab * size))
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def _group_tops(x: torch.Tensor) -> torch.Tensor:
    """Largest entry of every group of neighbours, the last group being what is left over, [r, groups]."""
    vocab = x.shape[1]
    size = min(GROUP, vocab)
    whole = vocab // size * size
    tops = x[:, :whole].unflatten(1, (-1, size)).amax(-1)
    return tops if whole == vocab else torch.cat([tops, x[:, whole:].amax(-1, keepdim=True)], 1)


def _members(group: torch.Tensor, vocab: int) -> torch.Tensor:
    """Columns of each row's group; of a group cut short by the end of the row, the last columns there are."""
    size = min(GROUP, vocab)
    return (group * size).clamp(max=vocab - size)[:, None] + torch.arange(size, device=group.device)


def _best(x: torch.Tensor, tops: torch.Tensor) -> torch.Tensor:
    """First index of the largest of each row of [r, V], whose group maxima are known."""
    members = _members(tops.argmax(-1).to(x.device), x.shape[1])
    return members.gather(1, x.gather(1, members).argmax(-1, keepdim=True))[:, 0]


def _top_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest, second largest, and the first index of the largest, per row of [r, V]."""
    rows, vocab = x.shape
    if vocab < 4 * GROUP:
        first, where = x.max(-1)
        rest = x.scatter(1, where[:, None], -torch.inf) if vocab > 1 else x.new_full((rows, 1), -torch.inf)
        return first, rest.amax(-1), where
    tops = _group_tops(x)
    first, group = tops.max(-1)
    members = _members(group, vocab)
    inside = x.gather(1, members)
    where = inside.argmax(-1)
    other = tops.scatter(1, group[:, None], -torch.inf)
    second = torch.maximum(inside.scatter(1, where[:, None], -torch.inf).amax(-1), other.amax(-1))
    return first, second, members.gather(1, where[:, None])[:, 0]


def _flat(logits: torch.Tensor) -> torch.Tensor:
    return logits.detach().reshape(-1, logits.shape[-1])


def _double(x: torch.Tensor) -> Array:
    return x.double().cpu().numpy()


def output_metrics(
    logits: Float[torch.Tensor, "*rows vocab"], targets: Int[torch.Tensor, "*rows"] | None = None
) -> dict[str, Float[np.ndarray, "*rows"]]:
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


def _dot(p: torch.Tensor, x: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    return torch.mul(p, x, out=scratch).sum(-1)


def _growth(
    p: torch.Tensor, d: torch.Tensor, lift: torch.Tensor, total: torch.Tensor, reach: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """Σ p·expm1(d) of [r, V] rows; ``lift`` = Σ p·d, ``total`` = Σ p, ``reach`` = max |d|; ``w`` is written over.

    Each row takes the cheapest road that keeps its digits. Beside a growth of a quarter the rounding of exp is nothing.
    Below it Σ p·d is kept apart, so that what is summed, expm1(d) − d ≥ 0, cannot cancel; and where d is so small that
    this difference would itself be rounding, it is its series, to a relative d³/60.
    """
    near = reach <= (NEAR if d.dtype == torch.float32 else 0.0)
    small = ~(reach > MODEST)
    n_near = int(near.sum())
    growth = lift
    if n_near < len(near):
        if not bool(small.all()):
            growth = _dot(p, torch.exp(d, out=w), w).double() - total
            small |= growth <= 0.25
        if bool(small.gt(near).any()):
            growth = growth.where(~small, lift + _dot(p, torch.expm1(d, out=w).sub_(d), w).double())
    if n_near:
        torch.mul(d, 1 / 24, out=w).add_(1 / 6).mul_(d).add_(0.5).mul_(d).mul_(d)
        growth = growth.where(~near, lift + _dot(p, w, w).double())
    return growth


def _sums(
    clean: torch.Tensor, arm: torch.Tensor, p: torch.Tensor, total: torch.Tensor, d: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """Shift, Σ p·d / Σ p, Σ p·expm1(d) / Σ p and largest d of [r, V] rows, float64 [4, r].

    ``p`` is softmax(clean) and ``total`` its sum, 1 but for rounding; ``d`` and ``w`` are written over.
    """
    torch.sub(arm, clean, out=d)
    shift = _dot(p, d, w)
    d -= shift[:, None]
    top = d.amax(-1)
    lift = _dot(p, d, w).double()
    growth = _growth(p, d, lift, total, torch.maximum(top, -d.amin(-1)), w)
    return torch.stack([shift.double(), lift / total, growth / total, top.double()])


def _kl(clean: torch.Tensor, arm: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """KL of [n, V] rows from their sums."""
    shift, lift, growth, top = sums
    kl = torch.log1p(growth) - lift
    odd = (~(top < FAR) | ~(shift.square() <= SHIFTED * kl)).nonzero()[:, 0]
    for some in _chunks(len(odd), clean.shape[1], clean.device, 8):
        c = torch.log_softmax(clean[odd[some]].double(), -1)
        a = torch.log_softmax(arm[odd[some].to(arm.device)].to(clean.device, torch.float64), -1)
        kl[odd[some]] = torch.linalg.vecdot(c.exp(), c - a)
    return kl.clamp(min=0.0).where(torch.isfinite(kl), torch.nan)


def _against(clean: torch.Tensor, arms: Sequence[torch.Tensor]) -> tuple[Array, Array]:
    """KL and flips [arms, n] of arms [n, V] against clean rows [n, V]."""
    (n, vocab), device = clean.shape, clean.device
    kl, flip = np.empty((2, len(arms), n))
    if n == 0:
        return kl, flip
    dtype = torch.float64 if torch.float64 in (clean.dtype, *(arm.dtype for arm in arms)) else torch.float32
    sums = torch.empty((len(arms), 4, n), dtype=torch.float64, device=device)
    tops: list[list[torch.Tensor]] = [[] for _ in range(len(arms) + 1)]
    scratch = torch.empty((3, 0, vocab), dtype=dtype, device=device)
    # Half the rows of a single pass: five arrays of this size are in use at a time.
    for rows in _chunks(n, vocab, device, 16 if dtype == torch.float64 else 8):
        c = clean[rows].to(dtype)
        if not scratch.shape[1]:
            scratch = torch.empty((3, *c.shape), dtype=dtype, device=device)
        p, d, w = scratch[:, : len(c)]
        total = torch.softmax(c, -1, out=p).sum(-1).double()
        tops[-1].append(_group_tops(c))
        for k, arm in enumerate(arms):
            a = arm[rows].to(device, dtype)
            tops[k].append(_group_tops(a))
            sums[k, :, rows] = _sums(c, a, p, total, d, w)
    best = _best(clean, torch.cat(tops[-1]))
    for k, arm in enumerate(arms):
        kl[k] = _double(_kl(clean, arm, sums[k]))
        flip[k] = _double(_best(arm, torch.cat(tops[k])).to(device) != best)
    return kl, np.where(np.isnan(kl), np.nan, flip)


def paired_output(
    logits_clean: Float[torch.Tensor, "batch pos vocab"], logits_arm: Float[torch.Tensor, "batch pos vocab"]
) -> dict[str, Float[np.ndarray, "batch pos"]]:
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
    with torch.no_grad():
        kl, flip = _against(_flat(logits_clean), [_flat(logits_arm)])
    shape = tuple(logits_clean.shape[:2])
    return {"kl_clean_pert": kl.reshape(shape), "flip": flip.reshape(shape)}


def paired_arms(
    logits_clean: Float[torch.Tensor, "pos vocab"],
    logits_arms: Sequence[Float[torch.Tensor, "pos vocab"]] | Float[torch.Tensor, "arm pos vocab"],
) -> dict[str, Float[np.ndarray, "arm pos"]]:
    """KL(clean ‖ arm) and top-1 flips of several arms of one clean row, whose softmax they share.

    What an arm gets does not depend on the other arms, to the last bit.

    Args:
        logits_clean: [T, V].
        logits_arms: Arms of one dtype, each [T, V].

    Returns:
        ``kl_clean_pert`` (nats) and ``flip``, float64 [arms, T], as of :func:`paired_output`.

    Raises:
        MetricError: The shapes differ from the clean one, or the dtypes from each other.

    Example:
        >>> import torch
        >>> clean = torch.tensor([[0.75, 0.25]]).log()
        >>> out = paired_arms(clean, [clean, clean.flip(-1)])
        >>> [round(float(kl), 4) for kl in out["kl_clean_pert"][:, 0]], out["flip"][:, 0].tolist()
        ([0.0, 0.5493], [0.0, 1.0])
    """
    arms = list(logits_arms)
    if logits_clean.ndim != 2 or any(arm.shape != logits_clean.shape for arm in arms):
        found = sorted({str(list(arm.shape)) for arm in arms})
        raise MetricError(
            f"paired_arms takes logits[pos, vocab] and arms of the same shape, found {list(logits_clean.shape)} and "
            f"{', '.join(found)}."
        )
    if len(kinds := {str(arm.dtype) for arm in arms}) > 1:
        raise MetricError(f"paired_arms takes arms of one dtype, found {', '.join(sorted(kinds))}; convert them first.")
    with torch.no_grad():
        kl, flip = _against(logits_clean.detach(), [arm.detach() for arm in arms])
    return {"kl_clean_pert": kl, "flip": flip}


def lens_output(
    lens_logits: Float[torch.Tensor, "batch pos vocab"], model_logits: Float[torch.Tensor, "batch pos vocab"]
) -> dict[str, Float[np.ndarray, "batch pos"]]:
    """Lens entropy, KL(model ‖ lens) and disagreement about the top token at one depth.

    Args:
        lens_logits: [B, T, V], the states of one depth through the model's own tail.
        model_logits: [B, T, V], the model's own logits.

    Returns:
        ``lens_entropy`` and ``lens_kl``, nats, and ``lens_flip``, 1 where the top tokens differ, float64 [B, T].

    Example:
        >>> lens, model = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 100.0]]])
        >>> {name: round(value.item(), 4) for name, value in lens_output(lens, model).items()}
        {'lens_entropy': 0.6931, 'lens_kl': 0.6931, 'lens_flip': 1.0}
    """
    paired = paired_output(model_logits, lens_logits)
    return {
        "lens_entropy": output_metrics(lens_logits)["entropy"],
        "lens_kl": paired["kl_clean_pert"],
        "lens_flip": paired["flip"],
    }
