"""Recovery fraction, dissociation, iatrogenic rate, correlation: vectors, invariances, intervals, refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, spearmanr

from dynprobe.errors import MetricError
from dynprobe.metrics import compute
from dynprobe.metrics.statistics import (
    delta_min,
    dissociation,
    dissociation_verdict,
    iatrogenic_rate,
    proportion_interval,
    recovery_fraction,
    semantic_refusal,
    spearman_interval,
)

INF, NAN = float("inf"), float("nan")


def runs(seed, n=24, rf=0.6, noise=0.1, effect=1.0):
    rng = np.random.default_rng(seed)
    clean = rng.normal(size=n)
    push = effect * (1 + 0.4 * rng.normal(size=n))
    pert = clean + push
    return clean, pert, pert - rf * push + noise * rng.normal(size=n)


@pytest.mark.parametrize(("rec", "rf"), [(0.3, 0.75), (0.7, -0.25), (0.1, 1.25), (0.6, 0.0), (0.2, 1.0)])
def test_rf_1(rec, rf):
    found = recovery_fraction([0.2] * 3, [0.6] * 3, [rec] * 3)
    assert (found.value, found.low, found.high) == tuple(pytest.approx(rf, abs=1e-12) for _ in range(3))
    assert (found.status, found.reason, found.n) == ("resolved", None, 3)
    assert float(compute("recovery.fraction/1", [0.2], [0.6], [rec])) == pytest.approx(rf, abs=1e-12)


def test_no_effect():
    for pert, smallest in ((0.2, 0.0), (0.2 + 1e-17, 0.0), (0.25, 0.1), (0.15, 0.1)):
        found = recovery_fraction([0.2] * 4, [pert] * 4, [0.1] * 4, delta_min=smallest)
        assert math.isnan(found.value)
        assert math.isnan(found.low)
        assert (found.status, found.reason) == ("not-resolved", "no-effect")
        assert found.pert == pytest.approx(pert)
    # a push of 0.1 + 0.2 − 0.3 is rounding, not an effect
    assert recovery_fraction([0.3], [0.1 + 0.2], [0.0]).reason == "no-effect"
    assert recovery_fraction([0.2] * 4, [0.3] * 4, [0.1] * 4, delta_min=0.09).reason is None


def test_ratio_of_means_not_mean_of_ratios():
    clean, pert, rec = [0.0, 0.0], [1.0, 0.01], [0.5, 0.5]
    assert recovery_fraction(clean, pert, rec).value == pytest.approx(0.01 / 1.01)


def test_reasons():
    blind = recovery_fraction([0.0, 0.1], [1, 1.1], [0.5, 0.5], reason="DETECTOR_BLIND")
    assert (blind.reason, blind.status, blind.reason_interval) == ("DETECTOR_BLIND", "missing", "DETECTOR_BLIND")
    assert math.isnan(blind.value)
    assert blind.pert == pytest.approx(1.05)
    assert recovery_fraction([], [], []).reason == "empty"
    lost = recovery_fraction([0, 0, 0], [1, 1, NAN], [0, NAN, 0])
    assert (lost.reason, lost.n_missing) == ("coverage", 2)
    half = recovery_fraction([0, 0], [1, NAN], [0.25, 0])
    assert (half.value, half.reason_interval) == (pytest.approx(0.75), "prompts<2")
    assert compute("recovery.fraction/1", [0, 0], [1, NAN], [0.25, 0]).coverage == 0.5
    masked = compute("recovery.fraction/1", [0, 0], [1, 9], [0.25, 0], mask=[True, False])
    assert float(masked) == pytest.approx(0.75)
    for bad in ({"delta_min": -1}, {"delta_min": NAN}, {"confidence": 2}, {"prompts": [1]}):
        with pytest.raises(MetricError):
            recovery_fraction([0.0, 0], [1.0, 1], [0.0, 0], **bad)
    with pytest.raises(MetricError, match="paired"):
        recovery_fraction([0.0], [1.0, 1], [0.0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), a=st.sampled_from([-3.0, -1.0, 0.01, 7.0]), b=st.floats(-5, 5))
def test_affine_and_order(seed, a, b):
    x = np.stack(runs(seed, n=9))
    base = recovery_fraction(*x, n_boot=200)
    moved = recovery_fraction(*(a * x + b), n_boot=200)
    assert moved.value == pytest.approx(base.value, rel=1e-8, abs=1e-9)
    assert (moved.low, moved.high) == pytest.approx((base.low, base.high), rel=1e-6, abs=1e-7)
    order = np.random.default_rng(seed).permutation(9)
    assert recovery_fraction(*x[:, order], n_boot=0).value == pytest.approx(base.value, rel=1e-9)


def test_the_bootstrap_is_that_of_prompts():
    """Against a loop that draws whole prompts with the same indices."""
    from dynprobe.metrics.statistics._bootstrap import interval, resample

    clean, pert, rec = runs(1, n=20)
    prompts = np.repeat(list("abcdefg"), 3)[:20]
    found = recovery_fraction(clean, pert, rec, prompts, n_boot=300, seed=5)
    draws = []
    for pick in resample(7, 300, 5):
        rows = np.concatenate([np.flatnonzero(prompts == "abcdefg"[k]) for k in pick])
        draws.append((pert[rows] - rec[rows]).sum() / (pert[rows] - clean[rows]).sum())
    expected = interval(np.array(draws), np.array(draws), 0.95, 7)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert (found.n, found.n_pairs) == (7, 20)


@pytest.mark.parametrize("rf", [0.0, 0.6])
def test_coverage(rf):
    """Nominal 95 % holds the truth in 90–99 % of 300 experiments of 16 prompts."""
    hits = 0
    for seed in range(300):
        found = recovery_fraction(*runs(seed, n=16, rf=rf, noise=0.3), n_boot=400, seed=seed)
        hits += found.low <= rf <= found.high
    assert 0.90 <= hits / 300 <= 0.99


def test_a_weak_effect_opens_the_interval():
    clean, pert, rec = runs(0, n=8, effect=0.05, noise=0.0)
    pert = pert + np.random.default_rng(1).normal(size=8)
    found = recovery_fraction(clean, pert, rec)
    assert found.reason is None
    assert found.n_undetermined > 0
    assert (found.low, found.high) == (-INF, INF)


def test_delta_min():
    d = np.random.default_rng(0).normal(size=50)
    assert delta_min(d) == pytest.approx(3 * np.std(d, ddof=1))
    assert delta_min([*d, NAN]) == delta_min(d)
    assert math.isnan(delta_min([0.1]))


def test_textual_verdicts():
    assert dissociation_verdict((0.6, 0.9), (-0.05, 0.08)) == "DISSOCIATED"
    assert dissociation_verdict((0.6, 0.9), (-0.3, 0.4)) == "INDETERMINATE"
    assert dissociation_verdict((0.6, 0.9), (0.2, 0.9)) == "COUPLED"
    assert dissociation_verdict((0.11, 0.2), (0.11, 0.9)) == "COUPLED"
    assert dissociation_verdict((0.4, 0.9), (-0.05, 0.08)) == "INDETERMINATE"
    assert dissociation_verdict((0.6, 0.9), (-0.12, 0.08)) == "INDETERMINATE"
    assert dissociation_verdict((0.6, 0.9), (-0.12, 0.08), (-0.09, 0.07)) == "DISSOCIATED"
    assert dissociation_verdict((NAN, NAN), (-0.05, 0.08)) == "INDETERMINATE"
    assert dissociation_verdict((0.6, 0.9), (-INF, INF)) == "INDETERMINATE"
    with pytest.raises(MetricError, match="low, high"):
        dissociation_verdict((0.9, 0.6), (0, 1))


@pytest.mark.parametrize(
    ("rf_dyn", "rf_sem", "noise", "verdict"),
    [
        (0.8, 0.0, 0.02, "DISSOCIATED"), (0.8, 0.7, 0.1, "COUPLED"), (0.8, 0.0, 1.0, "INDETERMINATE"),
        (0.2, 0.0, 0.02, "INDETERMINATE"),
    ],
)  # fmt: skip
def test_verdicts_on_data(rf_dyn, rf_sem, noise, verdict):
    dyn, sem = runs(0, n=30, rf=rf_dyn, noise=0.05), runs(1, n=30, rf=rf_sem, noise=noise)
    found = dissociation(dyn, sem)
    assert found.verdict == verdict
    assert found.reason is None
    assert found.equivalent == (verdict == "DISSOCIATED" or (rf_sem == 0.0 and noise < 0.1))
    # each side is the recovery fraction of that side, and the same prompts were drawn for both
    alone = recovery_fraction(*dyn), recovery_fraction(*sem)
    assert (replace(found.dynamic), replace(found.semantic)) == alone
    assert found.draws.shape == (2000, 2)
    assert found.tost[0] >= found.semantic.low
    assert found.tost[1] <= found.semantic.high
    assert compute("dissoc.rf2/1", np.stack(dyn), np.stack(sem)).value == verdict


def test_joint_draws_carry_the_dependence():
    dyn = runs(0, n=30, rf=0.5, noise=0.3)
    same = dissociation(dyn, dyn).draws
    assert same[:, 0] == pytest.approx(same[:, 1])
    other = dissociation(dyn, runs(7, n=30, rf=0.5, noise=0.3)).draws
    assert abs(np.corrcoef(other.T)[0, 1]) < 0.5


def test_missing_verdicts():
    dyn, sem = runs(0), runs(1)
    blind = dissociation(dyn, sem, reason="DETECTOR_BLIND")
    assert (blind.verdict, blind.reason) == ("DETECTOR_BLIND", "DETECTOR_BLIND")
    assert math.isnan(blind.dynamic.value)
    assert math.isnan(blind.semantic.value)
    refused = dissociation(dyn, sem, reason_semantic="no labels")
    assert (refused.verdict, refused.reason) == ("INDETERMINATE", "no labels")
    assert np.isfinite(refused.dynamic.value)
    assert dissociation(dyn, (sem[0], sem[0], sem[2])).reason == "no-effect"
    assert dissociation(dyn, sem, delta_min=(0.0, 99.0)).semantic.reason == "no-effect"
    one = dissociation([[0.0], [1.0], [0.5]], [[0.0], [1.0], [0.5]])
    assert (one.verdict, one.reason) == ("INDETERMINATE", "prompts<2")
    assert dissociation([[]] * 3, [[]] * 3).reason == "empty"
    sem[1][:3] = NAN
    lost = dissociation(dyn, sem)
    assert (lost.n_pairs, lost.dynamic.n_missing, lost.semantic.n_missing) == (21, 3, 3)
    with pytest.raises(MetricError, match="same runs"):
        dissociation(dyn, [x[:5] for x in sem])
    with pytest.raises(MetricError, match="clean, pert, rec"):
        dissociation(dyn[:2], sem)
    with pytest.raises(MetricError, match="two tables"):
        compute("dissoc.rf2/1", np.ones((2, 4)), np.ones((3, 4)))


def test_semantic_refusals():
    assert semantic_refusal(0.9, 0.5, 0.25) is None
    assert semantic_refusal(0.85, 0.65, 0.25) is None  # exactly 0.2 in the text's numbers
    assert semantic_refusal(1.0, 0.91, 0.25).reason == "clean-perturbed<0.2"
    assert semantic_refusal(0.5, 0.2, 0.25).reason == "clean-chance<0.3"
    assert semantic_refusal(NAN, 0.2, 0.25).reason == "coverage"
    dose = semantic_refusal(1.0, 0.91, 0.25, alphas=[0.1, 0.5, 1.0], accuracies=[1.0, 0.91, 0.57]).dose
    assert 0.5 < dose.value < 1.0
    never = semantic_refusal(1.0, 0.99, 0.25, alphas=[0.1, 0.5], accuracies=[1.0, 0.99]).dose
    assert never.status == "right-censored"
    with pytest.raises(MetricError, match="accuracy"):
        semantic_refusal(1.2, 0.5, 0.25)
    # four-choice items: 24 right of 24 clean, 22 perturbed
    clean, pert = np.ones(24), np.array([0.0] * 2 + [1.0] * 22)
    found = dissociation(runs(0), (clean, pert, clean), chance=0.25)
    assert (found.verdict, found.semantic.reason) == ("INDETERMINATE", "clean-perturbed<0.2")
    assert np.isfinite(found.dynamic.low)
    broken = np.array([0.0, 1.0] * 12)
    assert dissociation(runs(0, rf=0.8), (clean, broken, clean), chance=0.25).verdict == "COUPLED"


def test_iatrogenic():
    assert iatrogenic_rate([2.0] * 44, [2.0] * 44, 0.1).high == pytest.approx(1 - 0.025 ** (1 / 44), rel=1e-9)
    nll = np.full(10, 2.0)
    worse = nll + np.array([0.31, 0.3, 0.29, -9, 0, 0, 0, 0, 0, NAN])
    found = iatrogenic_rate(nll, worse, 0.1, clean_answers=list("abcdabcdab"), mode_answers=list("abcdabcdXX"))
    assert (found.k, found.n) == (2, 9)
    assert found.method == "clopper-pearson"
    assert iatrogenic_rate(nll, [NAN] * 10, 0.1).reason == "coverage"
    assert iatrogenic_rate([], [], 0.1).reason == "empty"
    for bad in ((nll, nll[:3], 0.1), (nll, nll, -1)):
        with pytest.raises(MetricError):
            iatrogenic_rate(*bad)
    with pytest.raises(MetricError, match="answers"):
        iatrogenic_rate(nll, nll, 0.1, clean_answers=["a"] * 10)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 80), data=st.data())
def test_exact_interval_is_the_binomial_one(n, data):
    k = data.draw(st.integers(0, n))
    p = proportion_interval(k, n, method="exact")
    if k:
        assert binom.sf(k - 1, n, p.low) == pytest.approx(0.025, rel=1e-6)
    if k < n:
        assert binom.cdf(k, n, p.high) == pytest.approx(0.025, rel=1e-6)
    assert proportion_interval(k, n).method == ("clopper-pearson" if k in (0, n) else "wilson")
    with pytest.raises(MetricError, match="method"):
        proportion_interval(k, n, method="wald")


@pytest.mark.parametrize("seed", range(10))
def test_spearman(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, 30).astype(float)
    y = x + rng.integers(0, 6, 30)
    found = spearman_interval(x, y, n_boot=300)
    assert found.value == pytest.approx(spearmanr(x, y).statistic, rel=1e-9)
    assert -1 <= found.low <= found.value <= found.high <= 1
    moved = spearman_interval(np.exp(x), -3 * y, n_boot=300)
    assert moved.value == pytest.approx(-found.value, rel=1e-9)
    # weighted ranks are the ranks of the drawn runs
    from dynprobe.metrics.statistics._bootstrap import multiplicity, resample
    from dynprobe.metrics.statistics._correlation import _weighted

    pick = resample(30, 5, seed)
    draws = _weighted(x, y, multiplicity(pick, 30))
    for row, value in zip(pick, draws, strict=True):
        assert value == pytest.approx(spearmanr(x[row], y[row]).statistic, rel=1e-9)


def test_spearman_reasons():
    assert spearman_interval([1, 2, 3], [1, 1, 1]).reason == "zero-denominator"
    assert spearman_interval([1, 2], [1, 2]).reason == "runs<3"
    assert spearman_interval([], []).reason == "empty"
    assert spearman_interval([1, 2, 3, NAN, NAN, NAN, NAN], range(7)).reason == "coverage"
    few = spearman_interval([1, 2, 3, 4], [1, 2, 3, 4], list("aabb"))
    assert (few.value, few.reason_interval) == (1.0, "prompts<3")
    wide = spearman_interval(range(40), np.arange(40) + 8 * np.sin(np.arange(40)), np.repeat(range(8), 5))
    assert wide.n == 8
    assert wide.low < wide.value < wide.high
    with pytest.raises(MetricError, match="same runs"):
        spearman_interval([1, 2], [1])
