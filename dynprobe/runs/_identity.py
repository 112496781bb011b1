"""Which run is this? Eight hexadecimal digits that are the same exactly when the numbers would be the same.

The identity is the hash of what decides the numbers: the resolved configuration, the prompts, the weights and the
major version of the schema they are stored in. It leaves out what decides only where and how fast they are made
(folder, engine, batch size, display) and secrets. The configuration is brought to one canonical form first: keys in
order, tuples as lists, and ``1.0`` as ``1``, because a command line and a Python call spell the same number
differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from dynprobe.runs._json import dumps, plain
from dynprobe.runs._schema import SCHEMA_VERSION
from dynprobe.runs._secrets import drop_secrets, scrub

__all__ = ["NOT_IDENTITY", "hash_prompts", "identity"]

#: Keys of the configuration, at its top level, that change no number.
NOT_IDENTITY = frozenset(
    (
        "out",
        "out_dir",
        "output",
        "output_dir",
        "output_path",
        "engine",
        "engine_options",
        "workers",
        "num_workers",
        "batch_size",
        "max_batch_size",
        "batch_tokens",
        "display",
        "quiet",
        "json",
        "progress",
        "verbose",
        "color",
        "dry_run",
        "force",
        "command",
    )
)


def identity(config: Mapping[str, Any], prompts: Sequence[str | Sequence[int]], weights: str) -> str:
    """Return the eight hexadecimal digits that identify a run.

    ``sha256(canonical({schema major, config, hash(prompts), weights}))``, first 32 bits.

    Args:
        config: The resolved configuration; folder, engine, batch size, display keys and secrets are left out here.
        prompts: Texts, or token ids, in the order in which they are asked.
        weights: A hash of the weights, or a name that stands for one.

    Raises:
        RunFolderError: The configuration holds something that has no canonical form.

    Example:
        >>> a = identity({"alpha": 1, "out": "runs"}, ["The sky"], "w0")
        >>> a == identity({"out": "elsewhere", "alpha": 1.0}, ["The sky"], "w0"), len(a)
        (True, 8)
        >>> a == identity({"alpha": 2}, ["The sky"], "w0")
        False
    """
    kept = {key: value for key, value in config.items() if str(key).replace("-", "_") not in NOT_IDENTITY}
    payload = {
        "schema": SCHEMA_VERSION.split(".")[0],
        "config": _canonical(scrub(drop_secrets(plain(kept, "config")))),
        "prompts": hash_prompts(prompts),
        "weights": weights,
    }
    text = dumps(payload, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def hash_prompts(prompts: Sequence[str | Sequence[int]]) -> str:
    """Return the SHA-256 of a list of prompts; a text and its token ids hash differently.

    Example:
        >>> hash_prompts(["ab"]) == hash_prompts(["a", "b"]), hash_prompts([[1, 2]]) == hash_prompts(["[1, 2]"])
        (False, False)
    """
    tagged = [["text", p] if isinstance(p, str) else ["ids", plain(p, "a prompt")] for p in prompts]
    return hashlib.sha256(dumps(tagged).encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value
