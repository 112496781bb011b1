"""Which runs are there? One row per run folder, from the manifests alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dynprobe.errors import RunFolderError, near_path
from dynprobe.runs._manifest import MANIFEST_NAME
from dynprobe.runs._open_run import open_run
from dynprobe.runs._protocol import MAIN_TABLE, in_short, protocol_of

__all__ = ["list_runs"]

_COLUMNS = ["path", "time", "model", "id8", "status", "protocol", "perturbation", "rows"]


def list_runs(root: str | Path = "runs") -> pd.DataFrame:
    """Return one row per run directly under ``root`` (or ``root`` itself), oldest first.

    ``perturbation`` says in short what was written, ``rows`` counts the samples, or the trials of a threshold run.
    A folder whose manifest cannot be read has the status ``damaged`` and no other fact.

    Args:
        root: A folder in which runs lie.

    Raises:
        RunFolderError: There is no such folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as empty:
        ...     list(list_runs(empty).columns)
        ['path', 'time', 'model', 'id8', 'status', 'protocol', 'perturbation', 'rows']
    """
    folder = Path(root)
    if not folder.is_dir():
        raise RunFolderError(
            f"There is no folder {folder}.{near_path(folder)} Name the one given as --out, or make a run first."
        )
    found = (
        [folder] if (folder / MANIFEST_NAME).is_file() else sorted(p.parent for p in folder.glob(f"*/{MANIFEST_NAME}"))
    )
    rows = [_row(path) for path in found if not path.name.startswith(".")]
    frame = pd.DataFrame(rows, columns=_COLUMNS).astype({"rows": "Int64"})
    return frame.sort_values(["time", "path"], na_position="last", ignore_index=True)


def _row(path: Path) -> dict[str, object]:
    try:
        run = open_run(path)
    except RunFolderError:
        return {"path": str(path), "status": "damaged"}
    manifest = run.manifest
    protocol = protocol_of(manifest.config)
    return {
        "path": str(path),
        "time": manifest.created,
        "model": manifest.model_name,
        "id8": manifest.id8,
        "status": run.status,
        "protocol": protocol,
        "perturbation": in_short(manifest),
        "rows": manifest.rows().get(MAIN_TABLE[protocol], 0),
    }
