"""``init``: a configuration file with every setting at its default."""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._help import Command, new_app

__all__ = ["app"]

app = new_app()

_EXAMPLES = """
Examples:
  dynprobe init
  dynprobe init my-sweep.yaml --for sweep
  dynprobe init - --for panel
"""


@app.command("init", cls=Command, epilog=_EXAMPLES)
def _init(
    file: Annotated[
        str | None,
        typer.Argument(
            help="File to write; - is standard output. Default PROTOCOL.yaml here.", autocompletion=words.files
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            "--for",
            help="Whose settings: run, sweep, threshold, iterate, recover, attract, dissociate, panel, eval.",
            autocompletion=words.one_of("cli/_init_commands.py", "PROTOCOLS"),
        ),
    ] = "run",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    quiet: option.Quiet = False,
) -> None:
    """Write every setting of a protocol with its default, meaning and unit, to be edited and given to --config."""
    from dynprobe.cli._init_commands import init_command

    init_command(file, protocol, force=force, quiet=quiet)
