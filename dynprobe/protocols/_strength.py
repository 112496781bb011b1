"""What a perturbation needs before it can be written: its direction, its donor states, its solved strength."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dynprobe import metrics
from dynprobe.errors import UsageError
from dynprobe.probes import (
    Calibration,
    Instrument,
    Perturb,
    PerturbWriter,
    Site,
    Subject,
    capture,
    logits_of,
    make_batch,
)
from dynprobe.protocols._arms import Passage, Text
from dynprobe.runs._array_file import load_npy, load_tensors

__all__ = ["contrast_direction", "donor_states", "read_direction", "solve_isokl"]

_RELATIVE_TOLERANCE = 0.01
_MAX_FORWARDS = 40
_START, _SMALLEST, _LARGEST = 1e-3, 1e-7, 1e3


def read_direction(path: str | Path) -> np.ndarray:
    """Read a direction ``[dim]`` from ``.npy`` or ``.safetensors`` (one tensor, or one named ``direction``).

    Raises:
        UsageError: If the file cannot be read safely as one vector.
    """
    path = Path(path)
    if path.suffix == ".npy":
        vector = load_npy(path)
    elif path.suffix == ".safetensors":
        tensors = load_tensors(path)
        if len(tensors) != 1 and "direction" not in tensors:
            raise UsageError(f"{path} holds {len(tensors)} tensors; name the one to use 'direction'")
        vector = tensors.get("direction", next(iter(tensors.values())))
    else:
        raise UsageError(f"{path}: a direction is read from .npy or .safetensors")
    if vector.dtype.kind not in "fiu":
        raise UsageError(f"{path} has the dtype {vector.dtype}; a direction is a vector of real numbers")
    vector = np.squeeze(np.asarray(vector, dtype=np.float64))
    if vector.ndim != 1 or not np.isfinite(vector).all() or not np.any(vector):
        raise UsageError(
            f"{path} holds an array of shape {vector.shape}; a direction is one finite, non-zero vector [dim]"
        )
    return vector


def contrast_direction(subject: Subject, perturb: Perturb, texts: tuple[str, str]) -> np.ndarray:
    """Return the difference of two texts' last-token states at the site a perturbation writes at.

    Raises:
        UsageError: If the perturbation writes at several sites, which have several directions.
    """
    sites = PerturbWriter(subject, perturb.replace(alpha=0.0)).sites
    if len(sites) != 1 or sites[0][0] not in ("resid_pre", "resid_post"):
        raise UsageError("--contrast gives one direction; write at one layer of the residual stream, e.g. layers=6")
    component, layer = sites[0]
    tape = capture(subject, list(texts), where=f"layers={layer},component={component}", logits=None)
    depth = layer + 1 if component == "resid_post" else layer
    last = tape._pick(tape.states[depth], -1).double()
    difference = (last[0] - last[1]).cpu().numpy()
    if not np.any(difference):
        raise UsageError("the two texts of --contrast have the same last-token state; choose texts that differ")
    return difference


def donor_states(
    subject: Subject, sites: Sequence[Site], partners: Sequence[Sequence[int]]
) -> dict[Site, list[torch.Tensor]]:
    """Return the clean states of each row's partner prompt at the sites of an ``interp`` write."""
    batch = make_batch(subject, partners)
    with Instrument(subject, sites, **batch.rows) as instrument, torch.no_grad():
        subject.model(**batch.model_inputs(subject))
    tape = instrument.tape()
    mask = batch.mask.cpu()
    found: dict[Site, list[torch.Tensor]] = {}
    for component, layer in sites:
        if component in ("attn_out", "mlp_out"):
            state = tape.updates[component, layer]
        else:
            state = tape.states[layer + 1 if component == "resid_post" else layer]
        found[component, layer] = [state[i][mask[i].to(state.device)] for i in range(len(partners))]
    return found


def solve_isokl(
    subject: Subject,
    perturb: Perturb,
    texts: Sequence[Text],
    clean: Passage,
    calibration: Calibration | None,
    side: str,
) -> np.ndarray:
    """Find, for each row, the relative norm at which its mean KL first reaches ``alpha`` nats.

    KL is not monotone in the strength, so the crossing is looked for from below on a doubling grid and then narrowed
    by regula falsi in the logarithms; all rows advance together.

    Args:
        subject: The subject.
        perturb: With ``scale=isokl``; ``alpha`` is the target in nats.
        texts: Rows.
        clean: Their clean passage, with logits.
        calibration: For the passport.
        side: Padding side of the clean passage.

    Returns:
        Strength of each row in units of its norm; NaN where even the largest write stays below the target.
    """
    n = len(texts)
    if perturb.alpha == 0:
        return np.zeros(n)
    batch = make_batch(
        subject, [t.fed for t in texts], side=side,
        row_keys=[t.row_key for t in texts], n_prompt=[len(t.prompt) for t in texts],
    )  # fmt: skip
    inputs = batch.model_inputs(subject)
    mask = batch.mask.cpu().numpy()
    reference = clean.logits
    assert reference is not None

    def log_ratio(strength: np.ndarray) -> np.ndarray:
        writer = PerturbWriter(subject, perturb, calibration=calibration, magnitude=strength)
        with Instrument(subject, (), [writer], **batch.rows), torch.no_grad():
            logits = logits_of(subject.model(**inputs))
        first = writer.first_position([len(t.prompt) for t in texts], mask.shape[1])
        affected = mask & (clean.positions >= np.maximum(first, 1)[:, None])
        kl = metrics.paired_output(reference, logits)["kl_clean_pert"]
        count = affected.sum(1)
        mean = np.where(affected, kl, 0.0).sum(1) / np.maximum(count, 1)
        with np.errstate(divide="ignore"):
            return np.where(count > 0, np.log(np.maximum(mean, 1e-300) / perturb.alpha), np.nan)

    low = np.full(n, _START)
    at_low = log_ratio(low)
    high, at_high = low.copy(), at_low.copy()
    forwards = 1
    while np.any(too_much := (at_low > 0) & (low > _SMALLEST)) and forwards < _MAX_FORWARDS:
        high, at_high = np.where(too_much, low, high), np.where(too_much, at_low, at_high)
        low = np.where(too_much, low / 8, low)
        at_low = np.where(too_much, log_ratio(low), at_low)
        forwards += 1
    while np.any(open_rows := (at_high < 0) & (high < _LARGEST)) and forwards < _MAX_FORWARDS:
        low, at_low = np.where(open_rows, high, low), np.where(open_rows, at_high, at_low)
        high = np.where(open_rows, high * 2, high)
        at_high = np.where(open_rows, log_ratio(high), at_high)
        forwards += 1
    reached = at_high >= 0
    best, at_best = high.copy(), at_high.copy()
    while np.any(todo := reached & (np.abs(at_best) > _RELATIVE_TOLERANCE)) and forwards < _MAX_FORWARDS:
        share = np.clip(-at_low / np.where(at_high > at_low, at_high - at_low, 1.0), 0.1, 0.9)
        tried = np.where(todo, np.exp(np.log(low) + share * (np.log(high) - np.log(low))), best)
        found = log_ratio(tried)
        forwards += 1
        below = todo & (found < 0)
        above = todo & ~(found < 0)
        low, at_low = np.where(below, tried, low), np.where(below, found, at_low)
        high, at_high = np.where(above, tried, high), np.where(above, found, at_high)
        best, at_best = np.where(todo, tried, best), np.where(todo, found, at_best)
    return np.where(reached & (np.abs(at_best) <= 5 * _RELATIVE_TOLERANCE), best, np.nan)
