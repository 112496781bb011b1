"""The same promises, kept by every engine with real workers."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynprobe.engines import Local, Ray, Slurm, content_key
from dynprobe.errors import EngineError, ModelNotFoundError, PromptError, UsageError

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The jobs of these tests can be imported by name, here and in workers."""
    before = os.environ.get("PYTHONPATH")
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *([before] if before else [])])
    yield
    sys.path.remove(str(HERE))
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def ray_here():
    """One Ray for all tests of this file: starting it takes seconds."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error", configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(params=["local", "ray", "slurm"])
def engine(request, tmp_path):
    if request.param == "local":
        made = Local(2, threads=1)
    elif request.param == "ray":
        request.getfixturevalue("ray_here")
        made = Ray(2)
    else:
        made = Slurm(2, folder=tmp_path / "shared", cluster="local", poll_seconds=0.1, parameters={"timeout_min": 2})
    with made:
        yield made


def squares(found):
    return {done.item.number: int(done.files["square.txt"]) for done in found}


def test_every_item_is_done_once_and_by_whom_is_known(engine, job, items):
    found = list(engine.map(job(), items(9)))
    assert squares(found) == {n: n * n for n in range(9)}
    assert len(found) == 9
    facts = engine.facts()
    assert facts["name"] == engine.name
    assert sum(worker["items"] for worker in facts["workers"]) == 9
    assert {done.worker for done in found} == {worker["id"] for worker in facts["workers"]}
    assert all(worker["pid"] != os.getpid() for worker in facts["workers"])
    assert {done.files["threads.txt"] for done in found} == {b"1"}
    assert {done.files["here.txt"] for done in found} == {b"2"}  # two workers on this machine share its memory
    assert not facts["lost"]
    assert engine.facts()["workers"] == []  # told once


def test_a_killed_worker_loses_nothing(engine, job, items, tmp_path):
    found = list(engine.map(job(deadly={3: 1}), items(6)))
    assert squares(found) == {n: n * n for n in range(6)}
    assert (tmp_path / "begun-3").read_text() == ".."
    (lost,) = engine.facts()["lost"]
    if engine.name != "slurm":  # there a job dies with its stretch, and what is left of that is another job
        assert lost["item"] == 3


@pytest.mark.parametrize("engine", ["local", "ray", pytest.param("slurm", marks=pytest.mark.slow)], indirect=True)
def test_an_item_that_kills_every_worker_ends_the_work(engine, job, items, tmp_path):
    with pytest.raises(EngineError, match=r"unit 1 of the plan ended 3 workers|lost 3 times"):
        list(engine.map(job(deadly={1: 99}), items(3)))
    assert (tmp_path / "begun-1").read_text() == "..."


def test_an_error_of_an_item_is_raised_as_it_was(engine, job, items):
    with pytest.raises(PromptError, match="unit 2 has no prompt"):
        list(engine.map(job(wrong=2), items(4)))


def test_an_error_while_opening_is_raised_as_it_was(engine, job, items):
    with pytest.raises(PromptError, match="nothing to open"):
        list(engine.map(job(broken=True), items(2)))


@pytest.mark.parametrize("where", ["open", "work"])
def test_an_error_of_the_system_is_no_dead_worker(where, job, items):
    """A model that is not there is an ``OSError``, and so is a line that is closed."""
    with Local(1, threads=1) as engine:
        with pytest.raises(ModelNotFoundError, match="no model here"):
            list(engine.map(job(absent=where), items(1)))
        assert engine.facts()["lost"] == []


def test_a_job_that_cannot_be_opened_leaves_no_answer_to_the_next_one(job, items):
    with Local(2, threads=1) as engine:
        with pytest.raises(PromptError, match="nothing to open"):
            engine.begin(job(broken=True))
        assert squares(engine.map(job(), items(4))) == {0: 0, 1: 1, 2: 4, 3: 9}


def test_a_worker_that_died_between_two_jobs_is_replaced(job, items):
    with Local(1, threads=1) as engine:
        list(engine.map(job(name="a"), items(1)))
        engine._crew[0].process.kill()
        engine._crew[0].process.wait()
        assert squares(engine.map(job(name="b"), items(2))) == {0: 0, 1: 1}
        assert [(lost["id"], lost["item"]) for lost in engine.facts()["lost"]] == [("local-0", None)]


def test_a_defect_that_cannot_be_sent_is_told_in_words(tmp_path):
    job_text = textwrap.dedent(
        """
        from dynprobe.engines import Item, Job, Local
        import pathlib, sys
        job = Job("engine_jobs:open_job", {"scratch": sys.argv[1], "deadly": {}, "defect": 0}, "k")
        with Local(1, threads=1) as engine:
            try:
                list(engine.map(job, [Item(0, 0, "a")]))
            except Exception as error:
                print(type(error).__name__, error)
        """
    )
    done = subprocess.run([sys.executable, "-c", job_text, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "this and that" in done.stdout


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_workers_that_are_warm_open_a_job_once_and_another_one_anew(kind, request, job, items, tmp_path):
    if kind == "ray":
        request.getfixturevalue("ray_here")
    with Local(1, threads=1) if kind == "local" else Ray(1) as engine:
        first, second = job(name="a"), job(name="b")
        engine.begin(first)
        list(engine.map(first, items(2)))
        list(engine.map(first, items(2)))
        list(engine.map(second, items(2)))
    assert len((tmp_path / "opened-a").read_text().split()) == 1
    assert len((tmp_path / "opened-b").read_text().split()) == 1
    assert (tmp_path / "opened-a").read_text() == (tmp_path / "opened-b").read_text()


def test_closing_ends_the_processes(job, items):
    engine = Local(2, threads=1)
    list(engine.map(job(), items(2)))
    pids = [worker["pid"] for worker in engine.facts()["workers"]]
    engine.close()
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_when_their_caller_is_killed(job, items, tmp_path):
    """A worker whose caller is gone finds nobody at the other end and leaves."""
    text = textwrap.dedent(
        """
        import os, sys, signal
        from dynprobe.engines import Item, Job, Local
        engine = Local(1, threads=1)
        list(engine.map(Job("engine_jobs:open_job", {"scratch": sys.argv[1], "deadly": {}}, "k"), [Item(0, 0, "a")]))
        print(engine.facts()["workers"][0]["pid"], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", text, str(tmp_path)], capture_output=True, text=True, check=False)
    pid = int(done.stdout.split()[-1])
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {pid} outlived its caller")


def test_what_lies_in_the_shared_folder_is_not_made_again(job, items, tmp_path):
    settings = {"folder": tmp_path / "shared", "cluster": "debug", "poll_seconds": 0.05}
    one = job()
    found = []
    for done in Slurm(1, **settings).map(one, items(4)):
        found.append(done)
        if len(found) == 2:
            break  # the caller is gone; the jobs had done all four
    again = list(Slurm(1, **settings).map(one, items(4)))
    assert squares(again) == {n: n * n for n in range(4)}
    assert all((tmp_path / f"begun-{n}").read_text() == "." for n in range(4))


def test_a_job_before_its_pre_emption_is_given_back_as_it_is(job, items, tmp_path):
    from dynprobe.engines import Seat
    from dynprobe.engines._slurm import _Share

    share = _Share(job(), str(tmp_path), Seat(threads=1))
    again = share.checkpoint(items(2))
    assert again.function is share
    assert again.args == (items(2),)


def test_refusals_say_what_to_type(tmp_path, ray_here):
    with pytest.raises(UsageError, match=r"9 workers need 9 CPU, and the cluster has 4.*--workers"):
        Ray(9)
    with pytest.raises(UsageError, match="Slurm gives whole GPUs"):
        Slurm(1, folder=tmp_path, cluster="debug", gpus=0.5)
    with pytest.raises(EngineError, match="no sbatch on this machine"):
        Slurm(1, folder=tmp_path)
    with pytest.raises(UsageError, match="submitit does not take"):
        Slurm(1, folder=tmp_path, cluster="local", parameters={"no_such_thing": 1})
    with pytest.raises(UsageError, match=r"cluster=nowhere: it is slurm, local .* or debug"):
        Slurm(1, folder=tmp_path, cluster="nowhere")
    with pytest.raises(UsageError, match=r'does not take these settings: .*"timeout_min" expected type .*int'):
        Slurm(1, folder=tmp_path, cluster="debug", parameters={"timeout_min": "abc"})


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_ray_cluster_that_does_not_answer_is_told_of_at_once(scheme):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # bound and not listened at
        asked = SimpleNamespace(_ray=SimpleNamespace(init=lambda **_: pytest.fail("Ray was asked")))
        with pytest.raises(
            EngineError, match=rf"no Ray cluster answers at --address {scheme}127.0.0.1:{port}: .*efused"
        ):
            Ray._connect(asked, f"{scheme}127.0.0.1:{port}")


@pytest.mark.parametrize("before", [lambda *_: None, signal.SIG_DFL], ids=["ours", "none"])
def test_a_handler_of_sigterm_outlives_the_start_of_ray(before):
    rays = signal.default_int_handler
    asked = SimpleNamespace(_ray=SimpleNamespace(init=lambda **_: signal.signal(signal.SIGTERM, rays)))
    found = signal.signal(signal.SIGTERM, before)
    try:
        Ray._connect(asked, None)
        assert signal.getsignal(signal.SIGTERM) is (before if callable(before) else rays)
    finally:
        signal.signal(signal.SIGTERM, found)


def test_an_actor_that_waits_for_its_place_is_told_of(ray_here, job, items, monkeypatch):
    """One engine holds three of four cores; the second actor of another one waits until they are free."""
    from dynprobe.engines import _ray

    monkeypatch.setattr(_ray, "_PATIENCE", 1.0)
    first, second, told = Ray(3), Ray(2), []

    def hear(text, **_):
        told.append(text)
        first.close()  # nobody else would make room

    monkeypatch.setattr(_ray, "warnings", SimpleNamespace(warn=hear))
    first.begin(job(name="a"))
    second.begin(job(name="b"))
    assert any("a worker needs 1 CPU and 0 GPU, and 0 CPU" in text and "--workers" in text for text in told)
    assert squares(second.map(job(name="b"), items(3))) == {0: 0, 1: 1, 2: 4}
    second.close()


def test_workers_sit_on_devices_in_turn():
    crowded = Local(5, threads=1, devices=["cuda:0", "cuda:1"])
    assert [crowded.seat(n).device for n in range(5)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert (crowded.seat().here, crowded.seat().on_device) == (5, 3)
    assert (Local(2, threads=1).seat().device, Local(2, threads=1).seat().here) == ("auto", 2)


def test_the_name_of_an_item_is_its_content():
    assert content_key("run", 3, {"a": 1, "b": [2]}) == content_key("run", 3, {"b": [2], "a": 1})
    assert content_key("run", 3, {"a": 1}) != content_key("run", 4, {"a": 1})
