"""COLLAPSE–RIVALRY cycles: the vectors, the censoring rule, many texts."""

import math

import numpy as np
import pytest
import slow_recovery as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import compute, cycles_ct, cycles_margin, reopening
from dynprobe.metrics.statistics import proportion_interval

LEVEL = {"C": 1.0, "R": 0.0, "-": 0.5, "?": math.nan}


def margin(word):
    return [LEVEL[letter] for letter in word]


@pytest.mark.parametrize(
    ("word", "rate", "counts"),
    [
        ("CCCRRRCCC", 1.0, (2, 1, 1)), ("CCC--CCCRRR", 0.5, (2, 1, 0)), ("RRRRRR", math.nan, (0, 0, 0)),
        ("CCC", math.nan, (1, 0, 1)), ("CCRRRCC", math.nan, (0, 0, 0)), ("CCCRRCCC", 0.0, (2, 0, 1)),
        ("CCC?CCCRRR", 0.5, (2, 1, 0)), ("CCCCCC---RRR", 1.0, (1, 1, 0)),
    ],
)  # fmt: skip
def test_vectors(word, rate, counts):
    for found in (cycles_margin(margin(word)), cycles_ct([1 - v for v in margin(word)], 0.1, 0.9)):
        assert found.rate == pytest.approx(rate, nan_ok=True)
        assert (found.n_collapse, found.n_reopened, found.n_censored) == counts
    result = compute("cycles.margin/1", margin(word))
    assert float(result) == pytest.approx(rate, nan_ok=True)
    assert result.reason == ("zero-denominator" if math.isnan(rate) else None)
    other = compute("cycles.ct/1", [1 - v for v in margin(word)], low=0.1, high=0.9)
    assert float(other) == pytest.approx(rate, nan_ok=True)


def test_limits():
    assert cycles_margin([0.9] * 3 + [0.2] * 3).rate == 1.0
    assert cycles_ct([0.1] * 3 + [0.9] * 3, 0.1, 0.9).n_collapse == 0  # strictly below, strictly above
    assert cycles_margin(margin("CRCR"), w=1).rate == 1.0
    assert compute("cycles.margin/1{w=1}", margin("CRCR")).metric_id == "cycles.margin/1{w=1}"
    assert cycles_margin(torch.tensor(margin("CCCRRR"))).rate == 1.0
    for bad in ({"low": 0.9, "high": 0.2}, {"w": 0}):
        with pytest.raises(MetricError):
            cycles_margin([1.0], **bad)
    with pytest.raises(MetricError, match="quantiles"):
        compute("cycles.ct/1", [1.0])
    assert compute("cycles.margin/1", []).reason == "empty"
    assert compute("cycles.margin/1", margin("CC???")).reason == "coverage"


@settings(max_examples=200, deadline=None)
@given(st.text("CR-?", max_size=40), st.integers(1, 4))
def test_against_walking_along_the_tokens(word, w):
    m = np.array(margin(word))
    found = cycles_margin(m, w=w)
    runs = slow.cycle_runs(m >= 0.9, m <= 0.2, w)
    assert [(r.label[0], r.start, r.stop) for r in found.runs] == runs
    opened, closed, clock = slow.reopening(runs, len(word))
    assert (found.n_reopened, found.n_collapse - found.n_censored) == (opened, closed)
    assert list(zip(found.times, found.reopened, strict=True)) == clock
    curve = reopening([found]).curve
    assert list(zip(curve.times, curve.survival, strict=True)) == [
        (t, pytest.approx(s)) for t, s in slow.kaplan_meier(clock)
    ]


def test_many_texts():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(["CCC", "RRR", "-", "CC"], 20)) for _ in range(24)]
    found = reopening([cycles_margin(margin(t)) for t in texts])
    pooled = [slow.reopening(slow.cycle_runs(np.array(margin(t)) >= 0.9, np.array(margin(t)) <= 0.2, 3), 0)[:2]
              for t in texts]  # fmt: skip
    opened, closed = np.array(pooled).sum(0)
    assert found.rate == pytest.approx(opened / closed)
    assert (found.n_reopened, found.method, found.status) == (opened, "bootstrap", "resolved")
    assert 0 < found.low < found.rate < found.high < 1
    # the same texts twice under the same prompts tell no more than once
    twice = reopening([cycles_margin(margin(t)) for t in texts * 2], list(range(24)) * 2)
    assert (twice.low, twice.high) == pytest.approx((found.low, found.high))
    alone = reopening([cycles_margin(margin(t)) for t in texts * 2])
    assert alone.high - alone.low < found.high - found.low


def test_ends_and_nothing():
    always = reopening([cycles_margin(margin("CCCRRR"))] * 5)
    exact = proportion_interval(5, 5)
    assert (always.rate, always.low, always.high) == (1.0, pytest.approx(exact.low), 1.0)
    assert always.method == "clopper-pearson"
    never = reopening([cycles_margin(margin("CCC-CCC"))] * 5)
    assert (never.rate, never.low) == (0.0, 0.0)
    assert never.curve.status == "right-censored"
    for cycles, why in (([], "empty"), ([cycles_margin(margin("RRR"))], "zero-denominator")):
        nothing = reopening(cycles)
        assert (nothing.reason, nothing.status) == (why, "missing")
        assert math.isnan(nothing.rate)
        assert math.isnan(nothing.low)
