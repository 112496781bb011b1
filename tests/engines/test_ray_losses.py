"""Whatever Ray calls the end of an actor, its item is done again, and its seat gets a new one."""

import sys
from types import SimpleNamespace

import pytest

from dynprobe.engines import Item, Job, Ray
from dynprobe.errors import EngineError, PromptError

why = pytest.importorskip("ray").exceptions

LOSSES = {
    "actor-died": lambda: why.ActorDiedError(),
    "actor-out-of-reach": lambda: why.ActorUnavailableError("the line is gone", None),
    "out-of-memory": lambda: why.OutOfMemoryError("Task was killed due to the node running low on memory."),
    "node-died": lambda: why.NodeDiedError("the node is gone"),
    "worker-crashed": lambda: why.WorkerCrashedError(),
    "object-lost": lambda: why.ObjectLostError("00" * 28, None, ""),
}


class Stub:
    """As much of Ray as the engine asks for; answers are made when they are got, and losses raised then."""

    exceptions, __version__ = why, "stub"

    def __init__(self, losses):
        self.losses, self.alive, self.killed, self.done = losses, 0, 0, []

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 4.0}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 4.0}}]

    def put(self, job):
        return job

    def remote(self, **_):
        def made(seat):
            self.alive += 1
            assert self.alive <= 2, "an actor was started beside the one that it replaces"

            def work(unit):
                if self.losses.get(unit):
                    raise self.losses[unit].pop()
                self.done.append(unit)
                return {"unit.txt": str(unit).encode()}, 0.1

            call = lambda answer: SimpleNamespace(remote=lambda given: lambda: answer(given))  # noqa: E731
            return SimpleNamespace(open=call(lambda _: {"pid": 1, "host": "here"}), work=call(work))

        return lambda _: SimpleNamespace(remote=made)

    def wait(self, references, num_returns=1, timeout=None):
        return references[:num_returns], references[num_returns:]

    def get(self, reference):
        return reference()

    def kill(self, _):
        self.alive -= 1
        self.killed += 1

    def cancel(self, _):
        """There is nothing under way."""


@pytest.fixture
def engine(monkeypatch):
    def make(losses):
        stub = Stub(losses)
        monkeypatch.setitem(sys.modules, "ray", stub)
        return Ray(2), stub

    return make


ITEMS = [Item(n, n, f"key-{n}") for n in range(5)]
JOB = Job("nowhere:nothing", {}, "job")


@pytest.mark.parametrize("loss", LOSSES)
def test_an_actor_that_is_lost_costs_its_item_and_nothing_else(loss, engine):
    ray, stub = engine({3: [LOSSES[loss]()]})
    found = list(ray.map(JOB, ITEMS))
    assert sorted(done.item.number for done in found) == [0, 1, 2, 3, 4]
    assert sorted(stub.done) == [0, 1, 2, 3, 4]
    assert {int(done.files["unit.txt"]) for done in found} == {0, 1, 2, 3, 4}
    (lost,) = ray.facts()["lost"]
    assert lost["item"] == 3
    assert lost["why"]
    assert stub.killed == 1


def test_a_node_that_takes_both_actors_along_costs_two_items(engine):
    ray, _ = engine({0: [LOSSES["node-died"]()], 3: [LOSSES["node-died"]()]})
    assert len(list(ray.map(JOB, ITEMS))) == 5
    assert sorted(lost["item"] for lost in ray.facts()["lost"]) == [0, 3]


def test_an_item_that_never_fits_ends_the_run_with_what_to_type(engine):
    ray, stub = engine({3: [LOSSES["out-of-memory"]() for _ in range(9)]})
    with pytest.raises(EngineError, match=r"unit 3 of the plan ended 3 workers.*low on memory.*--batch-size"):
        list(ray.map(JOB, ITEMS))
    assert len(stub.losses[3]) == 6


def test_an_error_of_the_item_itself_is_no_loss(engine):
    error = why.RayTaskError("work", "the trace", PromptError("no prompt"))
    ray, _ = engine({3: [error]})
    with pytest.raises(PromptError, match="no prompt"):
        list(ray.map(JOB, ITEMS))
    assert ray.facts()["lost"] == []
