"""Crossings read off trials, and what a bracket that was left wide does to an interval."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from dynprobe.metrics.statistics import BracketSearch, Crossing, prompt_threshold
from dynprobe.runs._compare_thresholds import _of_crossings
from dynprobe.runs._crossings import Crossings, crossings_of


def trials(**columns):
    return pd.DataFrame({"seed": 0, **columns})


def test_each_prompt_and_seed_has_one_by_name_and_in_no_matter_which_order():
    table = trials(
        prompt_id=["b", "b", "a", "a", "c"], alpha=[1.0, 2.0, 1.0, 4.0, 0.0], response=[0.5, 1.5, 0.0, 1.0, 0.0],
        remark=[None, None, "tolerance not reached", None, None],
    )  # fmt: skip
    for order in (table, table.iloc[::-1], table.astype({"prompt_id": "category"})):
        of = crossings_of(order, 1.0, 0.0)
        assert of.prompts == ["c", "a", "b"]  # what was not searched comes first
        assert [c.status for c in of.found] == ["not-resolved", "resolved", "resolved"]
        assert of.unsure == [False, True, False]
        assert [(c.low, c.high) for c in of.found[1:]] == [(1.0, 4.0), (1.0, 2.0)]
        assert of.n_wide == 1
        assert [c.value for c in of.at("low")[1:]] == [1.0, of.found[2].value]
        assert [c.value for c in of.at("high")[1:]] == [4.0, of.found[2].value]
    assert crossings_of(table.drop(columns="remark"), 1.0, 0.0).n_wide == 0
    assert crossings_of(table, 1.0, 0.0).found[0].reason == "level<10×floor"
    assert crossings_of(table[table["alpha"] == 0], math.nan, 0.0).found[0].reason == "no level"


def test_open_and_unresolved_brackets_are_not_moved():
    found = [
        Crossing(math.nan, -math.inf, 1.0, "left-censored"), Crossing(math.nan, 1.0, math.inf, "right-censored"),
        Crossing(2.0, 0.0, 3.0, "resolved"), Crossing(2.0, 2.0, 2.0, "resolved"),
    ]  # fmt: skip
    of = Crossings(found, list("abcd"), [True] * 4)
    assert of.n_wide == 0
    assert all(a is b for end in ("low", "high") for a, b in zip(of.at(end), found, strict=True))


def test_a_ratio_is_that_of_prompts_with_a_threshold_on_both_sides():
    names = list("abcdef")
    b = [Crossing(v, 0.9 * v, 1.1 * v, "resolved") for v in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    a = [Crossing(2 * c.value, 2 * c.low, 2 * c.high, "resolved") for c in b]
    lost = Crossing(math.nan, math.nan, math.nan, "not-resolved", "level<10×floor")
    how = SimpleNamespace(boot={"n_boot": 200})
    for of_a, of_b, n in ((a, b, 6), ([lost, *a[1:]], b, 5), (a, [*b[:5], lost], 5)):
        found, low, high, wide = _of_crossings(*(Crossings(c, names, [False] * 6) for c in (of_a, of_b)), how)
        assert (found.n_common, found.paired, wide) == (n, True, 0)
        assert (found.value, low, high) == pytest.approx((2.0, 2.0, 2.0))
    found, low, high, wide = _of_crossings(Crossings(a, names, [True] * 6), Crossings(b, names, [False] * 6), how)
    assert wide == 6
    assert (found.value, low, high) == pytest.approx((2.0, 1.8, 2.2))
    censored = Crossing(math.nan, 1.0, math.inf, "right-censored")
    found, *_, wide = _of_crossings(
        Crossings([censored] * 5 + a[5:], names, [True] * 6), Crossings(b, names, [False] * 6), how
    )
    assert (found.status, wide) == ("right-censored", 0)


def search(rng, n, most):
    """Prompts with thresholds around 1, each of its own steepness and waviness, that saturate above."""
    truth, slope = np.exp(rng.normal(0, 0.5, n)), np.exp(rng.normal(0.5, 0.7, n))
    bump, phase = rng.uniform(0, 0.8, n), rng.uniform(0, 2 * np.pi, n)

    def response(rows, alphas):
        x = np.log(alphas / truth[rows])
        wave = bump[rows] / slope[rows] * (np.sin(3 * x + phase[rows]) - np.sin(phase[rows])) / 3
        y = np.exp(slope[rows] * (x + wave))
        return 4 * y / (3 + y)

    found = BracketSearch(n, 0.01, 10.0, level=1.0, max_evaluations=most)
    while not found.done:
        rows, alphas = found.propose()
        found.observe(rows, alphas, response(rows, alphas))
    crossings = found.result()
    return Crossings(crossings, [str(i) for i in range(n)], [c.reason is not None for c in crossings])


@pytest.mark.parametrize("most", [4, 10])
def test_an_interval_that_counts_wide_brackets_covers_what_it_says(most):
    rng = np.random.default_rng(most)
    hits, narrow, n_wide = 0, 0, 0
    for _ in range(60):
        of = search(rng, 24, most)
        own, low, high = [
            prompt_threshold(c, prompts=of.prompts, n_boot=200) for c in (of.found, of.at("low"), of.at("high"))
        ]
        hits += min(own.low, low.low) <= 1.0 <= max(own.high, high.high)
        narrow += own.low <= 1.0 <= own.high
        n_wide += of.n_wide
    assert hits >= 53  # binomial(60, 0.95): 99 % reach it
    assert (n_wide > 60 * 20) == (most == 4)
    if most == 4:
        assert narrow < hits  # interpolation alone is too sure of itself


@pytest.mark.long
@pytest.mark.parametrize("most", [4, 6, 10])
@pytest.mark.parametrize("n", [6, 12, 24])
def test_coverage_is_that_of_the_docstring(n, most):
    rng = np.random.default_rng([n, most])
    hits, resolved = 0, 0
    for _ in range(300):
        of = search(rng, n, most)
        all_ends = of.found, of.at("low"), of.at("high")
        own, low, high = [prompt_threshold(c, prompts=of.prompts, n_boot=500) for c in all_ends]
        if own.status == "resolved":
            resolved += 1
            hits += (
                np.fmin.reduce([own.low, low.low, high.low]) <= 1.0 <= np.fmax.reduce([own.high, low.high, high.high])
            )
    assert resolved > 290
    assert hits / resolved >= (0.93 if most == 10 else 0.97)
