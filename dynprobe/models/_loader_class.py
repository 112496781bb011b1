"""Which class loads a checkpoint, and whether code that comes with it may run."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from typing import Any

from dynprobe.errors import ModelError, did_you_mean
from dynprobe.models._folder import ModelFolder
from dynprobe.models._hash import file_sha256
from dynprobe.models._source import ModelSource

__all__ = ["model_class", "remote_code"]

# Model types defined in this package; transformers knows them once their module was imported.
_OWN_TYPES = "dynprobe_"


def remote_code(folder: ModelFolder, source: ModelSource) -> dict[str, str]:
    """Hashes of the Python files that may run; refuses code from other repositories, which nothing pins."""
    if not source.trust_remote_code:
        return {}
    auto_map = folder.config.get("auto_map") or {}
    foreign = [str(target) for target in auto_map.values() if "--" in str(target)]
    if foreign:
        raise ModelError(
            f"{source.display_name} runs code of another repository ({foreign[0]}), which the pinned revision does not "
            f"pin. Download that repository's Python files into a copy of the model, name them in config.json without "
            "'--', and type --model with the copy's path."
        )
    return {str(p.relative_to(folder.path)): file_sha256(p) for p in sorted(folder.path.rglob("*.py"))}


def model_class(transformers: Any, folder: ModelFolder, source: ModelSource) -> Any:
    """The class that loads the whole checkpoint: the one it was saved from, else the causal language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = str(folder.config.get("model_type") or "")
    auto_map = folder.config.get("auto_map") or {}
    if source.trust_remote_code and auto_map:
        return transformers.AutoModelForCausalLM if "AutoModelForCausalLM" in auto_map else transformers.AutoModel
    if model_type.startswith(_OWN_TYPES) and model_type not in CONFIG_MAPPING:
        register_own_type(model_type)
    if model_type not in CONFIG_MAPPING:
        if auto_map:
            raise ModelError(
                f"{source.display_name} (model_type {model_type!r}) comes with its own Python code and transformers "
                f"{version('transformers')} does not know the type. If you trust the code, type --trust-remote-code "
                "--revision COMMIT with the full 40-digit commit."
            )
        raise ModelError(
            f"{source.display_name} has model_type {model_type!r}, which transformers {version('transformers')} does "
            f"not know.{did_you_mean(model_type, list(CONFIG_MAPPING.keys()))} A newer transformers may: "
            "pip install --upgrade transformers"
        )
    for name in folder.config.get("architectures") or []:
        own = getattr(transformers, str(name), None)
        if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel):
            return own
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type.startswith(_OWN_TYPES):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def register_own_type(model_type: str) -> None:
    """Import the module of this package that defines a model type, if there is one; importing it registers it."""
    name = f"dynprobe.models._{model_type.removeprefix(_OWN_TYPES)}_model"
    if importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
