"""The nnsight backend reads, pushes and generates what hooks do, on many architectures, and leaves nothing behind."""

from collections.abc import Callable, Iterator
from typing import Any

import models
import numpy as np
import pytest
import torch
from torch import Tensor

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.models import CemConfig, CemForCausalLM
from dynprobe.probes import Fork, Instrument, Sampling, Subject, discover, generate, make_batch, sites_to_read
from dynprobe.probes import _backend as backend_choice
from dynprobe.probes import _noise as noise
from dynprobe.probes._backend import on_backend
from dynprobe.probes._nnsight import controllers_left
from dynprobe.testing import tiny_causal_lm

nnsight = pytest.importorskip("nnsight")

#: Beside those of ``models``: newer decoders, each with another norm, head count or order of the two updates.
MORE = ("qwen3", "phi3", "olmo2", "stablelm", "cohere", "gpt_neo", "starcoder2")
TOLERANCE = 1e-6


def traced(name: str) -> tuple[Subject, Subject]:
    hooked = models.subject(name) if name in models.NAMES else discover(tiny_causal_lm(name), name=name)
    return hooked, on_backend(hooked, "nnsight")


def rows_of(name: str) -> list[list[int]]:
    return [r[:3] for r in models.ROWS] if name in models.IGNORES_MASK else models.ROWS


def worst(one: dp.Tape, other: dp.Tape) -> float:
    """Largest difference of all states, updates and logits at real tokens."""
    real = one.mask
    assert one.logits is not None
    assert other.logits is not None
    assert set(one.updates) == set(other.updates)
    assert one.depths == other.depths
    pairs = [*zip(one.states, other.states, strict=True), (one.logits, other.logits)]
    pairs += [(one.updates[key], other.updates[key]) for key in one.updates]
    return max(float((a[real] - b[real]).abs().max()) for a, b in pairs)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*models.NAMES, *MORE])
def test_every_state_update_and_logit_is_what_hooks_read(name: str) -> None:
    hooked, subject = traced(name)
    rows = rows_of(name)
    parts = "".join(f"+{part}" for part in ("attn_out", "mlp_out") if part in hooked.updates)
    if name in models.TWO_UPDATES:
        assert parts == "+attn_out+mlp_out"
    where = f"layers=all,component=resid_post{parts}"
    clean = dp.capture(hooked, rows, where, logits="all")
    for perturb in (None, "alpha=0.3,layers=1", ["alpha=0.2,layers=0,component=resid_pre", "alpha=0.1,seed=3"]):
        one, other = (dp.capture(s, rows, where, perturb, logits="all") for s in (hooked, subject))
        assert worst(one, other) <= TOLERANCE
        assert (worst(clean, other) > 1e-3) == (perturb is not None)
        assert set(one.passport) == set(other.passport)
        for unit, values in one.passport.items():
            np.testing.assert_allclose(other.passport[unit], values, rtol=1e-6)
    assert controllers_left(hooked.model) == 0


@pytest.mark.parametrize(
    "perturb",
    [
        "alpha=0.1,kind=rotate", "alpha=0.2,kind=dropout", "alpha=-0.5,kind=scale", "alpha=0.2,scale=mad",
        "alpha=5,scale=neftune", "alpha=0.4,scale=abs,layers=all", "alpha=0.5,kind=sine,period=3",
        "alpha=1,kind=impulse,positions=2", "alpha=0.3,component=attn_out,layers=1",
        "alpha=0.3,component=mlp_out,layers=0+2", "alpha=0.3,layers=1,positions=-1", "alpha=0",
        dp.Perturb(alpha=0.3, kind="direction", direction=np.arange(1.0, models.DIM + 1), layers=1),
        lambda state, site: state * 1.5 if site == "resid_post.1" else state,
        lambda state, site: state.to(torch.float64) + 1,
    ],
)  # fmt: skip
def test_every_kind_of_write_is_what_hooks_write(perturb: Any) -> None:
    hooked, subject = traced("llama")
    one, other = (
        dp.capture(s, models.ROWS, "layers=all,component=resid_post+mlp_out", perturb, logits="all")
        for s in (hooked, subject)
    )
    assert worst(one, other) <= TOLERANCE
    clean = dp.capture(hooked, models.ROWS, "layers=all,component=resid_post+mlp_out", logits="all")
    assert (worst(clean, other) > 1e-4) == (perturb != "alpha=0")  # two that write nothing are equal too
    assert list(one.passport) == list(other.passport)


def test_noise_is_drawn_before_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from greenlet import getcurrent

    drawn: list[bool] = []
    honest: Callable[..., Any] = noise._rows

    def watched(*args: Any) -> Any:
        drawn.append(getcurrent().parent is not None)  # the body of a trace runs in a greenlet of its own
        return honest(*args)

    monkeypatch.setattr(noise, "_rows", watched)
    _, subject = traced("llama")
    dp.capture(subject, models.ROWS, perturb=["alpha=0.3,layers=all", "alpha=0.2,kind=dropout,layers=1"])
    assert drawn == [False] * 4
    inside: list[bool] = []

    def look(state: Tensor, site: str) -> Tensor:
        inside.append(getcurrent().parent is not None)
        return state

    dp.capture(subject, models.ROWS, perturb=look)
    assert inside == [True] * 3


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "falcon", "opt"])
@pytest.mark.parametrize("loop", ["ours", "library"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_texts_and_trajectories_of_generation_are_those_of_hooks(name: str, loop: str, temperature: float) -> None:
    hooked, subject = traced(name)
    texts, tapes = [], []
    for s in (hooked, subject):
        s = dp.probes.Subject(**{**vars(s), "facts": {**s.facts, "decodes_alone": loop == "ours"}})
        batch = make_batch(s, models.ROWS, side="left", row_keys=["a", "b", "c"])
        writers = dp.probes.make_writers(s, "alpha=0.5,layers=1")
        read = sites_to_read(s, dp.Where.parse("layers=all"))
        instrument = Instrument(s, read, writers, **batch.rows)
        texts.append(generate(s, batch, Sampling(6, temperature, 0.9), instrument))
        instrument.check_fired()
        tapes.append(instrument.tape())
    assert texts[0] == texts[1]
    one, other = tapes
    assert torch.equal(one.positions, other.positions)
    assert len(one.positions[0]) == max(map(len, models.ROWS)) + 5
    assert max(float((a - b)[one.mask].abs().max()) for a, b in zip(one.states, other.states, strict=True)) <= TOLERANCE
    np.testing.assert_allclose(other.passport["alpha_relnorm"], one.passport["alpha_relnorm"], rtol=1e-6)
    assert controllers_left(hooked.model) == 0


def test_rows_that_end_early_leave_traced_batches_too() -> None:
    hooked, subject = traced("llama")
    batch = make_batch(hooked, models.ROWS, side="left")
    free = generate(hooked, batch, Sampling(8, stop_at_eos=False))
    end = free[1][2]
    found = []
    for s in (hooked, subject):
        s.model.generation_config.eos_token_id = end
        try:
            instrument = Instrument(s, sites_to_read(s, dp.Where.parse("layers=all")), **batch.rows)
            found.append((generate(s, batch, Sampling(8), instrument), instrument.tape()))
        finally:
            s.model.generation_config.eos_token_id = 2
    (texts, one), (same, other) = found
    assert texts == same
    assert min(map(len, texts)) <= 3 < max(map(len, texts))
    assert torch.equal(one.mask, other.mask)
    assert all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(one.states, other.states, strict=True))


def test_without_logits_the_forward_stops_behind_the_last_wanted_place() -> None:
    hooked, subject = traced("llama")
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(hooked.blocks)
    ]
    try:
        for where, expected in (("layers=1", [0]), ("layers=0,component=resid_pre", [])):
            ran.clear()
            other = dp.capture(subject, models.ROWS, where, logits=None)
            assert ran == expected  # the block it stops in hands its output over before its own hooks run
            one = dp.capture(hooked, models.ROWS, where, logits=None)
            depth = one.depths[0]
            assert one.depths == other.depths
            assert torch.allclose(one.states[depth], other.states[depth], atol=TOLERANCE)
    finally:
        for handle in handles:
            handle.remove()


def test_gradients_flow_through_a_trace() -> None:
    grads = []
    for s in traced("llama"):
        tape = dp.capture(s, models.ROWS[:1], perturb="alpha=0.2,layers=1", grad=True)
        assert tape.logits is not None
        (grad,) = torch.autograd.grad(tape.logits.square().sum(), tape.states[1])
        grads.append(grad)
    assert torch.allclose(*grads, atol=1e-5)
    assert float(grads[0].abs().max()) > 0


def test_ones_own_call_is_traced() -> None:
    hooked, subject = traced("gpt2")
    ids = torch.tensor([[5, 6, 7, 8]])
    tapes, pushed = [], []
    for s in (hooked, subject):
        with dp.record(s) as tape, torch.no_grad():
            s.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        tapes.append(tape)
        with dp.perturb(s, "alpha=0.4,layers=1"), torch.no_grad():
            pushed.append(s.model(input_ids=ids).logits)
    assert torch.equal(*(t.token_ids for t in tapes))
    assert all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(*(t.states for t in tapes), strict=True))
    assert torch.allclose(*pushed, atol=TOLERANCE)


def test_modules_get_their_own_forward_back_also_after_an_error() -> None:
    hooked, subject = traced("llama")
    mine = hooked.blocks[1].forward
    hooked.blocks[1].forward = mine  # somebody's own, on the instance
    try:

        def breaks(state: Tensor, site: str) -> Tensor:
            if site == "resid_post.1":
                raise RuntimeError("mine")
            return state

        with pytest.raises(RuntimeError, match="mine"):
            dp.capture(subject, models.ROWS, perturb=breaks)
        assert controllers_left(hooked.model) == 0
        assert [m for m in hooked.model.modules() if "forward" in m.__dict__] == [hooked.blocks[1]]
        assert hooked.blocks[1].__dict__["forward"] is mine
        assert worst(*(dp.capture(s, models.ROWS, logits="all") for s in (hooked, subject))) <= TOLERANCE
    finally:
        del hooked.blocks[1].forward
    with pytest.raises(UsageError, match="must return"):
        dp.capture(subject, models.ROWS, perturb=lambda state, site: state[:, :1])
    assert controllers_left(hooked.model) == 0
    with pytest.raises(UsageError, match="one nnsight trace is open"), dp.record(subject), dp.record(subject):
        pass
    assert controllers_left(hooked.model) == 0


def test_a_wrapper_of_ones_own_goes_on_working() -> None:
    model = models.build("llama")
    mine = nnsight.NNsight(model)
    ids = torch.tensor([[5, 6, 7]])

    def read() -> Tensor:
        with torch.no_grad(), mine.trace(ids):
            found = [nnsight.save(mine.model.layers[1].output)]
            nnsight.save(found)
        return found[0]

    before = read()
    for backend in ("nnsight", "hooks"):
        tape = dp.capture(model, ids, backend=backend)
        assert torch.allclose(tape.states[2], before, atol=TOLERANCE)
        assert torch.equal(read(), before)


def test_the_backend_is_the_subjects_or_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("gpt2")
    assert dp.load(model).backend == "hooks"
    subject = dp.load(model, backend="nnsight")
    assert subject.backend == "nnsight"
    assert subject.facts["versions"]["nnsight"] == nnsight.__version__
    assert dp.load(subject) is subject
    opened: list[str] = []
    honest = Instrument._open_traces
    monkeypatch.setattr(Instrument, "_open_traces", lambda self: opened.append(self.subject.backend) or honest(self))
    dp.capture(subject, models.ROWS)
    dp.capture(model, models.ROWS, backend="nnsight")
    dp.capture(subject, models.ROWS, backend="hooks")
    dp.capture(model, models.ROWS)
    assert opened == ["nnsight", "nnsight"]


def test_what_a_trace_cannot_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked, subject = traced("llama")
    tape = dp.capture(subject, models.ROWS, logits="all")
    with pytest.raises(UsageError, match="resuming a forward from a depth needs backend=hooks"):
        dp.resume(tape, at=1)
    with pytest.raises(UsageError, match=r"branching .* needs backend=hooks"):
        Fork(subject, make_batch(subject, models.ROWS))
    layer = dp.AttractorLayer(slots=2, centre="none")
    with pytest.raises(UsageError, match="controllers decide between forwards and need backend=hooks"):
        layer.attach(subject, layers=[1])
    assert controllers_left(hooked.model) == 0
    with pytest.raises(UsageError, match="runs its modules in a loop"):
        dp.capture(CemForCausalLM(CemConfig.preset("nano")), models.ROWS, backend="nnsight")
    with pytest.raises(UsageError, match=r"backend='nnsigt'.*Did you mean 'nnsight'"):
        dp.capture(hooked, models.ROWS, backend="nnsigt")
    with pytest.raises(UsageError, match=r"backend='vllm'; it is hooks or nnsight"):
        dp.load("no/such-model", backend="vllm")
    monkeypatch.setattr(backend_choice, "nnsight_version", lambda: None)
    with pytest.raises(UsageError, match=r"needs nnsight: pip install 'dynprobe\[nnsight\]'"):
        dp.capture(hooked, models.ROWS, backend="nnsight")
    for version in ("0.7.3", "0.9.0", "0.8.0"):
        monkeypatch.setattr(backend_choice, "nnsight_version", lambda version=version: version)
        with pytest.raises(UsageError, match=f"and {version} is installed"):
            dp.capture(hooked, models.ROWS, backend="nnsight")


def test_importing_dynprobe_does_not_import_nnsight() -> None:
    import subprocess
    import sys

    code = (
        "import sys, dynprobe as dp, torch; from dynprobe.testing import tiny_llama; "
        "dp.capture(tiny_llama(), [[1, 2, 3]]); sys.exit('nnsight' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
