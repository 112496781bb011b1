"""States of several vectors per position: folding positions in and out, against a slow loop."""

import math

import numpy as np
import pytest
import torch

from dynprobe import metrics
from dynprobe.errors import MetricError
from dynprobe.metrics import DEFAULT, convergence_ids, measure, measure_slots

IDS = (*DEFAULT, *convergence_ids(), "erank.rv/1")
#: Depth column → what one pair of successive states of one slot gives it.
STEPS = {
    "angle": lambda a, b: math.acos(min(1.0, max(-1.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b)))),
    "delta_rel_prev": lambda a, b: np.linalg.norm(b - a) / np.linalg.norm(a),
    "delta_rel_next": lambda a, b: np.linalg.norm(b - a) / np.linalg.norm(b),
    "influence_block": lambda a, b: 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b),
}


def batch(depths=6, rows=3, length=5, slots=16, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(depths, rows, length, slots, dim, generator=generator, dtype=torch.float64)
    mask = torch.ones(rows, length, dtype=torch.bool)
    if rows > 1 and length > 3:
        mask[1, :2], mask[2, 3:] = False, False  # padding on either side
    return states, mask


def same(a, b):
    return a == b if isinstance(a, str) else bool(np.allclose(a, b, equal_nan=True, rtol=1e-9))


@pytest.fixture(scope="module")
def measured():
    states, mask = batch()
    return states.numpy(), mask.numpy(), measure_slots(states, mask, metrics=IDS)


def test_shapes_and_names_are_those_of_a_run(measured):
    states, mask, m = measured
    assert {g.shape for g in m.depth.values()} == {(6, 3, 5)}
    assert {g.shape for g in m.token.values()} == {(3, 5)}
    assert {g.shape for g in m.profile.values()} == {(6, 3)}
    assert len(m.sample) == 3
    assert m.first == 0
    assert "unit=slot" in m.extractor_id
    assert m.sample[0]["kappa_phase"].extractor_id == m.extractor_id
    assert (m.keep == mask).all()
    plain = measure(list(torch.from_numpy(states[:, :, :, 0])), mask, metrics=DEFAULT)
    slots = measure_slots(torch.from_numpy(states), mask, metrics=DEFAULT)
    for level in ("depth", "token", "profile"):
        assert list(getattr(slots, level)) == list(getattr(plain, level))
    assert list(slots.sample[0]) == list(plain.sample[0])
    assert slots.ids == plain.ids
    assert list(m.profile_reason) == list(m.profile_coverage) == list(m.profile)


def test_depths_are_means_over_slots(measured):
    states, mask, m = measured
    for k, b, t in np.ndindex(6, 3, 5):
        here = {name: float(grid[k, b, t]) for name, grid in m.depth.items()}
        if not mask[b, t]:
            assert all(math.isnan(value) for value in here.values())
            continue
        assert here["norm"] == pytest.approx(np.mean([np.linalg.norm(x) for x in states[k, b, t]]))
        if k == 0:
            assert math.isnan(here["angle"])
            continue
        a, c = states[k - 1, b, t], states[k, b, t]
        for name, of in STEPS.items():
            assert here[name] == pytest.approx(np.mean([of(x, y) for x, y in zip(a, c, strict=True)])), name
        assert here["delta_rms"] == pytest.approx(math.sqrt(np.mean((c - a) ** 2)))  # Δ_abs of one position
        assert here["delta_rel_prev_fro"] == pytest.approx(np.linalg.norm(c - a) / np.linalg.norm(a))
        assert here["deq_residual"] == pytest.approx(np.linalg.norm(c - a) / (np.linalg.norm(c) + 1e-9))


def test_positions_are_averaged_per_sample(measured):
    states, mask, m = measured
    for b in range(3):
        for name in ("kappa.phase/1", "kappa.geom/1", "delta.rms/1", "converge.rho/1", "erank.rv/1", "curv.depth/1"):
            alone = [metrics.compute(name, states[:, b, t]) for t in np.flatnonzero(mask[b])]
            found = m.sample[b][metrics.column_name(name)]
            assert float(found) == pytest.approx(np.mean([float(r) for r in alone]))
            assert found.n_units == 16 * len(alone)
            assert found.coverage == 1
            assert found.reason is None
            profile = np.mean([r.profile for r in alone], axis=0)
            stored = m.profile[metrics.column_name(name)][:, b]
            assert stored[len(stored) - len(profile) :] == pytest.approx(profile)
    phase = m.sample[0]["kappa_phase"]
    assert m.token["kappa_phase"][0] == pytest.approx(phase.per_unit)
    assert m.sample[0]["kappa_path"].value == pytest.approx(math.pi * 5 * float(phase))


def test_padding_and_batch_change_nothing(measured):
    states, mask, m = measured
    for b in range(3):
        at = np.flatnonzero(mask[b])
        alone = measure_slots(torch.from_numpy(states[:, b : b + 1, at]), np.ones((1, len(at)), bool), metrics=IDS)
        for name, found in m.sample[b].items():
            assert same(found.value, alone.sample[0][name].value), name
            assert found.reason == alone.sample[0][name].reason
        for name, grid in m.depth.items():
            assert np.allclose(grid[:, b, at], alone.depth[name][:, 0], equal_nan=True)


def test_permuting_slots_changes_nothing(measured):
    states, mask, m = measured
    order = np.random.default_rng(1).permutation(16)
    other = measure_slots(torch.from_numpy(states[:, :, :, order]), mask, metrics=IDS)
    for level in ("depth", "token", "profile"):
        for name, grid in getattr(m, level).items():
            assert np.allclose(grid, getattr(other, level)[name], equal_nan=True, rtol=1e-9), name
    for mine, theirs in zip(m.sample, other.sample, strict=True):
        for name, result in mine.items():
            assert same(result.value, theirs[name].value), name


def test_one_slot_is_the_plain_measurement():
    states, mask = batch(slots=1)
    ids = ("kappa.phase/1", "delta.rel_prev/1", "delta.rel_next/1", "delta.rms/1", "resid.norm/1", "curv.depth/1",
           "converge.iterations/1{of=delta_rms,tol=1.4}")  # fmt: skip
    slots = measure_slots(states, mask, metrics=ids, sink=1)
    plain = measure(list(states[:, :, :, 0]), mask, metrics=ids, embed=1, sink=1)
    for name, grid in plain.depth.items():
        assert np.allclose(slots.depth[name], grid, equal_nan=True)
    assert np.allclose(slots.token["kappa_phase"][plain.keep], plain.token["kappa_phase"][plain.keep])
    assert (slots.keep == plain.keep).all()
    for mine, theirs in zip(slots.sample, plain.sample, strict=True):
        for name in ("kappa_phase", "kappa_path", "delta_rel_prev", "norm", "curv_depth"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]))
            assert mine[name].n_units == theirs[name].n_units
        name = "converge_iterations_tol1_4"
        assert np.array_equal(mine[name].value, theirs[name].value, equal_nan=True)
        assert mine[name].extras == theirs[name].extras
    assert slots.sample[0].keys() == plain.sample[0].keys()


def test_what_needs_an_order_is_missing_with_its_reason(measured):
    _, _, m = measured
    for name in ("limen_ct", "limen_ratio", "debt_cusum", "curv_token", "kappa_xcorr", "collapse_late_ct"):
        assert math.isnan(m.sample[0][name].value)
        assert m.sample[0][name].reason == "slots"
    assert m.sample[0]["limen_regime"].value == "UNDEFINED"
    assert np.isnan(m.token["limen_ct"]).all()
    assert set(m.profile_reason["curv_token"].ravel()) == {"slots"}


def test_contraction_and_censoring():
    start = torch.randn(1, 2, 3, 16, 8, dtype=torch.float64)
    rate = torch.tensor([0.5, 0.9], dtype=torch.float64).view(1, 2, 1, 1, 1)
    states = rate ** torch.arange(9.0, dtype=torch.float64).view(9, 1, 1, 1, 1) * start
    m = measure_slots(states, np.ones((2, 3), bool), metrics=convergence_ids(tol={"delta_rel_prev_fro": 0.2}))
    assert float(m.sample[0]["converge_rho"]) == pytest.approx(0.5)
    assert float(m.sample[1]["converge_rho"]) == pytest.approx(0.9)
    assert m.token["converge_rho"][1] == pytest.approx([0.9] * 3)
    assert m.depth["converge_rho"][2:, 0] == pytest.approx(0.5)
    slow, fast = (m.sample[b]["converge_iterations_delta_rel_prev_fro_tol0_2"] for b in (0, 1))
    assert math.isnan(slow.value)
    assert (slow.reason, slow.extras["time"], slow.extras["event"]) == ("censored", 8, 0)
    assert (float(fast), fast.reason, fast.extras["event"]) == (1, None, 1)
    column = "converge_iterations_delta_rel_prev_fro_tol0_2"
    assert np.isnan(m.token[column][0]).all()
    assert m.token[f"{column}_event"].tolist() == [[0] * 3, [1] * 3]


def test_broken_slots_leave_the_mean_and_then_the_value():
    states, _ = batch(rows=1, length=1, slots=4)
    mask = np.ones((1, 1), bool)
    broken = states.clone()
    broken[2, 0, 0, 0] = math.nan
    m = measure_slots(broken, mask, metrics=["delta.rel_prev/1"])
    others = measure_slots(states[:, :, :, 1:], mask, metrics=["delta.rel_prev/1"])
    assert m.depth["delta_rel_prev"][2] == pytest.approx(others.depth["delta_rel_prev"][2])
    assert m.n_nonfinite.tolist() == [1]
    broken[2, 0, 0, 1:3] = math.nan
    m = measure_slots(broken, mask, metrics=["delta.rel_prev/1"])
    assert math.isnan(m.depth["delta_rel_prev"][2, 0, 0])
    broken[:] = math.nan
    m = measure_slots(broken, mask, metrics=["delta.rel_prev/1"])
    assert m.sample[0]["delta_rel_prev"].reason == "coverage"


def test_empty_rows_short_tracks_and_few_slots_have_reasons():
    states, mask = batch(rows=3)
    mask[0] = False
    m = measure_slots(states, mask, metrics=IDS)
    assert {m.sample[0][n].reason for n in ("kappa_phase", "kappa_geom", "converge_rho")} == {"empty"}
    assert m.profile_reason["kappa_phase"][3, 0] == "empty"
    nothing = measure_slots(states, torch.zeros_like(mask), metrics=IDS)
    assert nothing.sample[2]["kappa_phase"].reason == "empty"
    one = measure_slots(states[:1], mask, metrics=["kappa.phase/1", "converge.rho/1"])
    assert one.sample[1]["kappa_phase"].reason == "depth<2"
    assert one.sample[1]["converge_rho"].reason == "depth<3"
    few = measure_slots(states[:, :, :, :3], mask, metrics=["kappa.geom/1"])
    assert few.sample[1]["kappa_geom"].reason == "units<4"


def test_span_narrows_set_metrics_and_embed_drops_depth_0():
    states, mask = batch(rows=1)
    span = np.array([[False, False, True, True, True]])
    m = measure_slots(states, mask, metrics=["kappa.geom/1", "kappa.phase/1"], span=span)
    late = measure_slots(states[:, :, 2:], mask[:, 2:], metrics=["kappa.geom/1"])
    assert float(m.sample[0]["kappa_geom"]) == pytest.approx(float(late.sample[0]["kappa_geom"]))
    assert m.sample[0]["kappa_phase"].n_units == 16 * 5
    below = measure_slots(states, mask, metrics=["kappa.phase/1", "resid.norm/1"], embed=0)
    without = measure_slots(states[1:], mask, metrics=["kappa.phase/1"])
    assert below.first == 1
    assert float(below.sample[0]["kappa_phase"]) == pytest.approx(float(without.sample[0]["kappa_phase"]))
    assert np.isfinite(below.depth["norm"][0]).all()


def test_refusals():
    states, mask = batch()
    with pytest.raises(MetricError, match=r"\[batch, pos, slot, dim\]"):
        measure_slots(states[:, :, :, 0], mask)
    with pytest.raises(MetricError, match="mask has shape"):
        measure_slots(states, mask[:, :2])
    with pytest.raises(MetricError, match="one shape at all depths"):
        measure_slots([states[0], states[1, :, :, :3]], mask)
    with pytest.raises(MetricError, match="no depths"):
        measure_slots([], mask)
    with pytest.raises(MetricError, match="at least one slot"):
        measure_slots(states[:, :, :, :0], mask)
    with pytest.raises(MetricError, match=r"cannot take 'converge\.exit/1'"):
        measure_slots(states, mask, metrics=["converge.exit/1"])
