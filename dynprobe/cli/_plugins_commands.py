"""What ``plugins`` does: try every entry point, then print."""

from __future__ import annotations

from dynprobe._plugins import GROUPS, Status, statuses
from dynprobe.cli._commands import print_json

__all__ = ["plugins_command"]


def plugins_command(as_json: bool) -> bool:
    """``dynprobe plugins``; returns whether one of them cannot be had."""
    found = statuses()
    if as_json:
        print_json([{**s.plugin.fact(), "value": s.plugin.value, "error": s.error or None} for s in found])
    else:
        _print(found)
    return any(status.error for status in found)


def _print(found: list[Status]) -> None:
    from rich.table import Table

    from dynprobe.cli._console import console

    if not found:
        print(f"no other package adds anything (entry points of {', '.join(GROUPS)}); see docs/extending.md")  # noqa: T201
        return
    table = Table(title="what other packages add")
    for heading in ("kind", "name", "package", "loads"):
        table.add_column(heading)
    for status in found:
        plugin = status.plugin
        kind = plugin.group.removeprefix("dynprobe.")
        table.add_row(kind, plugin.name, f"{plugin.package} {plugin.version}", "no" if status.error else "yes")
    console().print(table)
    for status in found:
        if status.error:
            print(f"\n{status.error}")  # noqa: T201
