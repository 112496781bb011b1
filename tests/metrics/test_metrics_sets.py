"""Conformance vectors and every stated edge case of the set metrics, ranks, recurrences, lenses and distances."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dynprobe.errors import MetricError
from dynprobe.metrics import Translators, compute, prediction_depth, read_translators, spec

REL = 1e-9
E1, E2 = np.array([1.0, 0.0]), np.array([0.0, 1.0])
A, B = np.stack([E1, E1, E2, E2]), np.stack([E1, E2, E1, E2])
RNG = np.random.default_rng(7)


def close(a, b):
    return float(a) == pytest.approx(b, rel=REL, abs=1e-12)


def missing(result, reason):
    return math.isnan(float(result)) and result.reason == reason


def unit(path):
    return np.asarray(path, dtype=np.float64)[:, None, :]


def circle(phi, n):
    t = np.arange(n) * phi
    return np.stack([np.cos(t), np.sin(t)], -1)


def one(x):
    return np.asarray(x, dtype=np.float64)[None]


# ranks


def test_effective_rank():
    assert close(compute("erank.rv/1", one(np.diag([3.0, 1.0]))), 4 / 3**0.75)
    assert float(compute("erank.rv/1", one(np.diag([3.0, 1.0])))) == pytest.approx(1.7547653506, rel=1e-10)
    for r in (1, 3, 5):
        equal = one(np.linalg.qr(RNG.normal(size=(7, 7)))[0][:r] * 2.5)
        for metric in ("erank.rv/1", "erank.participation/1", "erank.stable/1"):
            assert close(compute(metric, equal), r), metric
    assert close(compute("erank.participation/1", one(np.diag(np.sqrt([3.0, 1.0])))), 1.6)
    assert close(compute("erank.stable/1", one(np.diag([3.0, 1.0]))), 10 / 9)


@pytest.mark.parametrize("metric", ["erank.rv/1", "erank.participation/1", "erank.stable/1", "entropy.matrix/1"])
def test_rank_edges(metric):
    assert missing(compute(metric, np.zeros((1, 4, 3))), "coverage")
    assert missing(compute(metric, np.ones((1, 5, 3)), centre="mean"), "zero-denominator")
    assert missing(compute(metric, np.ones((2, 0, 3))), "empty")
    assert missing(compute(metric, np.ones((0, 4, 3))), "empty")
    assert missing(compute(metric, np.ones((2, 4, 3)), mask=np.zeros((2, 4))), "empty")
    x = RNG.normal(size=(2, 6, 3))
    x[1] = 0
    half = compute(metric, x)
    assert half.coverage == 0.5
    assert np.isnan(half.profile).tolist() == [False, True]
    assert float(half) == pytest.approx(float(compute(metric, x[:1])), rel=1e-12)
    x[1, 2:] = np.nan
    assert missing(compute(metric, x[1:]), "coverage")
    with pytest.raises(MetricError, match="'mean'"):
        compute(metric, x, centre="median")


def test_rank_does_not_count_rounding():
    """Rank one with entries that are no binary fractions: nothing leaks out of empty directions, at any order."""
    x = one(np.outer(RNG.normal(size=64), RNG.normal(size=100)))
    assert float(compute("erank.rv/1", x)) == pytest.approx(1.0, abs=1e-13)
    for order in (0.01, 0.5, 1.0, 3.0, math.inf):
        assert float(compute("entropy.matrix/1", x, order=order)) == pytest.approx(0.0, abs=1e-12)


def test_centring_changes_the_value_and_is_in_the_id():
    x = RNG.normal(size=(1, 9, 4)) + 50.0
    raw, centred = compute("erank.rv/1", x), compute("erank.rv/1{centre=mean}", x)
    assert float(raw) < 1.5 < 2.5 < float(centred)
    assert centred.metric_id == "erank.rv/1{centre=mean}"
    assert close(centred, float(compute("erank.rv/1", x - x.mean(1, keepdims=True))))


def test_matrix_entropy():
    same, orthonormal = np.ones((1, 6, 4)) * 0.3, one(np.linalg.qr(RNG.normal(size=(8, 8)))[0][:5] * 3.0)
    assert float(compute("entropy.matrix/1", same)) == pytest.approx(0.0, abs=1e-12)
    for order in (0.3, 1.0, 2.0, math.inf):
        assert close(compute("entropy.matrix/1", orthonormal, order=order), math.log(5))
    ln5, ln8 = math.log(5), math.log(8)
    for norm, bottom in (("logn", ln5), ("logd", ln8), ("lognlogd", ln5 * ln8), ("logmin", ln5)):
        assert close(compute("entropy.matrix/1", orthonormal, norm=norm), ln5 / bottom)
    single = RNG.normal(size=(1, 1, 4))
    assert float(compute("entropy.matrix/1", single)) == 0.0
    assert missing(compute("entropy.matrix/1{norm=logn}", single), "zero-denominator")
    assert missing(compute("entropy.matrix/1{norm=logd}", RNG.normal(size=(1, 5, 1))), "zero-denominator")
    lam = np.array([0.75, 0.25])
    cosine = 0.5  # eigenvalues of [[1, c], [c, 1]]/2 are (1 ± c)/2
    pair = one([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
    assert close(compute("entropy.matrix/1", pair), -(lam * np.log(lam)).sum())
    assert close(compute("entropy.matrix/1{order=2}", pair), -math.log((lam**2).sum()))
    assert close(compute("entropy.matrix/1{order=inf}", pair), -math.log(0.75))
    for bad in ({"order": 0.0}, {"order": -1.0}, {"order": float("nan")}, {"norm": "log2"}):
        with pytest.raises(MetricError, match=r"entropy\.matrix/1"):
            compute("entropy.matrix/1", same, **bad)


# intrinsic dimension


def rectangles(ratio, count=3):
    """Every point has its nearest neighbours at distances 1 and ``ratio``."""
    corners = np.array([[0, 0], [0, 1], [ratio, 0], [ratio, 1]], dtype=np.float64)
    return np.concatenate([corners + np.array([100.0 * k + 1.0, 1.0]) for k in range(count)])


def test_twonn():
    assert close(compute("id.twonn/1", one(rectangles(2.0))), 11 / (12 * math.log(2)))
    assert close(compute("id.twonn/1", one(rectangles(math.e))), 11 / 12)
    many = compute("id.twonn/1", one(rectangles(2.0, 250)))
    assert float(many) == pytest.approx(1 / math.log(2), rel=2e-3)
    base = compute("id.twonn/1{est=base}", one(rectangles(math.e)))
    assert close(base, np.mean([-math.log(1 - i / 12) for i in range(1, 11)]))
    assert many.extras["scale_profile"].tolist() == pytest.approx([1.5])


def test_twonn_recovers_the_dimension():
    rng = np.random.default_rng(0)
    for dim in (1, 2, 5):
        cloud = rng.random((1, 1500, dim)) @ np.linalg.qr(rng.normal(size=(8, 8)))[0][:dim] + 3.0
        r = compute("id.twonn/1", cloud)
        assert float(r) == pytest.approx(dim, rel=0.12)
        assert float(compute("id.twonn/1{est=base}", cloud)) == pytest.approx(dim, rel=0.15)
        assert r.extras["decimated"] == pytest.approx(dim, rel=0.18)
        assert r.extras["n_points"].tolist() == [1500]


def test_twonn_edges():
    points = RNG.normal(size=(30, 3))
    assert missing(compute("id.twonn/1", one(points[:9])), "units<10")
    assert compute("id.twonn/1", one(points[:10])).reason is None
    doubled = compute("id.twonn/1", one(np.concatenate([points, points[:4]])))
    assert doubled.extras["n_duplicates"] == 8
    assert doubled.extras["n_points"].tolist() == [26]
    assert close(doubled, float(compute("id.twonn/1", one(points[4:]))))
    assert missing(compute("id.twonn/1", one(np.concatenate([points, points]))), "units<10")
    lattice = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0)), -1).reshape(-1, 2) + 1.0
    assert missing(compute("id.twonn/1", one(lattice)), "zero-denominator")
    assert missing(compute("id.twonn/1", one(points), mask=np.zeros(30)), "empty")
    holes = points.copy()
    holes[:16] = np.nan
    assert missing(compute("id.twonn/1", one(holes)), "coverage")
    holes[:25] = np.nan
    assert missing(compute("id.twonn/1", one(holes)), "units<10")
    assert math.isnan(compute("id.twonn/1", one(points[:15])).extras["decimated"])
    near = points.copy()
    near[1] = near[0] * (1 + 1e-15)  # a copy up to rounding is a copy
    assert compute("id.twonn/1", one(near)).extras["n_duplicates"] == 2
    with pytest.raises(MetricError, match="'base'"):
        compute("id.twonn/1{est=mle}", one(points))


# alignment


def test_cka_vectors():
    assert close(compute("cka.linear/1", np.stack([A, B])), -0.5)
    assert close(compute("cka.linear/1{est=biased}", np.stack([A, B])), 0.0)
    assert close(compute("cka.linear.paired/1", one(A), one(B)), -0.5)
    x = RNG.normal(size=(12, 5)) + 2.0
    turned = 0.3 * x @ np.linalg.qr(RNG.normal(size=(5, 5)))[0] + RNG.normal(size=5)
    for est in ("biased", "unbiased"):
        assert close(compute("cka.linear/1", np.stack([x, turned]), est=est), 1.0)
        assert close(compute("cka.linear.paired/1", one(x), one(turned), est=est), 1.0)


def test_cka_biased_is_the_published_form():
    x, y = RNG.normal(size=(9, 4)), RNG.normal(size=(9, 6))
    xc, yc = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(yc.T @ xc) ** 2 / (np.linalg.norm(xc.T @ xc) * np.linalg.norm(yc.T @ yc))
    assert close(compute("cka.linear/1{est=biased}", [x, y]), expected)
    assert close(compute("cka.linear.paired/1{est=biased}", [x], [y]), expected)


def test_cka_two_units_are_always_aligned():
    for _ in range(5):
        assert close(compute("cka.linear/1{est=biased}", RNG.normal(size=(2, 2, 6))), 1.0)
    assert missing(compute("cka.linear/1{est=biased}", RNG.normal(size=(2, 1, 6))), "units<2")


def test_cka_bias_of_wide_layers():
    """Unrelated wide layers: the biased form tends to 1, the debiased one to 0."""
    x = np.random.default_rng(0).normal(size=(2, 40, 8000))
    assert float(compute("cka.linear/1{est=biased}", x)) > 0.95
    assert abs(float(compute("cka.linear/1", x))) < 0.12


def test_cka_of_cosines_is_kappa_geom():
    x = RNG.normal(size=(4, 20, 6)) * np.exp(RNG.normal(size=(4, 20, 1)))
    for window in (64, 7):
        geom = float(compute("kappa.geom/1", x, W=window))
        assert close(compute("cka.linear/1", x, W=window, rows="cosine"), 1 - geom)
    assert abs(float(compute("cka.linear/1", x)) - (1 - float(compute("kappa.geom/1", x)))) > 1e-3


def test_cka_massive_unit():
    """One unit with a massive norm decides the raw value and not that of cosines; squares never overflow."""
    x = np.random.default_rng(1).normal(size=(2, 30, 8))
    quiet = {rows: float(compute("cka.linear/1", x, rows=rows, est="biased")) for rows in ("raw", "cosine")}
    x[:, 3] *= 1e4
    assert float(compute("cka.linear/1{est=biased}", x)) > 0.99 > 0.6 > quiet["raw"]
    assert close(compute("cka.linear/1{est=biased,rows=cosine}", x), quiet["cosine"])
    assert close(compute("cka.linear/1", x * 1e180), float(compute("cka.linear/1", x)))


@pytest.mark.parametrize("metric", ["cka.linear/1", "rsa.dist/1"])
def test_alignment_edges(metric):
    x = RNG.normal(size=(3, 8, 4))
    assert missing(compute(metric, x[:, :3]), "units<4")
    assert missing(compute(metric, x[:1]), "depth<2")
    assert missing(compute(metric, x, mask=np.zeros(8)), "empty")
    simplex = np.stack([np.eye(6), np.eye(6)])
    assert missing(compute(metric, simplex), "zero-denominator")
    x[1:, :5] = 0
    assert missing(compute(metric, x), "units<4")
    wide = RNG.normal(size=(3, 20, 4))
    wide[1:, :11] = 0
    assert missing(compute(metric, wide), "coverage")
    assert close(compute(metric, [x[0], np.pad(x[0], ((0, 0), (0, 3)))]), 1.0)
    for bad in ({"rows": "unit"}, {"W": 3}, {"W": 4.5}):
        with pytest.raises(MetricError, match=r"rows|windows|whole"):
            compute(f"{metric}{{{','.join(f'{k}={v}' for k, v in bad.items())}}}", x)


@pytest.mark.parametrize("metric", ["cka.linear.paired/1", "rsa.dist.paired/1"])
def test_paired_alignment_edges(metric):
    x = RNG.normal(size=(3, 8, 4))
    same = compute(metric, x, x)
    assert close(same, 1.0)
    np.testing.assert_allclose(same.profile, 1.0, rtol=REL)
    assert missing(compute(metric, x[:, :3], x[:, :3]), "units<4")
    assert missing(compute(metric, x, x, mask=np.zeros(8)), "empty")
    y = x.copy()
    y[:, :5] = np.nan
    assert missing(compute(metric, x, y), "units<4")
    wide, holed = RNG.normal(size=(2, 3, 20, 4))
    holed[:, :11] = np.nan
    assert missing(compute(metric, wide, holed), "coverage")
    with pytest.raises(MetricError, match="same depths and units"):
        compute(metric, x, x[:2])
    with pytest.raises(MetricError, match="2 input"):
        compute(metric, x)


def test_rsa_vectors():
    x, y = (np.array(p, dtype=np.float64)[:, None] + 1.0 for p in ([0, 1, 3, 7], [0, 3, 1, 7]))
    assert close(compute("rsa.dist/1", np.stack([x, y])), 113 / 161)
    assert close(compute("rsa.dist/1{corr=spearman}", np.stack([x, y])), 5 / 7)
    assert close(compute("rsa.dist.paired/1{corr=spearman}", one(x), one(y)), 5 / 7)
    points = RNG.normal(size=(12, 5)) + 2.0
    turned = 0.3 * points @ np.linalg.qr(RNG.normal(size=(5, 5)))[0] + RNG.normal(size=5)
    for corr in ("pearson", "spearman"):
        assert close(compute("rsa.dist/1", np.stack([points, turned]), corr=corr), 1.0)
    # ties: four corners of a square and of a rectangle
    square = np.array([[1.0, 1], [1, 2], [2, 1], [2, 2]])
    stretched = square * [1.0, 3.0]
    r = float(compute("rsa.dist/1{corr=spearman}", np.stack([square, stretched])))
    assert r == pytest.approx(np.corrcoef([2.5, 2.5, 5.5, 5.5, 2.5, 2.5], [3.5, 1.5, 5.5, 5.5, 1.5, 3.5])[0, 1])
    with pytest.raises(MetricError, match="spearman"):
        compute("rsa.dist/1{corr=kendall}", np.stack([square, stretched]))


# recurrence


def test_recurrence_vectors():
    period = np.stack([E1, E2] * 3)
    assert close(compute("rqa.rr/1", period), 12 / 30)
    assert close(compute("rqa.det/1{lmin=2}", period), 1.0)
    assert close(compute("rqa.det/1{lmin=3}", period), 2 / 3)
    assert float(compute("rqa.lam/1", period)) == 0.0
    assert float(compute("rqa.entr/1", period)) == 0.0
    assert close(compute("rqa.entr/1{lmin=2}", period), 1.0)
    assert compute("rqa.rr/1", period).extras["eps"] == 0.0
    turned = period @ np.linalg.qr(RNG.normal(size=(2, 2)))[0] * np.exp(RNG.normal(size=(6, 1)))
    assert close(compute("rqa.rr/1", turned), 0.4)


def test_recurrence_windows():
    everything = np.ones((10, 3)) * 0.3
    assert close(compute("rqa.rr/1", everything), 1.0)
    assert close(compute("rqa.lam/1", everything), 1.0)
    assert close(compute("rqa.lam/1{theiler=1}", everything), 84 / 90)
    assert close(compute("rqa.rr/1{theiler=4}", everything), 1.0)
    # diagonals of length 9 … 1, each once: those of length ≥ 3 hold 42 of 45, and 7 lengths are equally frequent
    assert close(compute("rqa.det/1", everything), 42 / 45)
    assert close(compute("rqa.entr/1", everything), math.log2(7))
    assert close(compute("rqa.det/1{theiler=5}", everything), (5 + 4 + 3) / 15)


def test_recurrence_edges():
    far = np.eye(8)
    for name in ("det", "entr"):
        assert missing(compute(f"rqa.{name}/1", far, eps=0.5), "zero-denominator")
    assert float(compute("rqa.rr/1", far, eps=0.5)) == 0.0
    assert float(compute("rqa.lam/1", far, eps=0.5)) == 0.0  # the main diagonal recurs, no line is long enough
    assert missing(compute("rqa.lam/1", far, eps=0.5, theiler=1), "zero-denominator")
    assert missing(compute("rqa.rr/1", far[:1]), "units<2")
    assert missing(compute("rqa.det/1", far[:3]), "units<4")
    assert missing(compute("rqa.lam/1", far[:2]), "units<3")
    assert missing(compute("rqa.entr/1{lmin=6,theiler=3}", far), "units<9")
    assert missing(compute("rqa.rr/1", far, mask=np.zeros(8)), "empty")
    assert missing(compute("rqa.rr/1", np.ones((0, 3))), "empty")
    broken = far.copy()
    broken[2:] = 0
    assert missing(compute("rqa.rr/1", broken), "coverage")
    for metric, bad in (
        ("rr", {"theiler": 0}), ("det", {"theiler": 0}), ("entr", {"lmin": 0}), ("lam", {"vmin": 0}),
        ("lam", {"theiler": -1}), ("rr", {"q": 1.5}), ("rr", {"eps": -0.1}),
    ):  # fmt: skip
        with pytest.raises(MetricError, match="rqa"):
            compute(f"rqa.{metric}/1", far, **bad)
    with pytest.raises(MetricError, match="whole number"):
        compute("rqa.det/1{theiler=1.5}", far)


def test_a_hole_ends_a_line():
    h = np.ones((9, 2))
    whole = float(compute("rqa.det/1{lmin=4}", h))
    h[4] = 0
    holed = compute("rqa.det/1{lmin=4}", h)
    masked = compute("rqa.det/1{lmin=4}", np.ones((9, 2)), mask=np.arange(9) != 4)
    # runs of at most 4 on either side: only the diagonal j − i = 5 is free of the hole
    assert float(holed) == float(masked) == pytest.approx(4 / 28)
    assert whole == pytest.approx((8 + 7 + 6 + 5 + 4) / 36)
    assert (holed.coverage, masked.coverage) == (8 / 9, 1.0)


def test_quantile_fixes_the_rate():
    rng = np.random.default_rng(1)
    rates = [float(compute("rqa.rr/1", rng.normal(size=(60, 5)))) for _ in range(5)]
    assert max(abs(r - 0.1) for r in rates) < 1e-3
    assert float(compute("rqa.rr/1{q=0.3}", rng.normal(size=(60, 5)))) == pytest.approx(0.3, abs=1e-3)


# steps


def test_block_influence():
    assert close(compute("influence.block/1", unit([E1, E2])), 1.0)
    assert close(compute("influence.block/1", unit([E1, -E1])), 2.0)
    assert close(compute("influence.block/1", unit(circle(math.pi / 3, 6))), 0.5)
    assert missing(compute("influence.block/1", unit([E1])), "depth<2")
    assert missing(compute("influence.block/1", unit([E1, 0 * E1])), "coverage")
    small = 1e-9  # 1 − cos loses all digits here
    r = compute("influence.block/1", unit([E1, [1.0, small]]))
    assert float(r) == pytest.approx(small**2 / 2, rel=1e-7, abs=0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_angular_distance(n):
    phi = 0.7
    r = compute("influence.angular/1", unit(circle(phi, 6)), n=n)
    assert close(r, n * phi / math.pi)
    assert r.profile.shape == (6 - n,)
    assert missing(compute("influence.angular/1", unit(circle(phi, n)), n=n), f"depth<{n + 1}")


def test_angular_distance_and_phase():
    x = RNG.normal(size=(5, 7, 4))
    assert close(compute("influence.angular/1{tokens=all}", x), float(compute("kappa.phase/1", x)))
    assert close(compute("influence.angular/1", x), float(compute("kappa.phase/1", x[:, -1:])))
    mask = np.ones((5, 7), bool)
    mask[:, 5:] = False
    assert close(compute("influence.angular/1", x, mask=mask), float(compute("kappa.phase/1", x[:, 4:5])))
    theta = math.pi * compute("kappa.phase/1", x[:2, :1]).value
    assert close(compute("influence.block/1", x[:2, :1]), 1 - math.cos(theta))
    x[:, -1] = 0
    assert missing(compute("influence.angular/1", x), "coverage")
    assert missing(compute("influence.angular/1", x, mask=np.zeros(7)), "empty")
    for bad in ({"n": 0}, {"tokens": "first"}):
        with pytest.raises(MetricError, match=r"influence\.angular/1"):
            compute("influence.angular/1", x, **bad)
    with pytest.raises(MetricError, match="whole number"):
        compute("influence.angular/1{n=1.5}", x)


def test_order():
    assert close(compute("order.vector/1", one([E1, 3 * E1, 0.1 * E1])), 1.0)
    assert close(compute("order.vector/1", one([E1, E2])), math.sqrt(0.5))
    assert float(compute("order.vector/1", one([E1, -E1]))) == 0.0
    assert close(compute("order.pairwise/1", one([E1, 3 * E1, 0.1 * E1])), 1.0)
    assert close(compute("order.pairwise/1", one([E1, E2])), 0.0)
    assert close(compute("order.pairwise/1", one([E1, -E1])), -1.0)
    assert close(compute("order.vector/1", one([E1])), 1.0)
    assert missing(compute("order.pairwise/1", one([E1])), "units<2")
    for metric in ("order.vector/1", "order.pairwise/1"):
        assert missing(compute(metric, np.zeros((1, 4, 2))), "units<2" if "pairwise" in metric else "coverage")
        assert missing(compute(metric, np.ones((1, 4, 2)), mask=np.zeros(4)), "empty")
    null = [compute("order.vector/1", np.random.default_rng(s).normal(size=(1, 50, 30))).value for s in range(20)]
    assert np.mean(null) == pytest.approx(1 / math.sqrt(50), rel=0.1)


def test_line_shape():
    assert close(compute("line.shape/1", unit([[0, 0], [1, 0], [1, 1]])), math.sqrt(2))
    assert close(compute("line.shape/1", unit(np.arange(6)[:, None] * np.array([[1.0, 2.0]]))), 1.0)
    back = compute("line.shape/1", unit([E1, E1 + E2, E1]))
    assert missing(back, "zero-denominator")
    assert back.extras["n_closed"] == 1
    assert missing(compute("line.shape/1", unit([E1])), "depth<2")
    stall = compute("line.shape/1", unit([E1, E1, E1 + E2]))
    assert close(stall, 1.0)
    assert stall.extras["n_stall"] == 1
    assert missing(compute("line.shape/1", np.ones((4, 3, 2))), "zero-denominator")
    assert missing(compute("line.shape/1", np.ones((4, 3, 2)), mask=np.zeros(3)), "empty")
    assert missing(compute("line.shape/1", unit([E1, E1 * np.nan, E2])), "coverage")


def test_line_shape_and_sync():
    """1 − κ_sync of one unit is the debiased square of 1/LSS."""
    x = np.cumsum(RNG.normal(size=(9, 1, 5)), axis=0) + 10
    m, lss = 8, float(compute("line.shape/1", x))
    assert close(compute("kappa.sync/1", x), 1 - (m / lss**2 - 1) / (m - 1))


# distributions


def test_distances():
    p, q = [0.75, 0.25], [0.25, 0.75]
    assert close(compute("dist.js/1", p, q), 0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(compute("dist.js/1", p, q)) == pytest.approx(0.1308120359, rel=1e-9)
    assert close(compute("dist.half_jeffreys/1", p, q), math.log(3) / 2)
    four = ([0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4])
    assert close(compute("dist.tv/1", *four), 0.6)
    assert close(compute("dist.linf/1", *four), 0.3)
    apart = ([1.0, 0.0], [0.0, 1.0])
    assert close(compute("dist.js/1", *apart), math.log(2))
    assert close(compute("dist.tv/1", *apart), 1.0)
    assert close(compute("dist.linf/1", *apart), 1.0)
    assert missing(compute("dist.half_jeffreys/1", [1.0, 0.0], [0.5, 0.5]), "support")
    for name in ("js", "half_jeffreys", "tv", "linf"):
        assert float(compute(f"dist.{name}/1", p, p)) == 0.0
        swapped = [float(compute(f"dist.{name}/1", *pair)) for pair in ((p, four[0][:2]), (four[0][:2], p))
                   if abs(sum(four[0][:2]) - 1) < 1e-9]  # fmt: skip
        assert len(set(swapped)) <= 1


def test_small_divergences_keep_their_digits():
    p, d = np.full(1000, 1e-3), 1e-9 * np.tile([1.0, -1.0], 500)
    assert float(compute("dist.js/1", p, p + d)) == pytest.approx((d**2 / (8 * p)).sum(), rel=1e-4, abs=0)
    assert float(compute("dist.half_jeffreys/1", p, p + d)) == pytest.approx((d**2 / (2 * p)).sum(), rel=1e-4, abs=0)


def test_distances_of_rows():
    p, q = RNG.dirichlet(np.ones(5), size=(2, 6))
    p[1] = np.nan
    r = compute("dist.tv/1", p, q)
    assert r.coverage == 5 / 6
    assert np.isnan(r.series).tolist() == [False, True, False, False, False, False]
    masked = compute("dist.tv/1", p, q, mask=np.arange(6) != 1)
    assert masked.coverage == 1.0
    assert float(masked) == float(r)
    assert missing(compute("dist.tv/1", p, q, mask=np.zeros(6)), "empty")
    p[1:5] = np.nan
    assert missing(compute("dist.tv/1", p, q), "coverage")
    for bad, text in ((([0.5, 0.6],) * 2, "sum"), (([1.5, -0.5],) * 2, "sum"), (([0.5, 0.5], [1.0]), "one shape"),
                      ((np.ones((1, 1, 1)),) * 2, "probs")):  # fmt: skip
        with pytest.raises(MetricError, match=text):
            compute("dist.js/1", *bad)


# lenses


def onehot(tops, vocab=4):
    out = np.zeros((*np.shape(tops), vocab))
    np.put_along_axis(out, np.asarray(tops)[..., None], 5.0, -1)
    return out


def test_prediction_depth():
    model = onehot([0])
    assert float(compute("lens.prediction_depth/1", model, onehot([[1], [0], [1], [0], [0]]))) == 3.0
    assert float(compute("lens.prediction_depth/1", model, onehot([[0], [0]]))) == 0.0
    assert float(compute("lens.prediction_depth/1", model, onehot([[0], [0], [2]]))) == 3.0
    two = compute("lens.prediction_depth/1", onehot([0, 1]), onehot([[1, 1], [0, 1], [0, 1]]))
    assert two.series.tolist() == [1.0, 0.0]
    assert float(two) == 0.5
    bad = onehot([[1, 1], [0, 1]])
    bad[0, 1] = np.nan
    holed = compute("lens.prediction_depth/1", onehot([0, 1]), bad)
    assert holed.series.tolist()[0] == 1.0
    assert math.isnan(holed.series[1])
    assert holed.coverage == 0.5
    assert missing(compute("lens.prediction_depth/1", onehot([0]), bad[:, 1:]), "coverage")
    assert np.isnan(prediction_depth(np.zeros((0, 2)))).all()


def lens_setup():
    g = torch.Generator().manual_seed(3)
    states = torch.randn(4, 5, 6, generator=g, dtype=torch.float64)
    head = torch.randn(11, 6, generator=g, dtype=torch.float64)

    def readout(h):
        return (h / h.norm(dim=-1, keepdim=True)) @ head.T

    return states, readout, readout(states[-1])


def test_identity_translators_are_the_logit_lens():
    states, readout, model = lens_setup()
    expected = compute("lens.kl/1", model, torch.stack([readout(h) for h in states]))
    zero = Translators({d: torch.zeros(6, 6) for d in range(3)}, {d: torch.zeros(6) for d in range(3)})
    for lens in (None, Translators(), zero):
        got = compute("lens.tuned_kl/1", model, states, translators=lens, readout=readout)
        np.testing.assert_allclose(got.profile, expected.profile, rtol=1e-12, atol=1e-15)
    assert got.profile[-1] == pytest.approx(0.0, abs=1e-14)
    assert got.profile[0] > 0.01


def test_translators_from_file(tmp_path):
    states, readout, _ = lens_setup()
    one_token = states[:, :1]
    path = tmp_path / "lens.safetensors"
    # A = −I and b = the last state: every depth reads exactly as the model does
    maps = {f"layer_translators.{d}.weight": -torch.eye(6, dtype=torch.float64) for d in range(3)}
    maps |= {f"layer_translators.{d}.bias": one_token[-1, 0].clone() for d in range(3)}
    save_file(maps, path)
    lens = read_translators(path)
    assert len(lens) == 3
    model = readout(one_token[-1])
    perfect = compute("lens.tuned_kl/1", model, one_token, translators=str(path), readout=readout)
    assert float(perfect) == pytest.approx(0.0, abs=1e-13)
    assert compute("lens.tuned_kl/1", model, one_token, readout=readout).profile[0] > 1e-3
    a, b, h = torch.randn(3, 3), torch.randn(3), torch.randn(2, 3)
    torch.testing.assert_close(Translators({1: a}, {1: b})(1, h), h + h @ a.T + b)
    torch.testing.assert_close(Translators({1: a})(1, h), h + h @ a.T)


def test_translators_are_refused(tmp_path):
    states, readout, model = lens_setup()
    cases = {
        "names": ({"unembed.weight": torch.zeros(3, 3)}, "not named"),
        "shape": ({"0.weight": torch.zeros(3, 4)}, "shape"),
        "alone": ({"0.bias": torch.zeros(3)}, "every depth needs"),
        "dims": ({"0.weight": torch.zeros(3, 3), "1.weight": torch.zeros(4, 4)}, "one dim"),
    }
    for name, (tensors, text) in cases.items():
        save_file(tensors, tmp_path / name)
        with pytest.raises(MetricError, match=text):
            read_translators(tmp_path / name)
    with pytest.raises(MetricError, match="cannot be read"):
        read_translators(tmp_path / "nowhere")
    (tmp_path / "junk").write_bytes(b"not safetensors at all")
    with pytest.raises(MetricError, match="cannot be read"):
        read_translators(tmp_path / "junk")

    def zeros(depths, dim=6):
        return Translators({d: torch.zeros(dim, dim) for d in depths})

    for lens, text in ((zeros(range(2)), "lacks 2"), (zeros(range(4)), "others for 3"), (zeros(range(3), 5), "dim 5")):
        with pytest.raises(MetricError, match=text):
            compute("lens.tuned_kl/1", model, states, translators=lens, readout=readout)
    with pytest.raises(MetricError, match="readout="):
        compute("lens.tuned_kl/1", model, states)
    with pytest.raises(MetricError, match="readout gave"):
        compute("lens.tuned_kl/1", model[:3], states, readout=readout)


# invariances


KINDS = ("R", "R_l", "S", "S_l", "P", "scale-per-state", "shift")
SETS = [
    "erank.rv/1", "erank.participation/1", "erank.stable/1", "entropy.matrix/1", "entropy.matrix/1{order=2}",
    "id.twonn/1", "cka.linear/1", "rsa.dist/1", "rsa.dist/1{corr=spearman}", "order.vector/1", "order.pairwise/1",
    "influence.block/1", "influence.angular/1", "line.shape/1", "rqa.rr/1{eps=0.4}", "rqa.det/1{lmin=2,q=0.3}",
    "rqa.lam/1{q=0.3,vmin=2}", "rqa.entr/1{lmin=2,q=0.3}",
]  # fmt: skip
PAIRS = ["cka.linear.paired/1", "rsa.dist.paired/1"]


def transformed(kind, x, rng):
    D, N, d = x.shape

    def turn():
        return np.linalg.qr(rng.normal(size=(d, d)))[0]

    return {
        "R": lambda: x @ turn(),
        "R_l": lambda: np.stack([layer @ turn() for layer in x]),
        "S": lambda: x * np.exp(rng.normal()),
        "S_l": lambda: x * np.exp(rng.normal(size=(D, 1, 1))),
        "P": lambda: x[:, rng.permutation(N)],
        "scale-per-state": lambda: x * np.exp(rng.normal(size=(D, N, 1))),
        "shift": lambda: x + 3 * rng.normal(size=d),
    }[kind]()


RETURNS = [*range(8), *range(8), 3, 3, 3, 4, 5, 1, 2, 1, 2]


def value(metric, x, other):
    if metric.startswith("rqa"):
        return float(compute(metric, x[0]))
    return float(compute(metric, x, other) if metric in PAIRS else compute(metric, x))


@pytest.mark.parametrize("metric", SETS + PAIRS)
def test_declared_invariances_hold(metric):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x, other = rng.normal(size=(2, 4, 25, 6)) + 0.5
        x = x[:, RETURNS] if metric.startswith("rqa") else x
        before = value(metric, x, other)
        assert math.isfinite(before)
        for kind in KINDS:
            if kind in spec(metric).invariances:
                moved = transformed(kind, x, rng)
                partner = other
                if kind == "P" and metric in PAIRS:  # the same permutation of units in both runs
                    order = rng.permutation(25)
                    moved, partner = x[:, order], other[:, order]
                assert value(metric, moved, partner) == pytest.approx(before, rel=1e-8, abs=1e-10), kind


@pytest.mark.parametrize("metric", SETS)
def test_undeclared_invariances_fail(metric):
    rng = np.random.default_rng(11)
    x = rng.normal(size=(4, 25, 6)) + 0.5
    x = x[:, RETURNS] if metric.startswith("rqa") else x
    before = value(metric, x, x)
    for kind in KINDS:
        if kind not in spec(metric).invariances:
            changes = [abs(value(metric, transformed(kind, x, rng), x) - before) for _ in range(4)]
            assert np.nanmax(changes) > 1e-4 * abs(before), (metric, kind)


def test_ranges():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(3, 14, 5)) * np.exp(rng.normal(size=(3, 14, 1)))
        for metric in ("erank.rv/1", "erank.participation/1", "erank.stable/1"):
            assert 1 - 1e-12 <= float(compute(metric, x)) <= 5 + 1e-12
        assert float(compute("erank.stable/1", x)) <= float(compute("erank.participation/1", x)) + 1e-9
        assert 0 <= float(compute("entropy.matrix/1{norm=logmin}", x)) <= 1 + 1e-12
        orders = [float(compute("entropy.matrix/1", x, order=o)) for o in (0.5, 1.0, 2.0, math.inf)]
        assert orders == sorted(orders, reverse=True)
        for metric in ("cka.linear/1", "rsa.dist/1", "rsa.dist/1{corr=spearman}", "order.pairwise/1"):
            assert -1 <= float(compute(metric, x)) <= 1
        assert 0 <= float(compute("cka.linear/1{est=biased}", x)) <= 1
        assert float(compute("line.shape/1", x)) >= 1
        assert 0 <= float(compute("influence.block/1", x)) <= 2
