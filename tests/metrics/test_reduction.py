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


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no compiler on this machine")
def test_the_compiled_reduction_differs_by_rounding(states: list[torch.Tensor]) -> None:
    whole = metrics.measure(states, MASK)
    try:
        with metrics.reducing(compiled=True):
            made = metrics.measure(states, MASK)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"the compiler does not compile: {str(error).splitlines()[0]}")
    assert _reduction._fused.cache_info().currsize == 1  # it was used
    _same(whole, made, rtol=1e-5, atol=2e-6)
    assert not _reduction._compiled.get()
