"""Every causal language model that transformers knows, tiny, random, and on the processor in milliseconds.

A tool that claims to read any decoder has to be shown every decoder. For each model type the configuration class is
made with its sizes reduced by name (:data:`SIZES`), since the names are the library's own vocabulary; what a type needs
beyond that stands in :data:`EXCEPTIONS`, as data. A type that cannot be built this way is left out with its reason.

The library's own initialisation makes blocks that hardly do anything: normalisations are ones, biases and gates zeros,
matrices small. A wrong forward of such a model looks right. So every parameter gets noise of the size of a trained
one, and a mistake anywhere moves the logits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dynprobe.errors import ModelError, did_you_mean
from dynprobe.testing._sizes import EXCEPTIONS, LEFT_OUT, SIZES

__all__ = ["causal_types", "tiny_causal_lm"]

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "linear_num_key_heads")
_MOST_PARAMETERS = 8_000_000


def causal_types() -> dict[str, str]:
    """Return transformers' causal model types and their classes, as the installed version lists them.

    Example:
        >>> causal_types()["gpt2"]
        'GPT2LMHeadModel'
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        kind: names if isinstance(names, str) else names[0] for kind, names in _items(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    }


def _items(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(mapping.items())


def tiny_causal_lm(model_type: str, *, seed: int = 0) -> Any:
    """Build a tiny random causal language model of one of transformers' model types.

    Four blocks wherever the type has a number of blocks, float32, evaluation mode, every parameter random.

    Args:
        model_type: Its name in transformers, one of :func:`causal_types`.
        seed: Seed of the weights.

    Returns:
        The model, a ``PreTrainedModel``.

    Raises:
        ModelError: If there is no such type, or it cannot be built this small; the message says why.

    Example:
        >>> model = tiny_causal_lm("gpt2")
        >>> type(model).__name__, len(model.transformer.h)
        ('GPT2LMHeadModel', 4)
    """
    import transformers

    types = causal_types()
    if model_type not in types:
        raise ModelError(f"{model_type!r} is no causal model type of transformers.{did_you_mean(model_type, types)}")
    if model_type in LEFT_OUT:
        raise ModelError(f"{model_type} is left out: {LEFT_OUT[model_type]}")
    model_class = getattr(transformers, types[model_type])
    errors: list[str] = []
    for settings in _settings(model_class.config_class, model_type):
        try:
            config = model_class.config_class(**settings)
            if hasattr(config, "is_decoder"):
                config.is_decoder = True
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > _MOST_PARAMETERS:
                raise ModelError(f"it still has {size:,} parameters with every known size reduced")
            model = _seeded(model_class, config, seed)
            with torch.no_grad():
                model(input_ids=torch.arange(3, 8)[None], use_cache=False)
        except Exception as error:  # the class's own validation decides which settings are possible
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
        else:
            return model
    raise ModelError(f"{model_type} cannot be built small: {errors[0]}")


def _settings(config_class: Any, model_type: str) -> Iterator[dict[str, Any]]:
    """Settings to try in order: what a validation rejects in one may stand in the next."""
    for declared, fill in ((False, True), (False, False), (True, True), (True, False)):
        full = _merged(_reduced(config_class, fill=fill, declared=declared), EXCEPTIONS.get(model_type, {}))
        fixed = set(EXCEPTIONS.get(model_type, {}))
        many = {k: 4 if k in _KV_HEADS and k not in fixed else v for k, v in full.items()}
        for settings in (full, many):
            yield settings
            yield {k: v for k, v in settings.items() if k != "head_dim" or k in fixed}


def _merged(settings: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others on top; parts are merged and not replaced."""
    found = dict(settings)
    for name, value in more.items():
        inner = found.get(name)
        found[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found


def _reduced(config_class: Any, *, fill: bool, declared: bool) -> dict[str, Any]:
    """The sizes of a configuration class, reduced.

    With ``fill`` also those that it leaves to be derived, with ``declared`` none that its constructor does not name.
    """
    try:
        example = config_class()
        defaults = example.to_dict()
    except Exception:  # some classes have no valid default: their signature has the names
        example = None
        defaults = {k: p.default for k, p in inspect.signature(config_class.__init__).parameters.items()}
    taken = {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "attribute_map", {})}
    found: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in _IDS:
            found[name] = _IDS[name]
        elif (
            name in SIZES
            and (not declared or name in taken)
            and not isinstance(value, bool | str)
            and (value or (value is None and fill))
        ):
            found[name] = SIZES[name]
    for name, sub in (getattr(config_class, "sub_configs", None) or {}).items():
        of_example = getattr(example, name, None)
        if of_example is not None:  # a part may be of any class (AutoConfig): the example says which
            part = _reduced(type(of_example), fill=fill, declared=declared)
            found[name] = {"model_type": of_example.model_type, **part} if sub.__name__ == "AutoConfig" else part
    return found


def _seeded(model_class: Any, config: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    # Vectors are gains and biases; the last axis of everything else is, but for a factor, its fan-in.
                    scale = 0.3 if parameter.dim() < 2 else 1 / math.sqrt(max(parameter.shape[-1], 1))
                    parameter.add_(torch.randn_like(parameter) * scale)
    return model.float()
