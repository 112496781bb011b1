"""What ``panel`` does: one call, then printing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynprobe.cli._commands import print_json
from dynprobe.cli._progress import Listener
from dynprobe.errors import DynprobeError

__all__ = ["panel_command"]


def panel_command(design: Path, given: dict[str, Any]) -> None:
    """``dynprobe panel``."""
    from dynprobe.cli import _render_panel
    from dynprobe.protocols import panel, plan_panel

    given.pop("design", None)
    as_json, quiet, dry_run = (bool(given.pop(name, False)) for name in ("json", "quiet", "dry_run"))
    if dry_run:
        cost = plan_panel(design, **given)
        print_json(cost) if as_json else _render_panel.cost(cost)
        lost = [row["model"] for row in cost["models"] if row["reason"] is not None]
        if lost:
            raise DynprobeError(f"{len(lost)} of {len(cost['models'])} models would fail: {', '.join(lost)}")
        return
    with Listener(quiet=quiet or as_json, tables=False) as listener:
        found = panel(design, listener=listener, **given)
    if as_json:
        print_json({"panel": str(found.path), "status": found.status, "summary": found.summary})
    elif not quiet:
        _render_panel.panel(found)
    failed = len(found.failed)
    if failed:
        raise DynprobeError(
            f"{failed} of {len(found.cells)} cells failed; the reasons stand in {found.path / 'panel.json'}, and the "
            "same command tries them again"
        )
