"""Thresholds: found where they are, with what they leave out, whatever order, cut or batch."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.cli import _render
from dynprobe.errors import DynprobeError, InterruptedRunError, SiteError, UsageError
from dynprobe.metrics.statistics import first_crossing
from dynprobe.prompts import Prompt, from_texts
from dynprobe.protocols import ThresholdConfig, _execute, _fits, _threshold
from dynprobe.protocols._criteria import CRITERIA, Criterion, criterion_named, null_level
from dynprobe.protocols._prepare import prepare
from dynprobe.protocols._threshold_asked import writes_of
from dynprobe.runs._crossings import crossings_of
from dynprobe.testing import tiny_llama

LEVEL = 0.05
#: What each made-up prompt crosses 1 nat at, and how steeply its response rises.
TRUTH = {f"p{i}": a for i, a in enumerate(np.geomspace(0.03, 4.0, 9))}
SLOPE = {name: 0.7 + 0.4 * i for i, name in enumerate(TRUTH)}


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Pictures are drawn from the tables and tested with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_execute, "_pictures", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(f"p{i}", text, None, "test") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def made_up() -> list[Prompt]:
    """Prompts whose response is given in closed form."""
    return [Prompt(name, "", None, "test", tuple(range(5 + i, 9 + i))) for i, name in enumerate(TRUTH)]


Response = Callable[[str, int, float], float]
NUMBERS = ("alpha50", "low", "high")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Response], list[int]]:
    """``answer(response)``: let ``response(prompt, seed, alpha)`` be the criterion; returns sizes of what is asked.

    The logistic curve, which takes longest, is fitted only where it is looked at (``curve=True``).
    """

    def install(response: Response, curve: bool = False) -> list[int]:
        asked: list[int] = []
        if not curve:
            unfitted = {"estimator": "psychometric.logistic/1", "status": "missing", "reason": "not fitted", "n": 0}
            monkeypatch.setattr(_fits, "_logistic", lambda *_: {**unfitted, **dict.fromkeys(NUMBERS, math.nan)})

        def respond(self: Criterion, branch: Any, trunk: Any) -> np.ndarray:
            asked.append(len(branch.requests))
            return np.array(
                [response(trunk.texts[r.text].row_key, r.perturb.seed, r.perturb.alpha) for r in branch.requests]
            )

        monkeypatch.setattr(Criterion, "response", respond)
        return asked

    return install


def closed(name: str, seed: int, alpha: float) -> float:
    return (alpha / TRUTH[name]) ** SLOPE[name]


def crossings(run: Any, **chosen: Any) -> dict[str, Any]:
    trials = run.table("trials")
    for key, value in chosen.items():
        trials = trials[trials[key] == value]
    of = crossings_of(trials, float(trials["level"].iloc[0]), float(trials["floor"].max()))
    return dict(zip(of.prompts, of.found, strict=True))


def headline(run: Any) -> pd.Series:
    fits = run.table("fits")
    (row,) = [row for _, row in fits[fits["headline"]].iterrows()]
    return row


def fit(run: Any, estimator: str) -> pd.Series:
    fits = run.table("fits")
    (row,) = [row for _, row in fits[fits["estimator"] == estimator].iterrows()]
    return row


def test_the_truth_is_found_within_tolerance_for_every_prompt(made_up: Any, tmp_path: Path, answer: Any) -> None:
    asked, made_up = answer(closed), made_up[:7]  # one group: more would begin with a small one
    run = dp.threshold(tiny_llama(), made_up, scale="relnorm", out=tmp_path)
    found = crossings(run)
    assert list(found) == list(TRUTH)[:7]
    for name, c in found.items():
        assert c.status == "resolved"
        assert c.value == pytest.approx(TRUTH[name], rel=0.05), name
        assert c.low <= TRUTH[name] <= c.high
    trials = run.table("trials")
    rows = trials[trials["alpha"] > 0].groupby("prompt_id", observed=True).size()
    assert rows.max() <= 7
    assert run.summary["rows_per_prompt"] == pytest.approx(rows.mean())
    best = headline(run)
    assert best["estimator"] == "threshold.prompt/1"
    assert best["status"] == "resolved"
    assert best["alpha50"] == pytest.approx(np.median(list(TRUTH.values())[:7]), rel=0.05)
    assert best["low"] < best["alpha50"] < best["high"]
    assert (best["n"], best["n_left"], best["n_right"], best["level"]) == (7, 0, 0, 1.0)
    # A round is one batch for all prompts.
    assert asked[:3] == [4, 4, 7 * 3]  # sham rows, next to nothing, for a few texts; and the first round for all
    assert len(asked) - 2 == trials["trial_round"].max() + 1 <= 7


def test_tolerance_and_evaluations_are_kept(made_up: Any, tmp_path: Path, answer: Any) -> None:
    answer(lambda name, seed, alpha: 3 / (1 + (TRUTH[name] / alpha) ** 4 if alpha else math.inf))
    wide = dp.threshold(tiny_llama(), made_up, scale="relnorm", tolerance=0.5, out=tmp_path)
    fine = dp.threshold(tiny_llama(), made_up, scale="relnorm", tolerance=0.01, max_evaluations=16, out=tmp_path)
    assert wide.summary["rows_per_prompt"] < fine.summary["rows_per_prompt"] <= 16
    for run, tolerance in ((wide, 0.5), (fine, 0.01)):
        for name, c in crossings(run).items():
            truth = TRUTH[name] / 2**0.25
            assert c.status == "resolved"
            assert c.value == pytest.approx(truth, rel=tolerance), name
    few = dp.threshold(tiny_llama(), made_up, scale="relnorm", max_evaluations=3, out=tmp_path)
    assert few.summary["rows_per_prompt"] == 3


def compare_thresholds(a: Any, b: Any) -> Any:
    (row,) = dp.compare([a.path, b.path]).thresholds.query("estimator == 'threshold.prompt/1'").to_dict("records")
    return row


def test_an_interval_counts_the_brackets_that_were_left_wide(made_up: Any, tmp_path: Path, answer: Any) -> None:
    answer(lambda name, seed, alpha: 3 / (1 + (TRUTH[name] / alpha) ** 4 if alpha else math.inf))
    truth = float(np.median([value / 2**0.25 for value in TRUTH.values()]))
    few, fine = (
        dp.threshold(tiny_llama(), made_up, scale="relnorm", max_evaluations=n, tolerance=0.01, out=tmp_path / str(n))
        for n in (4, 24)
    )
    rough, best = headline(few), headline(fine)
    assert rough["n_uncertain"] == len(crossings(few))
    assert rough["low"] < truth < rough["high"]
    assert rough["low"] <= best["low"]
    assert rough["high"] >= best["high"]
    assert (rough["low"], rough["high"]) != (rough["boot_low"], rough["boot_high"])
    assert best["n_uncertain"] == 0
    assert best["low"] < truth * 1.01
    against = {(a, b): compare_thresholds(a, b) for a, b in itertools.permutations((few, fine), 2)}
    one, other = against[few, fine], against[fine, few]
    assert (one["n_wide"], one["method"]) == (len(crossings(few)), "cluster bootstrap of ln α50 and wide brackets")
    assert one["ratio_low"] < 1.0 < one["ratio_high"]  # the same prompts, the same truth
    mine, theirs = crossings(few), crossings(fine)  # at the worst ends of the brackets
    for end, bound in (("low", one["ratio_low"]), ("high", one["ratio_high"])):
        worst = np.median([math.log(getattr(c, end)) for c in mine.values()])
        worst = math.exp(worst - np.median([math.log(c.value) for c in theirs.values()]))
        assert (bound <= worst) if end == "low" else (bound >= worst)
    assert other["ratio_low"] == pytest.approx(1 / one["ratio_high"])
    assert other["ratio_high"] == pytest.approx(1 / one["ratio_low"])


@pytest.fixture(scope="module")
def dense(llama: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dp.threshold(
        llama, prompts, layers=1, scale="relnorm", level=LEVEL, alphas="0.01:10:121",
        out=tmp_path_factory.mktemp("dense"), n_boot=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def searched(llama: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both scales, as by default."""
    return dp.threshold(
        llama, prompts, layers=1, level=LEVEL, out=tmp_path_factory.mktemp("searched"), n_boot=200, batch_size=2
    )


def test_a_search_finds_the_crossing_of_a_dense_grid(searched: Any, dense: Any) -> None:
    mine, theirs = crossings(searched, scale="relnorm"), crossings(dense)
    for name in ("p0", "p1", "p2", "p3"):
        assert mine[name].status == theirs[name].status == "resolved"
        assert mine[name].value == pytest.approx(theirs[name].value, rel=0.05), name
    assert "p4" not in mine or mine["p4"].status == "missing"  # a single token: nothing can be affected
    fits = searched.table("fits")
    own = fits[(fits["scale"] == "relnorm") & fits["headline"]].iloc[0]
    assert own["alpha50"] == pytest.approx(fit(dense, "threshold.prompt/1")["alpha50"], rel=0.05)
    assert (own["n"], own["n_missing"]) == (4, 1)
    rows = searched.table("trials").query("alpha > 0").groupby(["prompt_id", "write"], observed=True).size()
    assert rows.max() <= 7


def test_trials_are_rows_of_a_run(searched: Any, llama: Any, prompts: Any, tmp_path: Path) -> None:
    """Every trial holds what a run of that one strength says of the prompt."""
    trials = searched.table("trials")
    for scale in ("relnorm", "coordstd"):
        chosen = trials[(trials["scale"] == scale) & (trials["prompt_id"] == "p1") & (trials["alpha"] > 0)]
        for _, trial in chosen.iloc[2:6:3].iterrows():
            spec = f"alpha={trial['alpha']!r},scale={scale},layers=1"
            run = dp.run(llama, prompts, perturb=spec, max_new_tokens=0, out=tmp_path)
            row = run.samples[run.samples["sample_id"].astype(str) == "p1|perturbed.forced|0"].iloc[0]
            assert trial["response"] == pytest.approx(trial["kl_clean_pert"], rel=1e-6)
            for column in ("kl_clean_pert", "flip_rate", "alpha_relnorm", "alpha_coordstd", "alpha_mad", "alpha_abs"):
                assert trial[column] == pytest.approx(row[column], rel=1e-4, abs=1e-6), column
    shams = trials[trials["alpha"] == 0]
    assert (shams["trial_round"] == -1).all()
    assert (shams["response"].dropna().abs() <= 1e-9).all()
    assert searched.summary["sham_rows"] == len(shams)


def test_both_scales_are_given_unless_one_is_named(searched: Any) -> None:
    fits = searched.table("fits")
    best = fits[fits["headline"]].set_index("scale")
    assert set(best.index) == {"relnorm", "coordstd"}
    assert best.loc["relnorm", "alpha50"] != best.loc["coordstd", "alpha50"]
    assert list(searched.table("conditions")["condition_id"]) == [
        "clean", "relnorm|gaussian|L1|s0", "coordstd|gaussian|L1|s0",
    ]  # fmt: skip
    for scale in best.index:
        row = best.loc[scale]
        # The same place in the unit of each scale, from the sizes that were written.
        assert row[f"written_{scale}"] == pytest.approx(row["alpha50"], rel=0.05)
        trials = searched.table("trials")
        trials = trials[(trials["scale"] == scale) & (trials["alpha"] > 0)]
        near = trials[(np.abs(np.log(trials["alpha"] / row["alpha50"])) < np.log(3))]
        ratio = (near["alpha_abs"] / near["alpha"]).median()
        assert row["written_abs"] == pytest.approx(row["alpha50"] * ratio, rel=1e-6)
    for unit in ("relnorm", "coordstd", "mad", "abs"):  # two searches, one place
        assert best.loc["relnorm", f"written_{unit}"] == pytest.approx(
            best.loc["coordstd", f"written_{unit}"], rel=0.25
        )
    assert best.loc["relnorm", "written_relnorm"] == pytest.approx(best.loc["relnorm", "alpha50"], rel=1e-5)


@pytest.mark.parametrize(("low", "high"), [(1e-3, 0.02), (5.0, 10.0), (0.1, 0.5)])
def test_prompts_outside_the_range_stay_in_the_population_as_such(
    made_up: Any, tmp_path: Path, answer: Any, low: float, high: float
) -> None:
    answer(closed)
    run = dp.threshold(tiny_llama(), made_up, scale="relnorm", alpha_min=low, alpha_max=high, out=tmp_path)
    left, right = sum(a < low for a in TRUTH.values()), sum(a > high for a in TRUTH.values())
    found = crossings(run)
    assert sum(c.status == "left-censored" for c in found.values()) == left
    assert sum(c.status == "right-censored" for c in found.values()) == right
    best = headline(run)
    assert (best["n_left"], best["n_right"], best["n"]) == (left, right, 9)
    if left == 9 or right == 9:
        assert best["status"] == ("left-censored" if left else "right-censored")
        assert np.isnan(best["alpha50"])
        assert all(np.isnan(best[f"written_{u}"]) for u in ("relnorm", "coordstd", "mad", "abs"))
        assert (best["low"], best["high"]) == pytest.approx((-np.inf, low) if left else (high, np.inf))
        assert (f"α*<{low:g}" if left else f"α*>{high:g}") in best["reason"]
    else:  # the middle prompt crosses, and nothing bounds the middle of others like these
        assert (best["status"], best["low"], best["high"]) == ("not-resolved", -np.inf, np.inf)
        assert "open at both ends" in best["reason"]
        assert np.isnan(best["alpha50"])
    # No strength is tried where nothing can be found.
    rows = run.table("trials").query("alpha > 0").groupby("prompt_id", observed=True)["alpha"]
    for name, alphas in rows:
        if not low < TRUTH[str(name)] < high:
            assert len(alphas) == 3
        assert low <= alphas.min() <= alphas.max() <= high


def test_a_level_in_the_noise_is_not_resolved(made_up: Any, tmp_path: Path, answer: Any) -> None:
    answer(lambda name, seed, alpha: closed(name, seed, alpha) if alpha else -0.15)
    run = dp.threshold(tiny_llama(), made_up, scale="relnorm", out=tmp_path)
    assert headline(run)["status"] == "not-resolved"
    assert "level<10×floor" in str(headline(run)["reason"]) or headline(run)["n"] == 0
    assert np.isnan(headline(run)["alpha50"])
    assert headline(run)["floor"] == pytest.approx(0.15)
    assert (run.table("trials")["alpha"] == 0).all()  # nothing was searched
    gridded = dp.threshold(tiny_llama(), made_up, scale="relnorm", alphas="0.01:10:9", out=tmp_path)
    assert headline(gridded)["status"] == "not-resolved"
    assert np.isnan(headline(gridded)["alpha50"])
    answer(lambda name, seed, alpha: closed(name, seed, alpha) if alpha else 0.05)
    assert headline(dp.threshold(tiny_llama(), made_up, scale="relnorm", out=tmp_path / "b"))["status"] == "resolved"


def test_texts_whose_level_is_in_the_noise_are_counted_all(llama: Any, tmp_path: Path) -> None:
    """The noise floor is told by a few of them; the population is all of them."""
    texts = [[5 + i, 6, 7, 8 + i] for i in range(9)]
    settings: dict[str, Any] = {"scale": "relnorm", "level": 1e-14, "n_boot": 200}
    row = headline(dp.threshold(llama, texts, out=tmp_path / "a", **settings))
    assert (row["status"], row["n_missing"]) == ("not-resolved", 9)
    each = dp.threshold(llama, texts, each_position=True, out=tmp_path / "b", **settings).table("fits")
    assert len(each) == 9 * 3
    assert set(each["status"]) == {"not-resolved"}


@pytest.mark.parametrize("loud", [0.0, 1e-6])
def test_the_floor_is_the_largest_response_to_nothing_or_next_to_nothing(
    made_up: Any, tmp_path: Path, answer: Any, loud: float
) -> None:
    count = itertools.count()

    def respond(name: str, seed: int, alpha: float) -> float:
        if alpha > 1e-6:
            return closed(name, seed, alpha)
        return -0.02 if alpha == loud and next(count) == 1 else 0.001

    answer(respond)
    run = dp.threshold(tiny_llama(), made_up[:7], scale="relnorm", out=tmp_path)
    assert headline(run)["floor"] == pytest.approx(0.02)
    trials = run.table("trials")
    assert len(trials[trials["alpha"] == 0]) == 4
    assert trials.loc[trials["alpha"] > 0, "alpha"].min() >= 0.01  # writes next to nothing are no trials


def test_a_bracket_that_could_not_be_closed_says_so(made_up: Any, tmp_path: Path, answer: Any) -> None:
    answer(closed)
    run = dp.threshold(tiny_llama(), made_up, scale="relnorm", tolerance=1e-4, max_evaluations=3, out=tmp_path)
    trials = run.table("trials")
    open_rows = trials[trials["remark"].notna()].groupby("prompt_id", observed=True).ngroups
    assert headline(run)["n_uncertain"] == open_rows > 0
    sure = dp.threshold(tiny_llama(), made_up, scale="relnorm", out=tmp_path)
    assert headline(sure)["n_uncertain"] == 0


def test_seeds_are_replicates_inside_their_prompt(made_up: Any, tmp_path: Path, answer: Any) -> None:
    answer(lambda name, seed, alpha: (alpha / (TRUTH[name] * (1.0, 3.0, 1.2)[seed])) ** 2)
    run = dp.threshold(tiny_llama(), made_up, scale="relnorm", seeds="0:3", alpha_max=20, out=tmp_path)
    trials = run.table("trials")
    assert trials.query("alpha > 0").groupby(["prompt_id", "seed"], observed=True).ngroups == 27
    best = headline(run)
    assert best["n"] == 9  # prompts, not rows
    inside = [np.median(np.array([1.0, 3.0, 1.2]) * a) for a in TRUTH.values()]
    assert best["alpha50"] == pytest.approx(np.median(inside), rel=0.05)
    assert len(run.table("conditions")) == 1 + 3


def test_each_position_has_a_threshold_of_its_own(llama: Any, prompts: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"scale": "relnorm", "level": 0.01, "layers": "0+2", "n_boot": 200, "out": tmp_path}
    found = dp.threshold(llama, prompts[2:4], each_position=True, positions="1:5", **settings)
    fits = found.table("fits")
    assert fits["headline"].all()
    expected = {("p2", 1), ("p2", 2), ("p2", 3), *(("p3", p) for p in range(1, 5))}
    for layer in (0, 2):
        mine = fits[fits["layer"] == layer]
        assert set(zip(mine["prompt_id"].astype(str), mine["pos"], strict=True)) == expected
        assert len(mine) == len(expected)
    assert fits["fit_id"].is_unique
    trials = found.table("trials")
    assert trials.query("alpha > 0").groupby(["prompt_id", "pos", "layer"], observed=True).size().max() <= 7
    for pos in (2, 3):
        alone = dp.threshold(llama, prompts[2:4], positions=str(pos), **settings)
        theirs = {n: crossings(alone, layer=layer)[n] for n in ("p2", "p3") for layer in (2,)}
        for name, c in theirs.items():
            row = fits[(fits["prompt_id"] == name) & (fits["pos"] == pos) & (fits["layer"] == 2)].iloc[0]
            assert row["status"] == c.status
            if c.status == "resolved":
                assert row["alpha50"] == pytest.approx(c.value, rel=0.05)


def test_a_fixed_grid_gives_the_estimates_that_need_one(made_up: Any, tmp_path: Path, answer: Any) -> None:
    alphas = np.geomspace(0.01, 10, 31)
    rows = [*made_up, Prompt("silent", "", None, "test", (7,))]
    TRUTH_ALL = {**TRUTH, "silent": math.nan}
    answer(lambda name, seed, alpha: math.nan if name == "silent" else closed(name, seed, alpha), curve=True)
    run = dp.threshold(tiny_llama(), rows, scale="relnorm", alphas=alphas[::-1], n_boot=400, out=tmp_path)
    trials = run.table("trials").query("alpha > 0")
    assert len(trials) == len(TRUTH_ALL) * 31
    assert headline(run)["estimator"] == "threshold.prompt/1"
    truth = np.array(list(TRUTH.values()))
    assert headline(run)["alpha50"] == pytest.approx(np.median(truth), rel=0.01)
    assert (headline(run)["n"], headline(run)["n_missing"]) == (9, 1)

    reached = (alphas[:, None] >= truth).mean(1)  # responses are powers: at the level exactly from α* on
    iso = fit(run, "threshold.isotonic/1")
    first = int(np.argmax(reached >= 0.5))
    assert alphas[first - 1] <= iso["alpha50"] <= alphas[first] * (1 + 1e-9)
    assert iso["n"] == 9
    karber = fit(run, "threshold.spearman_karber/1")
    by_hand = np.sum(np.diff(reached) * (np.log(alphas[1:]) + np.log(alphas[:-1])) / 2)
    assert karber["alpha50"] == pytest.approx(np.exp(by_hand), rel=1e-5)
    assert karber["low"] < karber["alpha50"] < karber["high"]
    assert np.log(karber["alpha50"]) == pytest.approx(np.log(truth).mean(), abs=0.1)

    responses = (alphas[None] / truth[:, None]) ** np.array(list(SLOPE.values()))[:, None]
    mean = fit(run, "threshold.mean/1")
    assert mean["alpha50"] == pytest.approx(first_crossing(alphas, responses.mean(0), 1.0).value, rel=1e-5)
    logistic = fit(run, "psychometric.logistic/1")
    assert logistic["alpha50"] == pytest.approx(np.median(truth), rel=0.25)
    assert {"breakpoint.broken_stick/1", "psychometric.logistic/1"} <= set(run.table("fits")["estimator"])

    other = dp.threshold(tiny_llama(), rows, scale="relnorm", alphas=alphas, estimand="mean", n_boot=400, out=tmp_path)
    assert other.path != run.path
    assert headline(other)["estimator"] == "threshold.mean/1"
    assert headline(other)["alpha50"] == pytest.approx(mean["alpha50"], rel=1e-9)


def test_seeds_on_a_grid_are_averaged_inside_prompts(made_up: Any, tmp_path: Path, answer: Any) -> None:
    answer(lambda name, seed, alpha: closed(name, seed, alpha) * (1.5 if seed else 0.5))  # mean over seeds: closed
    run = dp.threshold(
        tiny_llama(), made_up, scale="relnorm", alphas="0.01:10:31", seeds=[0, 1], n_boot=200, out=tmp_path
    )
    alphas = np.array(sorted(set(run.table("trials").query("alpha > 0")["alpha"])))
    truth, slope = np.array(list(TRUTH.values())), np.array(list(SLOPE.values()))
    responses = (alphas[None] / truth[:, None]) ** slope[:, None]
    assert fit(run, "threshold.mean/1")["alpha50"] == pytest.approx(
        first_crossing(alphas, responses.mean(0), 1.0).value, rel=1e-5
    )
    assert fit(run, "threshold.isotonic/1")["n"] == 9


def test_the_estimator_that_needs_a_grid_is_absent_from_a_search(searched: Any) -> None:
    names = set(searched.table("fits")["estimator"])
    assert names == {"threshold.prompt/1"}


def test_responses_that_fall_again_are_reported_and_the_first_crossing_stands(
    made_up: Any, tmp_path: Path, answer: Any
) -> None:
    answer(lambda name, seed, alpha: closed(name, seed, alpha) if alpha < 3 * TRUTH[name] else 0.1)
    run = dp.threshold(tiny_llama(), made_up, scale="relnorm", alphas="0.01:100:121", out=tmp_path, n_boot=200)
    best = headline(run)
    assert (best["n_nonmonotone"], best["n_recrossing"]) == (9, 9)
    for name, c in crossings(run).items():
        assert c.value == pytest.approx(TRUTH[name], rel=0.02)
        assert c.n_crossings == 2
        assert c.monotone is False


@pytest.fixture(scope="module")
def small(llama: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def run(out: Path, texts: Any = prompts[:4], **change: Any) -> Any:
        settings = {"layers": 1, "scale": "relnorm", "criterion": "kl", "level": LEVEL, "seeds": [0, 1]}
        settings |= {"batch_size": 1, "n_boot": 200, "out": out}
        return dp.threshold(llama, texts, **settings | change)

    return run, run(tmp_path_factory.mktemp("uncut"))


def test_a_search_cut_at_any_unit_and_continued_equals_the_uncut_one(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, uncut = small
    units = uncut.manifest.batch_plan
    assert len(units) == 4
    work = _threshold._Threshold.work
    for cut in range(len(units)):
        count = itertools.count()

        def interrupted(self: Any, unit: Any, early: Any, count: Any = count, cut: int = cut) -> Any:
            if next(count) == cut:
                raise KeyboardInterrupt
            return work(self, unit, early)

        monkeypatch.setattr(_threshold._Threshold, "work", interrupted)
        with pytest.raises(InterruptedRunError, match="the same command continues"):
            run(tmp_path / str(cut))
        monkeypatch.setattr(_threshold._Threshold, "work", work)
        done = run(tmp_path / str(cut))
        assert done.status == "complete"
        for name in ("trials", "fits", "conditions"):
            pd.testing.assert_frame_equal(done.table(name), uncut.table(name), check_exact=True, obj=name)
        assert done.summary["fits"] == uncut.summary["fits"]


def test_kappas_null_is_the_same_in_a_run_that_was_cut(
    llama: Any, prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"layers": 1, "scale": "relnorm", "criterion": "kappa", "batch_size": 2, "n_boot": 200}
    uncut = dp.threshold(llama, prompts[:4], out=tmp_path / "a", **settings)
    work, count = _threshold._Threshold.work, itertools.count()

    def interrupted(self: Any, unit: Any, early: Any) -> Any:
        if next(count) == 1:
            raise KeyboardInterrupt
        return work(self, unit, early)

    monkeypatch.setattr(_threshold._Threshold, "work", interrupted)
    with pytest.raises(InterruptedRunError):
        dp.threshold(llama, prompts[:4], out=tmp_path / "b", **settings)
    monkeypatch.undo()
    monkeypatch.setattr(_execute, "_pictures", lambda *_: None)
    done = dp.threshold(llama, prompts[:4], out=tmp_path / "b", **settings)
    pd.testing.assert_frame_equal(done.table("trials"), uncut.table("trials"), check_exact=True)
    assert done.table("trials")["level"].nunique() == 1


def test_units_that_an_older_version_planned_share_one_null(
    llama: Any, prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"layers": 1, "scale": "relnorm", "criterion": "kappa", "batch_size": 2, "n_boot": 200}
    told = dp.threshold(llama, prompts[:4], out=tmp_path / "a", **settings)
    plan, null, made = _threshold._Threshold.plan, _threshold._Threshold._null, []

    def untold(self: Any) -> list[Any]:
        units = [{name: value for name, value in unit.items() if name != "level"} for unit in plan(self)]
        made.clear()
        return units

    def counted(self: Any, *given: Any) -> float:
        made.append(given)
        return null(self, *given)

    monkeypatch.setattr(_threshold._Threshold, "plan", untold)
    monkeypatch.setattr(_threshold._Threshold, "_null", counted)
    older = dp.threshold(llama, prompts[:4], out=tmp_path / "b", **settings)
    assert len(older.manifest.batch_plan) == 2
    assert len(made) == 1
    pd.testing.assert_frame_equal(older.table("trials"), told.table("trials"), check_exact=True)


def test_the_order_of_prompts_and_seeds_changes_nothing(small: Any, prompts: Any, tmp_path: Path) -> None:
    run, uncut = small
    mixed = run(tmp_path, prompts[3::-1], seeds=[1, 0], batch_size=4)
    keys = ["write", "prompt_id", "seed"]
    for seed in (0, 1):
        mine, theirs = crossings(mixed, seed=seed), crossings(uncut, seed=seed)
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].value == pytest.approx(theirs[name].value, rel=1e-3)
    a, b = (r.table("fits").set_index("fit_id")["alpha50"].dropna() for r in (mixed, uncut))
    assert a.index.equals(b.index)
    np.testing.assert_allclose(a, b, rtol=5e-3)
    assert len(mixed.table("trials").groupby(keys, observed=True)) == 8
    for column in ("low", "high"):  # the same resamples of the same prompts
        a, b = (r.table("fits").set_index("fit_id")[column] for r in (mixed, uncut))
        np.testing.assert_allclose(a, b, rtol=5e-2)


def test_how_a_search_is_spelt_is_no_other_search(llama: Any, prompts: Any) -> None:
    base: dict[str, Any] = {"layers": "0+1", "seeds": [0, 1], "criterion": "kl,flip"}

    def ident(**change: Any) -> str:
        return prepare(llama, prompts, base | change, kind=ThresholdConfig, resolve=writes_of).ident

    for same in (
        {"layers": [1, 0]}, {"seeds": "1+0"}, {"criterion": ["flip", "crit.kl/1"]}, {"scale": "coordstd+relnorm"},
        {"batch_size": 3},
    ):  # fmt: skip
        assert ident(**same) == ident(), same
    changes: list[dict[str, Any]] = [
        {}, {"layers": 0}, {"seeds": 0}, {"criterion": "kl"}, {"scale": "relnorm"}, {"level": 2.0},
        {"alphas": [0.1, 1]}, {"tolerance": 0.1}, {"max_evaluations": 9}, {"alpha_min": 0.02}, {"alpha_max": 5},
        {"each_position": True}, {"n_boot": 500}, {"positions": "last"}, {"placement": "quest"},
    ]  # fmt: skip
    found = [ident(**change) for change in changes]
    assert len(set(found)) == len(found)


def test_several_criteria_each_have_their_own_threshold(llama: Any, prompts: Any, tmp_path: Path) -> None:
    run = dp.threshold(
        llama, prompts[:3], scale="relnorm", criterion="flip+kappa", layers=1, out=tmp_path, n_boot=200,
        alphas="1e-4:10:41",
    )  # fmt: skip
    trials = run.table("trials")
    flips = trials[trials["criterion"] == "flip"]
    np.testing.assert_allclose(flips["response"], flips["flip_rate"], rtol=1e-6)
    assert (flips["level"] == 0.5).all()
    best = run.table("fits").query("headline").set_index("criterion")
    assert 0.05 < best.loc["flip", "alpha50"] < 3
    kappa = trials[(trials["criterion"] == "kappa") & (trials["prompt_id"] == "p1")].set_index("alpha")["response"]
    for alpha in kappa.index[[20, 36]]:
        done = dp.run(llama, prompts[:3], perturb=f"alpha={alpha!r},layers=1", max_new_tokens=0, out=tmp_path)
        row = done.samples[done.samples["sample_id"].astype(str) == "p1|perturbed.forced|0"].iloc[0]
        assert kappa[alpha] == pytest.approx(row["kappa_phase_d"], rel=1e-3, abs=1e-7)


def test_the_null_of_paraphrases_is_the_spread_of_clean_kappa(
    llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a quick brown fox", "over the lazy dog", "how vexingly quick"]
    said = ["a fast brown fox", "across an idle dog again", "how daftly quick"]
    given = [Prompt(f"q{i}", t, paraphrase=o) for i, (t, o) in enumerate(zip(texts, said, strict=True))]
    settings: dict[str, Any] = {"scale": "relnorm", "criterion": "kappa", "layers": 1, "n_boot": 200, "out": tmp_path}
    run = dp.threshold(llama, given, null="paraphrase", **settings)
    alone = {}
    for group in (texts, said):
        done = dp.run(llama, group, max_new_tokens=0, out=tmp_path / "clean")
        clean = done.samples.query("condition_id == 'clean'").set_index("prompt_id")["kappa_phase"]
        alone |= {prompt.text: clean[prompt.prompt_id] for prompt in from_texts(group)}
    apart = np.array([alone[o] - alone[t] for t, o in zip(texts, said, strict=True)])
    assert headline(run)["level"] == pytest.approx(np.quantile([*apart, *-apart], 0.99), rel=1e-4)
    assert run.summary["null_values"] == 6
    numerical = dp.threshold(llama, given, **settings)
    assert run.path != numerical.path
    assert numerical.summary["null_values"] == 3 * 8
    capsys.readouterr()
    _render.run(run)
    said = " ".join(capsys.readouterr().out.split())
    assert "99 % quantile of 6 values of the paraphrase null; of so few that is their maximum" in said
    with pytest.raises(UsageError, match=r"paraphrase for every prompt, and 1 have none \(first: 'x'\)"):
        dp.threshold(llama, [*given, Prompt("x", "no other words")], null="paraphrase", **settings)


def test_the_null_of_kappa_is_the_quantile_under_writes_of_numerical_size(
    llama: Any, prompts: Any, tmp_path: Path
) -> None:
    run = dp.threshold(llama, prompts[:2], scale="relnorm", criterion="kappa", layers=1, out=tmp_path, n_boot=200)
    level = float(run.table("trials")["level"].iloc[0])
    values: list[float] = []
    for seed in range(8):
        spec = f"alpha=1e-6,layers=1,seed={10_000_019 + seed}"
        done = dp.run(llama, prompts[:2], perturb=spec, max_new_tokens=0, out=tmp_path)
        values += done.samples.loc[done.samples["condition_id"] == "perturbed.forced", "kappa_phase_d"].tolist()
    assert level == pytest.approx(null_level(values), rel=0.2, abs=2e-8)
    assert 0 <= level < 1e-5


@pytest.fixture(scope="module")
def items(llama: Any) -> list[Prompt]:
    """Items whose answers are what the clean model says next, where that is a character, and one that it gets wrong."""
    found: list[Prompt] = []
    for text in (f"{word} {number}" for number in range(30) for word in ("Say", "Question", "Why not")):
        row = llama.tokenizer(text)["input_ids"]
        said = ""
        for _ in range(2):
            logits = dp.capture(llama, [llama.tokenizer(text + said)["input_ids"]]).logits
            assert logits is not None
            said += llama.tokenizer.decode([int(logits[0].argmax())])
            if not said.isascii() or not said or llama.tokenizer(text + said)["input_ids"][: len(row)] != row:
                break
        else:
            if len(llama.tokenizer(text + said)["input_ids"]) == len(row) + 2:
                found.append(Prompt(f"i{len(found)}", text, None, "test", None, said))
        if len(found) == 4:
            break
    assert len(found) >= 3
    return [*found, Prompt("wrong", found[0].text, None, "test", None, "~~" if found[0].answer != "~~" else "^^")]


def test_accuracy_loss_over_items(llama: Any, items: Any, tmp_path: Path) -> None:
    run = dp.threshold(
        llama,
        items,
        scale="relnorm",
        criterion="task",
        layers=1,
        seeds="0:2",
        alphas="0.01:10:9",
        n_boot=200,
        out=tmp_path,
    )
    trials = run.table("trials").query("alpha > 0")
    assert set(trials["response"]) <= {0.0, 1.0}
    wrong = trials[trials["prompt_id"] == "wrong"]
    assert (wrong["response"] == 0).all()  # it was wrong before
    # By hand: is the answer still the top-1 continuation?
    from dynprobe.probes import Perturb, capture

    for item in items[:2]:
        prompt = llama.tokenizer(item.text)["input_ids"]
        whole = llama.tokenizer(item.text + item.answer)["input_ids"]
        for alpha in (trials["alpha"].min(), trials["alpha"].max()):
            tape = capture(
                llama,
                [whole[:-1]],
                perturb=Perturb(float(alpha), layers=1, seed=1),
                row_keys=[item.prompt_id],
                logits="all",
            )
            best = tape.logits[0, len(prompt) - 1 :].argmax(-1).tolist()
            mine = trials[(trials["prompt_id"] == item.prompt_id) & (trials["seed"] == 1) & (trials["alpha"] == alpha)]
            assert mine["response"].item() == float(best != whole[len(prompt) :])
    best = headline(run)
    assert best["estimator"] == "threshold.mean/1"
    assert best["level"] == 0.2
    loss = trials.groupby("alpha", observed=True)["response"].mean()
    by_hand = first_crossing(loss.index.to_numpy(), loss.to_numpy(), 0.2)
    assert best["status"] == by_hand.status
    if by_hand.status == "resolved":
        assert best["alpha50"] == pytest.approx(by_hand.value, rel=1e-6)
    assert loss.iloc[0] == 0
    assert loss.iloc[-1] > 0.2


def test_writes_at_the_end_leave_the_earlier_answer_as_it_was(llama: Any, items: Any, tmp_path: Path) -> None:
    """Where columns are shared, what comes before the write is the clean answer, right or wrong."""
    text = items[0].text
    for first in "~^#@|}{_":  # wrong at once, and then right about what follows
        logits = dp.capture(llama, [llama.tokenizer(text + first)["input_ids"]]).logits
        assert logits is not None
        said = llama.tokenizer.decode([int(logits[0].argmax())])
        if said.isascii() and first != items[0].answer[0]:
            break
    else:
        pytest.fail("no character of the model follows")
    two = [items[0], Prompt("wrong", text, None, "test", None, first + said)]
    run = dp.threshold(
        llama, two, scale="relnorm", criterion="task", layers=1, alphas=[0.01, 10], n_boot=200, out=tmp_path,
        positions=len(llama.tokenizer(items[0].text)["input_ids"]),
    )  # fmt: skip
    trials = run.table("trials")
    assert set(trials["response"].dropna()) <= {0.0, 1.0}
    assert (trials[trials["prompt_id"] == "wrong"]["response"].dropna() == 0).all()
    assert trials["response"].notna().all()


def test_a_posterior_places_where_it_learns(made_up: Any, tmp_path: Path, answer: Any) -> None:
    answer(
        lambda name, seed, alpha: float(
            alpha > 0.4 * math.exp(0.3 * np.random.default_rng([seed, int(name[1:])]).normal())
        ),
        curve=True,
    )
    run = dp.threshold(
        tiny_llama(), made_up, scale="relnorm", placement="quest", trials=72, tolerance=0.05, n_boot=200, out=tmp_path
    )
    found = fit(run, "threshold.posterior/1")
    assert found["status"] == "resolved"
    assert found["alpha50"] == pytest.approx(0.4, rel=0.3)
    assert headline(run)["estimator"] == "psychometric.logistic/1"
    assert len(run.table("trials").query("alpha > 0")) <= 72 + 12


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"criterion": "kll"}, UsageError, r"no criterion 'kll'; known: kl, flip, kappa, task.*Did you mean 'kl'"),
        ({"criterion": "kl,kl"}, UsageError, "each criterion once"),
        ({"scale": None}, UsageError, r"coordstd needs a calibration.*Name one scale: --scale relnorm"),
        ({"perturb": "alpha=0.1"}, UsageError, "not --perturb"),
        ({"scale": "isokl"}, UsageError, "isokl"),
        ({"kind": "sine", "period": 8}, UsageError, "kind=sine is a probe signal"),
        ({"kind": "impulse"}, UsageError, "kind=impulse is a probe signal"),
        ({"kind": "direction"}, UsageError, "direction"),
        ({"layers": 7}, SiteError, "7"),
        ({"alpha_min": 2, "alpha_max": 1}, UsageError, "alpha_min=2 is not below alpha_max=1"),
        ({"alpha_min": 20}, UsageError, "alpha_min=20 is not below alpha_max=10"),
        ({"alpha_min": -1}, UsageError, "alpha_min=-1"),
        ({"alphas": [-0.1, 0.1, 1]}, UsageError, "-0.1 is negative; the flipped sign is another direction"),
        ({"alphas": [0.1]}, UsageError, "give at least two"),
        ({"alphas": [0.1, 0.1]}, UsageError, "twice"),
        ({"estimand": "mean"}, UsageError, "the mean response needs the same strengths for all prompts; add --alphas"),
        ({"level": 1.0, "criterion": "kl,flip"}, UsageError, "--level belongs to one criterion"),
        ({"criterion": "task", "alphas": "0.1:1:4"}, UsageError, "needs an answer for every prompt, and 2 have none"),
        ({"max_new_tokens": 4}, UsageError, "it is teacher-forced"),
        ({"num_samples": 4}, UsageError, "it is teacher-forced"),
        ({"metrics": ("erank.rv/1",)}, UsageError, "stores no other metric"),
        ({"max_evaluations": 2}, UsageError, "max_evaluations=2"),
        ({"confidence": 1.0}, UsageError, "confidence=1.0"),
        ({"tolerence": 0.1}, UsageError, "Did you mean 'tolerance'"),
        ({"placement": "staircase"}, UsageError, "placement='staircase'"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_a_folder_is_made(
    settings: dict[str, Any], error: type[DynprobeError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        dp.threshold(tiny_llama(), [[5, 6, 7], [8, 9]], **{"scale": "relnorm"} | settings, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_answers_that_are_no_continuation_are_refused(llama: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"scale": "relnorm", "criterion": "task", "alphas": [0.1, 1.0], "out": tmp_path}
    ids = Prompt("a", "", None, "test", (5, 6, 7), "x")
    with pytest.raises(UsageError, match="'a' is not read as plain text"):
        dp.threshold(llama, [ids, Prompt("b", "text", None, "test", None, "x")], **settings)
    with pytest.raises(UsageError, match="criterion task reads accuracy over prompts at fixed strengths; add --alphas"):
        dp.threshold(
            llama,
            [Prompt("b", "text", None, "test", None, "x")],
            **{k: v for k, v in settings.items() if k != "alphas"},
        )
    assert not list(tmp_path.iterdir())


def test_criteria_are_those_of_the_reference() -> None:
    assert {c.name: (c.metric_id, c.level) for c in CRITERIA.values()} == {
        "kl": ("crit.kl/1", 1.0), "flip": ("crit.flip/1", 0.5), "kappa": ("crit.kappa/1", None),
        "task": ("crit.task/1", 0.2),
    }  # fmt: skip
    assert criterion_named("crit.flip/1") is CRITERIA["flip"]
    assert null_level([1.0, math.nan, 3.0], 0.5) == 2.0
    assert math.isnan(null_level([math.nan]))
