"""Files that are there whole or not at all.

Every file of a run folder is written under a temporary name in the folder it belongs to, synced to the device, and
renamed; the folder is synced after it. A kill at any moment leaves either the old file or the new one, and at worst a
temporary name that the next start removes. An operating-system error on the way removes the temporary file and becomes
a ``RunFolderError`` that says how much room was needed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dynprobe.errors import RunFolderError

__all__ = ["TEMPORARY", "Written", "keep", "remove", "sync_folder", "write_bytes", "write_stream", "writing"]

#: Every temporary file starts with this; nothing else in a run folder does.
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Written:
    """Size and SHA-256 of a file that is in place."""

    bytes: int
    sha256: str


def write_bytes(path: Path, data: bytes | memoryview) -> Written:
    """Put ``data`` at ``path``: temporary name, flush, sync, rename.

    The folder itself is not synced here: a batch writes several files and syncs each folder once.

    Raises:
        OSError: The device is full, read-only or gone; nothing is left under either name.
    """

    def produce(temporary: Path) -> str:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return hashlib.sha256(data).hexdigest()

    return _place(path, produce)


def write_stream(path: Path, produce: Callable[[Path], None]) -> Written:
    """Let ``produce`` write a large file under a temporary name, then sync, hash and rename it.

    The hash is taken from the page cache while the device is still busy with the sync, so that it costs little time of
    its own.
    """

    def run(temporary: Path) -> str:
        produce(temporary)
        return _sync_and_hash(temporary)

    return _place(path, run)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep(path: Path, as_name: Path) -> None:
    """Give a file that is about to be replaced a second name, under which it stays; one that is not there has none.

    Nothing is copied: the file is linked, and is on the device already. Where links are not possible it is copied.
    """
    if not path.exists():
        return
    temporary = as_name.with_name(f"{TEMPORARY}{os.getpid()}-{as_name.name}")
    remove(temporary)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, as_name)  # noqa: PTH105
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Remove a file that is only in the way; one that is gone already, or cannot be removed, is left as it is."""
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def writing(folder: Path, what: str, needed: int | None = None) -> Iterator[None]:
    """Turn an operating-system error into one that says what to do.

    Args:
        folder: The run folder.
        what: What was being written, relative to the folder.
        needed: Bytes that had to be written, where known.
    """
    try:
        yield
    except OSError as error:
        raise RunFolderError(_explain(error, folder, what, needed)) from error


def _place(path: Path, produce: Callable[[Path], str]) -> Written:
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        digest = produce(temporary)
        size = temporary.stat().st_size
        os.replace(temporary, path)  # noqa: PTH105 (the tests cut the power at exactly this call)
    except BaseException:
        remove(temporary)
        raise
    return Written(size, digest)


def _sync_and_hash(path: Path) -> str:
    failure: list[BaseException] = []

    def sync(descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except BaseException as error:  # raised again in the thread that writes
            failure.append(error)

    with path.open("rb") as file:
        thread = threading.Thread(target=sync, args=(file.fileno(),), name="dynprobe-fsync")
        thread.start()
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                digest = hashlib.sha256(view).hexdigest()
        finally:
            thread.join()
    if failure:
        raise failure.pop()  # popped, so that the error and this frame do not keep each other alive
    return digest


def _explain(error: OSError, folder: Path, what: str, needed: int | None) -> str:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(error)
    refused = error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}
    room = "" if needed is None else f"; {_size(needed)} needed"
    with contextlib.suppress(OSError):
        room += f", {_size(shutil.disk_usage(folder if folder.exists() else folder.parent).free)} free"
    reason = error.strerror or str(error)
    if full:
        advice = (
            "Free some space and type the same command again: finished batches are kept. Or choose another disk "
            "with --out FOLDER."
        )
    elif refused:
        advice = "The folder cannot be written. Make it writable, or choose another one with --out FOLDER."
    else:
        advice = "Type the same command again: finished batches are kept. Or choose another folder with --out FOLDER."
    return f"Cannot write {what} in {folder}: {reason}{room}. {advice}"


def _size(count: int) -> str:
    """Return a number of bytes in words.

    Example:
        >>> _size(2_500_000), _size(12)
        ('2.5 MB', '12 bytes')
    """
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
