"""``plugins``: what other packages add to this installation."""

from __future__ import annotations

import typer

from dynprobe.cli import _options as option
from dynprobe.cli._help import Command, new_app

__all__ = ["app"]

app = new_app()

_EXAMPLES = """
Examples:
  dynprobe plugins
  dynprobe plugins --json
"""


@app.command("plugins", cls=Command, epilog=_EXAMPLES)
def _plugins(json: option.Json = False) -> None:
    """List what other packages add, by kind, and whether it loads."""
    from dynprobe.cli._plugins_commands import plugins_command

    if plugins_command(json):
        raise typer.Exit(1)
