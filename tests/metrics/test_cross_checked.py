"""Every metric of the catalogue has a slow version it is compared with, and every invariance it declares is tried.

The tests go through ``ids()``: a metric that enters the catalogue without an entry in ``twins`` fails here, and so does
a declared invariance that nothing tries.
"""

import math
import zlib

import numpy as np
import pytest
from twins import TWINS

from dynprobe.metrics import compute, ids, spec

HEAVY = {"states.hmm/1", "fcap.probe/1", "dissoc.rf2/1"}


def rng_of(metric, seed):
    return np.random.default_rng([seed, zlib.crc32(metric.encode())])


def same(value, expected, rel, floor=1e-12):
    if isinstance(value, str) or isinstance(expected, str):
        return value == expected
    if math.isnan(value) or math.isnan(expected):
        return math.isnan(value) and math.isnan(expected)
    return abs(value - expected) <= rel * abs(expected) + floor


def test_nothing_is_left_out_or_over():
    assert set(TWINS) == set(ids())


def against_slow(metric, seeds):
    twin, numbers = TWINS[metric], 0
    for seed in seeds:
        inputs, side = twin.make(rng_of(metric, seed))
        with np.errstate(all="ignore"):
            expected = twin.slow(*inputs, **side)
        result = compute(metric, *inputs, **side)
        assert same(result.value, expected, twin.rel), (seed, result, expected)
        numbers += isinstance(expected, str) or not math.isnan(expected)
    assert 2 * numbers >= len(seeds)  # the draws reach the formula, not only its gaps


@pytest.mark.parametrize("metric", ids())
def test_equals_its_slow_version(metric):
    against_slow(metric, range(2 if metric in HEAVY else 8))


@pytest.mark.long
@pytest.mark.parametrize("metric", ids())
def test_equals_its_slow_version_on_many_draws(metric):
    against_slow(metric, range(100, 120 if metric in HEAVY else 400))


# ---------------------------------------------------------------- invariances


def turn(rng, dim):
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def moved_states(kind, arrays, rng):
    """[depth, unit, dim] arrays moved alike."""
    D, N, d = arrays[0].shape
    if kind == "R":
        q = turn(rng, d)
        return [x @ q for x in arrays]
    if kind == "R_l":
        turns = [turn(rng, d) for _ in range(D)]
        return [np.stack([layer @ q for layer, q in zip(x, turns, strict=True)]) for x in arrays]
    if kind == "P":
        order = rng.permutation(N)
        return [x[:, order] for x in arrays]
    if kind == "T":
        return [np.concatenate([x, x], axis=1) for x in arrays]
    if kind == "shift":
        by = 3 * rng.normal(size=d)
        return [x + by for x in arrays]
    factor = {"S": (1, 1, 1), "S_l": (D, 1, 1), "scale-per-state": (D, N, 1)}[kind]
    factor = np.exp(rng.normal(size=factor))
    return [x * factor for x in arrays]


def moved_rows(kind, arrays, rng):
    """[row, dim] arrays: factors of each its own, everything else alike."""
    if kind in ("S", "S_l"):
        return [x * math.exp(rng.normal()) for x in arrays]
    if kind == "scale-per-state":
        return [x * np.exp(rng.normal(size=(len(x), 1))) for x in arrays]
    return [x[0] for x in moved_states(kind, [x[None] for x in arrays], rng)]


def moved_series(kind, arrays, rng):
    order = rng.permutation(len(arrays[0]))
    factor, by = math.exp(rng.normal()), rng.normal()
    return {
        "S": lambda: [x * factor for x in arrays], "S_l": lambda: [x * factor for x in arrays],
        "shift": lambda: [x + by for x in arrays], "P": lambda: [x[order] for x in arrays],
    }[kind]()  # fmt: skip


def moved_logits(kind, arrays, rng):
    assert kind == "shift"
    return [x + 5 * rng.normal(size=(*x.shape[:-1], 1)) if x.dtype.kind == "f" else x for x in arrays]


def moved_prompts(kind, arrays, rng):
    assert kind == "P"
    return [*arrays[:-1], arrays[-1][rng.permutation(len(arrays[-1]))]]


MOVES = {
    "trajectory": moved_states, "tokens": moved_rows, "series": moved_series, "runs": moved_series,
    "logits": moved_logits, "prompts": moved_prompts,
}  # fmt: skip


def orbit(rng, period, units, depth=None):
    """States that come round: ``units`` of them, at one depth or several."""
    x = rng.normal(size=(depth or 1, period, 5))[:, np.arange(units) % period]
    return x if depth else x[0]


def maps_and_start(kind, rng):
    maps, start = np.eye(4) + 0.4 * rng.normal(size=(5, 4, 4)), rng.normal(size=(2, 4))
    if kind == "T":  # diagonal maps: every stretch of them is alike
        diagonal = np.stack([np.diag([1.5, 0.7, 1.1, 0.2])] * 6)
        return ((diagonal[:3],), {}), ((diagonal,), {})
    if kind == "S":
        states = rng.normal(size=(6, 4))
        side = {"form": "direction", "start": start}
        return ((maps,), {**side, "states": states}), ((maps,), {**side, "states": 7 * states})
    turns = [turn(rng, 4)] * 6 if kind == "R" else [turn(rng, 4) for _ in range(6)]
    other = np.stack([turns[i + 1].T @ m @ turns[i] for i, m in enumerate(maps)])
    return ((maps,), {"start": start}), ((other,), {"start": start @ turns[0]})


def differences(kind, rng):
    (start, end), side = TWINS["lyap.fd/1"].make(rng)
    if kind in ("P", "T"):
        start, end = (np.stack([x, rng.normal(size=3) + 2 * x], axis=2) for x in (start, end))
        pick = [1, 0] if kind == "P" else [0, 1, 0, 1]
        return ((start, end), side), ((start[:, :, pick], end[:, :, pick]), side)
    if kind == "S":
        return ((start, end), side), ((3 * start, 3 * end), side)
    first = turn(rng, 3)
    last = first if kind == "R" else turn(rng, 3)
    return ((start, end), side), ((start @ first, end @ last), side)


def weights(metric, kind, rng):
    arrays, side = TWINS[metric].make(rng)
    if kind == "P":
        order = rng.permutation(len(arrays[0]))
        return (arrays, side), ([x[order] for x in arrays], side)
    if kind == "R":
        q = turn(rng, arrays[0].shape[-1])
        return (arrays, side), ([x @ q for x in arrays], side)
    factors = np.full(len(arrays), 3.0) if kind == "S" else np.exp(rng.normal(size=len(arrays)))
    return (arrays, side), ([x * f for x, f in zip(arrays, factors, strict=True)], side)


def jacobians(kind, rng):
    (a, b), side = TWINS["coupling.mk/1"].make(rng)
    if kind == "R":
        q = turn(rng, 5)
        return ((a, b), side), ((q.T @ a @ q, q.T @ b @ q), side)
    return ((a, b), side), ((3 * a, (3 if kind == "S" else 0.2) * b), side)


def pair_of_inputs(metric, kind, rng):
    """((inputs, side) as drawn, (inputs, side) moved), both of the same value by what the metric declares."""
    if metric == "lyap.ftle/1":
        return maps_and_start(kind, rng)
    if metric == "lyap.fd/1":
        return differences(kind, rng)
    if metric in ("energy.tying/1", "energy.circuit/1", "energy.interaction/1"):
        return weights(metric, kind, rng)
    if metric == "coupling.mk/1":
        return jacobians(kind, rng)
    if kind == "T" and metric == "kappa.xcorr/1":
        seed = int(rng.integers(2**31))
        return tuple(((orbit(np.random.default_rng(seed), 6, n, 4),), {}) for n in (13, 25))
    if kind == "T" and metric == "curv.token/1":
        seed = int(rng.integers(2**31))
        return tuple(((orbit(np.random.default_rng(seed), 6, n, 4),), {}) for n in (14, 26))
    if kind == "T" and metric in ("limen.ct/1", "limen.ct2/1"):
        seed = int(rng.integers(2**31))
        return tuple(((orbit(np.random.default_rng(seed), 6, n),), {}) for n in (14, 26))
    twin = TWINS[metric]
    inputs, side = twin.make(rng)
    if kind == "T" and twin.kind == "series":
        x = rng.uniform(0.05, 1.5, size=101)
        return ((np.repeat(x, 8),), side), ((np.repeat(x, 16),), side)
    if kind == "T" and "W" in spec(metric).params:
        side = {**side, "W": inputs[0].shape[1]}
    if metric == "gate.linear/1":
        a, r = inputs
        return ((a, r), side), ((a, r @ turn(rng, 3) if kind == "R" else 7 * r), side)
    if metric == "plateau.d/1":
        f, a, b = inputs
        q, by = turn(rng, 4), rng.normal(size=4)
        move = {"R": lambda x: x @ q, "S": lambda x: 7 * x, "shift": lambda x: x + by}[kind]
        return (inputs, side), ((move(f), move(a), move(b)), side)
    if metric == "readiness.gmean/1":
        x = inputs[0]
        return (inputs, side), ((x[:, rng.permutation(x.shape[1])] if kind == "P" else np.tile(x, 2),), side)
    if metric == "dissoc.rf2/1":
        dyn, sem = inputs
        return (inputs, side), ((3 * dyn, 0.2 * sem) if kind == "S" else (dyn + 5, sem - 3), side)
    if metric == "states.hmm/1":
        x = inputs[0]
        return (inputs, side), ((x * [3.0, 0.2, 7.0] if kind == "S" else x + np.array([1.0, -2.0, 5.0]),), side)
    if metric == "fcap.probe/1":
        x, y = inputs
        x = np.concatenate([x, x + 1])
        return ((x, y), side), ((moved_states(kind, [x], rng)[0], y), side)
    if metric == "limen.regime/1":
        x = rng.exponential(size=30)
        y = x[rng.permutation(30)] if kind == "P" else 9 * x
        return tuple(((compute("limen.ratio/1", z),), {}) for z in (x, y))
    return (inputs, side), (MOVES[twin.kind](kind, list(inputs), rng), side)


#: Declared invariances that a pair of inputs cannot show, and the test here that does.
ELSEWHERE = {("order.pairwise/1", "T"): "test_pairwise_order_does_not_know_how_many_units_there_are"}
DECLARED = [
    (metric, kind) for metric in ids() for kind in sorted(spec(metric).invariances) if (metric, kind) not in ELSEWHERE
]


@pytest.mark.parametrize(("metric", "kind"), DECLARED)
def test_declared_invariance(metric, kind):
    for seed in range(1 if metric in HEAVY else 3):
        before, after = pair_of_inputs(metric, kind, rng_of(metric, seed))
        x, y = (compute(metric, *inputs, **side) for inputs, side in (before, after))
        assert same(y.value, x.value, 1e-6 if metric in HEAVY else 1e-7, 1e-9), (seed, x, y)


def test_pairwise_order_does_not_know_how_many_units_there_are():
    """A mean over pairs: the mean over all sets with one unit fewer is the same number."""
    for seed in range(3):
        x = TWINS["order.pairwise/1"].make(rng_of("order.pairwise/1", seed))[0][0]
        fewer = [float(compute("order.pairwise/1", np.delete(x, n, axis=1))) for n in range(x.shape[1])]
        assert float(compute("order.pairwise/1", x)) == pytest.approx(np.mean(fewer), rel=1e-12)


def test_what_is_tried_elsewhere_exists():
    for (metric, kind), name in ELSEWHERE.items():
        assert kind in spec(metric).invariances
        assert callable(globals()[name])


def test_most_numbers_do_change_under_what_is_not_declared():
    """The moves are moves: where a metric of states denies one, the value is another."""
    denied = [
        (m, k) for m in ids() if TWINS[m].kind == "trajectory" and spec(m).input == "trajectory[depth,unit,dim]"
        for k in ("R_l", "S_l", "shift") if k not in spec(m).invariances
    ]  # fmt: skip
    changed = 0
    for metric, kind in denied:
        (inputs, side) = TWINS[metric].make(rng_of(metric, 0))
        after = compute(metric, *moved_states(kind, list(inputs), rng_of(metric, 1)), **side)
        before = compute(metric, *inputs, **side)
        changed += not same(after.value, before.value, 1e-6)
    assert len(denied) > 20
    assert changed >= len(denied) - 1  # iterations to a tolerance are whole numbers
