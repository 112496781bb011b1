"""Skeletons, partitions and regimes of models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics import adjusted_rand, regime_shares, skeleton_r2, stable_clusters

NAMES = "abcdefghijklmnop"


def named(values):
    return dict(zip(NAMES, values, strict=False))


# --- varexp.skeleton


def test_skeleton_vectors():
    whole = skeleton_r2([0, 0, 2, 2], "abcd", {"x": named([0, 0, 1, 1])})
    assert (whole.r2, whole.r2_adjusted) == pytest.approx((1, 1), rel=1e-9)
    none = skeleton_r2([0, 0, 2, 2], "abcd", {"x": named([0, 1, 0, 1])})
    assert (none.r2, none.r2_adjusted) == pytest.approx((0, -0.5), abs=1e-9)
    assert np.isnan(none.p_value)  # two skeletons: to change their places changes nothing
    assert (none.reason_p, none.p_least) == ("skeletons<=p+1", 1.0)
    three = {"x": named([0, 0, 1, 1]), "y": named([0, 1, 0, 1]), "z": named([1, 0, 0, 1])}
    refused = skeleton_r2([0, 0, 2, 2], "abcd", three)
    assert refused.reason == "n<=p+2"
    assert np.isnan(refused.r2)
    assert refused.null == 1.0


def test_skeleton_against_statsmodels_and_by_leaving_out():
    import statsmodels.api as sm

    generator = np.random.default_rng(1)
    n = 9
    X = generator.normal(size=(n, 2))
    y = X[:, 0] + generator.normal(size=n)
    norm = ["rms", "layer", "rms", "layer", "rms", "rms", "layer", "rms", "rms"]
    families = named("AAABBBCCC")
    covariates = {"x": named(X[:, 0]), "z": named(X[:, 1]), "norm": named(norm)}
    found = skeleton_r2(y, NAMES[:n], covariates, families=families, n_permutations=400)
    design = np.column_stack([np.ones(n), X, [w == "rms" for w in norm]]).astype(float)
    said = sm.OLS(y, design).fit()
    assert (found.r2, found.r2_adjusted) == pytest.approx((said.rsquared, said.rsquared_adj), rel=1e-9)
    assert found.null == pytest.approx(3 / 8)

    def left_out(groups):
        error = 0.0
        for group in set(groups):
            out = np.array([g == group for g in groups])
            beta = np.linalg.lstsq(design[~out], y[~out], rcond=None)[0]
            error += float(((y[out] - design[out] @ beta) ** 2).sum())
        return 1 - error / float(((y - y.mean()) ** 2).sum())

    assert found.r2_leave_model == pytest.approx(left_out(list(range(n))), rel=1e-9)
    assert found.r2_leave_skeleton == pytest.approx(found.r2_leave_model, rel=1e-9)
    assert found.r2_leave_family == pytest.approx(left_out([families[m] for m in NAMES[:n]]), rel=1e-9)
    assert sum(found.shares.values()) == pytest.approx(found.r2, rel=1e-9)
    assert (found.n, found.p, found.n_skeletons, found.permuted, found.exact) == (9, 3, 9, "models", False)
    assert found.permutations == 401


def test_few_orders_are_all_taken():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(2, 6))
    found = skeleton_r2(y, NAMES[:6], {"x": named(x)})
    observed = np.corrcoef(x, y)[0, 1] ** 2
    hits = [np.corrcoef(x, y[list(o)])[0, 1] ** 2 >= observed * (1 - 1e-9) for o in itertools.permutations(range(6))]
    assert found.exact
    assert found.permutations == 720
    assert found.p_value == pytest.approx(np.mean(hits), rel=1e-12)


def test_seeds_of_one_architecture_are_dealt_together():
    """Six models of three depths: the two seeds of a depth go along, so at most 3! = 6 orders say anything."""
    found = skeleton_r2([0, 0.1, 1, 1.1, 2, 2.1], NAMES[:6], {"depth": named([1, 1, 2, 2, 3, 3])})
    assert (found.permuted, found.n_skeletons, found.permutations) == ("groups", 3, 6)
    assert found.p_value == pytest.approx(2 / 6)
    apart = skeleton_r2([0, 0.1, 1, 1.1, 2, 2.1], NAMES[:6], {"depth": named([1, 1.01, 2, 2.01, 3, 3.01])})
    assert apart.permuted == "models"
    assert apart.p_value < found.p_value


def test_groups_of_other_sizes_keep_their_places():
    """Skeletons of 1, 1, 1, 2 and 2 models: 3! · 2! orders of blocks, here counted one by one."""
    groups, x = [0, 1, 2, 3, 3, 4, 4], np.array([0.0, 2.0, 5.0, 1.0, 1.0, 3.0, 3.0])
    y = np.array([0.3, 1.9, 4.1, 1.2, 0.7, 2.2, 3.4])
    found = skeleton_r2(y, NAMES[:7], {"x": named(x)})
    assert (found.permuted, found.permutations, found.exact, found.reason_p) == ("groups of one size", 12, True, None)
    blocks = [y[[g == k for g in groups]] for k in range(5)]
    orders = [
        np.concatenate([blocks[i] for i in (*one, *two)])
        for one in itertools.permutations(range(3)) for two in itertools.permutations((3, 4))
    ]  # fmt: skip
    r2 = np.array([np.corrcoef(x, order)[0, 1] ** 2 for order in orders])
    assert found.p_value == pytest.approx(np.mean(r2 >= r2[0] * (1 - 1e-9)), rel=1e-12)
    assert found.p_least <= found.p_value


def test_no_p_where_all_skeletons_differ_in_size():
    found = skeleton_r2([0, 1, 1.2, 3, 3.1, 2.9], NAMES[:6], {"depth": named([1, 2, 2, 3, 3, 3])})
    assert np.isnan(found.p_value)
    assert (found.reason_p, found.permutations) == ("sizes", 1)
    assert found.r2 > 0.9


def test_drawn_orders_know_what_ties():
    """The corners of a cube: 48 of the 8! orders turn it into itself, so no p of theirs is below 1/840."""
    corners = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    cube = {name: named(column) for name, column in zip("xyz", corners.T, strict=True)}
    found = skeleton_r2(corners @ [1, 2, 4], NAMES[:8], cube, seed=4)
    assert not found.exact
    assert 0.0004 < found.p_least < 0.0025
    assert found.p_value == found.p_least  # R² is 1, and what ties is these orders alone
    skeletons = {"width": named(np.repeat(np.arange(8), 2)), "kind": named([w for w in "stuvwxyz" for _ in "ab"])}
    whole = skeleton_r2(np.arange(16.0), NAMES[:16], skeletons)  # eight pairs, seven columns: every order is as good
    assert (whole.p, whole.exact, whole.reason_p, whole.p_least) == (7, False, "skeletons<=p+1", 1.0)
    assert np.isnan(whole.p_value)


def test_no_p_where_the_covariates_are_as_they_were_in_any_other_order():
    """Pairs at 0 and 2 may change places, the one model at 1 may not: the line is turned round, no more."""
    found = skeleton_r2([0, 0.2, 1, 2, 2.4], NAMES[:5], {"depth": named([0, 0, 1, 2, 2])})
    assert (found.permutations, found.reason_p, found.n_skeletons) == (2, "symmetric", 3)
    assert np.isnan(found.p_value)


def test_skeletons_of_unequal_size_reject_no_more_than_they_say():
    """Models of one skeleton are alike and covariates mean nothing: 5 % of panels may look as if they did."""
    sizes, panels = [1, 1, 1, 1, 1, 1, 3, 3, 3, 3], 250
    groups = np.repeat(np.arange(len(sizes)), sizes)
    names = [f"m{i}" for i in range(len(groups))]
    generator = np.random.default_rng(3)
    hits = [0, 0]
    for seed in range(panels):
        x = generator.normal(size=len(sizes))[groups]
        y = generator.normal(size=len(sizes))[groups] + 0.3 * generator.normal(size=len(groups))
        apart = x + 1e-6 * generator.normal(size=len(groups))  # as if every model were a skeleton of its own
        for which, covariate in enumerate((x, apart)):
            found = skeleton_r2(
                y, names, {"x": dict(zip(names, covariate, strict=True))}, n_permutations=199, seed=seed
            )
            hits[which] += found.p_value <= 0.05
    assert 0.02 <= hits[0] / panels <= 0.07
    assert hits[1] / panels > 0.12  # dealing single models would be wrong here


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5).map(lambda v: round(v, 3)), min_size=24, max_size=24), st.integers(0, 9))
def test_skeleton_never_explains_more_of_the_runs_than_the_models_do(values, seed):
    x = named(np.random.default_rng(seed).normal(size=6))
    found = skeleton_r2(values, [m for m in NAMES[:6] for _ in range(4)], {"x": x}, n_permutations=9)
    if found.reason is None:
        assert found.consistent
        assert found.r2_runs <= found.eta2_model + 1e-9
        assert found.r2_runs == pytest.approx(found.r2 * found.eta2_model, rel=1e-6, abs=1e-9)


def test_covariates_that_say_nothing_are_named():
    y = [0, 1, 2, 4, 3, 5]
    given_ = {
        "width": named([32] * 6), "depth": named([1, 2, 3, 4, 5, 6]), "layers": named([2, 4, 6, 8, 10, 12]),
        "norm": named(["rms"] * 6),
    }  # fmt: skip
    found = skeleton_r2(y, NAMES[:6], given_)
    assert found.dropped == {"width": "constant", "layers": "follows from depth", "norm": "constant"}
    assert found.p == 1
    assert skeleton_r2(y, NAMES[:6], {"width": named([32] * 6)}).reason == "p<1"
    assert skeleton_r2([1] * 6, NAMES[:6], {"depth": named(range(6))}).reason == "zero-denominator"
    with pytest.raises(MetricError, match="covariate depth is not known of 'f'"):
        skeleton_r2(y, NAMES[:6], {"depth": named(range(5))})


def test_a_family_that_alone_has_a_norm_cannot_be_predicted():
    found = skeleton_r2(
        [0, 1, 2, 4, 3, 5], NAMES[:6], {"norm": named(["rms", "rms", "rms", "rms", "layer", "layer"])},
        families=named("AABBCC"),
    )  # fmt: skip
    assert np.isnan(found.r2_leave_family)
    assert found.reason_family == "not predictable without C"
    assert not np.isnan(found.r2)


# --- partitions


def test_rand_vectors():
    assert adjusted_rand("aabb", "aabb").value == 1.0
    assert adjusted_rand([1, 1, 2, 2], [1, 2, 1, 2]).value == pytest.approx(-0.5, rel=1e-12)
    assert adjusted_rand("aaa", "bbb").value == 1.0
    assert adjusted_rand("abc", "xyz").value == 1.0
    assert adjusted_rand("a", "a").reason == "units<2"


def test_rand_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 4, (2, 15))
        assert adjusted_rand(a, b, n_permutations=0).value == pytest.approx(
            metrics.adjusted_rand_score(a, b), abs=1e-12
        )


def test_rand_interval_is_where_chance_lies():
    a, b = np.repeat([0, 1, 2], 6), np.tile([0, 1, 2], 6)
    found = adjusted_rand(a, b, n_permutations=999)
    assert found.null_low < 0 < found.null_high < 0.5
    assert found.null_low <= found.value <= found.null_high
    same = adjusted_rand(a, a, n_permutations=999)
    assert same.p == pytest.approx(1 / 1000)


def test_clusters_that_stay_and_clusters_that_do_not():
    generator = np.random.default_rng(5)
    apart = np.concatenate([generator.normal(0, 1, (4, 30)), generator.normal(9, 1, (3, 30))])
    found = stable_clusters(apart, NAMES[:7], n_boot=200)
    assert found.stable == (("a", "b", "c", "d"), ("e", "f", "g"))
    assert found.fragmentation == pytest.approx(3 / 7)
    assert found.n_clusters == 2
    loose = stable_clusters(generator.normal(size=(7, 12)), NAMES[:7], n_boot=200)
    assert loose.fragmentation > 0.5
    assert sum(len(c) for c in loose.stable) == 7
    for cluster in loose.stable:
        at = [NAMES.index(m) for m in cluster]
        assert loose.together[np.ix_(at, at)].min() >= 0.95
    assert stable_clusters(apart, NAMES[:7], n_clusters=1, n_boot=50).fragmentation == 0


def test_clusters_ignore_units_and_the_order_of_models():
    generator = np.random.default_rng(6)
    X = np.concatenate([generator.normal(0, 1, (3, 20)), generator.normal(4, 1, (3, 20))])
    first = stable_clusters(X, NAMES[:6], n_boot=100)
    order = [3, 0, 5, 1, 4, 2]
    second = stable_clusters(1000 * X[order] + 7, [NAMES[i] for i in order], n_boot=100)
    assert {frozenset(c) for c in first.stable} == {frozenset(c) for c in second.stable}
    assert np.allclose(first.together[np.ix_(order, order)], second.together)
    holes = X.copy()
    holes[0, 3] = np.nan
    assert stable_clusters(holes, NAMES[:6], n_boot=50).n_prompts == 19


def test_largest_clique_is_found_by_all_subsets():
    from dynprobe.metrics.statistics._partitions import _cliques

    generator = np.random.default_rng(7)
    for _ in range(20):
        joined = generator.random((7, 7)) < 0.55
        joined = joined & joined.T | np.eye(7, dtype=bool)
        most = max(
            size
            for size in range(1, 8)
            for some in itertools.combinations(range(7), size)
            if joined[np.ix_(some, some)].all()
        )
        found = _cliques(joined)
        assert len(found[0]) == most
        assert sorted(i for c in found for i in c) == list(range(7))
        assert all(joined[np.ix_(c, c)].all() for c in found)


def test_topology_refusals():
    assert stable_clusters([[1, 2, 3], [1, 2, 4]], "ab").reason == "models<3"
    assert stable_clusters([[1, 2], [2, 3], [3, 4]], "abc").reason == "prompts<3"
    assert stable_clusters(np.ones((3, 5)), "abc").reason == "zero-denominator"
    with pytest.raises(MetricError, match="profiles are"):
        stable_clusters([[1, 2, 3]], "ab")
    with pytest.raises(MetricError, match="n_clusters"):
        stable_clusters(np.random.default_rng(0).normal(size=(3, 4)), "abc", n_clusters=4)


# --- regimes


def test_regimes_with_the_share_of_samples():
    sure = regime_shares([2.4, 2.5, 2.6, 2.5])
    assert (sure.label, sure.shares) == ("ADAPTIVE", {"ADAPTIVE": 1.0})
    torn = regime_shares([1.6, 1.6, 1.65, 2.5, 2.5, 2.6, 2.4], n_boot=500)
    assert torn.label == "ADAPTIVE"
    assert set(torn.shares) <= {"ADAPTIVE", "UNDERACTIVE"}
    assert 0.05 < torn.shares["UNDERACTIVE"] < 0.5
    assert torn.runs == pytest.approx({"ADAPTIVE": 4 / 7, "UNDERACTIVE": 3 / 7})


def test_regimes_average_inside_a_prompt_first():
    found = regime_shares([2.4, 2.6, 9.0, 9.0, 9.0], ["a", "b", "c", "c", "c"], n_boot=0)
    assert found.ratio == 2.6
    assert found.n == 3
    assert regime_shares([float("nan")] * 3).reason == "empty"
    assert regime_shares([2.0, float("nan"), float("nan")]).reason == "coverage"
    assert regime_shares([2.0, 2.1]).reason == "prompts<3"
