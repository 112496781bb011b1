"""The function generator through a whole run: response map, relaxation, lock-in; batching moves none of them."""

import json

import numpy as np
import pytest

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.metrics import compute
from dynprobe.protocols._prepare import prepare
from dynprobe.runs._plot import Plots

LOCKIN = ["lockin_gain", "lockin_phase", "lockin_total", "lockin_snr", "lockin_p", "lockin_snr_total"]
RELAX = [f"relax_{axis}{tail}" for axis in ("depth", "token") for tail in ("", "_r2", "_n")]
SINE, IMPULSE = "alpha=0.3,kind=sine,period=4,layers=1", "alpha=0.3,kind=impulse,layers=0"


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """They have tests of their own, and drawing takes longer than a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plots, "write", lambda self: [])
        yield


@pytest.fixture(scope="module")
def run(llama, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("generator")

    def go(perturb, subject=llama, **settings):
        return dp.run(subject, texts, perturb=perturb, out=out, **{"max_new_tokens": 4, "states": True, **settings})

    return go


@pytest.fixture(scope="module")
def driven(run):
    return run(SINE)


@pytest.fixture(scope="module")
def pushed(run):
    return run(IMPULSE)


def forced(samples):
    return [s for s in samples.index if s.endswith("|perturbed.forced|0")]


def test_every_perturbation_has_its_response_map(run, table, trajectory):
    for spec in ("alpha=0.2,kind=dropout", SINE, IMPULSE):
        done = run(spec)
        depths, samples = table(done, "depths"), table(done, "samples")
        for sample in forced(samples):
            x, y = trajectory(done, sample.replace("perturbed.forced", "clean")), trajectory(done, sample)
            expected = np.linalg.norm(y - x, axis=-1) / np.linalg.norm(x, axis=-1)
            stored = depths.loc[sample]["response_rel"].unstack("pos").to_numpy()
            np.testing.assert_allclose(stored, expected, rtol=1e-5, atol=1e-9)
            assert ((stored == 0) == (expected == 0)).all()
            row = samples.loc[sample]
            if row["status"] == "ok":
                assert row["response_rel"] == pytest.approx(expected[-1, 1:].mean(), rel=1e-5)
        for arm in ("clean", "perturbed.free"):
            assert table(done, "depths", arm)["response_rel"].isna().all()


def test_an_impulse_answers_only_after_itself(pushed, table):
    depths = table(pushed, "depths")
    for sample, row in table(pushed, "samples", "perturbed.forced").iterrows():
        grid = depths.loc[sample]["response_rel"].unstack("pos").to_numpy()
        if row["n_prompt"] < 2:  # position 1 would be a generated token, and the default impulse is in prefill
            assert row["status"] == "not-written"
            assert not grid.any()
            continue
        assert not grid[0].any()
        assert not grid[:, 0].any()
        assert not grid[1, 2:].any()
        assert grid[1, 1] == pytest.approx(0.3, rel=1e-5)
        assert (grid[2:, 1:] > 0).all()
        assert row["n_asked"] == 1


def test_relaxation_rates_are_those_of_the_stored_states(pushed, table, trajectory):
    for sample, row in table(pushed, "samples", "perturbed.forced").iterrows():
        reasons = json.loads(row["reasons"] or "{}")
        if row["status"] == "not-written":
            assert row[["relax_depth", "relax_token"]].isna().all()
            assert reasons["relax_depth"] == reasons["relax_token"] == "empty"
            continue
        x, y = trajectory(pushed, sample.replace("perturbed.forced", "clean")), trajectory(pushed, sample)
        for axis in ("depth", "token"):
            own = compute(f"relax.{axis}/1", x.astype(np.float32), y.astype(np.float32), inject=1, pos=1)
            assert row[f"relax_{axis}"] == pytest.approx(float(own), rel=1e-4, nan_ok=True)
            assert row[f"relax_{axis}_r2"] == pytest.approx(own.extras["r2"], rel=1e-3, nan_ok=True)
            assert row[f"relax_{axis}_n"] == own.extras["n"]
            assert reasons.get(f"relax_{axis}") == own.reason
    assert table(pushed, "samples", "clean")[RELAX].isna().all(axis=None)


def test_the_lock_in_is_that_of_the_stored_states(driven, table, trajectory):
    profiles, seen = table(driven, "profiles"), 0
    for sample, row in table(driven, "samples", "perturbed.forced").iterrows():
        stored = profiles.loc[sample]
        x, y = trajectory(driven, sample.replace("perturbed.forced", "clean")), trajectory(driven, sample)
        if row["n_fed"] < 9:  # two periods after position 0
            assert stored[LOCKIN].isna().all(axis=None)
            assert {json.loads(r)["lockin_gain"] for r in stored["reason"]} == {"tokens<8"}
            assert row["lockin_n"] == 0
            continue
        seen += 1
        driven_tokens = slice(1, None)  # sin is 0 at tokens 4, 8, …: a drive read from the states might begin late
        assert row["lockin_n"] == (row["n_fed"] - 1) // 4 * 4
        for name in ("gain", "phase", "total", "snr"):
            own = compute(f"lockin.{name}/1", x[:, driven_tokens], y[:, driven_tokens], inject=2, period=4)
            if own.n_units != row["lockin_n"]:  # the last driven token stands on a zero of the sine
                continue
            np.testing.assert_allclose(stored[f"lockin_{name}"], own.profile, rtol=2e-3, atol=1e-5)
        gain = stored["lockin_gain"].to_numpy()
        assert (gain[:2] == 0).all()
        assert gain[2] == pytest.approx(1, rel=1e-6)
        assert stored["lockin_phase"].iloc[2] == pytest.approx(0, abs=1e-6)
        assert gain[3] > 0
        assert (stored["lockin_total"] >= gain - 1e-6).all()
    assert seen >= 3
    assert table(driven, "profiles", "clean")[LOCKIN].isna().all(axis=None)


def test_the_sine_is_written_with_the_phase_of_each_position(driven, table):
    for sample, row in table(driven, "samples", "perturbed.forced").iterrows():
        at = table(driven, "depths").loc[sample].xs(("resid", 2), level=("track", "depth"))["response_rel"]
        pos = at.index.to_numpy()
        expected = 0.3 * np.abs(np.sin(2 * np.pi * pos / 4)) * (pos >= 1)
        np.testing.assert_allclose(at, expected, atol=1e-6)
        assert row["alpha_relnorm"] == pytest.approx(expected[pos >= 1].mean(), rel=1e-5, nan_ok=True)


def test_alpha_zero_is_the_clean_arm_and_has_no_gain(run, table):
    done = run("alpha=0,kind=sine,period=4,layers=1")
    samples = table(done, "samples", "perturbed.forced")
    assert samples[["kl_clean_pert", "response_rel"]].fillna(0).eq(0).all(axis=None)
    for sample in samples.index[samples["n_fed"] >= 9]:
        rows = table(done, "profiles").loc[sample]
        assert rows[LOCKIN].isna().all(axis=None)
        assert {json.loads(r)["lockin_gain"] for r in rows["reason"]} == {"zero-denominator"}
    still = table(run("alpha=0,kind=impulse,layers=0"), "samples", "perturbed.forced")
    assert still["relax_depth"].isna().all()
    written = still[still["status"] == "ok"]
    assert {json.loads(r)["relax_depth"] for r in written["reasons"]} == {"no-response"}


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"padding": "left"}, {"padding": "none"}], ids=str)
@pytest.mark.parametrize("spec", [SINE, "alpha=0.3,kind=impulse,positions=last"])
def test_batches_and_padding_move_nothing(run, ending, table, settings, spec, tmp_path, texts):
    reference = run(spec, subject=ending, states=False, max_new_tokens=3)
    other = dp.run(ending, texts, perturb=spec, max_new_tokens=3, out=tmp_path, **settings)
    for name, columns in (("depths", ["response_rel"]), ("profiles", LOCKIN), ("samples", [*RELAX, "lockin_n"])):
        one, two = table(reference, name), table(other, name)
        two = two.loc[one.index]
        for column in (c for c in columns if c in one):
            a, b = one[column].to_numpy(np.float64), two[column].to_numpy(np.float64)
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=column)
            np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-4, err_msg=column)


def test_directions_and_contrasts_serve_both_kinds(run, table, tmp_path):
    np.save(tmp_path / "v.npy", np.arange(32.0) - 9)
    kl = {}
    for kind in ("impulse", "sine,period=4"):
        spec = f"alpha=0.5,layers=1,kind={kind}"
        for name, settings in (
            ("drawn", {}), ("file", {"direction": tmp_path / "v.npy"}),
            ("contrast", {"contrast": ("I love", "I hate")}),
        ):  # fmt: skip
            kl[kind, name] = table(
                run(spec, states=False, max_new_tokens=0, **settings), "samples", "perturbed.forced"
            )["kl_clean_pert"]
        by_hand = dp.Perturb(0.5, layers=1, kind=kind.split(",")[0], direction=np.arange(32.0) - 9,
                             period=4 if "sine" in kind else None)  # fmt: skip
        np.testing.assert_array_equal(
            table(run(by_hand, states=False, max_new_tokens=0), "samples", "perturbed.forced")["kl_clean_pert"],
            kl[kind, "file"],
        )
        for a, b in (("drawn", "file"), ("file", "contrast"), ("drawn", "contrast")):
            assert not np.allclose(kl[kind, a].dropna(), kl[kind, b].dropna())


def test_a_sine_may_act_beside_noise_and_a_second_sine_may_not(run, table, llama, texts):
    done = run([SINE, "alpha=0.2,layers=0"], states=False)
    long = table(done, "samples", "perturbed.forced").query("n_fed >= 9").index
    gain = table(done, "profiles").loc[long]["lockin_gain"]
    assert gain.notna().all()
    assert gain.xs(2, level="depth").ne(1).all()  # the reference is the drive, not what else moved there
    with pytest.raises(UsageError, match="once for each period"):
        prepare(llama, texts, {"perturb": [SINE, "alpha=0.1,kind=sine,period=8,layers=0"]})
    with pytest.raises(UsageError, match="another seed"):
        prepare(llama, texts, {"perturb": [IMPULSE, "alpha=0.1,layers=0"]})
    both = ["alpha=0.1,kind=impulse,layers=0,seed=5", "alpha=0.1,layers=0", SINE]
    assert len(prepare(llama, texts, {"perturb": both}).perturbs) == 3


def test_writes_at_updates_refer_to_the_drive(run, table):
    """What an attention output receives is not what the block then hands on."""
    done = run("alpha=0.5,kind=sine,period=4,layers=1,component=attn_out", states=False)
    long = table(done, "samples", "perturbed.forced").query("n_fed >= 9").index
    gain = table(done, "profiles").loc[long]["lockin_gain"]
    assert (gain.xs(1, level="depth") == 0).all()
    assert ((gain.xs(2, level="depth") > 0.2) & (gain.xs(2, level="depth") != 1)).all()


def test_columns_say_what_they_are(driven, pushed):
    for done, wanted in ((driven, [*LOCKIN, "lockin_n"]), (pushed, RELAX)):
        facts = done.columns().set_index("column")
        for name in [*wanted, "response_rel"]:
            row = facts.loc[[name]].iloc[0]
            assert row["id"].startswith(("lockin.", "relax.", "response.")), name
            assert row["unit"]
            assert row["digest"]
            assert row["aggregation"]
            assert row["description"]
    conditions = driven.conditions.set_index("condition_id")
    assert conditions.loc["perturbed.forced", "kind"] == "sine"
    assert json.loads(conditions.loc["perturbed.forced", "params"])[0].endswith("period=4")


def test_a_linear_model_has_its_closed_form(tmp_path, table):
    """Blocks h → h + A_l h: the lock-in of every depth is the product of the maps, to rounding."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.linear = nn.Linear(dim, dim, bias=False)

        def forward(self, h):
            return h + self.linear(h)

    class Model(nn.Module):
        def __init__(self, dim=16, layers=4):
            super().__init__()
            self.embed = nn.Embedding(50, dim)
            self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
            self.head = nn.Linear(dim, 50, bias=False)

        def forward(self, input_ids):
            h = self.embed(input_ids)
            for block in self.blocks:
                h = block(h)
            return self.head(h)

    model = Model().double().eval()
    v = np.random.default_rng(0).normal(size=16)
    v /= np.linalg.norm(v)
    p = dp.Perturb(0.3, kind="sine", period=5, scale="abs", layers=0, direction=v)
    ids = [[int(i) for i in np.random.default_rng(k).integers(1, 50, size=n)] for k, n in enumerate((31, 31))]
    done = dp.run(model, ids, perturb=p, max_new_tokens=0, out=tmp_path)
    whole, expected = np.eye(16), {1: (1.0, 1.0)}
    for depth, block in enumerate(list(model.blocks)[1:], start=2):
        whole = whole + block.linear.weight.detach().numpy() @ whole
        expected[depth] = (abs(v @ whole @ v), np.linalg.norm(whole @ v))
    for sample in table(done, "samples", "perturbed.forced").index:
        rows = table(done, "profiles").loc[sample].droplevel("track")
        for depth, (gain, total) in expected.items():
            assert rows.loc[depth, "lockin_gain"] == pytest.approx(gain, rel=1e-6)
            assert rows.loc[depth, "lockin_total"] == pytest.approx(total, rel=1e-6)
            assert rows.loc[depth, "lockin_p"] < 1e-30
