"""Plateau sweeps: lead one token's state from one prompt's to another's and watch where the output jumps.

For a pair (A, B) the last token's state at an early depth is moved from h_A to h_B in the context of A, all steps of t
in one batch resumed from that depth. F is read at the last token: the state at depth L, or the logits. Both ends are
rows of the same batch, so F_A = F(x(0)) and F_B = F(x(1)) carry no other difference; where A and B differ in their last
token only, F_B is prompt B's own output.

``path="linear"`` walks the straight line, ``"slerp"`` turns the direction on the shorter great arc (the true angle, so
an obtuse pair is not sent through −h_B) and changes the length linearly; antipodal states have no arc and give NaN.

**Baseline.** A random direction means little on its own: isotropic ones leave the space the states live in, and ones
that point at a random state subtract h_A and so are not random. The baseline here is the covariance-matched mixture:
the direction of a difference of two independent normal draws with the calibration's covariance at that depth, which is
N(0, Σ) up to length, with the length of h_B − h_A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import CalibrationError, SiteError, UsageError
from dynprobe.metrics._inputs import eps_of
from dynprobe.metrics._plateau import READOUTS, distance_share, readouts
from dynprobe.probes import Calibration, Subject, as_subject, capture, resume, tokenize
from dynprobe.probes._inputs import Prompts
from dynprobe.probes._noise import gaussian_rows, row_key_from_tokens
from dynprobe.probes._tape import Tape

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PlateauResult", "interpolate", "plateau"]

PATHS = ("linear", "slerp")
READS = ("state", "logits")


@dataclass(frozen=True, eq=False)
class PlateauResult:
    """Curves d(t) and their read-outs.

    Attributes:
        t: The grid ``[steps]``.
        d: Curves ``[curve, steps]``, NaN where undefined.
        head: One entry per curve: pair, arm (``pair`` or ``baseline``), draw, read, reason.
    """

    t: np.ndarray
    d: np.ndarray
    head: tuple[dict[str, Any], ...]

    def frame(self) -> pd.DataFrame:
        """Return one row per curve with ``t10 t50 t90 width slope share``, each with its reason, and ``n`` values."""
        import pandas as pd

        rows = []
        for head, d in zip(self.head, self.d, strict=True):
            found = readouts(self.t, d)
            values = {f"plateau_{name}": found[name][0] for name in READOUTS}
            reasons = {f"plateau_{name}_reason": head["reason"] or found[name][1] for name in READOUTS}
            rows.append({**head, "metric_ids": "plateau.*/1", **values, **reasons, "n": int(np.isfinite(d).sum())})
        return pd.DataFrame(rows)

    def curves(self) -> pd.DataFrame:
        """Return the curves themselves, one row per curve and t."""
        import pandas as pd

        keys = ("pair", "arm", "draw", "read")
        return pd.DataFrame(
            {**{key: head[key] for key in keys}, "t": float(t), "d": float(value)}
            for head, d in zip(self.head, self.d, strict=True)
            for t, value in zip(self.t, d, strict=True)
        )


def interpolate(a: Tensor, b: Tensor, t: Tensor, path: str = "linear") -> tuple[Tensor, str | None]:
    """Return the states on the way from ``a`` to ``b``, and why there is no way.

    Args:
        a: First state ``[dim]``.
        b: Second state ``[dim]``.
        t: Grid ``[steps]``.
        path: ``"linear"`` or ``"slerp"``.

    Returns:
        ``[steps, dim]`` in float64, exactly ``a`` at t = 0 and ``b`` at t = 1.

    Example:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 3.0])
        >>> x = interpolate(a, b, torch.tensor([0.5]), "slerp")[0][0]
        >>> round(float(x.norm()), 6), round(float(torch.atan2(x[1], x[0])) / torch.pi, 6)
        (2.62132, 0.375)
    """
    a, b, t = a.double(), b.double(), t.double()[:, None]
    straight = torch.where(t == 1, b, a + t * (b - a))
    if path == "linear":
        return straight, None
    if path != "slerp":
        raise UsageError(f"path={path!r}; it is 'linear' or 'slerp'")
    size_a, size_b = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    if not (size_a > 0 and size_b > 0):
        return torch.full_like(straight, torch.nan), "zero-denominator"
    u, v = a / size_a, b / size_b
    theta = 2 * torch.atan2(torch.linalg.vector_norm(u - v), torch.linalg.vector_norm(u + v))
    if torch.linalg.vector_norm(u + v) <= 1e-6:
        return torch.full_like(straight, torch.nan), "antipodal"
    if theta <= 1e-12:
        return straight, None
    turned = (torch.sin((1 - t) * theta) * u + torch.sin(t * theta) * v) / torch.sin(theta)
    along = ((1 - t) * size_a + t * size_b) * turned
    return torch.where(t == 0, a, torch.where(t == 1, b, along)), None


def plateau(
    model: Subject | nn.Module,
    pairs: Sequence[tuple[Any, Any]],
    *,
    at: int = 1,
    steps: int = 51,
    path: str = "linear",
    read: Sequence[str] = READS,
    baseline: int = 0,
    calibration: Calibration | None = None,
    seed: int = 0,
    chat_template: str = "none",
) -> PlateauResult:
    """Sweep the last token's state between the prompts of each pair.

    d(t) = ‖F(x(t)) − F_A‖/(‖F(x(t)) − F_A‖ + ‖F(x(t)) − F_B‖), F of the last token.

    Args:
        model: A subject or a module.
        pairs: Pairs of texts or of lists of token ids; lengths may differ, the context is the first one's.
        at: Depth of the states that are led over.
        steps: Grid points of t, ends included.
        path: ``"linear"``, or ``"slerp"`` for direction on the arc and length linear.
        read: What F is: ``"state"`` (depth L), ``"logits"``, or both.
        baseline: Random directions per pair, covariance-matched mixture.
        calibration: Needed by the baseline, with the covariance of depth ``at``:
            ``dp.calibrate(subject, cov_layers=[at − 1])``.
        seed: Seed of the baseline.
        chat_template: ``"auto"`` wraps texts as a user turn.

    Returns:
        The curves and their read-outs.

    Raises:
        SiteError: If the depth does not exist.
        CalibrationError: If a baseline is asked for without the covariance of that depth.
        UsageError: If an argument is out of its range.

    Source: arXiv 2409.17113 (plateaus), arXiv 2410.12555 (baseline); 9A.4 of the metric definitions.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> result = plateau(tiny_llama(), [([5, 6, 7], [5, 6, 9])], steps=21)
        >>> table = result.frame()
        >>> table[["pair", "arm", "read", "n"]]
           pair   arm    read   n
        0     0  pair   state  21
        1     0  pair  logits  21
        >>> bool((result.d[:, 0] == 0).all()), bool((result.d[:, -1] == 1).all())
        (True, True)
    """
    subject = as_subject(model)
    if not 0 <= at <= subject.n_layers:
        raise SiteError(f"depth {at} was asked for; {subject.name} has depths 0…{subject.n_layers}")
    if steps < 3 or baseline < 0 or not read or not set(read) <= set(READS) or path not in PATHS:
        raise UsageError(
            f"steps={steps}, baseline={baseline}, read={list(read)}, path={path!r}: steps is at least 3, baseline at "
            f"least 0, read of {READS}, path of {PATHS}"
        )
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    curves: list[np.ndarray] = []
    heads: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs):
        if len(pair) != 2:
            raise UsageError(f"pair {number} has {len(pair)} prompts; a pair is (A, B)")
        row_a, row_b = (_one(subject, prompt, chat_template) for prompt in pair)
        tape = capture(subject, [row_a], logits=None)
        a, b = tape.states[at][0, -1], capture(subject, [row_b], logits=None).states[at][0, -1]
        ends = [("pair", -1, b.double())]
        ends += [("baseline", i, _random_end(a, b, row_a, at, seed + i, calibration)) for i in range(baseline)]
        for arm, draw, end in ends:
            states, reason = interpolate(a, end, t.to(a.device), path)
            found, why = _outputs(tape, at, states, read) if reason is None else ({}, reason)
            for name in read:
                d = np.full(steps, np.nan)
                if name in found:
                    f = found[name].double().cpu().numpy()
                    d = distance_share(f, f[0], f[-1], eps_of(found[name].dtype))
                    why = None if np.isfinite(d).any() else "zero-denominator" if np.isfinite(f).all() else "nonfinite"
                curves.append(d)
                heads.append({
                    "pair": number, "arm": arm, "draw": draw, "read": name, "model": subject.name, "at": at,
                    "path": path, "steps": steps, "row_key_a": row_key_from_tokens(row_a),
                    "row_key_b": row_key_from_tokens(row_b), "distance": float((end - a.double()).norm()),
                    "seed": seed + max(draw, 0), "dtype": str(subject.state_dtype).removeprefix("torch."),
                    "calibration": calibration.hash if arm == "baseline" and calibration is not None else None,
                    "reason": why,
                })  # fmt: skip
    return PlateauResult(t.numpy(), np.stack(curves) if curves else np.zeros((0, steps)), tuple(heads))


def _one(subject: Subject, prompt: Prompts, chat_template: str) -> list[int]:
    whole: Any = prompt if isinstance(prompt, str) else [prompt]
    return tokenize(subject, whole, chat_template=chat_template)[0]


def _outputs(tape: Tape, at: int, states: Tensor, read: Sequence[str]) -> tuple[dict[str, Tensor], str | None]:
    """F of the last token for every state of the last token, from one resumed batch."""
    rows = tape.states[at].repeat(len(states), 1, 1)
    rows[:, -1] = states.to(rows)
    again = resume(tape, at, rows, logits="last" if "logits" in read else None)
    found = {"state": again.states[-1][:, -1]} if "state" in read else {}
    if again.logits is not None:
        found["logits"] = again.logits
    return found, None


def _random_end(
    a: Tensor, b: Tensor, row: Sequence[int], at: int, seed: int, calibration: Calibration | None
) -> Tensor:
    """h_A plus a covariance-matched random direction of the length of h_B − h_A."""
    site = ("resid_post", at - 1) if at else ("resid_pre", 0)
    stats = None if calibration is None else calibration.site_stats(*site)
    if stats is None or stats.cov_basis is None:
        raise CalibrationError(
            f"the random baseline needs the covariance of depth {at}, and there is none; pass "
            f"calibration=dp.calibrate(subject, cov_layers=[{at - 1}])"
            + ("" if at else " at a depth ≥ 1: the embedding has no layer to calibrate")
        )
    eps = gaussian_rows(seed, [row_key_from_tokens(row)], f"plateau.depth.{at}", np.array([[len(row) - 1]]), len(a))
    direction = torch.from_numpy(eps[0, 0].astype(np.float64)).to(a.device)
    for factor in stats.half_covariance(direction[None]):
        direction = direction @ factor
    length = torch.linalg.vector_norm(b.double() - a.double())
    return a.double() + length * direction / torch.linalg.vector_norm(direction)
