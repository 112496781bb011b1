"""Delay diagnostics: no number without its series, its surrogates and its rank, and none where the series is short."""

import json
import math

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.metrics import delay_pca, false_neighbours, lag_autocorrelation, surrogates
from dynprobe.protocols._delay_statistics import Key, place

ALWAYS = ("n", "n_points", "lag", "lag_rule", "theiler", "theiler_rule", "surrogate", "n_surrogates")


def henon(n):
    x = np.empty(n + 200)
    x[:2] = 0.1
    for t in range(2, n + 200):
        x[t] = 1 - 1.4 * x[t - 1] ** 2 + 0.3 * x[t - 2]
    return x[200:]


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal(110)


@pytest.fixture(scope="module")
def found(noise):
    return dp.delay_diagnostics(
        {"white": noise, "walk": noise.cumsum(), "henon": henon(110)}, dims=(1, 2, 3, 4), lag=1, theiler=1
    )


def row(found, series, statistic, dim=0, component=0, surrogate="ar1"):
    table = found.table
    (index,) = np.flatnonzero(
        (table["series"] == series) & (table["statistic"] == statistic) & (table["dim"] == dim)
        & (table["component"] == component) & (table["surrogate"] == surrogate)
    )  # fmt: skip
    return table.iloc[index]


def test_every_row_carries_what_it_must_be_read_against(found):
    table = found.table
    assert not table[list(ALWAYS)].isna().any().any()
    assert table["r1"].notna().all()
    assert (table["n"] == 110).all()
    assert (table["lag"] == 1).all()
    given = table[table["value"].notna()]
    assert set(given["surrogate"]) == {"ft", "iaaft", "ar1"}
    ranked = given[given["statistic"] != "fnn_dimension"]
    assert ranked[["low", "median", "high", "p", "p_less", "p_greater"]].notna().all().all()
    assert (ranked["n_surrogates"] == 39).all()
    assert table.loc[table["value"].isna(), "reason"].notna().all()
    assert table.loc[table["value"].notna(), "reason"].isna().all()
    assert table.loc[table["value"].isna(), "p"].isna().all()


def test_numbers_are_those_of_the_metrics(found, noise):
    for name, x in (("white", noise), ("walk", noise.cumsum())):
        assert row(found, name, "r1")["value"] == lag_autocorrelation(x)
        w = int(row(found, name, "fnn", 2)["theiler"])
        for f in false_neighbours(x, (1, 2, 3), 1, w):
            assert row(found, name, "fnn", f.dim)["value"] == f.share
        assert row(found, name, "pc_share", 3, 2)["value"] == delay_pca(x, 3).shares[1]
    made = surrogates(noise, "iaaft", 39, key="white")
    among = np.sort([delay_pca(one, 3).shares[0] for one in made])
    place_ = row(found, "white", "pc_share", 3, 1, "iaaft")
    assert place_["low"] == pytest.approx(np.quantile(among, 0.025))
    assert place_["high"] == pytest.approx(np.quantile(among, 0.975))
    assert place_["p_less"] == pytest.approx((1 + (among <= place_["value"]).sum()) / 40)


def test_determinism_is_found_and_noise_is_not(found):
    for kind in ("ft", "iaaft", "ar1"):
        assert row(found, "henon", "fnn", 2, surrogate=kind)["p_less"] <= 0.025
        assert row(found, "henon", "fnn_dimension", surrogate=kind)["value"] == 2
    # the walk has few false neighbours too, and its AR(1) surrogates have as few
    walk = row(found, "walk", "fnn", 3)
    assert walk["value"] < 0.05
    assert walk["p"] > 0.05
    assert walk["low"] <= walk["value"] <= walk["high"]


def test_the_fixed_axes_are_in_the_surrogates_as_well(found):
    for name in ("white", "walk", "henon"):
        for kind in ("ft", "iaaft", "ar1"):
            for statistic in ("pc_cosine", "pc_sine", "pc_legendre", "pc_mirror"):
                one = row(found, name, statistic, 2, 1, kind)
                assert one["value"] == pytest.approx(1, abs=1e-9)
                assert (one["low"], one["high"]) == pytest.approx((1, 1), abs=1e-9)
                assert one["p"] == 1
                assert one["remark"] == "identity: 1 for every series"
    assert row(found, "walk", "pc_cosine", 4, 1)["value"] > 0.99
    assert row(found, "walk", "pc_cosine", 4, 1)["low"] > 0.98


def test_short_series_give_reasons(noise):
    short = dp.delay_diagnostics(noise[:40], lag=1, theiler=1, surrogates=["ft"])
    for m, reason in ((4, "points<100"), (5, "points<317"), (6, "points<1000")):
        one = row(short, "series", "fnn", m, surrogate="ft")
        assert (one["reason"], math.isnan(one["value"])) == (reason, True)
    assert row(short, "series", "pc_share", 5, 1, "ft")["reason"] == "windows<50"
    assert pd.isna(row(short, "series", "pc_share", 3, 1, "ft")["reason"])
    assert row(short, "series", "fnn_dimension", surrogate="ft")["reason"] == "none<0.05 up to 3"
    tiny = dp.delay_diagnostics(
        {"tiny": noise[:6], "none": [], "same": np.ones(60), "hole": [*noise[:40], np.nan, 1.0]}
    )
    assert tiny.table[tiny.table["statistic"] != "r1"]["value"].isna().all()
    reasons = tiny.table[tiny.table["statistic"] == "fnn"].groupby("series")["reason"].first()
    assert reasons.to_dict() == {"tiny": "points<20", "none": "constant", "same": "constant", "hole": "nonfinite"}
    assert (tiny.table["n_surrogates"] == 0).all()
    tiny.figure("same")
    tiny.figure("tiny")


def test_missing_values_at_the_ends_are_cut_off(noise):
    whole = dp.delay_diagnostics({"a": noise}, dims=(2,), lag=1, surrogates=["ar1"], n_surrogates=19).table
    padded = [np.nan, np.nan, *noise, np.nan]
    cut = dp.delay_diagnostics({"a": padded}, dims=(2,), lag=1, surrogates=["ar1"], n_surrogates=19).table
    assert (cut["n_trimmed"] == 3).all()
    pd.testing.assert_frame_equal(cut.drop(columns="n_trimmed"), whole.drop(columns="n_trimmed"))


def test_surrogates_of_a_series_do_not_depend_on_its_company(found, noise):
    alone = dp.delay_diagnostics({"white": noise}, dims=(1, 2, 3, 4), lag=1, theiler=1)
    together = found.table[found.table["series"] == "white"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.table, together)
    channels = dp.delay_diagnostics(np.stack([noise, noise.cumsum()], -1), dims=(2,), lag=1, surrogates=["ar1"])
    assert list(dict.fromkeys(channels.table["series"])) == ["0", "1"]


def test_place():
    among = np.arange(1.0, 40.0)
    extreme = place(Key("fnn", 2, 0), 0.0, among, 19)
    assert (extreme.p, extreme.p_less, extreme.p_greater) == (0.05, 0.025, 1.0)
    assert place(Key("fnn", 2, 0), 20.0, among, 19).p == 1
    assert place(Key("fnn", 2, 0), 0.0, among[:18], 19).reason == "surrogates<19"
    assert place(Key("fnn", 2, 0), 0.0, np.r_[among, np.nan], 19).n == 39
    # a dimension that surrogates never reach is further than any
    never = place(Key("fnn_dimension", 0, 0), 2.0, np.r_[np.full(30, np.nan), np.full(9, 3.0)], 19)
    assert (never.n, never.low, never.high, never.p_less) == (39, 3.0, math.inf, 1 / 40)


def test_summary_figure_and_files(found, tmp_path):
    summary = found.summary()
    one = summary[(summary["statistic"] == "fnn") & (summary["dim"] == 2) & (summary["surrogate"] == "ft")].iloc[0]
    assert (one["n_series"], one["n_defined"], one["n_tested"]) == (3, 3, 3)
    assert 1 <= one["n_outside"] <= 3
    figure = found.figure("walk")
    assert [panel.get_title(loc="left") for panel in figure.axes] == [
        "false nearest neighbours", "first principal axis", "principal axes, m = 4",
    ]  # fmt: skip
    strict = dp.delay_diagnostics(np.arange(60.0) ** 2, dims=(1, 2), surrogates=["ar1"], accept=0.01)
    for drawn, accept in ((figure, 0.05), (strict.figure(), 0.01)):
        assert [line.get_ydata()[0] for line in drawn.axes[0].lines if line.get_linestyle() == ":"] == [accept]
    content = json.loads(found.save(tmp_path / "all.json").read_text())
    assert len(content["table"]) == len(found.table)
    assert {entry["value"] for entry in content["table"] if entry["reason"]} == {None}
    assert len(pd.read_csv(found.save(tmp_path / "all.csv"))) == len(found.table)
    with pytest.raises(UsageError, match=r"no series 'wakl'.*Did you mean 'walk'"):
        found.figure("wakl")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"surrogates": []}, "without them is not given"), ({"surrogates": ["iaft"]}, "Did you mean 'iaaft'"),
        ({"n_surrogates": 18}, "at least 19"), ({"dims": ()}, "dims is empty"), ({"lag": "mi"}, "auto or a whole"),
        ({"lag": 0}, "lag is a whole"), ({"theiler": 0}, "theiler is a whole"), ({"accept": 0.0}, "above 0"),
        ({"dims": (0,)}, "dim is a whole"), ({"seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_refusals(noise, settings, text):
    with pytest.raises(UsageError, match=text):
        dp.delay_diagnostics(noise, **settings)


def test_refused_shapes(noise):
    for x in (np.zeros((2, 3, 4)), {"a": noise[None]}, {}):
        with pytest.raises(UsageError):
            dp.delay_diagnostics(x)
