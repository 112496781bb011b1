"""Iterations are depths: read, written, resumed and counted like layers, in every kind of loop."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynprobe as dp
from dynprobe.errors import ModelError, SiteError, UsageError
from dynprobe.models import CemConfig, CemForCausalLM, CsmConfig, CsmForCausalLM
from dynprobe.probes import Instrument, PerturbWriter, Subject, discover, make_batch
from dynprobe.probes import Where as _Where
from dynprobe.probes._dispatch import live_hooks

ROWS = [[5, 6, 7, 8], [9, 10]]
T_CSM, T_ATTENTION, T_MLP = 6, 2, 3


@pytest.fixture(scope="module")
def cem() -> Subject:
    torch.manual_seed(0)
    config = CemConfig.preset("nano", steps_attention=T_ATTENTION, steps_mlp=T_MLP)
    return discover(CemForCausalLM(config).eval(), name="cem")


@pytest.fixture(scope="module")
def csm() -> Subject:
    torch.manual_seed(0)
    return discover(CsmForCausalLM(CsmConfig.preset("nano", num_iterations=T_CSM)).eval(), name="csm")


@pytest.fixture(scope="module")
def albert() -> Subject:
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=60, embedding_size=16, hidden_size=32, num_hidden_layers=5, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32,
    )  # fmt: skip
    return discover(AlbertForMaskedLM(config).eval(), name="albert")


def test_turns_are_the_updates_in_order(cem: Subject, csm: Subject, albert: Subject) -> None:
    per_layer = T_ATTENTION + T_MLP
    assert cem.n_layers == len(cem.turns) == 2 * per_layer
    assert [(t.layer, t.stage, t.iteration, t.of) for t in cem.turns[:per_layer]] == [
        (0, "attention", 1, 2), (0, "attention", 2, 2), (0, "mlp", 1, 3), (0, "mlp", 2, 3), (0, "mlp", 3, 3),
    ]  # fmt: skip
    assert [t.component for t in cem.turns[:per_layer]] == ["resid_mid"] * 2 + ["resid_post"] * 3
    assert (cem.track, cem.n_slots, csm.track, csm.n_slots) == ("resid", None, "core", 16)
    assert [(t.layer, t.iteration, t.of) for t in csm.turns] == [(-1, k, T_CSM) for k in range(1, T_CSM + 1)]
    assert [t.iteration for t in albert.turns] == [1, 2, 3, 4, 5]
    assert "5 × core iterations" in repr(albert)
    assert "2 layers × (2 × attention + 3 × mlp)" in repr(cem)


def test_states_are_those_the_models_hand_out_themselves(cem: Subject, csm: Subject, albert: Subject) -> None:
    ids = torch.tensor([ROWS[0]])
    tape = dp.capture(csm, ids, logits="all")
    theirs = csm.model(ids, output_hidden_states=True, output_energies=True)
    for mine, state in zip(tape.states, theirs.hidden_states, strict=True):
        assert torch.equal(mine, state)
    assert torch.equal(tape.logits, theirs.logits)
    torch.testing.assert_close(tape.energies["energy"], theirs.energies.double(), rtol=1e-6, atol=1e-7)
    # The energy before an update is the energy after the one before it: a loop has one energy.
    assert torch.equal(tape.energies["energy_prev"][1:], tape.energies["energy"][:-1])
    assert torch.isnan(tape.energies["energy_prev"][0]).all()

    tape = dp.capture(albert, ids, logits="all")
    hidden = albert.model(ids, output_hidden_states=True).hidden_states
    for mine, state in zip(tape.states, hidden, strict=True):
        assert torch.equal(mine, state)
    assert not tape.energies

    tape = dp.capture(cem, ids, logits="all")
    blocks: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _a, out: blocks.append(out)) for m in cem.model.model.layers]
    cem.model(ids)
    for handle in handles:
        handle.remove()
    for layer, block in enumerate(blocks):  # h + (x − h) is x up to the rounding of two sums
        torch.testing.assert_close(tape.states[5 * (layer + 1)], block, rtol=1e-5, atol=1e-6)


def test_energies_of_a_cem_are_its_trace(cem: Subject) -> None:
    from dynprobe.models import CemDynamics

    ids = torch.tensor([ROWS[0]])
    tape = dp.capture(cem, ids, logits="all")
    trace = cem.model(ids, dynamics=CemDynamics(what={"energy"})).dynamics
    at = 0
    for layer in range(2):
        for part, steps in ((trace.attn[layer], T_ATTENTION), (trace.mlp[layer], T_MLP)):
            for t in range(1, steps + 1):
                at += 1
                for name, k in (("energy", t), ("energy_prev", t - 1)):
                    torch.testing.assert_close(
                        tape.energies[name][at], part.energy[k].double(), rtol=1e-5, atol=1e-7, msg=f"{at} {name}"
                    )


@pytest.mark.parametrize(
    ("which", "spec", "first"),
    [
        ("csm", "alpha=0.3", 3),  # floor(50 % of the 7 states 0 … 6)
        ("csm", "alpha=0.3,iterations=0", 0),
        ("csm", "alpha=0.3,iterations=2", 2),
        ("csm", "alpha=0.3,iterations=-1", T_CSM),
        ("csm", "alpha=0.3,layers=last", T_CSM),
        ("cem", "alpha=0.3", 10),  # the end of block 1
        ("cem", "alpha=0.3,layers=0", 5),
        ("cem", "alpha=0.3,layers=0,iterations=2", 4),
        ("cem", "alpha=0.3,layers=1,iterations=0", 7),
        ("cem", "alpha=0.3,layers=1,component=resid_mid,iterations=1", 6),
        ("cem", "alpha=0.3,layers=0,component=resid_pre", 0),
        ("cem", "alpha=0.3,layers=1,component=resid_pre", 5),
        ("albert", "alpha=0.3,iterations=4", 4),
    ],
)
def test_a_write_lands_at_its_iteration_and_nowhere_before(
    which: str, spec: str, first: int, request: pytest.FixtureRequest
) -> None:
    subject: Subject = request.getfixturevalue(which)
    clean, pushed = (dp.capture(subject, ROWS, logits="all", perturb=p) for p in (None, spec))
    moved = [not torch.equal(a, b) for a, b in zip(clean.states, pushed.states, strict=True)]
    assert moved == [d >= first for d in range(len(moved))]
    assert pushed.passport["alpha_relnorm"] == pytest.approx(0.3, rel=1e-5)
    assert live_hooks(subject.model) == 0
    sites = subject.sites(_Where.parse(",".join(p for p in spec.split(",") if not p.startswith("alpha"))), writing=True)
    for site in sites:  # the place of a site names that site again
        assert subject.sites(subject.where_of(site), writing=True) == [site]


def test_slots_are_written_one_by_one(csm: Subject) -> None:
    clean = dp.capture(csm, ROWS, logits="all")
    pushed = dp.capture(csm, ROWS, logits="all", perturb="alpha=0.2,iterations=3,slots=2:4")
    moved = (pushed.states[3] != clean.states[3]).any(-1)[clean.mask]
    assert moved[:, 2:4].sum() == 2 * (clean.mask.sum() - 2)  # every position but each row's first
    assert not moved[:, :2].any()
    assert not moved[:, 4:].any()
    relative = (pushed.states[3] - clean.states[3]).norm(dim=-1) / clean.states[3].norm(dim=-1)
    assert relative[0, 1:, 2:4].numpy() == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("which", ["csm", "cem", "albert"])
@pytest.mark.parametrize("scale", ["relnorm", "mad", "abs"])
def test_alpha_zero_changes_no_bit(which: str, scale: str, request: pytest.FixtureRequest) -> None:
    subject: Subject = request.getfixturevalue(which)
    clean = dp.capture(subject, ROWS, logits="all")
    sham = dp.capture(subject, ROWS, logits="all", perturb=f"alpha=0,scale={scale},iterations=1")
    assert torch.equal(clean.logits, sham.logits)
    assert all(torch.equal(a, b) for a, b in zip(clean.states, sham.states, strict=True))


@pytest.mark.parametrize("which", ["csm", "cem"])
def test_a_row_does_not_depend_on_its_batch(which: str, request: pytest.FixtureRequest) -> None:
    subject: Subject = request.getfixturevalue(which)
    spec = "alpha=0.2,iterations=1"
    together = dp.capture(subject, ROWS, logits="all", perturb=spec)
    alone = dp.capture(subject, ROWS[1:], logits="all", perturb=spec)
    for a, b in zip(together.states, alone.states, strict=True):
        torch.testing.assert_close(a[1:, :2], b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["csm", "cem"])
def test_prefill_and_decode_write_the_same(which: str, request: pytest.FixtureRequest) -> None:
    subject: Subject = request.getfixturevalue(which)
    ids, keys = torch.tensor([[5, 6, 7, 8, 9]]), ["row"]
    whole = dp.capture(subject, ids, logits="all", perturb="alpha=0.2,iterations=1", row_keys=keys)
    writer = PerturbWriter(subject, dp.Perturb.parse("alpha=0.2,iterations=1"))
    read = subject.sites(_Where())
    with torch.no_grad(), Instrument(subject, read, [writer], row_keys=keys, energies=True) as instrument:
        out = subject.model(ids[:, :3], use_cache=True)
        for k in (3, 4):
            out = subject.model(ids[:, k : k + 1], past_key_values=out.past_key_values, use_cache=True)
    tape = instrument.tape()
    for a, b in zip(whole.states, tape.states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, grid in whole.energies.items():
        torch.testing.assert_close(grid, tape.energies[name], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_resume_is_fast_where_the_state_is_all_and_slow_where_it_is_not(csm: Subject, cem: Subject) -> None:
    assert csm.resumable
    assert not cem.resumable  # keys and gates come from the state that entered the loop, not from the iterate
    assert "logits deviate" in cem.road.reason
    for subject in (csm, cem):
        tape = dp.capture(subject, ROWS, logits="all")
        for at in range(subject.n_layers + 1):
            again = dp.resume(tape, at=at)
            torch.testing.assert_close(again.logits[tape.mask], tape.logits[tape.mask], rtol=1e-4, atol=1e-5)
            assert again.depths == tuple(range(at, subject.n_layers + 1))
        pushed = dp.capture(subject, ROWS, logits="all", perturb="alpha=0.3,iterations=2")
        pairs = zip(tape.states, pushed.states, strict=True)
        first = next(d for d, (a, b) in enumerate(pairs) if not torch.equal(a, b))
        again = dp.resume(tape, at=first, states=pushed.states[first])
        torch.testing.assert_close(again.logits[tape.mask], pushed.logits[tape.mask], rtol=1e-4, atol=1e-5)


def test_a_fast_resume_runs_only_what_is_left(csm: Subject) -> None:
    tape = dp.capture(csm, ROWS, logits="all")
    calls: list[int] = []
    assert csm.resumable
    original = type(csm.blocks[0]).force
    try:
        type(csm.blocks[0]).force = lambda *a: calls.append(1) or original(*a)  # type: ignore[method-assign]
        dp.resume(tape, at=4)
    finally:
        type(csm.blocks[0]).force = original  # type: ignore[method-assign]
    assert len(calls) == T_CSM - 4


def test_readout_of_any_iteration_is_a_run_that_ended_there(csm: Subject) -> None:
    tape = dp.capture(csm, ROWS, logits="all")
    for T in (1, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            short = csm.model(torch.tensor([ROWS[0]]), num_iterations=T).logits
        torch.testing.assert_close(dp.readout(csm, tape.states[T][:1]), short, rtol=1e-4, atol=1e-5)


def test_a_loop_whose_length_was_changed_is_noticed() -> None:
    torch.manual_seed(0)
    model = CsmForCausalLM(CsmConfig.preset("nano", num_iterations=4)).eval()
    subject = discover(model, name="csm")
    tape = dp.capture(subject, ROWS, logits="all")
    for other in (6, 3):
        model.config.num_iterations = other
        with pytest.raises(ModelError, match=r"was not called 4 times"):
            dp.capture(subject, ROWS, logits="all")
        if other > 4:
            with pytest.raises(ModelError, match=r"was not called 4 times"):
                dp.readout(subject, tape.states[-1])
    model.config.num_iterations = 4
    assert torch.equal(dp.capture(subject, ROWS, logits="all").logits, tape.logits)
    assert live_hooks(model) == 0


def test_tapes_name_iterations(csm: Subject, cem: Subject) -> None:
    tape = dp.capture(csm, ROWS)
    assert torch.equal(tape.at(iteration=2), tape.states[2])
    assert tape.at(iteration=-1, pos=-1).shape == (2, 16, 32)
    assert tape.to_xarray().dims == ("depth", "batch", "pos", "slot", "dim")
    tape = dp.capture(cem, ROWS)
    assert torch.equal(tape.at(layer=0, iteration=1), tape.states[3])
    assert torch.equal(tape.at(layer=1), tape.states[10])
    some = dp.capture(cem, ROWS, where="layers=1,iterations=1:3", logits=None)
    assert some.depths == (6, 7, 8, 9)
    assert torch.equal(tape["resid_post", 0], tape.states[5])
    assert torch.equal(tape["blocks.1.hook_resid_post"], tape.states[10])
    assert torch.equal(tape["resid_mid", 1], tape.states[7])
    assert torch.equal(tape["resid_pre", 1], tape.states[5])
    with pytest.raises(UsageError, match=r"iterations and no layers; write iterations=3"):
        dp.capture(csm, ROWS)["resid_post", 3]


@pytest.mark.parametrize("which", ["csm", "cem"])
def test_a_capture_that_stops_early_has_the_energies_of_what_it_read(
    which: str, request: pytest.FixtureRequest
) -> None:
    subject: Subject = request.getfixturevalue(which)
    whole = dp.capture(subject, ROWS, logits="all")
    for where, depth in (("layers=all", subject.n_layers), ("iterations=2" + ",layers=0" * (which == "cem"), None)):
        tape = dp.capture(subject, ROWS, where=where, logits=None)
        depth = max(tape.depths) if depth is None else depth
        for name in ("energy", "energy_prev"):
            torch.testing.assert_close(
                tape.energies[name][: depth + 1], whole.energies[name][: depth + 1], rtol=0, atol=0, equal_nan=True
            )
            assert tape.energies[name][depth + 1 :].isnan().all()


def test_a_bare_model_is_looked_at_anew_when_its_loop_has_another_length() -> None:
    model = CsmForCausalLM(CsmConfig.preset("nano", num_iterations=1)).eval()
    for T in (1, 4, 2):
        model.config.num_iterations = T
        with dp.record(model) as tape:
            model(torch.tensor([ROWS[0]]))
        assert tape.depths == tuple(range(T + 1))


def test_a_readout_through_a_loop_that_halts_is_refused() -> None:
    """Stubbed updates do not move, so such a loop halts at once, and the head would see another state."""
    torch.manual_seed(0)
    model = CsmForCausalLM(CsmConfig.preset("nano", num_iterations=30, halt_tol=0.05)).eval()
    subject = discover(model, name="csm")
    with pytest.raises(ModelError, match=r"halts by itself"):
        dp.readout(subject, torch.randn(1, 3, 16, 32))
    assert "forward" not in vars(model.model.refine)


def test_a_loop_over_positions_is_refused() -> None:
    with pytest.raises(ModelError, match=r"refines one position after the other"):
        discover(CsmForCausalLM(CsmConfig.preset("nano", carry="refined")).eval())


@pytest.mark.parametrize(
    ("which", "spec", "error", "match"),
    [
        ("csm", "alpha=0.1,layers=3", UsageError, r"iterations and no layers; write iterations=3"),
        ("cem", "alpha=0.1,layers=1,iterations=1,component=resid_pre", UsageError, r"leave iterations out"),
        ("csm", "alpha=0.1,iterations=9", SiteError, r"iterations=9 is out of range: this model has 7"),
        ("csm", "alpha=0.1,slots=16", SiteError, r"slots=16 is out of range"),
        ("csm", "alpha=0.1,component=mlp_out", SiteError, r"mlp_out was asked for; the loops of csm end in resid_post"),
        ("cem", "alpha=0.1,slots=1", UsageError, r"one state vector per position and no slots"),
        ("cem", "alpha=0.1,layers=2", SiteError, r"layers=2 is out of range"),
        ("cem", "alpha=0.1,layers=0,iterations=4", SiteError, r"iterations=4 is out of range: this model has 4"),
    ],
)
def test_places_that_are_not_there(
    which: str, spec: str, error: Any, match: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(error, match=match):
        PerturbWriter(request.getfixturevalue(which), dp.Perturb.parse(spec))


def test_a_model_with_layers_has_no_iterations() -> None:
    from dynprobe.testing import tiny_llama

    with pytest.raises(UsageError, match="has layers and no iterations or slots"):
        PerturbWriter(tiny_llama(), dp.Perturb.parse("alpha=0.1,iterations=1"))


class _Loop(nn.Module):
    """A model whose one block is called three times, and once more by someone else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.step, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(3):
            x = self.step(x)
        return self.head(x)


def test_any_module_that_is_called_again_can_be_named() -> None:
    model = _Loop().eval()
    with pytest.raises(ModelError, match=r"looped model"):
        dp.discover(model)
    subject = dp.discover(model, loop="step")
    assert [t.call for t in subject.turns] == [0, 1, 2]
    ids = torch.tensor([[1, 2, 3]])
    tape = dp.capture(subject, ids, logits="all")
    x = model.embed(ids)
    for state in tape.states:
        assert torch.equal(state, x)
        x = model.step(x)
    with pytest.raises(ModelError, match=r"no module of _Loop.*Did you mean 'step'"):
        dp.discover(model, loop="stpe")
    with pytest.raises(ModelError, match=r"does not map a state to a state of the same shape"):
        dp.discover(model, loop="head")


def test_calls_are_counted_from_the_beginning_of_each_forward() -> None:
    """A call outside a forward of the root, or a forward that was cut short, leaves no count behind."""
    model = _Loop().eval()
    subject = dp.discover(model, loop="step")
    batch = make_batch(subject, [[1, 2, 3]])
    instrument = Instrument(subject, [("resid_post", 1)], **batch.rows)
    with torch.no_grad(), instrument:
        model.step(torch.zeros(1, 3, 8))
        model(input_ids=batch.input_ids)
        model.step(torch.zeros(1, 3, 8))
    instrument.check_fired()
    assert torch.equal(instrument.tape().states[2], dp.capture(subject, [[1, 2, 3]]).states[2])


def test_metrics_of_a_loop_keep_the_state_before_the_first_update(csm: Subject, cem: Subject) -> None:
    from dynprobe.probes._measured import measure_track

    for subject, unit in ((csm, True), (cem, False)):
        tape = dp.capture(subject, ROWS)
        found = measure_track(subject, list(tape.states), tape.mask, ("kappa.phase/1",))
        assert found.first == 0
        assert "grain=iteration" in found.extractor_id
        assert ("unit=slot" in found.extractor_id) == unit
        a, b = tape.states[0][0, 2].double(), tape.states[1][0, 2].double()
        angle = torch.arccos(torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean()
        assert found.depth["angle"][1, 0, 2] == pytest.approx(float(angle), rel=1e-4)


class _Ouro(nn.Module):
    """Stand-in for Ouro (arXiv:2510.25741), whose code needs the hub: all layers, then the norm, fed back normed."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.steps = steps
        self.embed_tokens, self.norm = nn.Embedding(30, 8), nn.LayerNorm(8)
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for _ in range(self.steps):
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            x = self.norm(x)
        return self.head(x)


def test_a_loop_over_all_layers_is_read_where_it_closes() -> None:
    from dynprobe.probes import Loop

    torch.manual_seed(0)
    model = _Ouro().eval()
    with pytest.raises(ModelError, match=r"norm does not take in what norm handed out.*Loop\(modules="):
        dp.discover(model, loop="norm")
    subject = dp.discover(model, loop=Loop((("norm", "core", -1),), start="embed_tokens", prefix=True))
    ids = torch.tensor([[1, 2, 3]])
    tape = dp.capture(subject, ids, logits="all")
    x = model.embed_tokens(ids)
    assert torch.equal(tape.states[0], x)
    for state in list(tape.states)[1:]:
        for layer in model.layers:
            x = x + torch.tanh(layer(x))
        x = model.norm(x)
        assert torch.equal(state, x)
    pushed = dp.capture(subject, ids, logits="all", perturb="alpha=0.2,iterations=0")
    assert not torch.equal(pushed.states[0], tape.states[0])
    torch.testing.assert_close(dp.readout(subject, tape.states[-1]), tape.logits, rtol=1e-4, atol=1e-5)
