"""Open a run folder, or say what the folder is instead."""

from __future__ import annotations

from pathlib import Path

from dynprobe.errors import RunFolderError, near_path
from dynprobe.runs._advice import ask_doctor
from dynprobe.runs._manifest import MANIFEST_NAME, PREVIOUS_NAME, read_manifest
from dynprobe.runs._run import Run

__all__ = ["looks_like_run", "open_run"]


def open_run(path: str | Path) -> Run:
    """Open a run folder.

    Args:
        path: The folder, or its ``manifest.json``.

    Raises:
        RunFolderError: It is no run folder, damaged, or of a newer schema; runs that lie nearby are suggested.

    Example:
        >>> import tempfile
        >>> from dynprobe.protocols import run
        >>> with tempfile.TemporaryDirectory() as out:
        ...     made = run("tiny-llama", ["In the beginning"], max_new_tokens=0, out=out)
        ...     again = open_run(made.path)
        ...     again.status, len(again.samples)
        ('complete', 1)
    """
    folder = Path(path)
    if folder.name == MANIFEST_NAME:
        folder = folder.parent
    if not (folder / MANIFEST_NAME).is_file():
        raise RunFolderError(_not_a_run(folder))
    return Run(folder, read_manifest(folder))


def looks_like_run(folder: Path) -> bool:
    """Return whether a folder has what only a run folder has, whatever became of its manifest."""
    marks = (MANIFEST_NAME, PREVIOUS_NAME, "prompts.parquet", "conditions.parquet", "samples")
    return folder.is_dir() and any((folder / name).exists() for name in marks)


def _not_a_run(folder: Path) -> str:
    if not folder.exists():
        return f"There is no run folder {folder}.{near_path(folder)} Type dynprobe ls to see your runs."
    if (folder / "panel.json").is_file():
        own = folder / "runs"
        return f"{folder} is a panel of many runs; open it with dynprobe.runs.open_panel, its runs lie in {own}"
    inside = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST_NAME}")) if folder.is_dir() else []
    if inside:
        example = folder / inside[-1]
        return f"{folder} holds {len(inside)} runs and is none itself. Open one of them, for example {example}."
    if (folder / "dynprobe.json").is_file():
        return f"{folder} is an exported run; make a run folder of it first. Type: dynprobe import {folder}"
    if looks_like_run(folder):
        return f"{folder} is damaged: its {MANIFEST_NAME} is missing. {ask_doctor(folder)}"
    return f"{folder} is no run folder: it has no {MANIFEST_NAME}. Type dynprobe ls to see your runs."
