"""``dynprobe delay``: a column of a run by prompt, and every way to ask wrongly."""

import json

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.cli import main
from dynprobe.errors import DynprobeError
from dynprobe.runs import run_series


@pytest.fixture(scope="module")
def long_run(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("long")
    words = ["run", "--model", model, "--prompt", "Hello there", "--prompt", "And so on", "--max-new-tokens", 60]
    assert main([str(w) for w in [*words, "--perturb", "alpha=0.2", "--out", out, "--quiet"]]) == 0
    (run,) = out.iterdir()
    return run


def test_series_are_the_rows_of_a_prompt_in_order(long_run):
    run = dp.open(long_run)
    series = run_series(run, "entropy", span="all")
    samples = run.samples.set_index("sample_id")
    clean = samples[samples["condition_id"] == "clean"]
    assert list(series) == list(run.prompts["prompt_id"].astype(str))
    for sample, facts in clean.iterrows():
        own = run.tokens[run.tokens["sample_id"] == sample].sort_values("pos")
        np.testing.assert_array_equal(series[facts["prompt_id"]], own["entropy"].to_numpy(float))
    new = run_series(long_run, "entropy")
    prompt = run_series(long_run, "entropy", span="prompt")
    for name, whole in series.items():
        np.testing.assert_array_equal(np.r_[prompt[name], new[name]], whole)
    free = run_series(run, "entropy", condition="perturbed.free")
    assert any(not np.array_equal(free[name], new[name], equal_nan=True) for name in free)


def test_further_labels_make_series_of_their_own(long_run):
    run = dp.open(long_run)
    by_depth = run_series(run, "norm", table="depths")
    depths = sorted(run.depths["depth"].unique())
    assert len(by_depth) == 2 * len(depths)
    name = f"{run.prompts['prompt_id'].iloc[0]}/depth={depths[1]}"
    picked = run_series(run, "norm", table="depths", at={"depth": depths[1]})
    np.testing.assert_array_equal(next(iter(picked.values())), by_depth[name])
    along = run_series(run, "norm", table="depths", along="depth", at={"pos": 5})
    assert all(len(x) == len(depths) for x in along.values())


def test_a_missing_token_is_a_hole(long_run, monkeypatch):
    run = dp.open(long_run)
    tokens = run.table("tokens", ["sample_id", "pos", "entropy"])
    monkeypatch.setattr(run, "table", lambda name, columns=None, real=run.table: (
        tokens[tokens["pos"] != 20] if name == "tokens" else real(name, columns)
    ))  # fmt: skip
    for whole, holed in zip(run_series(long_run, "entropy").values(), run_series(run, "entropy").values(), strict=True):
        (hole,) = np.flatnonzero(np.isnan(holed) & ~np.isnan(whole))
        assert len(whole) == len(holed)
        np.testing.assert_array_equal(np.delete(whole, hole), np.delete(holed, hole))


def test_the_command_prints_writes_and_draws(cli, long_run, here):
    words = ["delay", long_run, "--column", "entropy", "--dims", "1:3", "--lag", 1, "--n-surrogates", 19]
    done = cli(*words, "--out", "all.csv", "--figure", "delay.png")
    assert done.code == 0, done.err
    for part in ("entropy: 2 series", "lag 1 (given)", "Theiler window", "lag-1 autocorrelation", "AR(1)", "IAAFT",
                 "false neighbours, m = 2", "written: all.csv"):  # fmt: skip
        assert part in done.out, part
    assert max(len(line) for line in done.out.splitlines() if line[:1] in "│┃┏┌└┡") <= 100
    table = pd.read_csv("all.csv")
    assert set(table["surrogate"]) == {"ft", "iaaft", "ar1"}
    assert {"n", "lag", "theiler", "r1", "low", "high", "p"} <= set(table)
    assert (here / "delay.png").stat().st_size > 10_000
    single = cli(*words, "--limit", 1)
    assert single.code == 0
    assert "p 0." in single.out
    content = json.loads(cli(*words, "--json").out)
    expected = dp.delay_diagnostics(run_series(long_run, "entropy"), (1, 2, 3), 1, n_surrogates=19)
    assert len(content["table"]) == len(expected.table) == len(table)
    assert content["table"][0]["value"] == pytest.approx(expected.table["value"][0])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--column", "entropi"], "Did you mean 'entropy'"), (["--column", "entropy", "--table", "token"], "'tokens'"),
        (["--column", "phase"], "holds no numbers"), (["--column", "entropy", "--at", "depth"], "LABEL=VALUE"),
        (["--column", "entropy", "--at", "depth=3"], "no further label"),
        (["--column", "entropy", "--lag", "x"], "auto"),
        (["--column", "entropy", "--condition", "claen"], "Did you mean 'clean'"),
        (["--column", "entropy", "--dims", "1-3"], "1:6"), (["--column", "entropy", "--span", "old"], "prompt"),
        (["--column", "entropy", "--along", "depth"], "in order of pos"),
        (["--column", "entropy", "--out", "x.txt"], ".csv"),
        (["--column", "entropy", "--figure", "no/x.png"], "no folder"),
        (["--column", "entropy", "--limit", "0"], "at least 1"),
        (["--column", "entropy", "--series", "zz"], "--series"),
        (["--column", "norm", "--table", "depths", "--at", "depth=99"],
                                                                  "no rows"),
        (["--column", "entropy", "--n-surrogates", "5"], "at least 19"),
        (["--column", "entropy", "--surrogates", ""], "ft"),
    ],
)  # fmt: skip
def test_wrong_words(cli, long_run, words, text):
    done = cli("delay", long_run, *words)
    assert done.code in (1, 2)
    assert text in done.err
    assert "Traceback" not in done.err


def test_python_refusals_are_ours(long_run):
    with pytest.raises(DynprobeError, match="no order"):
        run_series(long_run, "nll", table="samples")
