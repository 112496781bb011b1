"""B/A/D by rule, by hidden Markov model, and what the letters spell."""

import math
from itertools import product

import numpy as np
import pytest
import slow_recovery as slow
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import (
    bad_labels,
    bad_limits,
    compute,
    hmm_states,
    motifs,
    path_edit_distance,
    state_features,
    symbols,
)
from dynprobe.metrics.statistics import proportion_interval

LIMITS = (0.3, 1.0, 0.2)


def steps(seed, n=8):
    rng = np.random.default_rng(seed)
    lag, turn, h = rng.random(n), 2 * rng.random(n - 1), 3 * rng.random(n + 1)
    if seed % 2:
        lag[rng.random(n) < 0.2], turn[rng.random(n - 1) < 0.2] = np.nan, np.nan
        h[rng.random(n + 1) < 0.1] = np.nan
    return lag, turn, h


@pytest.mark.parametrize("seed", range(30))
def test_rules_against_the_text(seed):
    lag, turn, h = steps(seed)
    expected = slow.bad(lag, turn, h, 20, LIMITS)
    assert "".join(bad_labels(lag, turn, h, 20, LIMITS)) == expected
    result = compute("states.bad/1", lag, turn, h, vocab=20, limits=LIMITS)
    if 2 * expected.count("?") > len(expected):
        assert result.reason == "coverage"
    else:
        assert result.value == expected
        assert result.extras["n_b"] == expected.count("B")


def test_order_of_the_rules_and_the_first_step():
    h = np.array([3.0, 2.0, 1.0, 1.0])
    assert "".join(bad_labels([0.9] * 3, [2.0, 2.0], h, 10, LIMITS)) == "DDB"
    calm = [1.0] * 4
    assert "".join(bad_labels([0.1] * 3, [2.0, 0.0], calm, 10, LIMITS)) == "ABA"
    # at the first step κ decides alone; without κ there is nothing to decide with
    assert "".join(bad_labels([math.nan, 0.1, 0.1], [2.0, math.nan], calm, 10, LIMITS)) == "?B?"
    assert "".join(bad_labels([0.1, math.nan, 0.5], [0.0, math.nan], calm, 10, LIMITS)) == "A?B"


def test_many_units_and_limits():
    rng = np.random.default_rng(0)
    lag, turn, h = rng.random((6, 5)), rng.random((5, 5)), rng.random((7, 5))
    limits = bad_limits(lag, turn, h, 50)
    assert limits.lag == pytest.approx(np.quantile(lag, 0.75))
    assert limits.turn == pytest.approx(np.quantile(turn, 0.75))
    assert limits.drop == pytest.approx(np.quantile(-np.diff(h, axis=0) / math.log(50), 0.9))
    letters = bad_labels(lag, turn, h, 50, limits)
    for unit in range(5):
        alone = bad_labels(lag[:, unit], turn[:, unit], h[:, unit], 50, limits)
        assert "".join(alone) == "".join(letters[:, unit])
    per_step = bad_labels(lag, turn, h, 50, [np.full(6, v) for v in limits])
    assert (per_step == letters).all()
    assert symbols(letters).n_words == 5
    for bad in ((lag, turn[1:], h), (lag, turn, h[1:])):
        with pytest.raises(MetricError, match=r"step − 1"):
            bad_labels(*bad, 50, limits)
    with pytest.raises(MetricError, match="limit"):
        bad_labels(lag, turn, h, 50, (0.1, math.nan, 0.2))
    with pytest.raises(MetricError, match="vocab"):
        compute("states.bad/1", lag[:, 0], turn[:, 0], h[:, 0])
    assert compute("states.bad/1", [], [], [1.0], vocab=5, limits=LIMITS).reason == "empty"


def test_symbolic_vectors():
    s = symbols("BBAAAD")
    place = {letter: "BAD".index(letter) for letter in "BAD"}
    counts = {a + b: int(s.counts[place[a], place[b]]) for a, b in product("BAD", repeat=2)}
    assert counts == {"BB": 1, "BA": 1, "AA": 2, "AD": 1, "BD": 0, "AB": 0, "DB": 0, "DA": 0, "DD": 0}
    assert s.probability("A", "A") == pytest.approx(2 / 3)
    assert s.occupancy == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    assert s.n_match == 1
    assert s.distances.tolist() == [0]
    assert s.dwell == {"B": (2,), "A": (3,), "D": (1,)}
    assert math.isnan(s.probability("D", "D"))
    t = symbols("ABAB")
    assert (t.probability("A", "B"), t.probability("B", "A"), t.probability("A", "A")) == (1, 1, 0)
    assert (t.counts.sum(), t.n_match) == (3, 0)
    wilson = proportion_interval(2, 3)
    assert s.low[1, 1] == pytest.approx(wilson.low)
    assert s.high[1, 1] == pytest.approx(wilson.high)


def test_gaps_are_spanned_by_nothing():
    s = symbols(["A?A", "BB?"])
    assert s.counts.sum() == 1
    assert (s.n_steps, s.n_gaps) == (4, 2)
    assert s.dwell == {"B": (2,), "A": (1, 1), "D": ()}
    assert s.mean_dwell("A") == 1
    assert math.isnan(s.mean_dwell("D"))
    assert np.isnan(symbols(["??A"]).distances).all()
    assert [m.motif for m in motifs(["A?A", "BB?"], length=2) if m.count] == ["BB"]
    with pytest.raises(MetricError, match="alphabet"):
        symbols("ABX")


@settings(max_examples=60, deadline=None)
@given(st.text("BAD", max_size=6))
def test_distance_is_the_least_over_all_words(word):
    assert path_edit_distance(word) == slow.path_distance(word)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("BAD?", max_size=12), min_size=1, max_size=5))
def test_symbols_are_consistent(texts):
    s = symbols(texts)
    assert sum(map(sum, s.dwell.values())) == s.n_steps
    assert sum(len(runs) for runs in s.dwell.values()) == s.n_steps - int(np.trace(s.counts))
    known = s.counts.sum(1) > 0
    assert s.transitions[known].sum(1) == pytest.approx(np.ones(known.sum()))
    assert (s.low[known] <= s.transitions[known] + 1e-12).all()
    assert (s.high[known] >= s.transitions[known] - 1e-12).all()
    for word, distance in zip(texts, s.distances, strict=True):
        bare = word.replace("?", "")
        if bare and 2 * len(bare) >= len(word):
            matches = list(bare) == sorted(bare, key="BAD".index)
            assert (distance == 0) == matches


def test_motif_counts():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("BAD?"), n)) for n in (0, 1, 5, 30, 30)]
    for length in (1, 2, 3):
        found = {m.motif: m.count for m in motifs(texts, length, n_surrogates=5)}
        for letters in product("BAD", repeat=length):
            motif = "".join(letters)
            count = sum(word[i : i + length] == motif for word in texts for i in range(len(word) - length + 1))
            assert found.get(motif, 0) == count


def test_surrogates_keep_what_they_say():
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("BAD"), 40, p=[0.2, 0.5, 0.3])) for _ in range(10)]
    texts[0] = texts[0][:20] + "?" + texts[0][21:]
    # letters alone: every surrogate of order 0 has exactly the observed ones
    for m in motifs(texts, 1, order=0, n_surrogates=20):
        assert (m.expected, m.sd) == (m.count, 0.0)
    # pairs: a surrogate of order 1 has the observed ones on average
    for m in motifs(texts, 2, order=1, n_surrogates=300):
        assert m.expected == pytest.approx(m.count, abs=4 * m.sd / math.sqrt(300) + 0.15 * m.count + 1)
        assert 0 < m.p_more <= 1
        assert 0 < m.p_fewer <= 1
    assert motifs(texts, 3, seed=4, n_surrogates=30) == motifs(texts, 3, seed=4, n_surrogates=30)
    assert motifs(texts, 3, seed=4, n_surrogates=30) != motifs(texts, 3, seed=5, n_surrogates=30)


def test_surrogates_find_memory_and_nothing_else():
    # BBAAD over and over: no chain of order 1 keeps AA from becoming AAA
    found = {m.motif: m for m in motifs(["BBAAD" * 10] * 4, 3, n_surrogates=200)}
    assert found["AAA"].count == 0
    assert found["AAA"].p_fewer < 0.01
    assert found["BBA"].p_more < 0.01
    sticky = {m.motif: m for m in motifs(["B" * 20 + "A" * 20], 2, order=0, n_surrogates=200)}
    assert sticky["AA"].p_more < 0.01
    # independent letters are like their surrogates
    rng = np.random.default_rng(3)
    plain = motifs(["".join(rng.choice(list("BAD"), 200)) for _ in range(5)], 3, n_surrogates=200)
    assert np.mean([min(m.p_more, m.p_fewer) < 0.025 for m in plain]) < 0.2
    with pytest.raises(MetricError, match="order"):
        motifs("AAB", order=2)


def hidden(seed, n=12, length=25):
    """Sequences of a planted chain, with its states."""
    rng = np.random.default_rng(seed)
    means = np.array([[0.05, 0.5, 0.9], [0.2, 1.5, 0.6], [0.4, 1.0, 0.2]])
    rows, truth = [], []
    for _ in range(n):
        state, path = int(rng.integers(3)), []
        for _ in range(length):
            path.append(state)
            state = state if rng.random() < 0.8 else int(rng.integers(3))
        rows.append(means[path] + rng.normal(size=(length, 3)) * [0.02, 0.15, 0.06])
        truth.append(np.array(path))
    return rows, truth


def test_hmm_finds_what_was_planted():
    rows, truth = hidden(0)
    found = hmm_states(rows, n_starts=2)
    right = np.concatenate([a == b for a, b in zip(found.labels, truth, strict=True)]).mean()
    assert right > 0.97
    assert found.reason is None
    assert (np.diff(found.means[:, 0]) > 0).all()
    assert np.diag(found.transitions) == pytest.approx(0.8 + 0.2 / 3, abs=0.1)
    again = hmm_states(rows, n_starts=2)
    assert again.words == found.words
    scaled = hmm_states([3.0 * x + [1.0, -2.0, 5.0] for x in rows], n_starts=2)
    assert scaled.words == found.words
    assert scaled.means == pytest.approx(3 * found.means + [1, -2, 5], rel=1e-6)
    assert symbols(found.words, "012").n_steps == 300
    cube = hmm_states(np.stack(rows, axis=1), n_starts=2)
    assert cube.words == found.words


def test_hmm_gaps_and_reasons():
    rows, truth = hidden(1)
    rows[0][5] = np.nan
    rows[1][0, 1] = np.nan
    found = hmm_states(rows, n_starts=3)
    assert (found.labels[0][5], found.labels[1][0], found.n_missing) == (-1, -1, 2)
    assert found.words[0][5] == "?"
    assert np.mean(found.labels[0][6:] == truth[0][6:]) > 0.9
    for x, why in (
        (rows[2][:20], "steps<30"), (np.ones((40, 3)), "zero-denominator"), (np.zeros((0, 3)), "empty"),
        (np.concatenate([rows[2], np.full((40, 3), np.nan), rows[3]]), None),
        (np.concatenate([rows[2], rows[3], np.full((51, 3), np.nan)]), "coverage"),
    ):  # fmt: skip
        assert hmm_states([x], n_starts=2).reason == why
        result = compute("states.hmm/1", x, n_starts=2)
        assert result.reason == why
        assert (result.value != result.value) == (why is not None)
    with pytest.raises(MetricError, match="step, 3"):
        hmm_states(np.ones((4, 2)))


def test_features():
    lag, turn, h = steps(2)
    f = state_features(lag, turn, h, 30)
    assert f.shape == (8, 3)
    assert np.isnan(f[0, 1])
    assert f[1:, 1] == pytest.approx(turn)
    assert f[:, 2] == pytest.approx(h[1:] / math.log(30))
