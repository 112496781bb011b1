"""Power of a detector: AUC with ties, exact rates, Kaplan–Meier, latency with censored runs."""

import math

import numpy as np
import pytest
import slow_recovery as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, poisson

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics import (
    auc,
    detector_blind,
    detector_power,
    event_rate,
    kaplan_meier,
    onsets,
    sustained_max,
)

NAN = float("nan")
small = st.integers(0, 5)


@settings(max_examples=80, deadline=None)
@given(st.lists(small, min_size=1, max_size=15), st.lists(small, min_size=1, max_size=15))
def test_auc_against_all_pairs(clean, pert):
    found = auc(clean, pert, n_boot=50)
    assert found.value == pytest.approx(slow.auc(clean, pert), rel=1e-12)
    assert found.value == pytest.approx(mannwhitneyu(pert, clean).statistic / (len(clean) * len(pert)), rel=1e-12)
    assert auc(pert, clean, n_boot=0).value == pytest.approx(1 - found.value, abs=1e-12)
    assert auc(np.exp(clean), np.exp(pert), n_boot=0).value == pytest.approx(found.value)
    if found.reason_interval is None:
        assert 0 <= found.low <= found.value + 1e-9
        assert found.value - 1e-9 <= found.high <= 1


def test_auc_draws_prompts():
    """Against a loop that draws whole prompts, the same for both sides."""
    from dynprobe.metrics.statistics._bootstrap import interval, resample

    rng = np.random.default_rng(0)
    shift = rng.normal(size=8)
    where_a, where_b = np.repeat(range(8), 2), np.repeat(range(8), 3)
    clean = np.round(shift[where_a] + rng.normal(size=16), 1)
    pert = np.round(shift[where_b] + 0.7 + rng.normal(size=24), 1)
    found = auc(clean, pert, where_a.tolist(), where_b.tolist(), n_boot=200, seed=3)
    draws = []
    for pick in resample(8, 200, 3):
        a = np.concatenate([clean[where_a == k] for k in pick])
        b = np.concatenate([pert[where_b == k] for k in pick])
        draws.append(slow.auc(a, b))
    assert (found.low, found.high) == pytest.approx(interval(np.array(draws), np.array(draws), 0.95, 8))
    assert found.paired
    apart = auc(clean, pert, where_a.tolist(), (where_b + 100).tolist())
    assert not apart.paired
    assert apart.value == found.value
    assert apart.high - apart.low > 0


def test_auc_coverage():
    """Two normals one SD apart: AUC = Φ(1/√2); 95 % intervals hold it in 90–99.5 % of 200 experiments."""
    truth = 0.5 * (1 + math.erf(0.5))
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = auc(rng.normal(size=20), 1 + rng.normal(size=20), n_boot=300, seed=seed)
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / 200 <= 0.995


def test_auc_reasons():
    apart = auc([0, 1], [2, 3])
    assert (apart.value, apart.reason_interval) == (1.0, "separated")
    assert math.isnan(apart.low)
    assert auc([], [1]).reason == "empty"
    assert auc([1, NAN, NAN], [1, 2, 3]).reason == "coverage"
    lost = auc([1, 2, NAN], [3, 1, 4])
    assert (lost.n_missing, lost.n_clean, lost.value) == (1, 2, slow.auc([1, 2], [3, 1, 4]))
    assert auc([1], [1]).reason_interval == "prompts<2"
    with pytest.raises(MetricError, match="both sides"):
        auc([1], [1], ["a"])
    with pytest.raises(MetricError, match="each score"):
        auc([1], [1], ["a"], ["a", "b"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=25))
def test_kaplan_meier(clock):
    times, events = [t for t, _ in clock], [e for _, e in clock]
    found = kaplan_meier(times, events)
    expected = slow.kaplan_meier(clock)
    assert found.times == tuple(t for t, _ in expected)
    assert found.survival == pytest.approx([s for _, s in expected])
    assert (found.n_events, found.n_censored) == (sum(events), len(events) - sum(events))
    if all(events):
        assert found.median == np.median(times)
    if math.isnan(found.median):
        assert found.reason == "right-censored"
        assert not expected or expected[-1][1] >= 0.5 - 1e-9


def test_kaplan_meier_vector_and_median():
    found = kaplan_meier([2, 3, 3, 5], [1, 1, 0, 1])
    assert found.survival == pytest.approx([0.75, 0.5, 0.0])
    assert found.at_risk == (4, 3, 1)
    assert (found.median, found.status) == (4.0, "resolved")
    assert found.se[0] == pytest.approx(0.75 * math.sqrt(1 / (4 * 3)))
    # half of the runs never fire: the median is not known
    half = kaplan_meier([1, 2, 50, 50], [1, 1, 0, 0])
    assert (half.reason, half.exceeds) == ("right-censored", 2.0)
    assert math.isnan(half.median)
    none = kaplan_meier([50, 40], [0, 0])
    assert (none.exceeds, none.times, none.n_censored) == (50.0, (), 2)
    assert kaplan_meier([], []).reason == "empty"
    assert kaplan_meier([NAN, 1.0], [1, 1]).n_missing == 1
    assert kaplan_meier(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([True, True, True])).median == 0.0
    for times, events in (([-1], [1]), ([1, 2], [1]), ([math.inf], [0]), ([1], [2])):
        with pytest.raises(MetricError):
            kaplan_meier(times, events)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(0, 60), exposure=st.floats(1, 1e5), confidence=st.sampled_from([0.9, 0.95]))
def test_poisson_interval_is_exact(k, exposure, confidence):
    found = event_rate(k, exposure, confidence=confidence)
    tail = (1 - confidence) / 2
    assert found.value == pytest.approx(1000 * k / exposure)
    assert poisson.cdf(k, found.high * exposure / 1000) == pytest.approx(tail, rel=1e-6)
    if k:
        assert poisson.sf(k - 1, found.low * exposure / 1000) == pytest.approx(tail, rel=1e-6)
    else:
        assert found.low == 0


def test_event_rate_reasons():
    assert event_rate(0, 0).reason == "empty"
    for bad in ((1, 0), (-1, 10), (1.5, 10), (1, -3), (1, math.inf)):
        with pytest.raises(MetricError):
            event_rate(*bad)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.just(NAN), st.integers(0, 9).map(float)), max_size=20), st.integers(1, 4), small)
def test_sustained_max_is_the_level_that_fires(values, m, level):
    run = fired = 0
    for v in values:
        run = run + 1 if v > level else 0
        fired |= run >= m
    score = sustained_max(values, m)
    assert bool(fired) == bool(score > level)


def test_onsets():
    assert onsets([1, 1, 0, 0, 1, 0, 1]) == (0, 4, 6)
    assert onsets(torch.tensor([False, False])) == ()
    assert onsets([]) == ()
    with pytest.raises(MetricError, match="flag"):
        onsets([[True]])


def test_power():
    q_clean = [[0.1, 0.2, 0.9, 0.1], [0.1] * 4, [0.95] * 4]
    q_pert = [[0.1, 1.0, 1.1, 1.2], [0.1, 0.1, 0.1, 0.1], [0.9, 0.1, 2.0, 2.0], [1.0] * 4]
    active = [[v > 0.92 for v in q] for q in q_pert]
    found = detector_power(
        [sustained_max(q, 2) for q in q_clean], [sustained_max(q, 2) for q in q_pert],
        clean_fires=[onsets([v > 0.92 for v in q]) for q in q_clean], pert_fires=[onsets(a) for a in active],
        clean_tokens=[4, 4, 4], pert_tokens=[4, 4, 4, 4], start=1,
    )  # fmt: skip
    assert found.auc.value == pytest.approx(slow.auc([0.2, 0.1, 0.95], [1.1, 0.1, 2.0, 1.0]))
    assert (found.fire_clean.k, found.fire_clean.n) == (1, 3)
    assert (found.fire_pert.k, found.fire_pert.n) == (2, 4)  # the last one was active before the perturbation
    assert found.fire_pert.method == "clopper-pearson"
    assert found.n_before == 1
    assert found.latency.times == (0.0, 1.0)
    assert (found.latency.n_censored, found.latency.reason) == (2, "right-censored")
    assert (found.false_fires.k, found.false_fires.exposure) == (1, 12.0)
    for change in (
        {"pert_fires": [[1]]}, {"clean_tokens": [4]}, {"start": 9}, {"pert_fires": [[4], [], [], []]},
    ):  # fmt: skip
        kwargs = {
            "clean_fires": [[], [], []], "pert_fires": [[]] * 4, "clean_tokens": [4] * 3, "pert_tokens": [4] * 4,
        } | change  # fmt: skip
        with pytest.raises(MetricError):
            detector_power([1, 2, 3], [1, 2, 3, 4], **kwargs)


def test_blind():
    assert detector_blind(0.05, 0.0) is None
    assert detector_blind(0.049, 0.0) == "DETECTOR_BLIND"
    assert detector_blind(0.3, 0.3) == "DETECTOR_BLIND"
    assert detector_blind(NAN, 0.0) == detector_blind(0.5, NAN) == "DETECTOR_BLIND"
