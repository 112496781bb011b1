"""The trained zoo: three small byte-level language models that come with the package.

``tiny-llama``, ``tiny-cem`` and ``tiny-csm`` read the same bytes in the same order under the same schedule and have
the same number of parameters within 2.5 %; only the architecture, and the peak learning rate it wants, differ. They are
there so that everything runs at once and without a network, and so that a claim about architectures can be tried with
the rest held equal. They are toys: what holds for them holds for models of their size until shown otherwise.

Each lies in a folder of its own with its weights, tokenizer and model card (``README.md``: text and licence, recipe,
held-out figures). ``dynprobe-model.json`` records the hash of the weights, which is checked at every load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynprobe.errors import ModelError

__all__ = ["DEFAULT_LOOPED_MODEL", "DEFAULT_MODEL", "ZOO", "make_from_package", "zoo_folder"]

#: What commands use when no model is named.
DEFAULT_MODEL = "tiny-llama"
#: What they use where the model must have a loop.
DEFAULT_LOOPED_MODEL = "tiny-csm"

#: Name → one line about it.
ZOO = {
    "tiny-llama": "Llama of 0.82 M parameters on bytes, comes with the package; for trying out, not for text",
    "tiny-cem": "CEM of 0.82 M parameters (T = 2 in both recursions), same text and budget as tiny-llama",
    "tiny-csm": "CSM-style model of 0.84 M parameters, depth chosen by the call, same text and budget as tiny-llama",
}


def zoo_folder(name: str) -> Path:
    """Return the folder of a model of the zoo inside the package.

    Example:
        >>> zoo_folder("tiny-llama").name
        'tiny-llama'
    """
    return Path(__file__).parent / "zoo" / name


def make_from_package(target: Path, **_: Any) -> Path:
    """Return the folder, which the package brings along.

    Raises:
        ModelError: It is not there: the package was installed without its data.
    """
    if not (target / "model.safetensors").is_file():
        raise ModelError(
            f"{target} does not hold the weights that come with dynprobe: the installation is incomplete. Type: "
            "pip install --force-reinstall --no-deps dynprobe, or remake them with examples/train_zoo.py --write"
        )
    return target
