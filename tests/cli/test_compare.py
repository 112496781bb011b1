"""``dynprobe compare`` from the command line: three architectures together, and every way to ask wrongly."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.cli import main

TRIO = ("tiny-cem", "tiny-csm", "tiny-llama")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("trio")
    for name in TRIO:
        words = [
            "run",
            "--model",
            name,
            "--perturb",
            "alpha=0.1",
            "--limit",
            4,
            "--max-new-tokens",
            8,
            "--out",
            out,
            "--quiet",
        ]
        assert main([str(w) for w in words]) == 0
    return [next(out.glob(f"*{name}*")) for name in TRIO]


def test_three_architectures_have_the_same_columns_and_compare(cli, trio, here):
    columns = [
        set(dp.open(path).columns()[["table", "column", "id"]].itertuples(index=False, name=None)) for path in trio
    ]
    assert columns[0] == columns[1] == columns[2]
    done = cli("compare", *trio, "--out", "all.json", "--figure", "profiles.png")
    assert done.code == 0, done.err
    tables = [line for line in done.out.splitlines() if line[:1] in "│┃"]
    assert not any("…" in line.replace(" … ", "") for line in tables)  # nothing is cut
    grave = done.out.index("before you believe it: too few models per architecture")
    assert done.out.index("3 runs on 4 common prompts") < grave < done.out.index("clean: means over prompts")
    said = " ".join(done.out.split())
    assert "sign flips, at least 0.125 with 4 prompts" in said
    assert "p: F test under normal errors" in said
    assert "below: 95 % expanded percentile bootstrap interval over prompts" in said
    for part in ("kappa_phase", "kappa_path", "1 − 2", "Spearman", "too few models", "written: all.json"):
        assert part in done.out, part
    content = json.loads(Path("all.json").read_text())
    assert [run["run"] for run in content["runs"]] == list(TRIO)
    assert [run["steps"] for run in content["runs"]] == [16, 18, 3]
    assert not content["refused"]
    assert {row["condition"] for row in content["conditions"]} == {"clean", "perturbed.forced", "perturbed.free"}
    assert Path("profiles.png").stat().st_size > 10_000

    pairs = pd.DataFrame(content["pairs"]).query("condition == 'perturbed.forced' and metric == 'kappa_phase_d'")
    own = []
    for path in trio:
        samples = dp.open(path).samples.astype({"condition_id": str, "prompt_id": str})
        own.append(samples[samples["condition_id"] == "perturbed.forced"].set_index("prompt_id")["kappa_phase_d"])
    for row, (a, b) in zip(pairs.to_dict("records"), ((0, 1), (0, 2), (1, 2)), strict=True):
        delta = (own[a] - own[b]).astype(float)
        assert row["difference"] == pytest.approx(delta.mean(), rel=1e-5)
        assert row["n"] == 4

    along = pd.DataFrame(content["depth_means"]).query("condition == 'clean' and metric == 'kappa_phase'")
    said = pd.DataFrame(content["means"]).query("condition == 'clean'").set_index(["run", "metric"])["mean"]
    for row in along.to_dict("records"):
        column = {"area": "kappa_phase", "path": "kappa_path"}[row["measure"]]
        assert row["mean"] == pytest.approx(said[row["run"], column], rel=1e-5)

    # Along the three steps of the Transformer there is nothing to rank.
    along = pd.DataFrame(content["correlations"]).query("over == 'depth'")
    short = along[along["points"] == 3]
    assert len(short) == 3 * 4  # parts of Δ × pairs with the Transformer
    assert short["rho"].isna().all()
    assert set(short["reason"]) == {"steps<4"}
    assert along[along["points"] == 16]["rho"].notna().all()
    assert content["grave"] == content["warnings"][: len(content["grave"])]

    # Every mean of the comparison has the interval that the run itself printed.
    printed = dp.open(trio[2]).summary["conditions"]["perturbed.forced"]["nll_d"]
    compared = pd.DataFrame(content["means"]).query(
        "condition == 'perturbed.forced' and metric == 'nll_d' and run == 'tiny-llama'"
    )
    assert compared[["low", "high"]].to_numpy(float)[0] == pytest.approx([printed["low"], printed["high"]], rel=1e-6)

    # Δ of the looped model over its iterations against κ of the Transformer over its layers, on the same prompts.
    deltas = pd.DataFrame(content["correlations"]).query("delta_of == 'tiny-csm' and kappa_of == 'tiny-llama'")
    assert set(deltas["part"]) == {"whole", "angular", "radial"}
    clean = [dp.open(path).samples.query("condition_id == 'clean'").astype({"prompt_id": str}) for path in trio]
    x, y = (t.set_index("prompt_id")[c] for t, c in ((clean[1], "delta_rel_prev"), (clean[2], "kappa_phase")))
    rho = pd.concat([x, y], axis=1).corr(method="spearman").iloc[0, 1]
    assert deltas.query("over == 'prompts' and part == 'whole'")["rho"].iloc[0] == pytest.approx(rho)


def test_metrics_and_margins_that_were_named(cli, trio):
    done = cli(
        "compare", *trio[1:], "--metric", "kappa_phase", "--condition", "clean", "--margin", "kappa_phase=0.5", "--json"
    )
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert {row["metric"] for row in content["pairs"]} == {"kappa_phase", "kappa_path"}
    first = next(row for row in content["pairs"] if row["metric"] == "kappa_phase")
    assert first["equivalent"] is True
    assert first["family"] == 2
    assert np.isfinite(first["p_holm"])
    table = cli("compare", *trio[1:], "--metric", "kappa_phase", "--margin", "kappa_phase=0.5")
    assert "within: the declared margin" in table.out
    assert "yes" in table.out
    assert "family of 2 tests" in cli("compare", *trio[1:], "--metric", "kappa_phase", "--condition", "clean").out


def test_asking_wrongly(cli, finished, trio, here):
    for words, part in (
        ([finished], "two runs or more"),
        ([finished, finished], "are one run"),
        ([finished, here / "nowhere"], "There is no run folder"),
        ([finished, trio[0]], "no prompt in common"),
        ([*trio[:2], "--metric", "kapa_phase"], "Did you mean 'kappa_phase'"),
        ([*trio[:2], "--condition", "sweep"], "no run has a condition 'sweep'"),
        ([*trio[:2], "--out", "x.xlsx"], ".json, .csv, .md"),
        ([*trio[:2], "--figure", "no/x.png"], "there is no folder no"),
        ([*trio[:2], "--margin", "kappa_phase"], "METRIC=VALUE"),
        ([*trio[:2], "--kl", "0"], "kl is above 0"),
    ):
        done = cli("compare", *words)
        assert done.code in (1, 2), words
        assert part in done.err, done.err
        assert "Traceback" not in done.err
        assert not done.out


def test_an_unfinished_run_is_refused(cli, finished, trio, tmp_path):
    copy = tmp_path / "half"
    shutil.copytree(trio[0], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted", "seal": None}))
    done = cli("compare", copy, trio[1])
    assert done.code == 1
    assert "is interrupted" in done.err
    assert "Continue it with the same command" in done.err


def test_benchmark_runs_small():
    script = Path(dp.__file__).parents[1] / "benchmarks" / "compare.py"
    if not script.is_file():
        pytest.skip("the benchmarks lie beside the package in its repository only")
    done = subprocess.run(
        [sys.executable, str(script), "--rows", "60000", "--runs", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert re.search(r"compare \d+\.\d+ s wall", done.stdout)
    assert "synthetic-0, synthetic-1" in done.stdout
