"""Every metric against its slow twin on random trajectories with masks, zero states, NaNs and repeats."""

import math

import numpy as np
import pytest
import slow

from dynprobe.metrics import compute

EPS = np.finfo(np.float64).eps
N_TRIALS = 200


def agree(result, value, reason, coverage=None, rel=1e-9):
    assert result.reason == reason, (result, value, reason)
    if math.isnan(value):
        assert math.isnan(float(result))
    else:
        assert float(result) == pytest.approx(value, rel=rel, abs=1e-11)
    if coverage is not None and not math.isnan(coverage):
        assert result.coverage == pytest.approx(coverage, rel=1e-12)


def trajectory(seed):
    """A random trajectory of random size with everything that can go wrong in some of them."""
    rng = np.random.default_rng(seed)
    D, N, d = int(rng.integers(1, 7)), int(rng.integers(1, 12)), int(rng.integers(2, 9))
    x = np.cumsum(rng.normal(size=(D, N, d)), axis=0) * 10.0 ** rng.integers(-3, 4)
    mask = np.ones((D, N), bool)
    if seed % 3 == 1:
        mask = rng.random((D, N)) < 0.8
    if seed % 3 == 2:
        mask[:] = rng.random(N) < 0.8
    if seed % 4 == 1:
        x[rng.random((D, N)) < 0.15] = 0.0
    if seed % 5 == 1:
        x[rng.random((D, N, d)) < 0.03] = np.nan
    if seed % 7 == 1:
        x[rng.random((D, N, d)) < 0.02] = -np.inf
    if seed % 6 == 1 and D > 1:
        again = rng.random((D - 1, N)) < 0.3
        x[1:][again] = x[:-1][again]
    if seed % 8 == 3 and N > 1:
        x[:, 1] = x[:, 0] * 2
    if seed % 9 == 4:
        x[rng.random((D, N)) < 0.1] *= 1e-14
    if seed % 25 == 7:
        mask[:] = False
    return x, mask


@pytest.mark.parametrize("block", range(10))
def test_trajectory_metrics(block):
    for seed in range(block * N_TRIALS // 10, (block + 1) * N_TRIALS // 10):
        x, mask = trajectory(seed)
        with np.errstate(all="ignore"):
            cases = [
                ("kappa.phase/1", slow.kappa_phase(x, mask)),
                ("delta.angle/1", slow.kappa_phase(x, mask)),
                ("delta.rel_prev/1", slow.rel_prev(x, mask)),
                ("delta.rel_next/1", slow.rel_next(x, mask)),
                ("delta.rel_prev/1{agg=fro}", slow.rel_prev_fro(x, mask)),
                ("delta.rel_next/1{agg=fro}", slow.rel_next_fro(x, mask)),
                ("delta.rms/1", slow.rms(x, mask)),
                ("resid.norm/1", slow.resid_norm(x, mask)),
                ("curv.depth/1", slow.curv_depth(x, mask, EPS)),
                ("curv.token/1", slow.curv_token(x, mask, EPS)),
                ("kappa.geom/1", slow.kappa_geom(x, mask, EPS)),
                ("kappa.geom/1{W=5}", slow.kappa_geom(x, mask, EPS, 5)),
            ]
            sync, xcorr = slow.kappa_sync(x, mask, EPS), slow.kappa_xcorr(x, mask, EPS)
        for metric, (value, reason, coverage, profile) in cases:
            r = compute(metric, x, mask=mask)
            agree(r, value, reason, coverage)
            assert r.metric_id == metric
            if profile and reason not in ("empty",) and not str(reason).startswith(("depth", "units", "tokens")):
                np.testing.assert_allclose(r.profile, profile, rtol=1e-8, atol=1e-10)
        agree(compute("kappa.sync/1", x, mask=mask), *sync)
        agree(compute("kappa.xcorr/1", x, mask=mask), *xcorr, rel=1e-8)


@pytest.mark.parametrize("block", range(4))
def test_pairs_of_trajectories(block):
    for seed in range(block * 25, (block + 1) * 25):
        x, mask = trajectory(seed)
        y = x + np.random.default_rng(seed + 1000).normal(size=x.shape) * np.nanstd(np.where(np.isfinite(x), x, np.nan))
        y[:, ::4] = 0
        with np.errstate(all="ignore"):
            agree(compute("diverge.angle/1", x, y, mask=mask), *slow.diverge(x, y, mask)[:3])
            agree(compute("kappa.phase.paired/1", x, y, mask=mask), *slow.phase_paired(x, y, mask)[:3])


def tokens(seed):
    rng = np.random.default_rng(seed)
    T, d = int(rng.integers(0, 40)), int(rng.integers(2, 7))
    h = rng.normal(size=(T, d))
    mask = np.ones(T, bool)
    if seed % 3 == 1:
        mask = rng.random(T) < 0.9
    if seed % 4 == 1:
        h[rng.random(T) < 0.1] = 0
    if seed % 5 == 1:
        h[rng.random(T) < 0.05] = np.nan
    if seed % 6 == 2 and T > 4:
        h[3:] = h[2] * rng.random((T - 3, 1))
    if seed % 7 == 3:
        h = np.cumsum(h, axis=0) + 5
    if seed % 11 == 4 and T > 3:
        h[1:] = h[0]
    return h, mask


def test_ct_and_what_follows():
    for seed in range(N_TRIALS):
        h, mask = tokens(seed)
        with np.errstate(all="ignore"):
            one, two = slow.ct(h, mask, EPS), slow.ct2(h, mask, EPS)
        r = compute("limen.ct/1", h, mask=mask)
        agree(r, *slow.mean_ct(*one, mask))
        agree(compute("limen.ct2/1", h, mask=mask), *slow.mean_ct(*two, mask))
        np.testing.assert_allclose(r.series, np.where(one[1], one[0], np.nan), rtol=1e-9, atol=1e-12)
        series, keep = r.series, r.extras.get("series_mask", np.ones(len(r.series), bool))
        for metric, expected in (
            ("limen.ratio/1", slow.ratio(series, keep)),
            ("limen.ratio/1{norm=winsor_mad}", slow.ratio_winsor(series, keep)),
            ("limen.qratio/1", slow.qratio(series, keep)),
            ("limen.gini/1", slow.gini(series, keep)),
            ("collapse.late_ct/1", slow.late(series, keep)),
        ):
            agree(compute(metric, series, mask=keep), *expected)
        agree(compute("debt.excess/1", series, mask=keep, theta=1.2), *slow.excess(series, keep, 1.2))
        agree(compute("debt.cusum/1", series, mask=keep, theta=1.2), *slow.cusum(series, keep, 1.2))


def test_geom_equals_trace_form():
    """The U-centred form and the published trace form agree where the latter has digits."""
    for seed in range(20):
        a, b = np.random.default_rng(seed).normal(size=(2, 10, 6))
        a, b = (m / np.linalg.norm(m, axis=-1, keepdims=True) for m in (a, b))
        assert float(compute("kappa.geom/1", np.stack([a, b]))) == pytest.approx(1 - slow.cka_trace(a, b), rel=1e-10)


def test_sync_is_mean_pairwise_cosine():
    """Checked inside the slow twin: it sums cosines over pairs, the package uses the order parameter."""
    x = np.random.default_rng(5).normal(size=(6, 4, 3))
    value, _, _ = slow.kappa_sync(x, np.ones((6, 4), bool), EPS)
    assert float(compute("kappa.sync/1", x)) == pytest.approx(value, rel=1e-12)
