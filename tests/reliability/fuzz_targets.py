"""What bytes are made into, and how they are read: one function per reader of things that users hand to dynprobe.

Targets whose name ends in ``_raw`` read the bytes as the file itself. The others build a file that is well formed on
the outside (an archive with its checksums, a header of the right length, JSON) and wrong inside, which bytes alone
would hardly ever hit.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MODULES", "TARGETS", "load", "seeds"]


class Bits:
    """Choices read off bytes; where they end, every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, below: int) -> int:
        """An integer from 0."""
        size = 1 if below <= 256 else 4
        part = self.data[self.at : self.at + size]
        self.at += size
        return int.from_bytes(part, "little") % below

    def one(self, of: Sequence[Any]) -> Any:
        """One of several things."""
        return of[self.number(len(of))]

    def odd(self) -> bool:
        """True once in eight times."""
        return self.number(8) == 7

    def text(self, longest: int = 12) -> str:
        """A short text, with any character in it."""
        n = self.number(longest + 1)
        part = self.data[self.at : self.at + n]
        self.at += n
        return part.decode("utf-8", "replace")

    def float(self) -> float:
        """A number, at times a strange one."""
        if self.odd():
            return float(self.one([math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0, 1e-30]))
        return (self.number(2**31) - 2**30) / 2**28

    def value(self, deep: int = 2) -> Any:
        """A value of JSON."""
        kind = self.number(9 if deep else 6)
        if kind == 0:
            return None
        if kind == 1:
            return self.one([True, False])
        if kind == 2:
            return self.one([0, 1, -1, 2**31, 2**63, -(2**70), 7, 10**400])
        if kind == 3:
            return self.float()
        if kind in (4, 5):
            return self.one(WORDS) if kind == 4 else self.text()
        if kind in (6, 7):
            return [self.value(deep - 1) for _ in range(self.number(4))]
        return {self.one(WORDS) if self.odd() else self.text(): self.value(deep - 1) for _ in range(self.number(4))}


#: Words that mean something to one reader or another.
WORDS = (
    "", "..", "../../etc/passwd", "/", "a/b", "\x00", "<b>", "=1+1", "nan", "all", "mid", "50%", "1:", "0.1", "alpha",
    "layers", "states", "dims", "iter", "batch", "pos", "state", "dim", "depth", "stage", "core", "energy", "delta",
    "valid", "ids", "token_ids", "meta", "vec", "sample", "tiny-llama", "text", "tokens", "complete", "running",
    "float32", "torch.float32", "🙂", "e\u0301", "\ud7ff",
)  # fmt: skip
_DTYPES = ("<f4", "<f8", "<f2", "<i8", "<i4", "|u1", "|b1", "<c8", "|S3", "<U3", "|O", ">f4", "<u8")
_TORCH_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X")


def array(bits: Bits, size: Sequence[int]) -> np.ndarray:
    """An array whose shape is nearly the wanted one."""
    shape = [*size]
    if bits.odd():
        shape[bits.number(len(shape)) if shape else 0 :] = [bits.number(5) for _ in range(bits.number(4))]
    dtype = np.dtype(bits.one(_DTYPES) if bits.odd() else "<f4")
    count = math.prod(shape)
    if dtype.kind == "O":
        return np.full(shape, None, dtype=object)
    flat = np.array([bits.float() if i < 64 else 0.5 for i in range(count)])
    with np.errstate(all="ignore"):
        if dtype.kind in "iub":
            flat = np.nan_to_num(flat, posinf=3, neginf=-3).clip(-100, 100)
        return flat.reshape(shape).astype(dtype)


def trajectory(bits: Bits) -> dict[str, Any]:
    """What a trajectory file could hold: states, and some of its optional fields."""
    n, batch, length, dim = (1 + bits.number(4) for _ in range(4))
    named: dict[str, Any] = {}
    axes = ["iter", "batch", "pos", "dim"][bits.number(2) :]
    sizes = {"iter": n, "batch": batch, "pos": length, "dim": dim}
    if not bits.odd():
        named["states"] = array(bits, [sizes[a] for a in axes])
        named["dims"] = axes if not bits.odd() else bits.value(1)
    for name, size in (("energy", [n, batch, length]), ("delta", [n, batch, length]), ("valid", [batch, length]),
                       ("token_ids", [batch, length]), ("iter", [n]), ("depth", [n])):  # fmt: skip
        if bits.odd():
            named[name] = array(bits, size)
    for name in ("ids", "stage", "meta"):
        if bits.odd():
            named[name] = bits.value()
    if bits.odd():
        named[f"states_depth_{bits.number(6)}"] = array(bits, [batch, length, dim])
    if bits.odd():
        named[bits.one(["hook_embed", "blocks.0.hook_resid_post", "layer_1", "h.3", "resid_post", *WORDS])] = array(
            bits, [batch, length, dim]
        )
    return named


def _read(path: Path) -> None:
    """Read a trajectory; compare with what NumPy reads where that is simple."""
    from dynprobe.runs import read_trajectory

    found = read_trajectory(path)
    assert found.states.ndim == 5
    assert len(found.iter) == len(found.states) == len(found.stage)
    assert found.valid.shape == tuple(found.states.shape[1:3])
    kept = found.states.double().numpy()[:, found.valid]
    assert np.isfinite(kept).all(), "a state that is not finite was let through"
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as other:
            if "states" in other and found.mode == "trajectory" and not found.prefix:
                theirs = np.asarray(other["states"], np.float64)
                assert sorted(theirs.ravel().tolist(), key=repr) == sorted(
                    found.states.double().numpy().ravel().tolist(), key=repr
                ), "states are not those of the file"


def _written(scratch: Path, name: str, data: bytes) -> Path:
    path = scratch / name
    path.write_bytes(data)
    return path


def raw_trajectory(suffix: str) -> Callable[[bytes, Path], None]:
    """The bytes are the file."""
    return lambda data, scratch: _read(_written(scratch, f"states{suffix}", data))


def npz(data: bytes, scratch: Path) -> None:
    """An archive with right checksums and strange members."""
    import zipfile

    bits = Bits(data)
    path = scratch / "states.npz"
    with zipfile.ZipFile(path, "w") as file:
        for name, value in trajectory(bits).items():
            member = io.BytesIO()
            found = (
                value
                if isinstance(value, np.ndarray)
                else np.asarray(
                    value if bits.odd() else json.dumps(value), dtype=object if isinstance(value, list) else None
                )
            )
            np.save(member, found, allow_pickle=True)
            content = member.getvalue()
            if bits.odd():  # a header that does not tell the truth
                content = content.replace(
                    b"'shape': (", b"'shape': (" + bits.one([b"9", b"99999999999,", b"-1,", b"0,"]), 1
                )
            safe = name.replace("/", "_").replace("\x00", "_") or "_"
            file.writestr(f"{safe}.npy" if not bits.odd() else bits.one(["../up.npy", f"{safe}", "/abs.npy"]), content)
            if bits.odd():
                file.writestr(f"{safe}.npy", content)
    _read(path)


def safetensors(data: bytes, scratch: Path) -> None:
    """A header of the right length around strange entries."""
    bits = Bits(data)
    header: dict[str, Any] = {}
    body = b""
    meta: dict[str, Any] = {}
    for name, value in trajectory(bits).items():
        if not isinstance(value, np.ndarray):
            meta[name] = value if bits.odd() else json.dumps(value)
            continue
        content = value.tobytes() if value.dtype.kind != "O" else b""
        dtype = {"f4": "F32", "f8": "F64", "f2": "F16", "i8": "I64", "i4": "I32", "u1": "U8", "b1": "BOOL"}.get(
            value.dtype.str[1:], "F32"
        )
        entry = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(content)]}
        if bits.odd():
            entry[bits.one(["dtype", "shape", "data_offsets"])] = (
                bits.one(_TORCH_DTYPES)
                if bits.odd()
                else bits.one([[0, 2**62], [2**63, 1], [-1, 4], [0], [], "x", [2**40] * 3])
            )
        header[name] = entry
        body += content
    if meta or bits.odd():
        header["__metadata__"] = meta
    text = json.dumps(header).encode()
    length = len(text) if not bits.odd() else bits.one([0, 2**63 - 1, 2**64 - 1, len(text) + 1, 100_000_001])
    _read(_written(scratch, "states.safetensors", struct.pack("<Q", length) + text + body))


def parquet(data: bytes, scratch: Path) -> None:
    """A table that opens, with strange columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    bits = Bits(data)
    n, samples, length, dim = (1 + bits.number(3) for _ in range(4))
    rows = [(f"s{s}", p, i) for s in range(samples) for p in range(length) for i in range(n + 1)]
    if bits.odd():
        rows = rows[:: 1 + bits.number(3)] + rows[: bits.number(3)]
    columns: dict[str, Any] = {
        "sample": [r[0] for r in rows], "pos": [r[1] for r in rows], "iter": [r[2] for r in rows],
        "vec": [[bits.float() for _ in range(dim)] if i < 12 else [0.25] * dim for i in range(len(rows))],
    }  # fmt: skip
    for name in ("sample", "pos", "iter", "vec"):
        if bits.odd():
            del columns[name]
        elif bits.odd():
            columns[name] = [bits.one([None, 1, 2**40, -3])] * len(rows)
    for name in ("stage", "state", "depth", "delta", "energy", "dim_0", "dim_2", *WORDS[:6]):
        if bits.odd():
            kind = bits.one([int, float, str])
            columns[name] = [kind(bits.number(4)) for _ in rows]
    table = pa.table(columns)
    if bits.odd():
        table = table.replace_schema_metadata({b"meta": bits.text(40).encode(), b"dims": bits.text().encode()})
    path = scratch / "states.parquet"
    pq.write_table(table, path)
    _read(path)


def activations(data: bytes, scratch: Path) -> None:
    """A folder of somebody's dumps: a dataset of cached activations, or one file per text."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import save_file

    bits = Bits(data)
    folder = scratch / "dumps"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    length, dim, layers = (1 + bits.number(3) for _ in range(3))
    if bits.number(2):
        for i in range(1 + bits.number(3)):
            sizes = [length + bits.number(2), layers, dim]
            named: dict[str, Any] = {"hidden_states": array(bits, sizes), "token_ids": np.arange(sizes[0])}
            if bits.odd():
                named[bits.one(["hidden_states", "token_ids", "x"])] = array(bits, [bits.number(4)])
            if bits.odd():
                del named[bits.one(["hidden_states", "token_ids"])]
            kept = {
                k: torch.from_numpy(np.ascontiguousarray(v.astype(v.dtype.newbyteorder("="))))
                for k, v in named.items()
                if v.dtype.str[1:] in _SAVED
            }
            save_file(kept, folder / f"hs_{i if not bits.odd() else bits.number(3)}.safetensors")
        _read(folder)
        return
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "token_ids", "x"]
    stored = []
    for k in range(1 + bits.number(2)):
        rows = bits.number(3) if bits.odd() else 1 + bits.number(2)
        columns: dict[str, Any] = {}
        for name in names[: 2 + bits.number(4)]:
            cube: Any = [[[bits.float() for _ in range(dim)] for _ in range(length)] for _ in range(rows)]
            if name == "token_ids":
                cube = [[bits.number(90) for _ in range(length)] for _ in range(rows)]
            if bits.odd() and rows:
                cube[bits.number(rows)] = bits.one([None, [], cube[0][:-1]])
            if bits.odd():
                kind = bits.one([1, 0.5, "a", None, [1], [[]], ["a"], [["a"]], [[1]], {"a": 1}])
                cube = [kind] * rows
            columns[name] = cube
        try:
            table = pa.table(columns)
        except pa.ArrowException:
            return  # no such file can be written
        if bits.odd():
            pq.write_table(table, folder / f"part-{k}.parquet")
            continue
        stored.append({"filename": f"data-{k}.arrow"})
        with pa.OSFile(str(folder / f"data-{k}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    if bits.number(2):
        listed = {"_data_files": stored if not bits.odd() else bits.value()}
        text = json.dumps(listed if not bits.odd() else bits.value()).encode()
        (folder / "state.json").write_bytes(text if not bits.odd() else data[:50])
    _read(folder)


#: What safetensors stores, as NumPy calls it.
_SAVED = ("f4", "f8", "f2", "i8", "i4", "u1", "b1")


def direction(suffix: str) -> Callable[[bytes, Path], None]:
    """A file of a direction."""

    def read(data: bytes, scratch: Path) -> None:
        from dynprobe.protocols._strength import read_direction

        found = read_direction(_written(scratch, f"direction{suffix}", data))
        assert found.ndim == 1
        assert np.isfinite(found).all()

    return read


def where(data: bytes, scratch: Path) -> None:
    """The language of places: what is read is written as it was meant."""
    from dynprobe.probes import Where

    found = Where.parse(data.decode("utf-8", "replace"))
    assert Where.parse(str(found)) == found
    found.resolve_layers(12)


def perturb(data: bytes, scratch: Path) -> None:
    """The language of writes."""
    from dynprobe.probes import Perturb

    text = data.decode("utf-8", "replace")
    if "@" in text:
        return  # names a file
    found = Perturb.parse(text)
    assert Perturb.parse(str(found)) == found
    assert math.isfinite(found.alpha)


def perturb_file(data: bytes, scratch: Path) -> None:
    """A file of writes."""
    from dynprobe.probes._perturb import parse_many

    for found in parse_many("@" + str(_written(scratch, "spec.yaml", data))):
        assert math.isfinite(found.alpha)


def strengths(data: bytes, scratch: Path) -> None:
    """A grid of strengths."""
    from dynprobe.protocols._grid import parse_strengths

    found = parse_strengths(data.decode("utf-8", "replace"))
    assert found
    assert all(map(math.isfinite, found))


def settings(data: bytes, scratch: Path) -> None:
    """A file of settings of a run."""
    from dynprobe.protocols._config import RunConfig, load_config

    found = load_config(_written(scratch, "config.yaml", data))
    RunConfig.build(**{"model": "tiny-llama", **found})


def panel(data: bytes, scratch: Path) -> None:
    """A design."""
    from dynprobe.protocols._panel_config import read_panel

    read_panel(_written(scratch, "panel.yaml", data))


def prompts(suffix: str) -> Callable[[bytes, Path], None]:
    """A file of prompts."""

    def read(data: bytes, scratch: Path) -> None:
        from dynprobe.prompts import read_prompts

        found = read_prompts(_written(scratch, f"prompts{suffix}", data))
        assert found
        assert len({p.prompt_id for p in found}) == len(found)

    return read


def prompts_parquet(data: bytes, scratch: Path) -> None:
    """A table of prompts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dynprobe.prompts import read_prompts

    bits = Bits(data)
    n = bits.number(4)
    columns = {"text": [bits.text() or "a" for _ in range(n)]}
    for name in ("text", "prompt", "prompt_id", "id", "category", "token_ids", "answer", "paraphrase", "continuation"):
        if bits.odd():
            kind = bits.number(4)
            columns[name] = [
                [None, bits.text(), bits.number(9), [bits.number(2**31) - 5 for _ in range(bits.number(4))]][kind]
                for _ in range(n)
            ]
    path = scratch / "prompts.parquet"
    pq.write_table(pa.table(columns), path)
    found = read_prompts(path)
    assert len(found) == n


def items(data: bytes, scratch: Path) -> None:
    """A file of questions."""
    from dynprobe.prompts import load_items

    for found in load_items(_written(scratch, "items.jsonl", data)):
        assert 0 <= found.answer < len(found.choices)


@functools.cache
def _run() -> Path:
    """A small run folder, written once."""
    import pandas as pd

    from dynprobe.runs import RunWriter

    out = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    writer = RunWriter.begin(
        out,
        model_name="tiny",
        config={"alpha": 0.1},
        ident="0123abcd",
        manifest_fields={"batch_plan": [["p0"], ["p1"]]},
    )
    writer.write_table("prompts", pd.DataFrame({"prompt_id": ["p0", "p1"], "text": ["a", "b"], "n_tokens": [3, 3]}))
    writer.write_table("conditions", pd.DataFrame({"condition_id": ["clean"], "label": ["clean"]}))
    for number in (0, 1):
        tokens = pd.DataFrame({"sample_id": f"s{number}", "pos": range(3), "nll": [0.5, 1.5, 2.5]})
        sample = {"sample_id": [f"s{number}"], "prompt_id": [f"p{number}"], "condition_id": ["clean"], "replicate": [0]}
        writer.write_batch(number, {"samples": pd.DataFrame(sample), "tokens": tokens})
    writer.finish({"samples": 2})
    return writer.folder


def _truth() -> dict[str, bytes]:
    return {str(p.relative_to(_run())): p.read_bytes() for p in sorted(_run().rglob("*.parquet"))}


def _look(folder: Path) -> None:
    """Open a run and read all of it; whatever is read must be what was written."""
    from dynprobe.runs import open_run

    run = open_run(folder)
    whole = open_run(_run())
    for name in ("prompts", "samples", "tokens"):
        frame = run.table(name)
        if len(frame) == len(whole.table(name)) and list(frame.columns) == list(whole.table(name).columns):
            assert frame.astype(str).equals(whole.table(name).astype(str)), f"{name} reads other values"
    run.verify()


def _copy(scratch: Path) -> Path:
    folder = scratch / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_run(), folder)
    return folder


def manifest_raw(data: bytes, scratch: Path) -> None:
    """The bytes are the manifest; the doctor must find words for it too."""
    from dynprobe.errors import DynprobeError
    from dynprobe.runs import examine

    folder = _copy(scratch)
    (folder / "manifest.json").write_bytes(data)
    try:
        _look(folder)
    except DynprobeError:
        examine(folder)
        raise


def manifest(data: bytes, scratch: Path) -> None:
    """A manifest in which some fields were changed, with its seal or without."""
    bits = Bits(data)
    content = json.loads((_run() / "manifest.json").read_text())
    for _ in range(1 + bits.number(3)):
        place: Any = content
        while True:
            key = bits.one(list(place)) if isinstance(place, dict) and place else None
            if isinstance(place, list) and place:
                key = bits.number(len(place))
            if key is None:
                break
            if isinstance(place[key], dict | list) and place[key] and not bits.odd():
                place = place[key]
                continue
            if bits.odd() and isinstance(place, dict):
                del place[key]
            else:
                place[key] = bits.value()
            break
    if bits.odd() and isinstance(content, dict):
        for name in [k for k in content if "seal" in k or "digest" in k]:
            del content[name]
    manifest_raw(json.dumps(content).encode(), scratch)


def part(data: bytes, scratch: Path) -> None:
    """A run one of whose files has other bytes at some places: it must say so, or read the same."""
    from dynprobe.runs import examine

    bits = Bits(data)
    folder = _copy(scratch)
    name = bits.one(sorted(_truth()))
    content = bytearray(_truth()[name])
    for _ in range(1 + bits.number(4)):
        at = bits.number(2**31) % max(len(content), 1)
        if bits.odd():
            del content[at:]
        elif content:
            content[at] ^= 1 + bits.number(255)
    (folder / name).write_bytes(bytes(content))
    changed = bytes(content) != _truth()[name]
    try:
        _look(folder)
    finally:
        if changed:
            assert not examine(folder).healthy, "the doctor calls a damaged run healthy"
    assert not changed, "a damaged file was read and verified"


def sidecar(data: bytes, scratch: Path) -> None:
    """An export whose description was changed."""
    from dynprobe.runs import import_export

    bits = Bits(data)
    folder, out = scratch / "export", scratch / "imported"
    for path in (folder, out):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(_export(), folder)
    (path,) = [p for p in folder.glob("*.json") if "format" in p.read_text()]
    content = json.loads(path.read_text())
    for _ in range(1 + bits.number(3)):
        place: Any = content
        for _ in range(bits.number(5)):
            inner = [
                v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, dict | list) and v
            ]
            if not inner:
                break
            place = bits.one(inner)
        if isinstance(place, dict) and place:
            key = bits.one(list(place))
            if bits.odd():
                del place[key]
            else:
                place[key] = bits.value()
        elif isinstance(place, list) and place:
            place[bits.number(len(place))] = bits.value()
    path.write_text(json.dumps(content))
    import_export(folder, out)


@functools.cache
def _export() -> Path:
    from dynprobe.runs import export_run, open_run

    folder = Path(tempfile.mkdtemp(prefix="fuzz-export-")) / "export"
    export_run(open_run(_run()), "csv", folder)
    return folder


def model_folder(data: bytes, scratch: Path) -> None:
    """A folder with a strange configuration, index, or header of weights."""
    from dynprobe.models._folder import inspect_folder, stored_dtype

    bits = Bits(data)
    folder = scratch / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config: Any = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    if bits.odd():
        config[bits.one(["model_type", "transformers_weights", "dtype", "auto_map", "architectures"])] = bits.value()
    text = json.dumps(config if not bits.odd() else bits.value()).encode()
    (folder / "config.json").write_bytes(text if not bits.odd() else bits.data[:200])
    header: Any = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    if bits.odd():
        header["w"][bits.one(["dtype", "shape", "data_offsets"])] = bits.value()
    if bits.odd():
        header = bits.value()
    said = json.dumps(header).encode()
    length = len(said) if not bits.odd() else bits.one([0, 2**63, 2**64 - 1, len(said) + 8])
    weights = struct.pack("<Q", length) + said + b"\x00" * 8
    if bits.odd():
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": bits.value()} if not bits.odd() else bits.value())
        )
    else:
        (folder / "model.safetensors").write_bytes(weights)
    found = inspect_folder(folder)
    stored_dtype(found)


def gguf_raw(data: bytes, scratch: Path) -> None:
    """The bytes are a GGUF file."""
    from dynprobe.models import load_model

    load_model(str(_written(scratch, "model.gguf", data)))


def attractor_raw(data: bytes, scratch: Path) -> None:
    """The bytes are a stored attractor layer."""
    from dynprobe.controllers import AttractorLayer

    AttractorLayer.load(_written(scratch, "layer.safetensors", data))


def attractor(data: bytes, scratch: Path) -> None:
    """A stored attractor layer with strange settings."""
    import torch
    from safetensors.torch import save_file

    from dynprobe.controllers import AttractorLayer

    bits = Bits(data)
    path = scratch / "layer.safetensors"
    meta = {
        name: json.dumps(bits.value()) if not bits.odd() else bits.text() for name in ("settings", "thetas", "made_for")
    }
    if not bits.odd():
        meta["settings"] = json.dumps(
            {bits.one(["slots", "decay", "eta", "theta", "layers", bits.text()]): bits.value(1)}
        )
    names = ["centre/resid_post/1", "resid_post/1/slots", bits.text() or "a"]
    save_file({bits.one(names): torch.zeros(bits.number(3), 4)}, path, meta)
    AttractorLayer.load(path)


def calibration(data: bytes, scratch: Path) -> None:
    """A calibration folder whose header was changed."""
    from dynprobe.probes import load_calibration

    bits = Bits(data)
    folder = scratch / "calibration"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_calibration(), folder)
    (path,) = folder.glob("*.json")
    if bits.odd():
        path.write_bytes(bits.data)
    else:
        content = json.loads(path.read_text())
        for _ in range(1 + bits.number(2)):
            content[bits.one(list(content))] = bits.value()
        path.write_text(json.dumps(content))
    load_calibration(folder)


@functools.cache
def _calibration() -> Path:
    import dynprobe as dp

    folder = Path(tempfile.mkdtemp(prefix="fuzz-calibration-")) / "calibration"
    found = dp.calibrate("tiny-llama")
    return Path(found.save(folder) or folder)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "where": where,
    "perturb": perturb,
    "perturb_file": perturb_file,
    "strengths": strengths,
    "settings": settings,
    "panel": panel,
    "prompts_txt_raw": prompts(".txt"),
    "prompts_jsonl_raw": prompts(".jsonl"),
    "prompts_parquet_raw": prompts(".parquet"),
    "prompts_parquet": prompts_parquet,
    "items_raw": items,
    "npz_raw": raw_trajectory(".npz"),
    "npz": npz,
    "npy_raw": raw_trajectory(".npy"),
    "pt_raw": raw_trajectory(".pt"),
    "safetensors_raw": raw_trajectory(".safetensors"),
    "safetensors": safetensors,
    "parquet_raw": raw_trajectory(".parquet"),
    "parquet": parquet,
    "activations": activations,
    "direction_npy_raw": direction(".npy"),
    "direction_safetensors_raw": direction(".safetensors"),
    "manifest_raw": manifest_raw,
    "manifest": manifest,
    "part": part,
    "sidecar": sidecar,
    "model_folder": model_folder,
    "gguf_raw": gguf_raw,
    "attractor_raw": attractor_raw,
    "attractor": attractor,
    "calibration": calibration,
}

_RUNS = ("dynprobe.runs._manifest", "dynprobe.runs._damage", "dynprobe.runs._damage_files",
         "dynprobe.runs._damage_manifest", "dynprobe.runs._run", "dynprobe.runs._tables")  # fmt: skip
_TRAJECTORY = ("dynprobe.runs._trajectory_file", "dynprobe.runs._trajectory_raw", "dynprobe.runs._trajectory_checks",
               "dynprobe.runs._trajectory_layers")  # fmt: skip
_DUMPS = (*_TRAJECTORY, "dynprobe.runs._trajectory_dumps")
_ARRAYS = (*_TRAJECTORY, "dynprobe.runs._trajectory_arrays")
_PROMPTS = ("dynprobe.prompts._read", "dynprobe.prompts._prompt", "dynprobe.prompts._items")

#: Modules whose branches guide the inputs.
MODULES: dict[str, tuple[str, ...]] = {
    "where": ("dynprobe.probes._where", "dynprobe.probes._grammar"),
    "perturb": ("dynprobe.probes._perturb", "dynprobe.probes._perturb_values", "dynprobe.probes._grammar"),
    "perturb_file": ("dynprobe.probes._perturb", "dynprobe.probes._perturb_values", "dynprobe._yaml"),
    "strengths": ("dynprobe.protocols._grid",),
    "settings": ("dynprobe.protocols._config", "dynprobe._yaml"),
    "panel": ("dynprobe.protocols._panel_config", "dynprobe._yaml"),
    **dict.fromkeys(
        ("prompts_txt_raw", "prompts_jsonl_raw", "prompts_parquet_raw", "prompts_parquet", "items_raw"), _PROMPTS
    ),
    **dict.fromkeys(("npz_raw", "npz", "safetensors_raw", "safetensors"), _ARRAYS),
    **dict.fromkeys(("npy_raw", "pt_raw", "activations"), _DUMPS),
    **dict.fromkeys(("parquet_raw", "parquet"), (*_DUMPS, "dynprobe.runs._trajectory_table")),
    **dict.fromkeys(("direction_npy_raw", "direction_safetensors_raw"), ("dynprobe.protocols._strength",)),
    **dict.fromkeys(("manifest_raw", "manifest", "part"), _RUNS),
    "sidecar": (
        "dynprobe.runs._export_import",
        "dynprobe.runs._export_sidecar",
        "dynprobe.runs._export_formats",
        "dynprobe.runs._export_tables",
    ),
    "model_folder": ("dynprobe.models._folder",),
    "gguf_raw": ("dynprobe.models._gguf", "dynprobe.models._load"),
    **dict.fromkeys(
        ("attractor_raw", "attractor"),
        ("dynprobe.controllers.attractor._stored", "dynprobe.controllers.attractor._settings"),
    ),
    "calibration": ("dynprobe.probes._calibration",),
}


def load(target: str) -> None:
    """Import the modules of a target."""
    for name in MODULES[target]:
        importlib.import_module(name)


def seeds(target: str) -> list[bytes]:
    """Right inputs of a target, to begin with."""
    return [
        s if isinstance(s, bytes) else s.encode()
        for s in _SEEDS.get(target, lambda: [bytes(range(64)), b"\x00" * 64, b"\x07" * 64])()
    ]


def _trajectory_file(suffix: str) -> list[bytes]:
    import torch
    from safetensors.torch import save_file

    states = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        if suffix == ".npz":
            np.savez(path, states=states, dims=np.array(["iter", "pos", "dim"]))
        elif suffix == ".npy":
            np.save(path, states)
        elif suffix == ".pt":
            torch.save({"states": torch.as_tensor(states)}, path)
        elif suffix == ".safetensors":
            save_file({"states": torch.as_tensor(states)}, path, {"dims": '["iter","pos","dim"]'})
        else:
            import pandas as pd

            rows = [
                {"sample": "a", "pos": p, "iter": i, "vec": states[i, p].tolist()} for i in range(3) for p in range(2)
            ]
            pd.DataFrame(rows).to_parquet(path)
        return [path.read_bytes()]


def _direction(suffix: str) -> list[bytes]:
    import torch
    from safetensors.torch import save

    if suffix == ".safetensors":
        return [save({"direction": torch.arange(4.0)})]
    file = io.BytesIO()
    np.save(file, np.arange(4.0))
    return [file.getvalue()]


def _prompts_parquet() -> list[bytes]:
    import pandas as pd

    file = io.BytesIO()
    pd.DataFrame({"text": ["a b", "c"], "category": ["x", "y"]}).to_parquet(file)
    return [file.getvalue()]


def _gguf() -> list[bytes]:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_embedding_length(8)
        writer.add_context_length(16)
        writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [path.read_bytes()]


_SPECS = ["layers=6:9+20,component=mlp-out", "layers=50%,positions=last", "blocks.6.hook_resid_post", "iterations=0:-1",
          "phase=decode,slots=3", "positions=1:", "all", "layers=mid"]  # fmt: skip
_SEEDS: dict[str, Callable[[], list[Any]]] = {
    "where": lambda: _SPECS,
    "perturb": lambda: [f"alpha=0.1,{s}" for s in _SPECS] + ["0.1", "alpha=-1e-3,scale=coordstd,kind=dropout,seed=3"],
    "perturb_file": lambda: ["- alpha: 0.1\n  layers: 6:9\n- alpha: 1\n", "alpha: 0.2\npositions: '1:'\n", "alpha=0.1"],
    "strengths": lambda: ["0.01:3:16", "0.1,0.3,1", "1", "0.1+0.2"],
    "settings": lambda: ["perturb: alpha=0.1\nlimit: 3\nmax-new-tokens: 8\n", "seed: 1\nstates: true\n"],
    "panel": lambda: ["models: [tiny-llama]\nalphas: [0, 0.1]\nseeds: [0]\n", "models:\n  - a-{b,c}\nlimit: 2\n"],
    "prompts_txt_raw": lambda: ["The sea was\n\nOnce\n", "\ufeffa\r\nb"],
    "prompts_jsonl_raw": lambda: ['{"text": "a", "category": "x"}\n{"prompt": "b", "token_ids": [1, 2]}\n'],
    "prompts_parquet_raw": _prompts_parquet,
    "items_raw": lambda: ['{"question": "Two and two make", "choices": [" four", " five"], "answer": 0}\n'],
    **{f"{s}_raw": functools.partial(_trajectory_file, f".{s}") for s in ("npz", "npy", "pt", "safetensors")},
    "parquet_raw": functools.partial(_trajectory_file, ".parquet"),
    "direction_npy_raw": lambda: _direction(".npy"),
    "direction_safetensors_raw": lambda: _direction(".safetensors"),
    "manifest_raw": lambda: [(_run() / "manifest.json").read_bytes()],
    "gguf_raw": _gguf,
    "attractor_raw": lambda: _direction(".safetensors"),
}  # fmt: skip
