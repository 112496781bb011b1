"""``export``: a run for others, as a dataset folder or in a format of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli._app import app

__all__: list[str] = []

_EXAMPLES = """
Examples:

  dynprobe export RUN my-dataset

  dynprobe export RUN my-dataset --redact-text --licence cc-by-4.0 --push me/my-run

  dynprobe export RUN arrays --to safetensors --table states --condition clean

  dynprobe import my-dataset
"""


@app.command("export", epilog=_EXAMPLES)
def _export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder that is made; must not be there.")],
    to: Annotated[str, typer.Option(help="hf, arrow, csv, npz, safetensors or zarr.")] = "hf",
    table: Annotated[list[str] | None, typer.Option(help="A table; may be repeated. Default all.")] = None,
    condition: Annotated[
        list[str] | None, typer.Option(help="A condition by id or arm; may be repeated. Default all.")
    ] = None,
    redact_text: Annotated[
        bool,
        typer.Option("--redact-text", help="Take out texts, token ids, states, and tables with a row per position."),
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Licence you give the data, such as cc-by-4.0.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="NAME/REPOSITORY on the hub to send the folder to.")] = None,
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
