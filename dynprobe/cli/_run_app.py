"""``run`` and ``plan``: prompts through a model, clean and perturbed."""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._app import given_flags
from dynprobe.cli._help import MEASURE, Command, new_app

__all__ = ["app"]

app = new_app()

_RUN = """
Examples:
  dynprobe run --perturb alpha=0.1
  dynprobe run --model tiny-llama --perturb alpha=0.1,scale=coordstd,layers=2 --prompt "The sky is" --max-new-tokens 8
  dynprobe run --model tiny-cem --perturb alpha=0.5,layers=25%+75%,positions=last,phase=prefill --limit 4 --states
  dynprobe run --model smollm2-135m --perturb alpha=0.3,kind=direction,layers=12 --contrast "I love it" "I hate it"
"""
_PLAN = """
Examples:
  dynprobe plan --perturb alpha=0.1
  dynprobe plan --model tiny-csm --perturb alpha=0.1 --max-new-tokens 200 --states
"""


@app.command("run", cls=Command, epilog=_RUN)
@app.command(
    "plan", cls=Command, epilog=_PLAN, help="Say what a run would cost (rows, bytes, seconds). Same options as run."
)
def _run(
    context: typer.Context,
    model: option.Model = None,
    perturb: option.Perturb = None,
    direction: option.Direction = None,
    contrast: option.Contrast = None,
    prompt: option.Prompt = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    limit: option.Limit = None,
    max_new_tokens: option.MaxNewTokens = 32,
    temperature: option.Temperature = 0.0,
    top_p: option.TopP = 1.0,
    num_samples: option.NumSamples = 1,
    seed: option.Seed = 0,
    chat_template: option.ChatTemplate = "none",
    apply_chat_template: option.ApplyChatTemplate = False,
    stop_at_eos: option.StopAtEos = True,
    where: Annotated[
        str,
        typer.Option(
            help="Sites whose states --states writes, e.g. layers=6:9,component=resid_post.",
            rich_help_panel=MEASURE,
        ),
    ] = "layers=all",
    states: option.States = False,
    lens: Annotated[
        bool,
        typer.Option(
            "--lens",
            help="Add logit-lens entropy and KL (nats) at every depth, and prediction depth.",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    metrics: option.Metrics = None,
    span: Annotated[
        str,
        typer.Option(
            help="Tokens of token-axis metrics: prompt, new, all; auto is new where there are any.",
            rich_help_panel=MEASURE,
            autocompletion=words.one_of("protocols/_config.py", "span"),
        ),
    ] = "auto",
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
    device_map: option.DeviceMap = None,
    quantization: option.Quantization = None,
    compile_metrics: option.CompileMetrics = False,
    backend: option.Backend = "hooks",
    remote: option.Remote = False,
    remote_host: option.RemoteHost = None,
    revision: option.Revision = None,
    trust_remote_code: option.TrustRemoteCode = False,
    allow_bin: option.AllowBin = False,
    out: option.Out = "runs",
    config: option.Config = None,
    model_args: option.ModelArgs = None,
    num_fewshot: Annotated[int, typer.Option(hidden=True)] = 0,
    force: option.Force = False,
    dry_run: option.DryRun = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Run prompts through a model, clean and perturbed, and store what happened."""
    given = given_flags(context, dict(context.params))
    host = given.pop("remote_host", None)
    if host is not None:
        given["remote"] = host
    from dynprobe.cli._run_commands import plan_command, run_command

    action = plan_command if dry_run or context.info_name == "plan" else run_command
    action(given)
