"""``sweep`` and ``threshold``: one grid of writes, two questions."""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli._app import app, given_flags

__all__: list[str] = []

Layers = Annotated[str, typer.Option(help="Layers that are written, each alone: 15, 6:9, 25%+75%, all.")]
Kind = Annotated[
    list[str] | None, typer.Option(help="Kind of write: gaussian, direction, scale, rotate, dropout; may be repeated.")
]
SweptKind = Annotated[
    list[str] | None,
    typer.Option(help="Kind of write: gaussian, direction, scale, rotate, dropout, impulse, sine; may be repeated."),
]
Seeds = Annotated[str, typer.Option(help="Seeds of the noise: 0, 0:4, 1+5+9.")]
Positions = Annotated[str | None, typer.Option(help="Positions that are written, e.g. 1:, last, 5; default 1:.")]
Component = Annotated[str, typer.Option(help="resid_post, resid_pre, attn_out or mlp_out.")]

_SWEEP = """
Examples:

  dynprobe sweep --model smollm2-135m --layers all --alphas 0.01:3:16

  dynprobe sweep --model gpt2 --layers 25%+50%+75% --scale relnorm --scale coordstd --controls sham,sign,twin

  dynprobe sweep --model smollm2-135m --alphas 0.1,0.3,1 --max-new-tokens 32
"""

_THRESHOLD = """
Examples:

  dynprobe threshold --model smollm2-135m --layers 15

  dynprobe threshold --model gpt2 --scale relnorm --criterion kl --criterion flip

  dynprobe threshold --model smollm2-135m --alphas 0.01:10:32 (a fixed grid in place of the search)
"""


@app.command("sweep", epilog=_SWEEP)
def _sweep(
    context: typer.Context,
    model: option.Model = None,
    alphas: Annotated[
        str, typer.Option(help="Strengths: 0.1,0.3,1 or low:high:number (equal steps of the logarithm).")
    ] = "0.01:3:16",
    layers: Layers = "50%",
    scale: Annotated[list[str] | None, typer.Option(help="Noise scale; may be repeated. Default relnorm.")] = None,
    kind: SweptKind = None,
    seeds: Seeds = "0",
    positions: Positions = None,
    component: Component = "resid_post",
    period: Annotated[float | None, typer.Option(help="Tokens per cycle of --kind sine, which needs it.")] = None,
    controls: Annotated[str, typer.Option(help="Any of sham, sign, energy, twin, scrambled; or none.")] = "sham",
    tables: Annotated[str, typer.Option(help="samples, or all (adds tokens, depths and profiles).")] = "samples",
    direction: option.Direction = None,
    contrast: option.Contrast = None,
    prompt: option.Prompt = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    limit: option.Limit = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate; 0 measures the prompts only.")] = 0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat_template: option.ChatTemplate = "none",
    apply_chat_template: option.ApplyChatTemplate = False,
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
    revision: option.Revision = None,
    trust_remote_code: option.TrustRemoteCode = False,
    allow_bin: option.AllowBin = False,
    out: option.Out = "runs",
    config: option.Config = None,
    model_args: option.ModelArgs = None,
    force: option.Force = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Sweep the strength of a perturbation over layers, scales, kinds, seeds and prompts."""
    from dynprobe.cli._grid_commands import sweep_command

    sweep_command(given_flags(context, dict(context.params)))


@app.command("threshold", epilog=_THRESHOLD)
def _threshold(
    context: typer.Context,
    model: option.Model = None,
    criterion: Annotated[
        list[str] | None, typer.Option(help="kl (1 nat), flip (half of the top-1 tokens), kappa, task. Default kl.")
    ] = None,
    level: Annotated[float | None, typer.Option(help="Level of the response, in place of the criterion's own.")] = None,
    null: Annotated[
        str | None, typer.Option(help="Null of kappa: numerical (writes of relative norm 1e-6, default) or paraphrase.")
    ] = None,
    layers: Layers = "50%",
    scale: Annotated[
        list[str] | None, typer.Option(help="Noise scale; may be repeated. Default relnorm and coordstd.")
    ] = None,
    kind: Kind = None,
    seeds: Seeds = "0",
    positions: Positions = None,
    each_position: Annotated[
        bool, typer.Option("--each-position", help="One threshold per layer and position: a fragility map.")
    ] = False,
    component: Component = "resid_post",
    alphas: Annotated[
        str, typer.Option(help="Run this fixed grid of strengths in place of the search, e.g. 0.01:10:32.")
    ] = "",
    alpha_min: Annotated[
        float | None, typer.Option(help="Lowest strength of the search; default 0.01 (kappa 1e-5).")
    ] = None,
    alpha_max: Annotated[
        float | None, typer.Option(help="Highest strength of the search; default 10 (kappa 3; dropout at most 0.95).")
    ] = None,
    placement: Annotated[
        str, typer.Option(help="search: a bracket per prompt; quest: one posterior over prompts and fresh seeds.")
    ] = "search",
    trials: Annotated[int, typer.Option(help="Trials of --placement quest, at most.")] = 200,
    tolerance: Annotated[float, typer.Option(help="Relative precision of each prompt's threshold.")] = 0.05,
    max_evaluations: Annotated[
        int, typer.Option(help="Perturbed rows per prompt and threshold, at most (flip 2 more, kappa 6 more).")
    ] = 7,
    estimand: Annotated[str, typer.Option(help="prompt: median over prompts; mean: of the mean response.")] = "prompt",
    n_boot: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 2000,
    confidence: Annotated[float, typer.Option(help="Coverage of the interval.")] = 0.95,
    direction: option.Direction = None,
    contrast: option.Contrast = None,
    prompt: option.Prompt = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    limit: option.Limit = None,
    chat_template: option.ChatTemplate = "none",
    apply_chat_template: option.ApplyChatTemplate = False,
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
    revision: option.Revision = None,
    trust_remote_code: option.TrustRemoteCode = False,
    allow_bin: option.AllowBin = False,
    out: option.Out = "runs",
    config: option.Config = None,
    model_args: option.ModelArgs = None,
    force: option.Force = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Find the strength at which a perturbation destabilises a model, with an interval."""
    from dynprobe.cli._grid_commands import threshold_command

    threshold_command(given_flags(context, dict(context.params)))
