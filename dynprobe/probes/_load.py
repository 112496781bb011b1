"""From a name to a subject."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dynprobe import models
from dynprobe.errors import UsageError
from dynprobe.probes._backend import on_backend
from dynprobe.probes._discover import discover
from dynprobe.probes._subject import Subject
from dynprobe.probes._turns import Loop

__all__ = ["load"]


def load(
    model: str | nn.Module | Subject,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    quantization: Any = None,
    tokenizer: Any = None,
    layers: str | None = None,
    loop: Loop | str | None = None,
    trial_input: Tensor | None = None,
    trust_remote_code: bool = False,
    allow_bin: bool = False,
    backend: str | None = None,
) -> Subject:
    """Load a model and find its embedding, blocks, final norm and head.

    Args:
        model: Hub id, local folder, GGUF file, known name (``smollm2-135m``), or a module that is already loaded.
        revision: Branch, tag or commit of a hub model.
        dtype: Dtype of the weights; float32, because bf16 rounds angles by more than a mild perturbation moves them.
        device: ``"auto"`` takes a GPU where there is one.
        device_map: How to spread it over devices: ``"auto"``, or module path → device, ``"cpu"`` or ``"disk"``.
        offload_folder: Where the parts on the disk are kept.
        quantization: ``"int8"``, ``"nf4"``, ``"fp4"`` (bitsandbytes), ``"torchao-int8wo"``, or a configuration object
            of transformers; see ``docs/devices.md``.
        tokenizer: Used instead of the model's own.
        layers: Pattern of the blocks' names where they should not be searched for: ``"encoder.blocks.*"``.
        loop: Module that runs again and again, whose calls are then the depth axis; CEM, CSM-style and other known
            looped models need none. ``layers="model.layers.*"`` reads a CEM as a plain decoder.
        trial_input: Input of the trial forward for a module that does not take token ids.
        trust_remote_code: Run code that comes with the model; needs a pinned ``revision``.
        allow_bin: Load ``.bin`` weights where no safetensors exist.
        backend: What reads and writes states: ``"hooks"`` (default) or ``"nnsight"``; see ``docs/backends.md``.

    Returns:
        The subject, in evaluation mode.

    Raises:
        ModelNotFoundError: If nothing stands behind the name.
        OfflineError: If the hub is needed and cannot be reached.
        ModelError: If no chain of blocks is found.

    Example:
        >>> import torch
        >>> load(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()), layers="*",
        ...      trial_input=torch.zeros(1, 3, 4)).n_layers
        2
    """
    if isinstance(model, Subject):
        return on_backend(model, backend)
    on_backend(Subject(nn.Identity()), backend)  # what cannot be is refused before anything is fetched
    if isinstance(model, nn.Module):
        if quantization is not None:
            raise UsageError("quantization is done while weights are read from files; this model is loaded already")
        facts = {"weights_hash": models.weights_hash(model), "source": "module"}
        found = discover(
            model,
            layers=layers,
            loop=loop,
            tokenizer=tokenizer,
            name=type(model).__name__,
            facts=facts,
            trial_input=trial_input,
        )
        return on_backend(found, backend)
    source = models.resolve(model, revision=revision, trust_remote_code=trust_remote_code, allow_bin=allow_bin)
    loaded, own_tokenizer, facts = models.load_model(
        source,
        dtype=dtype,
        device=device,
        device_map=device_map,
        offload_folder=offload_folder,
        quantization=quantization,
    )
    found = discover(
        loaded,
        layers=layers,
        loop=loop,
        tokenizer=tokenizer if tokenizer is not None else own_tokenizer,
        name=source.display_name,
        facts=facts,
        trial_input=trial_input,
    )
    return on_backend(found, backend)
