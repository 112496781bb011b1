"""Two runs that differ in one planted place are found to part there, whatever the order of their rows."""

from __future__ import annotations

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import RunFolderError, UsageError
from dynprobe.runs import RunWriter, diff
from dynprobe.runs._diff_cells import relative
from dynprobe.runs._diff_floor import Floor
from dynprobe.runs._diff_head import heads_of
from dynprobe.testing import tiny_llama

PROMPTS = [[1, 5, 9, 4, 7, 3], [2, 8, 6, 3, 5, 11, 12], [7, 7, 1, 2, 4, 9]]


def blocks_of(model):
    return model.model.layers


def measured(tmp_path, name, model, prompts=PROMPTS, **options):
    options = {"states": True, "max_new_tokens": 3, "perturb": "alpha=0.1"} | options
    return dp.run(model, prompts, out=tmp_path / name, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    model = tiny_llama().model
    return model, measured(out, "a", model)


def changed(model, name, index=(0, 0), by=0.5):
    other = copy.deepcopy(model)
    with torch.no_grad():
        dict(other.named_parameters())[name][index] += by
    return other


def test_a_run_is_equal_to_itself_bit_for_bit(base, tmp_path):
    model, run = base
    found = diff(run, measured(tmp_path, "b", copy.deepcopy(model)))
    assert found.basis == "states"
    assert found.verdict == "equal bit for bit"
    assert not found.parts
    assert found.samples["max_rel"].max() == 0
    assert len(found.cells) == sum(len(s) for s in found.cells.groupby("condition_id").groups.values()) > 100
    assert set(found.conditions["condition_id"]) == {"clean", "sham", "perturbed.forced", "perturbed.free"}


@pytest.mark.parametrize("block", [0, 1])
def test_a_changed_weight_of_block_k_parts_at_depth_k_plus_1(base, tmp_path, block):
    model, run = base
    other = changed(model, f"model.layers.{block}.mlp.down_proj.weight")
    found = diff(run, measured(tmp_path, "b", other), condition="clean")
    row = found.samples.iloc[0]
    assert row["depth_depth"] == row["token_depth"] == block + 1
    assert row["depth_layer"] == block
    assert row["token_pos"] == 0
    assert found.verdict.startswith(f"part at layer {block} (depth {block + 1}), token 0")
    below = found.cells[found.cells["depth"] <= block]
    assert len(below)
    assert (below["rel"] == 0).all()
    assert "weights.hash" in set(found.facts["fact"])


def test_a_changed_embedding_parts_where_its_token_stands(base, tmp_path):
    model, run = base
    other = changed(model, "model.embed_tokens.weight", (8, 3))  # token 8 stands at position 1 of the second prompt
    found = diff(run, measured(tmp_path, "b", other), condition="clean")
    own = found.cells[found.cells["pos"] < 6]
    hit = own[own["beyond"]].groupby("prompt_id")["pos"].min()
    assert len(hit) >= 1
    second = found.samples.loc[found.samples["n_beyond"].gt(0)].set_index("prompt_id")
    name = dp.open(run.path).prompts["prompt_id"].astype(str).iloc[1]
    assert second.loc[name, "depth_depth"] == 0
    assert second.loc[name, "token_pos"] == second.loc[name, "depth_pos"] == 1
    assert second.loc[name, "verdict"] == "part at the embedding (depth 0), token 1"


def test_a_small_change_is_noise_until_the_floor_is_lowered(base, tmp_path):
    model, run = base
    other = measured(tmp_path, "b", changed(model, "model.layers.1.mlp.down_proj.weight", by=1e-6))
    found = diff(run, other, condition="clean")
    assert found.verdict == "equal within noise floor"
    assert 0 < found.samples["max_rel"].max() < 1e-6
    assert diff(run, other, condition="clean", floor=0.0).verdict.startswith("part at layer 1 (depth 2)")
    assert diff(run, other, floor=10.0).verdict == "equal within noise floor"
    for bad in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="--floor"):
            diff(run, other, floor=bad)


def test_a_changed_head_parts_at_the_readout(base, tmp_path):
    model, run = base
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    found = diff(run, measured(tmp_path, "b", other), condition="clean")
    assert (found.cells["rel"] == 0).all()
    assert found.verdict.startswith("part at the readout, token 0")
    assert found.samples["nll_max"].max() > 0.01


def test_bfloat16_beside_float32_is_judged_by_the_coarser(base, tmp_path):
    model, run = base
    half = measured(tmp_path, "b", copy.deepcopy(model).to(torch.bfloat16))
    found = diff(run, half, condition="clean")
    assert found.floor.dtype == "bfloat16"
    assert found.basis == "states"
    assert 1e-4 < found.samples["max_rel"].max() < 0.1
    assert (found.cells["beyond"]).mean() < 0.05
    assert diff(run, half, condition="clean", floor=1e-5).parts
    assert {"dtypes.weights"} <= set(found.facts["fact"])


def test_without_states_the_metrics_prove_a_lower_bound(base, tmp_path):
    model, run = base
    other = changed(model, "model.layers.1.mlp.down_proj.weight")
    bare = measured(tmp_path, "b", other, states=False)
    full = measured(tmp_path, "c", other)
    bound, exact = diff(run, bare, condition="clean"), diff(run, full, condition="clean")
    assert (bound.basis, exact.basis) == ("metrics", "states")
    assert bound.conditions.iloc[0]["verdict"].startswith("part at layer 1 (depth 2)")
    keys = ["prompt_id", "pos", "depth"]
    both = bound.cells.merge(exact.cells, on=keys, suffixes=("", "_exact")).sort_values([*keys])
    # A step joins two depths, so the bound is on the larger error of the two.
    worst = both.groupby(["prompt_id", "pos"])["rel_exact"].cummax()
    assert (both["rel"] <= worst * 1.05 + 1e-6).all()
    assert (both["rel"] > 0).any()


def test_rows_are_found_by_their_labels(base, tmp_path):
    model, run = base
    turned = measured(tmp_path, "b", copy.deepcopy(model), batch_size=1)
    found = diff(run, turned, condition="clean")
    assert not found.parts  # other batches, other order of rows and files
    assert found.samples["n_cells"].gt(0).all()
    other = measured(tmp_path, "c", changed(model, "model.layers.0.mlp.down_proj.weight"), batch_size=1)
    assert (diff(run, other, condition="clean").samples["depth_depth"] == 1).all()


def test_what_only_one_run_has_is_listed(base, tmp_path):
    model, run = base
    fewer = measured(tmp_path, "b", copy.deepcopy(model), PROMPTS[:2], perturb=None)
    found = diff(run, fewer)
    assert len(found.samples) == 2
    assert any(text.startswith("prompt ") for text in found.only_a)
    assert {"condition perturbed.forced", "condition perturbed.free"} <= set(found.only_a)
    assert not found.only_b
    assert diff(fewer, run).only_b == found.only_a


def test_other_tokens_are_refused_and_the_first_is_named(tmp_path):
    a = synthetic(tmp_path / "a", ids=[3, 4, 5, 6])
    b = synthetic(tmp_path / "b", ids=[3, 4, 9, 6, 1])
    with pytest.raises(UsageError, match=r"prompt p0 .* token 2: id 5 in A, id 9 in B"):
        diff(a, b)


def test_texts_that_part_are_compared_up_to_there(tmp_path):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6, 3, 8)).astype(np.float32)
    later = states.copy()
    later[4:] += 1.0
    a = synthetic(tmp_path / "a", states=states, new=[7, 8, 9])
    b = synthetic(tmp_path / "b", states=later, new=[7, 5, 9])
    found = diff(a, b)
    row = found.samples.iloc[0]
    # tokens 0 … 3 are the prompt, 4 is the first new one and equal; the fifth differs
    assert (row["n_tokens"], row["differs_at"]) == (5, 5)
    assert (row["token_a"], row["token_b"]) == (8, 5)
    assert found.cells["pos"].max() == 4
    assert row["token_pos"] == 4
    same = diff(a, synthetic(tmp_path / "c", states=states, new=[7, 5, 9]))
    assert same.verdict.startswith("part at token 5 of the text")


def test_slots_and_broken_numbers(tmp_path):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6, 3, 4, 8)).astype(np.float32)
    other = states.copy()
    other[3, 2, 1] *= 1.5
    other[5, 1, 0, 0] = np.nan
    found = diff(synthetic(tmp_path / "a", states=states), synthetic(tmp_path / "b", states=other))
    row = found.samples.iloc[0]
    assert (row["token_pos"], row["token_depth"], row["token_slot"]) == (3, 2, 1)
    assert (row["depth_pos"], row["depth_depth"], row["depth_slot"]) == (5, 1, 0)
    assert row["token_rel"] == pytest.approx(1 / 3, rel=1e-6)
    assert row["depth_rel"] == np.inf
    assert "slot 0, token 5" in found.verdict
    assert json.loads(json.dumps(found.to_dict(), default=str))["parts"]


def test_the_relative_difference_against_a_slow_one():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 50, 3, 7))
    b[:20] = a[:20] * (1 + 1e-9)
    rel, slot = relative(a, b)
    for i in range(50):
        slow = [np.sqrt(((x - y) ** 2).sum()) / max(np.sqrt((x**2).sum()), np.sqrt((y**2).sum()))
                for x, y in zip(a[i], b[i], strict=True)]  # fmt: skip
        assert rel[i] == pytest.approx(max(slow), rel=1e-12)
        assert slot[i] == int(np.argmax(slow))
    zero = np.zeros((1, 1, 3))
    assert relative(zero, zero)[0].tolist() == [0.0]
    assert relative(zero, zero + 1)[0].tolist() == [1.0]
    broken = np.array([[[np.nan, 1.0]], [[np.inf, 1.0]], [[np.nan, 1.0]]])
    mate = np.array([[[np.nan, 1.0]], [[np.inf, 1.0]], [[2.0, 1.0]]])
    assert relative(broken, mate)[0].tolist() == [0.0, 0.0, np.inf]


def test_states_of_another_width_are_refused(tmp_path):
    a = synthetic(tmp_path / "a", states=np.ones((6, 3, 8), np.float32))
    b = synthetic(tmp_path / "b", states=np.ones((6, 3, 4), np.float32))
    with pytest.raises(UsageError, match=r"shape \[8\].*\[4\].*not the same model"):
        diff(a, b)


def test_floor_of_a_run_that_measured_its_own(tmp_path):
    alone = {"alone": {"passed": True, "detail": {"states": 1e-4}}}
    model = {"structure": {"dim": 16}}
    a = synthetic(tmp_path / "a", fields={"self_tests": alone, "model": model})
    b = synthetic(tmp_path / "b")
    assert diff(a, b).floor.at([0, 9]) == pytest.approx(4e-4)
    alone["alone"]["passed"] = False  # a broken self-test says nothing about noise
    c = synthetic(tmp_path / "c", fields={"self_tests": alone, "model": model})
    assert diff(c, b).floor.measured == 0
    assert Floor(2.0**-8, "bfloat16").at(3) == pytest.approx(8 / 256 * 2)


def test_growth_is_the_factor_per_depth(tmp_path):
    states = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float64)
    other = states * (1 + 1e-5 * 2.0 ** np.arange(8))[None, :, None]
    a, b = (synthetic(tmp_path / n, states=s, dtype="float64") for n, s in (("a", states), ("b", other)))
    assert diff(a, b).samples["growth"].iloc[0] == pytest.approx(2.0, rel=1e-3)


def test_top1_flips_that_the_numbers_prove(tmp_path):
    class Fake:
        def __init__(self, nll, margin):
            self.frame = pd.DataFrame({"sample_id": "s", "pos": range(len(nll)), "nll": nll, "margin": margin})
            self.manifest = type("M", (), {"rows": staticmethod(lambda: {"tokens": 3})})()

        def columns(self):
            return pd.DataFrame({"table": "tokens", "column": ["sample_id", "pos", "nll", "margin"]})

        def table(self, name, columns):
            return self.frame[columns]

    # target surely first, surely not first, unknown
    a = Fake(-np.log([0.9, 0.1, 0.3]), [0.85, 0.5, 0.1])
    b = Fake(-np.log([0.1, 0.1, 0.3]), [0.5, 0.5, 0.1])
    pairs = pd.DataFrame({"a": ["s"], "b": ["s"], "n_same": [4.0]})
    row = heads_of(a, b, pairs, 0.01).iloc[0]
    assert (row["top1_flips"], row["top1_unknown"], row["head_pos"]) == (1, 2, 0)
    assert row["nll_max"] == pytest.approx(np.log(9))


def test_runs_that_cannot_be_compared(base, tmp_path):
    _, run = base
    other = synthetic(tmp_path / "b")
    with pytest.raises(UsageError, match="share no sample"):
        diff(run, other)
    with pytest.raises(UsageError, match=r"no condition 'claen' in common.*'clean'"):
        diff(run, run, condition="claen")
    with pytest.raises(UsageError, match="no prompt 'nobody'"):
        diff(run, run, prompt="nobody")
    with pytest.raises(UsageError, match="no track 'z'"):
        diff(run, run, track="z")
    with pytest.raises(RunFolderError, match="There is no run folder"):
        diff(run, tmp_path / "none")


def test_files_and_picture(base, tmp_path):
    model, run = base
    found = diff(run, measured(tmp_path, "b", changed(model, "model.layers.1.mlp.down_proj.weight")))
    assert json.loads(found.save(tmp_path / "d.json").read_text())["verdict"] == found.verdict
    assert len(pd.read_parquet(found.save(tmp_path / "d.parquet"))) == len(found.cells)
    assert len(pd.read_csv(found.save(tmp_path / "d.csv"))) == len(found.cells)
    assert found.draw(tmp_path / "d.png").stat().st_size > 10_000
    axes = found.figure(condition="clean").axes
    assert axes[0].get_xlabel() == "token"
    assert "first in depth: layer 1 (depth 2), token 0" in axes[0].get_legend_handles_labels()[1]
    with pytest.raises(UsageError, match="no condition"):
        found.figure(condition="x")
    with pytest.raises(UsageError, match="--out"):
        found.save(tmp_path / "d.txt")


def synthetic(out, ids=(3, 4, 5, 6), states=None, new=(7, 8), dtype="float32", fields=None):
    """A run of one prompt, whose tokens and states are given; states are [pos, depth, …]."""
    ids, new = list(ids), list(new)
    tokens = [*ids, *new]
    if states is None:
        states = np.ones((len(tokens) - 1, 3, 8), np.float32)
    n, depths = states.shape[:2]
    writer = RunWriter.begin(
        out, ident="0123abcd", model_name="made", config={}, manifest_fields={"batch_plan": [0], **(fields or {})}
    )
    keys = pd.DataFrame(
        {
            "sample_id": "p0|clean|0", "pos": np.repeat(np.arange(n), depths), "track": "resid",
            "depth": np.tile(np.arange(depths), n),
        }
    )  # fmt: skip
    keys["layer"] = keys["depth"] - 1
    order = np.random.default_rng(len(str(out))).permutation(len(keys))
    with writer:
        writer.write_table("prompts", pd.DataFrame({"prompt_id": ["p0"], "text": ["t"], "token_ids": [ids]}))
        writer.write_table("conditions", pd.DataFrame({"condition_id": ["clean"], "arm": ["clean"]}))
        flat = states.reshape(n * depths, *states.shape[2:])
        writer.write_states(0, keys.iloc[order], flat[order], dtype)
        samples = {"sample_id": ["p0|clean|0"], "prompt_id": ["p0"], "condition_id": ["clean"], "replicate": [0]}
        samples |= {"n_prompt": [len(ids)], "n_new": [len(new)], "text": ["x"]}
        rows = {"sample_id": "p0|clean|0", "pos": range(len(tokens) - 1), "token_id": tokens[:-1]}
        writer.write_batch(0, {"samples": samples, "tokens": pd.DataFrame({**rows, "target_id": tokens[1:]})})
        writer.finish({})
    return writer.folder
