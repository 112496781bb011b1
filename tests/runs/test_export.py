"""Exports: every format back bit for bit, the dataset card, filters, what is refused, sending to the hub."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import OfflineError, RunFolderError, UsageError
from dynprobe.runs import EXPORT_FORMATS, Format, RunWriter, examine, import_export, open_run
from dynprobe.runs._export_arrays import from_arrays, to_arrays
from dynprobe.runs._export_card import _reading
from dynprobe.runs._export_formats import FORMATS

DATA = Path(__file__).parent / "data"


def awkward(out: Path, dtype: str = "bfloat16", shape: tuple[int, ...] = (3, 4)) -> Path:
    """A run with everything that a format could lose.

    Missing values of every kind, empty and multi-line texts, wide numbers, parts that differ, a category without rows,
    a table without rows, states in half precision.
    """
    facts = {"nll": {"id": "output.nll/1", "unit": "nat", "digest": "0165", "span": "prompt"}}
    writer = RunWriter.begin(
        out, model_name="org/awkward", config={"protocol": "run"}, ident="0123abcd", columns=facts,
        manifest_fields={"batch_plan": [[0], [1]]},
    )  # fmt: skip
    texts = ['a "quoted"\n\tline, with a comma', "", None, " leading", "naïve ☃ 漢字", "\u200b"]
    names = [f"p{i}" for i in range(6)]
    with writer:
        writer.write_table(
            "prompts",
            pd.DataFrame(
                {
                    "prompt_id": names, "text": texts, "token_ids": [[1, 2], [], None, [3], [2**31 - 1, -1], [0]],
                    "category": pd.Categorical(["b", "a", None, "b", "a", "a"], ["unused", "b", "a"]),
                }
            ),
        )  # fmt: skip
        writer.write_table(
            "conditions",
            pd.DataFrame(
                {
                    "condition_id": ["clean", "noisy"], "arm": ["clean", "perturbed"], "alpha": [np.nan, 0.1],
                    "seed": pd.array([None, 2**53 + 1], "Int64"), "params": [None, '{"a": 1}'],
                }
            ),
        )  # fmt: skip
        writer.write_table("fits", pd.DataFrame({"fit_id": pd.Series([], dtype=str), "alpha50": []}))
        for number in (0, 1):
            condition = ("clean", "noisy")[number]
            ids = [f"{name}|{condition}|0" for name in names]
            keys = pd.DataFrame([(s, p, "resid", d) for s in ids for p in range(2) for d in range(2)],
                                columns=["sample_id", "pos", "track", "depth"])  # fmt: skip
            states = torch.randn(len(keys), *shape, generator=torch.Generator().manual_seed(number))
            writer.write_states(number, keys, states.to(getattr(torch, dtype)), dtype)
            nll = np.array([1 / 3, np.nan, -0.0, 1e-30, np.inf, 3e38])
            samples = {
                "sample_id": ids, "prompt_id": names, "condition_id": condition, "nll": nll, "text": texts,
                "flag": pd.array([True, None, False, True, True, False], "boolean"),
            }  # fmt: skip
            if number:  # a column that the other part lacks, and one in another precision
                samples |= {"ppl": [1e50, 1.0, np.nan, 2.0, 3.0, 4.0], "note": ["x", None, "", "y", "z", "w"]}
            tokens = keys[keys["depth"] == 0].drop(columns=["track", "depth"]).assign(flip=True, nll=1 / 7)
            writer.write_batch(number, {"samples": pd.DataFrame(samples), "tokens": tokens})
        writer.finish({"conditions": {"clean": {"samples": 6}}})
    return writer.folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return open_run(awkward(tmp_path_factory.mktemp("awkward")))


def same(a, b, *, states=True, categorical=True):
    tables = [name for name in a.manifest.rows() if name != "states"]
    for name in tables:
        pd.testing.assert_frame_equal(a.table(name), b.table(name), check_exact=True, check_categorical=categorical)
    if not states:
        return
    (k1, x1), (k2, x2) = a.states(raw=True), b.states(raw=True)
    assert x1.dtype == x2.dtype
    assert x1.tobytes() == x2.tobytes()
    pd.testing.assert_frame_equal(k1.astype(str), k2.astype(str))
    pd.testing.assert_frame_equal(a.columns(), b.columns())


@pytest.mark.parametrize("to", EXPORT_FORMATS)
def test_every_format_comes_back_bit_for_bit(run, tmp_path, to):
    if to == "zarr":
        pytest.importorskip("zarr")
    done = run.export(to, tmp_path / "out")
    assert done.rows["samples"] == 12
    assert done.rows["fits"] == 0
    assert ("states" in done.rows) == (to != "csv")
    assert not list(tmp_path.glob(".tmp-*"))
    with pytest.raises(RunFolderError, match="dynprobe import"):
        open_run(tmp_path / "out")
    back = dp.ingest(tmp_path / "out", out=tmp_path / "runs")
    same(run, back, states=to != "csv", categorical=to != "csv")
    assert back.verify() == len(back.manifest.parts)
    assert examine(back.path).healthy
    assert back.summary == run.summary
    whole = to != "csv"  # without its states it is another run
    assert (back.manifest.id8 == run.manifest.id8) is whole
    assert back.status == "complete"
    assert (back.path.name == run.path.name) is whole
    assert dp.ingest(tmp_path / "out", out=tmp_path / "runs").path == back.path  # again: the run that is there
    facts = back.columns().query("table == 'samples' and column == 'nll'").iloc[0]
    assert (facts["id"], facts["unit"], facts["digest"], facts["span"]) == ("output.nll/1", "nat", "0165", "prompt")


@pytest.mark.parametrize(("dtype", "shape"), [("float16", (5,)), ("float32", (2, 3)), ("float64", (1,))])
def test_states_keep_dtype_and_shape(tmp_path, dtype, shape):
    run = open_run(awkward(tmp_path / "runs", dtype, shape))
    for to in ("hf", "arrow", "npz", "safetensors"):
        run.export(to, tmp_path / to)
        back = import_export(tmp_path / to, tmp_path / f"back-{to}")
        same(run, back)


def test_a_large_table_is_several_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dynprobe.runs.formats._parquet._SHARD_ROWS", 5)
    run.export("hf", tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out" / "samples").iterdir()) == ["00000.parquet", "00001.parquet"]
    same(run, import_export(tmp_path / "out", tmp_path / "runs"))


def test_arrays_are_plain_for_other_readers(run, tmp_path):
    from safetensors.torch import load_file

    keys, bits = run.states(raw=True)
    run.export("safetensors", tmp_path / "st", tables=["states"])
    parts = [load_file(f) for f in sorted((tmp_path / "st").glob("states-*.safetensors"))]
    states = torch.cat([part["state"] for part in parts])
    assert states.dtype == torch.bfloat16
    assert states.view(torch.uint16).numpy().tobytes() == bits.tobytes()
    assert torch.cat([part["depth"] for part in parts]).tolist() == keys["depth"].tolist()
    run.export("npz", tmp_path / "npz")
    arrays = np.load(tmp_path / "npz" / "samples.npz")
    assert arrays["nll"].dtype == np.float32
    assert np.array_equal(arrays["nll"], run.samples["nll"].to_numpy(), equal_nan=True)
    raw, at = arrays["text.utf8"].tobytes(), arrays["text.offsets"]
    texts = [raw[a:b].decode() if ok else None for a, b, ok in zip(at[:-1], at[1:], arrays["text.valid"], strict=True)]
    assert texts == [None if t is None or t != t else t for t in run.samples["text"]]
    facts = {c["name"]: c for c in json.loads(str(arrays["dynprobe.columns"]))}
    assert facts["nll"]["id"] == "output.nll/1"


def test_arrays_of_slices_and_nothing():
    table = pa.table({"t": ["ab", None, "", "c"], "n": [1, None, 3, 4], "l": [[1], None, [], [2, 3]]})
    label = pa.table({"x": pa.array(["a", None, "b", "a"]).dictionary_encode()})
    for part in (table, table.slice(1, 2), table.slice(0, 0), label, label.slice(2), label.slice(4)):
        back = from_arrays(to_arrays(part), part.schema)
        assert back.to_pydict() == part.to_pydict()
        assert back.schema == part.schema
    with pytest.raises(RunFolderError, match=r"'t\.utf8' is missing"):
        from_arrays({}, table.schema)
    with pytest.raises(RunFolderError, match="date32"):
        to_arrays(pa.table({"d": pa.array([1], pa.date32())}))


def test_datasets_opens_every_table(run, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    done = run.export("hf", tmp_path / "out", licence="cc-by-4.0")
    loaded = {}
    for name, rows in done.rows.items():
        if not rows:
            continue
        loaded[name] = datasets.load_dataset(str(done.path), name, cache_dir=str(tmp_path / "cache"))["train"]
        assert len(loaded[name]) == rows
        assert set(loaded[name].column_names) == set(pq.read_schema(done.path / name / "00000.parquet").names)
    assert set(loaded) == {"prompts", "conditions", "samples", "tokens", "states"}
    nll = np.array([np.nan if v is None else v for v in loaded["samples"]["nll"]], np.float32)
    assert np.array_equal(nll, run.samples["nll"].to_numpy(), equal_nan=True)
    assert loaded["prompts"]["text"] == [None if t is None or t != t else t for t in run.prompts["text"]]
    assert np.array_equal(np.array(loaded["states"]["state"], np.float32), run.states()[1])
    assert loaded["states"].features["state"].length == 3
    default = datasets.load_dataset(str(done.path), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(default) == 12  # samples
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(done.path / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert {c["config_name"] for c in card.data.configs} == set(loaded)
    assert "output.nll/1" in card.text
    assert "nat" in card.text


def test_a_part_of_a_run_has_an_id_of_its_own(run, tmp_path):
    run.export("hf", tmp_path / "out", tables=["samples", "tokens", "conditions"], conditions=["perturbed"])
    back = import_export(tmp_path / "out", tmp_path / "runs")
    assert set(back.manifest.rows()) == {"samples", "tokens", "conditions"}
    assert list(back.samples["condition_id"].unique()) == ["noisy"]
    assert list(back.samples["condition_id"].cat.categories) == ["noisy"]
    kept = run.tokens[run.tokens["sample_id"].astype(str).str.contains("noisy")]
    assert len(back.tokens) == len(kept) > 0
    assert back.manifest.id8 != run.manifest.id8
    assert (back.manifest.model_extra or {})["exported_from"]["id8"] == run.manifest.id8
    with pytest.raises(UsageError, match=r"no condition 'noizy'.*'noisy'"):
        run.export("hf", tmp_path / "no", conditions=["noizy"])
    with pytest.raises(UsageError, match="no table 'depths'"):
        run.export("hf", tmp_path / "no", tables=["depths"])
    assert not (tmp_path / "no").exists()


def test_what_is_there_stays(run, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    for force in (False, True):
        with pytest.raises(UsageError, match="is no export"):
            run.export("hf", mine, force=force)
    assert (mine / "thesis.txt").read_text() == "x"
    run.export("csv", tmp_path / "out")
    before = (tmp_path / "out" / "dynprobe.json").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        run.export("hf", tmp_path / "out")
    monkeypatch.setattr("dynprobe.runs._export.export_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.export("hf", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "dynprobe.json").read_bytes() == before  # a failure loses nothing
    monkeypatch.undo()
    run.export("hf", tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "samples.csv").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]
    for inside in (run.path, run.path / "export", run.path.parent):
        with pytest.raises(UsageError):
            run.export("hf", inside, force=True)
    for to, table in (("xls", None), ("csv", ["states"])):
        with pytest.raises(UsageError, match=to):
            run.export(to, tmp_path / "no", tables=table)


def edit_table(path, **changes):
    side = json.loads(path.read_text())
    side["tables"][0] |= changes
    path.write_text(json.dumps(side))


def test_damage_is_named(run, tmp_path):
    run.export("npz", tmp_path / "out")
    for name, change, said in (
        ("samples.npz", lambda p: p.write_bytes(p.read_bytes()[:-1]), "samples.npz is not what was exported"),
        ("tokens.npz", lambda p: p.unlink(), "tokens.npz is listed"),
        ("dynprobe.json", lambda p: p.write_text(p.read_text()[:-9]), "dynprobe.json is damaged"),
        ("dynprobe.json", lambda p: edit(p, format="dynprobe-export/9"), "layout 9"),
        ("dynprobe.json", lambda p: edit(p, files={"../x": {"bytes": 0, "sha256": "0" * 64}}), "leads out"),
        ("dynprobe.json", lambda p: edit(p, files={"x": {"bytes": 0, "sha256": ""}}), "sha256"),
        ("dynprobe.json", lambda p: edit_table(p, name="../../stolen"), "name"),
        ("dynprobe.json", lambda p: edit_table(p, table="../../stolen"), "table"),
        ("dynprobe.json", lambda p: edit_table(p, files=["../../secret.npz"]), "not among the files"),
        ("dynprobe.json", lambda p: edit_table(p, columns=[{"name": "a", "type": 3}]), "columns"),
        ("dynprobe.json", lambda p: edit_table(p, columns=[{"name": "a", "type": "x[9"}]), "cannot be read"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "out", copy)
        change(copy / name)
        with pytest.raises(RunFolderError, match=said):
            import_export(copy, tmp_path / "runs")
        shutil.rmtree(copy)
    assert not list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True
    broken = shutil.copytree(run.path, tmp_path / "broken")
    part = next((broken / "samples").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(RunFolderError, match=part.name):
        open_run(broken).export("hf", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_code_of_a_format_may_hold_braces():
    code = 'print({"rows": 1}, "{file}", "{table}", f"{x}")'
    with FORMATS.lent("acme", Format("Acme", lambda *_: [], lambda *_: iter(()), code=code)):
        said = _reading({"to": "acme", "tables": [{"name": "samples", "rows": 1, "files": ["samples.x"]}]})
    assert 'print({"rows": 1}, "FOLDER/samples.x", "samples", f"{x}")' in said


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_format_of_another_package_is_named_and_no_command_is_made_of_it(run, tmp_path):
    run.export("npz", tmp_path / "out")
    side = tmp_path / "out" / "dynprobe.json"
    fact = {"group": "dynprobe.exporters", "name": "tsv", "package": "acme-probes", "version": "1.0"}
    edit(side, to="tsv", plugin=fact)
    with pytest.raises(RunFolderError, match=r"the package acme-probes 1\.0, which is not installed") as found:
        import_export(tmp_path / "out", tmp_path / "runs")
    assert "pip install" not in str(found.value)
    for wrong in ({"package": "evil-pkg; curl x | sh"}, {"package": "evil\n"}, {"version": "1 --index-url x"}):
        edit(side, plugin=fact | wrong)
        with pytest.raises(RunFolderError, match=r"dynprobe\.json is damaged: plugin"):
            import_export(tmp_path / "out", tmp_path / "runs")


class Hub:
    """What is called of ``HfApi``."""

    def __init__(self, private=None, fails=None):
        self.private, self.fails, self.calls = private, fails, []

    def repo_exists(self, repo, repo_type):
        if self.fails:
            raise self.fails
        return self.private is not None

    def repo_info(self, repo, repo_type):
        return type("Info", (), {"private": self.private})

    def create_repo(self, repo, repo_type, private):
        self.calls.append(("create", repo, private))

    def upload_folder(self, repo_id, repo_type, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))


def test_sending_to_the_hub(run, tmp_path):
    new = Hub()
    done = run.export("hf", tmp_path / "a", tables=["samples"], push="me/mine", api=new)
    assert new.calls == [("create", "me/mine", True), ("upload", "me/mine", ["README.md", "dynprobe.json", "samples"])]
    assert done.address == "https://huggingface.co/datasets/me/mine"
    public = Hub(private=False)
    with pytest.raises(RunFolderError, match="is public; nothing was sent"):
        run.export("hf", tmp_path / "b", tables=["samples"], push="me/mine", api=public)
    assert public.calls == []
    assert (tmp_path / "b" / "samples").is_dir()
    run.export("hf", tmp_path / "c", tables=["samples"], push="me/mine", private=False, api=public)
    assert [call[0] for call in public.calls] == ["upload"]
    for name in ("no spaces here", "a/b/c", "../x", ""):
        with pytest.raises(UsageError, match="NAME/REPOSITORY"):
            run.export("hf", tmp_path / "d", push=name, api=new)
    with pytest.raises(UsageError, match="--to hf"):
        run.export("csv", tmp_path / "d", push="me/mine", api=new)
    assert not (tmp_path / "d").exists()


def test_a_hub_that_does_not_answer(run, tmp_path, monkeypatch):
    secret = "hf_AbCdEfGhIjKlMnOpQrSt"
    monkeypatch.setenv("HF_TOKEN", secret)
    with pytest.raises(OfflineError, match="cannot be reached") as caught:
        run.export("hf", tmp_path / "a", tables=["samples"], push="me/mine",
                   api=Hub(fails=ConnectionError(f"no route with {secret}")))  # fmt: skip
    assert secret not in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)  # what was written is named, and is there
    assert (tmp_path / "a" / "README.md").is_file()
    from huggingface_hub.errors import OfflineModeIsEnabled

    with pytest.raises(OfflineError):
        run.export("hf", tmp_path / "b", tables=["samples"], push="me/mine", api=Hub(fails=OfflineModeIsEnabled("off")))


@pytest.mark.parametrize("folder", sorted(p.name for p in (DATA / "exports").iterdir()))
def test_exports_of_older_versions_still_open(folder, tmp_path):
    """Written by the layout 1 and the schema 1.0 and never written again: later versions must read them."""
    back = import_export(DATA / "exports" / folder, tmp_path)
    assert back.samples["nll"].tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert back.columns().query("column == 'nll'")["id"].unique().tolist() == ["output.nll/1"]
    assert list(back.samples["text"]) == ["x y", "", "x y", ""]
    assert back.states(depth=1)[1].tolist() == [[1.0, -2.0]] * 4


def test_an_older_schema_is_read_and_a_newer_one_refused(tmp_path):
    copy = shutil.copytree(DATA / "exports" / "layout1-hf", tmp_path / "copy")
    side = json.loads((copy / "dynprobe.json").read_text())
    side["manifest"]["schema_version"] = "0.9"
    side["manifest"].pop("repairs", None)
    (copy / "dynprobe.json").write_text(json.dumps(side))
    assert len(import_export(copy, tmp_path / "old").samples) == 4
    side["manifest"]["schema_version"] = "9.0"
    (copy / "dynprobe.json").write_text(json.dumps(side))
    with pytest.raises(RunFolderError, match=r"schema 9\.0"):
        import_export(copy, tmp_path / "new")


def test_a_run_that_is_interrupted_is_exported_with_a_remark(tmp_path, make):
    writer = make["begin"](tmp_path / "runs")
    make["whole_tables"](writer)
    writer.write_batch(0, make["batch"](0))
    writer.interrupt("stopped")
    done = open_run(writer.folder).export("hf", tmp_path / "out")
    assert "interrupted" in done.remarks[0]
    assert import_export(tmp_path / "out", tmp_path / "back").status == "interrupted"


def test_xarray_axes(run_folder):
    pytest.importorskip("xarray")
    run = open_run(run_folder)
    grid = run.to_xarray()
    assert grid.dims == ("sample_id", "pos", "depth", "dim")
    assert grid.shape == (4, 3, 4, 4)
    keys, states = run.states()
    for row in (0, 7, 40):
        key = keys.iloc[row]
        assert np.array_equal(grid.sel(sample_id=key["sample_id"], pos=key["pos"], depth=key["depth"]), states[row])
    norm = run.to_xarray("norm", depth=[1, 2])
    assert norm.dims == ("sample_id", "pos", "depth")
    assert norm["depth"].to_numpy().tolist() == [1, 2]
    frame = run.depths.set_index(["sample_id", "pos", "depth"])["norm"]
    assert float(norm.sel(sample_id="p1/noisy", pos=2, depth=1)) == frame[("p1/noisy", 2, 1)]
    both = run.to_xarray(["norm", "layer"])
    assert set(both.data_vars) == {"norm", "layer"} or set(both.data_vars) == {"norm"}
    with pytest.raises(RunFolderError, match="no row"):
        run.to_xarray("norm", depth=99)


def test_a_run_shows_itself(run_folder, make):
    run = open_run(run_folder)
    text, page = repr(run), run._repr_html_()
    for said in ("org/tiny", "(complete)", "samples 4", "clean, perturbed"):
        assert said in text
    for said in ("org/tiny", "(complete)", "clean, perturbed", "<code>depths</code>", "48"):
        assert said in page
    assert page.count("<table") == page.count("</table>") == 2
    assert "http" not in page  # self-contained
    tested = open_run(run_folder)
    tested.manifest = run.manifest.model_copy(
        update={"self_tests": {"null": {"passed": True}, "fired": {"passed": False}, "alone": {}}, "model_name": "<b>x"}
    )
    assert "null ok · fired FAILED · alone not run" in repr(tested)
    assert "&lt;b&gt;x" in tested._repr_html_()
    (run_folder / "conditions.parquet").write_bytes(b"no parquet")
    assert "(complete)" in repr(open_run(run_folder))  # looking must not fail


def odd_bits(out):
    """A run whose bfloat16 states are NaN with signs and payloads, quiet and signalling, −0, ∞ and subnormals."""
    writer = RunWriter.begin(out, model_name="t", config={}, ident="0123abcd")
    keys = pd.DataFrame({"sample_id": "a|clean|0", "pos": range(3), "track": "resid", "depth": 0})
    bits = [[0x7FA1, 0xFFC3, 0x8000, 0x0001], [0x7F80, 0xFF80, 0x7FC0, 0x3F80], [0x7F81, 0xFF81, 0xFFFF, 0x0000]]
    with writer:
        writer.write_states(0, keys, np.array(bits, np.uint16), "bfloat16")
        writer.write_batch(0, {})
        writer.finish({})
    return open_run(writer.folder), np.array(bits, np.uint16)


@pytest.mark.parametrize("to", ["hf", "arrow", "npz", "safetensors", "zarr"])
def test_every_bit_of_bfloat16_comes_back(tmp_path, to):
    if to == "zarr":
        pytest.importorskip("zarr")
    run, bits = odd_bits(tmp_path / "runs")
    run.export(to, tmp_path / "out")
    _, back = import_export(tmp_path / "out", tmp_path / "back").states(raw=True)
    assert back.dtype == np.uint16
    assert back.tolist() == bits.tolist()
    if to == "safetensors":
        from safetensors.torch import load_file

        (path,) = (tmp_path / "out").glob("states*.safetensors")
        state = load_file(path)["state"]
        assert state.dtype == torch.bfloat16
        assert state.view(torch.uint16).tolist() == bits.tolist()


def test_a_flipped_bit_of_a_state_does_not_leave(run, tmp_path):
    broken = shutil.copytree(run.path, tmp_path / "broken")
    part = sorted((broken / "states").glob("*.parquet"))[0]
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    with pytest.raises(RunFolderError, match=rf"{part.name} is damaged.*dynprobe doctor"):
        open_run(broken).export("npz", tmp_path / "no")
    assert not (tmp_path / "no").exists()


TEXTS = (
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2",
    "@SUM(A1)",
    "\t=1",
    "\uff1d1+1",
    "\uff0b1",
    "\uff0d1",
    "\uff20A1",
    "'quoted",
    "''",
    "'",
    "plain",
    "",
    "a=b",
    "\n=1",
    "\r=1",
    "a\rb",
)


def test_a_text_is_no_formula_in_csv_and_comes_back_as_it_was(tmp_path, make):
    writer = make["begin"](tmp_path / "runs", manifest_fields={"batch_plan": [["p0"]]})
    names = [f"p{i}" for i in range(len(TEXTS))]
    writer.write_table("prompts", pd.DataFrame({"prompt_id": names, "text": TEXTS, "category": list(TEXTS)}))
    writer.write_table("conditions", pd.DataFrame({"condition_id": ["clean"], "arm": ["clean"]}))
    writer.write_batch(0, {"samples": pd.DataFrame({"sample_id": ["s"], "prompt_id": "p0", "condition_id": "clean",
                                                    "replicate": 0, "nll": -1.5})})  # fmt: skip
    writer.finish({})
    run = open_run(writer.folder)
    run.export("csv", tmp_path / "out")
    for row in csv.reader((tmp_path / "out" / "prompts.csv").open(newline="")):
        for cell in row:
            assert not cell.startswith(tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")), cell
    assert "-1.5" in (tmp_path / "out" / "samples.csv").read_text()  # a number is none
    back = import_export(tmp_path / "out", tmp_path / "again")
    assert back.table("prompts")["text"].tolist() == list(TEXTS)
    assert back.table("prompts")["category"].astype(str).tolist() == list(TEXTS)
