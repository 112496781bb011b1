"""Files made to do harm: nothing in them runs, nothing leaves its folder, nothing takes the machine with it.

Every case works in ``mine`` below a folder of its own; a canary that is sung (a file that appears), or any change
outside ``mine``, is an effect. ``python -m pytest tests/reliability/test_hostile.py`` counts them.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import fuzz_targets
import numpy as np
import pytest

import dynprobe as dp
from dynprobe.errors import DynprobeError
from dynprobe.models._folder import inspect_folder
from dynprobe.prompts import read_prompts
from dynprobe.protocols._config import load_config
from dynprobe.protocols._panel_config import read_panel
from dynprobe.protocols._strength import read_direction
from dynprobe.runs import import_export, open_run, read_trajectory

HOSTILE: dict[str, Callable[[Path, Path], Any]] = {}
#: Cases that are read, since there is nothing wrong with them once nothing runs.
READ = {"text_of_markup", "name_of_a_run"}


class Sings:
    """A pickle that makes a file when it is opened."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def hostile(function: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
    """Enter a case: ``(folder, canary)``."""
    HOSTILE[function.__name__] = function
    return function


def _pickled(canary: Path) -> bytes:
    return pickle.dumps({"states": Sings(canary)})


for _suffix in (".pkl", ".pt", ".npy", ".npz", ".safetensors", ".parquet"):

    def _disguised(folder: Path, canary: Path, suffix: str = _suffix) -> Any:
        path = folder / f"states{suffix}"
        path.write_bytes(_pickled(canary))
        return read_trajectory(path)

    HOSTILE[f"pickle_called{_suffix}"] = _disguised


@hostile
def pickle_in_a_torch_dump_that_may_be_read(folder, canary):
    from dynprobe.runs._trajectory_layers import Reading

    path = folder / "states.pt"
    path.write_bytes(_pickled(canary))
    return read_trajectory(path, Reading(allow_bin=True))


@hostile
def objects_in_npz(folder, canary):
    np.savez(folder / "states.npz", states=np.array([Sings(canary)], dtype=object))
    return read_trajectory(folder / "states.npz")


@hostile
def objects_in_npy_of_a_direction(folder, canary):
    np.save(folder / "d.npy", np.array([Sings(canary)], dtype=object))
    return read_direction(folder / "d.npy")


@hostile
def bomb_in_npz(folder, canary):
    """Three hundred members that claim four gibibytes each."""
    path = folder / "states.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for i in range(300):
            file.writestr(f"a{i}.npy", b"\x00" * 64)
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", content[end + 16 : end + 20])[0]
    directory = bytearray(content[start:end])
    at = 0
    while (at := directory.find(b"PK\x01\x02", at)) >= 0:
        directory[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFFE)
        at += 4
    path.write_bytes(content[:start] + bytes(directory) + content[end:])
    return read_trajectory(path)


@hostile
def member_outside_in_npz(folder, canary):
    member = io.BytesIO()
    np.save(member, np.zeros((3, 2, 4), np.float32))
    with zipfile.ZipFile(folder / "states.npz", "w") as file:
        file.writestr("../../up.npy", member.getvalue())
    return read_trajectory(folder / "states.npz")


@hostile
def shape_of_npy_that_no_machine_holds(folder, canary):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 99999999), }"
    header += b" " * (63 - len(header) % 64) + b"\n"
    (folder / "d.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\x00" * 64)
    return read_direction(folder / "d.npy")


def _safetensors(folder: Path, header: bytes, length: int | None = None) -> Path:
    path = folder / "states.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + b"\x00" * 16)
    return path


@hostile
def length_of_a_header(folder, canary):
    return read_trajectory(_safetensors(folder, b"{}", 2**63))


@hostile
def shape_in_a_header(folder, canary):
    entry = {"states": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}
    return read_trajectory(_safetensors(folder, json.dumps(entry).encode()))


@hostile
def weights_that_overlap(folder, canary):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return read_trajectory(_safetensors(folder, json.dumps({"states": entry, "delta": entry}).encode()))


def _model(folder: Path, config: dict[str, Any], **files: bytes) -> Path:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    for name, content in files.items():
        (folder / "model" / name.replace("__", ".")).write_bytes(content)
    return folder / "model"


@hostile
def weights_as_pickle(folder, canary):
    return inspect_folder(_model(folder, {}, pytorch_model__bin=_pickled(canary)))


@hostile
def weights_outside(folder, canary):
    return inspect_folder(_model(folder, {"transformers_weights": "../../../up.safetensors"}))


@hostile
def shards_outside(folder, canary):
    index = json.dumps({"weight_map": {"w": "../up.safetensors"}}).encode()
    return inspect_folder(_model(folder, {}, **{"model.safetensors.index.json": index}))


@hostile
def model_with_code(folder, canary):
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass M: pass\n".encode()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.M", "AutoModelForCausalLM": "code.M"}}
    entry = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    weights = json.dumps(entry).encode()
    content = struct.pack("<Q", len(weights)) + weights + b"\x00" * 16
    return dp.load(str(_model(folder, config, code__py=code, model__safetensors=content)))


@hostile
def tokenizer_with_code(folder, canary):
    from dynprobe.testing import save_tiny_model

    save_tiny_model(folder / "model")
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass T: pass\n"
    (folder / "model" / "code.py").write_text(code)
    (folder / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    return dp.load(str(folder / "model"))


READ.add("tokenizer_with_code")  # the model is read, and what its tokenizer wants to run is not run


_EXECUTED = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{}]]"
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
_YAML = {"with_code": f"perturb: {_EXECUTED}\n", "bomb": _BOMB, "endless": "models: &a [*a]\n", "deep": "[" * 2000,
         "twice": "seed: 1\nseed: 2\n"}  # fmt: skip

for _name, _text in _YAML.items():
    for _kind, _read in (("settings", load_config), ("panel", read_panel)):

        def _yaml(folder: Path, canary: Path, text: str = _text, read: Callable[[Path], Any] = _read) -> Any:
            path = folder / "file.yaml"
            path.write_text(text.replace("{}", str(canary)))
            return read(path)

        HOSTILE[f"yaml_{_name}_as_{_kind}"] = _yaml

for _name in ("prompts.jsonl", "items.jsonl"):

    def _deep(folder: Path, canary: Path, name: str = _name) -> Any:
        from dynprobe.prompts import load_items

        (folder / name).write_text('{"text": ' + "[" * 5000)
        return (read_prompts if name == "prompts.jsonl" else load_items)(folder / name)

    HOSTILE[f"deep_{_name}"] = _deep


@hostile
def digits_without_end(folder, canary):
    (folder / "prompts.jsonl").write_text('{"text": "a", "id": ' + "9" * 10000 + "}")
    return read_prompts(folder / "prompts.jsonl")


def _changed_export(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Any:
    import shutil

    shutil.copytree(fuzz_targets._export(), folder / "export")
    path = folder / "export" / "dynprobe.json"
    side = json.loads(path.read_text())
    change(side)
    path.write_text(json.dumps(side))
    return import_export(folder / "export", folder / "runs")


@hostile
def table_that_is_written_outside(folder, canary):
    return _changed_export(folder, lambda side: side["tables"][2].update(name="../../../up"))


@hostile
def table_that_is_read_outside(folder, canary):
    (folder.parent / "secret.csv").write_text("sample_id\n1\n")
    return _changed_export(folder, lambda side: side["tables"][2].update(files=["../../secret.csv"]))


@hostile
def files_outside(folder, canary):
    return _changed_export(folder, lambda side: side["files"].update({"../../up": {"bytes": 0, "sha256": "0" * 64}}))


@hostile
def name_of_a_run(folder, canary):
    run = _changed_export(folder, lambda side: side.update(folder="../../up_0123abcd"))
    assert run.path.parent == folder / "runs"


@hostile
def id_of_a_run(folder, canary):
    return _changed_export(folder, lambda side: side["manifest"].update(id8="../../up"))


def _changed_run(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Any:
    import shutil

    shutil.copytree(fuzz_targets._run(), folder / "run")
    path = folder / "run" / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("seal", None)
    change(content)
    path.write_text(json.dumps(content))
    return open_run(folder / "run").table("tokens")


for _path in (
    "../../up.parquet",
    "/etc/up.parquet",
    "tokens/../../../up.parquet",
    "tokens\\..\\up.parquet",
    "tokens/a:b.parquet",
):

    def _part(folder: Path, canary: Path, path: str = _path) -> Any:
        return _changed_run(folder, lambda content: content["parts"][-1].update(path=path))

    HOSTILE[f"part_at_{_path}"] = _part


@hostile
def text_of_markup(folder, canary):
    (folder / "prompts.jsonl").write_text(json.dumps({"text": "[bold]x[/] \x1b]0;owned\x07 <script>alert(1)</script>"}))
    (prompt,) = read_prompts(folder / "prompts.jsonl")
    run = dp.run("tiny-llama", [prompt.text], max_new_tokens=0, out=folder / "runs", quiet=True)
    from rich.console import Console

    told = io.StringIO()
    console = Console(file=told, force_terminal=True, width=200)
    console.print(repr(run))
    assert "\x07" not in told.getvalue()
    assert "<script>alert(1)" not in run._repr_html_()


def _outside(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.parent.rglob("*") if p.is_file() and folder not in p.parents}


@pytest.mark.skipif(sys.platform == "win32", reason="some of these files cannot be made there")
@pytest.mark.parametrize("name", HOSTILE)
def test_no_effect(name, tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b" / "mine"
    folder.mkdir(parents=True)
    canary = tmp_path / "canary"
    monkeypatch.chdir(folder)
    for target in ("where", "part"):
        fuzz_targets.load(target)
    fuzz_targets._export()
    before = None
    refused, said = False, ""
    with fuzz.limited(60):
        try:
            before = _outside(tmp_path / "a" / "b" / "mine")
            HOSTILE[name](folder, canary)
        except DynprobeError as error:
            refused, said = True, str(error)
    assert not canary.exists(), "code in a file was run"
    changed = {p for p in _outside(folder).keys() ^ before.keys() if not p.endswith("secret.csv")}
    assert not changed, f"written outside: {changed}"
    assert refused == (name not in READ)
    assert bool(said) == refused
    assert "\x1b" not in said
