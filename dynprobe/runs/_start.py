"""Starting to write: a new folder, one to continue, or one that is finished.

Continuing first puts the folder in order. Parts of batches that were never finished, temporary files and files that
the manifest does not list are removed; a finished batch whose file is missing or has another size is called unfinished
again, so that it is written anew. Another version of the library may compute another number under the same name, so it
continues a run only when told to, and leaves a note.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprobe._plugins import deciding
from dynprobe.errors import RunFolderError
from dynprobe.runs._advice import ask_doctor
from dynprobe.runs._atomic import TEMPORARY, remove, writing
from dynprobe.runs._find import create_folder, find_run, folder_name, parent_lock
from dynprobe.runs._lock import FolderLock
from dynprobe.runs._manifest import MANIFEST_NAME, Manifest, read_manifest, validated
from dynprobe.runs._schema import SCHEMA_VERSION, TABLES

__all__ = ["RESERVED", "Clock", "library_version", "now", "start"]

Clock = Callable[[], dt.datetime]

#: Fields of the manifest that only the writer itself may set.
RESERVED = frozenset(
    (
        "schema_version",
        "id8",
        "status",
        "created",
        "updated",
        "finished",
        "batch_facts",
        "continuations",
        "interruptions",
        "parts",
        "repairs",
        "seal",
    )
)


def now() -> dt.datetime:
    """Return the local time with its offset."""
    return dt.datetime.now().astimezone()


def library_version() -> str:
    """Return the version of the installed dynprobe."""
    try:
        return importlib.metadata.version("dynprobe")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def start(
    out: Path, ident: str, model_name: str, fields: Mapping[str, Any], force: bool, clock: Clock
) -> tuple[Path, Manifest, FolderLock | None]:
    """Return the folder, its manifest, and the lock held on it (None where the run is complete).

    Raises:
        RunFolderError: ``out`` is another run, in use, damaged, of another library version, or cannot be written.
    """
    fresh = _fresh(ident, model_name, fields, clock)
    if (out / MANIFEST_NAME).exists():
        folder = out
    elif out.exists() and not out.is_dir():
        raise RunFolderError(f"--out {out} is a file. Name a folder: a run folder, or one in which runs lie.")
    elif out.is_dir() and ((out / "events.jsonl").exists() or (out / "prompts.parquet").exists()):
        raise RunFolderError(
            f"{out} looks like a run folder, but its {MANIFEST_NAME} is missing. {ask_doctor(out)}, "
            "or choose another folder with --out FOLDER."
        )
    else:
        with writing(out, "the folder"):
            out.mkdir(parents=True, exist_ok=True)
        with parent_lock(out):
            for stale in out.glob(f"{TEMPORARY}*_{ident}"):
                shutil.rmtree(stale, ignore_errors=True)
            found = find_run(out, ident)
            if found is None:
                folder = create_folder(out, folder_name(clock(), model_name, ident), fresh)
                return folder, fresh, _lock(folder)
        folder = found
    return _continue(folder, fresh, force)


def _fresh(ident: str, model_name: str, fields: Mapping[str, Any], clock: Clock) -> Manifest:
    reserved = sorted(RESERVED.intersection(fields))
    if reserved:
        raise RunFolderError(f"The manifest field {reserved[0]!r} is set by the writer alone; leave it out.")
    time = clock().isoformat(timespec="seconds")
    content = {**fields, "id8": ident, "model_name": model_name, "created": time, "updated": time}
    content["versions"] = {"dynprobe": library_version(), **(fields.get("versions") or {})}
    return validated(content, "the new manifest", "This is a defect of the code that writes the run.")


def _continue(folder: Path, fresh: Manifest, force: bool) -> tuple[Path, Manifest, FolderLock | None]:
    manifest = _matching(folder, fresh.id8)
    if manifest.status == "complete":
        return folder, manifest, None
    lock = _lock(folder)
    try:
        manifest = _matching(folder, fresh.id8)  # another process may have finished it while we waited
        if manifest.status == "complete":
            lock.release()
            return folder, manifest, None
        _not_imported(folder, manifest)
        forced = _versions_agree(folder, manifest, fresh, force)
        manifest, redone = _heal(folder, manifest)
        _sweep(folder, manifest)
    except BaseException:
        lock.release()
        raise
    note: dict[str, Any] = {"time": fresh.created, "versions": fresh.versions, "device": fresh.device}
    note |= {"pid": os.getpid()}
    note |= {"forced": True} if forced else {}
    note |= {"redone_batches": redone} if redone else {}
    update: dict[str, Any] = {"status": "running", "continuations": [*manifest.continuations, note]}
    # What the first start did not know yet (a noise floor, a plan) is filled in; what it recorded stays.
    missing = {k for k, v in fresh if k not in RESERVED and v not in (None, {}, []) and not getattr(manifest, k, None)}
    update |= {key: getattr(fresh, key) for key in missing}
    return folder, manifest.model_copy(update=update), lock


def _matching(folder: Path, ident: str) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.id8 != ident:
        raise RunFolderError(
            f"{folder} holds another run: its id is {manifest.id8}, and what was asked has the id {ident} "
            "(other settings, prompts or weights). Choose another folder with --out FOLDER."
        )
    ours, theirs = (tuple(int(n) for n in v.split(".")) for v in (SCHEMA_VERSION, manifest.schema_version))
    if manifest.status != "complete" and ours != theirs:
        raise RunFolderError(
            f"{folder} was begun with schema {manifest.schema_version}; this dynprobe writes {SCHEMA_VERSION}. "
            "Continue it with the version that began it, or choose another folder with --out FOLDER."
        )
    return manifest


def _lock(folder: Path) -> FolderLock:
    lock = FolderLock(folder)
    with writing(folder, "the lock file"):
        lock.acquire()
    return lock


def _not_imported(folder: Path, manifest: Manifest) -> None:
    """Refuse to write into an import: its files are of no batch, so what is lost of them would stay lost unseen."""
    if manifest.imported:
        raise RunFolderError(
            f"{folder} was imported from an export of a run that was {manifest.status}; it cannot be continued. "
            "Continue the run where it was made and import it again, or choose another folder with --out FOLDER."
        )


def _versions_agree(folder: Path, manifest: Manifest, fresh: Manifest, force: bool) -> bool:
    began, ours = ((m.versions.get("dynprobe"), _deciding(m)) for m in (manifest, fresh))
    if began == ours:
        return False
    if not force:
        one, other = (_by(*versions) for versions in (began, ours))
        raise RunFolderError(
            f"{folder} was begun by {one}, and this is {other}: its numbers may differ. "
            "Add --force to continue all the same (it is recorded), or choose another folder with --out FOLDER."
        )
    return True


def _deciding(manifest: Manifest) -> list[tuple[str, str]]:
    """Packages, with versions, whose plug-ins decide numbers of a run."""
    return sorted({(p["package"], p["version"]) for p in deciding(manifest.plugins or ())})


def _by(version: str | None, packages: Sequence[tuple[str, str]]) -> str:
    return " with ".join([f"dynprobe {version}", *(f"{name} {number}" for name, number in packages)])


def _heal(folder: Path, manifest: Manifest) -> tuple[Manifest, list[int]]:
    """Drop listed parts that are not there whole, and every part of a batch that is not finished."""
    broken = {part.path for part in manifest.parts if not _whole(folder / part.path, part.bytes)}
    redone = {part.batch for part in manifest.parts if part.path in broken and part.batch is not None}
    finished = [number for number in manifest.finished if number not in redone]
    parts = [p for p in manifest.parts if p.path not in broken and (p.batch is None or p.batch in finished)]
    facts = {key: value for key, value in manifest.batch_facts.items() if key.isdigit() and int(key) in finished}
    healed = manifest.model_copy(update={"finished": finished, "parts": parts, "batch_facts": facts})
    return healed, sorted(redone.intersection(manifest.finished))


def _whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _sweep(folder: Path, manifest: Manifest) -> None:
    """Remove temporary files and parts that are not listed; a file with any other name is the user's."""
    listed = {folder / part.path for part in manifest.parts}
    found = list(folder.glob(f"{TEMPORARY}*"))
    for name, table in TABLES.items():
        if table.sharded:
            inside = folder / name
            found += [*inside.glob(f"{TEMPORARY}*"), *inside.glob("part-*.parquet"), *inside.glob("whole.parquet")]
        else:
            found.append(folder / f"{name}.parquet")
    for path in found:
        if path not in listed:
            remove(path)
