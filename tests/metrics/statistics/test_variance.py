"""Where the variance of a panel lies: published vectors, statsmodels on a stored data set, a slow version."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics import icc1, lmg_shares, nakagawa_r2, variance_components, variance_table
from dynprobe.metrics.statistics._crossed_design import TERMS, crossed_design
from dynprobe.metrics.statistics._variance_reml import reml_of_cells, reml_of_mean_squares

DATA = pd.read_csv(Path(__file__).parent / "data" / "panel.csv")
#: Davies 1949, yields of dyestuff from six batches; REML as lme4 prints it.
DYESTUFF = {
    "A": (1545, 1440, 1440, 1520, 1580), "B": (1540, 1555, 1490, 1560, 1495), "C": (1595, 1550, 1605, 1510, 1560),
    "D": (1445, 1440, 1595, 1465, 1545), "E": (1595, 1630, 1515, 1635, 1625), "F": (1520, 1455, 1450, 1480, 1445),
}  # fmt: skip


def table(frame: pd.DataFrame, y: str = "value"):
    return variance_table(frame[y], list(frame["model"]), list(frame["category"]), list(frame["prompt"]))


def components(frame: pd.DataFrame, **options):
    return variance_components(
        frame["value"], list(frame["model"]), list(frame["category"]), list(frame["prompt"]), **options
    )


def unbalanced() -> pd.DataFrame:
    """The stored data without some rows, one cell among them."""
    return DATA.drop([0, 1, 7, 16, 30, 31, 32, 45, 58]).reset_index(drop=True)


# --- published vectors


def test_eta_of_an_additive_table():
    found = variance_table([1, 3, 3, 5], list("aabb"), list("xyxy"))
    shares = {row.term: row.eta2 for row in found.rows if row.df}
    assert shares == pytest.approx({"model": 0.5, "category": 0.5, "model:category": 0.0}, abs=1e-12)
    assert found["seed"].df == 0
    assert found["seed"].reason == "df<1"
    assert np.isnan(found["model"].omega2)
    assert found["model"].reason == "df<1"


def test_eta_keeps_the_interaction_apart():
    found = variance_table([0, 0, 0, 4], list("aabb"), list("xyxy"))
    shares = {row.term: row.eta2 for row in found.rows if row.df}
    assert shares == pytest.approx({"model": 1 / 3, "category": 1 / 3, "model:category": 1 / 3}, rel=1e-9)
    assert found["model:category"].includes == ("model:prompt", "seed")
    assert found["category"].includes == ("prompt",)


def test_a_category_of_one_prompt_says_why_it_has_no_test():
    values = np.random.default_rng(0).normal(size=24)
    found = variance_table(values, ["a"] * 12 + ["b"] * 12, (["x"] * 4 + ["y"] * 4 + ["z"] * 4) * 2)
    for term in ("model", "category", "model:category"):  # seeds say nothing of how models differ over prompts
        assert (found[term].against, found[term].reason) == (None, "prompts<2")
        assert np.isnan([found[term].p, found[term].F, found[term].omega2_against]).all()
        assert np.isfinite(found[term].omega2)  # of which seeds are the error by definition


def test_one_prompt_in_a_category_and_many_seeds_make_no_test_sure():
    """Two models that differ on each prompt by chance, run again and again: the seeds would call that a difference."""
    rng, rejected = np.random.default_rng(1), 0
    for _ in range(40):
        differ = rng.normal(size=(2, 6))  # model × prompt, the null: no difference of models
        rows = [(m, c, differ[m, c] + 0.01 * rng.normal()) for m in range(2) for c in range(6) for _ in range(3)]
        found = variance_table([r[2] for r in rows], [f"m{r[0]}" for r in rows], [f"c{r[1]}" for r in rows])
        rejected += found["model"].p < 0.05
    assert rejected == 0


@pytest.mark.parametrize(("values", "expected"), [((0, 0, 2, 2), 1), ((0, 2, 0, 2), -1), ((0, 1, 2, 3), 7 / 9)])
def test_icc(values, expected):
    assert icc1(values, list("aabb")).value == pytest.approx(expected, rel=1e-9)


def test_nakagawa():
    found = nakagawa_r2(1.0, [1.0], 2.0)
    assert (found.marginal, found.conditional) == pytest.approx((0.25, 0.5), rel=1e-12)
    assert nakagawa_r2(0, [0], 0).reason == "zero-denominator"
    assert nakagawa_r2(float("nan"), [0], 1).reason == "missing"
    with pytest.raises(MetricError, match="0 or above"):
        nakagawa_r2(1, [-1], 1)


def test_dyestuff_as_lme4_prints_it():
    y = [v for batch in DYESTUFF.values() for v in batch]
    batch = [b for b in DYESTUFF for _ in range(5)]
    for method in ("anova", "reml", "mixedlm"):
        found = variance_components(y, batch, None, method=method)
        assert found.components == pytest.approx({"model": 1764.05, "seed": 2451.25}, abs=0.005)
        assert found.includes["model"] == ("model:category", "model:prompt")


def test_numbers_of_the_published_audit():
    """η² = 0.07 of 17 models on 72 prompts: tested against how models differ over prompts."""
    eta, n = 0.07, 1224
    # one run per cell: 72 prompts in one category, so that model:prompt is what the additive model calls residual
    generator = np.random.default_rng(0)
    m, p = np.divmod(np.arange(n), 72)
    noise = generator.normal(size=(17, 72))
    noise -= noise.mean(0, keepdims=True)
    noise -= noise.mean(1, keepdims=True)
    a = generator.normal(size=17)
    a -= a.mean()
    y = a[m] * np.sqrt(eta / (72 * (a**2).sum())) + noise[m, p] * np.sqrt((1 - eta) / (noise**2).sum())
    found = variance_table(y, list(m), None, list(p))
    assert found["model"].eta2 == pytest.approx(0.07, rel=1e-9)
    ms = 0.93 / (16 * 71)
    assert np.isclose(found["model"].F, 0.07 / 16 / ms, rtol=1e-9)
    assert found["model"].omega2_against == pytest.approx((0.07 - 16 * ms) / (1 + ms), rel=1e-9)
    assert np.isnan(found["model"].omega2)


# --- statsmodels on the stored data set


@pytest.mark.parametrize("frame", [DATA, unbalanced()], ids=["balanced", "unbalanced"])
def test_sums_of_squares_are_those_of_anova_lm(frame):
    import statsmodels.formula.api as smf
    from statsmodels.stats.anova import anova_lm

    found = table(frame)
    frame = frame.assign(c=[p[-1] for p in frame["prompt"]])
    # nested terms: the prompt inside its category, and its interaction with the model
    steps = ["C(category)", "C(model)", "C(model):C(category)", "C(category):C(c)", "C(model):C(category):C(c)"]
    fits = [smf.ols("value ~ " + " + ".join(steps[: i + 1]), frame).fit() for i in range(len(steps))]
    last = anova_lm(*fits[3:])
    assert found["model:prompt"].ss_last == pytest.approx(last["ss_diff"].iloc[1], rel=1e-6)
    assert np.isclose(found["model:prompt"].F, last["F"].iloc[1], rtol=1e-6)
    assert found["model:prompt"].p == pytest.approx(last["Pr(>F)"].iloc[1], rel=1e-6)
    assert found["seed"].ss == pytest.approx(fits[-1].ssr, rel=1e-6)
    assert found["seed"].df == int(fits[-1].df_resid)
    without = smf.ols("value ~ C(model) + C(prompt)", frame).fit()
    assert found["model:category"].ss_last == pytest.approx(without.ssr - fits[3].ssr, rel=1e-6)
    assert found["prompt"].ss_last == pytest.approx(fits[2].ssr - fits[3].ssr, rel=1e-6)
    only = {k: smf.ols(f"value ~ {k}", frame).fit().ssr for k in ("C(prompt)", "C(model)", "C(model) + C(category)")}
    assert found["model"].ss_last == pytest.approx(only["C(prompt)"] - without.ssr, rel=1e-6)
    assert found["category"].ss_last == pytest.approx(only["C(model)"] - only["C(model) + C(category)"], rel=1e-6)
    assert sum(row.ss for row in found.rows) == pytest.approx(fits[0].centered_tss, rel=1e-9)


def test_two_way_anova_of_statsmodels():
    import statsmodels.formula.api as smf
    from statsmodels.stats.anova import anova_lm

    # rows of a cell as seeds of one prompt per category: the plain two-way layout with replicates
    frame = unbalanced()
    found = variance_table(frame["value"], list(frame["model"]), list(frame["category"]))
    said = anova_lm(smf.ols("value ~ C(model) * C(category)", frame).fit(), typ=2)
    for term, name in (("model", "C(model)"), ("category", "C(category)"), ("model:category", "C(model):C(category)")):
        assert found[term].ss_last == pytest.approx(said.loc[name, "sum_sq"], rel=1e-6)
        assert found[term].df == int(said.loc[name, "df"])
    e = said.loc["Residual", "sum_sq"] / said.loc["Residual", "df"]
    row = found["model"]
    assert row.omega2 == pytest.approx((row.ss - row.df * e) / (found.ss_total + e), rel=1e-9)


@pytest.mark.parametrize("frame", [DATA, unbalanced()], ids=["balanced", "unbalanced"])
@pytest.mark.parametrize("fixed", [None, "category"])
def test_components_are_those_of_mixed_lm(frame, fixed):
    ours, theirs = components(frame, fixed=fixed), components(frame, fixed=fixed, method="mixedlm")
    size = max(theirs.components.values())
    assert theirs.status == ours.status == "resolved"
    assert set(ours.components) == set(theirs.components) == set(TERMS) - {fixed}
    for term, value in theirs.components.items():
        assert ours.components[term] == pytest.approx(value, rel=1e-6, abs=1e-6 * size)
    assert ours.fixed_variance == pytest.approx(theirs.fixed_variance, rel=1e-6, abs=1e-9)
    assert (ours.r2.marginal, ours.r2.conditional) == pytest.approx(
        (theirs.r2.marginal, theirs.r2.conditional), rel=1e-4
    )


# --- the ways agree with each other


def test_reml_equals_anova_where_nothing_is_negative():
    reml, anova = components(DATA), components(DATA, method="anova")
    assert reml.components == pytest.approx(anova.components, rel=1e-9)
    assert min(anova.components.values()) > 0


@pytest.mark.parametrize("seed", range(4))
def test_mean_squares_and_cells_have_one_maximum(seed):
    """Pure noise: components at the edge, where ANOVA is negative."""
    frame = DATA.assign(value=np.random.default_rng(seed).normal(size=len(DATA)))
    found = table(frame)
    design = crossed_design(frame["value"], list(frame["model"]), list(frame["category"]), list(frame["prompt"]))
    from dynprobe.metrics.statistics._variance_components import _expected

    by_squares = reml_of_mean_squares(
        _expected(design, TERMS), np.array([found[t].ms for t in TERMS]), np.array([float(found[t].df) for t in TERMS])
    )
    by_cells, _ = reml_of_cells(design, TERMS, np.zeros(len(frame), dtype=np.int64))
    assert by_cells == pytest.approx(by_squares, rel=1e-6, abs=1e-8)
    reported = components(frame)
    assert reported.reason == "singular"
    assert reported.singular
    assert all(reported.components[t] == pytest.approx(0, abs=1e-9) for t in reported.singular)
    assert components(frame, method="anova").reason == "negative"


def test_restricted_maximum_is_one():
    """No small move of the components makes the restricted likelihood of the rows larger."""
    frame = unbalanced()
    found = components(frame)
    y = frame["value"].to_numpy()
    z = {
        "model": frame["model"], "category": frame["category"], "prompt": frame["prompt"],
        "model:category": frame["model"] + frame["category"], "model:prompt": frame["model"] + frame["prompt"],
        "seed": pd.Series(np.arange(len(frame))),
    }  # fmt: skip
    same = {t: (v.to_numpy()[:, None] == v.to_numpy()[None, :]).astype(float) for t, v in z.items()}
    ones = np.ones((len(y), 1))

    def likelihood(theta):
        V = sum(theta[t] * same[t] for t in TERMS)
        inverse = np.linalg.inv(V)
        C = ones.T @ inverse @ ones
        P = inverse - inverse @ ones @ np.linalg.inv(C) @ ones.T @ inverse
        return -0.5 * (np.linalg.slogdet(V)[1] + np.linalg.slogdet(C)[1] + y @ P @ y)

    best = likelihood(found.components)
    for term in TERMS:
        for factor in (0.98, 1.02):
            assert likelihood({**found.components, term: found.components[term] * factor}) < best


# --- a slow independent version


def slow_shares(frame: pd.DataFrame) -> dict[str, float]:
    """Mean over orders of what a term adds, with a column for every level and least squares for every step."""
    codes = {
        "model": frame["model"], "category": frame["category"], "prompt": frame["prompt"],
        "model:category": frame["model"] + frame["category"], "model:prompt": frame["model"] + frame["prompt"],
    }  # fmt: skip
    y = frame["value"].to_numpy()

    def left(terms):
        X = [np.ones((len(y), 1))] + [pd.get_dummies(codes[t]).to_numpy(float) for t in terms]
        X = np.hstack(X)
        return float(((y - X @ np.linalg.lstsq(X, y, rcond=None)[0]) ** 2).sum())

    rules = [("model", "model:category"), ("category", "model:category"), ("category", "prompt"),
             ("model:category", "model:prompt"), ("prompt", "model:prompt")]  # fmt: skip
    orders = [o for o in itertools.permutations(codes) if all(o.index(a) < o.index(b) for a, b in rules)]
    out = dict.fromkeys(codes, 0.0)
    for order in orders:
        for i, term in enumerate(order):
            out[term] += (left(order[:i]) - left(order[: i + 1])) / len(orders)
    return out | {"seed": left(list(codes))}


@pytest.mark.parametrize("frame", [DATA, unbalanced()], ids=["balanced", "unbalanced"])
def test_against_the_slow_version(frame):
    found = table(frame)
    assert {row.term: row.ss for row in found.rows} == pytest.approx(slow_shares(frame), rel=1e-9)


def test_lmg_against_every_order():
    generator = np.random.default_rng(3)
    n = 12
    X = {"a": generator.normal(size=n), "b": list("xxyyzzxxyyzz"), "c": generator.normal(size=n)}
    y = generator.normal(size=n) + X["a"]
    columns = {
        "a": X["a"][:, None],
        "b": pd.get_dummies(pd.Series(X["b"])).to_numpy(float)[:, 1:],
        "c": X["c"][:, None],
    }

    def r2(names):
        Z = np.hstack([np.ones((n, 1)), *[columns[k] for k in names]])
        return 1 - ((y - Z @ np.linalg.lstsq(Z, y, rcond=None)[0]) ** 2).sum() / ((y - y.mean()) ** 2).sum()

    expected = dict.fromkeys(columns, 0.0)
    orders = list(itertools.permutations(columns))
    for order in orders:
        for i, name in enumerate(order):
            expected[name] += (r2(order[: i + 1]) - r2(order[:i])) / len(orders)
    found = lmg_shares(y, X)
    assert found == pytest.approx(expected, rel=1e-9)
    assert sum(found.values()) == pytest.approx(r2("abc"), rel=1e-9)


# --- invariances and edges


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=24, max_size=24), st.integers(1, 50), st.integers(-99, 99), st.randoms(),
)  # fmt: skip
def test_shares_ignore_units_offsets_and_order(values, scale, offset, random):
    grid = list(itertools.product("abc", ["x1", "x2", "y1", "y2"], range(2)))
    m, p = [g[0] for g in grid], [g[1] for g in grid]
    c = [q[0] for q in p]
    first = variance_table(values, m, c, p)
    order = list(range(24))
    random.shuffle(order)
    names = dict(zip("abc", "zxy", strict=True))
    second = variance_table(
        [values[i] * scale + offset for i in order], [names[m[i]] for i in order], [c[i] for i in order],
        [p[i] for i in order],
    )  # fmt: skip
    assert first.reason == second.reason
    assert first.copies == second.copies
    if first.reason is None:
        for a, b in zip(first.rows, second.rows, strict=True):
            assert (a.df, a.includes, a.against) == (b.df, b.includes, b.against)
            assert a.eta2 == pytest.approx(b.eta2, rel=1e-9, abs=1e-12, nan_ok=True)
            assert a.p == pytest.approx(b.p, rel=1e-6, abs=1e-9, nan_ok=True)
        assert sum(r.ss for r in first.rows) == pytest.approx(first.ss_total, rel=1e-9)
        assert all(r.ss >= 0 for r in first.rows)


def test_seeds_that_change_nothing_are_copies():
    once = DATA[DATA["seed"] == 0]
    twice = pd.concat([once, once.assign(seed=1)])
    a, b = table(once), table(twice)
    assert b.copies == len(once)
    assert b.n == a.n == len(once)
    assert b["seed"].reason == "copies"
    assert b["model:prompt"].includes == ("seed",)
    assert [r.p for r in a.rows] == pytest.approx([r.p for r in b.rows], nan_ok=True)


def test_missing_values_and_refusals():
    holes = DATA.assign(value=DATA["value"].where(DATA.index % 7 != 0))
    found = table(holes)
    assert found.n == int(holes["value"].notna().sum())
    assert found.n_asked == len(DATA)
    assert not found.balanced
    assert table(DATA.assign(value=DATA["value"].where(DATA.index < 20))).reason == "coverage"
    assert table(DATA.assign(value=1.5)).reason == "zero-denominator"
    assert table(DATA[DATA["model"] == "m0"]).reason == "models<2"
    assert variance_table([], [], [], []).reason == "empty"
    assert all(np.isnan(row.eta2) for row in table(DATA.assign(value=1.5)).rows)
    assert components(DATA.assign(value=1.5)).reason == "zero-denominator"
    assert components(unbalanced(), method="anova").reason == "unbalanced"
    with pytest.raises(MetricError, match=r"prompt 'p' lies in the categories 'x' and 'y'"):
        variance_table([1, 2], ["a", "b"], ["x", "y"], ["p", "p"])
    with pytest.raises(MetricError, match="model names the prompt of each of 2 runs, found 1"):
        variance_table([1, 2], ["a"], ["x", "y"], ["p", "q"])


def test_icc_edges_and_interval():
    assert icc1([1, 2], ["a", "b"]).reason == "df<1"
    assert icc1([1, 2], ["a", "a"]).reason == "groups<2"
    assert icc1([], []).reason == "empty"
    assert icc1([1, 1, 1, 1], list("aabb")).reason == "zero-denominator"
    unequal = icc1([0, 1, 2, 3, 4], list("aabbb"))
    assert unequal.k0 == pytest.approx((5 - (4 + 9) / 5) / 1)
    assert unequal.reason_interval == "unequal-groups"
    # Shrout and Fleiss 1979, six targets and four judges: ICC(1,1) = 0.17; R's psych prints −0.13 … 0.72
    ratings = [9, 2, 5, 8, 6, 1, 3, 2, 8, 4, 6, 8, 7, 1, 2, 6, 10, 5, 6, 9, 6, 2, 4, 7]
    found = icc1(ratings, [i // 4 for i in range(24)])
    assert found.value == pytest.approx(0.17, abs=0.005)
    assert (found.low, found.high) == pytest.approx((-0.13, 0.72), abs=0.005)
