"""The contract from a user's side: attach, compose, generate, and nothing left behind."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from toys import NEW, PROMPTS, History, Scale, Shift, calibration_of, fed

import dynprobe as dp
from dynprobe.controllers import Controller, Steering, attached
from dynprobe.controllers.recovery import Always, Clamp, Deadband, Recovery, Slerp
from dynprobe.errors import CalibrationError, ModelError, SiteError, UsageError
from dynprobe.probes import Sampling, discover, generate, identical, live_hooks, make_batch
from dynprobe.testing import tiny_gpt2, tiny_llama

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def generated(model: Any, **settings: Any) -> Tensor:
    with torch.no_grad():
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, eos_token_id=None, **settings)


# ------------------------------------------------------------------------------------------------- nothing left behind


def test_a_controller_is_gone_when_its_block_ends() -> None:
    model = tiny_llama().model.eval()
    before = model(IDS).logits
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    with Scale().attach(model) as handle:
        generated(model, max_new_tokens=4, do_sample=False)
        assert live_hooks(model) > 0
    assert (handle.actions()["energy"] > 0).sum() == 2 * 3  # the last token is not fed, the prompt not acted on
    assert live_hooks(model) == 0
    assert identical(before, model(IDS).logits)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


@pytest.mark.parametrize("where", ["act", "decide", "choose", "start", "bind", "body"])
def test_an_error_inside_leaves_nothing(where: str) -> None:
    model = tiny_llama().model.eval()
    before = model(IDS).logits

    class Breaks(Scale):
        pass

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("mine")

    if where != "body":
        setattr(Breaks, where, broken)

    def use() -> None:
        with Breaks().attach(model):
            generated(model, max_new_tokens=3, do_sample=False)
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        use()
    assert live_hooks(model) == 0
    assert identical(before, model(IDS).logits)
    with Scale().attach(model) as handle:  # and the model can be steered again
        generated(model, max_new_tokens=3, do_sample=False)
    assert handle.actions()["energy"].gt(0).any()


def test_a_second_sequence_begins_anew() -> None:
    subject = tiny_llama()
    with History().attach(subject) as handle:
        generated(subject.model, max_new_tokens=5, do_sample=False)
        out = generated(subject.model, max_new_tokens=3, do_sample=False)
        assert handle.memory["n"].tolist() == [6, 6]
        assert handle.memory["text"][:, :6].tolist() == out[:, :6].tolist()
        assert len(handle.actions()) == 2 * 3


# ------------------------------------------------------------------------------------------------------------- order


def test_controllers_compose_in_the_order_given() -> None:
    subject = tiny_llama()
    clean = fed(subject, PROMPTS[:1], NEW[:1])
    for first, second, expect in (
        (Shift(1.0), Scale(2.0), lambda h: 2 * (h + 1)),
        (Scale(2.0), Shift(1.0), lambda h: 2 * h + 1),
    ):
        run = fed(subject, PROMPTS[:1], NEW[:1], first, second)
        pos = len(PROMPTS[0])  # the first new token: what is below block 2 was not touched in this forward
        below = fed(subject, PROMPTS[:1], NEW[:1], Scale(1.0)).state(0, pos, 2)
        assert torch.equal(below, clean.state(0, pos, 2))
        torch.testing.assert_close(run.state(0, pos, 2), expect(below))


@pytest.mark.parametrize("inside", [True, False])
def test_a_perturbation_comes_first_whichever_was_opened_first(inside: bool) -> None:
    subject = tiny_llama()

    class Sees(Controller):
        reads = writes = "layers=1"

        def start(self, n_rows: int) -> Any:
            return {"met": np.zeros(n_rows)}

        def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
            memory["met"] = state[:, -1].double().norm(dim=-1).numpy()
            return 3 * state

    contexts = [dp.perturb(subject, "alpha=0.5,layers=1"), Sees().attach(subject)]
    with contexts[inside] as one, contexts[not inside] as two:
        subject.model(IDS)
        handle = one if inside else two
        met = handle.memory["met"]
        shown = handle._seen is None
    assert shown
    with dp.perturb(subject, "alpha=0.5,layers=1"), dp.record(subject) as tape:
        subject.model(IDS)
    np.testing.assert_allclose(met, tape.states[2][:, -1].double().norm(dim=-1).numpy(), rtol=1e-6)


def test_all_see_what_is_there_after_all_have_written() -> None:
    subject = tiny_llama()

    class Watch(Controller):
        reads = "layers=1"

        def start(self, n_rows: int) -> Any:
            return {"norm": np.zeros(n_rows)}

        def decide(self, seen: Any, memory: Any) -> None:
            memory["norm"] = seen.states["resid_post", 1][:, -1].norm(dim=-1).numpy()

    watch, scale = Watch(), Scale(2.0)
    with attached([watch, scale], subject) as handles, dp.record(subject) as tape:
        generated(subject.model, max_new_tokens=3, do_sample=False)
    np.testing.assert_allclose(handles[0].memory["norm"], tape.states[2][:, -1].norm(dim=-1).numpy(), rtol=1e-6)


# -------------------------------------------------------------------------------------------------- the user's generate


def test_greedy_generation_is_that_of_dynprobe() -> None:
    subject = tiny_llama()
    with Scale(0.2).attach(subject):
        theirs = generated(subject.model, max_new_tokens=6, do_sample=False)[:, 4:].tolist()
    batch = make_batch(subject, IDS.tolist(), side="left")
    from dynprobe.probes import Instrument

    instrument = Instrument(subject, (), [Steering(Scale(0.2), subject)], **batch.rows)
    ours = generate(subject, batch, Sampling(max_new_tokens=6, stop_at_eos=False), instrument)
    assert theirs == ours
    assert theirs != generated(subject.model, max_new_tokens=6, do_sample=False)[:, 4:].tolist()


def test_sampling_and_several_samples_of_a_prompt() -> None:
    subject = tiny_llama()
    with History().attach(subject) as handle:
        torch.manual_seed(0)
        out = generated(subject.model, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert handle.memory["text"][:, :9].tolist() == out[:, :9].tolist()


class _Compare(transformers.LogitsProcessor):
    """Hold a controller's memory against the texts that the search goes on with."""

    def __init__(self, handles: Any) -> None:
        self.handles, self.seen, self.moved = handles, 0, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for handle in self.handles:
            np.testing.assert_array_equal(handle.memory["text"][:, : input_ids.shape[1]], input_ids.numpy())
            assert (handle.memory["n"] == input_ids.shape[1]).all()
        self.seen += 1
        return scores


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_memory_follows_the_beams(make: Any) -> None:
    subject = make()
    with attached([History(), History()], subject) as handles:
        compare = _Compare(handles)
        moves = []
        select = handles[0].select
        handles[0].select = lambda rows: (moves.append(rows.tolist()), select(rows))
        generated(subject.model, max_new_tokens=8, num_beams=3, do_sample=False, logits_processor=[compare])
    assert compare.seen == 8
    assert any(rows != sorted(rows) or len(set(rows)) < len(rows) for rows in moves)  # there was something to follow


def test_beams_under_two_blocks_that_close_in_any_order() -> None:
    subject = tiny_llama()
    outer, inner = History().attach(subject), History().attach(subject)
    one, two = outer.__enter__(), inner.__enter__()
    compare = _Compare([one, two])
    output = generated(
        subject.model, max_new_tokens=5, num_beams=2, do_sample=False, logits_processor=[compare],
        return_dict_in_generate=True,
    )  # fmt: skip
    cache = output.past_key_values
    outer.__exit__(None, None, None)
    compare.handles = [two]
    generated(subject.model, max_new_tokens=5, num_beams=2, do_sample=False, logits_processor=[compare])
    inner.__exit__(None, None, None)
    assert live_hooks(subject.model) == 0
    assert "reorder_cache" not in vars(cache)


def test_a_cache_is_let_go_when_the_next_sequence_begins() -> None:
    subject = tiny_llama()
    caches = []
    with History().attach(subject) as handle, torch.no_grad():
        for _ in range(2):
            output = subject.model(IDS, use_cache=True)
            caches.append(output.past_key_values)
        assert ["reorder_cache" in vars(c) for c in caches] == [False, True]
        copied = copy.deepcopy(caches[1])
        before = handle.memory["text"].copy()
        copied.reorder_cache(torch.tensor([1, 0]))  # somebody's own copy: not the running sequence
        np.testing.assert_array_equal(handle.memory["text"], before)
        assert torch.equal(copied.layers[0].keys[0], caches[1].layers[0].keys[1])
        caches[1].reorder_cache(torch.tensor([1, 0]))
        np.testing.assert_array_equal(handle.memory["text"], before[::-1])
    assert "reorder_cache" not in vars(caches[1])


def test_a_models_own_reordering_is_followed_too() -> None:
    subject = tiny_llama()

    class Own(type(subject.model)):  # type: ignore[misc]
        def _reorder_cache(self, past: Any, beam_idx: Tensor) -> Any:
            past.reorder_cache(beam_idx)
            return past

    model = Own(subject.model.config).eval()
    with History().attach(discover(model)) as handle:
        compare = _Compare([handle])
        generated(model, max_new_tokens=6, num_beams=3, do_sample=False, logits_processor=[compare])
    assert compare.seen == 6
    assert "_reorder_cache" not in vars(model)


def test_assisted_decoding_is_refused() -> None:
    subject = tiny_llama()
    draft = tiny_llama(layers=1, seed=3).model
    ids = IDS[:1]
    with pytest.raises(ModelError, match="assisted decoding"), Scale(0.9).attach(subject):
        subject.model.generate(ids, assistant_model=draft, max_new_tokens=12, do_sample=False)
    assert live_hooks(subject.model) == 0


def test_generation_without_a_cache_says_that_nothing_acts() -> None:
    subject = tiny_llama()
    with pytest.warns(UserWarning, match=r"what History decides at .*use_cache=True"), History().attach(subject):
        generated(subject.model, max_new_tokens=3, do_sample=False, use_cache=False)
    with warnings.catch_warnings(), Scale().attach(subject):  # which decides nothing
        warnings.simplefilter("error")
        generated(subject.model, max_new_tokens=3, do_sample=False, use_cache=False)
    with warnings.catch_warnings(), History().attach(subject):
        warnings.simplefilter("error")
        subject.model(IDS)
        subject.model(IDS[:, :2])
        subject.model(IDS[:1])


def test_another_turn_of_a_talk_is_observed_like_a_prompt() -> None:
    subject = tiny_llama()
    with Scale().attach(subject) as handle, torch.no_grad():
        output = subject.model(IDS, use_cache=True)
        output = subject.model(IDS[:, :1], past_key_values=output.past_key_values, use_cache=True)
        subject.model(IDS[:, :3], past_key_values=output.past_key_values, use_cache=True)
    written = handle.actions()
    assert written[written["energy"] > 0]["pos"].unique().tolist() == [4]


def test_inference_mode() -> None:
    subject = tiny_llama()
    with Scale().attach(subject) as handle, torch.inference_mode():
        subject.model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert handle.actions()["energy"].gt(0).sum() == 6


# ------------------------------------------------------------------------------------------------------ other subjects


def test_bf16_states_stay_bf16() -> None:
    model = tiny_llama().model.to(torch.bfloat16)
    subject = discover(model)

    class Precise(Scale):
        def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
            return state.double() * 0.5 if seen.decoding else state

    with Precise().attach(subject) as handle, dp.record(subject) as tape:
        out = generated(model, max_new_tokens=4, do_sample=False)
    assert tape.states[2].dtype == torch.bfloat16
    assert out.shape == (2, 8)
    np.testing.assert_allclose(handle.actions()["energy"][handle.actions()["energy"] > 0], 0.25, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "writes", "depth"), [("tiny-cem", "layers=1,iterations=1", None), ("tiny-csm", "iterations=2", 2)]
)
def test_turns_and_slots(name: str, writes: str, depth: int | None) -> None:
    subject = dp.load(name)

    class Loop(Scale):
        def __init__(self) -> None:
            super().__init__(0.5)
            self.writes = self.reads = writes

    controller = Loop()
    site = Steering(controller, subject).sites[0]
    clean = fed(subject, PROMPTS, NEW)
    run = fed(subject, PROMPTS, NEW, controller)
    at = site[1] + 1
    assert depth in (None, at)
    for row, prompt in enumerate(PROMPTS):
        pos = len(prompt)
        h = clean.state(row, pos, at)
        assert h.shape == ((subject.n_slots, subject.dim) if subject.n_slots else (subject.dim,))
        torch.testing.assert_close(run.state(row, pos, at), 0.5 * h)
        assert torch.equal(run.state(row, pos - 1, at), clean.state(row, pos - 1, at))
    written = run.actions[run.actions["energy"] > 0]
    np.testing.assert_allclose(written["energy"], 0.25, rtol=1e-6)
    assert len(written) == 3 * 7


def test_a_model_that_changes_states_in_place_is_seen_as_it_was() -> None:
    class InPlace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(100, 16)
            self.blocks = torch.nn.ModuleList(_Adds(16) for _ in range(3))
            self.head = torch.nn.Linear(16, 100)

        def forward(self, input_ids: Tensor) -> Tensor:
            h = self.embed(input_ids)
            for block in self.blocks:
                h = block(h)
            return self.head(h)

    torch.manual_seed(0)
    subject = discover(InPlace().eval())
    assert subject.mutates

    class Keeps(Controller):
        reads = "layers=all"

        def start(self, n_rows: int) -> Any:
            return {"first": torch.zeros(n_rows, 16)}

        def decide(self, seen: Any, memory: Any) -> None:
            memory["first"] = seen.states["resid_post", 0][:, -1].clone()

    with Keeps().attach(subject) as handle, torch.no_grad():
        subject.model(IDS)
        embedded = subject.model.embed(IDS)
        assert torch.equal(handle.memory["first"], subject.model.blocks[0](embedded)[:, -1])


class _Adds(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        h += self.linear(h)
        return h


# ------------------------------------------------------------------------------------------------------------ refusals


class _Restarts(Controller):
    id, restarts = "mine/1", True


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"writes": "layers=9"}, SiteError, "layers=9 is out of range"),
        ({"reads": "layers=9"}, SiteError, "layers=9 is out of range"),
        ({"writes": "layers=1,positions=last"}, UsageError, "positions was given in writes=.*of Scale.*seen.step"),
        ({"writes": "layers=1,phase=decode"}, UsageError, "phase was given"),
        ({"reads": "layers=1,positions=last"}, UsageError, "positions was given"),
        ({"writes": "iterations=1"}, UsageError, "has layers and no iterations"),
    ],
)
def test_places_that_are_none(change: dict[str, str], error: type[Exception], message: str) -> None:
    controller = Scale()
    vars(controller).update(change)
    subject = tiny_llama()
    with pytest.raises(error, match=message), controller.attach(subject):
        pass
    assert live_hooks(subject.model) == 0


def test_updates_may_be_written_and_read() -> None:
    subject = tiny_llama()

    class Mute(Scale):
        reads = "layers=1,component=attn_out"

        def __init__(self) -> None:
            super().__init__(0.0)
            self.writes = "layers=1,component=attn_out"

        def decide(self, seen: Any, memory: Any) -> None:
            if seen.decoding:
                assert (seen.states["attn_out", 1] == 0).all()

    with Mute().attach(subject) as handle:
        generated(subject.model, max_new_tokens=3, do_sample=False)
    written = handle.actions()[handle.actions()["energy"] > 0]
    assert (written["site"] == "attn_out.1").all()
    np.testing.assert_allclose(written["energy"], 1.0)


def test_what_takes_tokens_back_cannot_be_attached() -> None:
    subject = tiny_llama()
    for block in (_Restarts().attach(subject), attached([Scale(), _Restarts()], subject)):
        with pytest.raises(UsageError, match=r"mine/1 takes tokens back.*dp.recover"), block:
            pass


def test_a_calibration_is_asked_whose_it_is(zoo: Any, calibrated: Any) -> None:
    subject, other = tiny_llama(), tiny_llama(seed=1)
    mine = calibration_of(subject)
    with Recovery(Always(), Clamp()).attach(subject, mine):
        pass
    with Recovery(Always(), Clamp()).attach(subject.model, mine):  # a bare module is hashed
        pass
    for stranger in (other, other.model, discover(tiny_llama().model.to(torch.bfloat16))):
        with (
            pytest.raises(
                CalibrationError, match=r"this calibration was made with .*make one with: dynprobe calibrate"
            ),
            Scale().attach(stranger, mine),
        ):
            pass
    with Recovery(Deadband(), Slerp()).attach(zoo, calibrated):
        pass
    # dp.calibrate hashed the tensors of the subject it was given; the same model, loaded again, is known by its files.
    with Recovery(Deadband(), Slerp()).attach(dp.load("tiny-llama"), calibrated):
        pass
    by_files = dp.calibrate("tiny-llama")
    assert by_files.header["weights"] != calibrated.header["weights"]
    for subject in (zoo, dp.load("tiny-llama")):
        with Recovery(Deadband(), Slerp()).attach(subject, by_files):
            pass
    with pytest.raises(CalibrationError, match="handed over as a module"), Scale().attach(zoo.model, by_files):
        pass
