"""Every metric on numbers at the ends of what floats hold: right, or NaN with a reason, or refused; never just wrong.

Scales are powers of two and the draws have eight bits, so a scaled input is exactly the drawn one times a number, down
to where float32 and float64 lose bits; there the expectation is made from what is left.
"""

import math
import warnings

import numpy as np
import pytest
import slow_convergence
import torch
from test_cross_checked import HEAVY, rng_of, same
from twins import TWINS

from dynprobe.errors import DynprobeError
from dynprobe.metrics import compute, ids, measure, spec
from dynprobe.metrics._registry import measurable

#: Grow with the states as their scale does (θ of the debts along with it).
DEGREE = {
    "delta.rms/1": 1, "resid.norm/1": 1, "norm.raw/1": 1, "norm.winsor_mad/1": 1, "collapse.late_ct/1": 1,
    "debt.cusum/1": 1, "debt.excess/1": 1,
}  # fmt: skip
#: Not cut to eight bits: probabilities, ascending grids, and differences that would vanish.
EXACT = {"ouro.q_exit/1", "lyap.fd/1", *(m for m in ids() if m.startswith(("dist.", "plateau.t", "plateau.w")))}
#: S of these is declared for something else than all inputs at once, or not down to 1e-12.
OWN_SCALE = {"lyap.ftle/1", "gate.linear/1", "recync.detect/1", "limen.regime/1"}
SCALES = {
    "float32 × 2^100": (np.float32, 100), "float32 × 2^122": (np.float32, 122), "float32 subnormal": (np.float32, -138),
    "× 2^660": (np.float64, 660), "× 2^1000": (np.float64, 1000), "× 2^−660": (np.float64, -660),
    "subnormal": (np.float64, -1050),
}  # fmt: skip
#: A masked place is taken out of time, one that is no number still takes its place in it.
KEEP_TIME = {"recync.detect/1", "relax.token/1", "str.kernel/1"}
LONG = pytest.mark.long


def floats(inputs):
    return [isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in inputs]


def drawn(metric, seed=0):
    inputs, side = TWINS[metric].make(rng_of(metric, seed))
    if metric not in EXACT:
        inputs = tuple(
            torch.from_numpy(x).bfloat16().double().numpy() if f else x
            for x, f in zip(inputs, floats(inputs), strict=True)
        )
    return inputs, side


def outcome(metric, inputs, side):
    """Value, or None where it is missing with a reason or refused; anything else fails here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = compute(metric, *inputs, **side)
        except DynprobeError:
            return None
    if isinstance(result.value, str):
        return result.value
    assert not math.isinf(result.value), result
    if math.isnan(result.value):
        assert result.reason, result
        return None
    return float(result.value)


def slow_value(metric, inputs, side):
    """What the slow version makes of it: None where it makes no number."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = TWINS[metric].slow(*inputs, **side)
        except (ValueError, ZeroDivisionError, IndexError, OverflowError, np.linalg.LinAlgError, TypeError):
            return None
    return value if isinstance(value, str) or math.isfinite(value) else None


def expected_at_scale(metric, inputs, side, exponent):
    back = tuple(np.ldexp(x.astype(np.float64), -exponent) if f else x
                 for x, f in zip(inputs, floats(inputs), strict=True))  # fmt: skip
    kind = TWINS[metric].kind
    if metric == "deq.residual/1":  # its ε has the unit of the states
        return slow_convergence.deq(back[0], np.ones(back[0].shape[:2], bool), math.ldexp(1e-9, -exponent))[0]
    if metric in DEGREE:
        value = slow_value(metric, back, side)
        return None if value is None else float(np.ldexp(value, exponent))
    if "S" in spec(metric).invariances and metric not in OWN_SCALE:
        return slow_value(metric, back, side)
    wide = tuple(x.astype(np.longdouble if kind == "trajectory" else np.float64) if f else x
                 for x, f in zip(inputs, floats(inputs), strict=True))  # fmt: skip
    return slow_value(metric, wide, side)


@pytest.mark.parametrize("metric", ids())
def test_huge_and_tiny(metric):
    inputs, side = drawn(metric)
    for name, (dtype, exponent) in SCALES.items():
        if metric in HEAVY and exponent not in (660, -660, 100):
            continue
        with np.errstate(all="ignore"):
            scaled = tuple(np.ldexp(x, exponent).astype(dtype) if f else x
                           for x, f in zip(inputs, floats(inputs), strict=True))  # fmt: skip
        if not all(np.isfinite(x).all() for x, f in zip(scaled, floats(scaled), strict=True) if f):
            continue
        more = {**side, "theta": math.ldexp(side["theta"], exponent)} if "theta" in side else side
        value = outcome(metric, scaled, more)
        if value is None:
            continue
        expected = expected_at_scale(metric, scaled, side, exponent)
        assert expected is not None, (name, value)
        least = 5e-324 if dtype == np.float64 else 1e-50
        rel = 1e-3 if metric in DEGREE and exponent == -1050 else 1e-6 if metric not in OWN_SCALE else 1e-7
        assert same(value, expected, rel, least if metric in DEGREE else 1e-9), (name, value, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, pytest.param(torch.float32, marks=LONG)])
@pytest.mark.parametrize("metric", [m for m in ids() if m not in EXACT and m not in HEAVY])
def test_half_types_lose_nothing_that_was_handed_in(metric, dtype):
    """A half tensor gives the number of the same values in float64, and nearly all metrics do give one."""
    inputs, side = drawn(metric)
    cut = tuple(torch.from_numpy(x).to(dtype) if f else x for x, f in zip(inputs, floats(inputs), strict=True))
    value = outcome(metric, cut, side)
    expected = slow_value(metric, tuple(x.double().numpy() if isinstance(x, torch.Tensor) else x for x in cut), side)
    if expected is not None:
        assert value is not None
        assert same(value, expected, 1e-6)


@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=LONG), pytest.param(-math.inf, marks=LONG)])
@pytest.mark.parametrize("metric", [m for m in ids() if TWINS[m].kind in ("trajectory", "tokens", "logits", "series")])
def test_one_place_that_is_no_number_is_left_out(metric, bad):
    """The value is that with the place masked, where the metric can do without a place."""
    inputs, side = drawn(metric)
    where = floats(inputs)
    place = inputs[0].shape[1 if inputs[0].ndim == 3 else 0] // 2
    spoilt = []
    for x, f in zip(inputs, where, strict=True):
        x = x.copy()
        if f:
            x[(slice(None), place) if x.ndim == 3 else place] = bad
        spoilt.append(x)
    value = outcome(metric, spoilt, side)
    if value is None:
        return
    if metric in KEEP_TIME:
        assert same(value, slow_value(metric, spoilt, side), 1e-9)
        return
    mask = np.arange(inputs[0].shape[1 if inputs[0].ndim == 3 else 0]) != place
    expected = outcome(metric, inputs, {**side, "mask": mask})
    if expected is None:  # it has no masks with holes: the value must not depend on what stood there
        for x, f in zip(spoilt, where, strict=True):
            if f:
                x[(slice(None), place) if x.ndim == 3 else place] = math.nan
        expected = outcome(metric, spoilt, side)
    assert same(value, expected, 1e-9), (value, expected)


SHAPES = {
    "zero": lambda x: x * 0, "constant": lambda x: x * 0 + 1.25, "T = 1": lambda x: x[:, :1] if x.ndim > 2 else x[:1],
    "D = 1": lambda x: x[..., :1] if x.ndim > 1 else x, "one depth": lambda x: x[:1] if x.ndim > 2 else x,
    "no unit": lambda x: x[:, :0] if x.ndim > 2 else x[:0], "no depth": lambda x: x[:0],
    "no dim": lambda x: x[..., :0], "all NaN": lambda x: x * math.nan,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("metric", [m for m in ids() if m not in HEAVY])
def test_degenerate_shapes_and_states(metric, name):
    inputs, side = drawn(metric)
    made = tuple(SHAPES[name](x) if f or (isinstance(x, np.ndarray) and name in ("T = 1", "no unit")) else x
                 for x, f in zip(inputs, floats(inputs), strict=True))  # fmt: skip
    value = outcome(metric, made, side)
    if value is not None:
        expected = slow_value(metric, made, side)
        assert expected is not None, value
        floor = 1e-6 if metric == "coupling.mk/1" else 1e-9  # the twin's frame comes from squares
        assert same(value, expected, 1e-7, floor), (value, expected)


# ---------------------------------------------------------------- the batched road, in the precision of a run

BATCHED = [m for m in measurable() if m not in ("deq.residual/1", "converge.iterations/1")]
RUN_SCALES = {
    "float32": (torch.float32, 0), "bfloat16": (torch.bfloat16, 0), "float16": (torch.float16, 0),
    "float16 × 2^10": (torch.float16, 10), "float16 subnormal": (torch.float16, -22),
    "float32 × 2^62": (torch.float32, 62), "float32 × 2^100": (torch.float32, 100),
    "float32 × 2^123": (torch.float32, 123), "float32 × 2^−62": (torch.float32, -62),
    "float32 × 2^−100": (torch.float32, -100), "float32 subnormal": (torch.float32, -135),
    "bfloat16 × 2^120": (torch.bfloat16, 120), "bfloat16 subnormal": (torch.bfloat16, -129),
    "float64 × 2^660": (torch.float64, 660), "float64 × 2^−660": (torch.float64, -660),
}  # fmt: skip


@pytest.mark.parametrize("name", RUN_SCALES)
def test_a_batch_at_the_ends_of_its_type(name):
    """Norms beyond 1e±19 have no squares in float32, and below 1e-38 no reciprocals: neither may show."""
    dtype, exponent = RUN_SCALES[name]
    rng = np.random.default_rng(5)
    x = np.cumsum(rng.normal(size=(5, 2, 16, 6)), axis=0) + 0.3
    states = [torch.from_numpy(np.ldexp(layer, exponent)).to(dtype) for layer in x]
    kept = np.stack([np.ldexp(s.double().numpy(), -exponent) for s in states])
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 11:] = False
    m = measure(states, mask, metrics=BATCHED, embed=1, sink=0)
    assert all(grid.dtype == (np.float64 if dtype == torch.float64 else np.float32) for grid in m.depth.values())
    assert not any(np.isinf(grid).any() for grid in (*m.depth.values(), *m.token.values()))
    read = 0
    for row, n in ((0, 16), (1, 11)):
        for column, metric in m.ids.items():
            if metric.startswith(("limen.", "debt.", "collapse.")) and not metric.startswith("limen.ct"):
                continue  # of the series of ct, which is compared
            deep = kept[:, row, :n]
            expected = compute(metric, deep[-1] if spec(metric).input.startswith("tokens") else deep)
            found = m.sample[row][column]
            assert found.reason == expected.reason, (column, found, expected)
            if expected.reason is None:
                value = np.ldexp(float(expected), exponent) if metric in DEGREE else float(expected)
                floor = 0 if metric in DEGREE else 3e-5
                assert float(found) == pytest.approx(value, rel=3e-4, abs=floor), (column, row)
                read += 1
    assert read > 30


def test_states_beyond_their_neighbours_are_missing_and_not_zero():
    """A float64 batch at 1e-315 has no reciprocals: every number is missing, none is made up."""
    x = np.cumsum(np.random.default_rng(6).normal(size=(4, 1, 12, 5)), axis=0)
    m = measure([torch.from_numpy(np.ldexp(layer, -1048)) for layer in x], torch.ones(1, 12, dtype=torch.bool),
                metrics=BATCHED, embed=1, sink=0)  # fmt: skip
    for column, result in m.sample[0].items():
        if column not in ("norm", "resid_norm", "limen_regime"):
            assert math.isnan(float(result)), (column, result)
            assert result.reason


def test_an_overflow_is_no_value():
    from dynprobe.metrics import Result

    for value in (math.inf, -math.inf, math.nan):
        found = Result(value, None, 1.0, 1, 1, "delta.rms/1")
        assert math.isnan(float(found))
        assert found.reason == "range"
    assert Result(math.nan, "coverage", 1.0, 1, 1, "delta.rms/1").reason == "coverage"
    assert Result("AB", None, 1.0, 1, 1, "states.bad/1").value == "AB"


def test_generation_signals_at_the_ends_of_float32():
    """1/norm of a subnormal float32 is infinite: an angle of infinities would be a quarter turn, a cosine 1."""
    from dynprobe.metrics import norm_step, phase_lag, token_cosine

    x = torch.tensor([[1.0, 0.2], [0.3, -1.0], [1.0, 1.0]])
    for scale in (2.0**100, 2.0**-100):
        assert torch.allclose(phase_lag(x * scale), phase_lag(x), atol=1e-6)
        assert torch.allclose(norm_step(x * scale), norm_step(x), atol=1e-6)
        assert torch.allclose(token_cosine(x * scale), token_cosine(x), atol=1e-6)
    for scale in (2.0**-135, 2.0**127):
        for read in (phase_lag, norm_step, token_cosine):
            assert torch.isnan(read(x * scale)).all()


def test_a_vocabulary_needs_tokens():
    from dynprobe.errors import MetricError

    for metric, shape in (("output.entropy/1", (3, 0)), ("lens.entropy/1", (2, 3, 0)), ("huginn.minp_kl/1", (2, 3, 0))):
        with pytest.raises(MetricError, match="vocabulary"):
            compute(metric, np.zeros(shape))


def test_recync_refuses_what_has_no_squares():
    from dynprobe.errors import MetricError

    with pytest.raises(MetricError, match="cosines"):
        compute("recync.detect/1", np.full(30, 1e200))
