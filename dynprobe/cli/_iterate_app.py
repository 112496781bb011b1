"""``iterate``: a looped model at several numbers of iterations."""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._app import given_flags
from dynprobe.cli._help import WRITE, Command, new_app

__all__ = ["app"]

app = new_app()

_ITERATE = """
Examples:
  dynprobe iterate --limit 4
  dynprobe iterate --model tiny-csm --iterations 1,2,4,8 --split-by tiny-llama --limit 4
  dynprobe iterate --model tiny-cem --iterations 1,2,3 --perturb alpha=0.1,iterations=1 --limit 4
"""


@app.command("iterate", cls=Command, epilog=_ITERATE)
def _iterate(
    context: typer.Context,
    model: option.Model = None,
    iterations: Annotated[
        str, typer.Option(help="Numbers of iterations (updates): 3,5,10. Default 3,5,10,15,20,25,30,40,45; CEM 1 … 8.")
    ] = "",
    split_by: Annotated[
        str | None,
        typer.Option(
            help="Model of the same tokenizer whose loss says which tokens are hard. Default none.",
            autocompletion=words.models,
        ),
    ] = None,
    tol: Annotated[
        float, typer.Option(help="Δ relative to the state, as a share, below which a text counts as converged.")
    ] = 0.03,
    patience: Annotated[int, typer.Option(help="Number of updates in a row that must stay below --tol.")] = 2,
    perturb: Annotated[
        list[str] | None,
        typer.Option(
            help="Perturbation, e.g. alpha=0.1,iterations=1; an arm of its own at each T. Default none.",
            rich_help_panel=WRITE,
            autocompletion=words.perturbation,
        ),
    ] = None,
    prompt: option.Prompt = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    limit: option.Limit = None,
    chat_template: option.ChatTemplate = "none",
    padding: option.Padding = "auto",
    batch_size: option.BatchSize = "auto",
    engine: option.Engine = "local",
    workers: option.Workers = "auto",
    address: option.Address = None,
    worker_gpus: option.WorkerGpus = None,
    worker_threads: option.WorkerThreads = None,
    slurm: option.Slurm = None,
    dtype: option.Dtype = "float32",
    device: option.Device = "auto",
    revision: option.Revision = None,
    trust_remote_code: option.TrustRemoteCode = False,
    out: option.Out = "runs",
    config: option.Config = None,
    force: option.Force = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Read texts at several numbers of iterations: loss, Δ, κ, energy, accuracy against T."""
    from dynprobe.cli._grid_commands import iterate_command

    iterate_command(given_flags(context, dict(context.params)))
