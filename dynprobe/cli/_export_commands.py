"""What ``export`` does: one call, then printing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynprobe.cli._commands import print_json

__all__ = ["export_command"]


def export_command(run: Path, folder: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """``dynprobe export``."""
    from dynprobe.cli._render_export import exported
    from dynprobe.runs import export_run, open_run

    done = export_run(open_run(run), options.pop("to"), folder, **options)
    if as_json:
        print_json(
            {
                "folder": str(done.path), "to": done.to, "rows": done.rows, "bytes": done.bytes,
                "removed": list(done.removed), "remarks": list(done.remarks), "address": done.address,
            }
        )  # fmt: skip
    elif not quiet:
        exported(done)
