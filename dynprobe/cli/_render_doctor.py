"""What ``doctor`` says about a run folder."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.table import Table

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.runs import Examination, Manifest

__all__ = ["examination", "left"]

_ROWS = 40


def examination(found: Examination) -> None:
    """Print an examination."""
    console = new_console()
    for step in found.done:
        console.print(f"done: {step}", soft_wrap=True, markup=False)
    if found.healthy:
        files = 0 if found.manifest is None else len(found.manifest.parts)
        console.print(f"{found.path}: whole; {files} files are what was written", soft_wrap=True, markup=False)
    else:
        n = len(found.damages)
        table = Table(title=f"{found.path.name}: {n} damage{'s' * (n > 1)}")
        for name in ("file", "damage", "--repair would"):
            table.add_column(name, overflow="fold")
        for damage in found.damages[:_ROWS]:
            table.add_row(damage.path, damage.what, damage.remedy or "nothing: it cannot be repaired")
        console.print(table)
        if len(found.damages) > _ROWS:
            console.print(f"… {len(found.damages) - _ROWS} more: --json", soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    command = None if found.manifest is None else found.manifest.command
    if found.done and command and found.manifest is not None and _goes_on(found.manifest):
        console.print(f"continue: {_continued(command, str(found.path))}", soft_wrap=True, markup=False)


def _goes_on(manifest: Manifest) -> bool:
    """Whether this version may make the rest of a run."""
    from dynprobe.runs import SCHEMA_VERSION

    return manifest.status != "complete" and manifest.schema_version == SCHEMA_VERSION


def _continued(command: str | list[str], folder: str) -> str:
    """Return the command that made the run, with the folder where it lies now."""
    words = list(command) if isinstance(command, list) else shlex.split(command)
    at = [i for i, word in enumerate(words) if word in ("--out", "--output_path", "--output-path")]
    if at and at[-1] + 1 < len(words):
        words[at[-1] + 1] = folder
        return shlex.join(words)
    return shlex.join([*[word for word in words if not word.startswith("--out=")], "--out", folder])


def left(found: Examination) -> str:
    """Return what the error says while a run is damaged."""
    n = len(found.damages)
    many = f"{n} damage{'s' * (n > 1)} in {found.path}"
    if found.done and found.repairable and found.manifest is not None and _goes_on(found.manifest):
        return f"{many} left until the run is continued: the command that made it makes again what is lost"
    if found.done:
        return f"{many} left, which no repair can mend; make the run again with another --out"
    if found.busy:
        return f"{many}; a process writes it: look again when that has ended"
    if not found.repairable and found.manifest is not None and found.manifest.imported:
        return f"{many}, a run that was imported: remove that folder and import it again with dynprobe import"
    if not found.repairable:
        what = "; what can be mended is, with: " if any(d.remedy for d in found.damages) else ""
        return f"{many}, not all of which can be repaired{what}" + (
            f"dynprobe doctor {shlex.quote(str(found.path))} --repair" if what else "; make the run again"
        )
    return f"{many}; nothing was changed. To mend it: dynprobe doctor {shlex.quote(str(found.path))} --repair"
