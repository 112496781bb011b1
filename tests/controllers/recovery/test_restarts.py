"""Tokens that were taken back leave nothing behind but a record."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from models import subject as architecture

import dynprobe as dp
from dynprobe.controllers import Controller, Restart, Steering, generate_with, why_not
from dynprobe.errors import ModelError, UsageError
from dynprobe.probes import (
    Instrument,
    Perturb,
    PerturbWriter,
    RowsWriter,
    Sampling,
    Subject,
    Where,
    generate,
    make_batch,
    sites_to_read,
)
from dynprobe.probes._decode import decode
from dynprobe.probes._outputs import logits_of
from dynprobe.probes._restarts import write_row
from dynprobe.testing import tiny_gpt2, tiny_llama

PROMPT = [5, 6, 7, 8, 9]
DRAWN = Sampling(14, temperature=1.0, seed=3, stop_at_eos=False)


def row(model: Subject, ids: list[int] = PROMPT, key: str = "a", n_prompt: int | None = None) -> Any:
    return make_batch(model, [ids], row_keys=[key], n_prompt=None if n_prompt is None else [n_prompt])


def at(n: int, *wishes: Restart) -> Callable[[list[int], list[float]], Restart | None]:
    """Wish once, one after the other, whenever there are n tokens."""
    left = list(wishes)
    return lambda new, nll: left.pop(0) if left and len(new) == n else None


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon", "gptj", "neox", "tiny-cem"])
def test_the_cache_is_that_of_a_fresh_prefill(name: str) -> None:
    model = dp.load(name) if name.startswith("tiny") else architecture(name)
    caches: list[list[Any]] = []

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not None:
            caches.append([(layer.keys.clone(), layer.values.clone()) for layer in kwargs["past_key_values"].layers])

    write_row(model, row(model), DRAWN, at(14, Restart(keep=13)))  # what is tried once per model is tried first
    plain = write_row(model, row(model), DRAWN).new
    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    wish = at(9, Restart(keep=4, seed_shift=10_000), Restart(keep=2))
    written = write_row(model, row(model), DRAWN, wish)
    handle.remove()
    assert [(r.attempt, r.at, r.kept) for r in written.restarts] == [(1, 9, 4), (2, 9, 2)]
    # Of nine tokens eight are fed; then from four kept to nine again, and from two kept to the end.
    assert [layers[0][0].shape[-2] - len(PROMPT) for layers in caches] == [*range(8), *range(4, 8), *range(2, 13)]
    for number, kept in ((8, 4), (12, 2)):
        with torch.no_grad():
            batch = row(model, PROMPT + plain[:kept])
            fresh = model.model(**batch.model_inputs(model, cache=True)).past_key_values
        for (keys, values), layer in zip(caches[number], fresh.layers, strict=True):
            for mine, theirs in ((keys, layer.keys), (values, layer.values)):
                assert mine.shape == theirs.shape
                assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_what_follows_is_a_fresh_generation_from_the_shorter_text(make: Callable[[], Subject], top_p: float) -> None:
    model = make()
    sampling = Sampling(14, temperature=1.2, top_p=top_p, seed=3, stop_at_eos=False)
    plain = write_row(model, row(model), sampling)
    assert plain.new == generate(model, row(model), sampling)[0]
    written = write_row(model, row(model), sampling, at(9, Restart(keep=4, seed_shift=10_000)))
    assert written.new[:4] == plain.new[:4]
    assert written.restarts[0].dropped == tuple(plain.new[4:9])
    assert written.new != plain.new
    other = Sampling(10, temperature=1.2, top_p=top_p, seed=10_003, stop_at_eos=False)
    assert written.new[4:] == generate(model, row(model, PROMPT + plain.new[:4]), other)[0]


def test_another_temperature_and_seed_hold_for_some_tokens(llama: Subject) -> None:
    plain = write_row(llama, row(llama), DRAWN)
    wish = at(9, Restart(keep=4, temperature=0.6, seed_shift=7, hold=3))
    written = write_row(llama, row(llama), DRAWN, wish)
    cool = Sampling(3, temperature=0.6, seed=10, stop_at_eos=False)
    assert written.new[4:7] == generate(llama, row(llama, PROMPT + plain.new[:4]), cool)[0]
    rest = Sampling(7, temperature=1.0, seed=3, stop_at_eos=False)
    assert written.new[7:] == generate(llama, row(llama, PROMPT + written.new[:7]), rest)[0]


def test_a_greedy_text_may_be_drawn_anew_for_a_while_and_is_greedy_again(llama: Subject) -> None:
    greedy = Sampling(14, stop_at_eos=False)
    written = write_row(llama, row(llama), greedy, at(9, Restart(keep=4, temperature=1.5, seed_shift=1, hold=2)))
    assert written.new[6:] == generate(llama, row(llama, PROMPT + written.new[:6]), Sampling(8, stop_at_eos=False))[0]


def test_the_newest_token_alone_may_be_taken_back(llama: Subject) -> None:
    plain = write_row(llama, row(llama), DRAWN)
    written = write_row(llama, row(llama), DRAWN, at(14, Restart(keep=13, seed_shift=1), Restart(keep=13)))
    assert len(written.restarts) == 2
    assert written.new == plain.new  # the second attempt has the seed of the run again


def test_the_nll_is_that_of_the_text(llama: Subject) -> None:
    batch, perturb = row(llama), PerturbWriter(llama, Perturb(0.5, layers=1))
    instrument = Instrument(llama, (), [perturb], **batch.rows)
    written = write_row(llama, batch, DRAWN, at(9, Restart(keep=4, seed_shift=1)), instrument)
    fed = row(llama, PROMPT + written.new[:-1], n_prompt=len(PROMPT))
    with torch.no_grad(), Instrument(llama, (), [PerturbWriter(llama, Perturb(0.5, layers=1))], **fed.rows):
        logits = logits_of(llama.model(**fed.model_inputs(llama)))[0, len(PROMPT) - 1 :]
    want = -torch.log_softmax(logits.double(), -1)[torch.arange(14), torch.tensor(written.new)]
    np.testing.assert_allclose(written.nll, want, atol=1e-4)


class _Counting(Controller):
    """Adds a little to block 1 of every token by the number of tokens it has seen since the prompt."""

    id = "test.counting/1"
    reads = writes = "layers=1"

    def start(self, n_rows: int) -> Any:
        return {"seen": np.zeros(n_rows), "signal": np.zeros(n_rows), "active": np.ones(n_rows, bool)}

    def decide(self, seen: Any, memory: Any) -> None:
        memory["seen"] = memory["seen"] + 1
        memory["signal"] = memory["seen"]

    def act(self, state: Any, site: Any, seen: Any, memory: Any) -> Any:
        return state + 0.01 * torch.from_numpy(memory["seen"]).to(state)[:, None, None]


@pytest.mark.parametrize("name", ["llama", "tiny-cem"])
def test_tape_books_and_memory_are_those_of_a_run_that_never_had_the_tokens(name: str) -> None:
    model = dp.load("tiny-cem") if name == "tiny-cem" else tiny_llama()
    strengths = np.array([0.4])

    def instrumented(batch: Any) -> tuple[Instrument, Steering, Any]:
        steering = Steering(_Counting(), model, remember=True)
        # Six of the nine new tokens, so that some of what is taken back was written and some was not.
        place = Perturb(1.0, seed=2).replace(where=Where.parse("layers=1,positions=7:13"))
        plain = PerturbWriter(model, place, magnitude=strengths)
        rows = RowsWriter([(PerturbWriter(model, Perturb(0.3, layers=0)), np.array([0]))], 1)
        read = sites_to_read(model, Where.parse("layers=all"))
        return Instrument(model, read, [plain, rows, steering], energies=True, **batch.rows), steering, plain

    batch = row(model)
    one, mine, writer = instrumented(batch)
    wish = at(9, Restart(keep=4, seed_shift=10_000), Restart(keep=1))
    new = write_row(model, batch, DRAWN, wish, one).new
    other, theirs, second = instrumented(batch)
    with torch.no_grad(), other:
        decode(model, batch, 14, (), instrument=other, forced=[new])
    assert one.check_fired() == other.check_fired()
    a, b = one.tape(), other.tape()
    assert torch.equal(a.positions, b.positions)
    assert torch.equal(a.token_ids, b.token_ids)
    for x, y in zip(a.states, b.states, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert a.passport.keys() == b.passport.keys()
    for unit, values in a.passport.items():
        np.testing.assert_allclose(values, b.passport[unit], rtol=1e-5, err_msg=unit)
    assert writer.counts == second.counts
    assert a.energies.keys() == b.energies.keys() == ({"energy", "energy_prev"} if name == "tiny-cem" else set())
    for key, values in a.energies.items():
        np.testing.assert_allclose(values, b.energies[key], rtol=1e-4, atol=1e-4)
    pd.testing.assert_frame_equal(mine.actions(), theirs.actions())
    assert mine.memory["seen"].tolist() == [14.0]


def test_a_drive_loses_what_was_taken_back(llama: Subject) -> None:
    drives = []
    for wish in (None, at(9, Restart(keep=4))):
        writer = PerturbWriter(llama, Perturb(0.2, kind="sine", period=5, layers=1))
        write_row(llama, row(llama), DRAWN, wish, Instrument(llama, (), [writer]))
        drives.append(writer.drive())
    assert torch.equal(*drives)  # the same seed again is the same text again


@pytest.mark.parametrize(
    ("name", "why"), [("mamba", "takes no cache"), ("mistral", "sliding window"), ("gemma2", "sliding window"),
                      ("tiny-csm", "CsmCache")],
)  # fmt: skip
def test_models_that_cannot_take_tokens_back_are_refused_before_anything_runs(name: str, why: str) -> None:
    model = dp.load(name) if name.startswith("tiny") else architecture(name)
    asked: list[int] = []
    instrument = Instrument(model, sites_to_read(model, Where.parse("layers=all")))
    with pytest.raises(ModelError, match=f"cannot take tokens back: .*{why}"):
        write_row(model, row(model), DRAWN, lambda new, nll: asked.append(1), instrument)
    assert not asked
    assert not instrument.steps


def test_a_cache_that_lies_about_its_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import DynamicLayer

    def forgetful(self: Any, tokens_to_remove: int) -> None:
        self.keys = self.keys[..., :tokens_to_remove, :] * 1.5
        self.values = self.values[..., :tokens_to_remove, :]

    monkeypatch.setattr(DynamicLayer, "crop", forgetful)
    with pytest.raises(ModelError, match="logits differ"):
        write_row(tiny_llama(), row(tiny_llama()), DRAWN, at(3, Restart(keep=1)))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Restart(keep=9), "keep 9 of 9 new tokens"), (Restart(keep=-1), "keep -1"),
        (Restart(keep=2, hold=0), "hold for 0"),
    ],
)  # fmt: skip
def test_wishes_without_meaning(llama: Subject, wanted: Restart, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_row(llama, row(llama), DRAWN, at(9, wanted))


def test_wishes_that_never_end_and_other_misuse(llama: Subject) -> None:
    with pytest.raises(UsageError, match="does not end"):
        write_row(llama, row(llama), DRAWN, lambda new, nll: Restart(keep=0) if len(new) == 1 else None)
    two = make_batch(llama, [PROMPT, PROMPT], side="left")
    with pytest.raises(UsageError, match="2 rows"):
        write_row(llama, two, DRAWN)
    heard = Instrument(llama, (), (), listeners=(lambda step, output: None,))
    with pytest.raises(UsageError, match="cannot forget"):
        write_row(llama, row(llama), DRAWN, at(9, Restart(keep=1)), heard)


class _Back(Controller):
    """Goes back to two tokens once, when a row has as many as its prompt."""

    id, restarts = "test.back/1", True

    def start(self, n_rows: int) -> Any:
        return {"n": np.zeros(n_rows, int), "done": np.zeros(n_rows, bool), "active": np.zeros(n_rows, bool)}

    def decide(self, seen: Any, memory: Any) -> None:
        if not seen.decoding:
            memory["n"] = seen.step.n_prompt + 0

    def survives(self) -> tuple[str, ...]:
        return ("done",)

    def restart(self, new: list[int], nll: list[float], memory: Any) -> Restart | None:
        if memory["done"][0] or len(new) != memory["n"][0]:
            return None
        memory["done"] = np.array([True])
        return Restart(keep=2, seed_shift=10_000)


ROWS = [[5, 6, 7, 8, 9], [11, 12, 13], [3, 9, 27, 81, 44, 45, 46]]


def test_rows_together_are_rows_alone(llama: Subject) -> None:
    def made(model: Subject) -> list[Steering]:
        return [Steering(_Counting(), model), Steering(_Back(), model)]

    batch = make_batch(llama, ROWS, side="left", row_keys=list("abc"))
    together = generate_with(llama, batch, DRAWN, None, made(llama))
    for number, ids in enumerate(ROWS):
        steerings = made(llama)
        writer = PerturbWriter(llama, Perturb(0.0, layers=1))
        one = row(llama, ids, "abc"[number])
        alone = generate_with(llama, one, DRAWN, Instrument(llama, (), [writer, *steerings], **one.rows), steerings)
        assert alone.new[0] == together.new[number]
        assert alone.restarts[0] == together.restarts[number]
        for mine, all_rows in zip(alone.actions, together.actions, strict=True):
            theirs = all_rows[all_rows["row"] == number].drop(columns="row").reset_index(drop=True)
            pd.testing.assert_frame_equal(mine.drop(columns="row"), theirs)
    table = together.restart_table()
    assert table[["row", "attempt", "at", "kept", "dropped", "seed"]].to_numpy().tolist() == [
        [i, 1, len(ids), 2, len(ids) - 2, 10_003] for i, ids in enumerate(ROWS)
    ]
    assert set(table["why"]) == {"test.back/1"}


def test_several_rows_need_an_instrument_each(llama: Subject) -> None:
    batch = make_batch(llama, ROWS, side="left", row_keys=list("abc"))
    steering = Steering(_Back(), llama)
    with pytest.raises(UsageError, match="one at a time"):
        generate_with(llama, batch, DRAWN, Instrument(llama, (), [steering], **batch.rows), [steering])
    strengths, made = np.array([0.0, 0.5, 1.0]), []

    def instrument(number: int) -> Instrument:
        writer = PerturbWriter(llama, Perturb(1.0, layers=1), magnitude=strengths[[number]])
        made.append(Instrument(llama, (), [writer, steering], row_keys=["abc"[number]]))
        return made[-1]

    written = generate_with(llama, batch, DRAWN, instrument, [steering])
    assert len(made) == 3
    assert written.new[0] == generate_with(llama, row(llama, ROWS[0]), DRAWN, None, [Steering(_Back(), llama)]).new[0]
    sizes = [float(i.passport().get("alpha_relnorm", [0.0])[0]) for i in made]
    assert sizes == pytest.approx([0.0, 0.5, 1.0], rel=1e-3)
    with pytest.raises(UsageError, match="not among the instrument's writers"):
        generate_with(llama, row(llama), DRAWN, Instrument(llama), [steering])
    with pytest.raises(UsageError, match="none of these does"):
        generate_with(llama, batch, DRAWN, instrument, [Steering(_Counting(), llama)])


def test_without_restarts_rows_are_decoded_together(llama: Subject) -> None:
    batch = make_batch(llama, ROWS, side="left", row_keys=list("abc"))
    widths: list[int] = []
    steering = Steering(_Counting(), llama)
    generate(llama, batch, DRAWN)
    handle = llama.blocks[0].register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    written = generate_with(llama, batch, DRAWN, None, [steering])
    handle.remove()
    assert set(widths) == {3}
    assert written.restarts == [[], [], []]
    assert written.restart_table().empty
    assert written.actions[0]["row"].nunique() == 3


def test_what_cannot_act_says_so() -> None:
    assert why_not([_Back()], DRAWN) is None
    greedy, short = _Back(), _Back()
    greedy.needs_sampling, short.min_new_tokens = True, 24
    assert "greedy" in str(why_not([greedy], Sampling(40)))
    assert why_not([greedy], Sampling(40, temperature=0.1)) is None
    assert "24 new tokens" in str(why_not([_Back(), short], Sampling(23)))
    with pytest.raises(UsageError, match="24 new tokens"):
        generate_with(tiny_llama(), row(tiny_llama()), DRAWN, None, [Steering(short, tiny_llama())])
    with pytest.raises(UsageError, match="only dynprobe's own loop"), _Back().attach(tiny_llama()):
        pass
