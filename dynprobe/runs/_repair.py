"""Mending a run folder, without inventing a number and without deleting a byte.

What is damaged is taken out: its batch is called unfinished, and the command that made the run makes it again, which
gives the same rows as before. Everything that is taken out, and everything that should not be there, is moved to
``damaged/`` inside the folder, where it can be looked at. The new manifest is written first and files are moved after
it, so that a repair that is cut short can simply be repeated. What was done stands in the manifest under ``repairs``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynprobe.errors import RunFolderError
from dynprobe.runs._advice import ask_doctor, who_continues
from dynprobe.runs._atomic import keep, sync_folder, write_bytes, writing
from dynprobe.runs._damage import Examination, manifest_digest
from dynprobe.runs._damage_files import ASIDE
from dynprobe.runs._damage_report import Damage
from dynprobe.runs._lock import FolderLock
from dynprobe.runs._manifest import MANIFEST_NAME, Manifest, encode_manifest
from dynprobe.runs._start import library_version, now

__all__ = ["REOPENS", "repair"]

#: Damages after which the run has to go on, so that something is made again.
REOPENS = {"missing", "cut", "changed", "layout", "batch", "calibration", "summary"}
_PARTS = {"missing", "cut", "changed", "layout"}


def repair(found: Examination) -> list[str]:
    """Mend what can be mended and return what was done, step by step.

    Args:
        found: From :func:`dynprobe.runs.examine`.

    Raises:
        RunFolderError: A writer is at work, or wrote since the folder was examined; nothing says what the manifest
            held, or the folder cannot be written.
    """
    mending = [damage for damage in found.damages if damage.remedy]
    if not mending:
        return []
    if found.manifest is None:
        raise RunFolderError(f"{found.path} cannot be repaired: nothing says what its manifest held.")
    lock = FolderLock(found.path)
    with writing(found.path, "the lock file"):
        lock.acquire()
    try:
        # A writer may have come and gone between the look and the lock; what it listed must not be taken back.
        if manifest_digest(found.path) != found.digest:
            raise RunFolderError(
                f"{found.path} changed since it was examined: another process wrote its {MANIFEST_NAME}. Nothing was "
                f"changed by the repair; run doctor again. {ask_doctor(found.path)} --repair"
            )
        return _mend(found, found.manifest, mending)
    finally:
        lock.release()


def _mend(found: Examination, manifest: Manifest, mending: Sequence[Damage]) -> list[str]:
    folder, steps = found.path, []
    bad = {d.path for d in mending if d.kind in _PARTS}
    redo = {d.batch for d in mending if d.batch is not None and d.kind in (*_PARTS, "batch")}
    dropped = [p for p in manifest.parts if p.path in bad or (p.batch is not None and p.batch in redo)]
    kept = [part for part in manifest.parts if part not in dropped]
    finished = [number for number in manifest.finished if number not in redo]
    update: dict[str, Any] = {
        "parts": kept, "finished": finished,
        "batch_facts": {k: v for k, v in manifest.batch_facts.items() if not (k.isdigit() and int(k) in redo)},
    }  # fmt: skip
    steps += [f"unlisted {part.path}" for part in dropped]
    steps += [f"batch {number} is to be made again" for number in sorted(redo)]
    aside = [part.path for part in dropped]
    aside += [d.path for d in mending if d.kind in ("orphan", "temporary", "calibration")]
    aside += [d.path for d in mending if d.kind == "summary" and (folder / d.path).exists()]
    restored = any(d.kind == "manifest" for d in mending)
    unfinished = manifest.status == "running"
    if any(d.kind in REOPENS for d in mending) or unfinished:
        update["status"] = "interrupted"
        steps.append(f"the run is called interrupted; {who_continues(manifest.schema_version)}")
    if restored:
        steps.append(f"wrote {MANIFEST_NAME} again ({found.source})")
        if (folder / MANIFEST_NAME).exists():
            with writing(folder, f"{ASIDE}/{MANIFEST_NAME}"):
                target = _aside(folder, MANIFEST_NAME)
                keep(folder / MANIFEST_NAME, target)  # a link: at no moment is there no manifest
            steps.append(f"kept the damaged one as {target.relative_to(folder).as_posix()}")
    time = now().isoformat(timespec="seconds")
    note = {
        "time": time, "dynprobe": library_version(), "manifest": found.source,
        "damages": [vars(d) for d in mending], "redone_batches": sorted(redo),
    }  # fmt: skip
    repaired = manifest.model_copy(update={**update, "updated": time, "repairs": [*manifest.repairs, note]})
    data = encode_manifest(repaired)
    with writing(folder, MANIFEST_NAME, len(data)):
        write_bytes(folder / MANIFEST_NAME, data)
        sync_folder(folder)
    steps += [_move(folder, name) for name in dict.fromkeys(aside) if (folder / name).exists()]
    if any(d.kind == "events" for d in mending):
        steps.append(_trim(folder))
    found.manifest, found.done = repaired, steps
    return steps


def _move(folder: Path, name: str) -> str:
    """Move a file or folder to ``damaged/`` under the name it had; an older one of that name stays."""
    with writing(folder, f"{ASIDE}/{name}"):
        target = _aside(folder, name)
        os.rename(folder / name, target)  # noqa: PTH104 (as in _atomic)
        sync_folder(target.parent)
        with contextlib.suppress(OSError):  # a table's folder that is empty now
            (folder / name).parent.rmdir()
    return f"moved {name} to {target.relative_to(folder).as_posix()}"


def _aside(folder: Path, name: str) -> Path:
    target, number = folder / ASIDE / name, 1
    while target.exists():
        number += 1
        target = folder / ASIDE / f"{name}.{number}"
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _trim(folder: Path) -> str:
    path = folder / "events.jsonl"
    lines, whole = path.read_bytes().splitlines(), []
    for line in lines:
        with contextlib.suppress(ValueError):
            json.loads(line)
            whole.append(line)
    moved = _move(folder, "events.jsonl")
    with writing(folder, "events.jsonl"):
        write_bytes(path, b"".join(line + b"\n" for line in whole))
    return f"{moved}, and kept {len(whole)} of its {len(lines)} lines"
