"""The suite of export formats: ours pass it, and each of its checks fails a format that is wrong."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pytest

import dynprobe as dp
from dynprobe.errors import RunFolderError, SelfTestError
from dynprobe.runs import EXPORT_FORMATS, Format, as_schema, export_run, import_export
from dynprobe.runs._export_formats import FORMATS
from dynprobe.testing import EXPORTER_CHECKS, check_exporter


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("runs"))
    return dp.run("tiny-llama", ["A sky", "Two dogs run"], perturb="alpha=0.1", max_new_tokens=3, out=folder)


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_ours_pass(name, run):
    without = () if FORMATS[name].states else ("states",)
    assert check_exporter(name, run) == tuple(check for check in EXPORTER_CHECKS if check not in without)


def write(folder: Path, name: str, schema: pa.Schema, chunks: Any) -> list[str]:
    tables = list(chunks)
    whole = pa.concat_tables(tables).unify_dictionaries() if tables else schema.empty_table()
    feather.write_feather(whole.combine_chunks(), str(folder / f"{name}.feather"), compression="uncompressed")
    return [f"{name}.feather"]


def read(folder: Path, files: Any, schema: pa.Schema) -> Any:
    for file in files:
        yield as_schema(feather.read_table(str(folder / file), memory_map=False), schema)


GOOD = Format("Feather files", write, read)


def test_a_good_one_passes(run):
    assert check_exporter(GOOD, run) == EXPORTER_CHECKS
    assert "tried" not in FORMATS


@pytest.mark.parametrize("check", EXPORTER_CHECKS)
def test_as_an_author_writes_it(check, run):
    check_exporter(GOOD, run, only=check)


def _no_zero_signs(folder: Path, files: Any, schema: pa.Schema) -> Any:
    import pyarrow.compute as pc

    for table in read(folder, files, schema):
        at = schema.get_field_index("value")
        yield table if at < 0 else table.set_column(at, schema.field(at), pc.add(table["value"], 0.0))


def _first_only(folder: Path, name: str, schema: pa.Schema, chunks: Any) -> list[str]:
    return write(folder, name, schema, itertools.islice(chunks, 1))


def _nothing_for_nothing(folder: Path, name: str, schema: pa.Schema, chunks: Any) -> list[str]:
    tables = list(chunks)
    assert tables
    return write(folder, name, schema, tables)


def _rounded(folder: Path, files: Any, schema: pa.Schema) -> Any:
    for table in read(folder, files, schema):
        if "state" in table.column_names:
            state = table["state"].combine_chunks()
            half = state.flatten().cast(pa.float16()).cast(pa.float32())
            table = table.set_column(1, schema.field(1), pa.FixedSizeListArray.from_arrays(half, 4))
        yield table


def _litters(folder: Path, name: str, schema: pa.Schema, chunks: Any) -> list[str]:
    Path("log.json").write_text(json.dumps(name))
    return write(folder, name, schema, chunks)


_CALLS = itertools.count()


def _counts(folder: Path, name: str, schema: pa.Schema, chunks: Any) -> list[str]:
    (folder / f"{name}.count").write_text(str(next(_CALLS)))
    return [*write(folder, name, schema, chunks), f"{name}.count"]


def _reads_counted(folder: Path, files: Any, schema: pa.Schema) -> Any:
    return read(folder, [file for file in files if file.endswith("feather")], schema)


def _forgets_nll(folder: Path, files: Any, schema: pa.Schema) -> Any:
    for table in read(folder, files, schema):
        at = table.schema.get_field_index("nll")
        field = None if at < 0 else table.schema.field(at)
        yield table if field is None else table.set_column(at, field, pa.nulls(len(table), field.type))


WRONG = {
    "tables": Format("loses the sign of zero", write, _no_zero_signs),
    "parts": Format("writes the first piece", _first_only, read),
    "empty": Format("cannot write an empty table", _nothing_for_nothing, read),
    "states": Format("halves", write, _rounded),
    "inside": Format("litters", _litters, read),
    "repeatable": Format("counts", _counts, _reads_counted),
    "whole_run": Format("forgets a column of samples", write, _forgets_nll),
}


@pytest.mark.parametrize("check", EXPORTER_CHECKS)
def test_each_check_fails_what_is_wrong(check, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SelfTestError, match=rf"tried breaks the contract of export formats \({check}\)"):
        check_exporter(WRONG[check], run, only=check)


def test_a_declared_loss_is_no_failure(run):
    check_exporter(WRONG["tables"], loses=["value"])


def test_a_format_of_another_package(package, run, tmp_path):
    text = Path(__file__).read_text(encoding="utf-8")
    body = text[text.index("def write(") : text.index("def test_a_good_one_passes")]
    head = "from pathlib import Path\nfrom typing import Any\nimport pyarrow as pa\nimport pyarrow.feather as feather\n"
    package("acme", {"dynprobe.exporters": {"feather": "acme_feather:GOOD"}},
            acme_feather=f"{head}from dynprobe.runs import Format, as_schema\n{body}")  # fmt: skip
    made = export_run(run, "feather", tmp_path / "export")
    side = json.loads((made.path / "dynprobe.json").read_text())
    assert side["plugin"] == {"group": "dynprobe.exporters", "name": "feather", "package": "acme", "version": "1.0"}
    back = import_export(made.path, tmp_path / "runs")
    assert back.samples.equals(run.samples)


def test_an_export_of_a_format_that_is_not_installed(run, tmp_path):
    with FORMATS.lent("feather", GOOD):
        made = export_run(run, "feather", tmp_path / "export")
    side = json.loads((made.path / "dynprobe.json").read_text())
    side["plugin"] = {"group": "dynprobe.exporters", "name": "feather", "package": "acme", "version": "1.0"}
    (made.path / "dynprobe.json").write_text(json.dumps(side))
    with pytest.raises(
        RunFolderError, match=r"in the format 'feather' of the package acme 1\.0, which is not installed"
    ):
        import_export(made.path, tmp_path / "runs")


def test_a_format_that_leads_out_is_refused(run, tmp_path):
    def outside(folder: Path, name: str, schema: pa.Schema, chunks: Any) -> list[str]:
        return [f"../{file}" for file in write(folder.parent, name, schema, chunks)]

    with (
        FORMATS.lent("escaping", Format("leads out", outside, read)),
        pytest.raises(RunFolderError, match="--to escaping is broken"),
    ):
        export_run(run, "escaping", tmp_path / "there" / "export")
