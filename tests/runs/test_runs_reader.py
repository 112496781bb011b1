from __future__ import annotations

import json
import re
import sys

import numpy as np
import pandas as pd
import pytest

from dynprobe.errors import RunFolderError, UsageError
from dynprobe.runs import list_runs, open_run


def test_tables_of_a_run(run_folder):
    run = open_run(str(run_folder / "manifest.json"))
    assert [len(t) for t in (run.samples, run.tokens, run.depths, run.profiles)] == [4, 12, 48, 0]
    assert [len(t) for t in (run.prompts, run.conditions)] == [2, 2]
    assert run.summary == {"samples": 4}
    assert run.status == "complete"
    assert list(run.profiles.columns) == ["sample_id", "track", "depth", "coverage", "reason"]
    assert np.isnan(run.conditions.set_index("condition_id")["alpha"]["clean"])
    assert run.prompts["token_ids"].map(list).tolist() == [[1, 2], [3]]


def test_columns_can_be_named(run_folder):
    run = open_run(run_folder)
    assert list(run.table("tokens", ["nll", "pos"]).columns) == ["nll", "pos"]
    with pytest.raises(RunFolderError, match=r"no column 'nl'.*Did you mean 'nll'"):
        run.table("tokens", ["nl"])
    with pytest.raises(RunFolderError, match=r"no table 'token'.*Did you mean 'tokens'"):
        run.table("token")
    with pytest.raises(RunFolderError, match=r"run\.states"):
        run.table("states")


def test_what_a_user_does_to_a_frame_stays_with_the_user(run_folder):
    run = open_run(run_folder)
    mine = run.samples
    mine["nll"] = 0.0
    assert (run.samples["nll"] != 0).all()


def test_unlisted_parts_do_not_exist(run_folder):
    (run_folder / "samples/part-00009.parquet").write_bytes((run_folder / "samples/part-00000.parquet").read_bytes())
    assert len(open_run(run_folder).samples) == 4


@pytest.mark.parametrize("damage", ["missing", "truncated", "scrambled"])
def test_damaged_part_is_named(run_folder, damage):
    path = run_folder / "tokens/part-00001.parquet"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-20] if damage == "truncated" else bytes(len(data)))
    run = open_run(run_folder)
    assert len(run.samples) == 4
    for read in (lambda: run.tokens, run.verify, run.columns):
        with pytest.raises(RunFolderError, match=r"tokens/part-00001\.parquet"):
            read()
    if damage != "scrambled":
        with pytest.raises(RunFolderError, match=r"tokens/part-00001\.parquet"):
            run.sql("select 1 as x")


def test_verify_finds_one_changed_bit(run_folder):
    run = open_run(run_folder)
    assert run.verify() == len(run.manifest.parts)
    path = run_folder / run.manifest.parts[3].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunFolderError, match=f"1 of 10 files.*{path.name} .changed."):
        run.verify()


def test_sql_joins_tables(run_folder):
    run = open_run(run_folder)
    result = run.sql("select arm, avg(nll) as nll from samples join conditions using (condition_id) group by arm")
    expected = run.samples.merge(run.conditions, on="condition_id").groupby("arm", observed=True)["nll"].mean()
    got = result.set_index("arm")["nll"]
    for arm in ("clean", "perturbed"):
        assert got[arm] == pytest.approx(expected[arm], abs=1e-6)
    assert run.sql("select count(*) as n from depths where depth = 2 and track = 'resid'")["n"].item() == 12
    with pytest.raises(UsageError, match="Tables of this run: conditions, depths"):
        run.sql("select * from tokns")


@pytest.mark.parametrize("name", ["a [x] *?", "it's", "ünï"])
def test_sql_in_folders_with_odd_names(tmp_path, make, name):
    folder = make["write_all"](tmp_path / name)
    make["write_all"](tmp_path / "a x zz")
    assert open_run(folder).sql("select count(*) as n from samples")["n"].item() == 4


def test_sql_says_where_a_column_is(run_folder):
    run = open_run(run_folder)
    for query, said in (
        ("select arm from samples", "'arm' is a column of conditions (samples has its condition_id, and every other"),
        ("select s.ARM from samples s", "'arm' is a column of conditions (samples"),
        ("select arm, count(*) from conditions", "must appear in the GROUP BY"),
        ("select nowhere from samples", "Tables of this run: "),
    ):
        with pytest.raises(UsageError, match=re.escape(said)) as raised:
            run.sql(query)
        assert ("is a column of" in str(raised.value)) == (said.startswith("'arm'"))


def test_sql_without_duckdb(run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(RunFolderError, match=r"pip install 'dynprobe.sql.'"):
        open_run(run_folder).sql("select 1")


def test_pivot_against_pandas(run_folder):
    run = open_run(run_folder)
    got = run.pivot("norm")
    joined = run.depths.merge(run.samples, on="sample_id")
    expected = joined.pivot_table(values="norm", index="depth", columns="condition_id", observed=True)
    np.testing.assert_allclose(got.to_numpy(), expected.to_numpy())
    assert got.columns.tolist() == ["clean", "noisy"]
    by_arm = run.pivot("norm", index="depth", columns=["arm", "category"])
    assert by_arm.shape == (4, 4)
    np.testing.assert_allclose(by_arm["clean"].mean(axis=1), got["clean"], rtol=1e-6)
    assert run.pivot("nll", index="category", columns="arm").shape == (2, 2)


def test_pivot_leaves_out_rows_without_a_sample(tmp_path, make):
    writer = make["begin"](tmp_path)
    batch = make["batch"](0)
    batch["samples"] = batch["samples"].iloc[:1]
    writer.write_table("conditions", {"condition_id": ["other", "clean"], "arm": ["wrong", "clean"]})
    writer.write_batch(0, batch)
    got = open_run(writer.folder).pivot("norm", columns="arm")
    depths = batch["depths"]
    expected = depths[depths["sample_id"] == "p0/clean"].groupby("depth")["norm"].mean()
    assert got.columns.tolist() == ["clean"]
    np.testing.assert_allclose(got["clean"], expected, rtol=1e-6)


def test_pivot_refuses_doubled_samples(tmp_path, make):
    writer = make["begin"](tmp_path)
    writer.write_batch(0, make["batch"](0))
    writer.write_batch(1, make["batch"](0))
    with pytest.raises(RunFolderError, match="several rows with one sample_id"):
        open_run(writer.folder).pivot("norm")


def test_pivot_refuses_what_it_would_get_wrong(tmp_path, make):
    writer = make["begin"](tmp_path)
    batch = make["batch"](0)
    batch["depths"]["track"] = ["z_L", "z_H"] * 12
    batch["profiles"] = batch["depths"].drop_duplicates(["sample_id", "track", "depth"])
    batch["profiles"] = batch["profiles"][["sample_id", "track", "depth", "norm"]].assign(only=1.0)
    writer.write_batch(0, batch)
    run = open_run(writer.folder)
    with pytest.raises(RunFolderError, match=r"several tables .depths, profiles.*table="):
        run.pivot("norm")
    with pytest.raises(RunFolderError, match=r"several tracks .z_H, z_L."):
        run.pivot("norm", table="depths")
    assert run.pivot("norm", index=["track", "depth"], table="depths").index.names == ["track", "depth"]
    with pytest.raises(RunFolderError, match=r"no column 'nor'|No table .*'nor'"):
        run.pivot("nor")
    with pytest.raises(RunFolderError, match=r"cannot be split by 'depht'.*'depth'"):
        run.pivot("norm", index="depht", table="depths")
    with pytest.raises(RunFolderError, match="cannot be split by 'arm'"):
        run.pivot("nll", index="condition_id", columns="arm")


def test_open_suggests(run_folder):
    with pytest.raises(RunFolderError, match=f"holds 1 runs.*{run_folder.name}"):
        open_run(run_folder.parent)
    with pytest.raises(RunFolderError, match=f"There is no run folder.*Did you mean '.*{run_folder.name}'"):
        open_run(run_folder.parent / run_folder.name[:-1])
    with pytest.raises(RunFolderError, match="is no run folder"):
        open_run(run_folder / "samples")


def test_representations_escape(tmp_path, make):
    nasty = "<script>alert(1)</script>"
    writer = make["begin"](
        tmp_path, model_name=nasty, config={"perturb": f"{nasty}\nx"}, manifest_fields={"device": nasty}
    )
    run = open_run(writer.folder)
    page = run._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3
    text = repr(run)
    assert "(running)" in text
    assert "batches      0 of 2" in text
    writer.close()
    assert "(interrupted)" in repr(run)


def test_refresh_sees_new_batches(tmp_path, make):
    writer = make["begin"](tmp_path)
    run = open_run(writer.folder)
    assert run.samples.empty
    writer.write_batch(0, make["batch"](0))
    assert run.samples.empty
    assert len(run.refresh().samples) == 2


def test_list_runs(run_folder, make):
    root = run_folder.parent
    make["begin"](root, ident="ffffffff", config={"perturb": [{"alpha": 1, "layers": "6"}]}).close()
    (root / "junk").mkdir()
    (root / "broken").mkdir()
    (root / "broken/manifest.json").write_text("{")
    frame = list_runs(root).set_index("id8")
    shown = ["status", "protocol", "rows", "perturbation"]
    assert frame.loc["0123abcd", shown].tolist() == ["complete", "run", 4, "alpha=0.1"]
    assert frame.loc["ffffffff", shown].tolist() == ["interrupted", "run", 0, "alpha=1,layers=6"]
    assert frame["status"].tolist().count("damaged") == 1
    assert len(list_runs(run_folder)) == 1
    with pytest.raises(RunFolderError, match="There is no folder"):
        list_runs(root / "none")


GRID = {"scale": ["relnorm", "mad"], "kind": ["gaussian"], "layers": "0+2", "seeds": [0]}


@pytest.mark.parametrize(
    ("config", "plan", "protocol", "said"),
    [
        (
            GRID | {"alphas": [0.1, 0.2], "controls": ["sham", "sign"]}, [{"layer": 0}, {"layer": 2}, {"layer": 0}],
            "sweep", "2 α × 2 layers × relnorm,mad; controls sham, sign",
        ),
        (
            GRID | {"alphas": [0.1], "controls": ["sham"], "kind": ["direction"], "seeds": [0, 1]}, None, "sweep",
            "1 α × layers 0+2 × 2 seeds × relnorm,mad direction",
        ),
        (
            GRID | {"alphas": [], "criterion": ["kl", "flip"]}, [{"write": "relnorm|gaussian|L15"}], "threshold",
            "kl,flip, relnorm,mad × layer 15",
        ),
        (
            GRID | {"alphas": [0.1, 1.0], "criterion": ["kl"], "each_position": True}, None, "threshold",
            "kl, relnorm,mad × layers 0+2, each position, grid of 2 α",
        ),
        (GRID | {"alphas": [], "criterion": ["kl"], "placement": "quest"}, [{"write": "x"}], "threshold",
         "kl, relnorm,mad × layers 0+2, quest"),
    ],
)  # fmt: skip
def test_grids_say_what_they_are(tmp_path, make, config, plan, protocol, said):
    fields = {"batch_plan": plan} if plan else {}
    with make["begin"](tmp_path, config=config, manifest_fields=fields) as writer:
        rows = {"samples": ["sample_id", "condition_id"], "trials": ["write"]}[
            "trials" if "criterion" in config else "samples"
        ]
        frame = pd.DataFrame({"prompt_id": ["a", "b", "c"], "alpha": [0.1, 0.2, 0.3]}).assign(
            **{name: ["x", "y", "z"] for name in rows}
        )
        writer.write_batch(0, {"trials" if "criterion" in config else "samples": frame})
    (row,) = list_runs(tmp_path).to_dict("records")
    assert (row["protocol"], row["perturbation"], row["rows"]) == (protocol, said, 3)
    run = open_run(writer.folder)
    assert f"protocol     {protocol}" in repr(run)
    assert f"perturbation {said}" in repr(run)
    assert said in run._repr_html_()


def test_the_card_of_a_threshold_run_opens_its_fits(tmp_path, make):
    config = GRID | {"alphas": [], "criterion": ["kl"]}
    with make["begin"](tmp_path, config=config) as writer:
        writer.write_batch(0, {"trials": pd.DataFrame({"prompt_id": ["a"], "alpha": [0.1]})})
        writer.write_batch(1, {"trials": pd.DataFrame({"prompt_id": ["b"], "alpha": [0.1]})})
        writer.finish({})
    card = (writer.folder / "README.md").read_text(encoding="utf-8")
    assert 'run.table("fits"), run.table("trials")' in card
    assert "- protocol: threshold" in card
    assert "- perturbation: kl, relnorm,mad × layers 0+2" in card


def test_summary_damaged(run_folder):
    (run_folder / "summary.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"summary\.json"):
        _ = open_run(run_folder).summary


def test_many_parts_open_quickly_and_small(tmp_path, make):
    writer = make["begin"](tmp_path, manifest_fields={"batch_plan": None})
    for number in range(60):
        samples = pd.DataFrame(
            {
                "sample_id": [f"{number}/{i}" for i in range(8)],
                "prompt_id": str(number),
                "condition_id": "c",
                "nll": 0.5,
            }
        )
        writer.write_batch(number, {"samples": samples})
    run = open_run(writer.folder)
    assert len(run.samples) == 480
    assert len(json.loads((writer.folder / "manifest.json").read_text())["parts"]) == 60
