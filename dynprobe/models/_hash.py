r"""What the weights are, as a number that does not depend on where they lie or what they are called.

Two models with one name and different weights are the commonest way to publish a number nobody can reproduce, so every
run records a hash of what was really loaded.

* **Files**: :math:`\mathrm{sha256}` over the sorted list of (file name, sha256 of the file). Reading half a gigabyte
  costs a second, so the hash of a file is remembered in the user's cache beside its size and modification time and used
  again while both are unchanged. A file written within the last two seconds is never remembered: it could change again
  without its modification time moving.
* **A live module**: blake2b over the sorted list of (name, dtype, shape, bytes) of parameters and persistent buffers.
  Tied tensors are read once. This is the only hash that sees a weight changed by hand after loading.

The two carry their kind as a prefix (``files-sha256:``, ``tensors-blake2b:``), because they can never be equal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.errors import ModelError
from dynprobe.models._cache import cache_root

if TYPE_CHECKING:
    import torch

__all__ = ["combine_file_hashes", "file_sha256", "module_hash"]

_YOUNG_SECONDS = 2.0


def file_sha256(path: Path, *, remember: bool = True) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits.

    Args:
        path: the file; links are followed.
        remember: look the answer up in the user's cache (valid while size and modification time are unchanged), and
            store it there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a"
        ...     _ = path.write_bytes(b"abc")
        ...     file_sha256(path, remember=False)[:16]
        'ba7816bf8f01cfea'
    """
    real = path.resolve()
    stat = real.stat()
    memo = cache_root() / "hashes" / f"{hashlib.blake2b(str(real).encode(), digest_size=16).hexdigest()}.json"
    key = {"path": str(real), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if remember:
        known = _read_memo(memo)
        if known is not None and {name: known.get(name) for name in key} == key:
            return str(known["sha256"])
    with real.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if remember and time.time() - stat.st_mtime > _YOUNG_SECONDS:
        _write_memo(memo, {**key, "sha256": digest})
    return digest


def combine_file_hashes(hashes: Mapping[str, str]) -> str:
    """Combine ``{file name: sha256}`` into one hash that does not depend on the order.

    Example:
        >>> combine_file_hashes({"b": "1", "a": "2"}) == combine_file_hashes({"a": "2", "b": "1"})
        True
    """
    lines = "".join(f"{name}\0{hashes[name]}\n" for name in sorted(hashes))
    return f"files-sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def module_hash(model: torch.nn.Module) -> str:
    """Return a hash over names, dtypes, shapes and bytes of all parameters and persistent buffers of a live module.

    The bytes are those in memory, so the same checkpoint loaded in another dtype has another hash. Non-persistent
    buffers (rotary tables, masks) are derived from the configuration and are left out.

    Raises:
        ModelError: if a tensor has no storage to read (a meta tensor of an offloaded model).

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = module_hash(layer)
        >>> with torch.no_grad():
        ...     _ = layer.bias.add_(1.0)
        >>> module_hash(layer) == before
        False
    """
    tensors = {name: t.detach() for name, t in model.state_dict().items() if hasattr(t, "detach")}
    away = {name for name, tensor in tensors.items() if tensor.device.type == "meta"}
    offloaded = _offloaded(model, away) if away else {}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in offloaded}
    meta = sorted(away - offloaded.keys())
    if meta:
        raise ModelError(
            f"The weights of {type(model).__name__} cannot be hashed: {len(meta)} tensors have no storage here "
            f"({meta[0]} …), and no hook of accelerate brings them in. Load the model from its folder."
        )
    places = {name: _place(tensor) for name, tensor in tensors.items()}
    unique = {place: name for name, place in places.items()}
    # hashlib releases the interpreter lock, so tensors are hashed side by side.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(unique, pool.map(lambda name: _tensor_digest(tensors[name]), unique.values()), strict=True))
    total = hashlib.blake2b(digest_size=32)
    held = {name: (t.dtype, tuple(t.shape), digests[places[name]]) for name, t in tensors.items()} | offloaded
    for name in sorted(held):
        dtype, shape, digest = held[name]
        total.update(f"{name}\0{dtype}\0{shape}\0".encode() + digest)
    return f"tensors-blake2b:{total.hexdigest()}"


def _place(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """What two names of one tensor agree in; a tensor made of others (quantised) has no address of its own."""
    if hasattr(tensor, "__tensor_flatten__"):
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)


def _offloaded(model: torch.nn.Module, names: set[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and digest of what is kept elsewhere; one module's tensors are brought in at a time."""
    import torch

    try:
        from accelerate.utils import align_module_device
    except ImportError:  # then nothing of accelerate's has put them away
        return {}
    found: dict[str, tuple[torch.dtype, tuple[int, ...], bytes]] = {}
    for path, module in model.named_modules():
        own = [key for key in (*module._parameters, *module._buffers) if f"{path}.{key}".lstrip(".") in names]
        if not own or getattr(module, "_hf_hook", None) is None:
            continue
        with align_module_device(module, torch.device("cpu")):
            for key in own:
                tensor = getattr(module, key).detach()
                if tensor.device.type != "meta":
                    found[f"{path}.{key}".lstrip(".")] = (tensor.dtype, tuple(tensor.shape), _tensor_digest(tensor))
    return found


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    import torch

    if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight: its parts, and how they are put together
        parts, how = tensor.__tensor_flatten__()
        digest = hashlib.blake2b(repr(sorted(how.items()) if isinstance(how, dict) else how).encode(), digest_size=32)
        for name in sorted(parts):
            digest.update(name.encode() + _tensor_digest(getattr(tensor, name)))
        return digest.digest()
    flat = tensor.cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=32).digest()


def _read_memo(memo: Path) -> dict[str, object] | None:
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: the file is simply hashed again
        return None
    return known if isinstance(known, dict) and isinstance(known.get("sha256"), str) else None


def _write_memo(memo: Path, content: dict[str, object]) -> None:
    # A cache that cannot be written costs a second at the next load and changes no number.
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=memo.parent, suffix=".tmp", delete=False) as handle:
            json.dump(content, handle)
        Path(handle.name).replace(memo)
