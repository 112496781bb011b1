"""B/A/D states by rule: what kind of step each step along depth is.

Three kinds, told apart by calibrated quantiles. **D**: the step decides; the lens entropy falls by more than in nearly
all steps. **B**: the state turns, either against its last position (κ) or against its last direction (the turning
angle). **A**: neither. The rules are tried in the order D, B, A, and the label belongs to step l → l + 1. The first
step has no direction before it, so κ decides alone there.

The limits are one number each, pooled over depths: they ask where along the depth of the model the large steps are. An
array with one limit per step may be given instead; it asks which steps are large *for their depth*, which is another
question.

A step of which a needed number is missing carries no label (``"?"``). What the letters spell is the business of
:mod:`~dynprobe.metrics._symbols`, the same for every labeller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result
from dynprobe.metrics._symbols import GAP, path_edit_distance, words

__all__ = ["StateLimits", "bad_labels", "bad_limits"]


class StateLimits(NamedTuple):
    """Limits of the three rules: of κ, of the turning angle (rad), of the normalised fall of entropy."""

    lag: Any
    turn: Any
    drop: Any


def _read(lag: Any, turn: Any, entropy: Any, vocab: int) -> tuple[Array, Array, Array]:
    """κ, turning angle and normalised fall of entropy [step, …]; the first turning angle is NaN."""
    if vocab < 2:
        raise MetricError(f"states.bad/1 needs the size of the vocabulary, found {vocab!r}.")
    k, t, h = (as_array(x, "states.bad/1")[0] for x in (lag, turn, entropy))
    if k.ndim < 1 or t.shape != (max(len(k) - 1, 0), *k.shape[1:]) or h.shape != (len(k) + 1, *k.shape[1:]):
        raise MetricError(
            f"states.bad/1 takes κ [step, …], turning angles [step − 1, …] and entropies [step + 1, …] of the same "
            f"states; found {list(k.shape)}, {list(t.shape)}, {list(h.shape)}."
        )
    first = np.full((min(len(k), 1), *k.shape[1:]), np.nan)
    return k, np.concatenate([first, t]), (h[:-1] - h[1:]) / np.log(vocab)


def bad_limits(lag: Any, turn: Any, entropy: Any, vocab: int) -> StateLimits:
    """Limits from clean calibration runs: 75 % quantiles of κ and of the turning angle, 90 % of the fall of entropy.

    Args:
        lag: κ terms [step, unit, …], θ/π.
        turn: Turning angles [step − 1, unit, …] in rad.
        entropy: Logit-lens entropies [depth, unit, …] in nats, one more depth than steps.
        vocab: Size of the vocabulary.

    Returns:
        The limits, pooled over depths and units (type-7 quantiles of what is finite); NaN where nothing is.

    Example:
        >>> bad_limits([[0.1], [0.2], [0.3]], [[1.0], [2.0]], [[2.0], [2.0], [1.0], [1.0]], vocab=10).lag
        0.25
    """
    k, t, drop = _read(lag, turn, entropy, vocab)
    found = [(x[np.isfinite(x)], q) for x, q in ((k, 0.75), (t, 0.75), (drop, 0.9))]
    return StateLimits(*(float(np.quantile(x, q)) if len(x) else float("nan") for x, q in found))


def bad_labels(lag: Any, turn: Any, entropy: Any, vocab: int, limits: StateLimits | Sequence[Any]) -> NDArray[np.str_]:
    """Label every step B, A or D.

    D if (h_l − h_{l+1})/ln V ≥ q90; else B if κ_l ≥ q75 or the turning angle angle(u_{l−1}, u_l) ≥ q75; else A.

    Args:
        lag: κ terms [step, …].
        turn: Turning angles [step − 1, …] in rad; the first belongs to step 1.
        entropy: Logit-lens entropies [step + 1, …] in nats.
        vocab: Size of the vocabulary.
        limits: (κ, turning angle, fall of entropy); numbers, or arrays [step].

    Returns:
        Letters [step, …], ``"?"`` where a needed number is missing.

    Raises:
        MetricError: Shapes do not fit, or a limit is no number.

    Source:
        ``states.bad/1``.

    Example:
        >>> lag, turn, h = [0.5, 0.1, 0.1], [0.2, 0.2], [2.0, 2.0, 2.0, 0.5]
        >>> "".join(bad_labels(lag, turn, h, vocab=10, limits=(0.3, 1.0, 0.4)))
        'BAD'
    """
    k, t, drop = _read(lag, turn, entropy, vocab)
    edges = []
    for limit, name in zip(limits, StateLimits._fields, strict=True):
        edge = np.asarray(limit, dtype=np.float64)
        if edge.shape not in ((), (len(k),)) or not np.isfinite(edge).all():
            raise MetricError(f"The limit of {name} is a number or one per step, found {limit!r}.")
        edges.append(edge.reshape(-1, *[1] * (k.ndim - 1)) if edge.ndim else edge)
    with np.errstate(invalid="ignore"):
        decides = drop >= edges[2]
        turns = (k >= edges[0]) | (t >= edges[1])
    calm = np.isfinite(k) & np.isfinite(t)
    calm[:1] = np.isfinite(k[:1])
    known = np.isfinite(drop)
    out = np.full(k.shape, GAP)
    out[known & calm] = "A"
    out[known & turns] = "B"
    out[known & decides] = "D"
    return out


def _compute(
    inputs: tuple[Any, ...],
    mask: Any,
    params: dict[str, Any],
    metric_id: str,
    vocab: int | None = None,
    limits: Any = None,
) -> Result:
    if vocab is None or limits is None:
        raise MetricError(
            f"{metric_id} needs vocab=… and limits=(κ, turning angle, fall of entropy): bad_limits(clean runs)."
        )
    lag, turn, entropy = inputs
    letters = bad_labels(lag, turn, entropy, vocab, limits)
    if letters.ndim != 1:
        raise MetricError(f"{metric_id} takes the steps of one unit; bad_labels takes any number of them.")
    keep = np.ones(len(letters), bool) if mask is None else np.asarray(mask, bool)
    if keep.shape != letters.shape:
        raise MetricError(f"{metric_id}: the mask has shape {list(keep.shape)}, expected {list(letters.shape)}.")
    word = words(letters[keep])[0]
    known = len(word) - word.count(GAP)
    reason = "empty" if not len(word) else "coverage" if 2 * known < len(word) else None
    distance = float("nan") if reason else float(path_edit_distance(word.replace(GAP, "")))
    extras: dict[str, Any] = {f"n_{letter.lower()}": word.count(letter) for letter in "BAD"}
    extras |= {"path_edit_distance": distance, "path_match": None if reason else distance == 0}
    coverage = known / len(word) if len(word) else float("nan")
    return Result(float("nan") if reason else word, reason, coverage, 1, known, metric_id, extras=extras)


register(
    MetricSpec(
        id="states.bad/1",
        sentence="Kind of every step along depth: it decides (D), it turns (B), or neither (A).",
        formula=(
            "label of step l → l+1: D if (h_l − h_{l+1})/ln V ≥ q90; else B if κ_l = θ_l/π ≥ q75 or "
            "angle(u_{l−1}, u_l) ≥ q75 (undefined at l = 0, κ alone); else A; quantiles calibrated, pooled over "
            "depths; h logit-lens entropy; a missing number that decides → no label"
        ),
        latex=(
            r"\begin{cases} \mathrm{D} & (h_l-h_{l+1})/\ln V\ge q_{90} \\"
            r"\mathrm{B} & \kappa_l\ge q_{75} \text{ or } \operatorname{angle}(u_{l-1},u_l)\ge q_{75} \\ \mathrm{A} "
            r"& \text{otherwise} \end{cases}"
        ),
        input="series×3: κ_l [step], turning angle [step−1], lens entropy [step+1]; vocab, limits",
        value_range="word over B, A, D, ?",
        unit="letters",
        invariances=frozenset(),
        source="dynprobe; the letters and counts are in DOI 10.5281/zenodo.20361289",
        vectors=(
            "κ (.5,.1,.1), turn (.2,.2), h (2,2,2,.5), V 10, limits (.3,1,.4) → BAD",
            "all three rules hold → D",
            "turn ≥ q75 at l = 1 → B there",
        ),
        groups=frozenset({"optional", "states"}),
    ),
    _compute,
    arity=3,
)
