"""Whether the run of a finished cell still stands, and what to do where it does not.

A panel trusts no record of its own: a cell is done where its run is there, its manifest is the one of then, and every
file that the manifest lists is there with its size. That costs one look per file and reads no table; ``dynprobe
doctor RUN`` compares contents. A run with a lost or cut file is repaired as ``doctor --repair`` would do it (its batch
is taken out, nothing is deleted) and then continued like an interrupted one. Where that cannot be (what is wrong has no
remedy, or the run was written with an older schema, which this version reads and does not continue), the run is moved
whole to ``damaged/`` in the panel's folder, and its cell is made afresh.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynprobe.runs import examine, repair
from dynprobe.runs._atomic import sync_folder, writing
from dynprobe.runs._damage_files import ASIDE
from dynprobe.runs._open_run import looks_like_run
from dynprobe.runs._repair import REOPENS
from dynprobe.runs._schema import SCHEMA_VERSION

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
    """Take lost or cut files out of the run of a cell, or the run out of the panel, so that it is made again.

    Args:
        panel: Folder of the panel.
        cell: Record of the cell; one without a run, or whose run is gone, needs nothing.

    Returns:
        What was done.

    Raises:
        RunFolderError: A writer is at work.
    """
    run = panel / str(cell["run"])
    if not cell["run"] or not run.is_dir():
        return []
    if not any(run.iterdir()):  # nothing is left that could be damaged, and a writer begins in it
        return []
    if not looks_like_run(run):
        return [_aside(panel, run, "it has no manifest and no table of a run")]
    found = examine(run)
    if not found.damages:
        return []
    reopened = any(damage.kind in REOPENS for damage in found.damages)
    schema = SCHEMA_VERSION if found.manifest is None else found.manifest.schema_version
    if found.busy or (found.repairable and (schema == SCHEMA_VERSION or not reopened)):
        return repair(found)
    older = "" if schema == SCHEMA_VERSION else f"schema {schema}, which this version does not continue; "
    return [_aside(panel, run, older + "; ".join(f"{damage.path}: {damage.what}" for damage in found.damages[:3]))]


def _aside(panel: Path, run: Path, why: str) -> str:
    """Move a run to ``damaged/`` of the panel under the name it had; an older one of that name stays."""
    target, number = panel / ASIDE / run.name, 1
    while target.exists():
        number += 1
        target = panel / ASIDE / f"{run.name}.{number}"
    with writing(panel, f"{ASIDE}/{run.name}"):
        target.parent.mkdir(exist_ok=True)
        run.rename(target)
        sync_folder(target.parent)
        sync_folder(run.parent)
    return f"moved {run.name} to {target.relative_to(panel).as_posix()} ({why}); it is made afresh"
