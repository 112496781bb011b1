"""``bench``: what everything costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._app import given_flags
from dynprobe.cli._help import Command, new_app

__all__ = ["app"]

app = new_app()

_EXAMPLES = """
Examples:
  dynprobe bench --only capture --batch 1 --length 16 --rounds 3 --peers none
  dynprobe bench --model tiny-llama --only metrics,disk --rounds 3 --peers none --json
  dynprobe bench --model smollm2-135m
"""


@app.command("bench", cls=Command, epilog=_EXAMPLES)
def _bench(
    context: typer.Context,
    model: option.Model = None,
    batch: Annotated[int, typer.Option(help="Rows of a forward, and of a text.")] = 8,
    length: Annotated[int, typer.Option(help="Length of each row, in tokens.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of every comparison: median and quartiles are over them.")] = 7,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are written in sections generation and attractor.")] = 32,
    strengths: Annotated[int, typer.Option(help="Number of strengths in section sweep.")] = 16,
    layers: Annotated[int, typer.Option(help="Number of layers in section sweep, at most.")] = 4,
    megabytes: Annotated[float, typer.Option(help="Megabytes of states that section states writes.")] = 64.0,
    only: Annotated[
        str | None,
        typer.Option(
            help="Sections: capture,metrics,states,disk,generation,sweep,attractor. Default all.",
            autocompletion=words.listed("protocols/_bench.py", "SECTIONS"),
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(help="auto (all that are installed), none, or hooks,nnsight,transformer_lens,pyvene,torchlens."),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file. Default bench-MODEL-TIME.json. States are written beside it for a moment."),
    ] = None,
    dtype: option.Dtype = "float32",
    device: option.Device = "auto",
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Measure capture, metrics, disk, generation, sweep and attractor here, beside other libraries.

    Every figure is an arm's time over its baseline's in the same round: median and quartiles.
    """
    given = given_flags(context, dict(context.params))
    from dynprobe.cli._bench_commands import bench_command

    bench_command(given)
