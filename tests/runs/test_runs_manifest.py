from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dynprobe.errors import RunFolderError
from dynprobe.runs import SCHEMA_VERSION, Manifest, open_run

_PLUGIN = {"group": "dynprobe.scales", "name": "peak", "package": "acme-probes", "version": "1.0rc1+cpu"}


def edit(folder, **fields):
    """Change fields, as a manifest that was never sealed."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields | {"seal": None}))


def test_manifest_is_strict_json_with_one_line_per_part(run_folder):
    text = (run_folder / "manifest.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["schema_version"] == SCHEMA_VERSION
    assert len(content["parts"]) == sum('"sha256"' in line for line in text.splitlines()) == 10
    assert content["batch_facts"] == {"0": {"seconds": 0.5}, "1": {"seconds": 0.5}}


def test_numbers_that_json_lacks(tmp_path, make):
    writer = make["begin"](tmp_path, manifest_fields={"noise_floor": math.nan, "self_tests": {"null": np.float32(0)}})
    writer.update(bound=math.inf)
    manifest = open_run(writer.folder).manifest
    assert manifest.noise_floor is None
    assert manifest.self_tests == {"null": 0.0}
    assert manifest.model_extra["bound"] == "Infinity"


def test_an_older_minor_opens(run_folder):
    edit(run_folder, schema_version="1.0")
    run = open_run(run_folder)
    assert run.manifest.schema_version == "1.0"
    assert len(run.samples) == run.manifest.rows()["samples"]


def test_newer_major_is_refused(run_folder):
    edit(run_folder, schema_version="2.0")
    with pytest.raises(RunFolderError, match=r"schema 2\.0; this dynprobe reads up to 1\.1.*pip install --upgrade"):
        open_run(run_folder)


def test_newer_minor_is_read_and_its_keys_are_kept(run_folder, make):
    edit(run_folder, schema_version="1.7", new_field={"a": 1}, status="interrupted")
    assert open_run(run_folder).manifest.model_extra["new_field"] == {"a": 1}
    with pytest.raises(RunFolderError, match=r"begun with schema 1\.7"):
        make["begin"](run_folder)


def test_unknown_keys_survive_continuation(tmp_path, make):
    writer = make["begin"](tmp_path)
    writer.close()
    edit(writer.folder, new_field=[1, {"b": None}])
    make["begin"](tmp_path).close()
    assert open_run(writer.folder).manifest.model_extra["new_field"] == [1, {"b": None}]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"status": "done"}, "status"),
        ({"id8": "xyz"}, "id8"),
        ({"finished": [0, 0]}, "finished"),
        ({"finished": "all"}, "finished"),
        ({"config": []}, "config"),
        ({"parts": [{"path": "samples/part-0.parquet"}]}, "parts.0.table"),
        ({"schema_version": "one"}, "schema_version"),
        ({"schema_version": None}, "schema_version"),
        ({"created": None}, "created"),
        ({"plugins": [{}]}, r"plugins\.0.*"),
        ({"plugins": [_PLUGIN | {"package": "x; rm -r ~"}]}, r"plugins\.0.*"),
        ({"plugins": [_PLUGIN | {"version": "1\x1b[2J"}]}, r"plugins\.0.*"),
    ],
)
def test_nonsense_is_named(run_folder, fields, named):
    edit(run_folder, **fields)
    with pytest.raises(RunFolderError, match=rf"manifest\.json.*'{named}'"):
        open_run(run_folder)


def test_what_a_plugin_is_stays_as_it_was_written(run_folder):
    edit(run_folder, plugins=[_PLUGIN])
    assert open_run(run_folder).manifest.plugins == [_PLUGIN]


@pytest.mark.parametrize(
    "path", ["../x.parquet", "/etc/x.parquet", "samples/../../x.parquet", "tokens/a.parquet", "C:x"]
)
def test_parts_cannot_lead_out_of_the_folder(run_folder, path):
    part = {"path": path, "table": "samples", "rows": 1, "bytes": 1, "sha256": "0" * 64}
    edit(run_folder, parts=[part])
    with pytest.raises(RunFolderError, match=r"parts\.0"):
        open_run(run_folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff", '{"schema_version": 1', "[" * 100_000])
def test_damaged_file(run_folder, text):
    (run_folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunFolderError, match=r"manifest\.json"):
        open_run(run_folder)


def test_writer_fields_cannot_be_set_from_outside(tmp_path, make):
    with pytest.raises(RunFolderError, match="'parts'"):
        make["begin"](tmp_path, manifest_fields={"parts": []})
    writer = make["begin"](tmp_path)
    with pytest.raises(RunFolderError, match="'status'"):
        writer.update(status="complete")
    with pytest.raises(RunFolderError, match="'weights'"):
        writer.update(weights=3)


def test_lone_surrogates_do_not_stop_a_run(tmp_path, make):
    writer = make["begin"](tmp_path, config={"prompt": "bad \udc80 byte"})
    assert open_run(writer.folder).manifest.config == {"prompt": "bad \udc80 byte"}


def test_extra_fields_round_trip():
    manifest = Manifest(id8="0" * 8, created="t", updated="t", model_name="m", more=[1])
    assert Manifest.model_validate(manifest.model_dump()) == manifest
