"""A run folder that is open for writing: its path, its manifest, and the two moves that change them.

*Place* puts a packed table under its name; *commit* replaces the manifest. A file counts only after the commit that
lists it, so these two, in this order, are all that keeps a folder whole. Where an error leaves it open whether a commit
has happened, the bytes on disk decide, for they are what a reader will see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynprobe.errors import RunFolderError
from dynprobe.runs._atomic import keep, sync_folder, write_bytes, writing
from dynprobe.runs._lock import FolderLock
from dynprobe.runs._manifest import MANIFEST_NAME, PREVIOUS_NAME, Manifest, Part, encode_manifest
from dynprobe.runs._start import Clock

__all__ = ["OpenFolder"]


class OpenFolder:
    """A locked run folder and its manifest.

    Args:
        path: The folder.
        manifest: What its manifest says.
        lock: The lock held on it; None when it is complete and only read.
        clock: Returns the time.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: FolderLock | None, clock: Clock) -> None:
        self.path = path
        self.manifest = manifest
        self._lock, self._clock = lock, clock

    @property
    def is_open(self) -> bool:
        """Whether the lock is held."""
        return self._lock is not None

    def place(self, table: str, path: str, rows: int, data: memoryview, batch: int | None) -> Part:
        """Put a packed table at ``path`` and return its entry, which is not listed yet."""
        target = self.path / path
        with writing(self.path, path, len(data)):
            target.parent.mkdir(exist_ok=True)
            written = write_bytes(target, data)
        return Part(path=path, table=table, batch=batch, rows=rows, **vars(written))

    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest.

        Raises:
            RunFolderError: It could not be written; ``self.manifest`` is then what the disk says.
        """
        data = encode_manifest(manifest)
        path = self.path / MANIFEST_NAME
        with writing(self.path, MANIFEST_NAME, len(data)):
            keep(path, self.path / PREVIOUS_NAME)
            try:
                write_bytes(path, data)
                sync_folder(self.path)
            except BaseException:
                # Perhaps only the sync of the folder failed, after the rename.
                if path.exists() and path.read_bytes() == data:
                    self.manifest = manifest
                raise
        self.manifest = manifest

    def changed(self, **fields: Any) -> Manifest:
        """Return the manifest with other fields and the time of now."""
        return self.manifest.model_copy(update={**fields, "updated": self.time()})

    def time(self, precision: str = "seconds") -> str:
        """Return the time as ISO 8601 with offset."""
        return self._clock().isoformat(timespec=precision)

    def append(self, name: str, line: str) -> None:
        """Append a line to a text file; a line that a kill cut short does not spoil the next one."""
        with writing(self.path, name, len(line)), (self.path / name).open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.write(line.encode("utf-8", "backslashreplace") + b"\n")

    def require(self) -> None:
        """Refuse to write to a folder that is closed."""
        if not self.is_open:
            raise RunFolderError(
                f"{self.path} is {self.manifest.status} and closed for writing. "
                "Begin the run again to continue it, or open it with dynprobe.open to read it."
            )

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
