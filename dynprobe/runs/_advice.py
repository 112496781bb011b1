"""What every message about a damaged run folder ends with: the command that finds, explains and repairs it."""

from __future__ import annotations

import shlex
from pathlib import Path

__all__ = ["ask_doctor", "damaged"]


def ask_doctor(folder: Path | str) -> str:
    """Return the sentence that names the command.

    Example:
        >>> ask_doctor("runs/one")
        'Type: dynprobe doctor runs/one'
    """
    return f"Type: dynprobe doctor {shlex.quote(str(folder))}"


def damaged(path: Path, why: object) -> str:
    """Return the message about a damaged file of a run folder.

    Args:
        path: The file: in the folder itself, or in the folder of its table.
        why: What is wrong with it.
    """
    folder = path.parent if path.parent.joinpath("manifest.json").exists() else path.parent.parent
    return f"{path} is damaged: {' '.join(str(why).split()).rstrip('.')}. {ask_doctor(folder)}"
