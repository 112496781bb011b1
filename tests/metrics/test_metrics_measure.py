"""The batched road equals the exact call row by row, whatever the padding."""

import math
import types

import numpy as np
import pytest
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics import CORE, DEFAULT, compute, diverge, frame, measure, paired

THETA = 0.8
ROWS = [("left", 9), ("right", 12), ("left", 12), ("right", 4), ("left", 3), ("right", 2), ("right", 1), ("left", 8)]
PER_UNIT = [m for m in DEFAULT if m.startswith(("kappa.phase", "kappa.sync", "delta", "resid", "curv.depth"))]
TOKEN_AXIS = ["kappa.geom/1", "kappa.xcorr/1", "curv.token/1"]
SERIES = ["limen.ratio/1", "limen.qratio/1", "limen.gini/1", "limen.ratio/1{norm=winsor_mad}", "collapse.late_ct/1"]


def batch(seed=0, dirt=True, T=12, D=6, d=10):
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.normal(size=(D, len(ROWS), T, d)), axis=0) + 0.3
    mask = np.zeros((len(ROWS), T), bool)
    for row, (side, n) in enumerate(ROWS):
        mask[row, -n:] = side == "left"
        mask[row, :n] |= side == "right"
        if side == "left":
            mask[row, : T - n] = False
    if dirt:
        x[2, 1, 5] = 0
        x[3, 2, 7, 2] = np.nan
        x[:, 2, 0] = 1e9
        x[4, 0, 6:9] = x[3, 0, 6:9]
        x[5, 7, 7:10] = np.inf
        x[1:, 7, 6] = 0
    x[:, ~mask] = rng.choice([0.0, np.nan, 55.0], size=(D, int((~mask).sum()), 1))
    return x, mask


def one_row(x, mask, row, embed, sink, span=None):
    real = np.flatnonzero(mask[row])[sink:]
    trajectory = x[0 if embed else 1 :, row][:, real]
    chosen = real if span is None else np.array([p for p in real if span[row, p]], dtype=int)
    return trajectory, x[0 if embed else 1 :, row][:, chosen]


def same(result, expected, rel):
    assert result.reason == expected.reason, (result, expected)
    if isinstance(expected.value, str):
        assert result.value == expected.value
        return
    assert float(result) == pytest.approx(float(expected), rel=rel, abs=rel, nan_ok=True), (result, expected)
    if not math.isnan(expected.coverage):
        assert result.coverage == pytest.approx(expected.coverage)


@pytest.mark.parametrize("dirt", [False, True])
@pytest.mark.parametrize(("embed", "sink"), [(0, 1), (1, 0), (1, 2)])
@pytest.mark.parametrize("with_span", [False, True])
def test_rows_equal_compute(dirt, embed, sink, with_span):
    x, mask = batch(dirt=dirt)
    span = None
    if with_span:
        span = np.zeros_like(mask)
        span[:, 4:11] = True
    m = measure(
        [torch.from_numpy(s) for s in x],
        torch.from_numpy(mask),
        metrics=DEFAULT,
        embed=embed,
        sink=sink,
        span=None if span is None else torch.from_numpy(span),
        debt_theta=THETA,
    )
    for row, got in enumerate(m.sample):
        full, part = one_row(x, mask, row, embed, sink, span)
        for metric in PER_UNIT:
            column = next(c for c, i in m.ids.items() if i == metric)
            expected = compute(metric, full)
            same(got[column], expected, 1e-12)
            assert (got[column].n_units, got[column].n_steps) == (expected.n_units, expected.n_steps)
            if column in m.profile and expected.profile is not None:
                offset = len(x) - len(expected.profile)
                np.testing.assert_allclose(m.profile[column][offset:, row], expected.profile, rtol=1e-12, atol=1e-13)
        path = got["kappa_path"]
        assert float(path) == pytest.approx(compute("kappa.phase/1", full).extras["kappa_path"], rel=1e-12, nan_ok=True)
        for metric in TOKEN_AXIS:
            same(got[metric.split("/")[0].replace(".", "_")], compute(metric, part), 1e-11)
        ct = compute("limen.ct/1", part[-1])
        same(got["limen_ct"], ct, 1e-12)
        same(got["limen_ct2"], compute("limen.ct2/1", part[-1]), 1e-12)
        if part.shape[1] >= 3:
            for metric in SERIES:
                column = next(c for c, i in m.ids.items() if i == metric)
                same(got[column], compute(metric, ct.series), 1e-11)
            same(got["limen_regime"], compute("limen.regime/1", compute("limen.ratio/1", ct.series)), 0)
            same(got["debt_cusum"], compute("debt.cusum/1", ct.series, theta=THETA), 1e-11)
            same(got["debt_excess"], compute("debt.excess/1", ct.series, theta=THETA), 1e-11)
        else:
            for column in ("limen_ratio", "limen_gini", "collapse_late_ct", "debt_cusum"):
                assert got[column].reason == ("tokens<3" if part.shape[1] else "empty")
            assert got["limen_regime"].value == "UNDEFINED"


def test_float32_is_close():
    x, mask = batch(dirt=False)
    x[:, ~mask] = 0
    args = {"metrics": DEFAULT, "debt_theta": THETA}
    narrow = measure([torch.from_numpy(s.astype(np.float32)) for s in x], torch.from_numpy(mask), **args)
    wide = measure([torch.from_numpy(s.astype(np.float32)).double() for s in x], torch.from_numpy(mask), **args)
    for a, b in zip(narrow.sample, wide.sample, strict=True):
        for column in a:
            if isinstance(a[column].value, str):
                assert a[column].value == b[column].value
            else:
                assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-5, abs=1e-6, nan_ok=True), column
    for column, grid in narrow.depth.items():
        assert grid.dtype == np.float32
        np.testing.assert_allclose(grid, wide.depth[column], rtol=1e-5, atol=2e-7)
    for column, grid in narrow.token.items():
        np.testing.assert_allclose(grid, wide.token[column], rtol=1e-5, atol=1e-6)


def test_depth_and_token_tables():
    x, mask = batch(dirt=False)
    m = measure([torch.from_numpy(s) for s in x], torch.from_numpy(mask), metrics=DEFAULT)
    D = len(x)
    assert set(m.depth) == {"norm", "angle", "delta_rel_prev", "delta_rel_next", "delta_rms", "curv_depth"}
    assert set(m.token) == {"kappa_phase", "limen_ct", "limen_ct2"}
    for grid in m.depth.values():
        assert grid.shape == (D, *mask.shape)
        assert np.isnan(grid[:, ~mask]).all()
    for row in range(len(mask)):
        for pos in np.flatnonzero(mask[row]):
            path = x[:, row, pos]
            np.testing.assert_allclose(m.depth["norm"][:, row, pos], np.linalg.norm(path, axis=-1), rtol=1e-12)
            assert np.isnan(m.depth["angle"][:2, row, pos]).all()
            assert np.isnan(m.depth["curv_depth"][:3, row, pos]).all()
            for d in range(2, D):
                pair = path[d - 1 : d + 1, None]
                diff = np.linalg.norm(path[d] - path[d - 1])
                assert m.depth["angle"][d, row, pos] == pytest.approx(
                    math.pi * float(compute("delta.angle/1", pair)), rel=1e-11
                )
                assert m.depth["delta_rel_prev"][d, row, pos] == pytest.approx(diff / np.linalg.norm(path[d - 1]))
                assert m.depth["delta_rel_next"][d, row, pos] == pytest.approx(diff / np.linalg.norm(path[d]))
                assert m.depth["delta_rms"][d, row, pos] == pytest.approx(diff / math.sqrt(x.shape[-1]))
            for d in range(3, D):
                turn = float(compute("curv.depth/1", path[d - 2 : d + 1, None]))
                assert m.depth["curv_depth"][d, row, pos] == pytest.approx(turn, rel=1e-11)
            assert m.token["kappa_phase"][row, pos] == pytest.approx(float(compute("kappa.phase/1", path[1:, None])))
        real = np.flatnonzero(mask[row])
        ct = compute("limen.ct/1", x[-1, row, real[1:]]) if len(real) > 1 else None
        expected = np.full(mask.shape[1], np.nan)
        if ct is not None and len(ct.series):
            expected[real[3:]] = ct.series
        np.testing.assert_allclose(m.token["limen_ct"][row], expected, rtol=1e-11)
        if ct is not None and len(ct.series):
            middle = np.full(mask.shape[1], np.nan)
            middle[real[2:-1]] = compute("limen.ct2/1", x[-1, row, real[1:]]).series
            np.testing.assert_allclose(m.token["limen_ct2"][row], middle, rtol=1e-11)
    assert (m.profile_reason["kappa_phase"][:2] == "first").all()
    assert m.profile_reason["kappa_phase"][2:, 0].tolist() == [None] * (D - 2)
    assert (m.profile_coverage["kappa_phase"][2:, 0] == 1).all()
    assert np.isnan(m.profile_coverage["kappa_phase"][:2]).all()


def test_bad_values_are_counted_and_reasoned():
    x, mask = batch(dirt=True)
    m = measure([torch.from_numpy(s) for s in x], torch.from_numpy(mask), metrics=DEFAULT)
    assert m.n_nonfinite.tolist() == [0, 0, 1, 0, 0, 0, 0, 3]
    assert m.sample[2]["kappa_phase"].extras["n_nonfinite"] == 1
    assert m.sample[1]["kappa_phase"].extras["n_invalid"] == 1
    assert np.isnan(m.depth["angle"][2:4, 1, 5]).all()
    assert m.depth["norm"][2, 1, 5] == 0
    assert m.sample[6]["kappa_phase"].reason == "empty"
    assert m.sample[0]["debt_cusum"].reason == "no-calibration"
    assert math.isnan(float(m.sample[0]["debt_cusum"]))


def test_rows_do_not_depend_on_neighbours():
    x, mask = batch(dirt=True)
    states = [torch.from_numpy(s) for s in x]
    whole = measure(states, torch.from_numpy(mask), metrics=DEFAULT)
    for row in range(len(mask)):
        alone = measure([s[row : row + 1] for s in states], torch.from_numpy(mask[row : row + 1]), metrics=DEFAULT)
        for column, result in alone.sample[0].items():
            if not isinstance(result.value, str):
                assert float(result) == pytest.approx(float(whole.sample[row][column]), rel=1e-13, nan_ok=True), column


def test_long_rows_use_windows():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(4, 2, 150, 12))
    mask = np.ones((2, 150), bool)
    mask[1, :20] = False
    m = measure(
        [torch.from_numpy(s) for s in x],
        torch.from_numpy(mask),
        metrics=["kappa.geom/1", "kappa.geom/1{W=16}"],
        sink=1,
    )
    for row in range(2):
        part = x[1:, row, mask[row]][:, 1:]
        same(m.sample[row]["kappa_geom"], compute("kappa.geom/1", part), 1e-12)
        same(m.sample[row]["kappa_geom_w16"], compute("kappa.geom/1{W=16}", part), 1e-12)
        assert m.ids["kappa_geom_w16"] == "kappa.geom/1{W=16}"


def test_core_only_and_results():
    x, mask = batch(dirt=False)
    m = measure([torch.from_numpy(s) for s in x], mask)
    assert set(m.sample[0]) == {
        "kappa_phase", "kappa_path", "delta_rel_prev", "delta_rel_next", "delta_rms", "delta_angle", "norm", "limen_ct",
        "limen_ratio",
    }  # fmt: skip
    assert len(CORE) == 8
    r = m.sample[1]["kappa_phase"]
    assert (r.metric_id, r.dtype) == ("kappa.phase/1", "float64")
    assert r.extractor_id == "embed=0,final_norm=pre,sink=drop1,span=all"
    assert r.per_unit.shape == (12,)


def test_refusals():
    states = [torch.randn(2, 5, 4) for _ in range(3)]
    mask = torch.ones(2, 5, dtype=torch.bool)
    hole = mask.clone()
    hole[0, 2] = False
    for bad, text in (
        ({"states": states, "mask": hole}, "contiguous"),
        ({"states": states, "mask": mask[:, :4]}, "shape"),
        ({"states": [s[:, :, None] for s in states], "mask": mask}, "flatten"),
        ({"states": [*states, torch.randn(2, 5, 3)], "mask": mask}, "one shape"),
        ({"states": [], "mask": mask}, "no depths"),
        ({"states": states, "mask": mask, "metrics": ["output.kl/2"]}, "output.kl/1"),
        ({"states": states, "mask": mask, "metrics": ["diverge.angle/1"]}, "paired, diverge"),
        ({"states": states, "mask": mask, "metrics": ["kappa.fase/1"]}, "kappa.phase/1"),
    ):
        with pytest.raises(MetricError, match=text):
            measure(**bad)


def test_paired_from_measurements():
    x, mask = batch(dirt=True)
    rng = np.random.default_rng(9)
    y = x.copy()
    y[3:] += 0.3 * rng.normal(size=y[3:].shape)
    y[4, 0, 11] = 0
    clean, arm = (measure([torch.from_numpy(s) for s in z], mask, metrics=["kappa.phase/1"]) for z in (x, y))
    results = paired(clean, arm, inject=3)
    for row, r in enumerate(results):
        a, b = one_row(x, mask, row, 0, 1)[0], one_row(y, mask, row, 0, 1)[0]
        e = compute("kappa.phase.paired/1", a, b, inject=2)
        assert r.reason == e.reason
        assert float(r) == pytest.approx(float(e), rel=1e-9, abs=1e-14, nan_ok=True)
        assert r.extras["delta_inj"] == pytest.approx(e.extras["delta_inj"], rel=1e-9, abs=1e-14, nan_ok=True)
        assert r.extras["delta_down"] == pytest.approx(e.extras["delta_down"], rel=1e-9, abs=1e-14, nan_ok=True)
    assert all(math.isnan(r.extras["delta_inj"]) for r in paired(clean, arm, inject=1))
    with pytest.raises(MetricError, match="inject"):
        paired(clean, arm, inject=6)
    other = measure([torch.from_numpy(s) for s in y], mask, metrics=["kappa.phase/1"], sink=0)
    with pytest.raises(MetricError, match="sinks"):
        paired(clean, other)


def test_diverge_batch():
    x, mask = batch(dirt=True)
    y = x + 0.1
    out = diverge([torch.from_numpy(s) for s in x], [torch.from_numpy(s) for s in y], torch.from_numpy(mask))
    assert out.shape == x.shape[:3]
    assert np.isnan(out[:, ~mask]).all()
    e = compute("diverge.angle/1", x[:, 1], y[:, 1])
    np.testing.assert_allclose(out[:, 1], e.extras["grid"], rtol=1e-11)
    with pytest.raises(MetricError, match="depths"):
        diverge([torch.from_numpy(s) for s in x], [torch.from_numpy(s) for s in y[1:]], torch.from_numpy(mask))


def test_frame():
    x, mask = batch(dirt=True)
    tape = types.SimpleNamespace(states=[torch.from_numpy(s) for s in x], mask=torch.from_numpy(mask))
    table = frame(["kappa.phase/1", "kappa.geom/1{W=8}", "limen.regime/1"], tape, reasons=True)
    assert list(table.columns) == [
        "kappa_phase", "kappa_phase_reason", "kappa_geom_w8", "kappa_geom_w8_reason", "limen_regime",
        "limen_regime_reason",
    ]  # fmt: skip
    assert len(table) == len(mask)
    assert table.attrs["ids"]["kappa_geom_w8"] == "kappa.geom/1{W=8}"
    assert table.loc[6, "kappa_phase_reason"] == "empty"
    assert list(frame("kappa.phase/1", tape, sink=0).columns) == ["kappa_phase"]
    with pytest.raises(MetricError, match="output_metrics"):
        frame(["output.nll/1"], tape)
