"""``measure``: all state metrics of a batch in one pass, the road every run takes.

The states are read once (:func:`~dynprobe.metrics._geometry.walk`), then everything is arithmetic on small arrays over
the whole batch. Results come at the levels of the run folder: ``depth`` (one value per depth and token), ``token``,
``profile`` (one per depth) and ``sample`` (one :class:`Result` per row and column). A float64 measurement equals
:func:`~dynprobe.metrics.compute` on the same row, whatever the padding: the two share their implementation.

The first ``sink`` real tokens stay in the depth and token tables and leave the aggregates. ``span`` narrows what reads
along the token axis or compares tokens as a set (limen, debt, collapse, curv.token, kappa.xcorr, kappa.geom, cka, rsa,
erank, entropy.matrix, id, order, rqa).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import norms
from dynprobe.metrics._inputs import eps_of
from dynprobe.metrics._lists import CORE
from dynprobe.metrics._registry import column_name, entry, measurable, parse_id
from dynprobe.metrics._result import Array, Bools, Result, Scores
from dynprobe.metrics._sample import Context
from dynprobe.metrics._walk import walk

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

__all__ = ["Measurement", "measure"]

#: Norms beyond which a float32 batch is measured in float64: bf16 and float32 states may be there, their squares, sums
#: and reciprocals are not.
_SMALLEST, _LARGEST = 1e-30, 1e30


@dataclass
class Measurement:
    """What :func:`measure` returns; columns are named as in ``columns()``.

    Args:
        depth: Column → [depths, B, T]; row d holds the step d−1 → d; NaN where undefined.
        token: Column → [B, T].
        profile: Column → [depths, B].
        sample: One dict per row, column → :class:`Result`.
        n_nonfinite: Per row, states of real tokens with a NaN or infinite component.
        keep: Tokens that enter aggregates [B, T].
        first: First depth that takes part (1 with ``embed=0``).
        extractor_id: How states became terms.
        dtype: The dtype handed in; bf16 and fp16 captures stay marked.
        ids: Column → metric id with parameters.
    """

    depth: dict[str, Shaped[np.ndarray, "depth batch pos"]]
    token: dict[str, Shaped[np.ndarray, "batch pos"]]
    profile: dict[str, Shaped[np.ndarray, "depth batch"]]
    sample: list[dict[str, Result]]
    n_nonfinite: Int[np.ndarray, " batch"]
    keep: Bool[np.ndarray, "batch pos"]
    first: int
    extractor_id: str
    dtype: str
    ids: dict[str, str] = field(default_factory=dict)
    _scores: dict[str, Scores] = field(default_factory=dict, repr=False)

    @cached_property
    def profile_coverage(self) -> dict[str, NDArray[Any]]:
        """Coverage of each profile entry; NaN on rows without one."""
        out = {}
        for column, grid in self.profile.items():
            out[column] = np.full(grid.shape, np.nan)
            coverage = self._scores[column].profile_coverage
            assert coverage is not None
            out[column][len(grid) - len(coverage) :] = coverage
        return out

    @cached_property
    def profile_reason(self) -> dict[str, NDArray[np.object_]]:
        """Reason of each NaN in a profile; ``first`` on rows that no step leads into."""
        out = {}
        for column, grid in self.profile.items():
            scores = self._scores[column]
            assert scores.profile is not None
            out[column] = np.full(grid.shape, None, dtype=object)
            offset = len(grid) - len(scores.profile)
            out[column][:offset] = "first"
            out[column][offset:] = scores.profile_reason
        return out

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Measurement:
        """Return the measurement of some rows, repeated where ``rows`` repeats them.

        Example:
            >>> import torch
            >>> m = measure([torch.eye(3)[None] + d for d in range(3)], torch.ones(1, 3, dtype=torch.bool))
            >>> twice = m.take([0, 0])
            >>> twice.depth["angle"].shape, len(twice.sample)
            ((3, 2, 3), 2)
        """
        index = np.asarray(rows, dtype=np.int64)
        return Measurement(
            {name: grid[:, index] for name, grid in self.depth.items()},
            {name: grid[index] for name, grid in self.token.items()},
            {name: grid[:, index] for name, grid in self.profile.items()},
            [self.sample[i] for i in index],
            self.n_nonfinite[index],
            self.keep[index],
            self.first,
            self.extractor_id,
            self.dtype,
            self.ids,
            {name: scores.take(index) for name, scores in self._scores.items()},
        )

    @property
    def low_precision(self) -> bool:
        """True when the states were bfloat16 or float16, whose rounding exceeds small paired effects."""
        return self.dtype in ("bfloat16", "float16")


class _Item(NamedTuple):
    id: str
    params: dict[str, Any]
    full: str
    column: str


class _Plan(NamedTuple):
    items: tuple[_Item, ...]
    bare: frozenset[str]
    turn: bool
    sync: bool
    hop: bool
    hop_turn: bool
    ct: bool
    ct2: bool


#: What a walk collects only where a metric needs it.
_NEEDS = ("turn", "sync", "hop", "hop_turn", "ct", "ct2")


@lru_cache(maxsize=64)
def _plan(ids: tuple[str, ...]) -> _Plan:
    items: dict[str, _Item] = {}
    for text in ids:
        parsed = parse_id(text)
        if entry(parsed.id).score is None:
            if entry(parsed.id).spec.family == "output":
                continue
            kind = entry(parsed.id).spec.input
            raise MetricError(
                f"measure cannot take {parsed.id!r}: its input is {kind}. It can take {', '.join(measurable())}; "
                "use compute, paired, diverge or output_metrics for the others."
            )
        full = str(parsed._replace(extraction={}))
        items[full] = _Item(parsed.id, parsed.params, full, column_name(full))
    bare = frozenset(item.id for item in items.values())
    needs = {need for metric in bare for need in entry(metric).needs}
    return _Plan(tuple(items.values()), bare, **{need: need in needs for need in _NEEDS})


def _read_mask(mask: Any, shape: tuple[int, ...], what: str) -> Bools:
    array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if array.shape != shape:
        raise MetricError(f"measure: {what} has shape {list(array.shape)}, the states need {list(shape)}.")
    return array.astype(bool, copy=False)


def _read_states(states: Any) -> list[torch.Tensor]:
    out = [states[d] for d in range(len(states))]
    if not out:
        raise MetricError("measure: no depths were given.")
    shapes = {s.shape for s in out}
    if any(len(shape) != 3 for shape in shapes):
        raise MetricError(
            f"measure takes states [batch, pos, dim], found {list(out[0].shape)}. For states with slots make the slots "
            "the units: states.flatten(0, 1) gives rows of [slot, dim]; then sink=0."
        )
    if len(shapes) > 1:
        raise MetricError(f"measure needs one shape at all depths, found {sorted(map(tuple, shapes))}.")
    return out


def measure(
    states: Sequence[Float[torch.Tensor, "batch pos dim"]],
    mask: Any,
    *,
    metrics: Iterable[str] = CORE,
    embed: int = 0,
    sink: int = 1,
    span: Any = None,
    debt_theta: float | None = None,
    dtype: torch.dtype | None = None,
    extractor: str | None = None,
) -> Measurement:
    """Measure the hidden states of a batch.

    Args:
        states: D + 1 tensors [B, T, dim], depth 0 first, before the final norm.
        mask: Bool [B, T], True = real token; the real tokens of a row are contiguous, padding on either side.
        metrics: Metric ids, with parameters where wanted. Ids of the ``output`` family are passed over: they are
            :func:`output_metrics`'s.
        embed: 1 if depth 0 takes part in metrics, 0 if not.
        sink: Number of first real tokens that stay out of aggregates.
        span: Bool [B, T] that narrows token-axis and set metrics; None = all real tokens.
        debt_theta: θ of the debts, from a calibration of the same model.
        dtype: Arithmetic; None = float64 for float64 states and for batches with norms below 1e-30 or above 1e30,
            else float32.
        extractor: Text for ``extractor_id``; None writes embed, sink and span.

    Returns:
        A :class:`Measurement`.

    Raises:
        MetricError: Shapes do not fit, an id is unknown or does not read states, or real tokens are not contiguous.

    Example:
        >>> import torch
        >>> states = [torch.eye(4)[None] + d for d in range(3)]
        >>> m = measure(states, torch.ones(1, 4, dtype=torch.bool), metrics=["kappa.phase/1"])
        >>> m.depth["angle"].shape, m.profile["kappa_phase"].shape, m.sample[0]["kappa_phase"].n_units
        ((3, 1, 4), (3, 1), 3)
    """
    plan = _plan(tuple(metrics))
    tensors = _read_states(states)
    n_depths, shape = len(tensors), tuple(tensors[0].shape[:2])
    handed = tensors[-1].dtype
    kind = dtype or (torch.float64 if handed == torch.float64 else torch.float32)
    real = _read_mask(mask, shape, "mask")
    order = np.cumsum(real, axis=1)
    if shape[1] > 1 and ((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any():
        raise MetricError("measure: the real tokens of a row must be contiguous; found a hole in the mask.")
    keep = real & (order > sink)
    in_span = keep if span is None else keep & _read_mask(span, shape, "span")
    first = 0 if embed else 1
    used = tensors[first:]
    deep = (len(used), *shape)
    pass_over = partial(
        walk, used, np.broadcast_to(real, deep), np.broadcast_to(keep, deep), eps=eps_of(handed),
        turn=plan.turn, sync=plan.sync, hop=plan.hop, hop_turn=plan.hop_turn,
    )  # fmt: skip
    w = pass_over(dtype=kind)
    extreme = dtype is None and kind == torch.float32 and _near_the_end(w.norm)
    if extreme:
        kind = torch.float64
        w = pass_over(dtype=kind)
    context = Context(w, used, in_span, kind, debt_theta, ct=plan.ct, ct2=plan.ct2)
    zeroth = norms(tensors[0].detach().to(kind)) if first else None
    text = extractor or extractor_text(embed, sink, span)
    out = closed(plan, context, real, keep, zeroth, n_depths, str(handed).removeprefix("torch."), text)
    if extreme:
        out.depth = {name: _narrowed(grid) for name, grid in out.depth.items()}
        out.token = {name: _narrowed(grid) for name, grid in out.token.items()}
    return out


def _near_the_end(norm: Array) -> bool:
    """Whether a state is so large or small that its updates or reciprocals would leave the range of float32."""
    with np.errstate(invalid="ignore"):
        return bool((((norm > 0) & (norm < _SMALLEST)) | (norm > _LARGEST)).any())


def _narrowed(grid: NDArray[Any]) -> NDArray[Any]:
    """A table as every other batch has it; what float32 cannot hold is missing."""
    if grid.dtype != np.float64:
        return grid
    with np.errstate(over="ignore"):
        narrow = grid.astype(np.float32)
    narrow[np.isinf(narrow)] = np.nan
    return narrow


def extractor_text(embed: int, sink: int, span: Any) -> str:
    """How states became terms, in words."""
    return f"embed={embed},final_norm=pre,sink=drop{sink},span={'all' if span is None else 'mask'}"


def closed(
    plan: _Plan, context: Context, real: Bools, keep: Bools, zeroth: Any, n_depths: int, dtype: str, extractor: str
) -> Measurement:
    """Score the walk of a batch; ``zeroth`` are the norms of a depth 0 that takes no part in it."""
    w, wide = context.w, np.float64 if context.dtype == torch.float64 else np.float32
    out = Measurement(
        {}, {}, {}, [{} for _ in range(len(real))],
        n_nonfinite=(real & np.isnan(w.norm)).sum((0, 2)), keep=keep, dtype=dtype,
        first=int(zeroth is not None), extractor_id=extractor,
    )  # fmt: skip
    for item in plan.items:
        score = entry(item.id).score
        assert score is not None, "the plan holds measurable metrics only"
        scores = score(context, item.params)
        _enter(out, item, scores, n_depths)
    for column, (rows, ok) in context.depth_rows(plan.bare).items():
        grid = np.empty((n_depths, *real.shape), wide)
        offset = n_depths - len(rows)
        grid[:offset] = np.nan
        grid[offset:] = rows
        if ok is not None:
            grid[offset:][~ok] = np.nan
        out.depth[column] = grid
    if zeroth is not None and "norm" in out.depth:
        out.depth["norm"][0] = np.where(real, zeroth, np.nan)
        out.n_nonfinite = out.n_nonfinite + (real & np.isnan(zeroth)).sum(1)
    for column, rows in context.token_rows(plan.bare).items():
        out.token[column] = rows.astype(wide)
    return out


def _enter(out: Measurement, item: _Item, scores: Scores, n_depths: int) -> None:
    out.ids[item.column] = item.full
    out._scores[item.column] = scores
    if scores.profile is not None:
        grid = np.full((n_depths, scores.profile.shape[1]), np.nan)
        grid[n_depths - len(scores.profile) :] = scores.profile
        out.profile[item.column] = grid
    for row, columns in enumerate(out.sample):
        result = scores.result(row, item.full, out.extractor_id, out.dtype)
        columns[item.column] = result
        if item.id == "kappa.phase/1":
            columns["kappa_path"] = Result(
                result.extras["kappa_path"], result.reason, result.coverage, result.n_units, result.n_steps, item.full,
                out.extractor_id, out.dtype,
            )  # fmt: skip
