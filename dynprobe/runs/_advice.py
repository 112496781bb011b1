"""What messages about a damaged run folder end with: the command that explains and repairs it, and who goes on."""

from __future__ import annotations

import shlex
from pathlib import Path

from dynprobe.runs._schema import SCHEMA_VERSION

__all__ = ["ask_doctor", "damaged", "who_continues"]


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


def who_continues(schema: str) -> str:
    """Return who makes the rest of a run that is not complete: no run is written in two schemas.

    Args:
        schema: Schema with which the run was begun.

    Example:
        >>> who_continues("0.9").partition(",")[0]
        'only the version that began it continues it'
    """
    if schema == SCHEMA_VERSION:
        return "the command that made it continues it"
    return (
        f"only the version that began it continues it, with schema {schema} (this dynprobe writes {SCHEMA_VERSION}); "
        "what is whole can be read"
    )
