"""The suite of adapters: what ours say is true, and each of its checks fails an adapter that is wrong."""

from typing import Any

import pytest
import torch
from torch import nn

import dynprobe as dp
from dynprobe.errors import ModelError, SelfTestError
from dynprobe.probes import Loop
from dynprobe.probes._adapters import ADAPTERS, adapted
from dynprobe.testing import ADAPTER_CHECKS, check_adapter, tiny_causal_lm, tiny_llama

PLAIN = tuple(check for check in ADAPTER_CHECKS if check != "loop")


@pytest.mark.parametrize("name", ["tiny-cem", "tiny-csm"])
def test_ours_pass(name):
    assert check_adapter(lambda: dp.load(name).model) == ADAPTER_CHECKS


def test_that_of_a_library_passes():
    done = check_adapter(lambda: tiny_causal_lm("hrm_text"))
    assert set(done) >= {"found", "states", "null", "push", "detached"}


def model() -> nn.Module:
    return tiny_llama().model


def by_pattern(found: Any) -> str:
    return "model.layers.*"


def test_a_pattern_and_none_pass():
    assert check_adapter(model, by_pattern) == PLAIN
    assert check_adapter(model, lambda found: None) == PLAIN


@pytest.mark.parametrize("check", ADAPTER_CHECKS)
def test_as_an_author_writes_it(check):
    check_adapter(model, by_pattern, only=check)


class Loud(nn.Module):
    """A looped model of one block, with whatever is wrong about it."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (), {"model_type": "loud", "rounds": 3})()
        self.embed, self.norm, self.head = nn.Embedding(96, 16), nn.LayerNorm(16), nn.Linear(16, 96)
        self.core, self.wrong, self.calls = Core(wrong), wrong, 0

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        h = self.embed(input_ids)
        for _ in range(self.config.rounds):
            h = self.core(h)
        if self.wrong == "push":
            return self.head(self.norm(self.embed(input_ids)))
        if self.wrong == "readout":
            return self.head(self.norm(h)) + self.embed(input_ids).sum(-1, keepdim=True)
        return self.head(self.norm(h))


class Core(nn.Module):
    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.mix, self.wrong, self.calls = nn.Linear(16, 16), wrong, 0

    def forward(self, h: Any) -> Any:
        if self.wrong == "null":
            self.calls += 1
            h = h + 1e-3 * self.calls
        mixed = torch.tanh(self.mix(h))
        if self.wrong == "alone":  # a text sees how many rows and columns there are beside it
            mixed = mixed + 0.1 * h.shape[0]
        return h + mixed


def loop(found: Any) -> Loop:
    def choose(one: Any, T: int) -> None:
        one.config.rounds = T

    return Loop((("core", "core", -1),), prefix=True, iterations=lambda m: m.config.rounds, set_iterations=choose)


def test_a_loop_passes():
    done = check_adapter(Loud, loop)
    assert {"found", "states", "null", "push", "readout", "loop", "detached"} <= set(done)


def stuck(found: Any) -> Loop:
    described = loop(found)
    return Loop(described.modules, prefix=True, iterations=described.iterations, set_iterations=lambda m, T: None)


def leaves_a_hook(found: Any) -> Loop:
    found.core.register_forward_hook(lambda *_: None)
    return loop(found)


WRONG: dict[str, Any] = {
    "found": (Loud, lambda found: Loop((("nowhere", "core", -1),))),
    "null": (lambda: Loud("null"), loop),
    "push": (lambda: Loud("push"), loop),
    "alone": (lambda: Loud("alone"), loop),
    "readout": (lambda: Loud("readout"), loop),
    "loop": (Loud, stuck),
    "detached": (Loud, leaves_a_hook),
}


@pytest.mark.parametrize("check", WRONG)
def test_each_check_fails_what_is_wrong(check):
    with pytest.raises(SelfTestError, match=r"loud breaks the contract of adapters"):
        check_adapter(*WRONG[check], only=check)


def test_a_state_of_another_shape_is_no_match(monkeypatch):
    from dynprobe.testing import _adapter_contract

    def cut(subject, rows, **options):
        tape = dp.capture(subject, rows, **options)
        tape.states = [state[:, 1:] for state in tape.states]
        return tape

    monkeypatch.setattr(_adapter_contract, "capture", cut)
    with pytest.raises(SelfTestError, match=r"\(states\): at depth 1 a plain hook sees \(1, 8, "):
        check_adapter(model, by_pattern, only="states")


def test_what_an_adapter_says_is_not_believed_untried():
    """A pattern of blocks that a trial contradicts is an error where an adapter gave it."""

    class Broken(Loud):
        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            raise RuntimeError("no such input")

    with ADAPTERS.lent("loud", lambda found: "core"), pytest.raises(ModelError, match="no such input"):
        dp.probes.discover(Broken())
    assert dp.probes.discover(Broken(), layers="core").n_layers == 1


def test_an_adapter_that_says_nothing_leaves_what_is_ambiguous_refused():
    blt = Loud()
    blt.config.model_type = "blt"
    with ADAPTERS.lent("blt", lambda found: None), pytest.raises(ModelError, match="name the one to read"):
        adapted(blt)


def test_what_an_adapter_may_not_say():
    with pytest.raises(SelfTestError, match=r"\(found\)"):
        check_adapter(model, lambda found: 7, only="found")


def test_an_adapter_of_another_package(package, tmp_path):
    package("acme", {"dynprobe.adapters": {"llama": "acme_adapter:blocks"}}, acme_adapter="""
        def blocks(model):
            return "model.layers.*"
    """)  # fmt: skip
    assert ADAPTERS.plugin("llama").package == "acme"
    subject = dp.load("tiny-llama")
    assert subject.facts["adapter"] == "llama"
    assert subject.block_path == "model.layers.*"
    run = dp.run("tiny-llama", ["A sky"], max_new_tokens=0, out=str(tmp_path))
    assert [p["name"] for p in run.manifest.plugins or ()] == ["llama"]
    assert "adapter" not in dp.load("tiny-llama", layers="model.layers.*").facts
