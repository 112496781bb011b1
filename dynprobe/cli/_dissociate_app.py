"""``dissociate``: do the dynamics come back while the meaning stays away?"""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli._app import app, given_flags

__all__: list[str] = []

_DISSOCIATE = """
Examples:

  dynprobe dissociate --model smollm2-135m --limit 48

  dynprobe dissociate --model smollm2-135m --mode slerp,shrink --layers 25% --alphas 0,0.5,1,1.5,2

  dynprobe dissociate --model ./my-model --items mine.jsonl --perturb alpha=1,layers=50%,phase=decode
"""


@app.command("dissociate", epilog=_DISSOCIATE)
def _dissociate(
    context: typer.Context,
    model: option.Model = None,
    items: Annotated[
        str, typer.Option(help="Built-in set (cloze), or a .jsonl file: question, choices, answer on each line.")
    ] = "cloze",
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="Modes that change states: sham, passive, slerp, shrink, clamp, subspace, str, with commas or "
            "repeated. Default slerp."
        ),
    ] = None,
    alphas: Annotated[
        str, typer.Option(help="Strengths of the task's own dose–response; 0 shows that nothing else is changed.")
    ] = "0,0.25,0.5,1,2,3",
    layers: Annotated[str, typer.Option(help="Where the noise is written.")] = "50%",
    scale: Annotated[str, typer.Option(help="What α multiplies: relnorm, coordstd, mad, cov, abs.")] = "relnorm",
    perturb: Annotated[
        list[str] | None,
        typer.Option(
            help="Fixes noise and dose, e.g. alpha=1,layers=50%,phase=decode; default the smallest of --alphas that "
            "costs 0.2 of accuracy."
        ),
    ] = None,
    dynamic: Annotated[
        str, typer.Option(help="Metric of RF_dyn; one that the controller does not act on.")
    ] = "kappa_geom",
    semantic: Annotated[
        str, typer.Option(help="What RF_sem of the verdict is about: right (accuracy), nll_right, choice_margin.")
    ] = "right",
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
    budget: Annotated[float, typer.Option(help="Share of the longest item's tokens that may be active.")] = 1.0,
    site: Annotated[
        str | None, typer.Option(help="Where actuators act, e.g. layers=60%; default where the signal points.")
    ] = None,
    timings: Annotated[
        list[str] | None,
        typer.Option(help="When modes act: detector, always, oracle (where the noise is). Default all three."),
    ] = None,
    prefill: Annotated[
        int, typer.Option(help="Tokens of a question that are read in one forward, where nothing acts.")
    ] = 1,
    calibration: Annotated[
        str | None, typer.Option(help="Folder of a calibration of this model; default: made when first needed.")
    ] = None,
    operators: Annotated[
        str | None, typer.Option(help="File of operators of modes str and dom (.safetensors).")
    ] = None,
    category: Annotated[list[str] | None, typer.Option(help="Keep items of this category; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Keep N items, in turn from the categories.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random controls, and of noise that names none.")] = 0,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="A metric to store as well, e.g. erank.rv/1 (see dynprobe metrics); may be repeated."),
    ] = None,
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
    """Dose a task until it breaks, let modes act, and judge whether dynamics and meaning come back together."""
    from dynprobe.cli._dissociate_commands import dissociate_command

    dissociate_command(given_flags(context, dict(context.params)))
