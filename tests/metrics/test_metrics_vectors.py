"""Conformance vectors: closed forms, 1e-9 relative in float64."""

import math

import numpy as np
import pytest
import slow

from dynprobe.metrics import compute

REL = 1e-9
E1, E2 = np.array([1.0, 0.0]), np.array([0.0, 1.0])


def close(a, b):
    return float(a) == pytest.approx(b, rel=REL, abs=1e-12)


def circle(phi, n):
    t = np.arange(n) * phi
    return np.stack([np.cos(t), np.sin(t)], -1)


def unit(path):
    return np.asarray(path, dtype=np.float64)[:, None, :]


@pytest.mark.parametrize("phi", [math.pi / 3, math.pi / 2, 0.05, 2.0])
def test_ct_circle(phi):
    r = compute("limen.ct/1", circle(phi, 9))
    assert close(r, 2 * phi * math.sin(phi / 2))
    assert r.series.shape == (7,)
    np.testing.assert_allclose(r.series, 2 * phi * math.sin(phi / 2), rtol=REL)
    np.testing.assert_allclose(compute("limen.ct2/1", circle(phi, 9)).series, 8 * math.sin(phi / 2) ** 3, rtol=REL)


def test_ct_named():
    assert close(compute("limen.ct/1", circle(math.pi / 3, 7)), math.pi / 3)
    assert close(compute("limen.ct/1", circle(math.pi / 2, 7)), math.sqrt(2) * math.pi / 2)
    assert close(compute("limen.ct/1", [E1, E2, E1, E2]), math.sqrt(2) * math.pi)
    assert close(compute("limen.ct2/1", circle(math.pi / 3, 5)), 1.0)


@pytest.mark.parametrize("norms", [np.ones(9), np.linspace(0.1, 7.0, 9)])
def test_ct_stall(norms):
    """A constant direction stalls, also when its norm varies and rounding moves the unit vector."""
    r = compute("limen.ct/1", norms[:, None] * np.array([[0.3, 0.7, -0.2]]))
    assert float(r) == 0.0
    assert r.extras["n_stall"] == 7
    ratio = compute("limen.ratio/1", r.series)
    assert math.isnan(float(ratio))
    assert ratio.reason == "zero-denominator"


def test_ct_invalid_spread():
    h = circle(1.0, 9)
    h[4] = 0
    assert np.flatnonzero(np.isnan(compute("limen.ct/1", h).series)).tolist() == [2, 3, 4]
    assert np.flatnonzero(np.isnan(compute("limen.ct2/1", h).series)).tolist() == [2, 3, 4]


def test_ratio():
    assert close(compute("limen.ratio/1", [1, 1, 1, 5]), 2.5)
    for n in (2, 5, 40):
        assert close(compute("limen.ratio/1", [0.0] * (n - 1) + [1.0]), n)
    assert close(compute("limen.ratio/1", [0.3] * 7), 1)
    empty = compute("limen.ratio/1", [])
    assert math.isnan(float(empty))
    assert empty.reason == "tokens<3"
    one = compute("limen.ratio/1", [0.7])
    assert float(one) == 1.0
    assert one.reason == "steps<2"


def test_companions():
    assert close(compute("limen.qratio/1", [1, 1, 1, 5]), 4.4)
    assert close(compute("limen.gini/1", [1, 1, 1, 5]), 0.375)
    assert compute("limen.qratio/1", [0, 0, 0, 1]).reason == "zero-denominator"
    assert float(compute("limen.gini/1", [0.1] * 11)) == 0.0
    assert close(compute("limen.gini/1", [0, 0, 0, 0, 1]), 0.8)


@pytest.mark.parametrize(
    ("ratio", "label"),
    [
        (1.0, "BELOW_RANGE"), (1.55, "UNDERACTIVE"), (1.70, "UNDERACTIVE"), (1.7000001, "GAP_UA"), (2.0, "GAP_UA"),
        (2.27, "ADAPTIVE"), (2.5, "ADAPTIVE"), (2.92, "ADAPTIVE"), (2.97, "TRANSITION_OR_GAP"), (4.42, "CHAOTIC"),
        (35.55, "CHAOTIC"), (35.6, "ABOVE_RANGE"), (float("nan"), "UNDEFINED"),
    ],
)  # fmt: skip
def test_regime(ratio, label):
    assert compute("limen.regime/1", ratio).value == label


def test_regime_of_result():
    r = compute("limen.regime/1", compute("limen.ratio/1", [0, 0, 0]))
    assert (r.value, r.reason) == ("UNDEFINED", "zero-denominator")


def test_mad():
    x = [1, 2, 3, 4, 100]
    w = compute("norm.winsor_mad/1", x)
    assert close(w.extras["max"], 3 + 5 * 1.4826)
    assert close(compute("limen.ratio/1{norm=winsor_mad}", x), 10.413 / 4.0826)
    assert close(compute("limen.ratio/1", x), 100 / 22)
    assert close(compute("limen.ratio/1", compute("norm.raw/1", x).series), 100 / 22)
    np.testing.assert_allclose(
        compute("norm.zmad/1", x).series, [-2 / 1.4826, -1 / 1.4826, 0, 1 / 1.4826, 5], rtol=REL, atol=1e-15
    )
    flat = compute("norm.winsor_mad/1", [1, 1, 1, 1, 9])
    assert flat.extras["flagged"]
    assert flat.reason == "zero-mad"
    assert flat.series.tolist() == [1, 1, 1, 1, 9]
    z = compute("norm.zmad/1", [1, 1, 1, 1, 9])
    assert z.reason == "zero-mad"
    assert math.isnan(float(z))


def test_mad_reference():
    w = compute("norm.winsor_mad/1{ref=calib}", [1, 50, 3], reference=[1, 2, 3, 4, 100])
    assert close(w.extras["max"], 10.413)


def test_debt():
    r = compute("debt.cusum/1", [0, 2, 2, 0], theta=1.0)
    assert r.series.tolist() == [0, 1, 2, 1]
    assert (float(r), r.extras["max"], r.extras["final"]) == (2, 2, 1)
    e = compute("debt.excess/1", [0, 2, 2, 0], theta=1.0)
    assert (float(e), e.extras["per_step"]) == (2, 0.5)
    for metric in ("debt.cusum/1", "debt.excess/1"):
        assert float(compute(metric, [0.1, 0.2, 1.0], theta=1.0)) == 0
        missing = compute(metric, [0.1, 0.2])
        assert math.isnan(float(missing))
        assert missing.reason == "no-calibration"
    held = compute("debt.cusum/1", [0, 2, float("nan"), 2, 0], theta=1.0)
    assert held.series.tolist() == [0, 1, 1, 2, 1]
    assert held.extras["n_missing"] == 1


def test_late():
    x = np.r_[np.ones(20), np.zeros(8)]
    r = compute("collapse.late_ct/1", x)
    assert float(r) == 0
    assert r.extras["collapsed"] is True
    slow = compute("collapse.late_ct/1", compute("limen.ct/1", circle(0.05, 30)).series)
    assert close(slow, 0.1 * math.sin(0.025))
    assert slow.extras["collapsed"] is False
    short = compute("collapse.late_ct/1", [1.0] * 11)
    assert short.reason == "steps<12"
    assert short.extras["collapsed"] is None
    assert close(compute("collapse.late_ct/1", np.arange(13.0)), (9 + 10 + 11 + 12) / 4)


def test_phase_rotation():
    r = compute("kappa.phase/1", unit(circle(math.pi / 6, 5)))
    assert close(r, 1 / 6)
    assert close(r.extras["kappa_path"], 2 * math.pi / 3)
    assert r.profile.shape == (4,)


@pytest.mark.parametrize(("rho", "K"), [(0.5, 4), (0.9, 7), (0.25, 2)])
def test_phase_contraction(rho, K):
    path = [(1.0, rho**k) for k in range(K + 1)]
    assert close(compute("kappa.phase/1", unit(path)), (math.pi / 4 - math.atan(rho**K)) / (K * math.pi))


@pytest.mark.parametrize("alpha", [1.0, 0.1, 3.0])
def test_phase_kick(alpha):
    kept = [(1, 0), (1, 0), (1, alpha), (1, alpha), (1, alpha)]
    removed = [(1, 0), (1, 0), (1, alpha), (1, 0), (1, 0)]
    assert close(compute("kappa.phase/1", unit(kept)), math.atan(alpha) / (4 * math.pi))
    assert close(compute("kappa.phase/1", unit(removed)), 2 * math.atan(alpha) / (4 * math.pi))


def test_phase_edges():
    assert float(compute("kappa.phase/1", unit([E1, -E1]))) == 1.0
    single = compute("kappa.phase/1", unit([E1]))
    assert math.isnan(float(single))
    assert single.reason == "depth<2"
    hole = compute("kappa.phase/1", unit([E1, 0 * E1, E1]))
    assert math.isnan(float(hole))
    assert hole.reason == "coverage"
    assert hole.extras["n_invalid"] == 1
    assert compute("kappa.phase/1", np.ones((3, 0, 2))).reason == "empty"
    assert compute("kappa.phase/1", np.ones((0, 3, 2))).reason == "empty"
    assert compute("kappa.phase/1", np.ones((3, 2, 2)), mask=np.zeros((3, 2))).reason == "empty"


def test_half_coverage_suffices():
    x = np.stack([np.stack([E1, E1]), np.stack([E2, 0 * E1])])
    r = compute("kappa.phase/1", x)
    assert float(r) == pytest.approx(0.5, rel=REL)
    assert r.coverage == 0.5


def test_path_with_missing_entries():
    x = unit([E1, E2, -E1, E2])
    x = np.concatenate([x, x, x], axis=1)
    x[3, :2] = np.nan
    r = compute("kappa.phase/1", x)
    assert np.isnan(r.profile[2])
    assert close(r, 0.5)
    assert close(r.extras["kappa_path"], math.pi * 3 * 0.5)
    assert r.coverage == 7 / 9
    assert r.extras["n_nonfinite"] == 2


A, B = np.stack([E1, E1, E2, E2]), np.stack([E1, E2, E1, E2])


def test_geom():
    assert close(compute("kappa.geom/1", np.stack([A, B])), 1.5)
    assert close(compute("kappa.geom/1", np.stack([A, A, B])), 0.75)
    few = compute("kappa.geom/1", np.stack([A, B])[:, :3])
    assert math.isnan(float(few))
    assert few.reason == "units<4"
    flat = compute("kappa.geom/1", np.stack([A, np.ones((4, 2))]))
    assert flat.reason == "zero-denominator"
    twice = compute("kappa.geom/1{W=4}", np.concatenate([np.stack([A, B]), np.stack([A, A])], axis=1))
    assert close(twice, (1.5 + 0.0) / 2)


def test_geom_degenerate_additive():
    """Off-diagonal cosines a_i + a_j: one coordinate shared with varying weight, the rest mutually orthogonal."""
    c = np.array([0.5, 0.5, 0.5, 0.5, 0.5])
    x = np.concatenate([c[:, None], np.sqrt(1 - c**2)[:, None] * np.eye(5)], axis=1)
    y = np.random.default_rng(0).normal(size=x.shape)
    assert compute("kappa.geom/1", np.stack([x, y])).reason == "zero-denominator"


def test_geom_ragged_width():
    a = np.random.default_rng(1).normal(size=(9, 5))
    wide = np.concatenate([a, np.zeros((9, 3))], axis=1)
    assert float(compute("kappa.geom/1", [a, wide])) == pytest.approx(0.0, abs=1e-12)


def test_geom_small_spread():
    """U-centring keeps digits where the cosines hardly vary, where the trace form has none left."""
    rng = np.random.default_rng(2)
    base = np.r_[1.0, np.zeros(20)]
    a, b = rng.normal(size=(2, 12, 21))
    for spread in (1e-2, 1e-4, 1e-6):
        x = np.stack([base + spread * a, base + spread * b])
        assert float(compute("kappa.geom/1", x)) == pytest.approx(1 - slow.cka_extended(*x), rel=1e-9)


def test_sync():
    straight = unit(np.arange(5)[:, None] * np.array([[1.0, 2.0]]) + 1)
    assert close(compute("kappa.sync/1", straight), 0)
    orthogonal = unit(np.cumsum(np.vstack([np.zeros((1, 5)), np.eye(5)]), axis=0) + 1)
    assert close(compute("kappa.sync/1", orthogonal), 1)
    assert close(compute("kappa.sync/1", unit([E1, E1 + E2, E1])), 2)
    assert compute("kappa.sync/1", unit([E1, E2])).reason == "depth<3"
    frozen = compute("kappa.sync/1", np.ones((5, 3, 2)))
    assert frozen.reason == "zero-denominator"
    assert frozen.extras["n_stall"] == 12


def test_sync_drops_zero_updates():
    path = unit([E1, E1, E1 + E2, E1])
    assert close(compute("kappa.sync/1", path), 2)


def courses(*rows):
    """Unit vectors in the plane whose chords follow the given time-courses."""
    out = []
    for row in rows:
        turns = np.r_[0.0, np.cumsum(2 * np.arcsin(np.asarray(row) / 2))]
        out.append(np.stack([np.cos(turns), np.sin(turns)], -1))
    return np.stack(out)


def test_xcorr():
    d = np.array([0.2, 0.5, 0.3, 0.9, 0.4])
    assert close(compute("kappa.xcorr/1", courses(d, d, d)), 0)
    assert close(compute("kappa.xcorr/1", courses(d, 1.0 - d)), 2)
    a, b = np.array([1.0, 2, 3]) / 4, np.array([2.0, 3, 1]) / 4
    assert close(np.corrcoef(a, b)[0, 1], -0.5)
    assert close(compute("kappa.xcorr/1", courses(a, b)), 1.5)
    assert compute("kappa.xcorr/1", courses(d[:2], d[:2])).reason == "tokens<4"
    assert compute("kappa.xcorr/1", courses(d)).reason == "depth<2"
    assert compute("kappa.xcorr/1", courses(d, np.full(5, 0.3))).reason == "depth<2"


def test_delta():
    step = unit([E1, E1 + E2])
    assert close(compute("delta.rel_prev/1", step), 1)
    assert close(compute("delta.rel_next/1", step), 1 / math.sqrt(2))
    assert close(compute("delta.angle/1", step), 0.25)
    double = unit([E1, 2 * E1])
    assert close(compute("delta.rel_prev/1", double), 1)
    assert close(compute("delta.rel_next/1", double), 0.5)
    assert float(compute("delta.angle/1", double)) == 0
    s = np.array([1 + 2.0**-k for k in range(5)])[:, None, None]
    np.testing.assert_allclose(compute("delta.rel_next/1", s).profile, [1 / 3, 1 / 5, 1 / 9, 1 / 17], rtol=REL)
    rms = compute("delta.rms/1", s).profile
    np.testing.assert_allclose(rms[1:] / rms[:-1], 0.5, rtol=REL)
    assert float(compute("delta.rms/1", np.ones((4, 3, 2)))) == 0
    assert close(compute("resid.norm/1", unit([E1, 2 * E1])), 1.5)


def test_delta_identity():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 7))
    r, theta = np.linalg.norm(b) / np.linalg.norm(a), math.pi * float(compute("delta.angle/1", unit([a, b])))
    prev = float(compute("delta.rel_prev/1", unit([a, b])))
    assert prev**2 == pytest.approx((r - 1) ** 2 + 4 * r * math.sin(theta / 2) ** 2, rel=REL)
    assert float(compute("delta.rel_next/1", unit([a, b]))) == pytest.approx(prev / r, rel=REL)


def test_delta_fro():
    x = np.stack([np.stack([E1, 3 * E1]), np.stack([2 * E1, 3 * E1])])
    assert close(compute("delta.rel_prev/1{agg=fro}", x), 1 / math.sqrt(10))
    assert close(compute("delta.rel_next/1", x, agg="fro"), 1 / math.sqrt(13))
    assert close(compute("delta.rel_prev/1", x), 0.5)


@pytest.mark.parametrize("phi", [0.05, 1.0, 2.5])
def test_curvature(phi):
    path = circle(phi, 8)
    assert close(compute("curv.depth/1", unit(path)), phi)
    assert close(compute("curv.token/1", path[None]), phi)


def test_curvature_line_and_ping_pong():
    line, back = np.arange(1, 6)[:, None] * np.ones((1, 3)), np.stack([E1, E2] * 3)
    for metric, shape in (("curv.depth/1", 1), ("curv.token/1", 0)):
        assert float(compute(metric, np.expand_dims(line, shape))) == pytest.approx(0, abs=1e-12)
        assert close(compute(metric, np.expand_dims(back, shape)), math.pi)
    frozen = compute("curv.depth/1", np.ones((4, 2, 3)))
    assert frozen.reason == "zero-denominator"
    assert frozen.extras["n_stall"] == 4
    assert compute("curv.token/1", np.ones((2, 2, 3))).reason == "tokens<3"


def test_paired():
    a, b = E1, np.array([1.0, 1.0]) / math.sqrt(2)
    clean = np.stack([np.r_[a, 0], np.r_[b, 0], np.r_[b, 0]])[:, None, :]
    alpha = 0.7
    arm = clean.copy()
    arm[1, 0, 2] = alpha
    r = compute("kappa.phase.paired/1", clean, arm, inject=1)
    lift = (math.acos(math.cos(math.pi / 4) / math.sqrt(1 + alpha**2)) - math.pi / 4) / math.pi
    assert r.extras["delta_inj"] == pytest.approx(lift, rel=REL)
    assert r.extras["delta_down"] == pytest.approx(math.atan(alpha) / math.pi, rel=REL)
    assert float(r) == pytest.approx((lift + math.atan(alpha) / math.pi) / 2, rel=REL)
    first = compute("kappa.phase.paired/1", clean, arm, inject=0)
    assert math.isnan(first.extras["delta_inj"])
    assert first.extras["delta_inj_reason"] == "depth<2"
    assert float(compute("kappa.phase.paired/1", clean, clean)) == 0


def test_z():
    x = unit(circle(math.pi / 6, 4))
    sigma = np.array([0.01, 0.02, 0.0])
    high = compute("kappa.phase.z/1", x, mu=1 / 6 - 2 * sigma, sigma=sigma)
    assert float(high) == pytest.approx(2, rel=1e-9)
    assert high.n_steps == 2
    assert float(compute("kappa.phase.z/1", x, mu=np.full(3, 0.5), sigma=np.full(3, 0.1))) == 0
    assert compute("kappa.phase.z/1", x, mu=np.zeros(3), sigma=np.zeros(3)).reason == "zero-denominator"
    top = compute("kappa.phase.zmax/1", unit(circle(math.pi / 6, 3)), mu=[0, 1 / 6], sigma=[1 / 6, 1 / 6])
    assert float(top) == pytest.approx(1, rel=REL)


def test_diverge():
    alpha = 0.75
    clean = unit([[2.0, 0, 0], [0, 3.0, 0]])
    arm = clean.copy()
    arm[0, 0, 2], arm[1, 0, 2] = 2 * alpha, 3 * alpha
    r = compute("diverge.angle/1", clean, arm)
    assert close(r, math.atan(alpha) / math.pi)
    assert r.extras["grid"].shape == (2, 1)
    assert float(compute("diverge.angle/1", clean, clean)) == 0


def test_output():
    flat = np.zeros((3, 50))
    assert close(compute("output.entropy/1", flat), math.log(50))
    assert close(compute("output.nll/1", flat, [4, 0, -1]), math.log(50))
    assert compute("output.nll/1", flat, [4, 0, -1]).n_units == 2
    assert close(compute("output.margin/1", np.log([[3.0, 1.0]])), 0.5)
    p, q = np.log([[0.75, 0.25]]), np.log([[0.25, 0.75]])
    assert close(compute("output.kl/1", p, q), math.log(3) / 2)
    assert float(compute("output.flip/1", p, q)) == 1
    assert float(compute("output.kl/1", p, p)) == 0
    assert float(compute("output.flip/1", p, p)) == 0
    assert close(compute("lens.entropy/1", np.zeros((2, 3, 8))), math.log(8))
    assert float(compute("lens.kl/1", p, np.stack([p, p]))) == pytest.approx(0, abs=1e-15)
    assert close(compute("lens.kl/1", p, np.stack([p, q])), math.log(3) / 4)
