"""Getting a model into memory, and knowing exactly which one it is.

``resolve`` finds out what a name stands for (a known short name, a folder, a GGUF file, a hub id) and asks the network
only if it must; ``load_model`` loads it in float32 from safetensors and returns the facts a run records; ``fetch``
brings a known model into the user's cache; ``weights_hash`` says which weights these are.

The room also holds reference models that refine a state instead of stacking layers; each is a ``PreTrainedModel`` that
transformers' Auto classes know once this room was imported. Their code, and transformers with it, is loaded only when
it is used. A small trained one of each, and a Llama of the same size, come along: the zoo (``zoo_folder``), and beside
them the narrowest cells of a panel of architecture × depth × width (``panel_models``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dynprobe.models._byte_tokenizer import byte_tokenizer
from dynprobe.models._cache import cache_root
from dynprobe.models._known import fetch, known_models
from dynprobe.models._load import load_model, weights_hash
from dynprobe.models._panel import PanelModel, panel_models
from dynprobe.models._register import register_own_types
from dynprobe.models._source import ModelSource, resolve
from dynprobe.models._zoo import DEFAULT_LOOPED_MODEL, DEFAULT_MODEL, zoo_folder

if TYPE_CHECKING:
    from dynprobe.models._cem_model import CemConfig as CemConfig
    from dynprobe.models._cem_model import CemDynamics as CemDynamics
    from dynprobe.models._cem_model import CemForCausalLM as CemForCausalLM
    from dynprobe.models._csm_model import CsmCache as CsmCache
    from dynprobe.models._csm_model import CsmConfig as CsmConfig
    from dynprobe.models._csm_model import CsmForCausalLM as CsmForCausalLM
    from dynprobe.models._csm_model import DeltaHalt as DeltaHalt

#: Name → module whose import defines it and registers its model type.
_LAZY = {
    "CemConfig": "dynprobe.models._cem_model",
    "CemDynamics": "dynprobe.models._cem_model",
    "CemForCausalLM": "dynprobe.models._cem_model",
    "CsmCache": "dynprobe.models._csm_model",
    "CsmConfig": "dynprobe.models._csm_model",
    "CsmForCausalLM": "dynprobe.models._csm_model",
    "DeltaHalt": "dynprobe.models._csm_model",
}

__all__ = [
    "DEFAULT_LOOPED_MODEL",
    "DEFAULT_MODEL",
    "CemConfig",
    "CemDynamics",
    "CemForCausalLM",
    "CsmCache",
    "CsmConfig",
    "CsmForCausalLM",
    "DeltaHalt",
    "ModelSource",
    "PanelModel",
    "byte_tokenizer",
    "cache_root",
    "fetch",
    "known_models",
    "load_model",
    "panel_models",
    "resolve",
    "weights_hash",
    "zoo_folder",
]

register_own_types()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dynprobe.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
