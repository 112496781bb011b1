"""``dynprobe recover``: the detector first, then what came back; refusals; the live view."""

import json
import re
import shutil

import numpy as np
import pytest

import dynprobe as dp
from dynprobe.cli import _recover_commands, _render_recover, _render_watch
from dynprobe.cli._progress import Listener
from dynprobe.protocols import Moment, Progress, _execute

TEXTS = ("--prompt", "Hello there", "--prompt", "And so on", "--prompt", "Third thing")
#: A detector that fires on a random model.
LOOP = (
    "--perturb", "alpha=1.5,layers=1,phase=decode", "--max-new-tokens", 7, "--m", 1, "--m-off", 2, "--q-lo", 0.4,
    "--q-hi", 0.6, "--budget", 1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """Pictures are drawn from the tables and tested with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_execute, "_pictures", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def finished_study(model, tmp_path_factory):
    """A study on disk, so that one run serves what reads it."""
    return dp.recover(
        str(model), ["Hello there", "And so on", "Third thing"], mode="slerp,passive", timings="detector,always",
        perturb="alpha=1.5,layers=1,phase=decode", max_new_tokens=7, m=1, m_off=2, q_lo=0.4, q_hi=0.6, budget=1.0,
        quiet=True, out=tmp_path_factory.mktemp("studies"),
    ).path  # fmt: skip


@pytest.fixture
def study(finished_study, here):
    shutil.copytree(finished_study, here / "runs" / finished_study.name)
    return dp.open(here / "runs" / finished_study.name)


def test_help_names_every_flag_and_shows_how(cli):
    done = cli("recover", "--help")
    assert (done.code, done.err) == (0, "")
    for flag in (
        "--model", "--mode", "--perturb", "--detector", "--m", "--m-off", "--q-lo", "--q-hi", "--gain", "--budget",
        "--site", "--decode", "--timings", "--calibration", "--operators", "--max-new-tokens", "--temperature",
        "--watch", "--limit", "--config", "--json", "--quiet",
    ):  # fmt: skip
        assert f"{flag} " in done.out, flag
    assert "dynprobe recover --model smollm2-135m" in done.out
    assert "recover" in cli("--help").out


def test_the_detector_stands_first_then_the_fractions(cli, study):
    done = cli("show", study.path)
    assert (done.code, done.err) == (0, "")
    out = done.out
    order = [
        "recover slerp, passive; timed by detector, always; gain ≤ 0.5 at where the signal points, budget 100%",
        "detector kappa_phase_zmax, before any mode acts", "AUC, clean against perturbed", "verdict",
        "recovery, given text (forced) · detector AUC", "slerp, always", "recovery, own text (free) · detector AUC",
        "harm to clean text (iatrogenic)", "own doing (Goodhart), recovery or harm", "self-tests: null ok",
    ]  # fmt: skip
    places = [out.index(part) for part in order]
    assert places == sorted(places)
    header = next(line for line in out.splitlines() if "mode, timing" in line).replace("┃", " ").split()
    assert header[:5] == ["mode,", "timing", "duty", "energy", "act/calm"]
    assert "κ phase*" in out
    assert "κ geom*" not in out
    tables = out[: out.index("recovery fraction: 0 as")].split("detector kappa_phase_zmax", 1)[1]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 120


def test_what_is_printed_is_what_was_measured(cli, study):
    out = cli("show", study.path).out
    said = study.summary["detector"]["forced"]
    for entry in (said["fire_rate_perturbed"], said["fire_rate_clean"]):
        assert f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}] of 3" in out
    for entry in study.summary["recovery"]:
        if entry["metric"] == "nll" and entry["rf"] is not None:
            assert f"{entry['rf']:+.2f}" in out
    assert ("DETECTOR_BLIND" in out) == any(e["blind"] for e in study.summary["detector"].values())
    for arm in study.summary["arms"]:
        if arm["timing"] == "always":
            assert f"{arm['energy_written']['mean']:.2f}" in out


def test_a_study_runs_and_is_found_again(cli, model, here):
    words = ("recover", "--model", model, *TEXTS, *LOOP, "--mode", "slerp", "--decode", "forced", "--timings", "always")
    done = cli(*words)
    assert (done.code, done.err) == (0, "")
    (path,) = (here / "runs").iterdir()
    assert cli("show", path.relative_to(here)).out == done.out
    assert cli(*words).out == done.out  # finished, so nothing is run again
    (listed,) = json.loads(cli("ls", "runs", "--json").out)
    assert listed["protocol"] == "recover"
    assert listed["perturbation"].startswith("slerp by kappa_phase_zmax; alpha=1.5,scale=relnorm,layers=1")
    columns = dp.open(path).columns().set_index(["table", "column"])
    for place in (
        ("samples", "duty"), ("samples", "energy_written"), ("samples", "signal_score"), ("samples", "acted_after"),
        ("actions", "signal"), ("actions", "active"), ("actions", "gain"), ("actions", "site"), ("actions", "energy"),
        ("actions", "controller"), ("actions", "detected"), ("fits", "rf"), ("fits", "low"), ("fits", "acted_on"),
    ):  # fmt: skip
        assert columns.loc[place, "description"], place
    assert "write u at the state h" in columns.loc[("actions", "energy"), "description"]
    assert columns.loc[("fits", "low"), "unit"] == "1"


def test_json_is_one_object(cli, model, here):
    done = cli(
        "recover", "--model", model, *TEXTS, *LOOP, "--mode", "slerp", "--timings", "detector", "--decode", "forced",
        "--perturb", "none", "--json",
    )  # fmt: skip
    assert done.code == 2  # --perturb was named twice
    assert "stands alone" in done.err
    loop = [w for w in LOOP if w not in ("--perturb", "alpha=1.5,layers=1,phase=decode")]
    done = cli("recover", "--model", model, *TEXTS, *loop, "--perturb", "none", "--mode", "slerp", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["status"] == "complete"
    assert found["summary"]["recovery"] == []
    assert {e["condition"] for e in found["summary"]["arms"]} == {
        "clean.forced", "clean.free", "clean+slerp.forced", "clean+slerp.free",
    }  # fmt: skip
    shown = cli("show", found["run"]).out
    assert "there is no recovery fraction: nothing was perturbed" in shown
    assert "nothing to detect" in shown


CASES = [
    (("--mode", "slrep"), 2, "Did you mean 'slerp'?"),
    (("--mode", "random:slerp"), 2, "name that mode"),
    (("--detector", "kappa_phase_zmx"), 2, "Did you mean 'kappa_phase_zmax'?"),
    (("--mode", "recync"), 2, "no effect under greedy decoding"),
    (("--mode", "sampling"), 2, "no effect under greedy decoding"),
    (("--mode", "guard", "--decode", "forced"), 2, "nothing is left to do for mode guard"),
    (("--mode", "passive", "--perturb", "none"), 2, "nothing is left to do for mode passive"),
    (("--mode", "dom"), 2, "give operators="),
    (("--mode", "dom", "--operators", "none.safetensors"), 2, "could not be read from none.safetensors"),
    (("--q-lo", 0.9, "--q-hi", 0.5), 2, "q_lo=0.9 must lie below q_hi=0.5"),
    (("--q-hi", 1.5), 2, "q_hi=1.5"),
    (("--gain", 0), 2, "gain=0"),
    (("--timings", "sometimes"), 2, "'detector', 'always' or 'oracle'"),
    (("--decode", "backwards"), 2, "decode='backwards'"),
    (("--site", "layers=9"), 2, "layers 0…2"),
    (("--calibration", "nowhere"), 1, "does not hold a readable calibration"),
    (("--perturb", "alpha=0.3", "--perturb", "none"), 2, "stands alone"),
    (("--perturb", "alpha=0.3,scale=isokl"), 2, "scales that need no other text"),
    (("--watch", "--mode", "slerp,shrink"), 2, "one mode can be watched at a time"),
    (("--watch", "--json"), 2, "--watch is for people"),
    (("--config", "none.yaml"), 2, "none.yaml cannot be read"),
]


@pytest.mark.parametrize(("words", "code", "message"), CASES, ids=lambda v: str(v[-1]) if isinstance(v, tuple) else "")
def test_a_mistake_is_one_message(cli, model, here, words, code, message):
    found = cli("recover", "--model", model, "--prompt", "Hello there", *words)
    assert (found.code, found.out) == (code, "")
    assert message in found.err
    assert found.err.startswith("dynprobe: ")
    assert "Traceback" not in found.err
    assert list(here.iterdir()) == []


def test_a_calibration_is_handed_in_and_another_models_is_refused(cli, model, here):
    from dynprobe.testing import save_tiny_model

    other = save_tiny_model(here / "other", seed=5)
    for name, folder in (("mine", model), ("theirs", other)):
        done = cli("calibrate", folder, "--out", name, "--json")
        assert (done.code, done.err) == (0, "")
    again = cli("calibrate", model, "--out", "mine")
    assert again.code == 2
    assert "--out mine is there already" in again.err
    words = ("recover", "--model", model, "--prompt", "Hello there", *LOOP, "--mode", "none", "--calibration")
    refused = cli(*words, "theirs")
    assert refused.code == 1
    assert "this calibration of other was made with weights" in refused.err
    assert not (here / "runs").exists()
    done = cli(*words, "mine", "--json")
    assert done.code == 0
    used = dp.open(json.loads(done.out)["run"]).manifest.calibration_hash
    assert used == json.loads((here / "mine" / "calibration.json").read_text())["hash"]


def test_settings_may_stand_in_a_file(cli, model, here):
    (here / "study.yaml").write_text("mode: [passive, sham]\ntimings: [detector]\nmax_new_tokens: 5\ndecode: forced\n")
    done = cli("recover", "--model", model, *TEXTS, "--config", "study.yaml", "--json")
    assert done.code == 0
    conditions = {e["condition"] for e in json.loads(done.out)["summary"]["arms"]}
    assert conditions == {"clean.forced", "perturbed.forced", "perturbed+passive.forced", "perturbed+sham.forced"}


def test_watching_prints_a_line_per_token_and_writes_nothing(cli, model, here):
    done = cli("recover", "--model", model, "--watch", *TEXTS, *LOOP, "--mode", "slerp")
    assert (done.code, done.err) == (0, "")
    head, *lines = done.out.splitlines()
    assert head.split() == ["pos", "signal", "κ", "ready", "detector", "actuator", "token"]
    n = len("Hello there")
    assert [int(line.split()[0]) for line in lines] == list(range(n - 1, n + 6))
    assert any(re.search(r"gain 0\.\d\d at resid_post\.\d, E \d", line) for line in lines)
    assert list(here.iterdir()) == []


def _moment(pos, **changes):
    return Moment(**{
        "pos": pos, "token": "a", "text": "abc", "signal": float(pos), "q_lo": 1.0, "q_hi": 2.0, "kappa": 0.1,
        "readiness": 0.5, "detected": False, "active": False, "gain": 0.0, "sites": (), "energy": 0.0, "restarts": 0,
        **changes,
    })  # fmt: skip


def _drawn(moments):
    from rich.console import Console

    console = Console(width=100, highlight=False, markup=False)
    with console.capture() as held:
        console.print(_render_watch.picture(moments))
    return held.get()


def test_the_live_picture_shows_signal_readiness_actuator_and_text():
    quiet, acting = _moment(1), _moment(2, detected=True, active=True, gain=0.25, sites=("resid_post.3",), energy=1.5)
    shown = _drawn([quiet, acting])
    for part in ("signal", "▁█", "on above 2, off below 1", "readiness", "0.50", "ON", "abc",
                 "gain 0.25 at resid_post.3, E 1.50"):  # fmt: skip
        assert part in shown, part
    assert "████" in shown
    shown = _drawn([quiet, _moment(3, readiness=np.nan, signal=np.nan, restarts=2)])
    assert "degenerate band" in shown
    assert "2 taken back" in shown
    assert "off" in shown
    assert len(_drawn([_moment(i, text="x" * 5000) for i in range(200)]).splitlines()) < 30


def test_the_detector_is_shown_as_soon_as_it_is_known(study, monkeypatch):
    printed = []
    listener = _recover_commands._WithDetector(tables=False)
    monkeypatch.setattr(listener, "_on", True)
    monkeypatch.setattr(listener._console, "print", printed.append)
    listener(Progress("detector", summary={"detector": study.summary["detector"]}))
    (table,) = printed
    assert table.title == "detector kappa_phase_zmax, before any mode acts"
    assert isinstance(listener, Listener)
    blind = {"forced": {**study.summary["detector"]["forced"], "blind": "DETECTOR_BLIND"}}
    verdict = list(_render_recover.detector_table(blind).columns[1].cells)[-1]
    assert str(verdict) == "DETECTOR_BLIND"
