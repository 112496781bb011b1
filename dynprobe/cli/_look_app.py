"""``show``, ``ls`` and ``metrics``: what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._help import Command, new_app

__all__ = ["app"]

app = new_app()

_SHOW = """
Examples:
  dynprobe show runs/*tiny-llama*
  dynprobe show runs/*tiny-llama* --columns
  dynprobe show runs/*tiny-llama* --figure depth.png --plot depth
"""
_METRICS = """
Examples:
  dynprobe metrics
  dynprobe metrics kappa.phase/1
  dynprobe metrics erank.rv/1 --json
"""
_LS = """
Examples:
  dynprobe ls
  dynprobe ls runs --json
"""


@app.command("show", cls=Command, epilog=_SHOW)
def _show(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="A run folder, or the id that ls prints. Not needed for --metrics.", autocompletion=words.runs
        ),
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Print every metric: formula, range, unit, invariances, source.")
    ] = False,
    columns: Annotated[bool, typer.Option("--columns", help="Print the columns of the run's tables.")] = False,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw the picture that fits the run into a file: .png, .svg or .pdf. Default none."),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            help="Another picture for --figure: depth, bode, impulse, response, heatmap, thresholds, fragility, … "
            "Default the one that fits.",
            autocompletion=words.one_of("runs/_plot.py", "PICTURES"),
        ),
    ] = None,
    json: option.Json = False,
) -> None:
    """Print a run, or the metrics."""
    from dynprobe.cli._commands import metrics_command, show_command

    if metrics:
        metrics_command(json)
    else:
        show_command(run, columns, figure, json, plot)


@app.command("metrics", cls=Command, epilog=_METRICS)
def _metrics(
    metric: Annotated[
        str | None,
        typer.Argument(help="One id, such as kappa.phase/1. Default all.", autocompletion=words.metrics),
    ] = None,
    json: option.Json = False,
) -> None:
    """Print every metric: formula, range, unit, invariances, source. With an id, that one in full."""
    from dynprobe.cli._commands import metrics_command

    metrics_command(json, metric)


@app.command("ls", cls=Command, epilog=_LS)
def _ls(
    folder: Annotated[Path, typer.Argument(help="Folder of runs.", autocompletion=words.folders)] = Path("runs"),
    json: option.Json = False,
) -> None:
    """List the runs in a folder."""
    from dynprobe.cli._commands import ls_command

    ls_command(folder, json)
