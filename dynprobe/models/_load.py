"""From a source to a model in memory, together with the facts a run has to record about it.

Loading refuses what would give wrong numbers without a sound: weights the checkpoint does not hold (transformers fills
them with random numbers and goes on), a converted folder whose bytes are not those that were checked, and code that was
not asked for. Everything is loaded from a folder on this machine with ``local_files_only``; fetching is a step of its
own, before.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dynprobe.errors import ModelError, UsageError, did_you_mean
from dynprobe.models._cache import Progress, report
from dynprobe.models._folder import ModelFolder, inspect_folder, stored_dtype
from dynprobe.models._gguf import converted_folder, quiet_transformers
from dynprobe.models._hash import combine_file_hashes, file_sha256, module_hash
from dynprobe.models._hub import cached_snapshot, download
from dynprobe.models._hub_errors import redact
from dynprobe.models._known import fetch
from dynprobe.models._loader_class import model_class, remote_code
from dynprobe.models._quantize import quantization_config, quantization_facts, quantized_hashes, true_size
from dynprobe.models._source import ModelSource, resolve

__all__ = ["load_model", "local_folder", "weights_hash"]

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "float64": "float64",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "auto": "auto",
}


def load_model(
    source: ModelSource | str | Path,
    *,
    dtype: Any = "float32",
    device: Any = "auto",
    device_map: Any = None,
    offload_folder: str | Path | None = None,
    quantization: Any = None,
    attn_implementation: str | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Load a model and its tokenizer, in evaluation mode.

    Args:
        source: what :func:`dynprobe.models.resolve` returned, or a name to resolve.
        dtype: ``float32`` (the default, whatever the checkpoint says), ``bfloat16``, ``float16``, ``float64``, a
            ``torch.dtype``, or ``auto`` for the checkpoint's own.
        device: ``auto`` (the first CUDA device if there is one, else the CPU), or any torch device.
        device_map: how to spread the model over devices (needs ``accelerate``); then ``device`` is not used.
        offload_folder: where the parts that ``device_map`` puts on ``"disk"`` are kept.
        quantization: ``int8``, ``nf4``, ``fp4`` (bitsandbytes), ``torchao-int8wo``, or a configuration object of
            transformers; None takes the weights as they are stored.
        attn_implementation: ``eager``, ``sdpa``, … ; None leaves the choice to transformers.
        progress: called with one line of text per slow step.

    Returns:
        The model, its tokenizer (None where the folder has none), and the facts: per-file sha256 and combined hash of
        the weights, commit, versions, number of parameters, original dtype, tokenizer ids, notes.

    Raises:
        ModelError: the model cannot be loaded as asked; the message says what to type.

    Example:
        >>> load_model("no/such/folder/here")
        Traceback (most recent call last):
        ...
        dynprobe.errors.ModelNotFoundError: No model at 'no/such/folder/here': ...
    """
    wanted_dtype = _dtype_name(dtype)
    if not isinstance(source, ModelSource):
        source = resolve(source)
    path = local_folder(source, progress=progress)
    folder = inspect_folder(path, allow_bin=source.allow_bin)
    hashes = _verified_hashes(folder)
    scripts = remote_code(folder, source)
    import torch
    import transformers

    place = torch.device(_device(torch, device)) if device_map is None else None
    auto_class = model_class(transformers, folder, source)
    options: dict[str, Any] = {
        "dtype": wanted_dtype if wanted_dtype == "auto" else getattr(torch, wanted_dtype),
        "local_files_only": True,
        "use_safetensors": not folder.is_bin,
        "weights_only": True,
        "trust_remote_code": source.trust_remote_code,
        "output_loading_info": True,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if device_map is not None:
        options["device_map"] = device_map
    if offload_folder is not None:
        options["offload_folder"] = str(offload_folder)
    quantizing = quantization_config(quantization, options["dtype"])
    if quantizing is not None:
        options["quantization_config"] = quantizing
        if place is not None:  # quantised weights are put in place while they are read, and some cannot be moved
            options["device_map"], place = {"": place}, None
    notes = list(source.notes) + [str(note) for note in folder.record.get("notes", [])]
    report(progress, f"loading {source.display_name}")
    with quiet_transformers():
        try:
            model, info = auto_class.from_pretrained(folder.path, **options)
            if place is not None:
                model = model.to(place)
        except Exception as exc:
            raise _load_error(exc, source, folder) from exc
        notes += _check_loading(info, source, auto_class)
        tokenizer, tokenizer_notes = _tokenizer(transformers, folder, source)
    model.eval()
    notes += tokenizer_notes
    if tokenizer is not None and len(tokenizer) > (rows := _embedding_rows(model)) > 0:
        notes.append(f"the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} rows")
    quantized = quantization_facts(model, quantization)
    hashes = quantized_hashes(hashes, quantized)
    facts = {
        "model_id": source.weights_id,
        "display_name": source.display_name,
        "kind": source.kind,
        "location": source.location,
        "folder": str(folder.path),
        "commit": source.revision,
        "requested_revision": source.requested_revision,
        "weights_files": hashes,
        "weights_hash": combine_file_hashes(hashes),
        "weights_format": "bin" if folder.is_bin else "safetensors",
        "gguf_sha256": folder.record.get("gguf_sha256"),
        "remote_code": scripts,
        "model_class": type(model).__name__,
        "model_type": folder.config.get("model_type"),
        "n_parameters": sum(p.numel() for p in model.parameters()) if quantized is None else true_size(model),
        "quantization": quantized,
        "original_dtype": stored_dtype(folder),
        "dtype": str(next((p.dtype for p in model.parameters() if p.is_floating_point()), "")).removeprefix("torch."),
        "device": str(getattr(model, "device", place)),
        "device_map": None if device_map is None else str(device_map),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "tokenizer": _tokenizer_facts(tokenizer),
        "versions": {
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "safetensors": version("safetensors"),
            "python": platform.python_version(),
        },
        "notes": notes,
    }
    return model, tokenizer, facts


def local_folder(source: ModelSource, *, progress: Progress | None = None) -> Path:
    """Return the folder a source is loaded from, fetching or converting it first if need be."""
    if source.kind == "known":
        return fetch(source.display_name, progress=progress)
    if source.kind == "gguf":
        return converted_folder(Path(source.location), progress=progress)
    if source.kind == "folder":
        return Path(source.location)
    if not source.local_files_only:
        report(progress, f"downloading {source.location} at commit {(source.revision or '')[:12]}")
        return download(source)
    cache = None if source.cache_dir is None else Path(source.cache_dir)
    snapshot = cached_snapshot(source.location, source.revision, cache)
    if snapshot is None:
        raise ModelError(f"{source.location} has left the local hub cache since it was looked up. Type it again.")
    return snapshot


def weights_hash(what: Any) -> str:
    """Return the hash of the weights of a source, a folder, or a live module.

    Files give ``files-sha256:…`` over (file name, sha256), a GGUF file counting as ``model.gguf`` whatever it is
    called. A live ``torch.nn.Module`` gives ``tensors-blake2b:…`` over names, dtypes, shapes and bytes.

    Args:
        what: a :class:`dynprobe.models.ModelSource`, a name or path to resolve, or a module.

    Returns:
        The hash, with its kind as a prefix.

    Example:
        >>> import torch
        >>> weights_hash(torch.nn.Linear(2, 2)).split(":")[0]
        'tensors-blake2b'
    """
    if hasattr(what, "state_dict"):
        return module_hash(what)
    source = what if isinstance(what, ModelSource) else resolve(what)
    if source.kind == "gguf":
        return combine_file_hashes({"model.gguf": file_sha256(Path(source.location))})
    return combine_file_hashes(_verified_hashes(inspect_folder(local_folder(source), allow_bin=source.allow_bin)))


def _verified_hashes(folder: ModelFolder) -> dict[str, str]:
    hashes = {name: file_sha256(folder.path / name) for name in folder.weight_files}
    recorded = folder.record.get("files")
    if isinstance(recorded, dict):
        changed = [name for name, digest in hashes.items() if recorded.get(name) != digest]
        if changed:
            raise ModelError(
                f"{folder.path / changed[0]} is not the file that was converted and checked (its sha256 is "
                f"{hashes[changed[0]][:12]}…, the record says {str(recorded.get(changed[0]))[:12]}…). Remove the "
                "folder and fetch or convert it again, for the built-in model: dynprobe fetch smollm2-135m --force"
            )
    return hashes


def _dtype_name(dtype: Any) -> str:
    text = str(dtype).removeprefix("torch.").lower()
    if text not in _DTYPES:
        raise UsageError(
            f"--dtype {dtype} is not a dtype a model can be loaded in.{did_you_mean(text, _DTYPES)} "
            "Type one of: float32, bfloat16, float16, float64, auto."
        )
    return _DTYPES[text]


def _device(torch: Any, device: Any) -> Any:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as exc:
        near = did_you_mean(str(device), ("auto", "cpu", "cuda", "mps"))
        raise UsageError(f"--device {device} is not a device.{near} Type auto, cpu, cuda, cuda:1 or mps.") from exc
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise UsageError(f"--device {device} was asked for, but torch sees {count} CUDA devices. Type --device cpu.")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {device} was asked for, but torch has no MPS here. Type --device cpu.")
    return place


def _check_loading(info: dict[str, Any], source: ModelSource, auto_class: Any) -> list[str]:
    missing = sorted(str(name) for name in info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"{source.display_name} does not hold all weights of {auto_class.__name__}: {len(missing)} are missing "
            f"({', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}) and would be random numbers. Name the class "
            "it was saved from under 'architectures' in its config.json, or download it again."
        )
    unexpected = sorted(str(name) for name in info.get("unexpected_keys") or ())
    return [f"{len(unexpected)} tensors of the checkpoint are not used ({unexpected[0]} …)"] if unexpected else []


def _load_error(exc: Exception, source: ModelSource, folder: ModelFolder) -> ModelError:
    first = redact(str(exc)).strip().split("\n")[0]
    name = type(exc).__name__
    if "out of memory" in first.lower() or name == "OutOfMemoryError":
        hint = "It does not fit: type --dtype bfloat16, --device cpu, or --device-map auto."
    elif isinstance(exc, ImportError):
        hint = "Install the package it names."
    elif "offload_folder" in str(exc) or "offload_dir" in str(exc):
        hint = "Give a folder for the parts on the disk: dp.load(…, device_map=…, offload_folder='offload')."
    elif "device_map as a string" in first:
        hint = "Type --device-map auto, balanced or sequential, or leave it out."
    elif "weights_only" in first or "UnpicklingError" in name:
        hint = "Its pickle holds more than tensors and is not opened. Convert it to safetensors where you trust it."
    else:
        hint = f"The folder is {folder.path}; if it was downloaded, download it again."
    return ModelError(
        f"{source.display_name} could not be loaded by transformers {version('transformers')} ({name}: {first}). {hint}"
    )


def _tokenizer(transformers: Any, folder: ModelFolder, source: ModelSource) -> tuple[Any, list[str]]:
    if not folder.has_tokenizer:
        return None, ["no tokenizer files: prompts must be given as token ids"]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except Exception as exc:
        first = redact(str(exc)).strip().split("\n")[0]
        return None, [f"the tokenizer could not be loaded ({type(exc).__name__}: {first}): give token ids"]
    return tokenizer, []


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    bos = getattr(tokenizer, "bos_token_id", None)
    first = tokenizer("a").input_ids[:1]
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "bos_token_id": bos,
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
        "adds_bos": bos is not None and first == [bos],
        "chat_template": getattr(tokenizer, "chat_template", None) is not None,
    }


def _embedding_rows(model: Any) -> int:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):  # a model without a token embedding has no rows to compare
        return 0
