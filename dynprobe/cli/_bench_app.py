"""``bench``: what everything costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli._app import app, given_flags

__all__: list[str] = []

_EXAMPLES = """
Examples:

  dynprobe bench --model smollm2-135m

  dynprobe bench --model smollm2-135m --only capture,disk --batch 1 --length 16 --rounds 15

  dynprobe bench --model gpt2 --peers none --json
"""


@app.command("bench", epilog=_EXAMPLES)
def _bench(
    context: typer.Context,
    model: option.Model = None,
    batch: Annotated[int, typer.Option(help="Rows of a forward, and of a text.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each row.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of every comparison.")] = 7,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are written in generation and attractor.")] = 32,
    strengths: Annotated[int, typer.Option(help="Strengths of sweep.")] = 16,
    layers: Annotated[int, typer.Option(help="Layers of sweep, at most.")] = 4,
    megabytes: Annotated[float, typer.Option(help="Size of the states of states.")] = 64.0,
    only: Annotated[
        str | None,
        typer.Option(help="Sections: capture,metrics,states,disk,generation,sweep,attractor. Default all."),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(help="auto (all that are installed), none, or hooks,nnsight,transformer_lens,pyvene,torchlens."),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file; default bench-MODEL-TIME.json. States are written beside it for a moment."),
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
