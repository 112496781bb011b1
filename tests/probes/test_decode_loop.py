"""The loop whose batch shrinks writes the library's texts, and what was seen of rows that left is right."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from models import NAMES, build, subject
from torch import Tensor

from dynprobe.errors import ModelError
from dynprobe.probes import Perturb, PerturbWriter, RowsWriter, Sampling, Subject, discover, generate, make_batch
from dynprobe.probes import _generate as loops
from dynprobe.protocols._arms import Text, free

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12], [3, 9, 27, 81], [44], [70, 71, 72], [13, 14, 15, 16, 17]]
KEYS = tuple("abcdef")
NEW = 9
#: Whose caches rows can be taken out of.
SHRINKING = tuple(n for n in NAMES if n not in ("rwkv", "mamba"))


@contextmanager
def loop(found: Subject, ours: bool | None, ends: list[int] | None = None) -> Iterator[None]:
    """Decode by our loop, by the library's, or (None) as the trial decides; ``ends`` are the end tokens meanwhile."""
    config: Any = found.model.generation_config
    before, known = config.eos_token_id, found.facts.pop("decodes_alone", None)
    if ours is not None:
        found.facts["decodes_alone"] = ours
    config.eos_token_id = ends if ends is not None else before
    try:
        yield
    finally:
        config.eos_token_id = before
        found.facts.pop("decodes_alone", None)
        if known is not None:
            found.facts["decodes_alone"] = known


def write(found: Subject, rows: Any = tuple(range(6)), **sampling: Any) -> list[list[int]]:
    rows = list(rows)
    batch = make_batch(found, [ROWS[i] for i in rows], side="left", row_keys=[KEYS[i] for i in rows])
    return generate(found, batch, Sampling(**{"max_new_tokens": NEW} | sampling))


def ending_apart(found: Subject, **sampling: Any) -> list[int]:
    """Tokens at which the rows of this model end at different steps, some of them never."""
    with loop(found, False):
        new = write(found, stop_at_eos=False, **sampling)
    chosen: list[int] = []
    for row, at in ((1, 0), (2, 2), (0, 4)):
        chosen.append(new[row][at])
        lengths = {next((i for i, t in enumerate(n) if t in chosen), NEW) for n in new}
        if len(lengths) > 2:
            break
    return sorted(set(chosen))


@pytest.mark.parametrize("name", NAMES)
def test_the_verdict_on_each_architecture(name: str) -> None:
    found = subject(name)
    with loop(found, None):
        write(found, rows=[0, 1] if name != "rwkv" else [0], max_new_tokens=2)
        assert found.facts["decodes_alone"] is (name in SHRINKING)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SHRINKING)
def test_the_texts_are_the_librarys(name: str, sampling: dict[str, Any]) -> None:
    found = subject(name)
    ends = ending_apart(found, **sampling)
    with loop(found, False, ends):
        theirs = write(found, **sampling)
    with loop(found, True, ends):
        write(found, **sampling)  # what is tried once per model is tried before anything is counted
        widths: list[int] = []
        handle = found.blocks[0].register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
        ours = write(found, **sampling)
        handle.remove()
    assert ours == theirs
    assert len({len(n) for n in ours}) > 1
    assert min(widths) < len(ROWS)  # rows did leave
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_a_rows_text_is_its_text_alone(sampling: dict[str, Any]) -> None:
    found = subject("llama")
    with loop(found, True, ending_apart(found, **sampling)):
        together = write(found, **sampling)
        assert [write(found, [i], **sampling)[0] for i in range(len(ROWS))] == together
        assert write(found, [5, 0, 3], **sampling) == [together[i] for i in (5, 0, 3)]


def test_rows_that_all_end_stop_the_loop() -> None:
    found = subject("llama")
    with loop(found, False):
        new = write(found, stop_at_eos=False)
    calls: list[int] = []
    handle = found.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with loop(found, True, sorted({n[0] for n in new})):
        assert [len(n) for n in write(found)] == [1] * len(ROWS)
    handle.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bloom"])
def test_what_was_seen_of_rows_that_left(name: str) -> None:
    """States, outputs, metrics, sizes and texts of each row are those of the row alone, whoever leaves before it."""
    found = subject(name)
    alphas = np.array([0.0, 0.2, 0.4, 0.6, 0.9, 1.3])
    ends = ending_apart(found)

    def passage(rows: list[int]) -> Any:
        half = [i for i, row in enumerate(rows) if row % 2]
        rest = [i for i, row in enumerate(rows) if not row % 2]
        parts = []
        for seed, mine in ((0, rest), (1, half)):
            if mine:
                strengths = alphas[[rows[i] for i in mine]]
                perturb = Perturb(1.0, layers=1, seed=seed)
                parts.append((PerturbWriter(found, perturb, magnitude=strengths), np.array(mine)))
        texts = [Text(KEYS[i], tuple(ROWS[i])) for i in rows]
        return free(found, texts, Sampling(NEW), [RowsWriter(parts, len(rows))])

    with loop(found, True, ends):
        together = passage(list(range(len(ROWS))))
        alone = [passage([i]) for i in range(len(ROWS))]
    with loop(found, False, ends):
        by_library = passage(list(range(len(ROWS))))
    assert len({len(t.new) for t in together.texts}) > 1
    for other, places in [(by_library, range(len(ROWS))), *((a, [0]) for a in alone)]:
        for place in places:
            row = place if other is by_library else next(i for i, a in enumerate(alone) if a is other)
            assert other.texts[place] == together.texts[row]
            mine, theirs = together.mask[row], other.mask[place]
            at, there = (row, mine.numpy()), (place, theirs.numpy())
            assert int(mine.sum()) == int(theirs.sum()) == len(together.texts[row].fed)
            assert together.tape.token_ids[row][mine].tolist() == together.texts[row].fed
            assert together.positions[row][mine.numpy()].tolist() == list(range(int(mine.sum())))
            for depth in range(4):
                one, two = together.tape.states[depth][row][mine], other.tape.states[depth][place][theirs]
                torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
            for key, grid in together.outputs.items():
                np.testing.assert_allclose(grid[at], other.outputs[key][there], atol=1e-4, rtol=1e-3, err_msg=key)
                assert np.isfinite(grid[at]).all()
            for key, values in together.tape.passport.items():
                theirs = other.tape.passport[key]
                np.testing.assert_allclose(values[row], theirs[place], rtol=1e-4, atol=1e-5, err_msg=key)
            for key, values in together.measured.token.items():
                np.testing.assert_allclose(values[at], other.measured.token[key][there], atol=1e-3, err_msg=key)


class _Keeps(torch.nn.Module):
    """A Llama that remembers by itself how many rows it began with: rows cannot leave."""

    def __init__(self, model: Any, wrong: str) -> None:
        super().__init__()
        self.inner, self.config, self.wrong = model, model.config, wrong
        self.generation_config = model.generation_config
        self.rows = 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        kept, self.inner.generation_config = self.inner.generation_config, self.generation_config
        try:
            return self.inner.generate(*args, **kwargs)
        finally:
            self.inner.generation_config = kept

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        use_cache: bool = False, logits_to_keep: int = 0,
    ) -> Any:  # fmt: skip
        out = self.inner(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache, logits_to_keep=logits_to_keep,
        )  # fmt: skip
        if past_key_values is None:
            self.rows = len(input_ids)
        if self.wrong == "raises" and len(input_ids) < self.rows:
            raise RuntimeError("the rows are not those I began with")
        if self.wrong == "wrong row" and len(input_ids) < self.rows:
            out.logits = out.logits.roll(1, -1)
        if self.wrong == "other texts" and past_key_values is not None:
            out.logits = out.logits.roll(1, -1)
        if self.wrong == "no cache":
            out.past_key_values = None
        return out


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("raises", "RuntimeError: the rows are not those I began with"),
        ("wrong row", "scores change when another row leaves"),
        ("other texts", "its texts are not the library's"),
        ("no cache", "TypeError: the model returns no cache made of layers"),
    ],
)
def test_models_it_is_not_right_for_take_the_librarys_loop(wrong: str, why: str) -> None:
    plain = discover(build("llama"))
    found = discover(_Keeps(build("llama"), wrong))
    ends = ending_apart(plain)
    found.model.generation_config.eos_token_id = plain.model.generation_config.eos_token_id = ends  # type: ignore[union-attr]
    assert write(found) == write(plain)
    assert plain.facts["decodes_alone"] is True
    assert found.facts["decodes_alone"] is False
    assert why in found.facts["decodes_alone_not"]


def test_the_trial_sees_padding_also_where_the_first_batch_has_none() -> None:
    """A verdict on rows of one length would be no verdict on padded ones, and is given only once."""

    found, seen = discover(build("gpt2")), []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get("attention_mask"))

    handle = found.model.register_forward_pre_hook(note, with_kwargs=True)
    write(found, [0], max_new_tokens=2)
    handle.remove()
    assert found.facts["decodes_alone"] is True
    assert any(mask is not None and not bool(mask[:, 0].all()) for mask in seen)


def test_memory_that_runs_out_in_the_trial_is_no_verdict() -> None:
    found = discover(build("llama"))

    def full(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    handle = found.blocks[1].register_forward_pre_hook(full)
    with pytest.raises(RuntimeError, match="out of memory"):
        write(found)
    handle.remove()
    assert "decodes_alone" not in found.facts
    assert write(found)


def test_models_that_mix_rows_are_still_refused() -> None:
    with pytest.raises(ModelError, match="mixes the rows"):
        write(subject("rwkv"), [0, 0])


def test_the_trial_is_made_once() -> None:
    found, calls = discover(build("llama")), []
    original = loops._scores_of_second
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "_scores_of_second", lambda *a, **k: calls.append(1) or original(*a, **k))
        write(found, max_new_tokens=2)
        write(found, max_new_tokens=2)
    assert len(calls) == 2
