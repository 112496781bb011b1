"""``import`` and ``validate``: anyone's states, checked, and made into a run; an exported run made one again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._help import Command, new_app

__all__ = ["app"]

app = new_app()

_IMPORT = """
Examples:
  dynprobe import --template
  dynprobe import states.npz --name my-model --states
  dynprobe import my-dataset
  dynprobe import hidden_states.pt --allow-bin --depths 2,16,29,32 --name gpt2
"""

_VALIDATE = """
Examples:
  dynprobe validate states.npz
  dynprobe validate states.npz --json
"""

_Dims = Annotated[
    str | None,
    typer.Option(help="Axes of a stack of layers in their order, out of layer, batch, pos, dim. Default: found."),
]
_Depths = Annotated[
    str | None,
    typer.Option(help="Depths of its layers: 2,16,29 or 0:13; d is the input of block d. Default 0, 1, 2, …"),
]
_FinalNorm = Annotated[
    str | None,
    typer.Option(
        help="applied: the last state is after the final norm, and is left out; none: it is not. "
        "Default: as the file says."
    ),
]
_File = "Trajectory file, dump of layers (.npz, .safetensors, .parquet, .npy, .pt), folder of them, or exported run."


@app.command("import", cls=Command, epilog=_IMPORT)
def _import(
    file: Annotated[
        Path | None, typer.Argument(help=_File + " Not needed for --template.", autocompletion=words.files)
    ] = None,
    template: Annotated[
        bool, typer.Option("--template", help="Print plain NumPy that writes such a file, to paste beside a loop.")
    ] = False,
    out: option.Out = "runs",
    name: Annotated[str | None, typer.Option(help="Name of the model. Default the file's own.")] = None,
    track: Annotated[
        str | None, typer.Option(help="Stage the samples table speaks of. Default the one that ends the file.")
    ] = None,
    sink: Annotated[
        int | None,
        typer.Option(help="Number of first positions that stay out of means. Default 1, as in a run of a model."),
    ] = None,
    states: option.States = False,
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


@app.command("validate", cls=Command, epilog=_VALIDATE)
def _validate(
    file: Annotated[
        Path,
        typer.Argument(help="Trajectory file, dump of layers, or folder of them.", autocompletion=words.files),
    ],
    dims: _Dims = None,
    depths: _Depths = None,
    final_norm: _FinalNorm = None,
    allow_bin: option.AllowBin = False,
    json: option.Json = False,
) -> None:
    """Check a file of states: print what is in it and what is missing. Exit code 2 where it cannot be used."""
    from dynprobe.cli._ingest_commands import validate_command

    raise typer.Exit(validate_command(file, json, dims, depths, final_norm, allow_bin))
