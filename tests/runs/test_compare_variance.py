"""The variance and skeleton tables of a comparison, on written runs."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.metrics.statistics import skeleton_r2, variance_table
from dynprobe.runs import RunWriter

CATEGORY = dict(zip(["p0", "p1", "p2", "p3", "p4", "p5"], ["x", "x", "x", "y", "y", "y"], strict=True))
FACTS = {"nll": {"id": "output.nll/1", "unit": "nat", "digest": "ee", "span": "new"}}


def write(
    out: Path, name: str, nll: Any, *, weights: str = "", skeleton: dict[str, Any] | None = None,
    dtype: str = "float32",
) -> Path:  # fmt: skip
    """A finished run with one number per prompt."""
    model = {"model_id": name, "model_type": name[:1]} | ({} if skeleton is None else {"skeleton": skeleton})
    writer = RunWriter.begin(
        out, ident=f"{zlib.crc32(f'{name}{list(nll)}'.encode()):08x}", model_name=name, config={}, columns=FACTS,
        manifest_fields={"model": model, "weights": {"hash": weights or name}, "dtypes": {"weights": dtype}},
    )  # fmt: skip
    with writer:
        prompts = pd.DataFrame({"prompt_id": list(CATEGORY), "category": list(CATEGORY.values())})
        writer.write_table("prompts", prompts.assign(text=prompts["prompt_id"] + " text"))
        writer.write_table("conditions", pd.DataFrame({"condition_id": ["clean"], "arm": ["clean"], "alpha": [0.0]}))
        samples = pd.DataFrame({
            "sample_id": [f"{p}|clean|0" for p in CATEGORY], "prompt_id": list(CATEGORY), "condition_id": "clean",
            "replicate": 0, "status": "ok", "nll": np.asarray(nll, dtype=np.float32),
        })  # fmt: skip
        writer.write_batch(0, {"samples": samples})
        writer.finish({})
    return writer.folder


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(2, 1, (6, 6)).astype(np.float32)


def test_shares_are_those_of_the_statistic(tmp_path, values):
    found = dp.compare([write(tmp_path, f"a{i}", row) for i, row in enumerate(values[:3])], n_boot=50)
    table = found.variance.set_index("term")
    y = values[:3].astype(float).ravel()
    expected = variance_table(y, np.repeat(range(3), 6), list(CATEGORY.values()) * 3, list(CATEGORY) * 3)
    assert table["eta2"].to_dict() == pytest.approx({r.term: r.eta2 for r in expected.rows}, nan_ok=True)
    assert set(found.variance["metric_id"]) == {"output.nll/1"}
    assert (table.loc["model:prompt", "includes"], table.loc["seed", "reason"]) == ("seed", "df<1")
    assert found.skeleton.empty
    assert "variance" in found.to_dict()


def test_runs_of_one_model_are_its_seeds(tmp_path, values):
    runs = [write(tmp_path, f"a{i}", row, weights=f"w{i % 2}") for i, row in enumerate(values[:4])]
    found = dp.compare(runs, n_boot=50)
    table = found.variance.set_index("term")
    assert table["n_models"].iloc[0] == 2
    assert table.loc["seed", "df"] == 12
    assert any(text.startswith("variance over 2 models (3 are the least)") for text in found.warnings)
    copies = dp.compare([*runs[:2], write(tmp_path, "again", values[0], weights="w0"),
                         write(tmp_path, "more", values[1], weights="w1")], n_boot=50)  # fmt: skip
    assert copies.variance["copies"].iloc[0] == 12
    one = dp.compare([runs[0], runs[2]], n_boot=50)
    assert one.variance.empty


def test_dtypes_are_no_seeds_of_a_model(tmp_path, values):
    """Four runs of two weights; where one of each is in bfloat16, nothing is left that could be called a seed."""
    where = [("w0", "float32"), ("w1", "float32"), ("w0", "bfloat16"), ("w1", "bfloat16")]
    mixed = [
        write(tmp_path, f"a{i}", row, weights=w, dtype=d)
        for i, (row, (w, d)) in enumerate(zip(values, where, strict=False))
    ]
    found = dp.compare(mixed, n_boot=50)
    table = found.variance.set_index("term")
    assert table["n_models"].iloc[0] == 4
    assert table.loc["seed", "reason"] == "df<1"
    assert any("a0 and a2 are one model in several dtypes" in text for text in found.grave)
    assert any(text.startswith("variance over 2 models") for text in found.warnings)  # and not over four
    assert found.skeleton.empty  # two models are too few for one, however many dtypes
    assert dp.compare([mixed[0], mixed[2]], n_boot=50).variance.empty
    again = write(tmp_path, "b", values[4], weights="w0", dtype="bfloat16")
    seeds = dp.compare([*mixed, again], n_boot=50).variance.set_index("term")
    assert seeds["n_models"].iloc[0] == 4
    assert seeds.loc["seed", "df"] > 0  # a second run of one dtype is a seed


def test_a_skeleton_reads_one_dtype_of_each_weights(tmp_path, values):
    depths = [1, 2, 3, 5]
    runs = [
        write(tmp_path, f"a{i}", row, skeleton={"depth": d})
        for i, (row, d) in enumerate(zip(values, depths, strict=False))
    ]
    alone = dp.compare(runs, n_boot=50).skeleton.iloc[0]
    half = write(tmp_path, "half", values[4], weights="a1", skeleton={"depth": 2}, dtype="bfloat16")
    beside = dp.compare([*runs, half], n_boot=50).skeleton.iloc[0]
    assert (alone["n_models"], beside["n_models"]) == (4, 4)
    assert beside["r2"] == pytest.approx(alone["r2"], rel=1e-12)
    assert alone["p_least"] == pytest.approx(1 / 24)  # no order of uneven depths gives the same R²
    assert alone["p_permutation"] >= alone["p_least"]


def test_skeletons_from_the_manifests(tmp_path, values):
    depths = [1, 2, 3, 4, 5, 7]
    runs = [
        write(tmp_path, f"ab{i}"[i % 2 :], row, skeleton={"depth": d, "heads": None if i == 2 else 4, "norm": "rms"})
        for i, (row, d) in enumerate(zip(values, depths, strict=True))
    ]
    found = dp.compare(runs, n_boot=50)
    row = found.skeleton.iloc[0]
    means = [float(v) for v in values.astype(float).mean(1)]
    expected = skeleton_r2(means, range(6), {"depth": dict(enumerate(depths))})
    assert row["r2"] == pytest.approx(expected.r2, rel=1e-6)
    assert row["p_permutation"] == pytest.approx(expected.p_value)
    assert row["p_holm"] == row["p_permutation"]
    assert (row["covariates"], row["n_models"]) == ("depth", 6)
    assert "not known of" in row["left_out"]
    assert "constant" in row["left_out"]
    assert not math.isnan(row["r2_leave_family"])
    assert dp.compare(runs[:3], n_boot=50).skeleton.empty
    bare = dp.compare([write(tmp_path, f"z{i}", row) for i, row in enumerate(values[:4])], n_boot=50)
    assert set(bare.skeleton["reason"]) == {"p<1"}  # runs of before: no skeleton in their manifests
