"""``panel``: one design over many models, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli._app import app, given_flags

__all__: list[str] = []

_EXAMPLES = """
Examples:

  dynprobe panel panel.yaml --dry-run

  dynprobe panel panel.yaml --out runs

  dynprobe panel runs/2026-11-22T19-00-00_panel_1a2b3c4d   (continues it)

A file of five lines:

  models: [panel/*, tiny-llama]
  seeds: [0, 1]
  alphas: [0, 0.1]
  perturb: scale=relnorm,layers=50%
  max_new_tokens: 16
"""


@app.command("panel", epilog=_EXAMPLES)
def _panel(
    context: typer.Context,
    design: Annotated[Path, typer.Argument(help="YAML file of the design, or the folder of a panel to continue.")],
    out: Annotated[
        str | None, typer.Option("--out", "--output-path", help="Folder of panels, or the panel to continue.")
    ] = None,
    engine: option.Engine = "local",
    workers: option.Workers = "auto",
    address: option.Address = None,
    worker_gpus: option.WorkerGpus = None,
    worker_threads: option.WorkerThreads = None,
    slurm: option.Slurm = None,
    force: option.Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and run nothing.")] = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Run models × prompts × seeds × temperatures × token budgets × α, and say where the variance lies."""
    from dynprobe.cli._panel_commands import panel_command

    panel_command(design, given_flags(context, dict(context.params)))
