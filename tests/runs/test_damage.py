"""A damaged run is named by every reader, explained by the doctor, mended, and continues into the run it was."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dynprobe as dp
from dynprobe.errors import DynprobeError, RunFolderError, UsageError
from dynprobe.runs import SCHEMA_VERSION, compare, diff, examine, import_export, list_runs, open_run, repair

TABLES = ("prompts", "conditions", "samples", "tokens", "depths")
READERS = {
    "table": lambda run: [run.table(name) for name in TABLES],
    "sql": lambda run: run.sql("select count(*), avg(norm) from depths join samples using (sample_id)"),
    "states": lambda run: run.states(depth=[0, 1, 2, 3]),
    "columns": lambda run: run.columns(),
    "verify": lambda run: run.verify(),
    "diff": lambda run: diff(run, run),
}


def kinds(found):
    return sorted(damage.kind for damage in found.damages)


def mend(folder):
    found = examine(folder)
    steps = repair(found)
    after = examine(folder)
    return found, steps, after


def continued_equals(make, folder, reference):
    """Continue a repaired run and compare every table with an undamaged one."""
    make["write_all"](folder)
    run, whole = open_run(folder), open_run(reference)
    assert run.status == "complete"
    assert run.verify() == len(whole.manifest.parts)
    assert examine(folder).healthy
    for table in TABLES:
        keys = [c for c in whole.table(table).columns if c.endswith("_id") or c in ("pos", "track", "depth")]
        left, right = (
            r.table(table).astype(dict.fromkeys(keys, str)).sort_values(keys, ignore_index=True) for r in (run, whole)
        )
        pd.testing.assert_frame_equal(left.astype(object), right.astype(object))
    order = ["sample_id", "pos", "depth"]
    (mine, a), (theirs, b) = (r.states(depth=[0, 1, 2, 3]) for r in (run, whole))
    mine, theirs = (k.astype({"sample_id": str}).sort_values(order) for k in (mine, theirs))
    assert (a[mine.index] == b[theirs.index]).all()
    assert [p.sha256 for p in sorted(run.manifest.parts, key=lambda p: p.path)] == [
        p.sha256 for p in sorted(whole.manifest.parts, key=lambda p: p.path)
    ]


@pytest.fixture
def pair(tmp_path, make):
    """A run, and a copy of it as it was."""
    folder = make["write_all"](tmp_path / "runs")
    shutil.copytree(folder, tmp_path / "reference")
    return folder, tmp_path / "reference"


def test_a_whole_run_is_whole(pair):
    folder, _ = pair
    found = examine(folder / "manifest.json")
    assert found.healthy
    assert found.repairable
    assert repair(found) == []
    assert "10 files as they were written" in repr(found)
    assert found.as_dict()["healthy"] is True


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize(
    "part", ["samples/part-00001", "tokens/part-00000", "depths/part-00001", "states/part-00000-00", "prompts"]
)
def test_truncation_at_any_byte(pair, make, part, share):
    folder, reference = pair
    path = folder / f"{part}.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    for name, read in READERS.items():
        if name == "states" and not part.startswith("states"):
            continue
        if name == "table" and part.startswith("states"):
            continue
        with pytest.raises(DynprobeError) as caught:
            read(open_run(folder))
        assert str(path.relative_to(folder)) in str(caught.value), name
        assert f"dynprobe doctor {folder}" in str(caught.value), name
    found, steps, after = mend(folder)
    assert kinds(found) == ["cut"]
    (damage,) = found.damages
    assert damage.path == f"{part}.parquet"
    assert damage.rows == next(p.rows for p in open_run(reference).manifest.parts if p.path == damage.path)
    assert damage.batch == (None if part == "prompts" else int(part.split("-")[1]))
    assert steps
    assert after.healthy
    assert (folder / "damaged" / f"{part}.parquet").read_bytes() == data[: int(len(data) * share)]
    continued_equals(make, folder, reference)


def test_a_part_that_is_gone(pair, make):
    folder, reference = pair
    (folder / "depths/part-00000.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"depths/part-00000\.parquet is listed .* missing.*dynprobe doctor"):
        _ = open_run(folder).depths
    found, _, after = mend(folder)
    assert kinds(found) == ["missing"]
    assert "24 rows of depths, batch 0" in found.damages[0].what
    assert after.healthy
    assert open_run(folder).status == "interrupted"
    assert sorted(open_run(folder).manifest.finished) == [1]
    continued_equals(make, folder, reference)


@pytest.mark.parametrize("where", [0.3, 0.6])
def test_a_flipped_bit_is_not_read_as_a_number(pair, make, where):
    folder, reference = pair
    path = folder / "depths/part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)
    for name in ("table", "sql", "verify", "diff"):
        with pytest.raises(RunFolderError, match=r"depths/part-00001\.parquet.*dynprobe doctor"):
            READERS[name](open_run(folder))
    found, _, after = mend(folder)
    assert kinds(found) == ["changed"]
    assert after.healthy
    continued_equals(make, folder, reference)


def test_orphans_and_leftovers_are_moved_and_nothing_else(pair, make):
    folder, reference = pair
    shutil.copy(folder / "tokens/part-00000.parquet", folder / "tokens/part-00009.parquet")
    (folder / "samples/whole.parquet").write_bytes(b"half")
    (folder / ".tmp-7-manifest.json").write_bytes(b"{")
    (folder / "depths/.tmp-7-part-00003.parquet").write_bytes(b"x")
    (folder / "my notes.txt").write_text("kept")
    (folder / ".lock").write_text("{}")
    found, steps, after = mend(folder)
    assert kinds(found) == ["orphan", "orphan", "temporary", "temporary"]
    assert any(".lock is left" in note for note in found.notes)
    assert len([s for s in steps if s.startswith("moved")]) == 4
    assert after.healthy
    assert (folder / "my notes.txt").read_text() == "kept"
    assert (folder / "damaged/samples/whole.parquet").read_bytes() == b"half"
    assert open_run(folder).status == "complete"
    continued_equals(make, folder, reference)


def edit(folder, **fields):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=1))


@pytest.mark.parametrize(
    "fields",
    [{"config": {"perturb": "alpha=0.2"}}, {"status": "running"}, {"model_name": "gpt-5"}, {"schema_version": "9.0"},
     {"id8": "ffffffff"}],
)  # fmt: skip
def test_an_edited_manifest_is_refused_and_put_back(pair, make, fields):
    folder, reference = pair
    before = open_run(folder).manifest
    edit(folder, **fields)
    name = next(iter(fields))
    words = "schema 9" if name == "schema_version" else f"field '{name}' was changed.*dynprobe doctor"
    with pytest.raises(RunFolderError, match=words):
        open_run(folder)
    found, steps, after = mend(folder)
    assert kinds(found) == ["manifest"]
    assert found.source == "restored"
    assert f"'{name}'" in found.damages[0].what
    assert after.healthy
    now = open_run(folder).manifest
    assert now.model_dump(exclude={"repairs", "updated", "seal"}) == before.model_dump(
        exclude={"repairs", "updated", "seal"}
    )
    assert "kept the damaged one as damaged/manifest.json" in steps
    assert now.repairs[0]["manifest"] == "restored"
    continued_equals(make, folder, reference)


def test_a_part_taken_out_of_the_manifest_by_hand(pair, make):
    folder, reference = pair
    content = json.loads((folder / "manifest.json").read_text())
    edit(folder, parts=[p for p in content["parts"] if p["path"] != "tokens/part-00001.parquet"])
    with pytest.raises(RunFolderError, match="field 'parts'"):
        open_run(folder)
    found, _, after = mend(folder)
    assert kinds(found)[0] == "manifest"
    assert after.healthy
    continued_equals(make, folder, reference)


def test_a_manifest_cut_at_any_byte(pair, make):
    folder, reference = pair
    data = (folder / "manifest.json").read_bytes()
    sources = set()
    for share in (0.0, 0.2, 0.5, 0.7, 0.9, 0.99, 1.0):
        shutil.rmtree(folder)
        shutil.copytree(reference, folder)
        path = folder / "manifest.json"
        path.write_bytes(data[: int(len(data) * share) - 3]) if share else path.unlink()
        with pytest.raises(RunFolderError, match=r"manifest\.json.*dynprobe doctor"):
            open_run(folder)
        with pytest.raises(RunFolderError, match=r"dynprobe doctor|manifest\.json"):
            make["write_all"](folder)
        found, _, after = mend(folder)
        sources.add(found.source)
        assert after.healthy
        continued_equals(make, folder, reference)
    assert sources == {"salvaged", "previous"}


def test_a_manifest_without_its_predecessor(pair, make):
    folder, reference = pair
    (folder / "manifest.previous.json").unlink()
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data[:-200])
    found, _, after = mend(folder)
    assert found.source == "salvaged"
    assert after.healthy
    assert open_run(folder).status == "complete"
    continued_equals(make, folder, reference)
    (folder / "manifest.previous.json").unlink(missing_ok=True)
    (folder / "manifest.json").write_bytes(data[:300])
    lost = examine(folder)
    assert (lost.source, lost.repairable) == ("lost", False)
    assert repair(lost) == []
    assert (folder / "samples/part-00000.parquet").exists()


def rewrite(folder, name, change):
    """Replace a part by a changed one and list it, as a tool that knows nothing of seals would."""
    path = folder / name
    schema = pq.read_schema(path)
    table = change(pq.read_table(path), schema)
    pq.write_table(table, path)
    import hashlib

    content = json.loads((folder / "manifest.json").read_text())
    for part in content["parts"]:
        if part["path"] == name:
            part |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            part |= {"rows": table.num_rows}
    (folder / "manifest.json").write_text(json.dumps(content | {"seal": None}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, s: t.set_column(t.column_names.index("pos"), "pos", t["pos"].cast(pa.string())),
         "key column 'pos' holds string where int32 is needed"),
        (lambda t, s: t.drop_columns(["depth"]), "key column 'depth' is missing"),
        (lambda t, s: t.replace_schema_metadata({**s.metadata, b"dynprobe.schema": b"2.0"}), "schema 2.0"),
        (lambda t, s: t.replace_schema_metadata({**s.metadata, b"dynprobe.table": b"tokens"}), "of table 'tokens'"),
        (lambda t, s: t.set_column(t.column_names.index("norm"), "norm", pa.array(["x"] * len(t))),
         "do not fit the other parts"),
    ],
)  # fmt: skip
def test_mixed_layouts_name_the_file(pair, make, change, words):
    folder, reference = pair
    rewrite(folder, "depths/part-00001.parquet", change)
    for read in (lambda run: run.depths, *([] if "parts" in words else [lambda run: diff(run, run)])):
        with pytest.raises(RunFolderError, match=rf"depths/part-00001\.parquet is damaged: .*{words}.*dynprobe doctor"):
            read(open_run(folder))
    found, _, after = mend(folder)
    assert kinds(found) == ["layout"]
    assert words.split(" where")[0] in found.damages[0].what
    assert after.healthy
    continued_equals(make, folder, reference)


def test_texts_of_a_run(pair, make):
    folder, reference = pair
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"time": "2026')
    (folder / "summary.json").write_text('{"samples": ')
    (folder / "README.md").unlink()
    with pytest.raises(RunFolderError, match=r"summary\.json is damaged.*dynprobe doctor"):
        _ = open_run(folder).summary
    found, _, after = mend(folder)
    assert kinds(found) == ["events", "summary", "summary"]
    assert after.healthy
    assert open_run(folder).manifest.finished == [0, 1]  # nothing is made again but the summary
    assert len(open_run(folder).events()) == len((folder / "events.jsonl").read_text().splitlines()) > 1
    continued_equals(make, folder, reference)
    assert json.loads((folder / "summary.json").read_text()) == {"samples": 4}


def test_damage_of_several_kinds_at_once(pair, make):
    folder, reference = pair
    (folder / "conditions.parquet").write_bytes(b"PAR1")
    (folder / "states/part-00001-00.parquet").unlink()
    edit(folder, seeds=7)
    found, _, after = mend(folder)
    assert kinds(found) == ["cut", "manifest", "missing"]
    assert after.healthy
    again, _, _ = mend(folder)  # a second repair has nothing to do
    assert again.healthy
    continued_equals(make, folder, reference)


def test_looking_changes_nothing(pair):
    folder, _ = pair
    (folder / "tokens/part-00000.parquet").write_bytes(b"x")
    state = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
    found = examine(folder)
    assert not found.healthy
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")} == state
    assert "batch 0" in repr(found)


def test_a_run_that_is_being_written_is_left_alone(tmp_path, make):
    writer = make["begin"](tmp_path)
    writer.write_batch(0, make["batch"](0))
    found = examine(writer.folder)
    assert found.busy
    assert found.healthy
    (writer.folder / "tokens/part-00000.parquet").unlink()
    with pytest.raises(RunFolderError, match="is being written"):
        repair(examine(writer.folder))
    writer.close()


def test_an_interrupted_run_is_no_damage(tmp_path, make):
    writer = make["begin"](tmp_path)
    writer.write_batch(0, make["batch"](0))
    writer.close()
    found = examine(writer.folder)
    assert found.healthy
    assert any("continues it" in note for note in found.notes)


@pytest.mark.parametrize(("schema", "ours"), [("1.0", False), (SCHEMA_VERSION, True)])
def test_a_repair_says_who_makes_the_lost_batch_again(run_folder, make, schema, ours):
    """A run of an older schema opens, and its repair reopens what this version will not continue."""
    edit(run_folder, schema_version=schema, seal=None)
    assert not any("began it" in note for note in examine(run_folder).notes)
    next((run_folder / "tokens").glob("*.parquet")).unlink()
    found = examine(run_folder)
    assert any("only the version that began it" in note for note in found.notes) is not ours
    assert any(("the command that made it" in step) is ours for step in repair(found) if "interrupted" in step)
    assert open_run(run_folder).status == "interrupted"
    if not ours:
        with pytest.raises(RunFolderError, match=r"begun with schema 1\.0"):
            make["begin"](run_folder)


def test_folders_that_are_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text('{"name": "site", "start_url": "/"}')
    for name in ("empty", "none"):
        with pytest.raises(RunFolderError, match="no run folder"):
            examine(tmp_path / name)
        with pytest.raises(RunFolderError, match="no run folder"):
            open_run(tmp_path / name)
    with pytest.raises(RunFolderError, match=r"other/manifest\.json: field 'schema_version' cannot be read"):
        open_run(tmp_path / "other")
    assert examine(tmp_path / "other").repairable is False
    assert list(list_runs(tmp_path)["status"]) == ["damaged"]


def test_doctor_takes_runs_and_compare_names_the_file(pair, tmp_path):
    folder, reference = pair
    assert dp.doctor(str(folder)).healthy
    assert dp.doctor(open_run(folder)).healthy
    with pytest.raises(UsageError, match="--repair mends a run folder"):
        dp.doctor("tiny-llama", repair=True)
    path = folder / "samples/part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 255
    path.write_bytes(data)
    with pytest.raises(RunFolderError, match=r"samples/part-00000\.parquet.*dynprobe doctor"):
        compare([folder, reference])
    found = dp.doctor(folder, repair=True)
    assert found.healthy
    assert any("moved samples/part-00000.parquet" in step for step in found.done)


def test_the_id_is_made_again_from_what_was_hashed(tmp_path, make):
    settings, weights = {"alpha": 0.1}, "w0"
    rows = [[1, 2], [3]]
    ident = dp.runs.identity(settings, rows, weights)
    fields = {"identity": settings, "weights": {"hash": weights}}
    folder = make["write_all"](tmp_path / "a", ident=ident, manifest_fields=fields)
    assert examine(folder).healthy
    other = make["write_all"](tmp_path / "b", ident="00000000", manifest_fields=fields)
    found = examine(other)
    assert kinds(found) == ["identity"]
    assert ident in found.damages[0].what
    assert not found.repairable


def test_a_writer_between_the_look_and_the_repair_loses_nothing(tmp_path, make):
    writer = make["begin"](tmp_path)
    make["whole_tables"](writer)
    writer.write_batch(0, make["batch"](0))
    writer.close()
    folder = writer.folder
    (folder / "tokens/.tmp-7-part-00003.parquet").write_bytes(b"x")
    found = examine(folder)  # something to mend
    assert not found.healthy
    make["write_all"](folder)  # another process comes, does batch 1, and goes
    finished = (folder / "manifest.json").read_bytes()
    with pytest.raises(RunFolderError, match=r"changed since it was examined.*run doctor again.*dynprobe doctor"):
        repair(found)
    assert (folder / "manifest.json").read_bytes() == finished
    run = open_run(folder)
    assert (run.status, run.manifest.finished) == ("complete", [0, 1])
    assert run.verify() == len(run.manifest.parts)
    (folder / "manifest.json").unlink()  # nor is one that went away in between written again unseen
    gone = examine(folder)
    (folder / "manifest.json").write_bytes(finished)
    with pytest.raises(RunFolderError, match="changed since"):
        repair(gone)
    assert repair(examine(folder)) == []


@pytest.mark.parametrize("hurt", ["cut", "missing", "changed"])
@pytest.mark.parametrize("part", ["samples", "prompts"])
def test_an_import_is_imported_again_and_not_mended(pair, tmp_path, hurt, part):
    folder, _ = pair
    open_run(folder).export("hf", tmp_path / "out")
    back = import_export(tmp_path / "out", tmp_path / "back").path
    assert examine(back).healthy
    path = next((back / "samples").glob("*.parquet")) if part == "samples" else back / "prompts.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if hurt == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if hurt == "cut" else data)
    (back / ".tmp-7-manifest.json").write_bytes(b"{")
    before = open_run(back).manifest
    found = examine(back)
    assert kinds(found) == sorted([hurt, "temporary"])
    (damage,) = (d for d in found.damages if d.kind == hurt)
    assert damage.remedy == ""
    assert "import it again" in damage.what
    assert "same command" not in repr(found)
    assert found.repairable is False
    repair(found)  # takes the leftover away, and nothing else
    after = open_run(back).manifest
    assert (after.status, after.finished, after.parts) == ("complete", before.finished, before.parts)
    assert kinds(examine(back)) == [hurt]
    with pytest.raises(RunFolderError, match="dynprobe doctor"):
        open_run(back).table(part)


def test_an_import_that_was_not_complete_is_not_continued(tmp_path, make):
    writer = make["begin"](tmp_path / "runs")
    make["whole_tables"](writer)
    writer.write_batch(0, make["batch"](0))
    writer.close()
    open_run(writer.folder).export("hf", tmp_path / "out")
    back = import_export(tmp_path / "out", tmp_path / "back").path
    found = examine(back)
    assert found.healthy
    assert any("continue it where it was made" in note for note in found.notes)
    assert not any("command that made it" in note for note in found.notes)
    (part,) = (back / "samples").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-9])
    before = {p: p.read_bytes() for p in back.rglob("*.*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(RunFolderError, match=r"was imported .* interrupted; it cannot be continued"):
        make["write_all"](back)
    assert {p: p.read_bytes() for p in before} == before
    assert open_run(back).status == "interrupted"


def test_the_manifest_of_an_import_is_not_guessed_from_names_of_files(pair, tmp_path):
    folder, _ = pair
    open_run(folder).export("hf", tmp_path / "out")
    back = import_export(tmp_path / "out", tmp_path / "back").path
    path = back / "manifest.json"
    path.write_bytes(path.read_bytes()[:-200])
    found = examine(back)
    assert (found.source, found.repairable) == ("lost", False)
    assert repair(found) == []
    assert (back / "samples").is_dir()


@pytest.mark.parametrize("asked", [{}, {"conditions": ["clean"]}, {"tables": ["samples"]}, {"redact_text": True}])
def test_a_healthy_import_is_healthy(tmp_path, make, asked):
    fields = {"figures": ["figures/one.png"], "calibration_hash": "0123456789abcdef"}
    folder = make["write_all"](tmp_path / "runs", manifest_fields=fields)
    (folder / "figures").mkdir()
    (folder / "figures/one.png").write_bytes(b"png")
    assert examine(folder).healthy
    open_run(folder).export("hf", tmp_path / "out", **asked)
    back = import_export(tmp_path / "out", tmp_path / "back")
    found = dp.doctor(back)
    assert found.healthy, found
    assert found.notes == []


ENTRANCES = {
    "open": lambda folder, whole, out: dp.open(folder).samples,
    "compare": lambda folder, whole, out: dp.compare([folder, whole]),
    "report": lambda folder, whole, out: dp.report([folder], out=out / "report.html"),
    "export": lambda folder, whole, out: dp.open(folder).export("hf", out / "out"),
}


@pytest.mark.parametrize("hurt", ["truncated", "missing"])
@pytest.mark.parametrize("name", ENTRANCES)
def test_every_entrance_names_the_damaged_file_and_the_doctor(pair, tmp_path, name, hurt):
    folder, whole = pair
    path = folder / "samples/part-00001.parquet"
    if hurt == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DynprobeError) as caught:
        ENTRANCES[name](folder, whole, tmp_path)
    assert "samples/part-00001.parquet" in str(caught.value)
    assert f"dynprobe doctor {folder}" in str(caught.value)
    assert not (tmp_path / "out").exists()
