"""The numbers that metrics are made of, by torch operations only: what a trace computes where the model runs.

A model too large to host is measured where it is. What comes back must be small, so the states stay there and leave,
per state, a norm, and per step a length and an angle; at the last depth the chords between neighbouring tokens; of the
logits, entropy, margin and NLL. Everything else (coverage, profiles, κ per token, the series of ct and their ratio) is
arithmetic on these grids and is done at home, by the very code that measures states
(:func:`dynprobe.metrics.measure_terms`).

The functions here are **sent**: nnsight serialises their source, and the far side has no dynprobe. So a function uses
torch and the other functions of this file, imports nothing else and knows no global. All arithmetic on states is
float64, so that it needs none of the care that float32 angles do.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["output_terms", "paired_terms", "pushed", "state_in", "traced_terms"]


def state_in(value: Any) -> Any:
    """Return the state in what a block takes or hands out: a tensor, or the first floating one of a container.

    Example:
        >>> h = torch.zeros(1, 2, 3)
        >>> state_in((None, h)) is h, state_in(((), {"hidden_states": h})) is h
        (True, True)
    """
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() and value.dim() >= 3 else None
    parts = list(value.values()) if hasattr(value, "items") else value if isinstance(value, tuple | list) else []
    for part in parts:
        found = state_in(part)
        if found is not None:
            return found
    return None


def replaced(value: Any, old: Any, new: Any) -> Any:
    """Return a container of the same type in which ``new`` stands for ``old``."""
    if value is old:
        return new
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "items"):
        return type(value)({key: replaced(part, old, new) for key, part in value.items()})
    if isinstance(value, tuple | list):
        parts = [replaced(part, old, new) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def lengths(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm over the last axis; NaN where a component is not finite."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    return torch.where(torch.isfinite(norm), norm, torch.nan)


def angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angle between vectors along the last axis by the chord form, 2·atan2(‖â − b̂‖, ‖â + b̂‖)."""
    a = a / torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    b = b / torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    return 2 * torch.atan2(torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1))


def pushed(state: torch.Tensor, push: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a state with what is added to it, h + α·w or h + α·‖h‖·w, and how many states of each row were written.

    Where w is zero, the unit is, or h is not finite, the same bits come back.

    Args:
        state: ``[batch, pos, dim]``.
        push: ``w`` ``[batch, pos, dim]``, zero where nothing is written; ``alpha``; ``relative``.
    """
    h = state.double() if state.dtype == torch.float64 else state.float()
    w = push["w"].to(h.device, h.dtype)
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    u = push["alpha"] * (w * norm if push["relative"] else w)
    written = (u != 0) & torch.isfinite(norm + torch.linalg.vector_norm(u, dim=-1, keepdim=True))
    new = torch.where(written, (h + u).to(state.dtype), state)
    reached = torch.isfinite(norm[..., 0]) & (w != 0).any(-1) & ((norm[..., 0] > 0) | (not push["relative"]))
    return new, reached.sum(1)


def output_terms(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return entropy, margin and NLL ``[batch, pos]`` in nats; a target of −1 has no NLL.

    Example:
        >>> found = output_terms(torch.zeros(1, 1, 4), torch.tensor([[2]]))
        >>> round(float(found["entropy"]), 4), float(found["margin"])
        (1.3863, 0.0)
    """
    found: dict[str, list[torch.Tensor]] = {"entropy": [], "margin": [], "nll": []}
    for row, goal in zip(logits, targets.to(logits.device), strict=True):  # a row at a time: a vocabulary is large
        x = row.double() if row.dtype == torch.float64 else row.float()
        logp = torch.log_softmax(x, dim=-1)
        p = logp.exp()
        fine = torch.isfinite(x).all(-1)
        top = p.topk(2, dim=-1).values
        picked = logp.gather(-1, goal.clamp(min=0)[:, None])[:, 0]
        found["entropy"].append(torch.where(fine, -(p * logp).sum(-1), torch.nan))
        found["margin"].append(torch.where(fine, top[:, 0] - top[:, 1], torch.nan))
        found["nll"].append(torch.where(fine & (goal >= 0), -picked, torch.nan))
    return {name: torch.stack(rows) for name, rows in found.items()}


def paired_terms(clean: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return KL(clean ‖ arm) in nats and whether the top token differs, ``[batch, pos]``.

    Example:
        >>> found = paired_terms(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]))
        >>> round(float(found["kl_clean_pert"]), 4), float(found["flip"])
        (0.1201, 1.0)
    """
    divergence, flips = [], []
    for row, other in zip(clean, logits, strict=True):
        logp, logq = torch.log_softmax(row.double(), dim=-1), torch.log_softmax(other.double(), dim=-1)
        fine = torch.isfinite(row).all(-1) & torch.isfinite(other).all(-1)
        divergence.append(torch.where(fine, (logp.exp() * (logp - logq)).sum(-1).clamp(min=0), torch.nan))
        flips.append(torch.where(fine, (row.argmax(-1) != other.argmax(-1)).double(), torch.nan))
    return {"kl_clean_pert": torch.stack(divergence), "flip": torch.stack(flips)}


def traced_terms(
    model: Any,
    path: str,
    targets: torch.Tensor,
    pushes: dict[int, list[dict[str, Any]]],
    clean: torch.Tensor | None = None,
) -> Any:
    """Measure one forward from inside an nnsight trace; the states themselves do not leave it.

    Args:
        model: The traced model.
        path: Where its list of blocks is, e.g. ``model.layers``.
        targets: The token that follows each position, −1 for none, ``[batch, pos]``.
        pushes: Block → what is added to its output, in order; see :func:`pushed`.
        clean: Logits of the clean forward, to compare with; they stay where they are.

    Returns:
        The terms, and the logits. The terms are ``norm`` ``[depth, batch, pos]``; ``diff`` and ``angle`` of the steps
        between depths; ``chord`` and ``bend``, length of the chord between unit states of neighbouring tokens at the
        last depth and the angle by which it turned; ``entropy``, ``margin``, ``nll``, and with ``clean``
        ``kl_clean_pert`` and ``flip``; ``wrote``, states of each row that were written. All on the CPU; and ``dtype``
        and ``dim`` of the states.
    """
    norm, diff, angle = [], [], []
    wrote = torch.zeros(len(targets), dtype=torch.long)
    before = torch.empty(0)
    for number, block in enumerate(model.get(path)):
        if number == 0:
            before = state_in(block.inputs).detach().double()
            norm.append(lengths(before).cpu())
        value = block.output
        state = state_in(value)
        written = state
        for push in pushes.get(number, []):
            written, count = pushed(written, push)
            wrote = wrote + count.cpu()
        if written is not state:
            block.output = replaced(value, state, written)
        now = written.detach().double().to(before.device)
        norm.append(lengths(now).cpu())
        diff.append(lengths(now - before).cpu())
        angle.append(angles(before, now).cpu())
        before = now
    unit = before / torch.linalg.vector_norm(before, dim=-1, keepdim=True)
    chord = unit[:, 1:] - unit[:, :-1]
    logits = model.output.logits.detach()
    output = output_terms(logits, targets)
    if clean is not None:
        output.update(paired_terms(clean, logits))
    terms = {
        "norm": torch.stack(norm), "diff": torch.stack(diff), "angle": torch.stack(angle),
        "chord": torch.linalg.vector_norm(chord, dim=-1).cpu(), "bend": angles(chord[:, :-1], chord[:, 1:]).cpu(),
        "dtype": str(written.dtype), "dim": int(written.shape[-1]), "wrote": wrote,
        **{name: grid.cpu() for name, grid in output.items()},
    }  # fmt: skip
    return terms, logits
