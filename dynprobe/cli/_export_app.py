"""``export``: a run for others, as a dataset folder or in a format of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._help import Command, new_app

__all__ = ["app"]

app = new_app()

_EXAMPLES = """
Examples:
  dynprobe export runs/*tiny-llama* my-dataset
  dynprobe export runs/*tiny-llama* tables --to csv --table samples --redact-text
  dynprobe export runs/*with-states* arrays --to safetensors --table states --condition clean
  dynprobe export RUN my-dataset --licence cc-by-4.0 --push me/my-run
"""


@app.command("export", cls=Command, epilog=_EXAMPLES)
def _export(
    run: option.RunFolder,
    folder: Annotated[Path, typer.Argument(help="Folder that is made; must not be there.")],
    to: Annotated[
        str,
        typer.Option(
            help="Format: hf, arrow, csv, npz, safetensors or zarr.",
            autocompletion=words.one_of("runs/_export_formats.py", "FORMATS"),
        ),
    ] = "hf",
    table: Annotated[list[str] | None, typer.Option(help="A table; may be repeated. Default all.")] = None,
    condition: Annotated[
        list[str] | None, typer.Option(help="A condition by id or arm; may be repeated. Default all.")
    ] = None,
    redact_text: Annotated[
        bool,
        typer.Option("--redact-text", help="Take out texts, token ids, states, and tables with a row per position."),
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence", "--license", help="Licence you give the data, such as cc-by-4.0. Default none is named."
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="NAME/REPOSITORY on the hub to send the folder to. Default: nothing is sent.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make that repository public; default private.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Write a run for others: a dataset folder for the hub, or Arrow, CSV, NumPy, safetensors, Zarr."""
    from dynprobe.cli._export_commands import export_command

    export_command(
        run, folder, json, quiet, to=to, tables=table or None, conditions=condition or None, redact_text=redact_text,
        licence=licence, push=push, private=not public, force=force,
    )  # fmt: skip
