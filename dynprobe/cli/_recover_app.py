"""``recover``: perturb a model, close a loop around it, and see what comes back."""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli._app import app, given_flags

__all__: list[str] = []

_RECOVER = """
Examples:

  dynprobe recover --model smollm2-135m --mode slerp --limit 12

  dynprobe recover --model smollm2-135m --mode all --perturb alpha=0.8,layers=25%,phase=decode --temperature 0.8

  dynprobe recover --model smollm2-135m --mode slerp --watch --prompt "Once upon a time"
"""


@app.command("recover", epilog=_RECOVER)
def _recover(
    context: typer.Context,
    model: option.Model = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="none, sham, passive, slerp, shrink, clamp, subspace, sampling, guard, hybrid, recync, dom, str, with "
            "commas or repeated; all takes every one that can act. Default hybrid."
        ),
    ] = None,
    perturb: Annotated[
        list[str] | None,
        typer.Option(
            help="What to recover from, e.g. alpha=0.6,layers=50%,phase=decode (the default); repeated ones act "
            "together; none leaves the text clean."
        ),
    ] = None,
    direction: option.Direction = None,
    contrast: option.Contrast = None,
    detector: Annotated[
        str,
        typer.Option(
            help="Signal that is watched: kappa_phase_zmax, kappa_phase, kappa_phase_z, norm_step_zmax, entropy, "
            "limen_ct."
        ),
    ] = "kappa_phase_zmax",
    m: Annotated[int, typer.Option("--m", help="Tokens above the upper level before the detector fires.")] = 3,
    m_off: Annotated[int, typer.Option("--m-off", help="Tokens below the lower level before it lets go.")] = 5,
    q_lo: Annotated[float, typer.Option(help="Lower level: quantile on clean text.")] = 0.75,
    q_hi: Annotated[float, typer.Option(help="Upper level: quantile on clean text.")] = 0.99,
    gain: Annotated[float, typer.Option(help="Largest gain of an actuator.")] = 0.5,
    budget: Annotated[float, typer.Option(help="Share of the new tokens that may be active.")] = 0.25,
    site: Annotated[
        str | None, typer.Option(help="Where actuators act, e.g. layers=60%; default where the signal points.")
    ] = None,
    decode: Annotated[str, typer.Option(help="forced reads a given text, free writes an own one; both.")] = "both",
    timings: Annotated[
        list[str] | None,
        typer.Option(help="When modes act: detector, always, oracle (where the noise is). Default all three."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Folder of a calibration of this model; default: made when first needed.")
    ] = None,
    operators: Annotated[
        str | None, typer.Option(help="File of the operators of mode dom (.safetensors); str is a stand-in without.")
    ] = None,
    prompt: option.Prompt = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    limit: option.Limit = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that are read or written after the prompt.")] = 48,
    temperature: Annotated[float, typer.Option(help="Sampling temperature of own texts; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling, random controls, and noise that names none.")] = 0,
    chat_template: option.ChatTemplate = "none",
    stop_at_eos: Annotated[
        bool, typer.Option(help="End own texts at the end-of-sequence token; lengths then differ between arms.")
    ] = False,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="A metric to store as well, e.g. erank.rv/1 (see dynprobe metrics); may be repeated."),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show one prompt live: signal, readiness, actuator, text. Writes no run."),
    ] = False,
    padding: option.Padding = "auto",
    batch_size: option.BatchSize = "auto",
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
    """Perturb, let a detector and recovery modes act, and compare: power, energy, recovery, harm."""
    from dynprobe.cli._recover_commands import recover_command, watch_command

    action = watch_command if watch else recover_command
    action(given_flags(context, dict(context.params)))
