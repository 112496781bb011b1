"""Positions, row names and the borders of sequences, as seen from the calls of the root module alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, UsageError
from dynprobe.probes._clock import Clock
from dynprobe.probes._noise import row_key_from_tokens


class Root(nn.Module):
    """A root module's signature; the clock never runs it."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, past_key_values: Any = None, inputs_embeds: Any = None
    ) -> None:
        raise AssertionError("not run")


class Cache:
    def __init__(self, held: int) -> None:
        self.held = held

    def get_seq_length(self) -> int:
        return self.held


class Recurrent:
    """What state-space models hand on: it does not count tokens."""

    used = False

    def get_seq_length(self) -> int:
        raise ValueError("no attention layers")

    def has_previous_state(self) -> bool:
        return self.used


class Output:
    def __init__(self, cache: Any) -> None:
        self.past_key_values = cache


IDS = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 9]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
ONE = torch.tensor([[3], [4]])


def grown(mask: Tensor, by: int = 1) -> Tensor:
    return torch.cat([mask, torch.ones(len(mask), by, dtype=mask.dtype)], 1)


def test_positions_count_real_tokens_on_either_side() -> None:
    clock = Clock(Root())
    left = clock.begin((), {"input_ids": IDS, "attention_mask": MASK})
    assert left.positions.tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert left.n_prompt.tolist() == [2, 4]
    right = clock.begin((IDS.flip(1), MASK.flip(1)), {})
    assert right.positions.tolist() == [[0, 1, -1, -1], [0, 1, 2, 3]]
    assert left.index == right.index == 0
    assert left.row_keys == (row_key_from_tokens([7, 8]), row_key_from_tokens([5, 6, 7, 9]))
    assert right.row_keys[0] == row_key_from_tokens([8, 7])


def test_without_a_mask_every_token_is_real() -> None:
    assert Clock(Root()).begin((IDS,), {}).positions.tolist() == [[0, 1, 2, 3]] * 2


def test_decoding_with_the_cache_that_was_returned() -> None:
    clock = Clock(Root())
    clock.begin((), {"input_ids": IDS, "attention_mask": MASK})
    cache = Cache(4)
    clock.end(Output(cache))
    second = clock.begin((), {"input_ids": ONE, "attention_mask": grown(MASK), "past_key_values": cache})
    cache.held = 5
    clock.end(Output(cache))
    third = clock.begin((), {"input_ids": ONE, "past_key_values": cache})  # a loop without a mask
    assert (second.index, third.index) == (1, 2)
    assert second.positions.tolist() == [[2], [4]]
    assert third.positions.tolist() == [[3], [5]]
    assert third.n_prompt.tolist() == [2, 4]
    assert third.row_keys[0] == row_key_from_tokens([7, 8])


def test_a_new_cache_object_in_every_output_continues_too() -> None:
    clock = Clock(Root())
    clock.begin((IDS,), {})
    for n in range(3):
        cache = Cache(4 + n)
        clock.end(Output(cache))
        step = clock.begin((), {"input_ids": ONE, "past_key_values": cache})
        assert step.index == n + 1
        assert step.positions.tolist() == [[4 + n]] * 2


def test_an_empty_cache_or_none_starts_a_new_sequence() -> None:
    clock, cache = Clock(Root()), Cache(0)
    assert clock.begin((), {"input_ids": IDS, "past_key_values": cache}).index == 0
    cache.held = 4
    assert clock.begin((), {"input_ids": ONE, "past_key_values": cache}).index == 1
    assert clock.begin((), {"input_ids": IDS, "past_key_values": Cache(0)}).index == 0
    cache.held = 0  # reset by its owner
    again = clock.begin((), {"input_ids": IDS, "past_key_values": cache})
    assert again.index == 0
    assert again.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert clock.begin((IDS,), {}).index == 0


def test_a_warm_cache_starts_where_it_ends() -> None:
    with_mask = Clock(Root()).begin((), {"input_ids": ONE, "attention_mask": grown(MASK), "past_key_values": Cache(4)})
    assert with_mask.index == 0
    assert with_mask.positions.tolist() == [[2], [4]]
    clock, cache = Clock(Root()), Cache(4)
    assert clock.begin((), {"input_ids": ONE, "past_key_values": cache}).positions.tolist() == [[4], [4]]
    cache.held = 5
    following = clock.begin((), {"input_ids": ONE, "past_key_values": cache})
    assert (following.index, following.positions.tolist()) == (1, [[5], [5]])


def test_another_sequences_cache_is_not_taken_for_this_ones() -> None:
    clock = Clock(Root())
    clock.begin((IDS,), {})
    clock.end(Output(None))
    step = clock.begin((), {"input_ids": ONE, "past_key_values": Cache(9)})
    assert step.index == 0
    assert step.positions.tolist() == [[9], [9]]


def test_a_cache_that_was_cut_is_refused() -> None:
    clock, cache = Clock(Root()), Cache(0)
    clock.begin((), {"input_ids": IDS, "past_key_values": cache})
    cache.held = 3
    with pytest.raises(ModelError, match="holds 3 columns after forwards of 4"):
        clock.begin((), {"input_ids": ONE, "past_key_values": cache})


def test_recurrent_caches_tell_only_whether_they_were_used() -> None:
    clock, cache = Clock(Root()), Recurrent()
    assert clock.begin((), {"input_ids": IDS, "attention_mask": MASK, "past_key_values": cache}).index == 0
    cache.used = True
    step = clock.begin((), {"input_ids": ONE, "attention_mask": grown(MASK), "past_key_values": cache})
    assert (step.index, step.positions.tolist()) == (1, [[2], [4]])
    assert clock.begin((), {"input_ids": IDS, "past_key_values": Recurrent()}).index == 0


def test_a_model_without_a_cache_argument_continues_by_its_mask() -> None:
    clock = Clock(Root())
    clock.begin((), {"input_ids": IDS, "attention_mask": MASK})
    step = clock.begin((), {"input_ids": ONE, "attention_mask": grown(MASK)})
    assert (step.index, step.positions.tolist()) == (1, [[2], [4]])
    assert clock.begin((), {"input_ids": IDS, "attention_mask": MASK}).index == 0


def test_another_number_of_rows_starts_a_new_sequence() -> None:
    clock, cache = Clock(Root()), Cache(0)
    clock.begin((), {"input_ids": IDS, "past_key_values": cache})
    cache.held = 4
    assert clock.begin((), {"input_ids": ONE[:1], "past_key_values": cache}).index == 0


@pytest.mark.parametrize("form", ["bool", "additive", "mapping"])
def test_four_dimensional_masks_name_padding(form: str) -> None:
    """Static caches are called with a mask of pairs; its diagonal says which tokens are real, windows or not."""
    held, size = 2, 8
    warm = grown(torch.ones(2, held, dtype=torch.long), 0)
    full = torch.cat([warm, MASK, torch.zeros(2, size - held - 4, dtype=torch.long)], 1).bool()
    key, query = torch.arange(size)[None, None], torch.arange(held, held + 4)[None, :, None]
    window = (key <= query) & (key > query - 2)
    allowed = (window & full[:, None, :])[:, None]
    mask: Any = allowed
    if form == "additive":
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    if form == "mapping":
        mask = {"sliding_attention": torch.ones(2, 1, 4, 3), "full_attention": allowed}
    step = Clock(Root()).begin((), {"input_ids": IDS, "attention_mask": mask, "past_key_values": Cache(held)})
    assert step.positions.tolist() == [[-1, -1, 2, 3], [2, 3, 4, 5]]


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(2, 1, 4, 2), object(), {"full_attention": object()}])
def test_masks_that_say_nothing_are_refused(mask: Any) -> None:
    with pytest.raises(ModelError, match=r"pass attention_mask as \[batch, pos\]"):
        Clock(Root()).begin((), {"input_ids": IDS, "attention_mask": mask})


def test_given_names_and_prompt_lengths() -> None:
    clock = Clock(Root(), ["a", "b"], [2, 3])
    step = clock.begin((IDS,), {})
    assert step.row_keys == ("a", "b")
    assert step.n_prompt.tolist() == [2, 3]
    beams = clock.begin((IDS.repeat_interleave(3, 0),), {})
    assert beams.row_keys == ("a", "a", "a", "b", "b", "b")
    assert beams.n_prompt.tolist() == [2, 2, 2, 3, 3, 3]
    with pytest.raises(UsageError, match="2 row keys were given and the model was called on 3 rows"):
        clock.begin((torch.ones(3, 4).long(),), {})


def test_embeddings_and_other_inputs() -> None:
    clock = Clock(Root())
    step = clock.begin((), {"inputs_embeds": torch.zeros(2, 4, 8), "attention_mask": MASK})
    assert step.token_ids is None
    assert step.row_keys == ("row-0", "row-1")
    assert step.positions.tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]

    class Other(nn.Module):
        def forward(self, x: Tensor) -> None: ...

    assert Clock(Other()).begin((torch.zeros(2, 5, 8),), {}).positions.shape == (2, 5)
    with pytest.raises(ModelError, match="positions cannot be named"):
        Clock(Other()).begin((torch.zeros(3),), {})


def test_recorded_ids_are_a_copy_and_ordinary() -> None:
    with torch.inference_mode():
        ids = IDS.clone()
        step = Clock(Root()).begin((ids,), {})
        ids.zero_()
    assert step.token_ids is not None
    assert torch.equal(step.token_ids, IDS)
    assert not step.token_ids.is_inference()


def test_release_lets_go_of_the_cache() -> None:
    clock, cache = Clock(Root()), Cache(0)
    clock.begin((), {"input_ids": IDS, "past_key_values": cache})
    clock.release()
    assert clock._cache is None
    cache.held = 4
    assert clock.begin((), {"input_ids": ONE, "past_key_values": cache}).index == 0


def test_dtype_of_positions_is_integer() -> None:
    assert np.issubdtype(Clock(Root()).begin((IDS, MASK.bool()), {}).positions.dtype, np.integer)
