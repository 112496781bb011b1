"""Weights in eight or four bits, through transformers' own configurations.

Nothing is quantised here: a short name stands for a configuration of transformers, which asks the library that does the
work (``bitsandbytes`` or ``torchao``). Any other configuration object of transformers is passed on as it is, and a
checkpoint that was stored quantised (GPTQ, AWQ, compressed-tensors …) needs no word at all: its own ``config.json``
says so. What was done is part of what the weights are, so it enters their hash.

States stay in the compute dtype. A quantised model is another model: its numbers are compared with those of the full
one as two models are, and not as two readings of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dynprobe.errors import UsageError, did_you_mean

__all__ = ["QUANTIZATIONS", "quantization_config", "quantization_facts", "quantized_hashes", "true_size"]

#: Short names, the package each needs, and what it does.
QUANTIZATIONS: Mapping[str, tuple[str, str]] = {
    "int8": ("bitsandbytes", "LLM.int8: eight bits, outliers in sixteen"),
    "nf4": ("bitsandbytes", "four bits on the quantiles of a normal distribution"),
    "fp4": ("bitsandbytes", "four-bit floating point"),
    "torchao-int8wo": ("torchao", "eight-bit weights, one scale per output row; activations as they are"),
}


class _Once(logging.Filter):
    """Lets each message through once: bitsandbytes repeats one for every matrix of every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self.said
        self.said.add(text)
        return new


_ONCE = _Once()


def quantization_config(asked: Any, dtype: Any) -> Any:
    """Return transformers' configuration of a quantisation, or None for none.

    Args:
        asked: A name of :data:`QUANTIZATIONS`, a configuration object of transformers, or None.
        dtype: The ``torch.dtype`` that is computed in, or ``"auto"``.

    Raises:
        UsageError: If the name is not known, or its package is not installed.

    Example:
        >>> quantization_config("nf5", "auto")
        Traceback (most recent call last):
        ...
        dynprobe.errors.UsageError: --quantization nf5 is not known. Did you mean 'nf4'? Type one of: int8, nf4, ...
    """
    if asked is None:
        return None
    if not isinstance(asked, str):
        if not hasattr(asked, "quant_method"):
            raise UsageError(
                f"quantization={type(asked).__name__} is no quantisation of transformers; give one of "
                f"{', '.join(QUANTIZATIONS)}, or an object like transformers.BitsAndBytesConfig(load_in_8bit=True)"
            )
        return asked
    if asked not in QUANTIZATIONS:
        raise UsageError(
            f"--quantization {asked} is not known.{did_you_mean(asked, QUANTIZATIONS)} Type one of: "
            f"{', '.join(QUANTIZATIONS)}. Checkpoints that are stored quantised (GPTQ, AWQ) need no --quantization."
        )
    package = QUANTIZATIONS[asked][0]
    for needed in (package, "accelerate"):
        if _version(needed) is None:
            raise UsageError(f"--quantization {asked} needs {needed}: pip install {needed}")
    import torch
    import transformers

    if asked == "torchao-int8wo":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if asked == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=asked, bnb_4bit_compute_dtype=compute)


def quantization_facts(model: Any, asked: Any) -> dict[str, Any] | None:
    """Return what is recorded of a loaded model's quantisation; None where its weights are stored as numbers.

    Args:
        model: The loaded model.
        asked: What was asked for; None where a checkpoint was stored quantised.
    """
    held = getattr(getattr(model, "config", None), "quantization_config", None)
    if held is None:
        return None
    settings = held if isinstance(held, Mapping) else held.to_dict()
    plain = json.loads(json.dumps(dict(settings), sort_keys=True, default=str))
    method = str(getattr(plain.get("quant_method"), "value", plain.get("quant_method")))
    package = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}.get(method)
    return {
        "name": asked if isinstance(asked, str) else method,
        "method": method,
        "settings": plain,
        "stored": asked is None,
        "package": None if package is None else f"{package} {_version(package)}",
    }


def quantized_hashes(hashes: Mapping[str, str], facts: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the hashes of the weights with an entry of what was made of them while loading.

    Example:
        >>> quantized_hashes({"model.safetensors": "ab"}, None)
        {'model.safetensors': 'ab'}
        >>> sorted(quantized_hashes({"a": "b"}, {"name": "nf4", "settings": {}, "stored": False}))
        ['a', 'quantization: nf4']
    """
    if facts is None or facts["stored"]:
        return dict(hashes)
    text = json.dumps(facts["settings"], sort_keys=True)
    return {**hashes, f"quantization: {facts['name']}": hashlib.sha256(text.encode()).hexdigest()}


def true_size(model: Any) -> int:
    """Return the number of parameters of the model that a quantised one stands for.

    Packed weights count several to a number, and some methods keep them as buffers; the same architecture built without
    storage has them all.
    """
    import copy

    import torch

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        bare = type(model)(config)
    return sum(parameter.numel() for parameter in bare.parameters())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
