"""Looped models of other people: what is read of them and written to them is theirs, or they are refused with a reason.

HRM-Text, Zamba2, Perceiver and DeBERTa are those of transformers, tiny and random. Huginn and Ouro are stand-ins (their
code needs the hub); so what is shown of these two holds for what is published of them.
"""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import Huginn, HuginnConfig, Ouro, OuroConfig, build
from torch import Tensor

import dynprobe as dp
from dynprobe.errors import ModelError, UsageError
from dynprobe.probes import Subject, check_alone, check_fired, check_null, check_readout, check_resume, discover
from dynprobe.probes._dispatch import live_hooks
from dynprobe.testing import tiny_causal_lm

ROWS = [[5, 6, 7, 8], [9, 10]]
IDS = torch.tensor([ROWS[0]])


def hrm_text(**changes: Any) -> Any:
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = HrmTextConfig(
        vocab_size=60, intermediate_size=48, max_position_embeddings=64, embedding_scale=3.3, H_cycles=3, L_cycles=2,
        initializer_range=0.2, **sizes | changes,
    )  # fmt: skip
    return HrmTextForCausalLM(config).eval()


MODELS = {
    "hrm": hrm_text,
    "huginn": lambda: build(Huginn, HuginnConfig()),
    "ouro": lambda: build(Ouro, OuroConfig()),
}
NAMES = tuple(MODELS)


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return dp.load(MODELS[request.param]())


def own_states(subject: Subject, ids: Tensor) -> list[Tensor]:
    """The states by the model's equations, without a hook."""
    model: Any = subject.model
    if model.config.model_type == "hrm_text":
        core, config = model.model, model.config
        high = core.embed_tokens(ids) * config.embedding_scale
        low, found = torch.zeros_like(high), [high]
        positions = torch.arange(ids.shape[1])[None]
        # Causal attention with masks left to the library is what a forward without padding does.
        mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        more = {"attention_mask": mask, "position_embeddings": core.rotary_emb(high, positions)}
        for _ in range(config.H_cycles):
            for _ in range(config.L_cycles):
                low = core.L_module(low + high, **more)
            high = core.H_module(high + low, **more)
            found.append(high)
        return found
    if model.config.model_type == "ouro":
        _, states, _ = model.model(ids, None, None)
        return [model.model.embed_tokens(ids), *states]
    parts, positions = model.transformer, torch.arange(ids.shape[1])[None]
    e = parts.wte(ids) * model.emb_scale
    for block in parts.prelude:
        e = block(e, positions)
    assert subject.loop is not None
    assert subject.loop.arguments is not None
    found = [subject.loop.arguments(model, {}, torch.ones_like(ids, dtype=torch.bool))["input_states"]]
    for _ in range(model.config.mean_recurrence):
        x = parts.adapter(torch.cat([found[-1], e], dim=-1))
        for block in parts.core_block:
            x = block(x, positions)
        found.append(x)
    return found


def test_states_are_the_models_own(subject: Subject) -> None:
    tape = dp.capture(subject, IDS, logits="all")
    with torch.no_grad():
        wanted = own_states(subject, IDS)
    assert len(tape.states) == len(wanted)
    for mine, state in zip(tape.states, wanted, strict=True):
        torch.testing.assert_close(mine, state, rtol=1e-5, atol=1e-5)
    stage = "H" if subject.model.config.model_type == "hrm_text" else "core"
    assert [(t.stage, t.layer, t.iteration, t.call) for t in subject.turns] == [
        (stage, -1, k, k - 1) for k in range(1, len(wanted))
    ]
    assert (subject.track, subject.n_slots) == ("core", None)
    moved = [float((a - b).norm() / a.norm()) for a, b in itertools.pairwise(wanted)]
    assert min(moved) > 1e-3  # every update moves the state, or the test shows nothing


def test_self_tests_pass(subject: Subject) -> None:
    tape = dp.capture(subject, ROWS, logits="all")
    checks = [
        check_null(subject, ROWS), check_null(subject, ROWS, dp.Perturb.parse("alpha=0.1,iterations=0")),
        check_alone(subject, ROWS, side="right"), check_readout(subject, tape), check_fired(subject, ROWS),
    ]  # fmt: skip
    assert [c.name for c in checks if not c.passed] == []


@pytest.mark.parametrize(("name", "fast"), [("hrm", False), ("huginn", True), ("ouro", True)])
def test_whether_a_forward_may_begin_at_an_iteration_is_found_out(name: str, fast: bool) -> None:
    """In HRM the fast state lives on beside the slow one: without the cycles below it is another one."""
    subject = dp.load(MODELS[name]())
    assert subject.resumable is fast
    tape = dp.capture(subject, ROWS, logits="all")
    assert check_resume(subject, tape).passed is fast
    pushed = dp.capture(subject, ROWS, logits="all", perturb="alpha=0.3,iterations=1")
    for at in range(subject.n_layers + 1):
        again = dp.resume(tape, at=at)
        torch.testing.assert_close(again.logits[tape.mask], tape.logits[tape.mask], rtol=1e-4, atol=1e-4)
    again = dp.resume(tape, at=1, states=pushed.states[1])
    torch.testing.assert_close(again.logits[tape.mask], pushed.logits[tape.mask], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pushed.logits[tape.mask], tape.logits[tape.mask], atol=1e-3)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_write_lands_at_its_iteration_and_nowhere_before(subject: Subject, first: int) -> None:
    spec = f"alpha=0.3,iterations={first}"
    clean, pushed = (dp.capture(subject, ROWS, logits="all", perturb=p) for p in (None, spec))
    moved = [not torch.equal(a, b) for a, b in zip(clean.states, pushed.states, strict=True)]
    assert moved == [d >= first for d in range(len(moved))]
    assert pushed.passport["alpha_relnorm"] == pytest.approx(0.3, rel=1e-4)
    real, kept = clean.mask, torch.zeros_like(clean.mask)
    kept[:, 0] = True  # a row's first position is not written
    assert torch.equal(clean.states[first][real & kept], pushed.states[first][real & kept])
    assert not torch.equal(clean.logits[real], pushed.logits[real])
    assert live_hooks(subject.model) == 0


def test_a_long_run_holds_the_shorter_ones(subject: Subject, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = dp.iterate(subject, ROWS, iterations=[1, 2, 5], out=tmp_path)
    assert run.summary["one_pass"] is True
    assert list(run.samples.groupby("iterations").size()) == [2, 2, 2]
    assert bool(np.isfinite(run.samples["nll"]).all())
    from dynprobe.protocols._iterations import at_iterations

    with at_iterations(subject, 5) as long, at_iterations(subject, 2) as short:
        pass
    assert subject.loop is not None
    assert (len(long.turns), len(short.turns)) == (5, 2)
    before = subject.loop.iterations(subject.model)
    with at_iterations(subject, 2) as short:
        own = dp.capture(short, ROWS, logits="all")
    assert subject.loop.iterations(subject.model) == before
    tape = dp.capture(subject, ROWS, logits="all")
    torch.testing.assert_close(tape.states[2][tape.mask], own.states[2][tape.mask], rtol=1e-5, atol=1e-5)
    cut = dp.readout(subject, tape.states[2])
    torch.testing.assert_close(cut[tape.mask], own.logits[tape.mask], rtol=1e-4, atol=1e-4)


def test_the_noise_of_huginn_is_a_position_and_its_own_distribution() -> None:
    subject = dp.load(MODELS["huginn"]())
    model: Any = subject.model
    assert not torch.equal(model(IDS).logits, model(IDS).logits)  # its own forwards begin anywhere
    one, two = (dp.capture(subject, rows).states[0] for rows in (ROWS, [[1, 2, 3], [4, 4, 4], [2]]))
    assert torch.equal(one[0, :3], two[1, :3])
    assert not torch.equal(one[0, 0], one[0, 1])
    long = dp.capture(subject, [list(range(59)) * 3]).states[0]
    std = model.config.init_values["std"] * model.emb_scale
    assert torch.equal(long[0, :4], one[0, :4])
    assert float(long.abs().max()) <= 3 * std * (1 + 1e-6)
    assert float(long.std()) == pytest.approx(0.9866 * std, rel=0.02)  # a normal cut off at 3 SD
    values = np.sort(long.flatten().double().numpy()) / std
    theirs = model.initialize_state(torch.empty(1, 400, 32)).flatten().sort().values.double().numpy() / std
    quantiles = np.linspace(0.05, 0.95, 19)
    assert np.quantile(values, quantiles) == pytest.approx(np.quantile(theirs, quantiles), abs=0.06)


def test_what_huginn_cannot_do_is_refused() -> None:
    from dynprobe.probes import Sampling, generate, make_batch

    model = MODELS["huginn"]()
    subject = dp.load(model)
    with pytest.raises(ModelError, match=r"padding='right' keeps it whole"):
        dp.capture(subject, ROWS, padding="left")
    alone = check_alone(subject, ROWS, side="left")  # so a run takes batches of one length
    assert (alone.passed, alone.value) == (False, float("inf"))
    assert "padding='right'" in alone.detail["error"]
    model.generate = lambda *a, **k: None
    with pytest.raises(ModelError, match=r"first state of every new token at random.*--max-new-tokens 0"):
        generate(subject, make_batch(subject, [[1, 2]]), Sampling(max_new_tokens=2))
    model.config.test_time_noise = 0.1
    with pytest.raises(ModelError, match=r"set model.config.test_time_noise = 0"):
        dp.load(model)


def test_an_ouro_that_leaves_early_is_refused() -> None:
    model = MODELS["ouro"]()
    model.early_exit_threshold = 0.5
    with pytest.raises(ModelError, match=r"early_exit_threshold=0.5.*set model.early_exit_threshold = None"):
        dp.load(model)


@pytest.mark.parametrize(("name", "trained"), [("hrm", 3), ("ouro", 4)])
def test_more_iterations_than_trained_are_remarked_once(name: str, trained: int, tmp_path: Path) -> None:
    subject = dp.load(MODELS[name]())
    with pytest.warns(UserWarning, match=rf"T = 6, 9 lie above the trained depth of {trained} iterations") as said:
        run = dp.iterate(subject, ROWS, iterations=[2, 6, 9], out=tmp_path)
    assert len([w for w in said if "above the trained" in str(w.message)]) == 1
    assert run.summary["notes"] == [f"T = 6, 9 lie above the trained depth of {trained} iterations"]
    assert subject.loop is not None
    assert subject.loop.set_iterations is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dp.load(subject.model)
    subject.loop.set_iterations(subject.model, 7)
    with pytest.warns(UserWarning, match=rf"T = 7 lies above the trained depth of {trained} iterations"):
        dp.load(subject.model)


def test_the_shared_blocks_of_zamba2_are_no_loop() -> None:
    model = tiny_causal_lm("zamba2", seed=0)
    shared = [n for n, _ in model.named_modules() if n.endswith("shared_transformer")]
    assert shared
    if len(shared) == 1:
        pytest.skip("one application only")
    with pytest.raises(ModelError, match=r"are shared by other modules .*without loop= reads the state"):
        dp.load(model, loop=shared[0])
    subject = dp.load(model)
    tape = dp.capture(subject, ROWS, logits="all")
    assert not subject.turns
    assert len(tape.states) == subject.n_layers + 1
    assert check_alone(subject, ROWS).passed


@pytest.mark.parametrize("blocks", [1, 3])
def test_latents_are_no_positions(blocks: int) -> None:
    from transformers import PerceiverConfig, PerceiverForMaskedLM

    config = PerceiverConfig(
        num_latents=4, d_latents=32, d_model=32, num_blocks=blocks, num_self_attends_per_block=2,
        num_self_attention_heads=4, num_cross_attention_heads=4, vocab_size=60, max_position_embeddings=16,
    )  # fmt: skip
    model = PerceiverForMaskedLM(config).eval()
    for more in ({}, {"layers": "perceiver.encoder.self_attends.*"}, {"loop": "perceiver.encoder.self_attends.1"}):
        with pytest.raises(ModelError, match=r"latent vectors that belong to no token.*dp.trace_callback"):
            dp.load(model, **more)


@pytest.mark.parametrize("family", ["Deberta", "DebertaV2"])
def test_the_enhanced_mask_decoder_is_refused_and_the_encoder_is_read(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    assert dp.load(model).n_layers == 3
    model.deberta.z_steps = 2
    with pytest.raises(ModelError, match=r"z_steps=2.*With z_steps = 0 its layers are read"):
        dp.load(model)


def test_a_start_that_is_no_state_is_refused() -> None:
    from dynprobe.probes import Loop, Start

    model = MODELS["ouro"]()
    for start, match in (
        ("model.embed", r"start='model.embed' is no module of Ouro.*Did you mean"),
        ("model.early_exit_gate", r"ran 4 times in one forward.*Start\(module, call=0\)"),
        (Start("model.early_exit_gate", call=0), r"is \(1, 5, 1\), and a state is \(1, 5, 32\)"),
    ):
        with pytest.raises(ModelError, match=match):
            discover(model, loop=Loop((("model.norm", "core", -1),), start=start))


def test_places_are_named_by_iteration(subject: Subject) -> None:
    with pytest.raises(UsageError, match=r"iterations and no layers"):
        dp.capture(subject, ROWS, perturb="alpha=0.1,layers=1")
