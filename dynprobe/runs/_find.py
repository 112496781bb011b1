"""Finding the folder of a run, or making one.

``--out`` names either a run folder itself or a parent in which runs lie side by side. In a parent, the run with the
same identity is continued if there is one; otherwise a new folder appears whole, with its manifest inside, by one
rename, so that no reader ever meets a run folder without a manifest. The model's name becomes part of a folder name
and is therefore reduced to letters, digits, dot, dash and underscore: it cannot lead anywhere else.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from dynprobe.errors import RunFolderError
from dynprobe.runs._atomic import TEMPORARY, sync_folder, write_bytes, writing
from dynprobe.runs._lock import FolderLock
from dynprobe.runs._manifest import MANIFEST_NAME, Manifest, encode_manifest, peek_id, read_manifest

__all__ = ["create_folder", "find_run", "folder_name", "parent_lock"]


def folder_name(when: dt.datetime, model_name: str, id8: str) -> str:
    """Return ``<time>_<model>_<id8>``, safe as one path component.

    Example:
        >>> folder_name(dt.datetime(2026, 11, 21, 23, 15, 2), "../../etc/pass wd", "a1b2c3d4")
        '2026-11-21T23-15-02_pass-wd_a1b2c3d4'
    """
    last = re.split(r"[/\\]", model_name.rstrip("/\\"))[-1]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:60].rstrip("-._")
    return f"{when:%Y-%m-%dT%H-%M-%S}_{slug or 'model'}_{id8}"


def find_run(parent: Path, id8: str) -> Path | None:
    """Return the run with this identity directly under ``parent``: a complete one first, else the newest."""
    found = [path for path in sorted(parent.iterdir()) if not path.name.startswith(".") and peek_id(path) == id8]
    if not found:
        return None

    def rank(path: Path) -> tuple[bool, str]:
        manifest = read_manifest(path)
        return manifest.status == "complete", manifest.created

    return max(found, key=rank) if len(found) > 1 else found[0]


def create_folder(parent: Path, name: str, manifest: Manifest) -> Path:
    """Make a run folder with its manifest; it appears under its name only when it is whole."""
    target = parent / name
    number = 1
    while target.exists():
        number += 1
        target = parent / f"{name}-{number}"
    temporary = parent / f"{TEMPORARY}{os.getpid()}-{name}"
    with writing(parent, f"the run folder {target.name}"):
        try:
            temporary.mkdir()
            write_bytes(temporary / MANIFEST_NAME, encode_manifest(manifest))
            sync_folder(temporary)
            os.rename(temporary, target)  # noqa: PTH104 (as in _atomic)
            sync_folder(parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


@contextlib.contextmanager
def parent_lock(parent: Path) -> Iterator[None]:
    """Hold the parent while a name is chosen, so that two starts of one run do not make two folders.

    A parent that cannot be written is not locked: a finished run in it can still be found.
    """
    lock = FolderLock(parent)
    try:
        lock.acquire(wait=10.0)
    except RunFolderError as error:
        raise RunFolderError(f"{parent} stays locked while another run starts in it. Try again. ({error})") from error
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()
