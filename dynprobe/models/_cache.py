"""The user's cache: where fetched and converted models live, and how they get there whole.

A model that is downloaded or converted is written into a folder of its own next to its final place and renamed once,
under a lock. So a reader sees either no model or a complete one, and two processes never convert the same file at the
same time. Nothing here deletes a model the user did not ask to replace.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dynprobe.errors import ModelError

__all__ = ["Progress", "cache_root", "locked", "new_folder", "report"]

Progress = Callable[[str], None]

_LOG = logging.getLogger("dynprobe.models")


def report(progress: Progress | None, message: str) -> None:
    """Hand one line of progress to the caller's function, or to the ``dynprobe.models`` logger."""
    if progress is None:
        _LOG.info(message)
    else:
        progress(message)


def cache_root() -> Path:
    """Return the cache folder: ``$DYNPROBE_CACHE``, else ``$XDG_CACHE_HOME/dynprobe``, else ``~/.cache/dynprobe``."""
    own = os.environ.get("DYNPROBE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    base = Path(xdg).expanduser() if xdg else Path.home() / ".cache"
    return (base / "dynprobe").absolute()


@contextmanager
def locked(target: Path, progress: Progress | None = None) -> Iterator[None]:
    """Hold the lock that guards the making of ``target``; says so once if another process has it."""
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise _unwritable(target.parent, exc) from exc
    lock = FileLock(str(target.parent / f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(progress, f"another process is preparing {target.name}; waiting for it")
        lock.acquire()
    except OSError as exc:
        raise _unwritable(target.parent, exc) from exc
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` that becomes ``target`` by one rename if the block succeeds.

    An older ``target`` is moved aside first and removed only after the new one stands in its place. If the block
    raises, the temporary folder is removed and ``target`` is as it was.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as exc:
        raise _unwritable(target.parent, exc) from exc
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.rename(aside / target.name)
            temporary.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(folder: Path, exc: OSError) -> ModelError:
    return ModelError(
        f"The model cache {folder} cannot be written ({exc.strerror or exc}). "
        "Set DYNPROBE_CACHE to a folder you may write to, for example: export DYNPROBE_CACHE=$PWD/.cache"
    )
