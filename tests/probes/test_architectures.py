"""Every check on transformers' own architectures: a dozen in the ordinary suite, all of them under ``long``."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dynprobe.errors import ModelError
from dynprobe.probes import Check, Subject, Tape, discover
from dynprobe.probes._road import RoadTrial
from dynprobe.testing import (
    CHECKS,
    ArchitectureVerdict,
    architecture_table,
    causal_types,
    tiny_causal_lm,
    try_architecture,
    try_architectures,
    try_resume,
)
from dynprobe.testing import _architecture_trial as trial
from dynprobe.testing import _writing_trial as writing
from dynprobe.testing._own_model import OwnModel

#: Learned positions, plain, tuples, post-norm, experts, MLA, windows, state spaces, hybrids, several streams.
FAST = (
    "gpt2", "llama", "bloom", "bert", "mixtral", "deepseek_v3", "gemma2", "mamba", "rwkv", "jamba", "zamba2",
    "deepseek_v4",
)  # fmt: skip
#: Of these, a recurrent one, and one of several streams, which runs refuse: a row is another behind padding.
SEES_PADDING = {"rwkv": "fallback", "deepseek_v4": "refused"}
#: What they hand upwards beside the state: a router's memory, chosen indices, keys and values, block outputs, a twin.
FALLBACK = ("zaya", "glm_moe_dsa", "gemma4_text", "inkling2_text", "reformer")


@pytest.mark.parametrize("kind", FAST)
def test_everything_is_right_and_resuming_leaves_out_the_blocks_below(kind: str) -> None:
    found = try_architecture(kind)
    others = dict.fromkeys(("alone", "generation"), SEES_PADDING[kind]) if kind in SEES_PADDING else {}
    assert {name: a.verdict for name, a in found.answers.items()} == dict.fromkeys(CHECKS, "right") | others
    assert found.layers == 4
    assert found.answers["resume"].value <= 1e-4


@pytest.mark.parametrize("kind", FALLBACK)
def test_where_blocks_look_back_all_of_them_run_and_it_is_right(kind: str) -> None:
    found = try_resume(kind)
    assert found.verdict == "fallback"
    assert found.worst <= 1e-4
    assert found.reason


@pytest.mark.parametrize("kind", ["zaya", "inkling2_text"])
def test_the_trial_sees_a_wrong_fast_road(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the fast road taken where it must not be, the table would say so."""
    monkeypatch.setattr(RoadTrial, "passed", property(lambda self: True))
    found = try_resume(kind)
    assert found.verdict == "wrong"
    assert found.worst > 0.01
    assert "the fast road was taken" in found.reason


def test_the_trial_sees_blocks_that_run_although_they_should_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynprobe.probes._resume.stubbed", lambda subject, below, state: torch.no_grad())
    assert try_resume("llama").verdict == "wrong"


def test_blocks_that_do_nothing_prove_nothing() -> None:
    def idle(kind: str, **more: Any) -> Any:
        model = tiny_causal_lm(kind, **more)
        with torch.no_grad():
            model.transformer.h[1].attn.c_proj.weight.zero_(), model.transformer.h[1].attn.c_proj.bias.zero_()
            model.transformer.h[1].mlp.c_proj.weight.zero_(), model.transformer.h[1].mlp.c_proj.bias.zero_()
        return model

    found = try_resume("gpt2", build=idle)
    assert found.verdict == "wrong"
    assert "at depths [1] the block does nothing" in found.reason


def test_a_looped_model_is_resumed_from_its_iterations() -> None:
    found = try_resume("hrm_text")
    assert found.verdict in ("fast", "fallback")
    assert found.worst <= 1e-4
    assert found.blocks == "model.H_module"


def test_what_drafts_for_others_is_left_out_with_a_reason() -> None:
    drafting = try_resume("gemma4_assistant")
    assert (drafting.verdict, drafting.reason) == (
        "left out", "it drafts for another model and reads that model's keys and values"
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"'gpt3' is no causal model type of transformers.*Did you mean"):
        tiny_causal_lm("gpt3")


def test_models_are_small_seeded_random_and_in_evaluation_mode() -> None:
    one, same, other = tiny_causal_lm("llama"), tiny_causal_lm("llama"), tiny_causal_lm("llama", seed=1)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    assert all(p.dtype == torch.float32 and float(p.detach().std()) > 0.01 for p in one.parameters())
    assert not one.training
    assert sum(p.numel() for p in one.parameters()) < 100_000
    state = torch.random.get_rng_state()
    tiny_causal_lm("gpt2")
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_type_that_crashes_takes_only_its_own_process_along(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    honest = try_architecture

    def crashing(kind: str) -> ArchitectureVerdict:
        if kind == "opt":
            os._exit(7)
        return honest(kind)

    monkeypatch.setattr("dynprobe.testing._table.try_architecture", crashing)
    seen: list[str] = []
    found = try_architectures(["gpt2", "opt", "llama"], progress=lambda v: seen.append(v.model_type))
    assert [v.verdict for v in found] == ["right", "wrong", "right"]
    assert {a.reason for a in found[1].answers.values()} == {"its process ended with code 7"}
    assert seen == ["gpt2", "opt", "llama"]
    page = architecture_table(found, of=189)
    assert page.splitlines()[2].startswith("3 of 189 causal language models of transformers")
    assert "**2 of 3 types are right in every check (0 of them resume through all blocks); 0 with another" in page
    assert "fallback, 0 refused, 0 left out, 1 wrong.**" in page
    assert "| opt | | ✗ <sup>1</sup> | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ |" in page
    assert page.endswith("\n1. its process ended with code 7\n")


def test_every_type_of_the_library_is_known_to_the_table() -> None:
    types = causal_types()
    assert len(types) > 150
    assert set(FAST) | set(FALLBACK) <= set(types)


@pytest.mark.long
def test_no_architecture_is_silently_wrong() -> None:
    found = try_architectures()
    counts = Counter(v.verdict for v in found)
    assert [(v.model_type, n, a.reason) for v in found for n, a in v.answers.items() if a.verdict == "wrong"] == []
    assert counts["right"] + sum(v.only_resume for v in found) >= 150
    assert len(found) == len(causal_types())


def test_a_subject_decides_once_and_shares_it_with_others_of_its_module() -> None:
    from dynprobe.probes import as_subject

    model = tiny_causal_lm("zaya")
    first, second = as_subject(model), as_subject(model)
    assert first.road.fast is None
    assert not first.resumable
    assert second.road is first.road
    assert second.road.reason
    assert discover(model).road.fast is None


def _sabotaged(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tape], None], alpha: float | None = None) -> None:
    """Let the trial see other tapes than dynprobe makes; with ``alpha`` those of a write of this strength instead."""
    honest = trial.capture

    def capture(subject: Subject, rows: Any, *, perturb: Any = None, **more: Any) -> Tape:
        if perturb is not None and alpha is not None:
            perturb = perturb.replace(alpha=alpha)
        tape = honest(subject, rows, perturb=perturb, **more)
        change(tape)
        return tape

    monkeypatch.setattr(trial, "capture", capture)


def test_the_trial_sees_a_state_that_is_off_by_a_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tape: Tape) -> None:
        tape.states[2][0, 0, 0] = torch.nextafter(tape.states[2][0, 0, 0], torch.tensor(torch.inf))

    _sabotaged(monkeypatch, change)
    answer = try_architecture("llama", checks=["states"]).answers["states"]
    assert (answer.verdict, answer.reason) == ("wrong", "left: the state of depth 2 is not what a plain hook sees")


def test_the_trial_sees_hidden_states_of_the_library_that_are_other_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OwnModel.hidden_states

    def swapped(own: OwnModel, *where: torch.Tensor) -> Any:
        found = honest(own, *where)
        return (*found[:1], found[2], found[1], *found[3:])

    monkeypatch.setattr(OwnModel, "hidden_states", swapped)
    answer = try_architecture("llama", checks=["states"]).answers["states"]
    assert answer.verdict == "wrong"
    assert answer.reason == "left: its own hidden states are of the depths 0, 2, 1, 3, norm"


@pytest.mark.parametrize(("alpha", "check"), [(1e-4, "null"), (0.1001, "push")])
def test_the_trial_sees_a_write_of_another_size(alpha: float, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _sabotaged(monkeypatch, lambda tape: None, alpha)
    found = try_architecture("llama", checks=[check]).answers
    assert found[check].verdict == "wrong"
    assert {"null": "alpha=0 changes states or logits", "push": "the write is off by"}[check] in found[check].reason


def test_the_trial_sees_blocks_that_were_not_found() -> None:
    def deeper(kind: str, **more: Any) -> Any:
        model = tiny_causal_lm(kind, **more)
        model.config.n_layer = 5
        return model

    answer = try_architecture("gpt2", checks=["blocks"], build=deeper).answers["blocks"]
    assert (answer.verdict, answer.reason) == ("wrong", "4 blocks found, 5 configured")


def test_the_trial_sees_a_self_test_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> Check:
        return Check("alone", True, 0.0, 1.0, "")

    monkeypatch.setattr("dynprobe.protocols._selfchecks.check_alone", silent)
    found = try_architecture("rwkv", checks=["alone", "generation"]).answers
    assert found["alone"].verdict == found["generation"].verdict == "wrong"


def test_the_trial_sees_other_texts_and_other_states_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = writing._written

    def other_text(subject: Subject, batch: Any) -> tuple[list[list[int]], Tape]:
        new, tape = honest(subject, batch)
        return [[*row[:-1], row[-1] ^ 1] for row in new], tape

    def other_states(subject: Subject, batch: Any) -> tuple[list[list[int]], Tape]:
        new, tape = honest(subject, batch)
        tape.states[3].mul_(1.001)
        return new, tape

    monkeypatch.setattr(writing, "_written", other_text)
    assert "its own generate" in try_architecture("llama", checks=["generation"]).answers["generation"].reason
    monkeypatch.setattr(writing, "_written", other_states)
    answer = try_architecture("llama", checks=["generation"]).answers["generation"]
    assert answer.verdict == "wrong"
    assert answer.reason.startswith("states captured while writing are")


def test_a_model_that_cannot_write_by_itself_must_not_seem_to_under_dynprobe(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such cache")

    monkeypatch.setattr(OwnModel, "text", fails)
    answer = try_architecture("llama", checks=["generation"]).answers["generation"]
    assert answer.verdict == "wrong"
    assert answer.reason == "it writes although its own generate fails: RuntimeError: no such cache"
    monkeypatch.setattr(writing, "_written", fails)
    assert try_architecture("llama", checks=["generation"]).answers["generation"].verdict == "refused"


def test_several_chains_of_blocks_are_not_chosen_from_silently() -> None:
    model = tiny_causal_lm("blt")
    with pytest.raises(ModelError, match=r"name the one to read: layers='model.local_decoder.layers.\*'"):
        discover(model)
    assert discover(model, layers="model.local_decoder.layers.*").n_layers == 4
