"""Resuming on transformers' own architectures: a dozen in the ordinary suite, all of them under ``slow``."""

from collections import Counter
from typing import Any

import pytest
import torch

from dynprobe.errors import ModelError
from dynprobe.probes import discover
from dynprobe.probes._road import RoadTrial
from dynprobe.testing import ResumeVerdict, causal_types, resume_table, tiny_causal_lm, try_architectures, try_resume

#: Learned positions, plain, tuples, post-norm, experts, MLA, windows, state spaces, hybrids, several streams.
FAST = (
    "gpt2", "llama", "bloom", "bert", "mixtral", "deepseek_v3", "gemma2", "mamba", "rwkv", "jamba", "zamba2",
    "deepseek_v4",
)  # fmt: skip
#: What they hand upwards beside the state: a router's memory, chosen indices, keys and values, block outputs, a twin.
FALLBACK = ("zaya", "glm_moe_dsa", "gemma4_text", "inkling2_text", "reformer")


@pytest.mark.parametrize("kind", FAST)
def test_resuming_leaves_out_the_blocks_below_and_is_right(kind: str) -> None:
    found = try_resume(kind)
    assert (found.verdict, found.reason) == ("fast", "")
    assert found.worst <= 1e-4
    assert found.layers == 4


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

    honest = try_resume

    def crashing(kind: str) -> ResumeVerdict:
        if kind == "opt":
            os._exit(7)
        return honest(kind)

    monkeypatch.setattr("dynprobe.testing._table.try_resume", crashing)
    seen: list[str] = []
    found = try_architectures(["gpt2", "opt", "llama"], progress=lambda v: seen.append(v.model_type))
    assert [v.verdict for v in found] == ["fast", "wrong", "fast"]
    assert found[1].reason == "its process ended with code 7"
    assert seen == ["gpt2", "opt", "llama"]
    page = resume_table(found)
    assert "| fast | 2 |" in page
    assert "| opt | OPTForCausalLM | wrong | | | its process ended with code 7 |" in page


def test_every_type_of_the_library_is_known_to_the_table() -> None:
    types = causal_types()
    assert len(types) > 150
    assert set(FAST) | set(FALLBACK) <= set(types)


@pytest.mark.slow
def test_no_architecture_is_silently_wrong() -> None:
    found = try_architectures()
    counts = Counter(v.verdict for v in found)
    assert [v for v in found if v.verdict == "wrong"] == []
    assert counts["fast"] >= 120
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
