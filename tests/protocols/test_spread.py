"""The same run, whoever does its units."""

import json
import math
import os
import shutil
import signal
import time
from contextlib import ExitStack

import pandas as pd
import pytest
import torch

import dynprobe as dp
from dynprobe.engines import Done, Engine, Local, Ray, Seat, Slurm
from dynprobe.engines._contract import Worker
from dynprobe.errors import EngineError, InterruptedRunError, UsageError
from dynprobe.models import CsmConfig, CsmForCausalLM
from dynprobe.protocols import _call, _iterate, _threshold
from dynprobe.runs import RunWriter
from dynprobe.testing import save_tiny_model, tiny_llama

SWEEP = {"layers": "all", "alphas": "0.1,1", "limit": 6, "batch_size": 2, "tables": "all"}
CALLS = {
    "run": lambda **s: dp.run(
        "tiny-llama", limit=5, batch_size=2, max_new_tokens=3, perturb="alpha=0.2", states=True, **s
    ),
    "sweep": lambda **s: dp.sweep("tiny-llama", **SWEEP, **s),
    "threshold": lambda **s: dp.threshold("tiny-llama", scale="relnorm", limit=4, batch_size=2, **s),
    "iterate": lambda **s: dp.iterate("tiny-cem", limit=4, batch_size=2, iterations=[1, 3], **s),
}
TABLES = ("samples", "tokens", "depths", "profiles", "trials", "fits", "prompts", "conditions")


@pytest.fixture(scope="module")
def crew():
    with Local(2, threads=1) as engine:
        yield engine


def equal(a, b):
    """Every table and every state of two runs, label by label, is the same bit for bit."""
    assert a.manifest.id8 == b.manifest.id8
    assert a.manifest.finished == b.manifest.finished
    compared = 0
    for name in TABLES:
        ours, theirs = a.table(name), b.table(name)
        assert list(ours.columns) == list(theirs.columns)
        keys = [c for c in ("sample_id", "condition_id", "prompt_id", "write", "criterion", "layer", "seed", "pos",
                            "track", "depth", "alpha", "phase") if c in ours]  # fmt: skip
        if len(ours):
            compared += 1
            pd.testing.assert_frame_equal(
                ours.astype(dict.fromkeys(keys, str)).sort_values(keys, kind="stable").reset_index(drop=True),
                theirs.astype(dict.fromkeys(keys, str)).sort_values(keys, kind="stable").reset_index(drop=True),
                check_exact=True, check_categorical=False,
            )  # fmt: skip
    assert compared >= 3
    assert sorted(p.sha256 for p in a.manifest.parts if p.batch is not None) == sorted(
        p.sha256 for p in b.manifest.parts if p.batch is not None
    )


@pytest.mark.parametrize("protocol", CALLS)
def test_workers_give_the_tables_of_one_process(protocol, crew, tmp_path):
    here = CALLS[protocol](out=tmp_path / "here")
    there = CALLS[protocol](out=tmp_path / "there", engine=crew)
    equal(here, there)
    (told,) = there.manifest.model_extra["engine"]
    assert told["name"] == "local"
    assert sum(worker["items"] for worker in told["workers"]) == len(there.manifest.finished)
    assert len(told["workers"]) == 2
    assert there.manifest.model_extra["memory_plan"]["sharers"] == 2
    if protocol == "run":
        states = []
        for one in (here, there):
            labels, values = one.states(layer=1)
            order = labels.assign(sample_id=labels["sample_id"].astype(str)).sort_values(["sample_id", "pos"]).index
            states.append(torch.as_tensor(values[labels.index.get_indexer(order)]))
        assert torch.equal(*states)


def test_a_worker_killed_in_mid_sweep_loses_nothing(crew, tmp_path):
    here = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "here")
    killed = []

    def listener(progress):
        if progress.stage == "batch" and progress.done == 2 and not killed:
            killed.append(crew._crew[0].process.pid)
            os.kill(killed[0], signal.SIGKILL)

    there = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "there", engine=crew, listener=listener)
    assert killed
    equal(here, there)
    (told,) = there.manifest.model_extra["engine"]
    assert [lost["why"] for lost in told["lost"]] == ["signal SIGKILL (out of memory?)"]


def test_what_one_engine_left_another_goes_on_with(crew, tmp_path):
    here = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "here")

    def stop(progress):
        if progress.stage == "batch" and progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="the same command continues"):
        dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "there", engine=crew, listener=stop)
    left = next((tmp_path / "there").glob("*_tiny-llama_*"))
    assert dp.open(left).status == "interrupted"
    assert 3 <= len(dp.open(left).manifest.finished) < len(here.manifest.finished)
    there = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "there")
    assert there.path == left
    equal(here, there)


def test_a_call_that_was_left_leaves_no_answer_to_the_next_one(crew, tmp_path):
    """A notebook keeps the last error, and with it the frames that were reading what the workers say."""
    here = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "here")

    def stop(progress):
        if progress.stage == "batch" and progress.done == 3:
            raise KeyboardInterrupt

    kept = []
    try:
        dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "there", engine=crew, listener=stop)
    except InterruptedRunError as error:
        kept.append(error)
    there = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "there", engine=crew)
    assert kept[0].__traceback__ is not None
    equal(here, there)


class Here(Engine):
    """Does everything in this process, as a worker would."""

    name, workers = "local", 1

    def begin(self, job):
        self.worker = Worker(Seat())
        self._joined("here-0", self.worker.open(job))

    def map(self, job, items):
        for item in items:
            files, seconds = self.worker.work(item.unit)
            yield self._did(Done(item, files, "here-0", seconds))

    def close(self):
        pass


class SmallWorker(Here):
    """A worker whose device has room for two rows, from its first unit on."""

    def map(self, job, items):
        self.begin(job)
        (subject,) = _call._LAST.values()

        def forward(_module, args, kwargs):
            if len(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        with subject.model.register_forward_pre_hook(forward, with_kwargs=True):
            yield from super().map(job, items)


def test_what_a_worker_halves_stands_in_the_events(tmp_path, monkeypatch):
    monkeypatch.setattr(_call, "_LAST", {})
    asked = {"limit": 8, "batch_size": 4, "max_new_tokens": 0}
    done = dp.run("tiny-llama", **asked, out=tmp_path / "there", engine=SmallWorker())
    lines = [json.loads(line) for line in (done.path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    (halved,) = [line for line in lines if line["kind"] == "halved"]
    told = {name: halved[name] for name in ("rows", "kept", "why", "number", "worker")}
    assert told == {"rows": 4, "kept": 2, "why": "out of memory", "number": 0, "worker": "here-0"}
    assert [facts["parts"] for facts in done.manifest.batch_facts.values()] == [2, 2]
    assert [line["number"] for line in lines if line["kind"] == "batch"] == [0, 1]


def test_a_disk_that_workers_wait_for_is_said(tmp_path, monkeypatch):
    write = RunWriter.write_files

    def slowly(self, number, files):
        time.sleep(4.0 if number == 0 else 0.0)  # the fourth unit after it finds no place
        return write(self, number, files)

    monkeypatch.setattr(RunWriter, "write_files", slowly)
    heard = []
    asked = {"limit": 8, "batch_size": 1, "max_new_tokens": 0, "engine": Here(), "listener": heard.append}
    done = dp.run("tiny-llama", **asked, out=tmp_path)
    lines = [json.loads(line) for line in (done.path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    (told,) = [line for line in lines if line["kind"] == "disk-bound"]
    assert 1.0 < told["seconds"] < 4.5
    assert any(progress.disk_bound for progress in heard)


@pytest.mark.parametrize(
    ("device", "asked", "seat", "sharers"),
    [
        ("cpu", "auto", Seat(here=3), 3),
        ("cuda:0", "auto", Seat("cuda:0", here=4, on_device=2), 2),
        ("cuda:0", "cuda:0", Seat("cuda:1", here=4, on_device=2), 4),  # all of them were told this one
        ("cuda:0", "cuda:0", Seat("auto", gpu_share=0.25, here=8), 4),
        ("cuda:0", "auto", Seat("auto", here=8), 1),  # Ray and Slurm give whole devices
    ],
)
def test_who_shares_the_memory_of_a_worker(device, asked, seat, sharers):
    assert _call.sharers_of(torch.device(device), {"device": asked}, seat) == sharers


class OfAnotherMind(Here):
    """A worker that would find out something else than the process that called it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.monkeypatch = monkeypatch

    def map(self, job, items):
        self.begin(job)
        self.monkeypatch.setattr(_iterate, "_PREFIX_LIMIT", -1.0)
        self.monkeypatch.setattr(_threshold, "numerical_null", lambda *_: [math.inf, 9.0])
        yield from super().map(job, items)


def test_what_is_decided_once_is_decided_by_who_called(tmp_path, monkeypatch):
    """Workers on other devices may come to other answers; a run has one."""
    torch.manual_seed(0)
    CsmForCausalLM(CsmConfig.preset("nano")).save_pretrained(tmp_path / "csm")
    calls = {
        "iterate": lambda **s: dp.iterate(
            tmp_path / "csm", [[5, 6, 7], [8, 9], [3, 4, 5, 6], [2, 2]], iterations=[1, 3], batch_size=2, **s
        ),
        "threshold": lambda **s: dp.threshold(
            "tiny-llama", scale="relnorm", criterion="kappa", limit=4, batch_size=2, alphas=[0.05, 0.4], **s
        ),
    }
    for name, call in calls.items():
        here = call(out=tmp_path / "here" / name)
        with monkeypatch.context() as inner:
            there = call(out=tmp_path / "there" / name, engine=OfAnotherMind(inner))
        equal(here, there)
        assert here.manifest.batch_plan == there.manifest.batch_plan
        for unit in there.manifest.batch_plan:
            if name == "iterate":
                assert unit["one_pass"] is True
                assert 0 <= unit["prefix_deviation"] < 1e-3
            else:
                assert 0 < unit["level"] < 1
    assert set(there.table("trials")["level"]) == {unit["level"] for unit in there.manifest.batch_plan}


@pytest.mark.parametrize("engine", [None, Here()], ids=["alone", "worker"])
def test_what_the_units_found_out_is_said_whoever_did_them(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(_iterate, "_PREFIX_LIMIT", -1.0)  # no long run may stand for a shorter one
    done = CALLS["iterate"](out=tmp_path, **({} if engine is None else {"engine": engine}))
    assert [facts["one_pass"] for facts in done.manifest.batch_facts.values()] == [False, False]
    assert json.loads((done.path / "summary.json").read_text(encoding="utf-8"))["one_pass"] is False


def test_a_device_that_was_named_is_not_the_seats_to_choose(monkeypatch):
    asked = []
    monkeypatch.setattr(_call, "load_subject", lambda _, **loading: asked.append(loading["device"]))
    monkeypatch.setattr(_call, "_LAST", {})
    for device, spread in (("auto", None), ("cuda", None), ("cpu", None), ("cuda:1", None), ("auto", "auto")):
        loading = {"device": device, "device_map": spread}
        sent = _call._Sent("run", f"{loading}", loading, [], {}, None, False, "ident", "weights", "version")
        _call._subject(sent, Seat("cuda:0"))
    assert asked == ["cuda:0", "cuda:0", "cpu", "cuda:1", "auto"]


def test_files_that_changed_under_a_name_are_loaded_again(crew, tmp_path):
    model, texts = tmp_path / "model", [[5, 6, 7], [8, 9]]
    found = []
    for seed in (1, 2):
        save_tiny_model(tmp_path / "new", seed=seed)
        shutil.rmtree(model, ignore_errors=True)
        (tmp_path / "new").rename(model)
        found.append(dp.run(model, texts, max_new_tokens=0, out=tmp_path / "runs", engine=crew))
    assert found[0].manifest.id8 != found[1].manifest.id8
    equal(dp.run(model, texts, max_new_tokens=0, out=tmp_path / "alone"), found[1])


@pytest.mark.slow
def test_ray_and_slurm_give_the_tables_of_one_process(tmp_path):
    here = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "here")
    settings = {"folder": tmp_path / "shared", "cluster": "local", "poll_seconds": 0.2}
    with ExitStack() as stack:
        for engine in (stack.enter_context(Ray(2)), stack.enter_context(Slurm(2, **settings))):
            there = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / engine.name, engine=engine)
            equal(here, there)
            (told,) = there.manifest.model_extra["engine"]
            assert len(told["workers"]) == 2


@pytest.mark.slow
def test_a_ray_actor_killed_in_mid_sweep_loses_nothing(tmp_path):
    here = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "here")
    with Ray(2) as engine:
        killed = []

        def listener(progress):
            if progress.stage == "batch" and progress.done == 2 and not killed:
                killed.append(engine._facts["ray-0"]["pid"])
                os.kill(killed[0], signal.SIGKILL)

        there = dp.sweep("tiny-llama", **SWEEP, out=tmp_path / "there", engine=engine, listener=listener)
    assert killed
    equal(here, there)
    assert there.manifest.model_extra["engine"][0]["lost"]


def test_one_crew_does_all_cells_of_a_panel(crew, tmp_path):
    design = {
        "models": ["panel/llama-depth1*", "panel/cem-depth1*"], "categories": ["factual"], "prompts_per_category": 2,
        "seeds": [0, 1], "temperatures": [0.7], "max_new_tokens": 2, "settings": {"batch_size": 1},
    }  # fmt: skip
    here = dp.panel(**design, out=tmp_path / "here")
    there = dp.panel(**design, out=tmp_path / "there", engine=crew)
    assert (here.status, there.status) == ("complete", "complete")
    assert here.manifest["id8"] == there.manifest["id8"]
    assert list(here.cells["id8"]) == list(there.cells["id8"])
    pd.testing.assert_frame_equal(here.table("variance"), there.table("variance"))
    for one in there.cells["run"]:
        assert dp.open(there.path / one).manifest.model_extra["engine"][0]["name"] == "local"


def test_settings_make_the_engine(tmp_path):
    run = dp.run(
        "tiny-llama", limit=4, batch_size=2, max_new_tokens=0, out=tmp_path, workers=2, worker_threads=1, engine="local"
    )
    (told,) = run.manifest.model_extra["engine"]
    assert {(worker["threads"], worker["device"]) for worker in told["workers"]} == {(1, "cpu")}
    alone = dp.run("tiny-llama", limit=4, batch_size=2, max_new_tokens=0, out=tmp_path / "alone")
    assert alone.manifest.id8 == run.manifest.id8  # who did it is not what was asked


def test_an_object_cannot_be_sent(crew, tmp_path):
    with pytest.raises(UsageError, match=r"workers load the model themselves, by its name.*Subject"):
        dp.run(tiny_llama(), [[5, 6, 7]], max_new_tokens=0, out=tmp_path, engine=crew)
    assert list(tmp_path.iterdir()) == []


def test_a_protocol_whose_units_need_each_other_is_refused(crew, tmp_path):
    with pytest.raises(UsageError, match="later units read what earlier ones found"):
        dp.recover("tiny-llama", mode="none", limit=2, max_new_tokens=8, workers=2, out=tmp_path)
    with pytest.raises(UsageError, match="later units read what earlier ones found"):
        dp.recover("tiny-llama", mode="none", limit=2, max_new_tokens=8, engine=crew, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_of_other_weights_is_refused(crew, tmp_path, monkeypatch):
    """The files change between the caller's loading and the workers'."""
    model = save_tiny_model(tmp_path / "model", seed=1)
    real = _call.content_key

    def swap(*parts):
        save_tiny_model(tmp_path / "other", seed=2)
        for file in (tmp_path / "other").iterdir():
            (model / file.name).write_bytes(file.read_bytes())
        return real(*parts)

    monkeypatch.setattr(_call, "content_key", swap)
    with pytest.raises(EngineError, match=r"the worker comes to another run.*Give all machines the same files"):
        dp.run(model, [[5, 6, 7], [8, 9]], max_new_tokens=0, out=tmp_path / "runs", engine=crew)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "spark"}, "engine='spark'"),
        ({"workers": 0}, "workers is 'auto' or at least 1"),
        ({"engine": "slurm", "slurm": "timeout"}, "'timeout' is no name=value"),
        ({"address": "auto"}, "address='auto': engine='local' does not take it. Type --engine ray, or leave --address"),
        ({"engine": "ray", "slurm": "timeout_min=3"}, "engine='ray' does not take it. Type --engine slurm, or leave"),
        ({"worker_gpus": 1}, "Type --engine ray or --engine slurm, or leave --worker-gpus out"),
    ],
)
def test_settings_that_make_no_engine(settings, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        dp.run("tiny-llama", limit=2, out=tmp_path, **settings)
