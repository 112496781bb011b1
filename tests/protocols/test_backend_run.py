"""A run through nnsight has the tables of a run through hooks, and a remote one the tables of a run."""

import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import ModelNotFoundError, OfflineError, SelfTestError, UsageError
from dynprobe.probes import _server
from dynprobe.probes._nnsight import controllers_left
from dynprobe.protocols import _remote_run
from dynprobe.protocols._config import RunConfig
from dynprobe.runs import Run
from dynprobe.testing import tiny_llama

nnsight = pytest.importorskip("nnsight")

PROMPTS = ["Hello there, my friend", "A b c d", "The quick brown fox jumps over it"]
TABLES = ("samples", "tokens", "depths", "profiles", "conditions", "prompts")


def differences(one: Run, other: Run, tolerance: float, skip: tuple[str, ...] = ()) -> list[str]:
    """Columns that both runs have and that differ."""
    found = []
    for table in TABLES:
        a, b = one.table(table), other.table(table)
        assert len(a) == len(b)
        for name in (c for c in a.columns if c in b.columns and c not in skip):
            if pd.api.types.is_numeric_dtype(a[name]):
                x, y = (t[name].astype(float).to_numpy() for t in (a, b))
                same = np.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
            else:
                same = a[name].astype(str).equals(b[name].astype(str))
            found += [] if same else [f"{table}.{name}"]
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 5, "lens": True},
        {"max_new_tokens": 4, "temperature": 1.0, "num_samples": 2},
        {"max_new_tokens": 0, "perturb": "alpha=0.02,scale=isokl"},
        {"max_new_tokens": 3, "perturb": "alpha=0.2,scale=coordstd,layers=1"},
        {"max_new_tokens": 3, "perturb": "alpha=0.3,scale=interp", "padding": "left"},
    ],
)
def test_the_tables_are_those_of_hooks(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"perturb": "alpha=0.3", "out": tmp_path, "device": "cpu", **settings}
    hooked, traced = (dp.run("tiny-llama", PROMPTS, backend=name, **settings) for name in ("hooks", "nnsight"))
    assert [list(hooked.table(t)) for t in TABLES] == [list(traced.table(t)) for t in TABLES]
    assert differences(hooked, traced, 1e-6) == []
    assert hooked.manifest.id8 != traced.manifest.id8
    assert traced.manifest.config["backend"] == "nnsight"
    assert traced.manifest.versions["nnsight"] == nnsight.__version__
    assert "nnsight" not in hooked.manifest.versions
    assert "backend" not in RunConfig.build().identity()
    assert all(check["passed"] for check in traced.manifest.self_tests.values())
    again = dp.run("tiny-llama", PROMPTS, backend="nnsight", **settings)
    assert again.path == traced.path


def test_states_come_through_traces_too(tmp_path: Path) -> None:
    settings = {
        "out": tmp_path,
        "states": True,
        "where": "layers=0:2,component=resid_post+mlp_out",
        "max_new_tokens": 3,
    }
    hooked, traced = (dp.run(tiny_llama(), [[5, 6, 7], [8, 9]], backend=b, **settings) for b in ("hooks", "nnsight"))
    for component in ("resid_post", "mlp_out"):
        (keys, one), (same, other) = (run.states(layer=1, component=component) for run in (hooked, traced))
        assert keys.equals(same)
        assert len(one) == len(keys) > 0
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_subject_brings_its_backend(tmp_path: Path) -> None:
    subject = dp.load(tiny_llama().model, backend="nnsight")
    done = dp.run(subject, [[5, 6, 7]], out=tmp_path, max_new_tokens=0)
    assert done.manifest.config["backend"] == "nnsight"
    assert controllers_left(subject.model) == 0


def test_protocols_that_need_hooks_refuse_the_backend(tmp_path: Path) -> None:
    subject = tiny_llama()
    asked = {"prompts": [[5, 6, 7]], "out": tmp_path, "backend": "nnsight"}
    for protocol, more in ((dp.sweep, {"alphas": [0.1]}), (dp.threshold, {}), (dp.recover, {})):
        with pytest.raises(UsageError, match="backend=nnsight carries dynprobe run"):
            protocol(subject, **asked, **more)
    with pytest.raises(UsageError, match="remote belongs to dynprobe run"):
        dp.sweep(subject, [[5, 6, 7]], alphas=[0.1], out=tmp_path, remote="local")
    with pytest.raises(UsageError, match="backend='torch'"):
        dp.run(subject, [[5, 6, 7]], backend="torch", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_remote_run_has_the_numbers_of_a_run_here(tmp_path: Path) -> None:
    settings = {"out": tmp_path, "perturb": ["alpha=0.3,layers=1", "alpha=0.1,scale=abs,layers=0,seed=4"]}
    settings |= {"max_new_tokens": 0, "device": "cpu", "backend": "nnsight", "batch_size": 2}
    here = dp.run("tiny-llama", PROMPTS, **settings)
    there = dp.run("tiny-llama", PROMPTS, remote="local", **settings)
    assert there.status == "complete"
    assert len(there.manifest.batch_plan) == 2
    skip = ("reasons", "reason", "digest", "coverage")
    assert differences(here, there, 1e-5, skip) == []
    held = set(here.samples) - set(there.samples)
    assert held >= {"kappa_geom", "diverge_angle", "alpha_relnorm"}
    for name in (
        "kappa_phase",
        "kappa_phase_d",
        "limen_ratio",
        "nll",
        "nll_d",
        "kl_clean_pert",
        "flip_rate",
        "n_asked",
    ):
        assert there.samples.set_index("condition_id").loc["perturbed.forced", name].notna().all()
    assert there.manifest.versions["nnsight"] == nnsight.__version__
    assert there.manifest.model["service"] == {"host": "local", "revision": "main"}
    assert there.manifest.dtypes["weights"] == "float32"
    assert dp.run("tiny-llama", PROMPTS, remote="local", **settings).path == there.path
    assert len(dp.compare([here.path, there.path]).runs) == 2


def test_a_dry_run_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    subject = tiny_llama()
    done = dp.run(subject, [[5, 6, 7], [8, 9]], remote="local", backend="nnsight", max_new_tokens=0, out=tmp_path)
    assert controllers_left(subject.model) == 0
    assert set(done.samples["condition_id"]) == {"clean"}
    assert sorted(done.tokens["token_id"]) == [5, 6, 7, 8, 9]
    assert done.manifest.self_tests == {}  # nothing was written, so there was no sham arm


def test_two_models_of_one_name_are_two_dry_runs(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"remote": "local", "backend": "nnsight", "max_new_tokens": 0, "out": tmp_path}
    one, other = (dp.run(tiny_llama(seed=seed), [[5, 6, 7], [8, 9]], **settings) for seed in (0, 1))
    assert one.path != other.path
    assert one.samples["nll"].tolist() != other.samples["nll"].tolist()


def test_a_sham_arm_that_differs_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _remote_run.remote_terms

    def shaky(*arguments: Any) -> Any:
        found = honest(*arguments)
        found[1]["entropy"] = torch.nextafter(found[1]["entropy"], torch.tensor(9.0))
        return found

    monkeypatch.setattr(_remote_run, "remote_terms", shaky)
    with pytest.raises(SelfTestError, match=r"sham arm .* differs from the clean arm on the service"):
        dp.run(
            tiny_llama(), [[5, 6, 7]], remote="local", backend="nnsight", max_new_tokens=0, out=tmp_path,
            perturb="alpha=0.1",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "hooks"}, "add --backend nnsight"),
        ({"max_new_tokens": 8}, r"max_new_tokens=8.*add --max-new-tokens 0"),
        ({"states": True}, "leave --states out"),
        ({"lens": True}, "leave --lens out"),
        ({"metrics": ("erank.rv/1",)}, "leave --metrics out"),
        ({"padding": "left"}, "leave --padding left out"),
        ({"quantization": "int8"}, "leave --quantization out"),
        ({"device_map": "auto"}, "leave --device-map out"),
        ({"span": "new"}, "leave --span new out"),
        ({"workers": 2}, "leave --workers out"),
        ({"remote": "ndif"}, "remote is true, 'local' .* or the URL of a server"),
        ({"remote": True}, "name it by its hub id"),
        ({"perturb": "alpha=0.1,scale=coordstd"}, "remote writes noise or a direction|no tokenizer"),
    ],
)
def test_what_does_not_come_back_is_refused_before_anything_runs(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    usual = {"remote": "local", "backend": "nnsight", "max_new_tokens": 0, "out": tmp_path}
    with pytest.raises(UsageError, match=words):
        dp.run(tiny_llama(), [[5, 6, 7]], **{**usual, **settings})
    assert not list(tmp_path.iterdir())


def test_a_service_is_asked_and_its_model_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.modeling.mixins.remotable import Remotable

    hosted = dp.load("tiny-llama", device="cpu")
    wrapper = Remotable(hosted.model)
    object.__setattr__(wrapper, "tokenizer", hosted.tokenizer)
    asked: list[Any] = []
    answer = {"host": "http://stub", "revision": "main", "versions": {"nnsight": "0.8.1"}, "python": "3.12.1"}
    monkeypatch.setattr(_remote_run, "check_service", lambda *a: asked.append(a) or answer)
    monkeypatch.setattr(_remote_run, "traced_model", lambda *a: wrapper)
    honest = _remote_run.remote_terms
    monkeypatch.setattr(_remote_run, "remote_terms", lambda *a: honest(*a[:-1], asked.append(a[-1]) or False))
    done = dp.run("org/tiny", PROMPTS, remote=True, backend="nnsight", max_new_tokens=0, out=tmp_path)
    assert asked == [("org/tiny", None, True), True]
    assert done.manifest.model_name == "org/tiny"
    assert done.manifest.weights["hash"] == "http://stub:org/tiny@main"
    assert done.manifest.model["service"]["python"] == "3.12.1"


def hosted(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """A service that hosts tiny-llama under another name; it answers, or raises."""
    from nnsight.modeling.mixins.remotable import Remotable

    model = dp.load("tiny-llama", device="cpu")
    wrapper = Remotable(model.model)
    object.__setattr__(wrapper, "tokenizer", model.tokenizer)

    def check(*_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    honest = _remote_run.remote_terms
    monkeypatch.setattr(_remote_run, "check_service", check)
    monkeypatch.setattr(_remote_run, "traced_model", lambda *a: wrapper)
    monkeypatch.setattr(_remote_run, "remote_terms", lambda *a: honest(*a[:-1], False))


def test_a_finished_remote_run_needs_no_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = "http://stub:8001"
    asked: dict[str, Any] = {"remote": host, "backend": "nnsight", "max_new_tokens": 0, "out": tmp_path}
    with monkeypatch.context() as up:
        hosted(up, {"host": host, "revision": "v7", "versions": {}, "python": "3.12.1"})
        done = dp.run("org/tiny", PROMPTS, **asked)
    assert done.manifest.weights["hash"] == f"{host}:org/tiny@v7"
    for error in (OfflineError("it sleeps"), ModelNotFoundError("it runs another"), UsageError("no key")):
        with monkeypatch.context() as down:
            hosted(down, error)
            assert dp.run("org/tiny", PROMPTS, **asked).path == done.path
            assert dp.run("org/tiny", PROMPTS, **asked | {"out": done.path}).path == done.path
            for other in ({"revision": "v8"}, {"perturb": "alpha=0.1"}, {"remote": "http://other:8001"}):
                with pytest.raises(type(error), match=str(error)):
                    dp.run("org/tiny", PROMPTS, **asked | other)
            with pytest.raises(type(error), match=str(error)):
                dp.run("org/tiny", PROMPTS[:1], **asked)
    assert len(list(tmp_path.glob("*_tiny_*"))) == 1


def test_a_login_in_the_url_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "_LOGINS", {})
    url = "http://me:hush-hush@stub:8001"
    asked: dict[str, Any] = {"backend": "nnsight", "max_new_tokens": 0, "out": tmp_path}
    monkeypatch.setattr(sys, "argv", ["dynprobe", "run", "--remote-host", url, f"--note={url}"])
    hosted(monkeypatch, {"host": "http://stub:8001", "revision": "v7", "versions": {}, "python": "3.12.1"})
    done = dp.run("org/tiny", PROMPTS, remote=url, **asked)
    assert done.manifest.config["remote"] == "http://stub:8001"
    assert done.manifest.id8 == dp.run("org/tiny", PROMPTS, remote="http://stub:8001", **asked).manifest.id8
    for file in (path for path in done.path.rglob("*") if path.is_file()):
        assert b"hush" not in file.read_bytes(), file
    for wrong in ("ftp://me:hush-hush@stub", "http://me:hush/hush@stub", "me:hush-hush@stub", "http://stub/a@hush"):
        with pytest.raises(UsageError) as refused:
            dp.run("org/tiny", PROMPTS, remote=wrong, **asked)
        assert "hush" not in "".join(traceback.format_exception(refused.value)), wrong
