"""What ``import`` and ``validate`` do: one call, then printing."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from dynprobe.cli._commands import print_json
from dynprobe.errors import UsageError

__all__ = ["import_command", "validate_command"]


def import_command(file: Path | None, template: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """``dynprobe import``."""
    if template:
        from dynprobe.runs import TEMPLATE

        if file is not None:
            raise UsageError(f"--template prints code and reads no file; leave out {file}")
        print(TEMPLATE, end="")  # noqa: T201
        return
    if file is None:
        raise UsageError("name a trajectory file, or type dynprobe import --template for the code that writes one")
    from dynprobe.cli import _render
    from dynprobe.protocols import ingest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run and the lines below say them
        done = ingest(file, **options)
    if as_json:
        print_json({"run": str(done.path), "status": done.status, "summary": done.summary})
    elif not quiet:
        _render.run(done)


def validate_command(
    file: Path, as_json: bool, dims: str | None, depths: str | None, final_norm: str | None, allow_bin: bool
) -> int:
    """``dynprobe validate``; the exit code."""
    from dynprobe.cli._render_ingest import trajectory
    from dynprobe.runs import read_trajectory
    from dynprobe.runs._trajectory_layers import Reading, read_depths

    try:
        axes = None if dims is None else tuple(name.strip() for name in dims.split(","))
        found = read_trajectory(file, Reading(axes, read_depths(depths), final_norm, allow_bin))
    except UsageError as error:
        if as_json:
            print_json({"valid": False, "file": str(file), "error": str(error)})
        else:
            print(f"dynprobe: {error}", file=sys.stderr)  # noqa: T201
        return UsageError.exit_code
    if as_json:
        print_json({"valid": True, **found.describe()})
    else:
        trajectory(found)
    return 0
