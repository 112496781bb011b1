"""Depth exponents of a real model: how fast a small difference grows from block to block.

A frame of k tangents is put on the state at a depth and carried through the model's own blocks, orthonormalised by QR
every few of them. The maps are the blocks alone: embedding, final norm and head are no part of the chain. With
``method="jvp"`` the tangents are exact derivatives (``lyap.ftle/1``); with ``method="fd"`` they are two-sided finite
differences at several ε over a decade (``lyap.fd/1``), whose spread over ε is their error and whose linear-response
gate says whether they stand for a derivative at all.

Where the frame starts is declared: at one token, or at several jointly. Differences spread to later tokens, and lengths
and QR are always over all positions together. The start frame is random, drawn from its address, so the exponents are
those of a finite chain and a generic frame: λ_1 lies below the largest possible growth and approaches it with depth.
Raw and direction-only forms come from the same run. Never call these exponents of generation: tokens are discrete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import SiteError, UsageError
from dynprobe.metrics._benettin import Benettin
from dynprobe.metrics._gate import linear_gate
from dynprobe.metrics._inputs import eps_of
from dynprobe.metrics._registry import format_id
from dynprobe.metrics._result import Array
from dynprobe.probes import Subject, Where, as_subject, capture, tokenize
from dynprobe.probes._inputs import Prompts
from dynprobe.probes._noise import gaussian_rows, row_key_from_tokens
from dynprobe.probes._tangent import carry, check_chain

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LyapunovResult", "lyapunov"]

FORMS = ("raw", "direction")
_METHODS = ("jvp", "fd")
_CHECK = 1e-3
_EPS = tuple(float(e) for e in np.geomspace(1e-3, 1e-2, 5))


@dataclass(frozen=True, eq=False)
class LyapunovResult:
    """Depth exponents of some prompts.

    Attributes:
        rows: One entry per prompt, form and exponent; :meth:`frame` makes the table.
        path: One entry per prompt, form, exponent, ε and QR step; :meth:`profile` makes the table.
        agreement: Under JVP, largest difference of the first prompt's raw exponents from finite differences at
            ε = 10⁻³, nats per block; large where ε is outside the linear range or a derivative is wrong. NaN under fd.
    """

    rows: tuple[dict[str, Any], ...]
    path: tuple[dict[str, Any], ...]
    agreement: float

    def frame(self) -> pd.DataFrame:
        """Return one row per prompt, form and exponent.

        ``lyapunov`` in nats per block, ``reason`` beside NaN, ``n_maps`` blocks, ``n_units`` tokens of the start frame;
        for finite differences ``low``, ``high`` and ``spread`` over ε and the verdict of ``gate.linear/1``.
        """
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def profile(self) -> pd.DataFrame:
        """Return the growth along depth: ln of the growth since ``at`` in nats, after every QR step."""
        import pandas as pd

        return pd.DataFrame(list(self.path))


class _Growth:
    """Feeds what is met between blocks to Benettin's scheme."""

    def __init__(self, growth: Benettin, at: int) -> None:
        self.growth, self.depth = growth, at

    def placed(self, frame: Tensor) -> None:
        self.growth.placed(frame.double().cpu().numpy())

    def meet(self, depth: int, state: Tensor, tangents: Tensor) -> Tensor:
        maps, self.depth = depth - self.depth, depth
        q = self.growth.meet(state.double().cpu().numpy(), tangents.double().cpu().numpy(), maps)
        return torch.from_numpy(q)


def start_frame(row: Sequence[int], chosen: Array, dim: int, k: int, at: int, seed: int) -> Array:
    """Draw k random tangents ``[k, pos, dim]`` at the chosen positions, as a function of their address."""
    where = np.where(chosen, np.arange(len(row)), -1)[None]
    key = row_key_from_tokens(row)
    draws = [gaussian_rows(seed, [key], f"tangent.{i}.depth.{at}", where, dim)[0] for i in range(k)]
    return np.stack(draws).astype(np.float64)


def lyapunov(
    model: Subject | nn.Module,
    prompts: Prompts,
    *,
    k: int = 4,
    method: str = "jvp",
    at: int = 0,
    upto: int | None = None,
    every: int = 4,
    positions: str = "-1",
    eps: Sequence[float] = _EPS,
    seed: int = 0,
    chat_template: str = "none",
) -> LyapunovResult:
    """Measure finite-depth Lyapunov exponents of a model, per prompt.

    λ_i = (1/n) Σ ln|R_ii| over the n blocks from depth ``at`` to ``upto``, in nats per block.

    Args:
        model: A subject or a module.
        prompts: Texts or lists of token ids; each is run alone.
        k: Exponents per prompt.
        method: ``"jvp"`` for exact derivatives, ``"fd"`` for two-sided finite differences.
        at: Depth where the frame is put down.
        upto: Depth where it is read; default L.
        every: Blocks between two QR steps; changes rounding only, unless tangents collapse between them.
        positions: Tokens that the start frame stands on, in the mini-language: ``"-1"``, ``"1:"``, ``"all"``.
        eps: For ``fd``: sizes of the difference relative to the norm of the state, best over a decade.
        seed: Seed of the start frame.
        chat_template: ``"auto"`` wraps texts as a user turn.

    Returns:
        The exponents, raw and direction-only.

    Raises:
        ModelError: If the blocks are no chain of maps, or cannot be differentiated.
        UsageError: If an argument is out of its range.

    Source: Benettin et al. 1980; 9A.5 of the metric definitions.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> table = lyapunov(tiny_llama(), [[5, 6, 7, 8]], k=2).frame()
        >>> table[["metric_id", "index", "n_maps", "reason"]]
                                 metric_id  index  n_maps reason
        0                      lyap.ftle/1      1       3   None
        1                      lyap.ftle/1      2       3   None
        2  lyap.ftle/1{form=direction}      1       3   None
        3  lyap.ftle/1{form=direction}      2       3   None
    """
    subject = as_subject(model)
    if method not in _METHODS:
        raise UsageError(f"method={method!r}; it is 'jvp' or 'fd'")
    last = subject.n_layers if upto is None else upto
    if not 0 <= at < last <= subject.n_layers:
        raise SiteError(f"depths {at} to {last} were asked for; {subject.name} has depths 0…{subject.n_layers}")
    sizes = [float(e) for e in eps] if method == "fd" else [0.0]
    if k < 1 or every < 1 or not sizes or (method == "fd" and min(sizes) <= 0):
        raise UsageError("k and every are at least 1, and fd needs at least one positive eps")
    rows = tokenize(subject, prompts, chat_template=chat_template)
    where = Where.parse(f"positions={positions}")
    depths = sorted({*range(at + every, last, every), last})
    check_chain(subject)
    unit = eps_of(subject.state_dtype or torch.float32)
    agreement = float("nan")
    table: list[dict[str, Any]] = []
    path: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        head = {
            "prompt": number, "row_key": row_key_from_tokens(row), "model": subject.name, "method": method,
            "at": at, "upto": last, "every": every, "positions": positions, "seed": seed,
            "dtype": str(subject.state_dtype).removeprefix("torch."),
        }  # fmt: skip
        state = capture(subject, [row], logits=None).states[at][0]
        chosen = where.position_mask(np.arange(len(row)), len(row))
        dim = state.shape[-1]
        if not 1 <= k <= max(int(chosen.sum()), 1) * dim:
            raise UsageError(f"k={k} tangents were asked for at {int(chosen.sum())} tokens of {dim} dimensions")
        runs: list[Benettin] = []
        road = method
        if chosen.any() and bool(torch.isfinite(state).all()):
            frame = start_frame(row, chosen, dim, k, at, seed)
            for size in sizes:
                growth, road = _follow(subject, row, state, frame, at, depths, method, size)
                runs.append(growth)
            if method == "jvp" and number == 0:
                other, _ = _follow(subject, row, state, frame, at, depths, "fd", _CHECK)
                agreement = _farthest(runs[0].exponents("raw"), other.exponents("raw"))
        reason = None if runs else ("empty" if not chosen.any() else "nonfinite")
        head |= {"road": road, "n_maps": last - at, "n_units": int(chosen.sum())}
        table += _exponents(head, runs, sizes, k, reason, unit)
        path += _path(head, runs, sizes, at)
    return LyapunovResult(tuple(table), tuple(path), agreement)


def _follow(
    subject: Subject,
    row: Sequence[int],
    state: Tensor,
    frame: Array,
    at: int,
    depths: Sequence[int],
    road: str,
    eps: float,
) -> tuple[Benettin, str]:
    """Carry one frame up; returns its growth and the road taken."""
    growth = Benettin(eps_of(subject.state_dtype or torch.float32))
    first = torch.from_numpy(growth.start(state.double().cpu().numpy(), frame))
    taken = carry(subject, row, state, first, _Growth(growth, at), at=at, depths=depths, road=road, eps=eps)
    return growth, taken


def _farthest(a: Array, b: Array) -> float:
    """Largest difference of exponents that both are numbers; NaN without any."""
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.abs(a[both] - b[both]).max()) if both.any() else float("nan")


def _exponents(
    head: dict[str, Any], runs: Sequence[Benettin], sizes: Sequence[float], k: int, reason: str | None, eps: float
) -> list[dict[str, Any]]:
    """Rows of the table for one prompt: the median over ε (of one value under JVP)."""
    fd = head["method"] == "fd"
    out = []
    for form in FORMS:
        found = np.stack([r.exponents(form) for r in runs]) if runs else np.full((1, k), np.nan)
        for i in range(k):
            each = found[:, i]
            ok = np.isfinite(each)
            why = reason
            if why is None and 2 * ok.sum() < len(each):
                why = next(r.reasons(form)[i] for r, fine in zip(runs, ok, strict=True) if not fine)
            kept = each[ok]
            entry = {
                **head,
                "metric_id": format_id("lyap.fd/1" if fd else "lyap.ftle/1", {"form": form}),
                "form": form, "index": i + 1,
                "lyapunov": float(np.median(kept)) if why is None else np.nan,
                "reason": why, "n": int(ok.sum()),
            }  # fmt: skip
            if fd:
                entry |= _over_eps(kept, np.asarray(sizes)[: len(each)][ok], head["n_maps"], eps)
            out.append(entry)
    return out


def _over_eps(each: Array, sizes: Array, n_maps: int, eps: float) -> dict[str, Any]:
    """Spread over ε, and whether the response ε·exp(n·λ̂(ε)) is linear in ε, above one amplified rounding unit."""
    nan = float("nan")
    if not len(each):
        return {"low": nan, "high": nan, "spread": nan, "gate_passes": False, "gate_slope": nan, "gate_reason": "empty"}
    growth = np.exp(each * n_maps)
    gate = linear_gate(sizes, sizes * growth, eps * growth)
    return {
        "low": float(each.min()), "high": float(each.max()), "spread": float(np.ptp(each)),
        "gate_passes": gate.passes, "gate_slope": gate.slope, "gate_reason": gate.reason,
    }  # fmt: skip


def _path(head: dict[str, Any], runs: Sequence[Benettin], sizes: Sequence[float], at: int) -> list[dict[str, Any]]:
    keys = {name: head[name] for name in ("prompt", "row_key", "method")}
    return [
        {
            **keys,
            "eps": size or np.nan,
            "form": form,
            "index": i + 1,
            "depth": at + maps,
            "growth": float(logs[form][i]),
        }
        for run, size in zip(runs, sizes, strict=False)
        for maps, logs in run.path
        for form in FORMS
        for i in range(len(logs[form]))
    ]
