"""Making a page: open the runs, compare them where there are several, render, and put the file in its place whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.errors import DynprobeError, UsageError
from dynprobe.runs._atomic import write_bytes, writing
from dynprobe.runs._report._parts import Report, Section

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["report"]

#: Rows of the largest embedded table or map; others get a share of it.
ROWS = 24_000
NAME = "report.html"


def report(
    runs: Run | str | Path | Sequence[Run | str | Path], *, out: str | Path | None = None, rows: int = ROWS
) -> Path:
    """Write one self-contained HTML page about a run, or about several side by side.

    Args:
        runs: A run or its folder, or several; two or more are compared as well.
        out: File to write. Default ``report.html`` in the run's folder, of several runs in the folder they share.
        rows: Rows of the largest map or table that is embedded, shared among the runs; what is left out is said.

    Returns:
        The file.

    Raises:
        RunFolderError: A folder is no run, is damaged, or the file cannot be written.
        UsageError: Plotly or jinja2 is missing, no run is given, or the file has another ending.

    Example:
        >>> import dynprobe as dp
        >>> dp.report("runs/2026-11-22T18-46-44_tiny-llama_f1c2d6bd")  # doctest: +SKIP
        PosixPath('runs/2026-11-22T18-46-44_tiny-llama_f1c2d6bd/report.html')
    """
    from dynprobe.runs._open_run import open_run
    from dynprobe.runs._report._html import rendered
    from dynprobe.runs._report._run_section import run_section
    from dynprobe.runs._run import Run

    given = [runs] if isinstance(runs, str | Path | Run) else list(runs)
    if not given:
        raise UsageError("report was given no run; name at least one folder")
    if rows < 100:
        raise UsageError(f"rows={rows} leaves nothing to look at; at least 100 are embedded")
    opened = [item if isinstance(item, Run) else open_run(item) for item in given]
    target = _target(opened, out)
    sections = []
    if len(opened) > 1:
        sections.append(_comparison(opened))
    keys = [f"run{number}" for number in range(1, len(opened) + 1)]
    share = max(rows // len(opened), 100)
    # Beside a comparison the runs are what it rests on: there for whoever asks, folded until then.
    alone = len(opened) == 1
    for run, key, name in zip(opened, keys, _labels(opened), strict=True):
        sections.append(run_section(run, key, share, name=name, unfolded=alone))
    names = list(dict.fromkeys(run.manifest.model_name for run in opened))
    if len(opened) == 1:
        title, lead = f"{names[0]}: {sections[0].title.rpartition(' · ')[2]}", "A run of dynprobe."
    else:
        title, lead = f"{len(opened)} runs: {', '.join(names)}", "Runs of dynprobe, side by side."
    page = rendered(Report(title, lead, sections))
    with writing(target.parent, target.name, len(page)):
        write_bytes(target, page)
    return target


def _labels(runs: Sequence[Run]) -> list[str]:
    """What sections are called, as a comparison does: two runs of one model are told apart by their ids."""
    models = [run.manifest.model_name for run in runs]
    labels = [m if models.count(m) == 1 else f"{m} {run.manifest.id8[:4]}" for m, run in zip(models, runs, strict=True)]
    return labels if len(set(labels)) == len(labels) else [f"{label} #{n}" for n, label in enumerate(labels, 1)]


def _target(runs: Sequence[Run], out: str | Path | None) -> Path:
    if out is None:
        folders = [run.path.resolve() for run in runs]
        return (folders[0] if len(folders) == 1 else Path(os.path.commonpath([f.parent for f in folders]))) / NAME
    target = Path(out)
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {target}: a page ends in .html")
    if not target.parent.is_dir():
        raise UsageError(f"--out {target}: there is no folder {target.parent}")
    return target


def _comparison(runs: Sequence[Run]) -> Section:
    from dynprobe.runs._compare import compare
    from dynprobe.runs._report._compared import comparison_section

    try:
        return comparison_section(compare(runs))
    except DynprobeError as error:
        if not isinstance(error, UsageError):
            raise
        # Runs that have nothing in common can still stand on one page.
        return Section("compare", "Comparison", missing=[("Comparison", str(error))])
