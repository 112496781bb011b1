"""States that others dumped: torch and NumPy files, SAELens's cached activations, folders of speculators, objects.

* ``.pt`` / ``.pth`` / ``.bin``: a tensor, a list of tensors, or a dict of tensors. Such a file is a pickle; it is read
  only where the user says so, and only with ``weights_only=True``, which runs no code in it.
* ``.npy``: one array, whose axes the user names.
* **SAELens** ``CacheActivationsRunner``: a folder with ``dataset_info.json`` and ``*.arrow``, or Parquet from the hub.
  One row per context, a column per hook (``blocks.6.hook_resid_post``: ``Array2D`` ``[context, d_in]``) and
  ``token_ids``; https://decoderesearch.github.io/SAELens/ and its ``cache_activations_runner.py``. Nothing else of the
  dataset is needed, so its library is not either.
* **speculators** ``data_generation_offline.py``: a folder of ``hs_0.safetensors``, one text each;
  https://docs.vllm.ai/projects/speculators/
* an ``ActivationCache`` of TransformerLens, or any mapping or list of tensors, in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dynprobe.errors import UsageError
from dynprobe.runs._array_file import load_npy
from dynprobe.runs._trajectory_layers import Reading, from_hooks, from_named, from_stack, from_text, hook_depth
from dynprobe.runs._trajectory_raw import Raw, refuse

__all__ = ["MEMORY", "is_activations", "read_activations", "read_folder", "read_npy", "read_object",
           "read_pt"]  # fmt: skip

#: Stands for the file where states came from memory.
MEMORY = Path("memory")
_TEXT = re.compile(r"hs_(\d+)\.safetensors$")


def read_pt(path: Path, reading: Reading) -> Raw:
    """Read a torch dump.

    Raises:
        UsageError: It may not be read, or holds more than tensors.
    """
    raw = Raw(str(path))
    if not reading.allow_bin:
        raise UsageError(
            f"{path} is pickled, and reading a pickle runs the code in it; --allow-bin reads tensors from it with "
            "weights_only=True. Or store the arrays: np.savez('states.npz', states=…, dims=[…])"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises whatever a damaged file makes it meet
        refuse(
            raw, f"it holds more than tensors ({(str(error).splitlines() or [type(error).__name__])[0]})",
            "store a dict, a list or a tensor: torch.save(dict(cache.cache_dict), file), or "
            "torch.save([s.cpu() for s in out.hidden_states], file)",
        )  # fmt: skip
    return _fill(raw, found, reading)


def read_npy(path: Path, reading: Reading) -> Raw:
    """Read one NumPy array of stacked layers; the user names its axes."""
    raw = Raw(str(path))
    array = load_npy(path)
    if reading.dims is None:
        axes = ",".join(("layer", "batch", "pos", "dim")[: array.ndim - 1]) if array.ndim > 1 else "layer"
        refuse(
            raw, f"it has the shape {list(array.shape)}, and nothing says which axis is which",
            f"name the axes in their order, such as --dims {axes},dim (out of layer, batch, pos, dim)",
        )  # fmt: skip
    return _fill(raw, np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))), reading)


def read_object(found: Any, reading: Reading, extra: Mapping[str, Any]) -> Raw:
    """Read an ``ActivationCache``, a mapping, a list or a tensor in memory.

    Args:
        found: The object.
        reading: What it does not say.
        extra: ``token_ids``, ``valid``, ``ids``, ``meta``, where they are known.
    """
    raw = Raw("the cache")
    named = getattr(found, "cache_dict", found)
    if getattr(found, "has_batch_dim", True) is False:
        raw.assumed.append("batch: the cache has no batch dimension; one sample")
    _fill(raw, dict(named.items()) if hasattr(named, "items") else named, reading)
    for name in ("token_ids", "valid"):
        if extra.get(name) is not None:
            setattr(raw, name, np.atleast_2d(torch.as_tensor(extra[name]).detach().cpu().numpy()))
    raw.ids = [str(i) for i in extra["ids"]] if extra.get("ids") is not None else raw.ids
    raw.meta = dict(extra.get("meta") or {})
    return raw


def read_folder(path: Path, reading: Reading) -> Raw:
    """Read a folder: of speculators' files, or of a dataset of activations.

    Raises:
        UsageError: It is neither.
    """
    texts = sorted((f for f in path.iterdir() if _TEXT.match(f.name)), key=lambda f: int(_TEXT.match(f.name)[1]))  # type: ignore[index]
    if texts:
        return _read_texts(path, texts, reading)
    arrow = [f for f in sorted(path.glob("*.arrow")) if not f.name.startswith("cache-")]
    parquet = [f for f in sorted(path.rglob("*.parquet")) if is_activations(f)]
    if not arrow and not parquet:
        if (path / "manifest.json").is_file():
            raise UsageError(f"{path} is a run already; type: dynprobe show {path}")
        raise UsageError(
            f"{path} is a folder without states; name a trajectory file, an export (with dynprobe.json), a folder of "
            "hs_0.safetensors …, or a dataset of activations (*.arrow)"
        )
    order = path / "state.json"
    if arrow and order.is_file():
        arrow = _in_order(path, order)
    return read_activations(path, arrow or parquet, reading)


def _in_order(path: Path, order: Path) -> list[Path]:
    """The files of a dataset as its ``state.json`` lists them; none outside its folder."""
    try:
        return [path / Path(e["filename"]).name for e in json.loads(order.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{order} does not list the dataset's files ({error}); copy the dataset again") from error


def is_activations(path: Path) -> bool:
    """Whether a Parquet file has columns of hooks."""
    try:
        return any(hook_depth(name) is not None for name in pq.read_schema(path).names)
    except (pa.ArrowException, OSError, ValueError):  # also a name that is no UTF-8
        return False


def read_activations(path: Path, files: Sequence[Path], reading: Reading) -> Raw:
    """Read a dataset of cached activations: a row per context, a column per hook."""
    raw = Raw(str(path))
    tables = [_read_table(file) for file in files]
    try:
        table = pa.concat_tables(tables)
        names = table.column_names
    except (pa.ArrowException, ValueError) as error:
        refuse(raw, f"its files have other columns than each other ({error})", "import them apart")
    if len(set(names)) < len(names):
        refuse(raw, f"a column stands twice among {', '.join(names)}", "store every column once")
    hooks = [name for name in table.column_names if hook_depth(name) is not None]
    if not hooks:
        refuse(
            raw, f"no column is a state between blocks, only {', '.join(table.column_names)}",
            "cache hooks such as blocks.6.hook_resid_post",
        )  # fmt: skip
    if not table.num_rows:
        refuse(raw, "the dataset has no rows", "cache at least one context")
    from_hooks(raw, {name: _cube(raw, name, table[name]) for name in hooks})
    if "token_ids" in table.column_names:
        raw.token_ids = _matrix(raw, "token_ids", table["token_ids"])
    raw.remarks += [f"{name} is not read" for name in table.column_names if name not in (*hooks, "token_ids")]
    return raw


def _fill(raw: Raw, found: Any, reading: Reading) -> Raw:
    if isinstance(found, Mapping):
        if not from_named(raw, found, reading):
            refuse(
                raw, f"no tensor is a state of a layer, only {', '.join(map(str, list(found)[:8])) or 'nothing'}",
                "store hidden_states, or hooks such as blocks.0.hook_resid_pre",
            )  # fmt: skip
    elif isinstance(found, list | tuple | torch.Tensor | np.ndarray):
        from_stack(raw, found, reading)
    else:
        refuse(raw, f"it holds a {type(found).__name__}", "store a dict, a list or a tensor of states")
    return raw


def _read_texts(path: Path, files: Sequence[Path], reading: Reading) -> Raw:
    """Texts of several lengths, one file each, padded on the right."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    out, rows = Raw(str(path)), []
    for file in files:
        one = Raw(str(file))
        try:
            found = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} is no .safetensors file ({error})") from error
        if not {"hidden_states", "token_ids"} <= set(found) or found["hidden_states"].ndim != 3:
            refuse(
                one, f"it holds {', '.join(found)}", "hidden_states [seq, layers, dim] and token_ids [seq] are needed"
            )
        from_text(one, found["hidden_states"], found["token_ids"], reading)
        rows.append(one)
    found = [row.states for row in rows if row.states is not None]
    shapes = {(x.shape[0], x.shape[3], x.dtype) for x in found}
    if len(shapes) > 1:
        refuse(out, f"the files differ in layers, width or dtype: {sorted(map(str, shapes))}", "import them apart")
    lengths = [int(x.shape[2]) for x in found]
    length, first = max(lengths), rows[0]
    out.layers, out.dims, out.iter, out.stage = True, first.dims, first.iter, first.stage
    out.states = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2])) for x in found], dim=1)
    out.token_ids = np.full((len(rows), length), -1)
    out.valid = np.arange(length) < np.array(lengths)[:, None]
    for i, row in enumerate(rows):
        out.token_ids[i, : lengths[i]] = row.token_ids
    out.ids = [file.stem for file in files]
    return out


def _read_table(file: Path) -> pa.Table:
    try:
        if file.suffix == ".parquet":
            return pq.read_table(file)
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({error}); copy the dataset again") from error


def _of_lists(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _storage(column: pa.ChunkedArray) -> pa.Array:
    """The lists of an ``Array2D``, whether or not its library is loaded."""
    array = column.combine_chunks()
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return array.storage if isinstance(array.type, pa.ExtensionType) else array


def _matrix(raw: Raw, name: str, column: pa.ChunkedArray) -> np.ndarray:
    array = _storage(column)
    if not _of_lists(array.type):
        refuse(raw, f"{name} has the type {array.type}", "store a list of numbers per context")
    flat = array.flatten()
    if array.null_count or len(flat) % len(array):
        refuse(raw, f"{name} has rows of different lengths", "cache contexts of one size")
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(array), -1)


def _cube(raw: Raw, name: str, column: pa.ChunkedArray) -> torch.Tensor:
    """``[context, pos, d_in]``."""
    outer = _storage(column)
    inner = outer.flatten() if _of_lists(outer.type) else None
    flat = inner.flatten() if inner is not None and _of_lists(inner.type) else None
    if inner is None or flat is None or not pa.types.is_floating(flat.type):
        refuse(raw, f"{name} has the type {outer.type}", "store floats as Array2D [context, d_in]")
    missing = outer.null_count or inner.null_count or flat.null_count or not len(inner)
    if missing or len(inner) % len(outer) or len(flat) % len(inner):
        refuse(raw, f"{name} has contexts of different lengths, or missing numbers", "cache contexts of one size")
    array = np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(outer), len(inner) // len(outer), -1)
    return torch.from_numpy(np.require(array, requirements=("C", "W")))
