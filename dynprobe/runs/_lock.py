"""One writer per run folder.

An advisory lock (``flock``) on a file in the folder. The kernel releases it when the process ends, however it ends, so
a killed run never has to be unlocked by hand. The file holds the writer's process id and host for the message. Where
the system has no ``flock`` (Windows) or the file system refuses it (some network mounts), the writer goes on without
and says so once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from pathlib import Path
from types import ModuleType

from dynprobe.errors import RunFolderError
from dynprobe.runs._atomic import remove
from dynprobe.runs._json import loads

__all__ = ["LOCK_NAME", "FolderLock", "is_held"]

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None

#: Name of the lock file, in a run folder and (for the moment of choosing a name) in its parent.
LOCK_NAME = ".lock"

_BUSY = {errno.EACCES, errno.EAGAIN}
_UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


class FolderLock:
    """The lock of one folder.

    Args:
        folder: An existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self, wait: float = 0.5) -> None:
        """Take the lock, trying for ``wait`` seconds (a reader asking for the status holds it for an instant).

        Raises:
            RunFolderError: Another process holds it; the message gives its process id.
            OSError: The lock file cannot be created.
        """
        deadline = time.monotonic() + wait
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            taken = _try(descriptor)
            # The holder may have removed the file between our open and our lock: then ours locks nothing.
            if taken and _same_file(descriptor, self.path):
                break
            os.close(descriptor)
            if not taken and time.monotonic() > deadline:
                raise RunFolderError(_in_use(self.path))
            time.sleep(0.02)
        self._descriptor = descriptor
        note = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        os.ftruncate(descriptor, 0)
        os.write(descriptor, note.encode())

    def release(self) -> None:
        """Give the lock back and remove its file; does nothing when it is not held."""
        if self._descriptor is None:
            return
        remove(self.path)
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = None

    def __del__(self) -> None:
        # A writer that was dropped without being closed must not lock the folder until the process ends.
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_held(folder: Path) -> bool:
    """Return whether a living writer holds the lock of ``folder``; without ``flock``, whether a lock file is there."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if fcntl is None:
            return True
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _BUSY
    else:
        return False
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if error.errno not in _UNSUPPORTED:
            os.close(descriptor)
            raise
        warnings.warn(
            "This file system has no locks: take care that only one process writes this run folder.", stacklevel=4
        )
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _in_use(path: Path) -> str:
    try:
        holder = loads(path.read_text(encoding="utf-8"))
        who = f"process {int(holder['pid'])} on {holder['host']}"
        if int(holder["pid"]) == os.getpid() and holder["host"] == socket.gethostname():
            who = f"another writer of this very process ({os.getpid()})"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"The run folder {path.parent} is being written by {who}. "
        "Wait until it has ended (or close that writer), or choose another folder with --out FOLDER."
    )
