"""Convergence metrics: vectors, edges, censoring, invariances, the slow twin, the batched road, the one call."""

import math

import numpy as np
import pytest
import slow
import slow_convergence as twins
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics_measure import batch, one_row, same
from test_metrics_sets_slow import agree, trajectory

from dynprobe.errors import MetricError
from dynprobe.metrics import CORE, DEFAULT, TOLERANCES, compute, convergence, ids, measure, requested, spec
from dynprobe.metrics._convergence import RESIDUALS, first_below

E1, E2 = np.array([1.0, 0.0]), np.array([0.0, 1.0])
STATES = ["deq.residual/1", "converge.accel/1", "converge.rho/1", "converge.iterations/1"]
OUTPUT = ["huginn.entropy_diff/1", "huginn.kl/1", "huginn.minp_kl/1", "huginn.argmax_stable/1"]


def scalar(values):
    return np.asarray(values, dtype=np.float64)[:, None, None]


def halving(n):
    return scalar(1 + 2.0 ** -np.arange(n))


def unit(path):
    return np.asarray(path, dtype=np.float64)[:, None, :]


def close(result, value, rel=1e-9):
    return float(result) == pytest.approx(value, rel=rel, abs=1e-12)


def missing(result, reason):
    return math.isnan(float(result)) and result.reason == reason


# the normative vectors


@pytest.mark.parametrize("n", [3, 5, 12, 45])
def test_halving_contracts_by_one_half_exactly(n):
    found = compute("converge.rho/1", halving(n))
    assert float(found) == 0.5
    assert (found.profile == 0.5).all()
    assert found.n_steps == n - 2
    assert np.array_equal(compute("delta.rms/1", halving(n)).profile, 2.0 ** -np.arange(1.0, n))


def test_constant_trajectory():
    for x in (np.ones((6, 3, 4)), np.full((6, 3, 4), 0.1)):
        assert float(compute("delta.rms/1", x)) == 0
        assert missing(compute("converge.rho/1", x), "zero-denominator")
        assert compute("converge.rho/1", x).extras["n_still"] == 4
        assert float(compute("deq.residual/1", x)) == 0
        assert float(compute("converge.accel/1", x)) == 0
        assert float(compute("converge.iterations/1", x)) == 1


def test_other_rates_and_growth():
    for rate in (0.9, 0.3, 1.7):
        assert close(compute("converge.rho/1", scalar(rate ** np.arange(9.0))), rate)
    line = compute("converge.rho/1", scalar(np.arange(1.0, 9.0)))
    assert close(line, 1.0)
    # the median, not the mean: one jump does not decide
    x = np.cumsum([1, 0.5, 0.25, 0.125, 4.0, 2.0, 1.0, 0.5])
    assert close(compute("converge.rho/1", scalar(x)), 0.5)


def test_rounding_is_no_step():
    """A state that stopped up to rounding has no ratio; the steps before it keep theirs."""
    x = 1 + 2.0 ** -np.arange(80.0)
    found = compute("converge.rho/1", scalar(x))
    assert close(found, 0.5)
    assert found.extras["n_still"] > 20
    assert found.n_steps + found.extras["n_still"] == 78
    still = np.ones((6, 2, 5)) * np.linspace(1, 2, 5)
    noise = still * (1 + 1e-16 * np.random.default_rng(0).normal(size=still.shape))
    assert missing(compute("converge.rho/1", noise), "zero-denominator")


def test_deq_residual_vectors():
    profile = compute("deq.residual/1", halving(5)).profile
    np.testing.assert_allclose(profile, [1 / 3, 1 / 5, 1 / 9, 1 / 17], rtol=1e-8)
    s = 1 + 2.0 ** -np.arange(5)
    expected = -np.diff(s) / (s[1:] + 1e-5)
    np.testing.assert_allclose(compute("deq.residual/1", halving(5), eps=1e-5).profile, expected, rtol=1e-13)
    assert close(compute("deq.residual/1{eps=1}", unit([E1, E1 + E2])), 1 / (math.sqrt(2) + 1))
    # one norm over all units, not the mean of quotients
    x = np.stack([np.stack([E1, 3 * E1]), np.stack([2 * E1, 3 * E1])])
    assert close(compute("deq.residual/1", x), 1 / math.sqrt(13), rel=1e-8)
    assert close(compute("delta.rel_next/1", x), 0.25)


def test_acceleration_vectors():
    k = np.arange(1, 7.0)
    change = 2.0 ** -(k + 1)
    np.testing.assert_allclose(compute("converge.accel/1", halving(8)).profile, change / (1 + change), rtol=1e-12)
    np.testing.assert_allclose(compute("converge.accel/1{norm=none}", halving(8)).profile, change, rtol=1e-12)
    drift = np.arange(1.0, 9.0)[:, None, None] * np.ones((1, 2, 3))
    assert float(compute("converge.accel/1", drift)) == 0
    assert missing(compute("converge.accel/1", drift[:2]), "depth<3")
    assert missing(compute("converge.rho/1", drift[:2]), "depth<3")
    with pytest.raises(MetricError, match="state, none"):
        compute("converge.accel/1", drift, norm="step")


@pytest.mark.parametrize(
    ("params", "k"),
    [
        ({"tol": 0.1}, 4), ({"tol": 0.125}, 4), ({"tol": 0.1250001}, 3), ({"tol": 10}, 1),
        ({"of": "delta_rel_next", "tol": 0.1}, 4), ({"of": "delta_rel_next", "tol": 0.2}, 3),
        ({"of": "delta_rel_prev", "tol": 0.1}, 4), ({"of": "delta_rel_prev", "tol": 0.25}, 2),
        ({"of": "converge_accel", "tol": 0.1}, 4), ({"of": "converge_accel", "tol": 0.2001}, 2),
        ({"tol": 0.1, "patience": 3}, 6), ({"of": "delta_angle"}, 1), ({"of": "influence_block", "patience": 2}, 2),
        ({"of": "delta_rel_next_fro", "tol": 0.1}, 4), ({"of": "deq_residual", "tol": 0.1}, 4),
        ({"of": "delta_rel_prev_fro", "tol": 0.25}, 2),
    ],
)  # fmt: skip
def test_iterations_to_tolerance(params, k):
    """Δ_j = 2^−(j+1) for delta_rms; k is the smallest with Δ_{k−1} strictly below."""
    found = compute("converge.iterations/1", halving(10), **params)
    assert float(found) == k
    assert found.reason is None
    assert (found.extras["time"], found.extras["event"]) == (k, 1)
    if found.per_unit is not None:
        assert found.per_unit.tolist() == [k]


def test_censoring():
    for n in (2, 3, 4):
        found = compute("converge.iterations/1", halving(n), tol=0.1)
        assert missing(found, "censored")
        assert (found.extras["time"], found.extras["event"]) == (n - 1, 0)
        assert np.isnan(found.per_unit).all()
    assert float(compute("converge.iterations/1", halving(5), tol=0.1)) == 4
    assert missing(compute("converge.iterations/1", halving(5), tol=0.1, patience=2), "censored")
    # one slow unit holds back the mean, and is told apart per unit
    x = np.concatenate([halving(9), scalar(2.0 ** np.arange(9.0))], axis=1)
    found = compute("converge.iterations/1", x, tol=0.1)
    assert missing(found, "censored")
    assert found.per_unit[0] == 4
    assert math.isnan(found.per_unit[1])


def test_unknown_residuals_are_not_passed_over():
    x = halving(8).repeat(2, axis=1)
    x[2] = np.nan
    found = compute("converge.iterations/1", x, tol=0.1)
    assert missing(found, "coverage")
    assert math.isnan(found.extras["time"])
    assert float(compute("converge.iterations/1", x, tol=10)) == 1
    late = halving(8)
    late[6] = np.nan
    assert float(compute("converge.iterations/1", late, tol=0.1)) == 4


def test_edges():
    x = np.random.default_rng(0).normal(size=(5, 4, 3))
    for metric in STATES:
        assert missing(compute(metric, x, mask=np.zeros(4)), "empty")
        assert missing(compute(metric, np.full((5, 4, 3), np.nan)), "coverage")
        assert missing(compute(metric, np.zeros((5, 4, 3))), "coverage")
        assert compute(metric, x[:1]).reason.startswith("depth<")
    for params in ({"tol": 0.0}, {"tol": -1}, {"patience": 0}):
        with pytest.raises(MetricError, match="tolerance"):
            compute("converge.iterations/1", x, **params)
    with pytest.raises(MetricError, match="Did you mean 'delta_rms'"):
        compute("converge.iterations/1", x, of="delta_rmse")


# the series, the two runs, the output


def test_exit_of_a_series():
    r = [0.5, 0.1, 0.2, 0.05, 0.04]
    assert float(compute("converge.exit/1", r, tol=0.15)) == 2
    assert float(compute("converge.exit/1", r, tol=0.15, patience=2)) == 5
    out = compute("converge.exit/1", r, tol=0.01)
    assert missing(out, "censored")
    assert (out.extras["time"], out.extras["event"]) == (5, 0)
    assert missing(compute("converge.exit/1", [0.5, np.nan, 0.01], tol=0.1), "coverage")
    assert float(compute("converge.exit/1", [0.01, np.nan], tol=0.1)) == 1
    assert missing(compute("converge.exit/1", [0.5, 0.1], mask=[0, 0]), "empty")
    at, unsure = first_below(np.array([[1.0, np.nan], [0.1, 0.1]]), 0.5)
    assert at.tolist() == [2, 2]
    assert unsure.tolist() == [False, True]


def test_alignment():
    same_ = np.random.default_rng(0).normal(size=(4, 6))
    assert close(compute("converge.alignment/1", same_, 3 * same_), 1)
    assert close(compute("converge.alignment/1", E1[None], E2[None]), 0)
    assert close(compute("converge.alignment/1", E1[None], -E1[None]), -1)
    other = np.random.default_rng(1).normal(size=(4, 6))
    expected = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(same_, other, strict=True)])
    assert close(compute("converge.alignment/1", same_, other), expected)
    masked = compute("converge.alignment/1", same_, other, mask=[1, 0, 1, 1])
    np.testing.assert_allclose(float(masked), np.mean(masked.per_unit[[0, 2, 3]]), rtol=1e-12)
    assert missing(compute("converge.alignment/1", 0 * same_, other), "coverage")
    assert missing(compute("converge.alignment/1", same_, other, mask=np.zeros(4)), "empty")
    with pytest.raises(MetricError, match="one shape"):
        compute("converge.alignment/1", same_, other[:3])


def logits_of(*rows):
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(np.asarray(rows, dtype=np.float64)), -800)[:, None, :]


def test_output_vectors():
    x = logits_of((0.75, 0.25), (0.25, 0.75))
    assert close(compute("huginn.kl/1", x), 0.5 * math.log(3))
    assert close(compute("huginn.entropy_diff/1", x), 0)
    assert close(compute("huginn.entropy_diff/1", logits_of((0.5, 0.5), (1, 0))), math.log(2))
    tail = logits_of((0.96, 0.02, 0.01, 0.01), (0.96, 0.01, 0.02, 0.01))
    assert close(compute("huginn.minp_kl/1", tail), 0)
    assert float(compute("huginn.kl/1", tail)) > 1e-3
    flat = logits_of((0.4, 0.35, 0.25), (0.3, 0.4, 0.3))
    assert close(compute("huginn.minp_kl/1", flat), float(compute("huginn.kl/1", flat)))
    for metric in OUTPUT[:3]:
        assert close(compute(metric, np.ones((4, 2, 5))), 0)
        assert missing(compute(metric, np.ones((1, 2, 5))), "depth<2")
        assert missing(compute(metric, np.full((3, 2, 5), np.nan)), "coverage")
        assert missing(compute(metric, np.ones((3, 2, 5)), mask=[0, 0]), "empty")


@pytest.mark.parametrize(("tops", "value"), [("abbb", 2), ("aaaa", 3), ("aaab", 0), ("abab", 0), ("ab", 0), ("aa", 1)])
def test_argmax_stability(tops, value):
    x = np.stack([np.eye(3)["abc".index(t)] for t in tops])[:, None, :]
    found = compute("huginn.argmax_stable/1", x)
    assert float(found) == value
    run = 0
    for k in range(1, len(tops)):
        run = run + 1 if tops[k] == tops[k - 1] else 0
        assert found.profile[k - 1] == run
    both = np.concatenate([x, np.repeat(np.eye(3)[:1][None], len(tops), 0)], axis=1)
    assert float(compute("huginn.argmax_stable/1", both)) == (value + len(tops) - 1) / 2


def test_output_against_loops():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(5, 3, 7)) * 10.0 ** rng.uniform(-1, 1)
        for metric, pair in (
            ("huginn.entropy_diff/1", lambda a, b: abs(slow.entropy(b) - slow.entropy(a))),
            ("huginn.kl/1", slow.kl),
            ("huginn.minp_kl/1", twins.minp_kl),
            ("huginn.minp_kl/1{minp=0.5}", lambda a, b: twins.minp_kl(a, b, 0.5)),
        ):
            expected = [np.mean([float(pair(x[k, t], x[k + 1, t])) for t in range(3)]) for k in range(4)]
            found = compute(metric, x)
            np.testing.assert_allclose(found.profile, expected, rtol=1e-9, atol=1e-12, err_msg=metric)
            assert close(found, np.mean(expected))
            assert close(compute(metric, x + 7.5), np.mean(expected), rel=1e-8)


def test_q_exit():
    p = [0.1, 0.2, 0.3, 0.4]
    for q, t in ((0.5, 3), (0.1, 1), (0.3, 2), (1, 4), (0.6, 3), (0.61, 4)):
        assert float(compute("ouro.q_exit/1", p, q=q)) == t
    out = compute("ouro.q_exit/1", p[:2])
    assert missing(out, "censored")
    assert (out.extras["time"], out.extras["event"]) == (2, 0)
    assert missing(compute("ouro.q_exit/1", [0.1, np.nan, 0.8]), "coverage")
    for wrong in ([0.9, 0.9], [-0.1, 0.2]):
        with pytest.raises(MetricError, match="probabilities"):
            compute("ouro.q_exit/1", wrong)
    with pytest.raises(MetricError, match="q lies"):
        compute("ouro.q_exit/1", p, q=0.0)


# the slow twin


def shrinking(seed):
    """A trajectory with everything wrong; every other one has shrinking steps and more depth."""
    if seed % 2:
        return trajectory(seed)
    rng = np.random.default_rng(seed)
    D, N, d = int(rng.integers(1, 10)), int(rng.integers(1, 8)), int(rng.integers(1, 6))
    steps = rng.normal(size=(D, N, d)) * 0.6 ** np.arange(D)[:, None, None]
    x = (np.cumsum(steps, axis=0) + 0.3) * 10.0 ** rng.integers(-3, 4)
    mask = rng.random((D, N)) < 0.9 if seed % 3 else np.ones((D, N), bool)
    if seed % 8 == 2:
        x[rng.random((D, N)) < 0.1] = np.nan
    if seed % 8 == 4 and D > 2:
        x[D // 2 :] = x[D // 2]
    if seed % 10 == 8:
        x[rng.random((D, N)) < 0.15] = 0.0
    return x, mask


@pytest.mark.parametrize(
    ("metric", "twin", "options"),
    [
        ("deq.residual/1", twins.deq, {}),
        ("deq.residual/1{eps=1e-05}", twins.deq, {"eps": 1e-5}),
        ("converge.accel/1", twins.accel, {}),
        ("converge.accel/1{norm=none}", twins.accel, {"norm": "none"}),
        ("converge.rho/1", twins.rho, {}),
    ],
)
def test_states_against_loops(metric, twin, options):
    seen = set()
    for seed in range(60):
        x, mask = shrinking(seed)
        with np.errstate(all="ignore"):
            expected = twin(x, mask, **options)
        agree(compute(metric, x, mask=mask), expected)
        seen.add(expected[1])
    assert {None, "empty", "coverage"} <= seen


@pytest.mark.parametrize("of", RESIDUALS)
@pytest.mark.parametrize("patience", [1, 2])
def test_iterations_against_loops(of, patience):
    seen = set()
    for seed in range(60):
        x, mask = shrinking(seed)
        size = np.abs(x[np.isfinite(x)]).mean() if np.isfinite(x).any() else 1.0
        tol = {"delta_rms": 0.3 * size, "delta_angle": 0.1}.get(of, 0.3)
        with np.errstate(all="ignore"):
            value, reason, coverage, time, event = twins.iterations(x, mask, of, tol, patience)
        found = compute("converge.iterations/1", x, mask=mask, of=of, tol=tol, patience=patience)
        assert found.reason == reason, (seed, found)
        np.testing.assert_equal(float(found), value)
        np.testing.assert_equal((found.extras["time"], found.extras["event"]), (time, event))
        if not math.isnan(coverage) and reason != "empty":
            assert found.coverage == pytest.approx(coverage)
        seen.add(reason)
    assert {None, "censored", "coverage", "empty"} <= seen


def test_per_unit_iterations_are_those_of_the_unit_alone():
    rng = np.random.default_rng(5)
    x = 1 + np.cumsum(rng.normal(size=(12, 6, 4)) * 0.5 ** np.arange(12)[:, None, None], axis=0)
    for of in RESIDUALS:
        found = compute("converge.iterations/1", x, of=of, tol=0.05)
        if found.per_unit is None:
            assert of in ("deq_residual", "delta_rel_prev_fro", "delta_rel_next_fro")
            continue
        for n in range(6):
            alone = compute("converge.iterations/1", x[:, n : n + 1], of=of, tol=0.05)
            np.testing.assert_equal(found.per_unit[n], float(alone))


# invariances

KINDS = ["R", "R_l", "S", "S_l", "P", "scale-per-state", "shift"]


def transformed(kind, x, rng):
    D, N, d = x.shape
    turn = lambda: np.linalg.qr(rng.normal(size=(d, d)))[0]  # noqa: E731
    return {
        "R": lambda: x @ turn(),
        "R_l": lambda: np.stack([layer @ turn() for layer in x]),
        "S": lambda: x * np.exp(rng.normal()),
        "S_l": lambda: x * np.exp(rng.normal(size=(D, 1, 1))),
        "P": lambda: x[:, rng.permutation(N)],
        "scale-per-state": lambda: x * np.exp(rng.normal(size=(D, N, 1))),
        "shift": lambda: x + 3 * rng.normal(size=d),
    }[kind]()


@pytest.mark.parametrize("metric", ["deq.residual/1{eps=0.1}", "converge.accel/1", "converge.rho/1"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), depth=st.integers(3, 7), units=st.integers(2, 6), dim=st.integers(2, 6))
def test_declared_invariances_hold(metric, seed, depth, units, dim):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(depth, units, dim))
    before = float(compute(metric, x))
    for kind in KINDS:
        if kind in spec(metric).invariances:
            assert float(compute(metric, transformed(kind, x, rng))) == pytest.approx(before, rel=1e-8, abs=1e-10), kind


@pytest.mark.parametrize("metric", ["deq.residual/1{eps=0.1}", "converge.accel/1", "converge.rho/1"])
def test_other_transformations_change_it(metric):
    rng = np.random.default_rng(11)
    x = rng.normal(size=(6, 8, 5)) + 0.5
    before = float(compute(metric, x))
    for kind in KINDS:
        if kind not in spec(metric).invariances:
            changes = [abs(float(compute(metric, transformed(kind, x, rng))) - before) for _ in range(3)]
            assert max(changes) > 1e-4 * before, kind


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_iterations_are_invariant(seed):
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.normal(size=(9, 4, 5)) * 0.5 ** np.arange(9)[:, None, None], axis=0)
    tol = float(np.exp(rng.normal() - 3))
    before = compute("converge.iterations/1", x, tol=tol)
    for kind in spec("converge.iterations/1").invariances:
        after = compute("converge.iterations/1", transformed(kind, x, rng), tol=tol)
        assert after.reason == before.reason
        np.testing.assert_equal(float(after), float(before))
    twice = compute("converge.iterations/1", 2 * x, tol=2 * tol)
    np.testing.assert_equal(float(twice), float(before))


def test_deq_tends_to_the_frobenius_quotient():
    x = np.random.default_rng(3).normal(size=(6, 4, 5))
    plain = compute("delta.rel_next/1{agg=fro}", x)
    np.testing.assert_allclose(compute("deq.residual/1", x).profile, plain.profile, rtol=2e-9)
    assert float(compute("deq.residual/1{eps=1}", x)) < float(plain)


# catalogue, batched road, one call


def test_catalogue():
    named = ids(group="convergence")
    assert set(named) == {*STATES, *OUTPUT, "converge.exit/1", "converge.alignment/1", "ouro.q_exit/1"}
    assert not set(named) & {m.split("{")[0] for m in (*CORE, *DEFAULT)}
    assert not set(named) & {*ids(group="core"), *ids(group="default")}


ROAD = [
    *STATES,
    "deq.residual/1{eps=1e-05}",
    "converge.accel/1{norm=none}",
    "converge.iterations/1{of=delta_angle,tol=0.45}",
]


@pytest.mark.parametrize("dirt", [False, True])
@pytest.mark.parametrize(("embed", "sink"), [(0, 1), (1, 0)])
def test_rows_of_a_batch_equal_compute(dirt, embed, sink):
    x, mask = batch(dirt=dirt)
    m = measure([torch.from_numpy(s) for s in x], torch.from_numpy(mask), metrics=ROAD, embed=embed, sink=sink)
    columns = {i: c for c, i in m.ids.items()}
    assert set(columns) == set(ROAD)
    for row, got in enumerate(m.sample):
        full, _ = one_row(x, mask, row, embed, sink, None)
        for metric in ROAD:
            expected = compute(metric, full)
            same(got[columns[metric]], expected, 1e-9)
            if expected.profile is not None:
                offset = len(x) - len(expected.profile)
                np.testing.assert_allclose(
                    m.profile[columns[metric]][offset:, row], expected.profile, rtol=1e-8, atol=1e-10
                )
                assert (m.profile_reason[columns[metric]][:offset, row] == "first").all()
    m.profile_coverage  # noqa: B018 - exists for every profile
    taken = m.take([0, 0])
    assert [r.value for r in taken.sample[0].values()] == pytest.approx(
        [r.value for r in m.sample[0].values()], nan_ok=True
    )


def test_a_run_may_be_asked_for_them():
    assert requested(STATES) == tuple(sorted(STATES, key=ids().index))
    assert requested(["converge.iterations/1{tol=0.03,of=delta_rel_next}"]) == (
        "converge.iterations/1{of=delta_rel_next,tol=0.03}",
    )
    with pytest.raises(MetricError, match="no residual"):
        requested(["converge.iterations/1{of=kappa}"])
    with pytest.raises(MetricError, match="logits"):
        requested(["huginn.kl/1"])


def test_one_call():
    x = 1 + 2.0 ** -np.arange(14.0)[:, None, None] * np.ones((1, 3, 2))
    logits = np.log(np.linspace(1, 2, 5)) * (1 + 4.0 ** -np.arange(14.0)[:, None, None])
    found = convergence(x, logits)
    for metric, result in found.items():
        if "→" not in metric:
            assert result.metric_id == metric
    assert float(found["converge.rho/1"]) == pytest.approx(0.5)
    for name, tol in TOLERANCES.items():
        if name in RESIDUALS:
            patience = 2 if name == "converge_accel" else 1
            wanted = compute("converge.iterations/1", x, of=name, tol=tol, patience=patience)
            assert float(found[wanted.metric_id]) == float(wanted)
    for metric in OUTPUT[:3]:
        (key,) = (k for k in found if k.startswith(f"{metric} →"))
        name = spec(metric).column
        expected = compute("converge.exit/1", compute(metric, logits).profile, tol=TOLERANCES[name])
        assert float(found[key]) == float(expected)
        assert expected.reason is None
    assert "huginn.kl/1" not in convergence(x)
    tight = convergence(x, tol={"delta_rms": 1e-9}, patience=3)
    assert tight["converge.iterations/1{patience=3,tol=1e-09}"].reason == "censored"
    with pytest.raises(MetricError, match="delta_rms"):
        convergence(x, tol={"delta_rm": 1.0})
