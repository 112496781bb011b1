"""Files of states as runs: closed-form trajectories, the tables' columns, provenance, continuing."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.metrics import column_name, convergence, convergence_ids

DIMS = ["iter", "batch", "pos", "state", "dim"]
RULES = [column_name(i) for i in convergence_ids() if i.startswith("converge.iterations")]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def halving(rho=0.5, n=9, batch=2, pos=3, slots=16, dim=8):
    start = np.random.default_rng(1).standard_normal((1, batch, pos, slots, dim))
    return rho ** np.arange(float(n))[:, None, None, None, None] * start


def turning(phi, n=7, slots=4):
    angle = phi * np.arange(n)[:, None] + np.linspace(0, 1, slots)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


@pytest.fixture
def ingest(tmp_path):
    def make(name="states.npz", options=None, **arrays):
        file = tmp_path / name
        np.savez(file, **arrays)
        return dp.ingest(file, **{"out": tmp_path / "runs", **(options or {})})

    return make


def reasons(run, row=0):
    return json.loads(run.samples["reasons"].iloc[row])


def test_a_contraction_is_measured_as_one(ingest):
    x = halving()
    run = ingest(states=x, dims=DIMS, ids=["a", "b"], energy=np.zeros((9, 2, 3)) - np.arange(9.0)[:, None, None])
    samples = run.samples.set_index("prompt_id")
    assert samples["converge_rho"].to_numpy() == pytest.approx([0.5, 0.5])
    assert samples["delta_rel_prev"].to_numpy() == pytest.approx([0.5, 0.5])
    assert samples["delta_rel_next"].to_numpy() == pytest.approx([1, 1])
    assert samples["kappa_phase"].to_numpy() == pytest.approx([0, 0], abs=1e-7)
    assert set(samples["n_fed"]) == {3}
    depths = run.depths
    assert len(depths) == 9 * 2 * 3
    assert sorted(depths["iteration"].unique()) == list(range(9))
    assert (depths["energy"] == -depths["iteration"]).all()
    first = depths[(depths["sample_id"] == "a|clean|0") & (depths["pos"] == 1)].sort_values("depth")
    lengths = np.linalg.norm(x[:, 0, 1], axis=-1)
    assert first["norm"].to_numpy() == pytest.approx(lengths.mean(-1), rel=1e-6)
    steps = np.sqrt(((x[1:, 0, 1] - x[:-1, 0, 1]) ** 2).mean((1, 2)))
    assert math.isnan(first["delta_rms"].iloc[0])
    assert first["delta_rms"].iloc[1:].to_numpy() == pytest.approx(steps, rel=1e-6)
    assert first["converge_rho"].iloc[2:].to_numpy() == pytest.approx(0.5)
    assert set(depths["track"]) == set(depths["stage"]) == {"core"}
    assert set(depths.loc[depths["depth"] == 0, "component"].astype(str)) == {"resid_pre"}


@pytest.mark.parametrize("phi", [0.3, math.pi / 6, 2.5])
def test_a_rotation_has_the_phase_it_was_made_with(ingest, phi):
    run = ingest(states=turning(phi))
    assert run.samples["kappa_phase"].item() == pytest.approx(phi / math.pi, rel=1e-6)
    assert run.samples["kappa_path"].item() == pytest.approx(6 * phi, rel=1e-6)
    assert run.depths["angle"].iloc[1:].to_numpy() == pytest.approx(phi, rel=1e-6)


def test_iterations_to_tolerance_and_their_censoring(ingest):
    run = ingest(states=halving(0.8, n=12), dims=DIMS)
    row = run.samples.iloc[0]
    fro = "converge_iterations_delta_rel_prev_fro"
    assert math.isnan(row[fro])  # Δ_rel is 0.2 for ever
    assert (row[f"{fro}_time"], row[f"{fro}_event"]) == (11, 0)
    assert reasons(run)[fro] == "censored"
    assert np.isnan(run.tokens[fro]).all()
    assert (run.tokens[f"{fro}_event"] == 0).all()
    assert (row["converge_iterations_influence_block"], row["converge_iterations_influence_block_event"]) == (1, 1)
    assert run.summary["convergence"][fro] == {"median": None, "reached": 0, "censored": 2, "missing": 0}
    assert run.summary["convergence"]["converge_iterations_influence_block"]["median"] == 1
    for name in RULES:
        assert {name, f"{name}_time", f"{name}_event"} <= set(run.samples.columns)


def test_the_convergence_of_one_position_is_that_of_one_trajectory(ingest):
    x = np.random.default_rng(0).normal(size=(8, 16, 4)) * 0.3 ** np.arange(8)[:, None, None] + 1
    run = ingest(states=x)
    for name, found in convergence(x).items():
        value = run.samples[column_name(name)].item()
        assert value == pytest.approx(float(found), rel=1e-5, nan_ok=True), name


def test_the_columns_are_those_of_a_run_of_a_model(ingest, llama, tmp_path):
    model = dp.run(llama, ["Hello there", "And so on"], max_new_tokens=0, out=tmp_path / "model")
    for arrays in ({"states": halving(), "dims": DIMS}, {"states": halving()[:, :, :, 0], "dims": [*DIMS[:3], "dim"]}):
        run = ingest(**arrays)
        for table in ("samples", "tokens", "depths", "profiles", "prompts", "conditions"):
            missing = set(model.table(table).columns) - set(run.table(table).columns) - {"token_texts"}
            assert missing == set(), table
        both = model.columns().merge(run.columns(), on=["table", "column"])
        metrics = both[both["id_x"] != ""]
        assert len(metrics) > 40
        assert (metrics["id_x"] == metrics["id_y"]).all()
        assert (metrics["digest_x"] == metrics["digest_y"]).all()
        assert (metrics["unit_x"] == metrics["unit_y"]).all()
    assert reasons(run)["nll"] == "no-readout"
    assert run.verify() == len(run.manifest.parts)


def test_slots_are_the_units_and_order_is_missed(ingest):
    run = ingest(states=halving(), dims=DIMS)
    assert reasons(run)["limen_ct"] == "slots"
    assert str(run.samples["limen_regime"].iloc[0]) == "UNDEFINED"
    assert (
        "mean over positions"
        in run.columns().query("table == 'samples' and column == 'kappa_geom'")["aggregation"].item()
    )
    assert run.samples["kappa_geom"].notna().all()  # among 16 slots


def test_token_states_are_measured_like_a_models(ingest):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 2, 9, 4))
    run = ingest(states=x, dims=["iter", "batch", "pos", "dim"])
    m = dp.metrics.measure(
        [torch.from_numpy(s) for s in x],
        np.ones((2, 9), bool),
        metrics=dp.metrics.DEFAULT,
        embed=1,
        sink=1,
    )
    for name in ("kappa_phase", "delta_rms", "kappa_geom", "limen_ct", "limen_ratio", "curv_token"):
        assert run.samples[name].to_numpy() == pytest.approx([float(r[name]) for r in m.sample], rel=1e-5)
    assert run.manifest.config["sink"] == 1
    residual = run.depths.sort_values(["sample_id", "depth", "pos"])["deq_residual"].to_numpy().reshape(2, 6, 9)[:, 1:]
    lengths = np.linalg.norm(x[1:] - x[:-1], axis=-1) / np.linalg.norm(x[1:], axis=-1)
    assert residual == pytest.approx(lengths.transpose(1, 0, 2), rel=1e-5)
    all_in = ingest(states=x, dims=["iter", "batch", "pos", "dim"], options={"sink": 0})
    assert all_in.manifest.id8 != run.manifest.id8
    assert (all_in.samples["kappa_phase"] != run.samples["kappa_phase"]).all()


def test_padding_leaves_no_rows(ingest):
    x, valid = halving(), np.array([[True, True, True], [True, False, False]])
    x[:, 1, 1:] = np.nan
    arrays = {"states": x, "dims": DIMS, "valid": valid, "ids": ["long", "short"]}
    run = ingest(**arrays, token_ids=np.arange(6).reshape(2, 3), options={"sink": 0})
    assert run.depths.groupby("sample_id", observed=True).size().to_dict() == {"long|clean|0": 27, "short|clean|0": 9}
    tokens = run.tokens[run.tokens["sample_id"] == "long|clean|0"].sort_values("pos")
    assert tokens["target_id"].tolist() == [1, 2, -1]
    assert run.prompts.set_index("prompt_id")["token_ids"]["short"].tolist() == [3]
    assert (run.samples["n_nonfinite"] == 0).all()
    assert run.samples["converge_rho"].to_numpy() == pytest.approx([0.5, 0.5])
    dropped = ingest(**arrays)  # the first position stays out, as in a run of a model
    assert np.isnan(dropped.samples.set_index("prompt_id")["converge_rho"]["short"])
    assert reasons(dropped, list(dropped.samples["prompt_id"]).index("short"))["converge_rho"] == "empty"


def test_gaps_and_runs_per_depth_have_no_convergence(ingest):
    with pytest.warns(UserWarning, match="gaps"):
        gaps = ingest(states=halving(), dims=DIMS, iter=np.arange(9) * 5)
    finals = ingest(**{f"states_depth_{k}": x for k, x in enumerate(halving())}, dims=DIMS[1:])
    for run, reason in ((gaps, "iteration-gaps"), (finals, "final-per-depth")):
        for name in ("converge_rho", "deq_residual", *RULES):
            assert run.samples[name].isna().all()
            assert reasons(run)[name] == reason
        assert run.samples[f"{RULES[0]}_time"].isna().all()
        assert run.depths["converge_rho"].isna().all()
        assert run.profiles["converge_accel"].isna().all()
        assert run.samples["delta_rel_prev"].to_numpy() == pytest.approx(0.5)
    assert gaps.depths["iteration"].max() == 40
    assert gaps.depths["depth"].max() == 8
    assert finals.manifest.config["mode"] == "final_per_depth"


def test_iterations_are_counted_from_their_own_zero(ingest):
    x = 1 + 0.5 ** np.arange(12.0)[:, None, None] * np.ones((1, 4, 2))
    whole, late = ingest(states=x), ingest("late.npz", states=x[3:], iter=np.arange(3, 12))
    name = "converge_iterations_delta_rel_next_tol0_03"
    assert whole.samples[name].item() == late.samples[name].item()
    assert late.tokens[name].item() == whole.tokens[name].item()
    very = ingest("very.npz", states=x[6:], iter=np.arange(6, 12))
    assert very.samples[name].isna().all()
    assert reasons(very)[name] == "left-censored"
    assert very.samples[f"{name}_time"].isna().all()
    assert very.tokens[f"{name}_event"].isna().all()
    never = "converge_iterations"
    assert late.samples[f"{never}_time"].item() == whole.samples[f"{never}_time"].item()


def test_few_iterations_carry_a_remark(ingest):
    run = ingest(states=halving(n=4), dims=DIMS)
    assert run.samples["converge_rho"].iloc[0] == pytest.approx(0.5)
    assert reasons(run)["converge_rho"] == "iterations<5"
    assert any("needs 5" in line for line in run.summary["remarks"])
    two = ingest("two.npz", states=halving(n=2), dims=DIMS)
    assert reasons(two)["converge_rho"] == "depth<3"
    assert two.samples["delta_rel_prev"].iloc[0] == pytest.approx(0.5)


def test_stages_are_tracks(ingest):
    slow, fast = halving(0.9, n=6), halving(0.5, n=6)
    x = np.stack([slow, fast], axis=1).reshape(12, *slow.shape[1:])
    run = ingest(states=x, dims=DIMS, stage=["L", "H"] * 6)
    assert set(run.depths["track"]) == {"L", "H"}
    rel = run.depths[run.depths["depth"] == 2].groupby("track", observed=True)["delta_rel_prev"].mean()
    assert rel.to_dict() == pytest.approx({"L": 0.1, "H": 0.5})
    assert run.samples["converge_rho"].iloc[0] == pytest.approx(0.5)  # H ends the file
    other = ingest(states=x, dims=DIMS, stage=["L", "H"] * 6, options={"track": "L"})
    assert other.samples["converge_rho"].iloc[0] == pytest.approx(0.9)
    with pytest.raises(UsageError, match="no stage 'K'"):
        ingest(states=x, dims=DIMS, stage=["L", "H"] * 6, options={"track": "K"})


def test_provenance_and_the_same_file_twice(ingest, tmp_path):
    arrays = {"states": halving(), "dims": DIMS, "meta": json.dumps({"model": "org/mine", "seed": 3})}
    run = ingest(**arrays)
    manifest = run.manifest
    sha = hashlib.sha256((tmp_path / "states.npz").read_bytes()).hexdigest()
    assert manifest.model_name == "org/mine"
    assert manifest.model["file_sha256"] == sha
    assert manifest.model["meta"] == {"model": "org/mine", "seed": 3}
    assert manifest.weights["hash"] == f"file-sha256:{sha}"
    assert manifest.dtypes["weights"] == "float64"
    assert manifest.command[:2] == ["dynprobe", "import"]
    assert run.status == "complete"
    again = ingest(**arrays)
    assert again.path == run.path
    assert ingest(**arrays, options={"name": "other"}).manifest.model_name == "other"
    found = dp.runs.list_runs(tmp_path / "runs")
    assert set(found["protocol"]) == {"import"}
    assert found["rows"].tolist() == [2, 2]


def test_states_are_kept_where_wanted(ingest):
    x = halving().astype(np.float32)
    keys, stored = ingest(states=x, dims=DIMS, ids=["a", "b"], options={"states": True}).states(depth=4)
    for row, state in zip(keys.itertuples(), stored, strict=True):
        b = ["a|clean|0", "b|clean|0"].index(row.sample_id)
        assert np.array_equal(state, x[4, b, row.pos])


def test_many_samples_are_written_in_batches(ingest, monkeypatch):
    x = np.random.default_rng(0).normal(size=(5, 7, 3, 4, 2))
    whole = ingest(states=x, dims=DIMS)
    monkeypatch.setitem(dp.ingest.__globals__, "_ROWS", 30)
    parts = ingest(states=x, dims=DIMS, options={"name": "parts"})
    assert len(parts.manifest.batch_plan) == 4
    for name in ("samples", "depths", "profiles", "tokens"):
        key = [k for k in ("sample_id", "track", "depth", "pos") if k in whole.table(name)]
        a, b = (run.table(name).sort_values(key).drop(columns=key).reset_index(drop=True) for run in (whole, parts))
        assert np.allclose(a.select_dtypes("number"), b.select_dtypes("number"), equal_nan=True)


def test_a_broken_import_is_continued(ingest, monkeypatch):
    x = np.random.default_rng(0).normal(size=(5, 4, 3, 4, 2))
    monkeypatch.setitem(dp.ingest.__globals__, "_ROWS", 30)
    real, calls = dp.ingest.__globals__["batch_tables"], []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setitem(dp.ingest.__globals__, "batch_tables", failing)
    with pytest.raises(KeyboardInterrupt):
        ingest(states=x, dims=DIMS)
    run = ingest(states=x, dims=DIMS)
    assert run.status == "complete"
    assert len(run.samples) == 4
    assert len(calls) == 3


def test_a_dump_of_a_looped_model_gives_the_numbers_of_its_run(ingest, tmp_path):
    from dynprobe.models import CsmConfig, CsmForCausalLM

    torch.manual_seed(0)
    model = CsmForCausalLM(CsmConfig.preset("nano")).eval()
    ids = torch.randint(0, 255, (2, 6))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_energies=True)
    dumped = ingest(
        states=torch.stack(out.hidden_states).numpy(), dims=DIMS, energy=out.energies.numpy(), token_ids=ids.numpy()
    )
    run = dp.run(model, ids.tolist(), max_new_tokens=0, out=tmp_path / "model")
    compared = 0
    for name in ("samples", "depths", "profiles"):
        keys = [k for k in ("sample_id", "depth", "pos") if k in run.table(name)]
        a, b = (r.table(name).sort_values(keys) for r in (run, dumped))
        for column in a.columns.intersection(b.columns):
            readout = column in ("nll", "ppl", "nll_prompt", "entropy", "margin", "energy_prev")
            if a[column].dtype.kind == "f" and not readout:
                assert np.allclose(a[column], b[column], equal_nan=True, rtol=1e-4, atol=1e-6), (name, column)
                compared += 1
    assert compared > 30
