"""One hook per module and side: order, containers, and leaving nothing behind."""

import gc
import weakref

import pytest
import torch
from models import CONTAINERS, Block
from torch import Tensor, nn

from dynprobe.probes._dispatch import attach, live_hooks
from dynprobe.probes._outputs import hidden_of


@pytest.mark.parametrize("side", ["input", "output"])
def test_writers_run_before_readers_whatever_the_order(side: str) -> None:
    module, seen = nn.Identity(), []
    reader = attach(module, side=side, read=lambda h: seen.append(float(h.sum())))
    first = attach(module, side=side, write=lambda h: h + 1)
    second = attach(module, side=side, write=lambda h: h * 10)
    assert float(module(torch.zeros(1, 1))) == 10.0
    assert seen == [10.0]
    first.remove()
    assert float(module(torch.ones(1, 1))) == 10.0
    second.remove()
    reader.remove()
    assert float(module(torch.ones(1, 1))) == 1.0
    assert seen == [10.0, 10.0]


def test_one_hook_however_many_clients_and_none_in_the_end() -> None:
    module = nn.Identity()
    clients = [attach(module, read=lambda h: None) for _ in range(3)]
    assert len(module._forward_hooks) == 1
    assert live_hooks(module) == 1
    for client in clients:
        client.remove()
        client.remove()  # a second call does nothing
    assert len(module._forward_hooks) == 0
    assert live_hooks(module) == 0


def test_removing_twice_does_not_take_a_twin_away() -> None:
    module, seen = nn.Identity(), []
    read = seen.append
    first, second = attach(module, read=read), attach(module, read=read)
    first.remove()
    first.remove()
    module(torch.ones(1, 1))
    assert len(seen) == 1
    second.remove()
    assert live_hooks(module) == 0


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_pass_through(kind: str) -> None:
    block = Block(4, kind)
    x = torch.randn(2, 3, 4)
    plain = hidden_of(block(x))
    client = attach(block, write=lambda h: h * 2)
    out = block(x)
    client.remove()
    assert type(out) is type(CONTAINERS[kind](x))
    assert torch.equal(hidden_of(out), plain * 2)


def test_unchanged_outputs_are_the_very_same_object() -> None:
    module = nn.Identity()
    x = (torch.ones(1, 2, 3), "kept")
    clients = [attach(module, write=lambda h: h), attach(module, read=lambda h: None)]
    assert module(x) is x
    for client in clients:
        client.remove()


def test_inputs_by_keyword_are_replaced() -> None:
    class Takes(nn.Module):
        def forward(self, scale: float, hidden_states: Tensor) -> Tensor:
            return hidden_states * scale

    module = Takes()
    client = attach(module, side="input", write=lambda h: h + 1)
    assert float(module(2.0, hidden_states=torch.ones(1, 1))) == 4.0
    client.remove()


def test_modules_are_not_kept_alive() -> None:
    module = Block(4)
    attach(module, read=lambda h: None)
    watched = weakref.ref(module)
    del module
    gc.collect()
    assert watched() is None


def test_attach_needs_a_client() -> None:
    module = nn.Identity()
    with pytest.raises(TypeError, match="one of read= or write="):
        attach(module)
    assert live_hooks(module) == 0
