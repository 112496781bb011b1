"""Finding the state in what a block takes and returns."""

import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from models import CONTAINERS, Pair
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

from dynprobe.errors import ModelError
from dynprobe.probes._outputs import (
    hidden_argument,
    hidden_of,
    identical,
    ordinary,
    replace_argument,
    replace_hidden,
    wrapper_like,
)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_state_is_found_itself_not_a_copy(kind: str) -> None:
    h = torch.randn(2, 3, 4)
    assert hidden_of(CONTAINERS[kind](h)) is h


@pytest.mark.parametrize("kind", CONTAINERS)
def test_replacing_keeps_type_and_everything_else(kind: str) -> None:
    h, new = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    before = CONTAINERS[kind](h)
    after = replace_hidden(before, new)
    assert type(after) is type(before)
    assert hidden_of(after) is new
    assert hidden_of(before) is h
    if isinstance(before, dict):
        assert list(after) == list(before)
        assert all(after[k] is before[k] for k in before if before[k] is not h)
    elif not isinstance(before, Tensor):
        assert len(after) == len(before)
        assert all(a is b for a, b in zip(after, before, strict=True) if b is not h)


def test_a_batch_is_never_sliced() -> None:
    """The classic mistake: output[0] of a tensor is its first row."""
    h = torch.randn(5, 3, 4)
    assert hidden_of(h).shape == (5, 3, 4)
    assert hidden_of((h,)).shape == (5, 3, 4)


def test_named_state_wins_over_an_earlier_tensor() -> None:
    h, other = torch.zeros(2, 3, 4), torch.ones(2, 3, 3)
    assert hidden_of({"attentions": other, "hidden_states": h}) is h
    output = BaseModelOutputWithPast(last_hidden_state=h, attentions=(other,))
    assert hidden_of(output) is h


@pytest.mark.parametrize(
    "output", [None, 3, "x", (), (None, 1), {"a": torch.ones(3)}, torch.ones(3), torch.ones(2, 3).long()]
)
def test_no_state_is_an_error_that_says_what_was_returned(output: Any) -> None:
    with pytest.raises(ModelError, match=type(output).__name__):
        hidden_of(output)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_wrapper_holds_no_tensor_of_the_forward_it_was_made_from(kind: str) -> None:
    wrap = pickle.loads(pickle.dumps(wrapper_like(CONTAINERS[kind](torch.zeros(2, 3, 4)))))  # noqa: S301
    new = torch.ones(1, 5, 4)
    out = wrap(new)
    assert type(out) is type(CONTAINERS[kind](new))
    assert hidden_of(out) is new
    rest = out.values() if isinstance(out, dict) else () if isinstance(out, Tensor) else out
    assert all(item is new or item is None for item in rest)


def test_wrapper_keeps_constants_and_drops_caches() -> None:
    wrap = wrapper_like((torch.zeros(1, 2, 3), True, 7, object(), [torch.ones(2)]))
    assert wrap(torch.ones(1, 2, 3))[1:] == (True, 7, None, None)


def test_subclasses_of_mappings_and_tuples_survive() -> None:
    h = torch.zeros(1, 2, 3)
    assert type(replace_hidden(OrderedDict(h=h), h + 1)) is OrderedDict
    assert type(replace_hidden(BaseModelOutput(last_hidden_state=h), h + 1)) is BaseModelOutput
    pair = replace_hidden(Pair(None, h), h + 1)
    assert isinstance(pair, Pair)
    assert pair.hidden[0, 0, 0] == 1


def test_arguments() -> None:
    h, mask, new = torch.zeros(2, 3, 4), torch.zeros(2, 1, 3, 3), torch.ones(2, 3, 4)
    assert hidden_argument((h, mask), {}) is h
    assert hidden_argument((mask,), {"hidden_states": h}) is h
    assert hidden_argument((torch.arange(3), h), {}) is h
    args, kwargs = replace_argument((h, mask), {"use_cache": True}, new)
    assert args[0] is new
    assert args[1] is mask
    assert kwargs == {"use_cache": True}
    args, kwargs = replace_argument((mask,), {"hidden_states": h}, new)
    assert args[0] is mask
    assert kwargs["hidden_states"] is new
    with pytest.raises(ModelError, match="without a floating-point tensor"):
        hidden_argument((torch.arange(3),), {"n": 3})


def test_ordinary_leaves_ordinary_tensors_alone_and_frees_inference_tensors() -> None:
    h = torch.ones(2)
    assert ordinary(h) is h
    with torch.inference_mode():
        locked = torch.ones(2)
        free = ordinary(locked)
    assert locked.is_inference()
    assert not free.is_inference()
    free.add_(1).requires_grad_()
    assert torch.equal(free.detach(), torch.full((2,), 2.0))


def test_identical_compares_bits() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert identical(nan, nan.clone())
    assert not identical(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not identical(torch.ones(2), torch.ones(2).double())
    assert not identical(torch.ones(2), torch.ones(1, 2))
    assert not identical(nan, torch.tensor([float("nan"), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))]))
