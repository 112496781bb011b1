"""What a folder holds: is it a model, are its weights whole, and may they be opened.

The checks here read names and headers only, so they cost milliseconds and run before anything heavy is imported. They
refuse what would fail later with a worse message, or succeed with wrong numbers: a folder without a configuration, an
index whose shards are not all there, a file cut short in a download, a git-LFS pointer in place of weights, and weights
that only exist as pickles (which can run code when they are opened).
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dynprobe.errors import ModelError, ModelNotFoundError

__all__ = ["ModelFolder", "inspect_folder", "is_weight_file", "stored_dtype"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tokenizer_config.json",
)
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHT_NAME = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that passed inspection.

    Attributes:
        path: the folder.
        config: the parsed ``config.json``.
        weight_files: names of the files that will be opened, in order.
        is_bin: whether these are pickles (``.bin``) and not safetensors.
        has_tokenizer: whether any tokenizer file is there.
        record: the parsed ``dynprobe-model.json`` of a converted model, else empty.
    """

    path: Path
    config: dict[str, Any]
    weight_files: tuple[str, ...]
    is_bin: bool
    has_tokenizer: bool
    record: dict[str, Any]


def is_weight_file(name: str) -> bool:
    """Tell whether a file name is one under which transformers looks for weights (``variant`` files are not).

    Example:
        >>> [is_weight_file(n) for n in ("model-00001-of-00002.safetensors", "model.fp16.safetensors", "onnx/m.bin")]
        [True, False, False]
    """
    return _WEIGHT_NAME.fullmatch(name) is not None


def inspect_folder(path: Path, *, allow_bin: bool = False) -> ModelFolder:
    """Check that ``path`` is a folder with a complete model in it.

    Args:
        path: the folder.
        allow_bin: accept pickled weights where there are no safetensors.

    Raises:
        ModelNotFoundError: no ``config.json``; the message lists what was found and what to type.
        ModelError: the configuration or the weights are damaged, incomplete, or pickles without ``allow_bin``.
    """
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(_no_model_message(path))
    config = _read_json(path / "config.json")
    record = _read_json(path / "dynprobe-model.json") if (path / "dynprobe-model.json").is_file() else {}
    safetensors = _safetensors_files(path, config)
    bins = () if safetensors else _listed(path, "pytorch_model.bin", "pytorch_model.bin.index.json")
    if not safetensors and not bins:
        raise ModelError(
            f"{path} has a config.json but no weights (looked for model.safetensors and model.safetensors.index.json; "
            f"found {_listing(path)}). Download the weights too, for example: "
            f"hf download ORGANISATION/NAME --local-dir {path}"
        )
    if bins and not allow_bin:
        raise ModelError(
            f"{path} has its weights only as pickles ({', '.join(bins)}), and opening a pickle can run code. "
            "If you trust where they come from, type --allow-bin (they are then opened with weights_only=True and "
            "their hash is recorded); better, convert them once to model.safetensors."
        )
    for name in (*safetensors, *bins):
        _refuse_pointer(path / name)
    for name in safetensors:
        _check_safetensors(path / name)
    tokenizer = any((path / name).is_file() for name in _TOKENIZER_FILES)
    return ModelFolder(path, config, safetensors or bins, bool(bins), tokenizer, record)


def stored_dtype(folder: ModelFolder) -> str | None:
    """Return the dtype most numbers of the checkpoint are stored in, or None where the headers do not say (``.bin``).

    This is what the numbers were before :func:`dynprobe.models.load_model` cast them.
    """
    if folder.is_bin:
        declared = folder.config.get("dtype") or folder.config.get("torch_dtype")
        return str(declared) if declared else None
    counts: Counter[str] = Counter()
    for name in folder.weight_files:
        for entry in _safetensors_header(folder.path / name).values():
            counts[entry["dtype"]] += prod(entry["shape"])
    if not counts:
        return None
    top = counts.most_common(1)[0][0]
    return _DTYPE_NAMES.get(top, top.lower())


def _safetensors_files(path: Path, config: dict[str, Any]) -> tuple[str, ...]:
    explicit = config.get("transformers_weights")
    if explicit is None:
        return _listed(path, "model.safetensors", "model.safetensors.index.json")
    # transformers opens whatever this key names, a pickle included, so it is checked as strictly as a default name.
    if not isinstance(explicit, str) or Path(explicit).name != explicit:
        raise ModelError(f"{path / 'config.json'} names weights outside its folder: transformers_weights={explicit!r}.")
    if explicit.endswith(".safetensors.index.json"):
        return _listed(path, "", explicit)
    if explicit.endswith(".safetensors"):
        return _listed(path, explicit, "")
    raise ModelError(
        f"{path / 'config.json'} asks for weights that are not safetensors: transformers_weights={explicit!r}. "
        "Remove the key, or convert the file to model.safetensors."
    )


def _listed(path: Path, single: str, index: str) -> tuple[str, ...]:
    """Names of the weight files: the single file, else every shard the index names (all must be there)."""
    if single and (path / single).is_file():
        return (single,)
    if not index or not (path / index).is_file():
        return ()
    mapping = _read_json(path / index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ModelError(f"{path / index} has no weight_map; the index is damaged. Download the model again.")
    shards = tuple(sorted({str(name) for name in mapping.values()}))
    strange = [name for name in shards if Path(name).name != name]
    if strange:
        raise ModelError(f"{path / index} names a shard outside its folder: {strange[0]!r}.")
    missing = [name for name in shards if not (path / name).is_file()]
    if missing:
        raise ModelError(
            f"{path} is incomplete: {len(missing)} of {len(shards)} weight files are missing ({missing[0]} …). "
            "Download the model again; a started download is continued."
        )
    return shards


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as handle:
        head = handle.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a git-LFS pointer, not the weights. Type: git -C {path.parent} lfs pull")


def _safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= size - 8:
            raise ModelError(f"{path} is not a safetensors file, or is cut short ({size:,} bytes). Download it again.")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError) as exc:
            raise ModelError(f"{path} has a damaged safetensors header ({exc}). Download it again.") from exc
    if not isinstance(header, dict):
        raise ModelError(f"{path} has a damaged safetensors header (no mapping of tensors). Download it again.")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_entry(entry):
            raise ModelError(f"{path} has a damaged safetensors header (at tensor {name[:80]!r}). Download it again.")
    return header


def _is_entry(entry: Any) -> bool:
    """Tell whether a header's entry has the form that every reader relies on."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, *offsets)):
        return False
    return bool(offsets[0] <= offsets[1])


def _check_safetensors(path: Path) -> None:
    header = _safetensors_header(path)
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
    wanted = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if (found := path.stat().st_size) != wanted:
        raise ModelError(
            f"{path} should be {wanted:,} bytes long by its own header but is {found:,}; the download was cut short. "
            "Download it again."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as exc:
        raise ModelError(f"{path} cannot be read as JSON ({exc}). Download the model again.") from exc
    if not isinstance(content, dict):
        raise ModelError(f"{path} should hold a JSON object but holds a {type(content).__name__}.")
    return content


def _listing(path: Path, limit: int = 6) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    shown = ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
    return shown or "nothing, it is empty"


def _no_model_message(path: Path) -> str:
    message = f"{path} is a folder, but no model: it has no config.json (found {_listing(path)})."
    ggufs = sorted(path.glob("*.gguf"))
    inside = sorted(entry.parent for entry in path.glob("*/config.json"))
    snapshots = sorted(entry.parent for entry in path.glob("snapshots/*/config.json"))
    if (path / "adapter_config.json").is_file():
        return (
            f"{message} It holds a PEFT adapter: merge it into its base model first "
            "(peft: model.merge_and_unload().save_pretrained(FOLDER)) and type --model FOLDER."
        )
    if ggufs:
        return f"{message} Type the file itself: --model {ggufs[0]}"
    if snapshots or inside:
        return f"{message} Did you mean {str((snapshots or inside)[0])!r}?"
    return (
        f"{message} Type --model with a folder that holds config.json and model.safetensors, a .gguf file, "
        "a hub id such as gpt2, or smollm2-135m."
    )
