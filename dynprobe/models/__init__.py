"""Getting a model into memory, and knowing exactly which one it is.

``resolve`` finds out what a name stands for (a known short name, a folder, a GGUF file, a hub id) and asks the network
only if it must; ``load_model`` loads it in float32 from safetensors and returns the facts a run records; ``fetch``
brings a known model into the user's cache; ``weights_hash`` says which weights these are.
"""

from dynprobe.models._cache import cache_root
from dynprobe.models._known import fetch, known_models
from dynprobe.models._load import load_model, weights_hash
from dynprobe.models._source import ModelSource, resolve

__all__ = ["ModelSource", "cache_root", "fetch", "known_models", "load_model", "resolve", "weights_hash"]
