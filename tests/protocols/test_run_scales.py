"""Every scale and kind through a whole run, places that restrict the write, and what is refused."""

import math

import numpy as np
import pytest

import dynprobe as dp
from dynprobe.errors import SiteError, SpecError, UsageError
from dynprobe.protocols._prepare import prepare

UNITS = ["alpha_relnorm", "alpha_coordstd", "alpha_mad", "alpha_abs", "alpha_cos"]


@pytest.fixture(scope="module")
def texts(texts):
    return [*texts[:2], "Four"]  # no prompt begins like its neighbour, or interp would move nothing


@pytest.fixture(scope="module")
def run(llama, texts, tmp_path_factory):
    """``run(spec, …)``: the forced arm of a prefill-only run, indexed by sample."""
    out = tmp_path_factory.mktemp("scales")

    def go(perturb, **settings):
        return dp.run(llama, texts[:3], perturb=perturb, out=out, **{"max_new_tokens": 0, **settings})

    return go


@pytest.fixture(scope="module")
def vector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("directions")
    v = np.random.default_rng(0).standard_normal(32)
    np.save(folder / "v.npy", v)
    from safetensors.numpy import save_file

    save_file({"direction": v.astype(np.float32), "other": v[:3]}, folder / "v.safetensors")
    return folder


@pytest.mark.parametrize(
    ("spec", "unit", "value"),
    [
        ("alpha=0.2,scale=relnorm", "alpha_relnorm", 0.2),
        ("alpha=0.2,scale=coordstd", "alpha_coordstd", 0.2),
        ("alpha=0.2,scale=mad", "alpha_mad", 0.2),
        ("alpha=0.2,scale=abs", "alpha_abs", 0.2),
        ("alpha=0.2,scale=cov", None, None),
        ("alpha=0.2,scale=interp", None, None),
        ("alpha=3,scale=neftune", None, None),
        ("alpha=0.2,kind=scale", "alpha_relnorm", 0.2),
        ("alpha=0.2,kind=rotate", "alpha_cos", math.cos(0.2)),
        ("alpha=0.2,kind=dropout", None, None),
    ],
)
def test_scales_and_kinds(run, spec, unit, value, table):
    """One α each; its unit of the passport holds the α that was asked for, exactly or in the mean over the noise."""
    done = run(spec)
    forced = table(done, "samples", "perturbed.forced")
    written = forced[forced["n_prompt"] > 1]
    assert (written["status"] == "ok").all()
    assert written[UNITS].notna().all(axis=None)
    assert (written["kl_clean_pert"] > 0).all()
    assert written["kappa_phase_d"].ne(0).all()
    if unit in ("alpha_relnorm", "alpha_cos"):
        np.testing.assert_allclose(written[unit], value, rtol=1e-5)
    elif unit is not None:
        np.testing.assert_allclose(written[unit].mean(), value, rtol=0.1)
    condition = done.conditions.set_index("condition_id").loc["perturbed.forced"]
    own = spec.split("kind=")[1] if "kind=" in spec else None
    assert condition["kind"] == (own or "gaussian")
    if own:  # a factor, an angle, a probability: no noise scale gives it its unit
        assert condition["scale"] is None or condition["scale"] != condition["scale"]
    else:
        assert condition["scale"] == spec.split("scale=")[1]


def test_alpha_zero_is_the_clean_arm(run, table):
    for spec in ("alpha=0,scale=coordstd", "alpha=0,kind=rotate", "alpha=0,scale=isokl", "alpha=0,scale=interp"):
        forced = table(run(spec), "samples", "perturbed.forced")
        effects = ["kl_clean_pert", "flip_rate", "nll_d", "kappa_phase_d", "limen_ct_d"]
        assert forced[effects].fillna(0).eq(0).all(axis=None), spec
        assert forced["alpha_abs"].fillna(0).eq(0).all()


def test_interp_with_alpha_one_is_the_state_of_the_next_prompt(run, table, trajectory):
    done = run("alpha=1,scale=interp,layers=1", states=True, batch_size=2)  # the neighbour may lie in another batch
    ids = [f"{p}|clean|0" for p in done.prompts["prompt_id"].astype(str)]
    for mine, donor in zip(ids, [*ids[1:], ids[0]], strict=True):
        pushed, clean = trajectory(done, mine.replace("clean", "perturbed.forced"))[2], trajectory(done, mine)[2]
        theirs = trajectory(done, donor)[2]
        at = np.minimum(np.arange(len(pushed)), len(theirs) - 1)  # beyond its end, its last state
        np.testing.assert_allclose(pushed[1:], theirs[at][1:], atol=1e-5)
        np.testing.assert_array_equal(pushed[0], clean[0])


@pytest.mark.parametrize("target", [1e-9, 0.05])
def test_isokl_reaches_its_target(run, target, table):
    done = run(f"alpha={target},scale=isokl", max_new_tokens=2)
    forced = table(done, "samples", "perturbed.forced")
    assert (forced["status"] == "ok").all()
    np.testing.assert_allclose(forced["kl_clean_pert"], target, rtol=0.05)
    free = table(done, "samples", "perturbed.free")  # the strength that was solved for on the clean text
    np.testing.assert_allclose(free["alpha_relnorm"], forced["alpha_relnorm"], rtol=0.05)
    assert forced["alpha_relnorm"].nunique() == len(forced)


def test_isokl_says_where_its_target_is_out_of_reach(run, table):
    done = run("alpha=60,scale=isokl", max_new_tokens=2)
    forced = table(done, "samples", "perturbed.forced")
    assert (forced["status"] == "isokl-unreached").all()
    summary = done.summary["conditions"]["perturbed.forced"]
    assert summary["status"] == {"isokl-unreached": 3}
    assert "kl_clean_pert" not in summary  # a row that was not pushed does not thin out a mean


def test_directions_from_files_contrasts_and_objects(run, vector, llama, table):
    kl = {}
    for name, perturb, settings in (
        ("npy", "alpha=0.5,kind=direction", {"direction": str(vector / "v.npy")}),
        ("safetensors", "alpha=0.5,kind=direction", {"direction": vector / "v.safetensors"}),
        ("object", dp.Perturb(0.5, kind="direction", direction=np.load(vector / "v.npy")), {}),
        ("minus", "alpha=-0.5,kind=direction", {"direction": str(vector / "v.npy")}),
        ("contrast", "alpha=0.5,kind=direction,layers=1", {"contrast": ("I love it", "I hate it")}),
    ):
        forced = table(run(perturb, **settings), "samples", "perturbed.forced")
        np.testing.assert_allclose(forced["alpha_relnorm"].dropna(), 0.5, rtol=1e-5)
        kl[name] = forced["kl_clean_pert"].to_numpy()
    np.testing.assert_allclose(kl["npy"], kl["safetensors"], rtol=1e-4)
    np.testing.assert_array_equal(kl["npy"], kl["object"])
    for other in ("minus", "contrast"):
        assert not np.allclose(kl["npy"], kl[other])
    last = [dp.capture(llama, [t]).at(layer=1, pos=-1)[0].double().numpy() for t in ("I love it", "I hate it")]
    by_hand = dp.Perturb(0.5, kind="direction", layers=1, direction=last[0] - last[1])
    np.testing.assert_allclose(
        table(run(by_hand), "samples", "perturbed.forced")["kl_clean_pert"], kl["contrast"], rtol=1e-4
    )


def test_two_perturbations_act_together(run, table, trajectory, llama):
    specs = ["alpha=0.2,layers=0", "alpha=0.1,layers=2,seed=3"]
    done = run(specs, states=True)
    import json

    params = json.loads(done.conditions.set_index("condition_id").loc["perturbed.forced", "params"])
    assert [p.split(",")[0] for p in params] == ["alpha=0.2", "alpha=0.1"]
    for sample, row in table(done, "samples", "perturbed.forced").iterrows():
        ids = [int(i) for i in table(done, "tokens").loc[sample]["token_id"]]
        tape = dp.capture(llama, [ids], perturb=specs, row_keys=[row["prompt_id"]])
        for depth, state in enumerate(trajectory(done, sample)):
            np.testing.assert_allclose(state, tape.states[depth][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "moved"),
    [
        ("positions=last,phase=prefill", lambda pos, n: pos >= n - 1),
        ("phase=decode", lambda pos, n: pos >= n),
        ("positions=3:5", lambda pos, n: pos >= 3),
        ("positions=0", lambda pos, n: pos >= 0),
    ],
)
def test_the_place_decides_what_is_written(run, place, moved, table):
    done = run(f"alpha=0.3,layers=1,{place}", max_new_tokens=4)
    depths, samples = table(done, "depths"), table(done, "samples", "perturbed.forced")
    for sample, row in samples.iterrows():
        at = depths.loc[sample].xs(("resid", 2), level=("track", "depth"))
        pos = at.index.to_numpy()
        if place == "positions=3:5":
            expected = (pos >= 3) & (pos < 5)
        elif place == "positions=0":
            expected = pos == 0
        elif place == "phase=decode":
            expected = pos >= row["n_prompt"]
        else:
            expected = pos == row["n_prompt"] - 1
        np.testing.assert_array_equal(at["diverge_angle"].to_numpy() > 0, expected)
        later = depths.loc[sample].xs(("resid", 3), level=("track", "depth"))["diverge_angle"].to_numpy() > 0
        np.testing.assert_array_equal(later, moved(pos, row["n_prompt"]))
        # KL is a mean from the first position on at which an effect can show; position 0 never counts.
        kl = table(done, "tokens").loc[sample]["kl_clean_pert"].to_numpy()
        first = max(int(np.argmax(expected)), 1)
        assert row["kl_clean_pert"] == pytest.approx(kl[first:].mean(), rel=1e-5)


def test_a_row_without_a_place_to_write_is_flagged(run, table):
    import json

    done = run("alpha=0.3,positions=10:", max_new_tokens=2)  # "Four" has 4 tokens
    forced = table(done, "samples", "perturbed.forced")
    short = forced["n_fed"] <= 10
    assert short.sum() == 1
    assert set(forced.loc[short, "status"]) == {"not-written"}
    assert set(forced.loc[~short, "status"]) == {"ok"}
    assert forced.loc[short, UNITS].isna().all(axis=None)
    reasons = json.loads(forced.loc[short, "reasons"].iloc[0])
    assert reasons["kl_clean_pert"] == reasons["alpha_relnorm"] == "empty"
    entry = done.summary["conditions"]["perturbed.forced"]["kl_clean_pert"]
    assert (entry["n"], entry["missing"]) == (2, 1)
    assert entry["reasons"] == {"empty": 1}


@pytest.mark.parametrize("component", ["attn_out", "mlp_out", "resid_pre"])
def test_writes_at_updates_and_inputs(run, component, table, trajectory):
    done = run(f"alpha=0.3,layers=2,component={component}", states=True, where="layers=all")
    forced = table(done, "samples", "perturbed.forced")
    into = 2 if component == "resid_pre" else 3  # the first depth whose state is another one
    for sample, row in forced.iterrows():
        if row["n_fed"] < 2:
            continue
        x, y = trajectory(done, sample.replace("perturbed.forced", "clean")), trajectory(done, sample)
        changed = np.abs(x - y).max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(changed, np.arange(4) >= into)
        assert row["alpha_relnorm"] == pytest.approx(0.3, rel=1e-5)
        assert row["kappa_phase_d_inj"] != 0
        if into == 3:
            assert row["kappa_phase_d_inj"] == pytest.approx(2 * row["kappa_phase_d"], rel=1e-4)  # the last of 2 steps
            assert math.isnan(row["alpha_coordstd"])  # the calibration knows the residual stream only


def test_updates_and_states_are_stored_under_their_names(llama, texts, tmp_path, table):
    where = "layers=1,component=attn_out+mlp_out+resid_pre+resid_post"
    run = dp.run(llama, texts[:2], max_new_tokens=0, states=True, where=where, out=tmp_path)
    keys, _ = run.states()
    labels = keys[["track", "depth", "layer", "component"]].drop_duplicates().astype({"track": str, "component": str})
    assert sorted(map(tuple, labels.to_numpy())) == [
        ("attn_out", 2, 1, "attn_out"), ("mlp_out", 2, 1, "mlp_out"),
        ("resid", 1, 0, "resid_pre"), ("resid", 2, 1, "resid_post"),
    ]  # fmt: skip
    sample = run.samples["sample_id"].iloc[0]
    pick = {t: run.states(sample_id=sample, track=t)[1] for t in ("attn_out", "mlp_out")}
    before, after = (run.states(sample_id=sample, track="resid", depth=d)[1] for d in (1, 2))
    np.testing.assert_allclose(before + pick["attn_out"] + pick["mlp_out"], after, atol=1e-5)
    depths = table(run, "depths")
    rows = depths.loc[sample].xs(("mlp_out", 2), level=("track", "depth"))
    np.testing.assert_allclose(rows["norm"], np.linalg.norm(pick["mlp_out"], axis=-1), rtol=1e-5)
    # A state that leaves one block and enters the next is stored once.
    both = prepare(llama, texts[:1], {"states": True, "where": "component=resid_pre+resid_post"})
    assert len(both.saved) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturb": ["alpha=0.1,layers=1", "alpha=0.2,layers=50%,scale=mad"]}, "another seed"),
        ({"perturb": ["alpha=0.1", "alpha=0.1,kind=rotate"]}, "another seed"),
        ({"perturb": ["alpha=0.1,scale=isokl", "alpha=0.1,seed=1"]}, "isokl solves for one strength"),
        ({"perturb": "alpha=0.1,kind=direction"}, "--direction FILE or --contrast"),
        ({"perturb": "alpha=0.1,kind=direction", "direction": "a.npy", "contrast": ("a", "b")}, "one of them"),
        ({"perturb": "alpha=0.1", "contrast": ("a", "b")}, "no perturbation needs it"),
        ({"perturb": "alpha=0.1,kind=direction,layers=0:2", "contrast": ("a", "b")}, "write at one layer"),
        ({"perturb": "alpha=0.1,kind=direction,layers=1", "contrast": ("a", "a")}, "texts that differ"),
        ({"perturb": "alpha=0.1,kind=direction", "direction": "nowhere.npy"}, "cannot be read"),
        ({"perturb": "alpha=0.1,kind=direction", "direction": "v.txt"}, r"\.npy or \.safetensors"),
        ({"perturb": "alpha=0.1,scale=coordstd,component=attn_out"}, "residual stream"),
        ({"perturb": "alpha=0.1,phase=decode", "max_new_tokens": 1}, "generated tokens only"),
        ({"perturb": "alpha=0.1,iterations=3"}, "layers and no iterations"),
        ({"perturb": lambda h, site: h}, "cannot store a function"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_new_token": 3}, "Did you mean 'max_new_tokens'"),
        ({"where": "layers=9"}, "layers 0…2"),
        ({"dtype": "float31"}, "float32"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(llama, texts, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        dp.run(llama, texts[:2], out=tmp_path / "runs", **settings)
    assert not (tmp_path / "runs").exists()


def test_twins_are_told_by_what_they_draw(llama, texts):
    for specs in (
        ["alpha=0.1,phase=prefill", "alpha=0.1,phase=decode"], ["alpha=0.1,kind=scale", "alpha=0.2,kind=scale"],
        ["alpha=0.1", "alpha=0.1,kind=dropout"], ["alpha=0.1,layers=0", "alpha=0.1,layers=1"],
    ):  # fmt: skip
        assert len(prepare(llama, texts[:2], {"perturb": specs}).perturbs) == 2


def test_wrong_words_need_no_model():
    with pytest.raises(SpecError, match=r"(?s)Did you mean 'relnorm'.*\^"):
        dp.run("no-such-model", perturb="alpha=0.1,scale=relnrom")
    with pytest.raises(UsageError, match=r"no prompt of category 'fictual'.*Did you mean 'factual'"):
        dp.run("no-such-model", category="fictual")


def test_a_direction_of_another_width_is_refused(llama, texts, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones(33))
    np.save(tmp_path / "zero.npy", np.zeros(32))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object))
    for name, message in (("wide", "33 entries.*width 32"), ("zero", "non-zero"), ("pickle", "pickled objects")):
        with pytest.raises(UsageError, match=message):
            prepare(llama, texts[:2], {"perturb": "alpha=1,kind=direction", "direction": tmp_path / f"{name}.npy"})
    with pytest.raises(SiteError):
        prepare(llama, texts[:2], {"perturb": "alpha=1,layers=3"})
    with pytest.raises(UsageError, match="at least two prompts"):
        prepare(llama, texts[:1], {"perturb": "alpha=0.1,scale=interp"})
