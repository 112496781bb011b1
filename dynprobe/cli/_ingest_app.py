"""``import`` and ``validate``: anyone's states, checked, and made into a run; an exported run made one again."""

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

  dynprobe import hidden_states.pt --allow-bin --name gpt2

  dynprobe import hidden_states/ --depths 2,16,29,32

  dynprobe import exported-run/
"""

_Dims = Annotated[
    str | None, typer.Option(help="Axes of a stack of layers in their order, out of layer, batch, pos, dim.")
]
_Depths = Annotated[str | None, typer.Option(help="Depths of its layers: 2,16,29 or 0:13; d is the input of block d.")]
_FinalNorm = Annotated[
    str | None,
    typer.Option(help="applied: the last state is after the final norm, and is left out; none: it is not."),
]
_File = "Trajectory file, dump of layers (.npz, .safetensors, .parquet, .npy, .pt), folder of them, or exported run."


@app.command("import", epilog=_IMPORT)
def _import(
    file: Annotated[Path | None, typer.Argument(help=_File)] = None,
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
    dims: _Dims = None,
    depths: _Depths = None,
    final_norm: _FinalNorm = None,
    allow_bin: option.AllowBin = False,
    force: option.Force = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Make a run of states that others saved, without the model that made them; or of an exported run."""
    from dynprobe.cli._ingest_commands import import_command

    import_command(
        file, template, json, quiet, out=out, name=name, track=track, sink=sink, states=states, force=force, dims=dims,
        depths=depths, final_norm=final_norm, allow_bin=allow_bin,
    )  # fmt: skip


@app.command("validate")
def _validate(
    file: Annotated[Path, typer.Argument(help="Trajectory file, dump of layers, or folder of them.")],
    dims: _Dims = None,
    depths: _Depths = None,
    final_norm: _FinalNorm = None,
    allow_bin: option.AllowBin = False,
    json: option.Json = False,
) -> None:
    """Check a file of states: print what is in it and what is missing. Exit code 2 where it cannot be used."""
    from dynprobe.cli._ingest_commands import validate_command

    raise typer.Exit(validate_command(file, json, dims, depths, final_norm, allow_bin))
