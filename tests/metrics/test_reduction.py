"""All layers at once, one after the other, or compiled: the same numbers."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from dynprobe import metrics
from dynprobe.errors import UsageError
from dynprobe.metrics import _reduction
from dynprobe.metrics._reduction import faster, way_of


@pytest.fixture(scope="module")
def states() -> list[torch.Tensor]:
    steps = torch.randn(9, 4, 17, 32, generator=torch.Generator().manual_seed(3))
    found = list(steps.cumsum(0))
    found[5][2, 3] = found[4][2, 3]  # an update that is zero
    return found


MASK = torch.ones(4, 17, dtype=torch.bool).index_put((torch.tensor([1]), torch.tensor([16])), torch.tensor(False))


def _same(one: Any, other: Any, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    for ours, theirs in ((one.depth, other.depth), (one.token, other.token)):
        assert ours.keys() == theirs.keys()
        for name, grid in ours.items():
            np.testing.assert_allclose(grid, theirs[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("way", ["stack", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_ways_give_the_numbers_of_the_cache(states: list[torch.Tensor], way: str, dtype: torch.dtype) -> None:
    given = [s.to(dtype) for s in states]
    whole = metrics.measure(given, MASK, metrics=metrics.DEFAULT)
    with metrics.reducing(way):
        _same(whole, metrics.measure(given, MASK, metrics=metrics.DEFAULT))


def test_the_faster_one_is_kept_for_a_device_a_dtype_a_width_and_a_number_of_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_reduction, "_known", {})
    seen: list[str] = []
    device, kind = torch.device("cuda:0"), (torch.float32, 64, 9)

    def again() -> None:
        seen.append(_reduction._way.get())

    monkeypatch.setattr(_reduction, "faster", lambda ways: [run() for run in ways.values()] and "layer")
    assert way_of(device, kind, again) == "layer"
    assert seen == ["stack", "layer"]
    assert way_of(device, kind, again) == "layer"
    assert len(seen) == 2  # timed once
    way_of(torch.device("cuda:1"), kind, again)
    assert len(seen) == 4
    with metrics.reducing("stack"):
        assert way_of(device, kind, again) == "stack"
    assert way_of(torch.device("cpu"), kind, again) == "cache"
    assert len(seen) == 4


def test_the_first_turn_warms_up_and_does_not_count() -> None:
    now = [0.0]
    cost = {"a": iter([100.0, 3.0, 3.0, 3.0]), "b": iter([0.1, 5.0, 4.0, 6.0])}

    def run(name: str) -> Any:
        def work() -> None:
            now[0] += next(cost[name])

        return work

    assert faster({"a": run("a"), "b": run("b")}, lambda: now[0]) == "a"


def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match="one of auto, stack, layer"), metrics.reducing("all"):
        pass
    assert _reduction._way.get() == "auto"


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compile with a backend, as a fresh process would."""

    def use(backend: Any) -> None:
        monkeypatch.setattr(_reduction, "_BACKEND", backend)
        _reduction._fused.cache_clear()
        torch._dynamo.reset()

    monkeypatch.setattr(_reduction, "_unfit", {})
    yield use
    _reduction._fused.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_compiled_reduction_differs_by_rounding(
    states: list[torch.Tensor], backend: str, compiling: Any, recwarn: pytest.WarningsRecorder
) -> None:
    if backend == "inductor" and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no compiler on this machine")
    whole = metrics.measure(states, MASK)
    compiling(backend)
    with metrics.reducing(compiled=True):
        made = metrics.measure(states, MASK)
    why = _reduction.why_not_compiled()
    if backend == "inductor" and why is not None:
        pytest.skip(f"the compiler does not compile: {why}")
    assert why is None
    assert not [w for w in recwarn if "not compiled" in str(w.message)]
    assert _reduction._fused.cache_info().currsize == 1  # it was used
    assert list(_reduction._unfit) == [("cpu", torch.float32, torch.float32, 32)]
    _same(whole, made, rtol=1e-5, atol=2e-6)
    assert not _reduction._compiled.get()


def _absent(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("there is no compiler here\nand more words")


def _wrong(graph: Any, inputs: Any) -> Any:
    return lambda *given: [out * 1.001 for out in graph.forward(*given)]


@pytest.mark.parametrize(("backend", "words"), [(_absent, "there is no compiler here"), (_wrong, "would differ by")])
def test_where_it_cannot_be_compiled_or_differs_the_reduction_is_as_it_was(
    states: list[torch.Tensor], backend: Any, words: str, compiling: Any
) -> None:
    whole = metrics.measure(states, MASK)
    compiling(backend)
    said = f"metrics are not compiled: .*{words}"
    with pytest.warns(UserWarning, match=said) as told, metrics.reducing(compiled=True):
        found = [metrics.measure(states, MASK) for _ in range(2)]
    assert len([w for w in told if "not compiled" in str(w.message)]) == 1  # said once
    assert words in str(_reduction.why_not_compiled())
    for made in found:
        _same(whole, made, rtol=0, atol=0)


def test_timing_both_ways_of_a_device_does_not_wait_for_itself(
    states: list[torch.Tensor], compiling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reduction, "_known", {})
    compiling("eager")
    with metrics.reducing(compiled=True):
        found = way_of(torch.device("cuda:0"), (torch.float32, 32, 9), lambda: metrics.measure(states, MASK))
    assert found in ("stack", "layer")
    assert _reduction.why_not_compiled() is None


def test_asking_a_run_for_it_leaves_what_was_said_around_it() -> None:
    with metrics.reducing("layer", compiled=True), _reduction.compiling(wanted=False):
        assert (_reduction._way.get(), _reduction._compiled.get()) == ("layer", True)
    with metrics.reducing("layer"):
        with _reduction.compiling(wanted=True):
            assert (_reduction._way.get(), _reduction._compiled.get()) == ("layer", True)
        assert not _reduction._compiled.get()
