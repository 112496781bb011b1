"""States of a model that is spread over several devices; a stand-in for the second device, so that a CPU can tell.

A placed tensor says that it is elsewhere and refuses to meet a tensor of another place, as tensors of two GPUs do.
"""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from dynprobe import metrics
from dynprobe.metrics import _geometry

ELSEWHERE = torch.device("cuda:1")


class Placed(torch.Tensor):
    """A tensor of the CPU that is said to be elsewhere."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return ELSEWHERE


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, Placed) else value


def _placed(value: Any) -> Any:
    return value.as_subclass(Placed) if isinstance(value, torch.Tensor) else value


class Apart(TorchFunctionMode):
    """Two devices: what is made of placed tensors is placed, and both kinds in one call are an error."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, _ = tree_flatten((args, kwargs))
        named = [x for x in leaves if isinstance(x, torch.device)]
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            if func in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist):
                assert func is torch.Tensor.cpu or not isinstance(args[0], Placed), "read before it was brought back"
                return func(_plain(args[0]), *args[1:], **kwargs)
            if named or (func is torch.Tensor.to and any(isinstance(x, torch.Tensor) for x in leaves[1:])):
                goal = named[0] == ELSEWHERE if named else isinstance(leaves[1], Placed)
                if func is torch.Tensor.to:
                    if goal != isinstance(args[0], Placed):
                        self.moved.append(args[0].numel())
                    dtypes = [x for x in leaves if isinstance(x, torch.dtype)]
                    made = _plain(args[0]).to(*dtypes)
                else:
                    here = [torch.device("cpu") if isinstance(x, torch.device) else _plain(x) for x in leaves]
                    made = func(
                        *torch.utils._pytree.tree_unflatten(here, tree_flatten((args, kwargs))[1])[0],
                        **torch.utils._pytree.tree_unflatten(here, tree_flatten((args, kwargs))[1])[1],
                    )
                return _placed(made) if goal else made
            places = {isinstance(x, Placed) for x in tensors if x.dim()}  # numbers without axes may meet anything
            if len(places) > 1 and getattr(func, "__name__", "") != "__get__":
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found at least two")
            made = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
            return tree_map(_placed, made) if True in places else made


@pytest.fixture
def states() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(7, 3, 9, 16, generator=generator)
    return list(steps.cumsum(0))


@pytest.mark.parametrize("border", [1, 3, 6])
@pytest.mark.parametrize("chunk", [2 * 9 * 16 * 4, 2**20])  # a depth or two at a time; all at once
def test_a_measurement_is_the_same_wherever_the_layers_are(
    states: list[torch.Tensor], border: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_geometry, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(_geometry, "_local", threading.local())  # buffers are made for the size of a block
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 6:] = False
    whole = metrics.measure(states, mask, metrics=metrics.DEFAULT)
    with Apart() as apart:
        split = metrics.measure(
            [_placed(s) if depth >= border else s for depth, s in enumerate(states)], mask, metrics=metrics.DEFAULT
        )
    for one, other in ((whole.depth, split.depth), (whole.token, split.token)):
        assert one.keys() == other.keys()
        for name, grid in one.items():
            np.testing.assert_allclose(grid, other[name], rtol=1e-5, atol=1e-6, err_msg=name)
    full = [n for n in apart.moved if n == states[0].numel()]
    assert len(full) <= 4  # one state, update and sum at the border, never the states of all layers


def test_the_stand_in_refuses_what_two_devices_refuse(states: list[torch.Tensor]) -> None:
    with Apart(), pytest.raises(RuntimeError, match="at least two"):
        torch.stack([states[0], _placed(states[1])])
    with Apart(), pytest.raises(AssertionError, match="brought back"):
        _placed(states[0]).numpy()


def test_one_trajectory_whose_depths_are_on_two_devices(states: list[torch.Tensor]) -> None:
    whole = metrics.phase_lag([s[0] for s in states])
    with Apart():
        split = metrics.phase_lag([_placed(s[0]) if depth > 2 else s[0] for depth, s in enumerate(states)])
    np.testing.assert_allclose(whole, split, rtol=1e-6)


def test_arms_on_two_devices_are_compared(states: list[torch.Tensor]) -> None:
    mask = torch.ones(3, 9, dtype=torch.bool)
    arm = [s + 0.1 * torch.randn(s.shape, generator=torch.Generator().manual_seed(1)) for s in states]
    whole = metrics.diverge(states, arm, mask)
    with Apart():
        split = metrics.diverge([_placed(s) for s in states], arm, mask)
    np.testing.assert_allclose(whole, split, rtol=1e-5)
