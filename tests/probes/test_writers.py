"""Perturbations at work in a model: sites, α = 0, causality, passports, functions."""

from typing import Any

import numpy as np
import pytest
import torch
from models import LAYERS, NAMES, ROWS, TWO_UPDATES, subject
from torch import Tensor

from dynprobe.errors import CalibrationError, ModelError, SiteError, UsageError
from dynprobe.models import weights_hash
from dynprobe.probes import (
    Calibration,
    Instrument,
    Perturb,
    PerturbWriter,
    capture,
    make_batch,
    make_writers,
    perturb,
)
from dynprobe.probes._decode import decode
from dynprobe.probes._noise import gaussian
from dynprobe.probes._outputs import identical

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
DIRECTION = np.linspace(-1, 1, 32)
WRITES: list[dict[str, Any]] = [
    *({"scale": s} for s in ("relnorm", "coordstd", "mad", "cov", "abs", "interp", "neftune", "isokl")),
    *({"kind": "direction", "direction": DIRECTION, "scale": s} for s in ("relnorm", "coordstd", "mad", "cov", "abs")),
    *({"kind": k} for k in ("scale", "rotate", "dropout")),
]


def yardstick(n_layers: int = LAYERS, dim: int = 32) -> Calibration:
    draw = torch.Generator().manual_seed(1)
    tensors = {"mean": torch.zeros(n_layers + 1, dim), "std": torch.rand(n_layers + 1, dim, generator=draw) + 0.1}
    for depth in range(n_layers + 1):
        tensors[f"cov_basis.{depth}"] = torch.linalg.qr(torch.randn(dim, dim, generator=draw)).Q
        tensors[f"cov_sqrt.{depth}"] = torch.rand(dim, generator=draw) + 0.1
    return Calibration(tensors, {}, {"hash": "test"})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(a: Any, b: Any) -> None:
    assert a.depths == b.depths
    assert all(identical(x, y) for x, y in zip(a.states, b.states, strict=True))
    assert identical(a.logits, b.logits)


@pytest.mark.parametrize("write", WRITES, ids=lambda w: "-".join(str(v) for k, v in w.items() if k != "direction"))
def test_alpha_zero_changes_no_bit(write: dict[str, Any]) -> None:
    found, spec = subject("llama"), Perturb(0.0, layers="all", positions="all", **write)
    same(capture(found, ROWS, perturb=spec, logits="all", calibration=yardstick()), capture(found, ROWS, logits="all"))
    clean = logits(found.model)
    with perturb(found, spec, calibration=yardstick()) as instrument:
        assert identical(logits(found.model), clean)
        assert instrument.fired  # it did go through the write path


@pytest.mark.parametrize("name", NAMES)
def test_alpha_zero_changes_no_bit_of_any_architecture(name: str) -> None:
    found = subject(name)
    clean = capture(found, ROWS, logits="all")
    spec = "alpha=0,layers=all,positions=all,component=resid_pre+resid_post"
    same(capture(found, ROWS, perturb=spec, logits="all"), clean)


@pytest.mark.parametrize("name", NAMES)
def test_a_write_reaches_nothing_before_it_in_depth_or_time(name: str) -> None:
    found = subject(name)
    clean = capture(found, [ROWS[0]], logits="all")
    pushed = capture(found, [ROWS[0]], perturb="alpha=0.5,layers=1,positions=3", logits="all")
    assert torch.equal(pushed.states[0], clean.states[0])
    assert torch.equal(pushed.states[1], clean.states[1])
    # A mixture of experts multiplies the tokens of one expert together: where another token is routed, the rounding of
    # earlier ones changes with the shape. Everywhere else the past is untouched to the bit.
    room = 1e-5 if name == "mixtral" else 0.0
    for depth in (2, 3):
        moved = (pushed.states[depth] - clean.states[depth]).abs().amax(-1)[0]
        assert (moved[:3] <= room).all()
        assert moved[3] > 1e-2
    assert not (pushed.states[2] != clean.states[2]).any(-1)[0, 4:].any()  # written at one position, not yet mixed
    assert (pushed.states[3] != clean.states[3]).any(-1)[0, 4:].all()  # the next block carries it on
    torch.testing.assert_close(pushed.logits[0, :3], clean.logits[0, :3], atol=10 * room, rtol=0)  # type: ignore[index]
    assert not torch.equal(pushed.logits[0, 3], clean.logits[0, 3])  # type: ignore[index]


def test_the_default_spares_the_first_position_and_padding() -> None:
    found = subject("llama")
    for side in ("left", "right"):
        clean = capture(found, ROWS, padding=side)
        pushed = capture(found, ROWS, perturb="alpha=0.5,layers=1", padding=side)
        changed = (pushed.states[2] != clean.states[2]).any(-1)
        assert torch.equal(changed, clean.positions >= 1)


def test_layer_six_changes_depth_seven() -> None:
    """A write at layers=l changes the output of block l, which is depth l + 1; exactly by u."""
    found = subject("gpt2")
    clean, pushed = capture(found, ROWS), capture(found, ROWS, perturb="alpha=0.25,layers=1,positions=2")
    h = clean.at(layer=1, pos=2)
    eps = torch.stack([torch.from_numpy(gaussian(0, key, "resid_post.1", 2, 32)) for key in clean.row_keys])
    expected = h + 0.25 * h.norm(dim=-1, keepdim=True) * eps / eps.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(pushed.at(layer=1, pos=2), expected)
    assert torch.equal(pushed.at(layer=0), clean.at(layer=0))


def test_what_is_written_before_a_block_is_what_the_tape_says_entered_it() -> None:
    found = subject("llama")
    tape = capture(found, ROWS, perturb="alpha=0.5,layers=2,component=resid_pre", where="component=resid_pre")
    whole = capture(found, ROWS, perturb="alpha=0.5,layers=2,component=resid_pre")
    clean = capture(found, ROWS)
    assert not torch.equal(tape.states[2], clean.states[2])
    assert torch.equal(tape.states[2], whole.states[2])
    assert torch.equal(tape.states[1], clean.states[1])


@pytest.mark.parametrize("name", TWO_UPDATES)
@pytest.mark.parametrize("component", ["attn_out", "mlp_out"])
def test_updates_can_be_written(name: str, component: str) -> None:
    found = subject(name)
    read = f"layers=all,component=resid_pre+resid_post+{component}"
    clean = capture(found, ROWS, where=read)
    pushed = capture(found, ROWS, where=read, perturb=f"alpha=0.5,layers=1,positions=2,component={component}")
    moved = pushed.updates[component, 1] - clean.updates[component, 1]
    at = clean.positions == 2
    assert (moved[~at] == 0).all()
    ratio = moved[at].norm(dim=-1) / clean.updates[component, 1][at].norm(dim=-1)
    torch.testing.assert_close(ratio, torch.full((3,), 0.5))
    if component == "mlp_out":  # nothing comes after it in the block: its push is the block's
        torch.testing.assert_close((pushed.states[2] - clean.states[2])[at], moved[at], atol=1e-4, rtol=1e-4)


def test_passports_say_what_was_written_and_to_whom() -> None:
    found = subject("llama")
    tape = capture(found, ROWS, perturb="alpha=0.1,layers=all")
    assert np.allclose(tape.passport["alpha_relnorm"], 0.1, rtol=1e-5)
    assert capture(found, ROWS).passport == {}
    only = capture(found, ROWS, perturb="alpha=0.1,layers=1,positions=4").passport["alpha_relnorm"]
    assert np.isnan(only).tolist() == [False, True, False]  # the second row has three tokens


def test_every_component_of_a_write_is_in_the_passport() -> None:
    """attn_out runs before resid_post though it stands after it in the list of components."""
    found = subject("llama")
    batch = make_batch(found, ROWS)
    writer = PerturbWriter(found, Perturb.parse("alpha=0.1,layers=0:2,component=resid_post+attn_out,positions=1"))
    assert writer.sites[0][0] == "resid_post"
    for _ in range(2):  # a second sequence starts a new passport
        with Instrument(found, (), [writer]), torch.no_grad():
            found.model(**batch.model_inputs(found))
        note = writer.passport()
        assert note is not None
        assert note.n_states.tolist() == [4, 4, 4]
        assert writer.counts == {"asked": 12, "zero": 0, "nonfinite": 0}


def test_rows_that_had_ended_do_not_count() -> None:
    found = subject("llama")
    writer = PerturbWriter(found, Perturb.parse("alpha=0.1,layers=1"))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with Instrument(found, (), [writer]), torch.no_grad():
        found.model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    whole, partial = writer.passport(), writer.passport(np.array([6, 4]))
    assert whole is not None
    assert partial is not None
    assert whole.n_states.tolist() == [5, 5]  # positions 1 … 5
    assert partial.n_states.tolist() == [5, 3]


def test_rows_that_left_keep_their_books_when_tokens_are_taken_back() -> None:
    """What stands after a rewind is what a shorter run would have written, also for rows that are gone by then."""
    found = subject("llama")
    spec = Perturb.parse("alpha=0.1,layers=1,positions=1:")

    def fed(long: int, back: int) -> PerturbWriter:
        writer = PerturbWriter(found, spec)
        batch = make_batch(found, [[8, 9], [3, 4, 5, 6, 7, 1]], side="left", row_keys=["a", "b"])
        with Instrument(found, (), [writer], **batch.rows) as instrument, torch.no_grad():
            texts = [[11, 12, 13, 14, 15, 16, 17, 18][:long], [21, 22]]
            decode(found, batch, long, (), instrument=instrument, forced=texts)
            instrument.rewind(back)
        return writer

    taken, shorter = fed(8, 3), fed(5, 0)
    assert taken.counts == shorter.counts
    for mine, theirs in zip(taken.asked(), shorter.asked(), strict=True):
        assert mine.tolist() == theirs.tolist()
    a, b = taken.passport(), shorter.passport()
    assert a is not None
    assert b is not None
    assert a.n_states.tolist() == b.n_states.tolist()
    own = taken.passport(np.array([6, 7]))
    assert own is not None
    assert own.n_states.tolist() == [5, 6]  # positions 1 … 5, and 1 … 6 of the row that has left
    for unit, values in a.rows().items():
        np.testing.assert_allclose(values, b.rows()[unit], rtol=1e-6, err_msg=unit)


def test_first_position() -> None:
    found = subject("llama")

    def first(where: str) -> list[int]:
        return PerturbWriter(found, Perturb.parse(f"alpha=0.1,{where}")).first_position([3, 5], 8).tolist()

    assert first("layers=1") == [1, 1]
    assert first("positions=last") == [2, 4]
    assert first("phase=decode") == [3, 5]
    assert first("positions=20") == [8, 8]


def test_noise_is_the_rows_own() -> None:
    """Neither neighbours, nor padding, nor order change what a row is pushed by."""
    found, spec = subject("llama"), "alpha=0.5,layers=1"

    def push(rows: list[list[int]], **more: Any) -> list[Tensor]:
        clean, pushed = (capture(found, rows, perturb=p, **more) for p in (None, spec))
        return [(b.states[2] - a.states[2])[i][a.mask[i]] for i in range(len(rows)) for a, b in [(clean, pushed)]]

    together, left, turned = push(ROWS), push(ROWS, padding="left"), push(ROWS[::-1])[::-1]
    for i, row in enumerate(ROWS):
        for other in (push([row])[0], left[i], turned[i]):
            torch.testing.assert_close(together[i], other, atol=1e-5, rtol=1e-5)
    named = push([ROWS[0], ROWS[0]], row_keys=["a", "b"])
    assert not torch.allclose(named[0], named[1])
    twins = push([ROWS[0], ROWS[0]])
    assert torch.equal(twins[0], twins[1])


def test_functions_write_at_every_block() -> None:
    found, seen = subject("llama"), []

    def half(state: Tensor, site: str) -> Tensor:
        seen.append(site)
        return state * 0.5 if site == "resid_post.2" else state

    clean, pushed = capture(found, ROWS), capture(found, ROWS, perturb=half)
    assert seen == ["resid_post.0", "resid_post.1", "resid_post.2"]
    assert torch.equal(pushed.states[3], clean.states[3] * 0.5)
    assert torch.equal(pushed.states[2], clean.states[2])
    wide = capture(found, ROWS, perturb=lambda h, site: h.double())
    assert wide.states[1].dtype == torch.float32
    both = capture(found, ROWS, perturb=[half, "alpha=0,layers=1"])
    assert torch.equal(both.states[3], pushed.states[3])
    for wrong, message in (
        (lambda h, s: h[:, :1], r"returned \(3, 1, 32\) at resid_post.0"),
        (lambda h, s: None, "NoneType"),
    ):
        with pytest.raises(UsageError, match=message):
            capture(found, ROWS, perturb=wrong)


def test_interpolation_towards_a_donor() -> None:
    found = subject("llama")
    batch, donor = make_batch(found, ROWS), capture(found, [[40, 41, 42, 43]])
    clean = capture(found, ROWS)
    donors = {("resid_post", 1): [donor.states[2][0]] * 3}
    writers = make_writers(found, "alpha=0.25,scale=interp,layers=1", donors=donors)
    instrument = Instrument(found, [("resid_post", 1)], writers)
    with instrument, torch.no_grad():
        found.model(**batch.model_inputs(found))
    after, h = instrument.tape().at(layer=1, pos=2), clean.at(layer=1, pos=2)
    torch.testing.assert_close(after, h + 0.25 * (donor.states[2][0, 2] - h))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("alpha=0.1,layers=9", SiteError, "layers=9 is out of range"),
        ("alpha=0.1,layers=1,component=resid_mid", SiteError, "write attn_out instead"),
        ("alpha=0.1,iterations=3", UsageError, "has layers and no iterations or slots"),
        ("alpha=0.1,slots=3", UsageError, "has layers and no iterations or slots"),
        ("alpha=0.1,scale=isokl", UsageError, "use dp.run"),
        ("alpha=0.1,scale=interp", UsageError, "states of another prompt"),
        ("alpha=0.1,scale=coordstd,component=mlp_out", UsageError, "calibrated along the residual stream"),
        ("alpha=0.1,scale=coordstd", CalibrationError, "needs the coordinate SDs at resid_post.1.*dynprobe calibrate"),
    ],
)
def test_writes_that_cannot_be_made(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        capture(subject("llama"), ROWS, perturb=spec)


def test_calibrations_of_another_width_are_refused() -> None:
    with pytest.raises(CalibrationError, match="16 coordinates, the states 32"):
        capture(subject("llama"), ROWS, perturb="alpha=0.1,scale=coordstd", calibration=yardstick(dim=16))


def test_a_calibration_of_another_model_is_refused() -> None:
    found = subject("llama")
    other = yardstick()
    other.header |= {"weights": "tensors-blake2b:00", "dtype": "float32"}
    spec = "alpha=0.1,layers=1,scale=coordstd"
    with pytest.raises(CalibrationError, match="was made with weights 'tensors-blake2b:00'"):
        capture(found, ROWS, perturb=spec, calibration=other)
    with pytest.raises(CalibrationError, match="was made with weights"), perturb(found, spec, calibration=other):
        pass
    own = yardstick()
    own.header |= {"weights": weights_hash(found.model), "dtype": "float32"}
    same(
        capture(found, ROWS, perturb=spec, calibration=own), capture(found, ROWS, perturb=spec, calibration=yardstick())
    )


def test_coordstd_uses_the_depth_that_is_written() -> None:
    found, spec = subject("llama"), "alpha=0.5,scale=coordstd,layers=1,positions=2"
    clean = capture(found, ROWS)
    pushed = capture(found, ROWS, perturb=spec, calibration=yardstick())
    eps = torch.stack([torch.from_numpy(gaussian(0, key, "resid_post.1", 2, 32)) for key in clean.row_keys])
    moved = pushed.at(layer=1, pos=2) - clean.at(layer=1, pos=2)
    torch.testing.assert_close(moved, 0.5 * yardstick().tensors["std"][2] * eps, atol=1e-5, rtol=1e-4)


def test_non_finite_states_are_left_alone_and_counted() -> None:
    found = subject("llama")
    batch = make_batch(found, ROWS)

    class Breaks:
        sites = (("resid_post", 0),)

        def write(self, state: Tensor, site: Any, step: Any) -> Tensor:
            broken = state.clone()
            broken[0, 2, 5] = float("nan")
            return broken

    writer = PerturbWriter(found, Perturb.parse("alpha=0.5,layers=0"))
    instrument = Instrument(found, [("resid_post", 0)], [Breaks(), writer])
    with instrument, torch.no_grad():
        found.model(**batch.model_inputs(found))
    assert writer.counts == {"asked": 12, "zero": 0, "nonfinite": 1}
    assert int(instrument.tape().states[1].isnan().sum()) == 1


def test_perturb_wants_something_to_write_and_a_call() -> None:
    with pytest.raises(UsageError, match="needs a perturbation"), perturb(subject("llama"), None):
        pass
    with pytest.raises(ModelError, match=r"was not called inside dp\.perturb"), perturb(subject("llama"), "alpha=0.1"):
        pass
