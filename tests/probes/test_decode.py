"""Decoding is the same trajectory as one forward over the whole text, clean and pushed, whoever writes the loop."""

import copy
from typing import Any

import pytest
import torch
from models import NAMES, build, subject

from dynprobe.errors import ModelError
from dynprobe.probes import (
    Instrument,
    Subject,
    Tape,
    Where,
    capture,
    discover,
    make_batch,
    make_writers,
    perturb,
    record,
    sites_to_read,
)

PROMPTS = [[5, 6, 7, 8, 9], [11, 12]]
PUSH = "alpha=0.3,layers=1"
#: RWKV reads its padding.
LEFT = tuple(n for n in NAMES if n != "rwkv")


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def generate(found: Subject, rows: list[list[int]], new: int = 4, **more: Any) -> torch.Tensor:
    ids, mask = padded(rows)
    plain = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": new}
    model: Any = found.model
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **plain | more)


def texts(out: torch.Tensor, rows: list[list[int]]) -> list[list[int]]:
    """What was fed: the prompt and all but the last new token."""
    width = max(map(len, rows))
    return [row + new[width:-1] for row, new in zip(rows, out.tolist(), strict=True)]


def assert_same_trajectory(tape: Tape | Any, whole: Tape, i: int, j: int = 0) -> None:
    mine, theirs = tape.mask[i], whole.mask[j]
    assert tape.token_ids[i][mine].tolist() == whole.token_ids[j][theirs].tolist()  # type: ignore[index]
    assert tape.positions[i][mine].tolist() == list(range(int(mine.sum())))
    for depth in range(whole.states.last + 1):
        torch.testing.assert_close(tape.states[depth][i][mine], whole.states[depth][j][theirs], atol=3e-5, rtol=2e-4)


@pytest.mark.parametrize("name", LEFT)
def test_generation_with_left_padding_is_one_forward(name: str) -> None:
    found = subject(name)
    with record(found) as tape:
        out = generate(found, PROMPTS)
    assert tape.states[3].shape == (2, 5 + 3, 32)
    assert tape.n_prompt.tolist() == [5, 2]
    for i, text in enumerate(texts(out, PROMPTS)):
        assert_same_trajectory(tape, capture(found, [text]), i)


@pytest.mark.parametrize("name", LEFT)
def test_forced_is_decoded_under_a_perturbation(name: str) -> None:
    """Noise is a function of the position: feeding the text that was written gives the states it was written with."""
    found = subject(name)
    with record(found) as tape, perturb(found, PUSH) as instrument:
        out = generate(found, PROMPTS)
    assert instrument.passport()["alpha_relnorm"] == pytest.approx(0.3, rel=1e-4)
    for i, text in enumerate(texts(out, PROMPTS)):
        keys = [tape.row_keys[i]]
        assert_same_trajectory(tape, capture(found, [text], perturb=PUSH, row_keys=keys), i)


def test_rwkv_decodes_one_row_and_mixes_two() -> None:
    """transformers broadcasts the rows of its recurrent state against each other; the shape gives it away."""
    found = subject("rwkv")
    for push in (None, PUSH):
        with record(found) as tape, perturb(found, push or "alpha=0"):
            out = generate(found, [[5, 6, 7]])
        text = texts(out, [[5, 6, 7]])
        assert_same_trajectory(tape, capture(found, text, perturb=push, row_keys=tape.row_keys), 0)
    with pytest.raises(ModelError, match=r"state \(2, 2, 32\) does not fit the 2 × 1 positions"), record(found):
        generate(found, [[5, 6, 7], [8, 9, 10]])


@pytest.mark.parametrize("spec", ["positions=last,phase=prefill", "phase=decode", "positions=6", "positions=3:7:2"])
def test_places_mean_the_same_in_decoding(spec: str) -> None:
    found = subject("llama")
    with record(found) as tape, perturb(found, f"{PUSH},{spec}"):
        out = generate(found, PROMPTS, new=5)
    read = sites_to_read(found, Where.parse("layers=all"))
    for i, text in enumerate(texts(out, PROMPTS)):
        batch = make_batch(found, [text], row_keys=[tape.row_keys[i]], n_prompt=[len(PROMPTS[i])])
        forced = Instrument(found, read, make_writers(found, f"{PUSH},{spec}"), **batch.rows)
        with forced, torch.no_grad():
            found.model(**batch.model_inputs(found))
        assert_same_trajectory(tape, forced.tape(), i)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "neox"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_a_loop_of_the_users_own(name: str, with_mask: bool) -> None:
    found, text = subject(name), [5, 6, 7, 8, 9, 10, 11, 12]
    model: Any = found.model
    whole = capture(found, [text], perturb=PUSH, row_keys=["mine"])
    with record(found) as tape, perturb(found, PUSH, row_keys=["mine"]), torch.no_grad():
        cache, fed = None, 0
        for piece in (text[:4], text[4:5], text[5:7], text[7:]):
            fed += len(piece)
            mask = {"attention_mask": torch.ones(1, fed, dtype=torch.long)} if with_mask else {}
            out = model(input_ids=torch.tensor([piece]), past_key_values=cache, use_cache=True, **mask)
            cache = out.past_key_values
    assert tape.n_prompt.tolist() == [4]
    assert_same_trajectory(tape, whole, 0)


def test_a_warm_cache_from_before() -> None:
    found = subject("llama")
    model: Any = found.model
    text = [5, 6, 7, 8, 9, 10]
    whole = capture(found, [text])
    for mask in ({}, {"attention_mask": torch.ones(1, 6, dtype=torch.long)}):
        with torch.no_grad():
            cache = model(input_ids=torch.tensor([text[:4]]), use_cache=True).past_key_values
            with record(found) as tape:
                model(input_ids=torch.tensor([text[4:]]), past_key_values=cache, **mask)
        assert tape.positions.tolist() == [[4, 5]]
        torch.testing.assert_close(tape.states[3][0], whole.states[3][0, 4:], atol=1e-5, rtol=1e-4)


def test_a_cache_that_was_copied_is_a_branch_of_its_own() -> None:
    found = subject("llama")
    model: Any = found.model
    with record(found) as tape, torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        branch = copy.deepcopy(cache)
        model(input_ids=torch.tensor([[8]]), past_key_values=cache)
        assert tape.positions.tolist() == [[0, 1, 2, 3]]
        model(input_ids=torch.tensor([[9]]), past_key_values=branch)
    assert tape.positions.tolist() == [[3]]
    torch.testing.assert_close(tape.states[3][0], capture(found, [[5, 6, 7, 9]]).states[3][0, 3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_static_caches_and_their_four_dimensional_masks(name: str) -> None:
    found = subject(name)
    with record(found) as tape, perturb(found, PUSH):
        out = generate(found, PROMPTS, cache_implementation="static")
    for i, text in enumerate(texts(out, PROMPTS)):
        assert_same_trajectory(tape, capture(found, [text], perturb=PUSH, row_keys=[tape.row_keys[i]]), i)


def test_a_second_call_begins_a_new_sequence() -> None:
    found = subject("llama")
    with record(found) as tape:
        generate(found, PROMPTS)
        first = tape.tape
        generate(found, PROMPTS[::-1])
        second = tape.tape
        generate(found, PROMPTS)
    assert second is not first
    assert second.token_ids[:, :5].tolist() == padded(PROMPTS[::-1])[0].tolist()  # type: ignore[index]
    assert torch.equal(tape.states[:], first.states[:])
    assert tape.positions.tolist() == first.positions.tolist()


def test_the_same_shape_twice_is_not_taken_for_the_same_call() -> None:
    found = subject("llama")
    model: Any = found.model
    with record(found) as tape, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
        one = tape.states[3]
        model(input_ids=torch.tensor([[8, 9, 10]]))
        two = tape.states[3]
    assert not torch.equal(one, two)
    assert tape.token_ids.tolist() == [[8, 9, 10]]


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_share_the_noise_of_their_prompt(more: dict[str, Any]) -> None:
    found = subject("llama")
    for keys in (["a", "b"], None):
        with record(found) as tape, perturb(found, PUSH, row_keys=keys) as instrument:
            generate(found, PROMPTS, **more)
        assert tape.states[0].shape[0] == 6
        step = instrument.steps[0]
        assert step.row_keys[:3] == (step.row_keys[0],) * 3
        assert step.row_keys[3:] == (step.row_keys[3],) * 3
        assert step.row_keys[0] != step.row_keys[3]
        prompt = tape.states[2][:, :5]
        assert torch.equal(prompt[0], prompt[1])
        assert torch.equal(prompt[3], prompt[5])


def test_samples_of_one_prompt_share_its_noise() -> None:
    found = subject("gpt2")
    with record(found) as tape, perturb(found, PUSH):
        generate(found, PROMPTS[:1], do_sample=True, num_return_sequences=4, top_k=0)
    assert len(set(tape.row_keys)) == 1
    assert torch.equal(tape.states[2][0, :5], tape.states[2][3, :5])


def test_assisted_decoding_takes_tokens_back_and_is_refused() -> None:
    found, assistant = discover(build("llama")), build("llama", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 4
    with pytest.raises(ModelError, match="cut in between, as assisted decoding does"), record(found):
        generate(found, [PROMPTS[0]], new=8, assistant_model=assistant)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.model.modules())


def test_embeddings_can_be_generated_from() -> None:
    found = subject("llama")
    model: Any = found.model
    ids = torch.tensor([PROMPTS[0]])
    plain = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 3}
    with record(found) as tape, torch.no_grad():
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **plain)
    assert tape.token_ids is None
    assert tape.row_keys == ("row-0",)
    assert tape.positions.tolist() == [list(range(7))]
    torch.testing.assert_close(tape.states[3][0, :5], capture(found, ids).states[3][0], atol=1e-5, rtol=1e-4)
