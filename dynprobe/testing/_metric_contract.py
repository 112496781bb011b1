"""Is a metric one? What tables and comparisons rely on, tried on random, masked, broken and padded inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics import Metric, Result, compute, measure
from dynprobe.metrics._measure import _plan
from dynprobe.metrics._registry import _ENTRIES, _OURS, entry, parse_id, refuse_borrowed
from dynprobe.testing._suite import Suite

__all__ = ["METRIC_CHECKS", "Vector", "check_metric"]

#: What is tried, in this order.
METRIC_CHECKS = (
    "declared", "vectors", "repeatable", "untouched", "invariant", "in_range", "reasons", "masked", "batched",
)  # fmt: skip

#: Inputs and side inputs of one call.
Made = tuple[tuple[Any, ...], dict[str, Any]]
_TRANSFORMS = ("R", "R_l", "S", "S_l", "P", "scale-per-state", "shift")
_KNOWN = {*_TRANSFORMS, "T"}
_LEVELS = {"depth", "token", "profile", "sample"}
_REL = 1e-9
_RANGE = re.compile(r"^[\[(]\s*([^,;]+?)\s*,\s*([^\])]+?)\s*[\])]")
_ENDS = {"π": math.pi, "∞": math.inf, "−∞": -math.inf, "-∞": -math.inf, "−π": -math.pi}


@dataclass(frozen=True)
class Vector:
    """A conformance vector that can be run.

    Attributes:
        inputs: What the metric is computed of.
        value: The value; None where there is none.
        reason: Why there is none.
        mask: True = valid.
        params: Estimator parameters and side inputs.
    """

    inputs: tuple[Any, ...]
    value: float | str | None
    reason: str | None = None
    mask: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)


def check_metric(
    metric: Metric | str,
    *,
    vectors: Sequence[Vector] = (),
    make: Callable[[np.random.Generator], Made] | None = None,
    only: str | None = None,
) -> tuple[str, ...]:
    """Try whether a metric keeps the contract.

    ``declared`` its definition is whole, and its family and column are nobody else's; ``vectors`` give their values to
    1e-9, or NaN with their reason, and are given where the definition names some; ``repeatable`` two calls, and NumPy
    and torch, give the same bits; ``untouched`` its inputs are left as they are; ``invariant`` the declared invariances
    hold (``T`` cannot be tried); ``in_range`` values lie in the declared range; ``reasons`` zero, broken, short and
    empty inputs give a number or NaN with a reason, never an infinity or an error that is not a MetricError; ``masked``
    nothing depends on what stands behind the mask; ``batched`` a row of a padded batch gives what it gives alone, for
    metrics that a run can store.

    Args:
        metric: The metric, or the id of one that is installed.
        vectors: Conformance vectors.
        make: ``make(rng) → (inputs, side inputs)``, for metrics whose input is no trajectory, tokens or series.
        only: One check, by name.

    Returns:
        The checks that were made; those that do not apply to this kind of input are left out.

    Raises:
        SelfTestError: If one fails; the message says which and why.

    Example:
        >>> check_metric("kappa.phase/1", vectors=[Vector(([[[1.0, 0.0]], [[-1.0, 0.0]]],), 1.0)])
        ('declared', 'vectors', 'repeatable', 'untouched', 'invariant', 'in_range', 'reasons', 'masked', 'batched')
    """
    found = metric if isinstance(metric, Metric) else entry(parse_id(metric).id)
    with _entered(found):
        return _Suite(found, vectors, make).run(only)


@contextmanager
def _entered(metric: Metric) -> Iterator[None]:
    """The metric in the catalogue for the length of the block, in the place of what had its id."""
    key, before = metric.spec.id, _ENTRIES.get(metric.spec.id)
    _ENTRIES[key] = metric
    _plan.cache_clear()
    try:
        yield
    finally:
        _plan.cache_clear()
        if before is None:
            del _ENTRIES[key]
        else:
            _ENTRIES[key] = before


class _Suite(Suite):
    kind, checks = "metrics", METRIC_CHECKS

    def __init__(
        self, metric: Metric, vectors: Sequence[Vector], make: Callable[[np.random.Generator], Made] | None
    ) -> None:
        self.metric, self.spec, self.given, self._make = metric, metric.spec, vectors, make
        self.name = metric.spec.id
        word = self.spec.input.split("[")[0].split(" ")[0].rstrip("s,×12")
        self.form = {"trajectory": 3, "trajectorie": 3, "token": 2, "serie": 1}.get(word, 0)

    def made(self, seed: int) -> Made:
        rng = np.random.default_rng(seed)
        if self._make is not None:
            return self._make(rng)
        if not self.form:
            raise MetricError(
                f"{self.name} takes {self.spec.input}; say how such inputs are made: check_metric(…, make=…)"
            )
        shape = {3: (5, 14, 6), 2: (14, 6), 1: (14,)}[self.form]
        x = np.cumsum(rng.normal(size=shape), axis=0) + 0.3
        return (x, *(x + 0.4 * rng.normal(size=shape) for _ in range(self.metric.arity - 1))), {}

    def value(self, inputs: Sequence[Any], side: Mapping[str, Any], mask: Any = None) -> Result:
        return compute(self.name, *inputs, mask=mask, **side)

    # The checks

    def declared(self) -> None:
        spec = self.spec
        for what in ("sentence", "formula", "input", "value_range", "unit", "source", "vectors"):
            if not getattr(spec, what):
                self.fail("declared", f"its definition has no {what}")
        if unknown := set(spec.invariances) - _KNOWN:
            self.fail("declared", f"invariances are among {', '.join(sorted(_KNOWN))}, not {sorted(unknown)[0]!r}")
        if unknown := set(spec.levels) - _LEVELS:
            self.fail("declared", f"levels are among {', '.join(sorted(_LEVELS))}, not {sorted(unknown)[0]!r}")
        if self.metric.score is not None and not (spec.column and spec.levels):
            self.fail("declared", "a run can store it, and it names no column and no levels")
        if str(parse_id(spec.id)) != spec.id:
            self.fail("declared", f"its id is written {parse_id(spec.id)}")
        try:
            refuse_borrowed(spec)
        except ValueError as error:
            self.fail("declared", str(error))

    def vectors(self) -> bool:
        if self.spec.vectors and not self.given and self.spec.name not in _OURS:  # ours stand in our own tests
            self.fail("vectors", "its definition names vectors, and none is given to try: check_metric(…, vectors=[…])")
        for number, vector in enumerate(self.given):
            found = self.value(vector.inputs, vector.params, vector.mask)
            if vector.value is None:
                if not _missing(found) or found.reason != vector.reason:
                    self.fail("vectors", f"vector {number} gives {found}, not NaN for {vector.reason!r}")
            elif isinstance(vector.value, str):
                if found.value != vector.value:
                    self.fail("vectors", f"vector {number} gives {found}, not {vector.value!r}")
            elif not math.isclose(float(found), vector.value, rel_tol=_REL, abs_tol=1e-12):
                self.fail("vectors", f"vector {number} gives {found}, not {vector.value!r}")
        return bool(self.given)

    def repeatable(self) -> None:
        inputs, side = self.made(1)
        first = self.value(inputs, side)
        if not _same(first, self.value(inputs, side)):
            self.fail("repeatable", "two calls on the same input give two values")
        if all(isinstance(x, np.ndarray) for x in inputs) and not _same(
            first, self.value([torch.from_numpy(x.copy()) for x in inputs], side)
        ):
            self.fail("repeatable", "a torch tensor and a NumPy array of the same numbers give two values")

    def untouched(self) -> None:
        inputs, side = self.made(2)
        arrays = [x for x in (*inputs, *side.values()) if isinstance(x, np.ndarray)]
        before = [x.copy() for x in arrays]
        self.value(inputs, side)
        pairs = zip(arrays, before, strict=True)
        if any(a.tobytes() != b.tobytes() for a, b in pairs if a.dtype != object):
            self.fail("untouched", "it changed an input")

    def invariant(self) -> bool:
        tried = False
        for kind in _TRANSFORMS:
            if kind not in self.spec.invariances or not self.form:
                continue
            for seed in range(4):
                inputs, side = self.made(10 + seed)
                if side or any(np.ndim(x) != self.form for x in inputs):
                    break
                moved = _transformed(kind, [np.asarray(x, np.float64) for x in inputs], np.random.default_rng(seed))
                if moved is None:
                    break
                tried = True
                before, after = self.value(inputs, side), self.value(moved, side)
                if not _close(before, after, 1e-7):
                    self.fail("invariant", f"it declares {kind}, under which {before} becomes {after}")
        return tried

    def in_range(self) -> bool:
        ends = _ends(self.spec.value_range)
        if ends is None:
            return False
        low, high = ends
        for seed in range(20):
            found = self.value(*self.made(100 + seed))
            if _missing(found) or isinstance(found.value, str):
                continue
            slack = 1e-9 * max(1.0, abs(float(found)))
            if not low - slack <= float(found) <= high + slack:
                self.fail("in_range", f"{found} lies outside {self.spec.value_range}")
        return True

    def reasons(self) -> None:
        for what, inputs, side, mask in self._odd():
            try:
                found = self.value(inputs, side, mask)
            except MetricError:
                continue
            except Exception as error:
                self.fail("reasons", f"{what}: {type(error).__name__}: {error}")
            if isinstance(found.value, str):
                continue
            if math.isinf(found.value) or (_missing(found) and not found.reason):
                self.fail("reasons", f"{what} gives {found.value} without a reason")
            if what == "everything masked" and not _missing(found):
                self.fail("reasons", f"{what} gives {found.value}; a number that cannot be computed is NaN")

    def _odd(self) -> Iterator[tuple[str, list[Any], dict[str, Any], Any]]:
        inputs, side = self.made(3)
        if not self.form or any(np.ndim(x) != self.form for x in inputs):
            return
        arrays = [np.asarray(x, np.float64) for x in inputs]
        yield "all zeros", [0 * x for x in arrays], side, None
        yield "all NaN", [np.full_like(x, np.nan) for x in arrays], side, None
        yield "huge numbers", [1e300 * x for x in arrays], side, None
        yield "equal states", [np.ones_like(x) for x in arrays], side, None
        yield "nothing along the first axis", [x[:0] for x in arrays], side, None
        yield "one entry along the first axis", [x[:1] for x in arrays], side, None
        if self.form == 3:
            yield "one unit", [x[:, :1] for x in arrays], side, None
            yield "no unit", [x[:, :0] for x in arrays], side, None
        half = [x.copy() for x in arrays]
        for x in half:
            x[..., 0] = np.nan if self.form < 3 else x[..., 0]
            if self.form == 3:
                x[:, 1] = np.nan
        yield "a broken state", half, side, None
        n = arrays[0].shape[1 if self.form == 3 else 0]
        yield "everything masked", arrays, side, np.zeros(n, bool)

    def masked(self) -> bool:
        inputs, side = self.made(4)
        if self.form < 2 or side or any(np.ndim(x) != self.form for x in inputs):
            return False
        arrays = [np.asarray(x, np.float64) for x in inputs]
        axis = 1 if self.form == 3 else 0
        mask = np.ones(arrays[0].shape[axis], bool)
        mask[-3:] = False
        first = self.value(arrays, side, mask)
        for junk in (np.nan, 1e200, 0.0):
            other = [x.copy() for x in arrays]
            for x in other:
                x[(slice(None), ~mask) if axis else ~mask] = junk
            if not _close(first, self.value(other, side, mask), 1e-12):
                self.fail("masked", f"{first} changes when {junk:g} stands at masked units")
        return True

    def batched(self) -> bool:
        if self.metric.score is None or self.form != 3 or (self._make is not None and self.made(0)[1]):
            return False
        rng = np.random.default_rng(6)
        states = torch.from_numpy(np.cumsum(rng.normal(size=(5, 3, 14, 6)), axis=0) + 0.3)
        mask = torch.ones(3, 14, dtype=torch.bool)
        mask[1, :4] = False
        mask[2, 9:] = False
        states[:, ~mask] = 1e3
        column = str(self.spec.column)
        found = measure(list(states), mask, metrics=[self.name], embed=1, sink=0, debt_theta=1.0)
        for row in range(3):
            alone = compute(self.name, states[:, row, mask[row]].numpy())
            together = found.sample[row][column]
            if not _close(alone, together, 1e-8) or alone.reason != together.reason:
                self.fail("batched", f"row {row} of a padded batch gives {together}, and alone {alone}")
        return True


def _transformed(kind: str, inputs: list[Any], rng: np.random.Generator) -> list[Any] | None:
    """The same transformation of every input; None where it has no meaning for inputs of this form."""
    form, shape = inputs[0].ndim, inputs[0].shape
    if kind == "S":
        return [x * factor for factor in [float(np.exp(rng.normal()))] for x in inputs]
    if kind == "P":
        order = rng.permutation(shape[1] if form == 3 else shape[0])
        return [x[:, order] if form == 3 else x[order] for x in inputs]
    if form == 1:
        return [x + 3.0 for x in inputs] if kind == "shift" else None
    if kind == "shift":
        return [x + offset for offset in [3 * rng.normal(size=shape[-1])] for x in inputs]
    if kind == "scale-per-state":
        return [x * f for f in [np.exp(rng.normal(size=(*shape[:-1], 1)))] for x in inputs]
    depths = shape[0] if form == 3 and kind in ("R_l", "S_l") else 1
    if kind == "S_l":
        return [x * f for f in [np.exp(rng.normal(size=(depths, *(1,) * (form - 1))))] for x in inputs]
    turns = [np.linalg.qr(rng.normal(size=(shape[-1],) * 2))[0] for _ in range(depths)]
    if depths == 1:
        return [x @ turns[0] for x in inputs]
    return [np.stack([one @ turn for one, turn in zip(x, turns, strict=True)]) for x in inputs]


def _ends(text: str) -> tuple[float, float] | None:
    match = _RANGE.match(text)
    if match is None:
        return None
    low, high = (_end(part) for part in match.groups())
    return (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)


def _end(text: str) -> float:
    """A number of a range; NaN where it is a formula."""
    text = text.strip()
    try:
        return _ENDS[text] if text in _ENDS else float(text.replace("−", "-"))
    except ValueError:
        return math.nan


def _missing(found: Result) -> bool:
    return not isinstance(found.value, str) and math.isnan(found.value)


def _same(a: Result, b: Result) -> bool:
    return a.value == b.value or (_missing(a) and _missing(b) and a.reason == b.reason)


def _close(a: Result, b: Result, rel: float) -> bool:
    if isinstance(a.value, str) or isinstance(b.value, str) or _missing(a) or _missing(b):
        return _same(a, b)
    return math.isclose(a.value, b.value, rel_tol=rel, abs_tol=max(rel * 1e-2, 1e-12))
