"""``panel``: one design over many models, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._app import given_flags
from dynprobe.cli._help import OUTPUT, Command, new_app

__all__ = ["app"]

app = new_app()

_EXAMPLES = """
Examples:
  dynprobe panel panel.yaml --dry-run
  dynprobe panel panel.yaml
  dynprobe panel runs/*panel*

  A file of five lines (dynprobe init --for panel writes a longer one):
    models: [panel/llama-depth*, tiny-llama]
    seeds: [0, 1]
    alphas: [0, 0.1]
    perturb: scale=relnorm,layers=50%
    max_new_tokens: 16
"""


@app.command("panel", cls=Command, epilog=_EXAMPLES)
def _panel(
    context: typer.Context,
    design: Annotated[
        Path,
        typer.Argument(
            help="YAML file of the design, or the folder of a panel to continue.", autocompletion=words.files
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "--output-path",
            help="Folder of panels, or the panel to continue. Default as the file says, else runs.",
            rich_help_panel=OUTPUT,
            autocompletion=words.folders,
        ),
    ] = None,
    engine: option.Engine = "local",
    workers: option.Workers = "auto",
    address: option.Address = None,
    worker_gpus: option.WorkerGpus = None,
    worker_threads: option.WorkerThreads = None,
    slurm: option.Slurm = None,
    force: option.Force = False,
    dry_run: option.DryRun = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Run models × prompts × seeds × temperatures × token budgets × α, and say where the variance lies."""
    from dynprobe.cli._panel_commands import panel_command

    panel_command(design, given_flags(context, dict(context.params)))
