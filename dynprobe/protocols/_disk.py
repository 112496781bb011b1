"""Room for the states of a run, asked before the first one is written.

States are the one thing a run writes whose size is known beforehand to the byte, and the one that fills disks. A run
that cannot end is refused before it begins; tables are small and are not counted.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from dynprobe.errors import RunFolderError
from dynprobe.protocols._prepare import Prepared
from dynprobe.runs._find import find_run

__all__ = ["refuse_full_disk"]


def refuse_full_disk(ready: Prepared, state_bytes: int) -> None:
    """Refuse a run whose states do not fit on the disk; what a run that is continued has written counts as there.

    Args:
        ready: What was asked for.
        state_bytes: Bytes of its states, at most (texts may end early).

    Raises:
        RunFolderError: If the disk has less room.
    """
    out = Path(ready.config.out)
    found = out if (out / "manifest.json").is_file() else find_run(out, ready.ident) if out.is_dir() else None
    there = sum(file.stat().st_size for file in (found / "states").glob("part-*")) if found is not None else 0
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if state_bytes - there > free:
        raise RunFolderError(
            f"the states of this run need up to {_gigabytes(state_bytes - there)}, and {place} has {_gigabytes(free)} "
            "free. Store fewer places (--where layers=50%), fewer prompts (--limit) or none (leave out --states: the "
            "metrics are computed all the same), or name another disk with --out FOLDER"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
