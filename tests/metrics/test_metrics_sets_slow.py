"""Set metrics, ranks, recurrences and path shapes against their slow twins on random input with everything wrong."""

import math

import numpy as np
import pytest
import slow_sets
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.metrics import compute

N_TRIALS = 50


def agree(result, expected, rel=1e-8, floor=1e-10):
    value, reason, coverage = expected[:3]
    assert result.reason == reason, (result, expected)
    if math.isnan(value):
        assert math.isnan(float(result))
    else:
        assert float(result) == pytest.approx(value, rel=rel, abs=floor)
    if not math.isnan(coverage) and result.reason != "empty":
        assert result.coverage == pytest.approx(coverage, rel=1e-12)
    if len(expected) > 3 and expected[3] and not str(reason).startswith(("empty", "depth", "units")):
        np.testing.assert_allclose(result.profile, expected[3], rtol=1e-7, atol=1e-9)


def trajectory(seed):
    rng = np.random.default_rng(seed)
    D, N, d = int(rng.integers(1, 5)), int(rng.integers(1, 20)), int(rng.integers(2, 9))
    x = np.cumsum(rng.normal(size=(D, N, d)), axis=0) * 10.0 ** rng.integers(-3, 4)
    mask = np.ones((D, N), bool)
    if seed % 3 == 1:
        mask = rng.random((D, N)) < 0.8
    if seed % 3 == 2:
        mask[:] = rng.random(N) < 0.8
    if seed % 4 == 1:
        x[rng.random((D, N)) < 0.15] = 0.0
    if seed % 5 == 1:
        x[rng.random((D, N, d)) < 0.02] = np.nan
    if seed % 7 == 1:
        x[rng.random((D, N, d)) < 0.02] = np.inf
    if seed % 6 == 1 and N > 3:
        x[:, 2] = x[:, 0]
    if seed % 8 == 3 and D > 1:
        x[1] = x[0]
    if seed % 13 == 5:
        x[:] = x[:, :1]
    if seed % 17 == 7:
        mask[:] = False
    return x, mask


PER_DEPTH = [
    ("erank.rv/1", slow_sets.erank, {}),
    ("erank.rv/1{centre=mean}", slow_sets.erank, {"centre": True}),
    ("erank.participation/1", slow_sets.participation, {}),
    ("erank.participation/1{centre=mean}", slow_sets.participation, {"centre": True}),
    ("erank.stable/1", slow_sets.stable_rank, {}),
    ("erank.stable/1{centre=mean}", slow_sets.stable_rank, {"centre": True}),
    ("entropy.matrix/1", slow_sets.matrix_entropy, {}),
    ("entropy.matrix/1{order=2}", slow_sets.matrix_entropy, {"order": 2.0}),
    ("entropy.matrix/1{order=0.5}", slow_sets.matrix_entropy, {"order": 0.5}),
    ("entropy.matrix/1{order=inf}", slow_sets.matrix_entropy, {"order": math.inf}),
    ("entropy.matrix/1{norm=logn}", slow_sets.matrix_entropy, {"norm": "logn"}),
    ("entropy.matrix/1{norm=logd}", slow_sets.matrix_entropy, {"norm": "logd"}),
    ("entropy.matrix/1{norm=lognlogd}", slow_sets.matrix_entropy, {"norm": "lognlogd"}),
    ("entropy.matrix/1{centre=mean,norm=logmin}", slow_sets.matrix_entropy, {"centre": True, "norm": "logmin"}),
    ("order.vector/1", slow_sets.order_vector, {}),
    ("order.pairwise/1", slow_sets.order_pairwise, {}),
    ("id.twonn/1", slow_sets.twonn, {}),
    ("id.twonn/1{est=base}", slow_sets.twonn, {"est": "base"}),
    ("cka.linear/1", slow_sets.cka, {}),
    ("cka.linear/1{W=5}", slow_sets.cka, {"W": 5}),
    ("cka.linear/1{est=biased}", slow_sets.cka, {"est": "biased"}),
    ("cka.linear/1{rows=cosine}", slow_sets.cka, {"rows": "cosine"}),
    ("rsa.dist/1", slow_sets.rsa, {}),
    ("rsa.dist/1{W=6,corr=spearman}", slow_sets.rsa, {"corr": "spearman", "W": 6}),
    ("rsa.dist/1{rows=cosine}", slow_sets.rsa, {"rows": "cosine"}),
    ("influence.block/1", slow_sets.block_influence, {}),
    ("influence.angular/1", slow_sets.angular, {}),
    ("influence.angular/1{n=2}", slow_sets.angular, {"n": 2}),
    ("influence.angular/1{n=3,tokens=all}", slow_sets.angular, {"n": 3, "tokens": "all"}),
    ("line.shape/1", slow_sets.line_shape, {}),
]


@pytest.mark.parametrize(("metric", "twin", "options"), PER_DEPTH, ids=[m for m, _, _ in PER_DEPTH])
def test_against_loops(metric, twin, options):
    for seed in range(N_TRIALS):
        x, mask = trajectory(seed)
        with np.errstate(all="ignore"):
            expected = twin(x, mask, **options)
        result = compute(metric, x, mask=mask)
        assert result.metric_id == metric
        agree(result, expected)


@pytest.mark.parametrize(
    ("metric", "twin", "options"),
    [
        ("cka.linear.paired/1", slow_sets.cka_paired, {}),
        ("cka.linear.paired/1{W=5,est=biased}", slow_sets.cka_paired, {"est": "biased", "W": 5}),
        ("cka.linear.paired/1{rows=cosine}", slow_sets.cka_paired, {"rows": "cosine"}),
        ("rsa.dist.paired/1", slow_sets.rsa_paired, {}),
        ("rsa.dist.paired/1{corr=spearman,rows=cosine}", slow_sets.rsa_paired, {"corr": "spearman", "rows": "cosine"}),
    ],
)
def test_pairs_against_loops(metric, twin, options):
    for seed in range(30):
        x, mask = trajectory(seed)
        rng = np.random.default_rng(seed + 1000)
        y = np.where(np.isfinite(x), x, 0.0) @ rng.normal(size=(x.shape[-1], x.shape[-1] + 2))
        y[:, ::5] = 0
        with np.errstate(all="ignore"):
            agree(compute(metric, x, y, mask=mask), twin(x, y, mask, **options))


def tokens(seed):
    rng = np.random.default_rng(seed)
    T, d = int(rng.integers(0, 26)), int(rng.integers(2, 5))
    h = rng.normal(size=(T, d))
    if seed % 2:
        h = np.round(h)
    if seed % 3 == 1 and T:
        h = h[np.arange(T) % int(rng.integers(1, 6))]
    mask = np.ones(T, bool)
    if seed % 5 == 1:
        mask = rng.random(T) < 0.85
    if seed % 4 == 2:
        h[rng.random(T) < 0.1] = 0
    if seed % 7 == 1:
        h[rng.random(T) < 0.1] = np.nan
    if seed % 19 == 3:
        mask[:] = False
    return h, mask


@pytest.mark.parametrize(
    "options",
    [{}, {"q": 0.25, "lmin": 2, "vmin": 2}, {"eps": 0.05}, {"theiler": 3, "lmin": 2, "vmin": 2}, {"eps": 1e-9}],
    ids=str,
)
def test_recurrence_against_loops(options):
    for seed in range(30):
        h, mask = tokens(seed)
        with np.errstate(all="ignore"):
            expected = slow_sets.rqa(h, mask, **options)
        for name, unused in (("rr", ("lmin", "vmin")), ("det", ("vmin",)), ("entr", ("vmin",)), ("lam", ("lmin",))):
            params = {k: v for k, v in options.items() if k not in unused}
            agree(compute(f"rqa.{name}/1", h, mask=mask, **params), expected[name])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.booleans())
def test_distances_against_loops(seed, size, holes):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(size, 0.5), size=2)
    if holes and size > 1:
        p[rng.random(size) < 0.3] = 0.0
        q[rng.random(size) < 0.3] = 0.0
        p, q = (v / v.sum() if v.sum() > 0 else np.eye(size)[0] for v in (p, q))
    expected = slow_sets.distances(p.tolist(), q.tolist())
    for name, value in expected.items():
        result = compute(f"dist.{name}/1", p, q)
        if value is None:
            assert result.reason == "support"
        else:
            assert float(result) == pytest.approx(value, rel=1e-8, abs=1e-13), name
    assert 0 <= float(compute("dist.js/1", p, q)) <= math.log(2) + 1e-15
    assert float(compute("dist.linf/1", p, q)) <= float(compute("dist.tv/1", p, q)) + 1e-15
