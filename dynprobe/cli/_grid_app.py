"""``sweep`` and ``threshold``: one grid of writes, two questions."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._app import given_flags
from dynprobe.cli._help import MEASURE, WRITE, Command, new_app

__all__ = ["app"]

app = new_app()

_write = partial(typer.Option, rich_help_panel=WRITE)
Layers = Annotated[str, _write(help="Layers that are written, each alone: 15, 6:9, 25%+75%, all.")]
Kind = Annotated[
    list[str] | None,
    _write(
        help="Kind of write: gaussian, direction, scale, rotate, dropout; of sweep also impulse, sine; may be "
        "repeated. Default gaussian.",
        autocompletion=words.one_of("probes/_perturb_values.py", "KINDS"),
    ),
]
Seeds = Annotated[str, _write(help="Seeds of the noise: 0, 0:4, 1+5+9.")]
Positions = Annotated[
    str | None, _write(help="Positions that are written, e.g. last, 5. Default 1: (all but the first).")
]
Phase = Annotated[
    str | None,
    _write(
        help="When it is written: prefill, decode or all. Default all.",
        autocompletion=words.one_of("_types.py", "PHASES", "all"),
    ),
]
Component = Annotated[
    str,
    _write(help="What is written: resid_post, resid_pre, attn_out or mlp_out.",
           autocompletion=words.one_of("_types.py", "COMPONENTS")),
]  # fmt: skip
Scale = Annotated[
    list[str] | None,
    _write(
        help="Noise scale, the unit of α; may be repeated. Default: sweep relnorm, threshold relnorm and coordstd.",
        autocompletion=words.one_of("probes/_scales.py", "SCALES"),
    ),
]

_SWEEP = """
Examples:
  dynprobe sweep --layers all --alphas 0.1:1:3 --limit 4
  dynprobe sweep --model tiny-cem --scale relnorm --scale coordstd --controls sham,sign --alphas 0.1,1 --limit 2
  dynprobe sweep --model tiny-llama --alphas 0.1,0.3,1 --max-new-tokens 8 --limit 2
  dynprobe sweep --model smollm2-135m --layers all --alphas 0.01:3:16
"""

_THRESHOLD = """
Examples:
  dynprobe threshold --limit 6
  dynprobe threshold --model tiny-cem --scale relnorm --criterion kl --criterion flip --limit 6
  dynprobe threshold --model tiny-llama --alphas 0.01:10:8 --scale relnorm --limit 6
  dynprobe threshold --model smollm2-135m --layers 15
"""


@app.command("sweep", cls=Command, epilog=_SWEEP)
def _sweep(
    context: typer.Context,
    model: option.Model = None,
    alphas: Annotated[
        str,
        _write(help="Strengths in the unit of --scale: 0.1,0.3,1 or low:high:number (equal steps of the logarithm)."),
    ] = "0.01:3:16",
    layers: Layers = "50%",
    scale: Scale = None,
    kind: Kind = None,
    seeds: Seeds = "0",
    positions: Positions = None,
    phase: Phase = None,
    component: Component = "resid_post",
    period: Annotated[
        float | None, _write(help="Tokens per cycle of --kind sine, which needs it. Default none.")
    ] = None,
    controls: Annotated[
        str,
        typer.Option(
            help="Any of sham, sign, energy, twin, scrambled, with commas; or none.",
            autocompletion=words.listed("protocols/_sweep.py", "CONTROLS", "none"),
        ),
    ] = "sham",
    tables: Annotated[
        str,
        typer.Option(
            help="Tables that are written: samples, or all (adds tokens, depths and profiles).",
            rich_help_panel=MEASURE,
            autocompletion=words.one_of("protocols/_sweep.py", "tables"),
        ),
    ] = "samples",
    direction: option.Direction = None,
    contrast: option.Contrast = None,
    prompt: option.Prompt = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    limit: option.Limit = None,
    max_new_tokens: option.MaxNewTokens = 0,
    temperature: option.Temperature = 0.0,
    top_p: option.TopP = 1.0,
    seed: option.Seed = 0,
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


@app.command("threshold", cls=Command, epilog=_THRESHOLD)
def _threshold(
    context: typer.Context,
    model: option.Model = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            help="kl (1 nat), flip (half of the top-1 tokens), kappa, task; may be repeated. Default kl.",
            autocompletion=words.one_of("protocols/_criteria.py", "CRITERIA"),
        ),
    ] = None,
    level: Annotated[
        float | None, typer.Option(help="Level of the response, in the criterion's unit. Default the criterion's own.")
    ] = None,
    null: Annotated[
        str | None,
        typer.Option(
            help="Null of kappa: numerical (writes of relative norm 1e-6) or paraphrase. Default numerical.",
            autocompletion=words.one_of("protocols/_threshold_config.py", "null"),
        ),
    ] = None,
    layers: Layers = "50%",
    scale: Scale = None,
    kind: Kind = None,
    seeds: Seeds = "0",
    positions: Positions = None,
    each_position: Annotated[
        bool, typer.Option("--each-position", help="One threshold per layer and position: a fragility map.")
    ] = False,
    phase: Phase = None,
    component: Component = "resid_post",
    alphas: Annotated[
        str,
        typer.Option(help="Run this fixed grid of strengths in place of the search, e.g. 0.01:10:32. Default: search."),
    ] = "",
    alpha_min: Annotated[
        float | None, typer.Option(help="Lowest strength of the search. Default 0.01 (kappa 1e-5).")
    ] = None,
    alpha_max: Annotated[
        float | None, typer.Option(help="Highest strength of the search. Default 10 (kappa 3; dropout at most 0.95).")
    ] = None,
    placement: Annotated[
        str,
        typer.Option(
            help="search: a bracket per prompt; quest: one posterior over prompts and fresh seeds.",
            autocompletion=words.one_of("protocols/_threshold_config.py", "placement"),
        ),
    ] = "search",
    trials: Annotated[int, typer.Option(help="Number of trials of --placement quest, at most.")] = 200,
    tolerance: Annotated[
        float, typer.Option(help="Wanted precision of each prompt's threshold, as a share of it.")
    ] = 0.05,
    max_evaluations: Annotated[
        int, typer.Option(help="Perturbed rows per prompt and threshold, at most (flip 2 more, kappa 6 more).")
    ] = 10,
    estimand: Annotated[
        str,
        typer.Option(
            help="prompt: median over prompts; mean: crossing of the mean response.",
            autocompletion=words.one_of("protocols/_threshold_config.py", "estimand"),
        ),
    ] = "prompt",
    n_boot: option.NBoot = 2000,
    confidence: option.Confidence = 0.95,
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
