"""``recover``: arms that must be equal are equal, and every number of the summary follows from the tables."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.controllers.recovery import MODES
from dynprobe.errors import CalibrationError, InterruptedRunError, ModelError, UsageError
from dynprobe.probes import Calibration
from dynprobe.probes._dispatch import live_hooks
from dynprobe.prompts import Prompt
from dynprobe.protocols import Progress, RecoverConfig, calibrate, recover, watch
from dynprobe.protocols._recover_arms import Arm
from dynprobe.protocols._recover_rows import first_written, row_lines
from dynprobe.protocols._recover_summary import FREE_METRICS, _calm_of, acted_on, why_blind
from dynprobe.testing import tiny_llama

#: Of different lengths; the second has a text that follows.
PROMPTS = [
    Prompt("a", "Hello there, world"),
    Prompt("b", "A second prompt", continuation=" that goes on and on"),
    Prompt("c", "Hell and high water too"),
]
#: Tokens that are read or written; all but the last are fed.
NEW = 8
#: A detector that fires on a random model: one token above the 60 % quantile.
SETTINGS = {
    "perturb": "alpha=1.5,layers=1,phase=decode", "max_new_tokens": NEW, "m": 1, "m_off": 2, "q_lo": 0.4, "q_hi": 0.6,
    "budget": 1.0,
}  # fmt: skip
KEYS = {
    "samples": ["sample_id"], "tokens": ["sample_id", "pos"], "depths": ["sample_id", "pos", "track", "depth"],
    "profiles": ["sample_id", "track", "depth"],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """Pictures are drawn from the tables and tested with them."""
    from dynprobe.protocols import _execute

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_execute, "_pictures", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def heard():
    return []


@pytest.fixture(scope="module")
def study(llama, heard, tmp_path_factory):
    return recover(
        llama, PROMPTS, mode="slerp,sham,passive", out=tmp_path_factory.mktemp("study"),
        listener=heard.append, **SETTINGS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def samples(study):
    return study.samples.astype({"condition_id": str, "prompt_id": str, "sample_id": str})


def arm(frame, condition):
    return frame[frame["condition_id"] == condition].set_index("prompt_id").sort_index()


def of_arm(run, name, condition):
    """The rows of one arm in a table, under labels that do not name the arm."""
    table = run.table(name).astype({"sample_id": str})
    mine = table[table["sample_id"].str.split("|").str[1] == condition].copy()
    mine["sample_id"] = mine["sample_id"].str.split("|").str[0]
    return mine.sort_values(KEYS[name]).reset_index(drop=True)


def test_the_arms_are_there_and_the_hooks_are_not(study, llama, samples):
    there = set(samples["condition_id"])
    for road in ("forced", "free"):
        for name in ("clean", "perturbed", "perturbed+sham", "perturbed+passive", "clean+slerp"):
            assert f"{name}.{road}" in there
        for timing in ("", ".always", ".oracle"):
            assert {f"perturbed+slerp{timing}.{road}", f"perturbed+random:slerp{timing}.{road}"} <= there
    assert len(there) == 1 + 2 * (2 + 2 + 1 + 6)
    assert study.status == "complete"
    assert not live_hooks(llama.model)
    conditions = study.conditions.astype(str).set_index("condition_id")
    assert conditions.loc["perturbed+slerp.always.free", "controller"] == "slerp (always)"
    assert conditions.loc["perturbed+random:slerp.free", "arm"] == "random-control"
    assert conditions.loc["clean+slerp.forced", "arm"] == "iatrogenic"


@pytest.mark.parametrize("mode", ["sham", "passive"])
@pytest.mark.parametrize("road", ["forced", "free"])
def test_a_mode_that_writes_nothing_changes_nothing(study, mode, road):
    for name in ("tokens", "depths", "profiles"):
        one, other = of_arm(study, name, f"perturbed.{road}"), of_arm(study, name, f"perturbed+{mode}.{road}")
        pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_sham_and_passive_are_active_without_energy(samples):
    for mode in ("sham", "passive"):
        rows = arm(samples, f"perturbed+{mode}.forced")
        assert rows["duty"].max() > 0
        assert (rows["energy_written"] == 0).all()
        np.testing.assert_array_equal(rows["duty"], arm(samples, "perturbed.forced")["detector_duty"])


def test_random_directions_have_the_energy_of_the_mode_at_every_token(study, samples):
    actions = study.table("actions").astype({"sample_id": str, "site": str})
    parts = actions["sample_id"].str.split("|", expand=True)
    actions["prompt"], actions["condition"] = parts[0], parts[1]
    keys = ["prompt", "pos", "site"]
    compared = 0
    for road in ("forced", "free"):
        for timing in ("", ".always", ".oracle"):
            pair = [
                actions[(actions["condition"] == f"perturbed+{mode}{timing}.{road}") & (actions["energy"] > 0)]
                .set_index(keys)["energy"].sort_index() for mode in ("slerp", "random:slerp")
            ]  # fmt: skip
            assert len(pair[0]) > 0
            pd.testing.assert_series_equal(*pair, rtol=1e-6)
            compared += len(pair[0])
            one, other = (arm(samples, f"perturbed+{m}{timing}.{road}") for m in ("slerp", "random:slerp"))
            np.testing.assert_allclose(one["energy_written"], other["energy_written"], rtol=1e-6)
            assert (one["nll"] != other["nll"]).any() if road == "forced" else True
    assert compared > 60


def test_always_and_oracle_act_at_every_perturbed_token(samples):
    for timing in ("always", "oracle"):
        rows = arm(samples, f"perturbed+slerp.{timing}.forced")
        assert (rows["duty"] == 1).all()
        assert (rows["acted_after"] == 0).all()


def test_prompts_are_read_along_their_continuation_or_their_own_clean_text(study, llama):
    tokens = study.tokens.astype({"sample_id": str})
    prompts = study.prompts.astype({"prompt_id": str}).set_index("prompt_id")
    for prompt in PROMPTS:
        rows = tokens[tokens["sample_id"] == f"{prompt.prompt_id}|clean.forced|0"].sort_values("pos")
        n = len(prompts.loc[prompt.prompt_id, "token_ids"])
        read = list(rows["target_id"])[n - 1 :]
        if prompt.continuation is not None:
            assert read == list(llama.tokenizer(prompt.text + prompt.continuation)["input_ids"])[n : n + NEW]
        else:
            own = tokens[tokens["sample_id"] == f"{prompt.prompt_id}|clean.free|0"].sort_values("pos")
            assert read == list(own["target_id"])[n - 1 :]
        assert len(read) == NEW


def test_detector_numbers_follow_from_the_tables(study, samples):
    actions = study.table("actions").astype({"sample_id": str}).drop_duplicates(["sample_id", "pos"])
    for road in ("forced", "free"):
        said = study.summary["detector"][road]
        clean, pert = arm(samples, f"clean.{road}"), arm(samples, f"perturbed.{road}")
        above = [(p > c) + 0.5 * (p == c) for p in pert["signal_score"] for c in clean["signal_score"]]
        assert said["auc"]["value"] == pytest.approx(np.mean(above))
        assert said["duty_clean"] == pytest.approx(clean["detector_duty"].mean())
        assert said["duty_perturbed"] == pytest.approx(pert["detector_duty"].mean())
        firsts, fires, tokens = [], 0, 0
        for rows, keep in ((clean, False), (pert, True)):
            for _, row in rows.iterrows():
                seen = actions[(actions["sample_id"] == row["sample_id"]) & (actions["pos"] >= row["n_prompt"])]
                on = seen.sort_values("pos")["detected"].to_numpy(bool)
                assert len(on) == row["n_watched"] == NEW - 1
                assert on.mean() == pytest.approx(row["detector_duty"])
                starts = [i for i in range(len(on)) if on[i] and (i == 0 or not on[i - 1])]
                assert row["n_fires"] == len(starts)
                if keep:
                    firsts.append(starts[0] if starts else math.inf)
                else:
                    fires, tokens = fires + len(starts), tokens + len(on)
        assert said["fire_rate_perturbed"]["value"] == pytest.approx(np.isfinite(firsts).mean())
        assert said["latency_censored"] == sum(map(math.isinf, firsts))
        assert said["false_fires_per_1000"]["value"] == pytest.approx(1000 * fires / tokens)
        if said["latency_censored"] == 0:  # Kaplan–Meier without censoring: half have fired by then
            assert said["latency_median"] == sorted(firsts)[(len(firsts) + 1) // 2 - 1]
        blind = said["duty_perturbed"] < 0.05 or said["duty_perturbed"] <= said["duty_clean"]
        assert (said["blind"] == "DETECTOR_BLIND") == blind


def test_recovery_fractions_follow_from_the_samples(study, samples):
    fits = study.table("fits").astype({"condition_id": str, "metric": str}).set_index(["condition_id", "metric"])
    known, arms = 0, {name: arm(samples, name) for name in samples["condition_id"].unique()}
    for entry in study.summary["recovery"]:
        road, metric = entry["decode"], entry["metric"]
        pert, mine = (arms[name][metric].astype(float) for name in (f"perturbed.{road}", entry["condition"]))
        clean = arms[f"clean.{road}"].get(metric) if metric != "kl_clean_pert" else 0.0 * pert
        there = pd.concat([clean, pert, mine], axis=1).dropna()
        c, p, r = there.sum()
        stored = fits.loc[(entry["condition"], metric)]
        if entry["rf"] is None:
            assert entry["reason"]
            assert math.isnan(stored["rf"])
            continue
        known += 1
        rounding = 1e-6 * max(map(abs, (c, p, r))) / abs(p - c)  # single precision on disk, before the differences
        assert entry["rf"] == pytest.approx((p - r) / (p - c), rel=rounding, abs=rounding), (entry["condition"], metric)
        assert stored["rf"] == pytest.approx(entry["rf"], rel=1e-6)
        assert stored["acted_on"] == entry["acted_on"] == (metric in ("kappa_phase", "delta_rel_prev"))
    assert known > 40
    for entry in study.summary["arms"]:
        rows = arm(samples, entry["condition"])
        for name in ("duty", "energy_written", "entropy"):
            assert entry[name]["mean"] == pytest.approx(rows[name].astype(float).mean(), rel=1e-6)


def test_texts_that_never_are_calm_are_censored_and_not_left_out(study, samples):
    for entry in study.summary["arms"]:
        rows = arm(samples, entry["condition"])
        rows = rows[rows["acted_after"].notna()]
        calm, found = rows["recovered_after"].dropna(), entry["calm"]
        assert (found["n"], found["never"]) == (len(rows), len(rows) - len(calm))
        if len(rows) and len(calm) == len(rows):
            assert found["median"] == pytest.approx(float(np.median(calm)))
    frame = pd.DataFrame({
        "acted_after": [0.0, 2.0, 1.0, np.nan], "recovered_after": [1.0, np.nan, np.nan, np.nan], "n_watched": 9,
    })  # fmt: skip
    assert _calm_of(frame, 0)["exceeds"] == 8.0  # one of three came to rest, so no median is known
    assert _calm_of(frame, 0)["never"] == 2
    assert math.isnan(_calm_of(frame, 0)["median"])
    assert _calm_of(frame.iloc[3:], 0)["n"] == 0


def test_harm_follows_from_the_samples(study, samples):
    clean, once = arm(samples, "clean.forced")["nll"], arm(samples, "clean.oneforward")["nll"]
    floor = (clean - once).abs().max()
    assert study.summary["nll_floor"] == pytest.approx(float(floor), rel=1e-6)
    (harm,) = study.summary["iatrogenic"]
    mine = arm(samples, "clean+slerp.forced")["nll"]
    assert harm["value"] == pytest.approx(float((mine - clean > 3 * floor).mean()))
    assert harm["nll_change"] == pytest.approx(float((mine - clean).mean()), rel=1e-4, abs=1e-9)
    (changed,) = study.summary["changed"]
    texts = [arm(samples, name)["text"].astype(str) for name in ("clean.free", "clean+slerp.free")]
    assert changed["changed"] == int((texts[0] != texts[1]).sum())
    assert changed["low"] <= changed["value"] <= changed["high"]


def test_the_detector_is_told_before_any_mode_acts(study, heard):
    stages = [p.stage for p in heard]
    at = stages.index("detector")
    assert stages.count("detector") == 1
    assert heard[at - 1].stage == "batch"
    assert heard[at - 1].done == heard[at - 1].total // 2
    assert dp.runs._json.plain(heard[at].summary["detector"]) == study.summary["detector"]
    assert study.summary["detector"]["forced"]["runs_clean"] == len(PROMPTS)


def test_nll_of_the_own_text_is_that_of_the_bare_model(samples):
    rows = arm(samples, "clean.free")
    np.testing.assert_allclose(rows["nll"], rows["nll_bare"], atol=2e-5)
    assert (arm(samples, "perturbed.free")["nll_bare"] - arm(samples, "perturbed.free")["nll"]).abs().max() > 1e-3


def _near(a, b, tables=tuple(KEYS)):
    for name in tables:
        one, other = (run.table(name) for run in (a, b))
        one, other = (t.astype({"sample_id": str}).sort_values(KEYS[name]).reset_index(drop=True) for t in (one, other))
        assert list(one["sample_id"]) == list(other["sample_id"])
        for column in one:
            if one[column].dtype.kind == "f":
                loose = 2e-3 if column.startswith(("curv_", "kappa_xcorr")) else 1e-4
                np.testing.assert_allclose(
                    one[column], other[column], rtol=loose, atol=loose, err_msg=f"{name}.{column}"
                )


#: A study of few arms, in two batches.
SMALL = {**SETTINGS, "mode": "slerp", "timings": "detector", "batch_size": 2, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def small(llama, tmp_path_factory):
    return recover(llama, PROMPTS, out=tmp_path_factory.mktemp("small"), **SMALL)


def test_the_size_of_a_batch_changes_no_row(small, llama, tmp_path):
    together = recover(llama, PROMPTS, out=tmp_path, **{**SMALL, "batch_size": 3})
    assert together.manifest.id8 == small.manifest.id8
    _near(small, together)
    one, other = (run.samples.astype(str).set_index("sample_id").sort_index() for run in (small, together))
    for name in ("n_active", "n_fires", "text"):
        assert list(one[name]) == list(other[name])


class _StopAfter:
    def __init__(self, batches):
        self.batches = batches

    def __call__(self, progress):
        if progress.stage == "batch" and progress.done == self.batches:
            raise KeyboardInterrupt


def test_an_interrupted_study_continues(small, llama, tmp_path):
    with pytest.raises(InterruptedRunError):
        recover(llama, PROMPTS, listener=_StopAfter(1), out=tmp_path, **SMALL)
    heard: list[Progress] = []
    done = recover(llama, PROMPTS, listener=heard.append, out=tmp_path, **SMALL)
    assert done.status == "complete"
    assert len(done.manifest.batch_plan) == 4
    for name in (*KEYS, "actions", "fits"):
        one, other = (run.table(name).astype(str) for run in (small, done))
        order = list(one.columns)
        one, other = (t.sort_values(order).reset_index(drop=True) for t in (one, other))
        pd.testing.assert_frame_equal(one, other)
    one, other = ({k: v for k, v in run.summary.items() if k != "seconds"} for run in (small, done))
    assert one == other
    # What is said early is said over all prompts, also of those that another process ran.
    (told,) = [p.summary["detector"] for p in heard if p.stage == "detector"]
    assert told["forced"]["runs_clean"] == told["forced"]["runs_perturbed"] == len(PROMPTS)


def test_nothing_to_recover_from_gives_no_fraction(llama, tmp_path):
    settings = {**SETTINGS, "perturb": "alpha=0,layers=1,phase=decode", "max_new_tokens": 5, "decode": "forced"}
    run = recover(llama, PROMPTS[:3], mode="slerp", out=tmp_path, **settings)
    reasons = {(e["timing"], e["arm"], e["metric"]): (e["rf"], e["reason"]) for e in run.summary["recovery"]}
    for (timing, _, _), (rf, reason) in reasons.items():
        assert rf is None
        assert reason == ("no-effect" if timing != "detector" else "DETECTOR_BLIND") or timing == "replay"
    assert reasons["always", "recovered", "nll"] == (None, "no-effect")
    without = recover(llama, PROMPTS[:3], mode="slerp", out=tmp_path, **{**settings, "perturb": None})
    assert without.summary["recovery"] == []
    assert [e["condition"] for e in without.summary["arms"]] == ["clean.forced", "clean+slerp.forced"]
    assert "auc" not in without.summary["detector"]["forced"]
    assert without.summary["iatrogenic"][0]["n"] == 3


def test_a_blind_detector_gives_no_fraction_but_always_does(llama, tmp_path):
    settings = {**SETTINGS, "q_hi": 1.0, "m": 9, "max_new_tokens": 6, "decode": "forced"}
    run = recover(llama, PROMPTS[:3], mode="slerp,str", out=tmp_path, **settings)
    assert run.summary["detector"]["forced"]["blind"] == "DETECTOR_BLIND"
    assert run.summary["detector"]["forced"]["duty_perturbed"] == 0
    for entry in run.summary["recovery"]:
        waits = not any(name in entry["condition"] for name in (".always", ".oracle"))
        if "str." in entry["condition"]:  # it follows its own gate, which is judged by how often it acted
            duty = {kind: arm(run.samples.astype(str), f"{kind}+str.forced")["duty"].astype(float).mean()
                    for kind in ("perturbed", "clean")}  # fmt: skip
            waits = duty["perturbed"] < 0.05 or duty["perturbed"] <= duty["clean"] < 1
        assert (entry["reason"] == "DETECTOR_BLIND") == waits, entry["condition"]
        assert not waits or entry["rf"] is None
    assert any(entry["rf"] is not None for entry in run.summary["recovery"])


@pytest.fixture(scope="module")
def edited(llama, tmp_path_factory):
    """``edited(signal=values)``: a folder with this model's calibration, some signals changed."""
    usual = calibrate(llama)

    def make(**signals):
        changed = {name: np.full_like(usual.signals[name], value) for name, value in signals.items()}
        folder = tmp_path_factory.mktemp("calibrations") / "one"
        digest = f"{abs(hash(tuple(signals.items()))):012x}"[:12]
        Calibration(usual.tensors, {**usual.signals, **changed}, {**usual.header, "hash": digest}).save(folder)
        return folder

    return make


def test_what_a_guard_takes_back_is_counted_and_leaves_no_trace(llama, edited, tmp_path):
    folder = edited(nll_mean8=0.0)  # every eight tokens are unlikelier than that
    settings = {**SETTINGS, "perturb": None, "decode": "free", "max_new_tokens": 12, "calibration": str(folder)}
    run = recover(llama, PROMPTS[:3], mode="guard", out=tmp_path, **settings)
    rows = arm(run.samples.astype({"condition_id": str, "prompt_id": str}), "clean+guard.free")
    assert (rows["n_restarts"] == 2).all()
    assert (rows["n_taken_back"] == 16).all()
    assert (rows["duty"] == 8 / 11).all()  # tokens 0 … 7 of the eleven that are fed
    assert (rows["energy_written"] == 0).all()
    np.testing.assert_allclose(rows["nll"], rows["nll_bare"], atol=2e-5)  # the books of what was read went back as well
    (changed,) = run.summary["changed"]
    clean = arm(run.samples.astype({"condition_id": str, "prompt_id": str}), "clean.free")
    assert changed["changed"] == int((clean["text"].astype(str) != rows["text"].astype(str)).sum()) > 0
    tokens = run.tokens.astype({"sample_id": str})
    for _, row in rows.iterrows():
        mine = tokens[tokens["sample_id"] == row["sample_id"]]
        assert sorted(mine["pos"]) == list(range(int(row["n_prompt"]) + 11))


def test_a_guard_is_judged_by_its_own_trigger(llama, edited, tmp_path):
    never = edited(nll_mean8=99.0)
    settings = {**SETTINGS, "decode": "free", "max_new_tokens": 8}
    run = recover(llama, PROMPTS[:2], mode="guard", out=tmp_path, calibration=str(never), **settings)
    said = {entry["reason"] for entry in run.summary["recovery"]}
    rows = run.samples
    if rows[rows["condition_id"] == "perturbed+guard.free"]["n_restarts"].sum() == 0:
        assert said == {"DETECTOR_BLIND"}  # it never acted, whatever the detector saw
    assert run.manifest.calibration_hash == dp.probes.load_calibration(never).hash


def test_hybrid_and_its_control_differ_in_direction_alone(llama, edited, tmp_path):
    folder = edited(nll_mean8=0.0)
    settings = {**SETTINGS, "decode": "free", "max_new_tokens": 9, "timings": ("always",), "calibration": str(folder)}
    run = recover(llama, PROMPTS[:2], mode="HYBRID_RECOVERY", out=tmp_path, **settings)
    frame = run.samples.astype({"condition_id": str, "prompt_id": str})
    mine, control = arm(frame, "perturbed+hybrid.always.free"), arm(frame, "perturbed+random:hybrid.always.free")
    assert (mine["n_restarts"] > 0).all()
    assert (control["n_restarts"] > 0).all()
    np.testing.assert_allclose(mine["energy_written"], control["energy_written"], rtol=1e-6)
    controllers = set(run.table("actions")["controller"].astype(str))
    assert {"recovery.hybrid/1", "recovery.random:hybrid/1"} <= controllers


def test_calibrations_are_checked_before_anything_is_written(llama, edited, tmp_path):
    other = tiny_llama(seed=3)
    folder = calibrate(other, [[5, 6, 7, 8, 9, 3, 2, 8], [4, 3, 2, 1, 8, 7]]).save(tmp_path / "other")
    out = tmp_path / "runs"
    with pytest.raises(CalibrationError, match="was made with weights"):
        recover(llama, PROMPTS, mode="slerp", calibration=str(folder), out=out, **SETTINGS)
    with pytest.raises(CalibrationError, match="does not hold a readable calibration"):
        recover(llama, PROMPTS, mode="slerp", calibration=str(tmp_path / "none"), out=out, **SETTINGS)
    with pytest.raises(CalibrationError, match="degenerate-band"):
        recover(llama, PROMPTS, mode="slerp", calibration=str(edited(kappa_phase_zmax=1.0)), out=out, **SETTINGS)
    with pytest.raises(CalibrationError, match="has no tokenizer to read the calibration texts"):
        recover(other, [[5, 6, 7, 8], [4, 3, 2]], mode="slerp", out=out, **SETTINGS)
    assert not out.exists()
    run = recover(
        other, [[5, 6, 7, 8], [4, 3, 2]], mode="slerp", decode="forced", calibration=folder, out=out, **SETTINGS
    )
    assert run.manifest.calibration_hash == dp.probes.load_calibration(folder).hash
    assert (run.path / "calibration" / run.manifest.calibration_hash).is_dir()


def test_a_calibration_counts_by_what_it_holds(edited, tmp_path):
    same = [RecoverConfig(calibration=str(edited(entropy=1.0))).identity() for _ in range(2)]
    assert same[0] == same[1]
    assert RecoverConfig(calibration=str(edited(entropy=2.0))).identity() != same[0]


def test_modes_by_name():
    assert RecoverConfig(mode="slerp, HYBRID_RECOVERY").mode == ("slerp", "hybrid")
    greedy, sampled = RecoverConfig(mode="all").mode, RecoverConfig(mode="all", temperature=0.8).mode
    assert set(sampled) - set(greedy) == {"sampling", "recync"}
    assert "dom" not in sampled  # it has operators of its own, from a file
    assert "none" not in greedy
    with pytest.raises(UsageError, match="Did you mean 'slerp'"):
        RecoverConfig.build(mode="slrep")
    with pytest.raises(UsageError, match="name that mode"):
        RecoverConfig.build(mode="random:slerp")
    with pytest.raises(UsageError, match=r"q_lo=0\.9 must lie below q_hi=0\.5"):
        RecoverConfig.build(q_lo=0.9, q_hi=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "recync"}, "no effect under greedy decoding"),
        ({"mode": "sampling"}, "no effect under greedy decoding"),
        ({"mode": "guard", "decode": "forced"}, "nothing is left to do for mode guard"),
        ({"mode": "passive", "perturb": None}, "nothing is left to do for mode passive"),
        ({"mode": "slerp", "perturb": "alpha=0.1,scale=isokl"}, "scales that need no other text"),
        ({"mode": "dom"}, "give operators="),
        ({"mode": "slerp", "site": "layers=9"}, "layers 0…2"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(llama, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        recover(llama, PROMPTS[:2], out=tmp_path / "runs", **{**SETTINGS, **settings})
    assert not (tmp_path / "runs").exists()


def test_a_model_without_a_cache_is_refused(llama, tmp_path):
    class Plain(type(llama.model)):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    model = Plain(llama.model.config)
    model.load_state_dict(llama.model.state_dict())
    with pytest.raises(ModelError, match="takes no cache"):
        recover(model, [[5, 6, 7, 8], [4, 3, 2]], mode="slerp", out=tmp_path / "runs", **SETTINGS)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("mode", "seen", "perturbed", "clean", "blind"),
    [
        ("slerp", None, 0.0, 0.0, False), ("slerp", "DETECTOR_BLIND", 0.9, 0.0, True),
        ("str", "DETECTOR_BLIND", 0.5, 0.2, False), ("str", None, 0.48, 0.65, True), ("str", None, 0.04, 0.0, True),
        ("str", None, 1.0, 1.0, False), ("guard", None, 0.3, 0.1, False), ("guard", None, 0.3, float("nan"), True),
    ],
)  # fmt: skip
def test_who_is_judged_by_the_detector_and_who_by_its_own_trigger(mode, seen, perturbed, clean, blind):
    duty = {f"perturbed+{mode}": perturbed, f"clean+{mode}": clean}
    for name in (f"perturbed+{mode}", f"perturbed+random:{mode}"):
        found = why_blind(Arm(name, "free", True, mode), {"blind": seen}, duty.__getitem__)
        assert (found == "DETECTOR_BLIND") == blind, name
        for share, said in ((1.0, None), (0.01, None), (0.0, "no-action")):  # noise in the prompt leaves an oracle none
            timed = duty | {f"perturbed+{mode}.oracle": share}
            assert why_blind(Arm(f"{name}.oracle", "free", True, mode, "oracle"), {}, timed.__getitem__) == said


def test_what_a_mode_selects_by_itself_is_no_evidence():
    free = {mode: [m for m in FREE_METRICS if acted_on(m, "kappa_phase_zmax", mode)] for mode in MODES}
    step = ["kappa_phase", "delta_rel_prev"]
    assert free["slerp"] == step
    assert free["guard"] == free["hybrid"] == ["nll_bare", "repetition", *step]
    assert free["sampling"] == ["nll_bare", *step]
    assert free["recync"] == free["str"] == free["dom"] == [*step, "limen_ct"]
    assert not any(acted_on(m, "entropy", mode) for mode in MODES for m in ("nll", "kl_clean_pert", "kappa_geom"))


def test_latencies_count_from_the_first_written_token():
    perturbs = [dp.Perturb.parse("alpha=1,positions=12:"), dp.Perturb.parse("alpha=1,positions=14:")]
    assert first_written(perturbs, 10, 20) == 2
    assert first_written(perturbs[1:], 10, 3) == 3  # beyond the end: nothing is written
    assert first_written([dp.Perturb.parse("alpha=1,phase=prefill")], 10, 5) == 5
    assert first_written([], 10, 5) == 5


def test_a_signal_with_a_window_cannot_be_calm_before_it_is_over(llama):
    from dynprobe.protocols._arms import Text

    text = Text("x", (1, 2), (3, 4, 5, 6, 7))
    actions = pd.DataFrame({"row": 0, "pos": [2, 3, 4, 5], "active": [False, True, True, True], "energy": 0.0})
    watched = pd.DataFrame({"row": 0, "pos": [2, 3, 4, 5], "signal": [9.0, 9, 9, 1], "active": [False] * 4})
    for signal, wanted in (("kappa_phase_zmax", 2.0), ("limen_ct", 0.0)):
        row = row_lines([text], actions, watched, [[]], signal=signal, m=2, level=5.0).iloc[0]
        assert (row["acted_after"], row["recovered_after"]) == (1.0, wanted)
        assert (row["duty"], row["signal_score"]) == (0.75, 9.0)
    calm = row_lines([text], actions.assign(active=False), watched, [[]], signal="entropy", m=2, level=5.0).iloc[0]
    assert math.isnan(calm["acted_after"])
    assert math.isnan(calm["recovered_after"])


def test_watching_is_what_the_study_does(study, llama):
    moments = list(watch(llama, PROMPTS, mode="slerp", **SETTINGS))
    assert not live_hooks(llama.model)
    samples = study.samples.astype({"sample_id": str}).set_index("sample_id")
    name = "a|perturbed+slerp.free|0"
    n = int(samples.loc[name, "n_prompt"])
    assert [m.pos for m in moments] == list(range(n - 1, n + NEW - 1))
    assert samples.loc[name, "text"].startswith(moments[-1].text)
    assert "".join(m.token for m in moments[1:]) == moments[-1].text
    actions = study.table("actions").astype({"sample_id": str, "site": str})
    stored = actions[actions["sample_id"] == name].set_index("pos").sort_index()
    tokens = study.tokens.astype({"sample_id": str})
    kappa = tokens[tokens["sample_id"] == name].set_index("pos")["kappa_phase"]
    calibration = calibrate(llama)
    low, high = (calibration.quantile("kappa_phase", q) for q in (0.5, 0.99))
    for m in moments:
        row = stored.loc[m.pos]
        assert m.signal == pytest.approx(row["signal"], rel=1e-4)
        assert (m.detected, m.active) == (row["detected"], row["active"])
        assert m.energy == pytest.approx(row["energy"], rel=1e-4)
        assert m.sites == ((row["site"],) if row["site"] else ())
        assert m.kappa == pytest.approx(kappa[m.pos], rel=1e-4)
        assert m.readiness == pytest.approx(1 - min(max((m.kappa - low) / (high - low), 0), 1))
    assert any(m.active for m in moments)


def test_watching_can_stop_and_shows_what_is_taken_back(llama, edited):
    looking = watch(llama, PROMPTS, mode="slerp", **SETTINGS)
    next(looking)
    looking.close()
    assert not live_hooks(llama.model)
    folder = edited(nll_mean8=0.0)
    moments = list(watch(llama, PROMPTS, mode="guard", calibration=str(folder), **SETTINGS))
    assert moments[-1].restarts == 2
    assert any(after.pos < before.pos for before, after in itertools.pairwise(moments))
    assert len(moments[-1].text) == NEW - 1  # the last token is not fed
    with pytest.raises(UsageError, match="one mode can be watched"):
        watch(llama, PROMPTS, mode="slerp,shrink", **SETTINGS)


def test_a_controller_of_ones_own_is_a_mode(tmp_path):
    class Halve(dp.Controller):
        reads = writes = "layers=1"

        def act(self, state, site, seen, memory):
            return 0.9 * state

    settings = {
        "perturb": "alpha=0.9,layers=1,phase=decode", "limit": 2, "max_new_tokens": 8, "decode": "forced",
        "timings": "detector", "out": tmp_path,
    }  # fmt: skip
    run = dp.recover("tiny-llama", mode=[Halve(), "sham"], **settings)
    (arm,) = (a for a in run.summary["arms"] if a["condition"].startswith("perturbed+Halve"))
    assert arm["duty"]["mean"] == 1.0
    # Each write takes a tenth of the state: Σ‖u‖²/‖h‖² is a hundredth per token that is fed after the prompt.
    assert arm["energy_written"]["mean"] == pytest.approx(0.01 * 7, rel=1e-5)
    (control,) = (a for a in run.summary["arms"] if a["condition"].startswith("perturbed+random:Halve"))
    assert control["energy_written"]["mean"] == pytest.approx(0.07, rel=1e-5)
    assert dp.recover("tiny-llama", mode=[Halve, "sham"], **settings).path == run.path  # the same study again
    with pytest.raises(UsageError, match=r"a mode is a name or a dp\.Controller, not int"):
        dp.recover("tiny-llama", mode=3, **settings)
