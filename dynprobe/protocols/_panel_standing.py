"""Whether the run of a finished cell still stands, and what to do where it does not.

A panel trusts no record of its own: a cell is done where its run is there, its manifest is the one of then, and every
file that the manifest lists is there with its size. That costs one look per file and reads no table; ``dynprobe
doctor RUN`` compares contents. A run with a lost or cut file is repaired as ``doctor --repair`` would do it (its batch
is taken out, nothing is deleted) and then continued like an interrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynprobe.runs import examine, repair

__all__ = ["fault_of", "mend"]

_MANIFEST = "manifest.json"


def fault_of(panel: Path, cell: Mapping[str, Any]) -> str | None:
    """Say why the run of a finished cell does not stand any more, or None where it does.

    Args:
        panel: Folder of the panel.
        cell: Record of the cell.
    """
    run = panel / str(cell["run"])
    file = run / _MANIFEST
    if not file.is_file():
        return f"{cell['run']} has no {_MANIFEST}" if run.is_dir() else f"{cell['run']} is not there"
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != cell["manifest_sha256"]:
        return f"{cell['run']}/{_MANIFEST} is not the one of then"
    for part in json.loads(content)["parts"]:
        path = run / part["path"]
        if not path.is_file():
            return f"{cell['run']}/{part['path']} is missing"
        size = path.stat().st_size
        if size != part["bytes"]:
            return f"{cell['run']}/{part['path']} has {size:,} bytes of {part['bytes']:,}"
    return None


def mend(panel: Path, cell: Mapping[str, Any]) -> list[str]:
    """Take lost or cut files out of the run of a cell, so that its protocol makes them again.

    Args:
        panel: Folder of the panel.
        cell: Record of the cell; one without a run, or whose run is gone, needs nothing.

    Returns:
        What was done.

    Raises:
        RunFolderError: A writer is at work, or nothing says what the manifest held.
    """
    run = panel / str(cell["run"])
    if not cell["run"] or not run.is_dir():
        return []
    found = examine(run)
    return repair(found) if found.damages else []
