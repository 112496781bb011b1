"""``import`` and ``validate``: anyone's trajectory file, checked, and made into a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli._app import app

__all__: list[str] = []

_IMPORT = """
Examples:

  dynprobe import --template > dump_states.py

  dynprobe import states.npz

  dynprobe import states.safetensors --name my-model --states
"""


@app.command("import", epilog=_IMPORT)
def _import(
    file: Annotated[Path | None, typer.Argument(help="Trajectory file: .npz, .safetensors or .parquet.")] = None,
    template: Annotated[
        bool, typer.Option("--template", help="Print plain NumPy that writes such a file, to paste beside a loop.")
    ] = False,
    out: option.Out = "runs",
    name: Annotated[str | None, typer.Option(help="Name of the model; default the file's own.")] = None,
    track: Annotated[
        str | None, typer.Option(help="Stage the samples table speaks of; default the one that ends the file.")
    ] = None,
    sink: Annotated[
        int | None,
        typer.Option(help="First positions that stay out of means; default 1, as in a run of a model."),
    ] = None,
    states: Annotated[bool, typer.Option("--states", help="Store the states in the run too.")] = False,
    force: option.Force = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Make a run of a file of states, without the model that made them."""
    from dynprobe.cli._ingest_commands import import_command

    import_command(file, template, json, quiet, out=out, name=name, track=track, sink=sink, states=states, force=force)


@app.command("validate")
def _validate(
    file: Annotated[Path, typer.Argument(help="Trajectory file: .npz, .safetensors or .parquet.")],
    json: option.Json = False,
) -> None:
    """Check a file of states: print what is in it and what is missing. Exit code 2 where it cannot be used."""
    from dynprobe.cli._ingest_commands import validate_command

    raise typer.Exit(validate_command(file, json))
