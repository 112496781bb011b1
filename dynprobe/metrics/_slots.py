"""``measure_slots``: all state metrics of a model whose state at one position is a set of vectors, its slots.

A recurrent-depth or energy model may refine sixteen vectors per position where a Transformer refines one. The unit of
every metric is then the slot: κ, Δ, norm and curvature follow each slot along the depth axis, and what compares units
as a set (κ geom, effective rank) compares the slots of one position. So a position is to slots what a text is to
tokens: it is measured as one row of :func:`~dynprobe.metrics.measure`, and the rows are folded back into the shapes
that a run stores, where nothing shows that there were slots, except ``unit=slot`` in the extractor.

* a depth value of a position is the mean over its slots (Δ_rms, which is a root of a mean of squares by definition,
  their root mean square), NaN where fewer than half of them have one;
* a token value is the position's own result;
* a profile entry and a sample value are means over the positions that enter aggregates, NaN where fewer than half of
  them have one;
* iterations to tolerance are not averaged, because some are censored: the sample's are those of the residual over all
  slots of all positions, and each position's stand in the token grid, with the event flag beside them.

Slots have a fixed identity and no order. What reads units in order of time (limen, debts, token curvature, κ xcorr)
says nothing about them: NaN with the reason ``slots``. κ geom takes windows of 64 units; beyond 64 slots it depends on
their numbering.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._limen import regime_of
from dynprobe.metrics._lists import CORE
from dynprobe.metrics._measure import Measurement, _enter, _Item, _plan, _read_mask, measure
from dynprobe.metrics._reduce import share
from dynprobe.metrics._registry import entry
from dynprobe.metrics._result import Array, Bools, Scores

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["measure_slots"]

#: Reason of what slots, which have no order, do not have.
UNORDERED = "slots"

_RESIDUALS = ("deq.", "converge.", "influence.block", "delta.")
_PLAIN = frozenset({"delta.rel_prev/1", "delta.rel_next/1", "delta.rms/1", "delta.angle/1"})
_COUNTED = "converge.iterations/1"


def measure_slots(
    states: Float[torch.Tensor, "depth batch pos slot dim"] | Sequence[Float[torch.Tensor, "batch pos slot dim"]],
    mask: Any,
    *,
    metrics: Iterable[str] = CORE,
    embed: int = 1,
    sink: int = 0,
    span: Any = None,
    dtype: torch.dtype | None = None,
    extractor: str | None = None,
) -> Measurement:
    """Measure the states of a batch of positions that have several vectors each.

    Args:
        states: ``[depth, B, T, slot, dim]``, or D + 1 tensors ``[B, T, slot, dim]``, depth 0 first.
        mask: Bool [B, T], True = real position.
        metrics: Metric ids, with parameters where wanted; ids of the ``output`` family are passed over.
        embed: 1 if depth 0 takes part in metrics, 0 if not.
        sink: Number of first real positions that stay out of means over positions.
        span: Bool [B, T] that narrows those of set metrics, as in :func:`~dynprobe.metrics.measure`.
        dtype: Arithmetic; None = float64 for float64 states, else float32.
        extractor: Text for ``extractor_id``; None writes embed, unit=slot, sink and span.

    Returns:
        A :class:`Measurement` in the shapes of :func:`~dynprobe.metrics.measure`: ``depth`` [depths, B, T], ``token``
        [B, T], ``profile`` [depths, B], one dict of results per sample. Residuals (``deq.*``, ``converge.*``, Δ with
        parameters, Block Influence) have depth and token columns too, where they were asked for.

    Raises:
        MetricError: Shapes do not fit, an id is unknown or does not read states.

    Example:
        >>> import torch
        >>> states = 0.5 ** torch.arange(5.0).view(5, 1, 1, 1, 1) * torch.randn(1, 2, 3, 16, 8)
        >>> m = measure_slots(states, torch.ones(2, 3, dtype=torch.bool), metrics=["delta.rel_prev/1"])
        >>> m.depth["delta_rel_prev"].shape, round(float(m.sample[0]["delta_rel_prev"]), 6)
        ((5, 2, 3), 0.5)
    """
    tensors = _read(states)
    batch, length, n_slots, _ = tensors[0].shape
    real = _read_mask(mask, (batch, length), "mask")
    keep = real & (np.cumsum(real, axis=1) > sink)
    in_span = keep if span is None else keep & _read_mask(span, (batch, length), "span")
    items = _plan(tuple(metrics)).items
    within = [item.full for item in items if _transfers(item.id)]

    fold = _Fold(real)
    each = measure(
        fold.rows(tensors), np.ones((fold.n, n_slots), bool), metrics=within, embed=embed, sink=0, dtype=dtype
    )
    counted = [item.full for item in items if item.id == _COUNTED]
    pooled = None
    if counted:
        pooled = measure(
            [s.flatten(1, 2) for s in tensors], np.repeat(real, n_slots, axis=1), metrics=counted, embed=embed,
            sink=sink * n_slots, dtype=dtype,
        )  # fmt: skip

    n_depths = len(tensors)
    out = Measurement(
        {}, {}, {}, [{} for _ in range(batch)],
        n_nonfinite=fold.total(each.n_nonfinite), keep=keep, first=each.first, dtype=each.dtype,
        extractor_id=extractor
        or f"embed={embed},final_norm=pre,unit=slot,sink=drop{sink},span={'all' if span is None else 'mask'}",
    )  # fmt: skip
    for name, grid in each.depth.items():
        out.depth[name] = fold.spread(_over_slots(grid, squared=name == "delta_rms"))
    for item in items:
        if not _transfers(item.id):
            scores = _unordered(item, batch, n_depths - each.first)
        elif pooled is not None and item.id == _COUNTED:
            scores = pooled._scores[item.column]
        else:
            scores = fold.close(each._scores[item.column], in_span if entry(item.id).spec.span else keep)
        _enter(out, item, scores, n_depths)
        _by_position(out, item, each, fold)
    return out


def _read(states: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    out = [states[d] for d in range(len(states))]
    if not out:
        raise MetricError("measure_slots: no depths were given.")
    shapes = sorted({tuple(s.shape) for s in out})
    if len(shapes) > 1:
        raise MetricError(f"measure_slots needs one shape at all depths, found {shapes}.")
    if len(shapes[0]) != 4:
        raise MetricError(
            f"measure_slots takes states [batch, pos, slot, dim] at each depth, found {list(shapes[0])}. For one "
            "vector per position use measure, which takes [batch, pos, dim]."
        )
    if shapes[0][2] < 1:
        raise MetricError(f"measure_slots needs at least one slot, found states {list(shapes[0])}.")
    return out


def _transfers(metric_id: str) -> bool:
    """Whether a metric compares units as a set or follows each by itself, and so has a meaning for slots."""
    kind = entry(metric_id).spec.input
    return kind.startswith("trajectory") and "in order of time" not in kind


def _over_slots(grid: Array, *, squared: bool) -> Array:
    """Mean over the last axis, NaN where fewer than half of the entries are numbers."""
    ok = ~np.isnan(grid)
    count = ok.sum(-1)
    known = np.where(ok, grid, 0.0).astype(np.float64)
    mean = share((known**2 if squared else known).sum(-1), count)
    mean = np.sqrt(mean) if squared else mean
    return np.asarray(np.where(2 * count >= grid.shape[-1], mean, np.nan), dtype=grid.dtype)


def _unordered(item: _Item, batch: int, n_used: int) -> Scores:
    """The scores of a metric that slots, without an order, do not have."""
    spec, none = entry(item.id).spec, np.zeros(batch, np.int64)
    nan = np.full(batch, np.nan)
    value = [regime_of(np.nan)] * batch if spec.unit == "label" else nan
    scores = Scores(value, [UNORDERED] * batch, nan, none, none)
    if "profile" in spec.levels:
        scores.profile = np.full((n_used, batch), np.nan)
        scores.profile_coverage = np.full((n_used, batch), np.nan)
        scores.profile_reason = np.full((n_used, batch), UNORDERED, dtype=object)
    return scores


def _by_position(out: Measurement, item: _Item, each: Measurement, fold: _Fold) -> None:
    """What one metric says of every single position: its columns in the token grid, and of residuals in the depths."""
    levels = entry(item.id).spec.levels
    if not _transfers(item.id):
        if "token" in levels:
            out.token[item.column] = np.full(out.keep.shape, np.nan, np.float32)
        return
    scores = each._scores[item.column]
    kind = np.float64 if each.dtype == "float64" else np.float32
    residual = item.id.startswith(_RESIDUALS) and item.full not in _PLAIN
    if residual and item.column in each.profile:
        out.depth[item.column] = fold.spread(each.profile[item.column]).astype(kind)
    if "token" in levels or item.id in ("converge.rho/1", _COUNTED):
        out.token[item.column] = fold.spread(np.asarray(scores.value, np.float64)).astype(kind)
    if item.id == _COUNTED:
        out.token[f"{item.column}_event"] = fold.spread(np.asarray(scores.extras["event"], np.float64)).astype(kind)


class _Fold:
    """The real positions of a batch as rows, and the way back.

    Args:
        real: Positions that exist [B, T]; they are the R rows, in order.
    """

    def __init__(self, real: Bools) -> None:
        self.real = real
        self.n = int(real.sum())

    def rows(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The states of the rows [R, slot, dim], without a copy where there is no padding."""
        if self.real.all():
            return [s.flatten(0, 1) for s in states]
        return [s[torch.from_numpy(self.real).to(s.device)] for s in states]

    def spread(self, values: Array) -> Array:
        """Values […, R] on the grid […, B, T], NaN at padding."""
        out = np.full((*values.shape[:-1], *self.real.shape), np.nan, dtype=values.dtype)
        out[..., self.real] = values
        return out

    def total(self, counts: Any, use: Bools | None = None) -> Any:
        """Sum of counts [R] over the positions of each sample."""
        out = np.zeros(self.real.shape, np.asarray(counts).dtype)
        out[self.real] = counts
        return np.where(True if use is None else use, out, 0).sum(1)

    def mean(self, values: Array, use: Bools) -> Array:
        """Mean […, B] over the used positions; NaN where fewer than half of them have a value."""
        grid = self.spread(values)
        ok = use & ~np.isnan(grid)
        count = ok.sum(-1)
        mean = share(np.where(ok, grid, 0.0).sum(-1), count)
        return np.asarray(np.where(2 * count >= use.sum(-1), mean, np.nan))

    def close(self, scores: Scores, use: Bools) -> Scores:
        """One score per sample: the mean over its used positions, with what they have in common as the reason."""
        value = np.asarray(scores.value, np.float64)
        mean = self.mean(value, use)
        steps = np.zeros(use.shape, np.int64)
        steps[self.real] = scores.n_steps
        out = Scores(
            value=mean,
            reason=self._reasons(mean, value, np.array(scores.reason, object), use),
            coverage=self._coverage(scores.coverage, use),
            n_units=self.total(scores.n_units, use),
            n_steps=np.where(use, steps, 0).max(axis=1, initial=0),
            per_unit=np.where(use, self.spread(value), np.nan),
            extras={k: self._extra(k, np.asarray(v), use) for k, v in scores.extras.items() if np.ndim(v) == 1},
        )
        if scores.profile is not None:
            profile = np.asarray(scores.profile, np.float64)
            out.profile = self.mean(profile, use)
            coverage = scores.profile_coverage
            out.profile_coverage = None if coverage is None else self._coverage(coverage, use)
            why = scores.profile_reason
            why = np.full(profile.shape, None, dtype=object) if why is None else why
            out.profile_reason = np.empty(out.profile.shape, dtype=object)
            for step, found in enumerate(out.profile):
                out.profile_reason[step] = self._reasons(found, profile[step], why[step], use)
        return out

    def _coverage(self, coverage: Array, use: Bools) -> Array:
        """Every position has the same number of terms, so the mean of their coverages is the coverage of all."""
        grid = np.where(use, np.nan_to_num(self.spread(np.asarray(coverage, np.float64)), nan=0.0), 0.0)
        return share(grid.sum(-1), use.sum(-1))

    def _extra(self, name: str, values: Any, use: Bools) -> Any:
        if name.startswith("n_"):
            return self.total(values, use)
        return self.mean(values.astype(np.float64), use) if values.dtype.kind in "biuf" else np.full(len(use), np.nan)

    def _reasons(self, mean: Array, values: Array, reasons: Any, use: Bools) -> Any:
        """Per sample: ``empty``, the reason all positions without a value share, else ``coverage``; or a remark."""
        out = np.full(len(use), None, dtype=object)
        if not np.isnan(mean).any() and not any(reasons):
            return out
        grid = np.full(self.real.shape, None, dtype=object)
        grid[self.real] = reasons
        missing = np.isnan(self.spread(values))
        for b, here in enumerate(use):
            chosen = here & (missing[b] if np.isnan(mean[b]) else ~missing[b])
            found = set(grid[b, chosen])
            if not here.any():
                out[b] = "empty"
            elif np.isnan(mean[b]):
                out[b] = (found.pop() if len(found) == 1 else None) or "coverage"
            elif len(found) == 1:
                out[b] = found.pop()
        return out
