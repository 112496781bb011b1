"""The study of CEM's published orderings: runs, resumption, intervals, verdicts, interpolation."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """The script with its neighbours, imported as it imports them."""
    if not EXAMPLES.is_dir():
        pytest.skip("the examples are not beside the tests")
    sys.path.insert(0, str(EXAMPLES))
    import cem_orderings

    yield cem_orderings
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def verdicts(study: Any) -> Any:
    import _verdicts

    return _verdicts


@pytest.fixture(scope="module")
def corpus(study: Any) -> Any:
    import _training

    text = b"".join(b"%d times %d is %d\n" % (a, b, a * b) for a in range(30) for b in range(30))
    parts = {"train": text, "valid": text[:2000], "test": text[3000:6000]}
    windows = {name: np.arange(4, 1500, 100) for name in ("valid", "test")}
    return _training.Corpus(parts, {name: _training.encode(part) for name, part in parts.items()}, windows)


def tiny(study: Any, **more: Any) -> tuple[Any, Any]:
    config = {**study.TEXT.config, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    text = replace(study.TEXT, config=config, steps=3, batch=2, length=24, **more)
    return text, replace(text, length=8)


def test_runs_are_written_once_and_taken_up_again(study: Any, corpus: Any, tmp_path: Path) -> None:
    file, settings = tmp_path / "runs.jsonl", tiny(study)
    runs = [study.run_of(point, 0, *settings) for point in ("llama", "attn-T2-lowrank", "gp-2-lowrank")]
    assert study.work(runs[:1], file, lambda: corpus) == 1
    with file.open("a") as opened:
        opened.write('{"key": "cut o')  # a writer that was stopped
    assert study.work(runs, file, lambda: corpus) == 2
    held = file.read_bytes()
    assert study.work(runs, file, lambda: pytest.fail("the text was read for nothing")) == 0
    assert file.read_bytes() == held
    lines = study.read_lines(file)
    assert [line["point"] for line in lines] == ["llama@0.004", "attn-T2-lowrank@0.004", "gp-2-lowrank@0.004"]
    assert [line["tokens"] for line in lines] == [3 * 2 * 24, 3 * 2 * 24, 3 * 2 * 8]
    assert all(line["diverged"] is False and line["steps"] == 3 and line["loss"] > 0 for line in lines)
    other = tiny(study, decay=0.2)
    assert study.work([study.run_of("llama", 0, *other)], file, lambda: corpus) == 1  # another recipe, another run


def test_a_run_is_a_function_of_its_recipe(study: Any, corpus: Any) -> None:
    run = study.run_of("cem", 1, *tiny(study))
    assert study.train_run(run, corpus)["loss"] == study.train_run(run, corpus)["loss"]


def test_budget_stops_before_a_run_that_does_not_fit(study: Any, corpus: Any, tmp_path: Path) -> None:
    runs = [study.run_of("llama", seed, *tiny(study)) for seed in (0, 1)]
    assert study.work(runs[:1], tmp_path / "a", lambda: corpus) == 1
    line = study.read_lines(tmp_path / "a")[0]
    (tmp_path / "b").write_text(json.dumps({**line, "seconds": 1000.0}) + "\n")
    assert study.work(runs, tmp_path / "b", lambda: corpus, budget_s=900.0) == 0
    assert study.work(runs, tmp_path / "b", lambda: corpus, budget_s=9000.0) == 1


def test_a_gradient_that_is_not_finite_is_a_diverged_run(study: Any, corpus: Any) -> None:
    run = study.run_of("llama@1e30", 0, *tiny(study))
    line = study.train_run(run, corpus)
    assert line["diverged"] is True
    assert json.loads(json.dumps(line, allow_nan=False))["point"] == "llama@1e+30"


def test_every_prefix_is_balanced_and_every_comparison_is_planned(study: Any) -> None:
    from _orderings import CLAIMS, TIERS, full_name

    runs = study.plan(3)
    assert len({run.key for run in runs}) == len(runs)
    planned = {(run.point, run.recipe.seed) for run in runs}
    for claim in CLAIMS:
        assert {(full_name(point), seed) for point, _ in claim.terms for seed in range(3)} <= planned, claim
    used = {full_name(point) for claim in CLAIMS for point, _ in claim.terms}
    assert {run.point for run in runs} == used
    assert [run.recipe.seed for run in runs[: 3 * len(TIERS[0])]] == [s for s in range(3) for _ in TIERS[0]]


def test_arms_of_a_seed_read_the_same_bytes_and_differ_in_switches_only(study: Any, corpus: Any) -> None:
    from _training import batch_of

    a, b = study.run_of("llama", 2).recipe, study.run_of("cem@0.008", 2).recipe
    assert torch.equal(batch_of(a, corpus, 5), batch_of(b, corpus, 5))
    assert replace(a, config={}, lr=0) == replace(b, config={}, lr=0)
    even, base = study.run_of("mlp-T1-none-wide", 0).recipe, study.run_of("llama", 0).recipe
    sizes = [sum(p.numel() for p in study.build(recipe).parameters()) for recipe in (even, base)]
    assert abs(sizes[0] - sizes[1]) == 0  # widened to the weights of Llama's MLP
    two, reuse = (study.run_of(name, 0).recipe.config for name in ("mlp-T2-lowrank-even", "reuse-mlp"))
    assert study.products_per_token(two, 128) == study.products_per_token(reuse, 128)


@pytest.mark.parametrize("arm", ["llama", "reuse-attn", "attn-T2-none", "attn-T1-diag-d-none", "mlp-T2-none", "cem"])
def test_products_are_those_of_a_counter(study: Any, arm: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    recipe = study.run_of(arm, 0).recipe
    model, tokens = study.build(recipe), torch.ones(32, 128, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False)
    head = recipe.config["hidden_size"] * 259
    counted = counter.get_total_flops() / 2 / tokens.numel() - head
    folding = 0.004 if arm == "cem" else 0.0  # once per forward, left out
    assert study.products_per_token(recipe.config, 128) == pytest.approx(counted, rel=folding + 1e-9)


def test_interval_is_students(verdicts: Any) -> None:
    found = verdicts.interval_of([0.1, 0.2, 0.4])
    half = student.ppf(0.975, 2) * np.std([0.1, 0.2, 0.4], ddof=1) / math.sqrt(3)
    assert (found.mean, found.high - found.mean, found.n) == pytest.approx((0.7 / 3, half, 3))
    assert math.isnan(verdicts.interval_of([0.1]).low)


@pytest.mark.parametrize(
    ("expect", "values", "said"),
    [
        ("below", [-0.10, -0.11, -0.12], "holds"),
        ("below", [0.10, 0.11, 0.12], "reversed"),
        ("below", [-0.10, -0.01, 0.02], "not resolved"),
        ("below", [-0.10], "not resolved"),
        ("above", [0.10, 0.11, 0.12], "holds"),
        ("above", [-0.10, -0.11, -0.12], "reversed"),
        ("equal", [0.001, -0.001, 0.002], "holds"),
        ("equal", [0.10, 0.11, 0.12], "reversed"),
        ("equal", [-0.10, -0.11, -0.12], "reversed"),
        ("equal", [0.018, 0.022, 0.020], "not resolved"),
        ("at_most", [-0.10, -0.11, -0.12], "holds"),
        ("at_most", [0.001, -0.001, 0.002], "holds"),
        ("at_most", [0.10, 0.11, 0.12], "reversed"),
        ("unstable", [0.10, 0.11, 0.12], "holds"),
        ("unstable", [-0.001, 0.001, 0.002], "reversed"),
        ("unstable", [-0.10, 0.1, 0.2], "not resolved"),
        ("", [0.1, 0.1, 0.1], "–"),
    ],
)
def test_verdicts(verdicts: Any, expect: str, values: list[float], said: str) -> None:
    from _orderings import Claim

    claim = Claim("topic", (("cem", 1.0), ("llama", -1.0)), expect, "claim")
    assert verdicts.verdict(claim, verdicts.Row(tuple(values))) == said


def test_diverged_runs_speak_only_when_they_are_most(verdicts: Any) -> None:
    from _orderings import Claim

    claim = Claim("topic", (("cem-T3", 1.0), ("cem", -1.0)), "unstable", "unstable")
    rows = {1: (math.nan, 0.0, 0.0), 2: (math.nan, math.nan, 0.0)}
    assert verdicts.verdict(claim, verdicts.Row(rows[1], left_diverged=1)) == "not resolved"
    assert verdicts.verdict(claim, verdicts.Row(rows[2], left_diverged=2)) == "holds"
    assert verdicts.verdict(claim, verdicts.Row(rows[2], left_diverged=2, right_diverged=2)) == "not resolved"
    below = replace(claim, expect="below")
    assert verdicts.verdict(below, verdicts.Row(rows[2], left_diverged=2)) == "reversed"
    assert verdicts.verdict(below, verdicts.Row(rows[2], right_diverged=2)) == "holds"


def line(point: str, seed: int, loss: float | None) -> dict[str, Any]:
    more = {"parameters": 100, "macs": 50.0, "worst_rise": 0.1, "seconds": 2.0}
    return {"point": point, "seed": seed, "loss": loss, "diverged": loss is None, **more}


def test_table_on_made_up_lines(verdicts: Any) -> None:
    made = {
        "attn-T2-lowrank@0.004": [1.50, 1.61, 1.69],
        "attn-T1-lowrank@0.004": [1.60, 1.70, 1.80],  # paired: the difference is far steadier than the losses
        "attn-T1-none@0.004": [1.40, 1.50, 1.60],
        "llama@0.004": [1.55, 1.60, 1.71, 1.60],  # one seed more than the others
        "cem@0.004": [1.5, 1.5, 1.5],
        "cem-T3@0.004": [None, None, 1.5],
    }
    lines = [line(point, seed, loss) for point, losses in made.items() for seed, loss in enumerate(losses)]
    text = verdicts.table(lines)
    rows = {cells[2]: cells for row in text.splitlines() if len(cells := [c.strip() for c in row.split("|")]) == 10}
    recursion = rows["attn-T2-lowrank − attn-T1-lowrank"]
    assert recursion[3].startswith("-0.1000 [")
    assert (recursion[4], recursion[5], recursion[8]) == ("3", "× 1.00", "holds")
    assert rows["attn-T1-none − llama"][8] == "reversed"
    assert rows["attn-T1-lowrank − attn-T1-none"][8] == "reversed"
    assert rows["attn-T2-lowrank − llama"][8] == "not resolved"
    assert rows["cem-T3 − cem"][8] == "holds"
    assert "2 left diverged" in rows["cem-T3 − cem"][3]
    assert rows["mlp-T1-none − llama"][8] == "not run"
    assert "| cem-T3@0.004 | 1.5000 | – | 3 | 2 |" in text


def test_akima_finds_the_minimum_of_a_parabola(verdicts: Any) -> None:
    from _orderings import RATES

    at = math.log2(0.0047)
    losses = [1.5 + 0.03 * (math.log2(rate) - at) ** 2 for rate in RATES]
    rate, loss, edge = verdicts.akima_minimum(RATES, losses)
    assert (rate, loss, edge) == (pytest.approx(0.0047, rel=1e-6), pytest.approx(1.5, abs=1e-9), False)
    rate, loss, edge = verdicts.akima_minimum(RATES, [1.9, 1.8, 1.7, 1.6, math.nan])
    assert (rate, loss, edge) == (RATES[3], 1.6, True)
    assert all(math.isnan(found) for found in verdicts.akima_minimum(RATES, [1.0, 2.0, 3.0, math.nan, math.nan])[:2])


def test_best_rates_are_compared_seed_by_seed(verdicts: Any) -> None:
    from _orderings import CLAIMS, RATES, Best

    losses: dict[str, dict[int, float]] = {}
    for name, at, floor in (("cem", 0.008, 1.48), ("llama", 0.004, 1.5)):
        for rate in RATES:
            curve = 0.03 * (math.log2(rate) - math.log2(at)) ** 2
            losses[f"{name}@{rate:g}"] = {seed: floor + 0.1 * seed + curve + 0.001 * (seed % 2) for seed in range(3)}
    gain, rates = (verdicts.contrast(claim, losses) for claim in CLAIMS if isinstance(claim, Best))
    assert gain.values == pytest.approx([-0.02] * 3)
    assert rates.values == pytest.approx([1.0] * 3)
    assert gain.edge == 0


def test_exact_predictor_equals_conditioning(study: Any) -> None:
    from _gaussian_process import LENGTH_SCALE_SQUARED, exact_rmse, functions, tokens_of

    x, y = functions(np.random.default_rng(0), 3, 6)
    errors = []
    for places, values in zip(x, y, strict=True):
        k = np.exp(-((places[:, None] - places[None]) ** 2).sum(-1) / (2 * LENGTH_SCALE_SQUARED)) + 1e-6 * np.eye(6)
        errors += [values[i] - k[i, :i] @ np.linalg.solve(k[:i, :i], values[:i]) for i in range(6)]
    assert exact_rmse(x, y) == pytest.approx(math.sqrt(np.mean(np.square(errors))), rel=1e-8)
    tokens, wanted = tokens_of(x, y)
    assert torch.equal(tokens[:, 1:, -1], wanted[:, :-1])
    assert not tokens[:, 0, -1].any()


def test_the_block_of_a_page_is_replaced(study: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- cem_orderings.py: begin -->\nold\n<!-- cem_orderings.py: end -->\nb\n")
    for _ in range(2):
        study.write_block(page, "| new |")
    text = page.read_text()
    assert text.startswith("a\n<!--")
    assert text.endswith("-->\nb\n")
    assert "old" not in text
    assert text.count("| new |") == 1
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="markers"):
        study.write_block(page, "x")
