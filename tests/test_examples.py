"""The training scripts: runs are pure functions of their recipe, and counting is counting."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def training() -> Iterator[Any]:
    """The modules of examples/, imported under their own names as the scripts do."""
    if not EXAMPLES.is_dir():
        pytest.skip("the examples are not beside the tests")
    sys.path.insert(0, str(EXAMPLES))
    import _training

    yield _training
    sys.path.remove(str(EXAMPLES))


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(training: Any) -> Any:
    text = b"".join(b"%d times %d is %d\n" % (a, b, a * b) for a in range(60) for b in range(40))
    parts = {"train": text, "valid": text[:4000], "test": text[5000:9000]}
    windows = {name: np.arange(4, 1500, 100) for name in ("valid", "test")}
    return training.Corpus(parts, {k: training.encode(v) for k, v in parts.items()}, windows)


def small(training: Any, family: str, **more: Any) -> Any:
    config = {
        "llama": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
        "cem": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
        "csm": {"hidden_size": 16, "state_size": 8, "memory_size": 8},
    }[family]
    return training.Recipe(family, config, steps=6, batch=2, length=24, synthetic=0.5, depths=(3, 6), **more)


@pytest.mark.parametrize("family", ["llama", "cem", "csm"])
def test_a_stopped_run_goes_on_to_the_same_weights(training: Any, corpus: Any, family: str, tmp_path: Path) -> None:
    recipe = small(training, family)
    whole = training.train(recipe, corpus, tmp_path / "whole", every=3)
    training.train(recipe, corpus, tmp_path / "parts", every=3, stop_at=5)  # two steps after what was kept are lost
    parts = training.train(recipe, corpus, tmp_path / "parts", every=3)
    for (name, a), (_, b) in zip(whole.state_dict().items(), parts.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    lines = [[json.loads(row) for row in (tmp_path / f / "progress.jsonl").open()] for f in ("whole", "parts")]
    assert [row["step"] for row in lines[1]] == [3, 6]
    assert [row["valid_nll"] for row in lines[0]] == [row["valid_nll"] for row in lines[1]]


def test_all_depths_of_one_pass_are_those_of_runs_apart(training: Any, corpus: Any) -> None:
    import _scores

    model = training.build(small(training, "csm")).eval()
    together = _scores.evaluate_depths(model, corpus, "test", (0, 2, 5), 24)
    apart = {T: training.evaluate(model, corpus, "test", 24, num_iterations=T) for T in (0, 2, 5)}
    assert together == pytest.approx(apart, rel=1e-5)
    assert len(set(apart.values())) == 3


def test_another_recipe_is_refused(training: Any, corpus: Any, tmp_path: Path) -> None:
    training.train(small(training, "llama"), corpus, tmp_path, every=3, stop_at=3)
    with pytest.raises(SystemExit, match="another recipe"):
        training.train(small(training, "llama", lr=1e-4), corpus, tmp_path, every=3)


def test_batches_do_not_depend_on_the_architecture(training: Any, corpus: Any) -> None:
    batches = [training.batch_of(small(training, f), corpus, 4) for f in ("llama", "cem", "csm")]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], training.batch_of(small(training, "llama"), corpus, 5))
    assert not torch.equal(batches[0], training.batch_of(small(training, "llama", seed=1), corpus, 4))


def test_schedule(training: Any) -> None:
    recipe = training.Recipe("llama", lr=1e-2, steps=1000)
    rates = [training.learning_rate(recipe, step) for step in range(1000)]
    assert max(rates) == rates[49] == 1e-2
    assert rates[0] == pytest.approx(2e-4)
    assert rates[-1] == pytest.approx(1e-3, rel=1e-3)
    assert sorted(rates[49:], reverse=True) == rates[49:]


def test_ids_are_those_of_the_tokenizer(training: Any, corpus: Any) -> None:
    from dynprobe.models import byte_tokenizer

    text = corpus.parts["test"][:500]
    assert training.encode(text).tolist() == byte_tokenizer()(text.decode()).input_ids


def test_ngram_entropies_equal_a_slow_count(training: Any) -> None:
    from _text import ngram_entropies

    rng = np.random.default_rng(0)
    train = bytes(rng.choice(list(b"abcd "), 400, p=[0.4, 0.3, 0.1, 0.1, 0.1]).tolist())
    held = np.frombuffer(b"abcaadbbacdazb aab", np.uint8)[None]
    scored = np.zeros(held.shape, bool)
    scored[:, 4:] = True

    def probability(context: bytes, byte: int) -> float:
        shorter = probability(context[1:], byte) if context else 1 / 256
        after = Counter(
            train[i + len(context)] for i in range(len(train) - len(context)) if train[i : i + len(context)] == context
        )
        total = sum(after.values())
        return (after[byte] + len(after) * shorter) / (total + len(after)) if total else shorter

    found = ngram_entropies(train, held, scored)
    text = bytes(held[0].tolist())
    for order, name in enumerate(("unigram", "bigram", "trigram", "4-gram", "5-gram")):
        slow = [-math.log(probability(text[i - order : i], text[i])) for i in range(4, len(text))]
        assert found[name] == pytest.approx(np.mean(slow), rel=1e-12)
    assert sum(probability(b"aa", byte) for byte in range(256)) == pytest.approx(1.0)  # a proper distribution


def test_zoo_recipes_differ_in_nothing_but_the_model(training: Any) -> None:
    recipes = load("train_zoo").RECIPES
    assert set(recipes) == {"tiny-llama", "tiny-cem", "tiny-csm"}
    assert len({(r.steps, r.batch, r.length, r.synthetic, r.seed, r.decay, r.warmup) for r in recipes.values()}) == 1
    sizes = [sum(p.numel() for p in training.build(r).parameters()) for r in recipes.values()]
    assert max(sizes) / min(sizes) < 1.025


def test_panel_covers_the_design(training: Any) -> None:
    panel = load("train_panel")
    sizes: dict[tuple[int, int], list[int]] = {}
    for depth in panel.DEPTHS:
        for width in panel.WIDTHS:
            for family in ("llama", "cem"):
                model = training.build(panel.recipe_of(family, depth, width, 0))
                sizes.setdefault((depth, width), []).append(sum(p.numel() for p in model.parameters()))
    assert all(max(pair) / min(pair) < 1.01 for pair in sizes.values()), sizes
    deep = panel.recipe_of("csm", 4, 64, 1)
    assert deep.depths[1] == training.build(deep).config.trained_iterations == 16
    assert len(panel.SEEDS) >= 2


def test_what_decays_is_part_of_the_recipe_and_older_results_are_not_taken_for_newer(
    training: Any, corpus: Any, tmp_path: Path
) -> None:
    old = small(training, "cem")
    new = training.Recipe(**{**training.as_json(old), "groups": "model", "depths": (3, 6)})
    model = training.build(new)
    named = dict(model.named_parameters())
    several = [name for name, p in named.items() if name.endswith((".p", ".diagonal", ".biases")) and p.ndim >= 2]
    assert several  # one row per head: two axes, and no matrix
    for recipe, decays in ((old, True), (new, False)):
        group = next(g for g in training._groups(model, recipe) if g["weight_decay"] > 0)
        inside = {id(p) for p in group["params"]}
        assert {id(named[name]) in inside for name in several} == {decays}
        assert id(named["model.embed_tokens.weight"]) in inside
    training.train(old, corpus, tmp_path, every=3, stop_at=3)
    kept = json.loads((tmp_path / "recipe.json").read_text())
    del kept["groups"]  # as folders from before it was written down
    (tmp_path / "recipe.json").write_text(json.dumps(kept))
    training.train(old, corpus, tmp_path, every=3, stop_at=4)
    with pytest.raises(SystemExit, match="another recipe"):
        training.train(new, corpus, tmp_path, every=3)
    panel, zoo = load("train_panel"), load("train_zoo")
    assert {f: panel.recipe_of(f, 1, 32, 0).groups for f in panel.FAMILIES} == {
        "llama": "shape", "cem": "model", "csm": "shape"
    }  # fmt: skip
    assert {recipe.groups for recipe in zoo.RECIPES.values()} == {"shape"}  # the weights that are shipped
    record = json.loads((EXAMPLES.parent / "dynprobe/models/zoo/tiny-cem/dynprobe-model.json").read_text())
    assert training.completed(record["recipe"]) == training.as_json(zoo.RECIPES["tiny-cem"])
