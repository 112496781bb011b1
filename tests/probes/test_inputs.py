"""From prompts to a padded batch, and what a mistaken prompt is told."""

from typing import Any

import pytest
import torch
from models import ROWS, Net, build, seeded, subject

from dynprobe.errors import PromptError, UsageError
from dynprobe.probes import capture, discover, make_batch, tokenize
from dynprobe.probes._inputs import pad_token
from dynprobe.probes._noise import row_key_from_tokens
from dynprobe.testing import byte_tokenizer, tiny_llama


def test_batches_are_padded_on_either_side() -> None:
    rows = [[5, 6, 7], [8]]
    right, left = (make_batch(subject("llama"), rows, side=side) for side in ("right", "left"))
    assert right.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert left.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert right.mask.tolist() == [[True] * 3, [True, False, False]]
    assert left.mask.tolist() == [[True] * 3, [False, False, True]]
    assert right.lengths.tolist() == left.lengths.tolist() == [3, 1]
    assert right.row_keys == left.row_keys == (row_key_from_tokens([5, 6, 7]), row_key_from_tokens([8]))
    assert right.n_prompt == (3, 1)
    assert make_batch(subject("llama"), rows, row_keys=["a", "b"], n_prompt=[2, 1]).n_prompt == (2, 1)
    with pytest.raises(UsageError, match="'left' or 'right'"):
        make_batch(subject("llama"), rows, side="both")


def test_position_ids_follow_the_mask_where_the_model_takes_them() -> None:
    inputs = make_batch(subject("gpt2"), [[5, 6, 7], [8]], side="left").model_inputs(subject("gpt2"))
    assert inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert inputs["use_cache"] is False
    assert "position_ids" not in make_batch(subject("bloom"), [[5]]).model_inputs(subject("bloom"))


def test_a_users_model_gets_its_own_argument_and_nothing_else() -> None:
    net = discover(seeded(Net), layers="stack.*")
    assert list(make_batch(net, ROWS).model_inputs(net)) == ["tokens"]


def test_prompts_of_every_form() -> None:
    llama = tiny_llama(vocab=259)
    llama.tokenizer = byte_tokenizer()
    ids = llama.tokenizer("hi")["input_ids"]
    assert tokenize(llama, "hi") == tokenize(llama, ["hi"]) == [ids]
    assert (
        tokenize(llama, [ids]) == tokenize(llama, torch.tensor([ids])) == tokenize(llama, [torch.tensor(ids)]) == [ids]
    )
    assert tokenize(llama, (range(3, 5),)) == [[3, 4]]


def test_chat_templates() -> None:
    llama = tiny_llama(vocab=259)
    llama.tokenizer = byte_tokenizer()
    assert tokenize(llama, "hi", chat_template="auto") == tokenize(llama, "hi")  # there is none
    llama.tokenizer.chat_template = (
        "{% for m in messages %}<bos>U:{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    row = tokenize(llama, "hi", chat_template="auto")[0]
    assert llama.tokenizer.decode(row) == "<bos>U:hiA:"
    assert row.count(llama.tokenizer.bos_token_id) == 1
    with pytest.raises(UsageError, match="'none' or 'auto'"):
        tokenize(llama, "hi", chat_template="on")


def test_templated_prompts_are_named_by_their_own_words() -> None:
    """The turn markers are the same for all, and a row's name is made of its first tokens."""
    llama = tiny_llama(vocab=259)
    llama.tokenizer = byte_tokenizer()
    llama.tokenizer.chat_template = "a long preamble that every prompt shares {{ messages[0].content }}"
    tape = capture(llama, ["one", "two"], chat_template="auto")
    assert tape.row_keys == capture(llama, ["one", "two"]).row_keys
    assert len(set(tape.row_keys)) == 2


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt was given"),
        ([[]], "prompt 0 has no tokens"),
        ([[1], []], "prompt 1 has no tokens"),
        ([[1, 100]], "prompt 0 has token id 100; the vocabulary of llama is 0…99"),
        ([[1], [5, -1]], "prompt 1 has token id -1"),
        ("text", "llama has no tokenizer; pass token ids"),
        (["text"], "has no tokenizer"),
        ([5, 6], "one list a prompt"),
        (["a", [1]], "one list a prompt"),
        (torch.tensor([5, 6]), r"LongTensor \[batch, pos\], not torch.int64 \(2,\)"),
        (torch.ones(1, 2), "not torch.float32"),
    ],
)
def test_mistaken_prompts(prompts: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        tokenize(subject("llama"), prompts)


def test_an_empty_text_has_no_tokens() -> None:
    llama = tiny_llama(vocab=259)
    llama.tokenizer = byte_tokenizer()
    with pytest.raises(PromptError, match="prompt 1 has no tokens"):
        tokenize(llama, ["a", ""])


def test_padding_with_a_token_the_embedding_does_not_have() -> None:
    """A '[PAD]' added to a tokenizer after training has an id past the last row."""
    found = discover(build("gpt2"))

    class Tokenizer:
        pad_token_id, eos_token_id = 100, 2

    found.tokenizer = Tokenizer()
    assert pad_token(found) == 2
    Tokenizer.pad_token_id = 7
    assert pad_token(found) == 7
    Tokenizer.pad_token_id = Tokenizer.eos_token_id = None  # type: ignore[assignment]
    assert pad_token(found) == 0
