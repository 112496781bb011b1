"""Writing text: greedy as the library does it, sampling that depends on nothing but the row."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from models import NAMES, VOCAB, Net, build, seeded, subject
from scipy.stats import chisquare
from torch import Tensor, nn

from dynprobe.errors import ModelError, UsageError
from dynprobe.probes import (
    Instrument,
    Sampling,
    Subject,
    Where,
    capture,
    discover,
    generate,
    ignored_defaults,
    make_batch,
    make_writers,
    sites_to_read,
)
from dynprobe.probes._generate import _GumbelMax, end_tokens
from dynprobe.testing import tiny_causal_lm

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12], [3, 9, 27, 81]]


def write(found: Subject, rows: list[list[int]], keys: list[str] | None = None, **sampling: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 6, "stop_at_eos": False} | sampling
    return generate(found, make_batch(found, rows, side="left", row_keys=keys), Sampling(**settings))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_librarys_own_token_for_token(name: str) -> None:
    found = subject(name)
    rows = ROWS[:1] if name == "rwkv" else ROWS
    batch = make_batch(found, rows, side="left")
    model: Any = found.model
    own = model.generate(
        batch.input_ids, attention_mask=batch.mask.long(), do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    new = generate(found, batch, Sampling(max_new_tokens=8))
    for mine, theirs in zip(new, own[:, batch.input_ids.shape[1] :].tolist(), strict=True):
        end = theirs.index(2) + 1 if 2 in theirs else len(theirs)
        assert mine == theirs[:end]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba", "bloom"])
def test_greedy_is_the_argmax_of_whole_forwards(name: str) -> None:
    found = subject(name)
    for row, new in zip(ROWS, write(found, ROWS, max_new_tokens=4), strict=True):
        text = list(row)
        for token in new:
            logits = capture(found, [text]).logits
            assert int(logits[0].argmax()) == token  # type: ignore[index]
            text.append(token)


LOUD = {
    "do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5, "repetition_penalty": 5.0, "num_beams": 2,
    "no_repeat_ngram_size": 1, "suppress_tokens": [6, 7], "min_new_tokens": 3,
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_checkpoints_defaults_are_set_aside_and_put_back(temperature: float) -> None:
    quiet, loud = discover(build("llama")), discover(build("llama"))
    config: Any = loud.model.generation_config
    for name, value in LOUD.items():
        setattr(config, name, value)
    before = config.to_dict()
    assert ignored_defaults(quiet) == {}
    assert ignored_defaults(loud) == LOUD
    assert write(loud, ROWS, temperature=temperature) == write(quiet, ROWS, temperature=temperature)
    assert loud.model.generation_config is config
    assert config.to_dict() == before


def test_the_defaults_come_back_after_an_exception() -> None:
    found = discover(build("llama"))
    config = found.model.generation_config

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    handle = found.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        write(found, ROWS)
    handle.remove()
    assert found.model.generation_config is config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
def test_a_rows_sample_depends_on_the_row_alone(name: str) -> None:
    found, keys = subject(name), ["a", "b", "c"]
    how = {"temperature": 1.0, "top_p": 0.95, "seed": 7, "max_new_tokens": 8}
    together = write(found, ROWS, keys, **how)
    assert write(found, ROWS[::-1], keys[::-1], **how)[::-1] == together
    assert [write(found, [row], [key], **how)[0] for row, key in zip(ROWS, keys, strict=True)] == together
    assert write(found, ROWS, keys, **how | {"max_new_tokens": 5}) == [row[:5] for row in together]
    for other in ({"seed": 8}, {"replicate": 1}, {"temperature": 1.5}):
        assert write(found, ROWS, keys, **how | other) != together
    assert write(found, ROWS, ["x", "y", "z"], **how) != together
    assert write(found, ROWS, keys, **how) == together


def frequencies(logits: Tensor, sampling: Sampling, n: int) -> np.ndarray:
    """How often each token is drawn for n rows that see the same logits."""
    keys = [f"row-{i}" for i in range(n)]
    scores = _GumbelMax(sampling, keys, [4] * n)(torch.zeros(n, 1).long(), logits.expand(n, -1))
    return np.bincount(scores.argmax(-1).numpy(), minlength=len(logits))


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_follow_the_softmax(seed: int) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 0.5, 0.5])
    counts = frequencies(logits, Sampling(temperature=1.0, seed=seed), 20_000)
    expected = torch.softmax(logits.double(), -1).numpy() * 20_000
    assert chisquare(counts, expected).pvalue > 1e-3


class Fixed(nn.Module):
    """Logits that do not depend on anything, to count what a sampler makes of them."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(*x.shape[:-1], -1)  # type: ignore[operator, no-any-return]


@pytest.fixture(scope="module")
def fixed() -> Subject:
    model = build("llama")
    model.lm_head = Fixed([3.0, 2.0, 1.0, 0.0] + [-30.0] * (VOCAB - 4))
    return discover(model)


@pytest.mark.parametrize(
    ("temperature", "top_p", "kept"),
    [(1.0, 1.0, 4), (0.5, 1.0, 4), (2.0, 1.0, 4), (1.0, 0.7, 2), (1.0, 0.6, 1), (2.0, 0.7, 2)],
)
def test_temperature_and_nucleus(fixed: Subject, temperature: float, top_p: float, kept: int) -> None:
    rows = [[5]] * 100
    new = write(fixed, rows, [str(i) for i in range(100)], temperature=temperature, top_p=top_p, max_new_tokens=40)
    counts = np.bincount(np.ravel(new), minlength=4)
    assert (counts[kept:] == 0).all()
    p = np.exp(np.array([3.0, 2.0, 1.0, 0.0]) / temperature)
    expected = p[:kept] / p[:kept].sum() * counts.sum()
    if kept > 1:
        assert chisquare(counts[:kept], expected).pvalue > 1e-3


def test_draws_of_neighbouring_positions_are_independent(fixed: Subject) -> None:
    new = np.array(write(fixed, [[5]] * 200, [str(i) for i in range(200)], temperature=1.0, max_new_tokens=20))
    a, b = (new[:, :-1] == 0).ravel(), (new[:, 1:] == 0).ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
    # A row of another length draws at the same absolute positions.
    long = write(fixed, [[5, 6, 7]], ["0"], temperature=1.0, max_new_tokens=10)[0]
    assert long == new[0, 2:12].tolist()


def test_a_text_ends_with_its_end_token() -> None:
    found = discover(build("llama"))
    model: Any = found.model
    free = write(found, ROWS, max_new_tokens=8)
    end = free[0][2]
    model.generation_config.eos_token_id = [end, 99]
    assert end_tokens(found) == [end, 99]
    stopped = write(found, ROWS, max_new_tokens=8, stop_at_eos=True)
    for whole, cut in zip(free, stopped, strict=True):
        expected = next((i for i, t in enumerate(whole) if t in (end, 99)), len(whole) - 1)
        assert cut == whole[: expected + 1]
    assert len(stopped[0]) <= 3
    assert write(found, ROWS, max_new_tokens=8) == free
    model.generation_config.eos_token_id = None
    assert end_tokens(found) == []
    assert write(found, ROWS, max_new_tokens=8, stop_at_eos=True) == free

    class Tokenizer:
        eos_token_id, pad_token_id = end, None

    found.tokenizer = Tokenizer()
    assert end_tokens(found) == [end]


def test_instruments_are_on_while_the_model_writes() -> None:
    found = subject("llama")
    batch = make_batch(found, ROWS, side="left", row_keys=["a", "b", "c"])
    read = sites_to_read(found, Where.parse("layers=all"))
    instrument = Instrument(found, read, make_writers(found, "alpha=0.5,layers=1"), row_keys=batch.row_keys)
    pushed = generate(found, batch, Sampling(max_new_tokens=6, stop_at_eos=False), instrument)
    assert pushed != write(found, ROWS)
    assert len(instrument.steps) == 6
    tape = instrument.tape()
    for i, row in enumerate(ROWS):
        assert tape.token_ids[i][tape.mask[i]].tolist() == row + pushed[i][:-1]  # type: ignore[index]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.model.modules())
    idle = Instrument(found, read)
    assert generate(found, batch, Sampling(max_new_tokens=6, stop_at_eos=False), idle) == write(found, ROWS)


def test_no_warnings_and_no_gradients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(subject("llama"), ROWS)
        write(subject("llama"), ROWS, temperature=0.7, top_p=0.9)


def test_refusals() -> None:
    found = subject("llama")
    with pytest.raises(UsageError, match="padding on the left"):
        generate(found, make_batch(found, ROWS, side="right"), Sampling())
    same = [[5, 6], [7, 8]]
    assert generate(found, make_batch(found, same, side="right"), Sampling(4)) == generate(
        found, make_batch(found, same, side="left"), Sampling(4)
    )
    net = discover(seeded(Net), layers="stack.*", name="net")
    with pytest.raises(ModelError, match=r"net \(Net\) has no generate\(\)"):
        write(net, ROWS)


def test_models_that_mix_rows_are_refused() -> None:
    rows = [[5, 6, 7], [8, 9, 10]]
    with pytest.raises(ModelError, match=r"RwkvBlock .*mixes the rows of a batch.*--batch-size 1"):
        write(subject("rwkv"), rows)
    assert not subject("rwkv").blocks[0]._forward_hooks
    assert len(write(subject("rwkv"), rows[:1])[0]) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "needs at least 1"),
        ({"temperature": -0.1}, "0 .greedy. or a positive number"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, "lies in"),
        ({"top_p": 1.1}, "lies in"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)


def test_a_cache_of_an_unknown_name_is_refused_and_not_read_as_many_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = discover(tiny_causal_lm("reformer"), name="reformer")
    batch = make_batch(found, ROWS[:1], side="left")

    def written() -> tuple[list[list[int]], Instrument]:
        instrument = Instrument(found, sites_to_read(found, Where.parse("layers=all")), **batch.rows)
        return generate(found, batch, Sampling(4, stop_at_eos=False), instrument), instrument

    (new,), instrument = written()
    tape = instrument.tape()
    assert tape.positions.tolist() == [list(range(len(ROWS[0]) + len(new) - 1))]
    whole = capture(found, [ROWS[0] + new[:-1]], logits=None)
    assert torch.allclose(tape.states[2], whole.states[2], atol=1e-4)
    monkeypatch.setattr("dynprobe.probes._clock.CACHES", ("past_key_values",))
    with pytest.raises(ModelError, match=r"fed 9 columns while it wrote, and only 1 of them could be joined"):
        written()
