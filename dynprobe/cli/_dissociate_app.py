"""``dissociate``: do the dynamics come back while the meaning stays away?"""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._app import given_flags
from dynprobe.cli._help import LOOP, Command, new_app

__all__ = ["app"]

app = new_app()

_DISSOCIATE = """
Examples:
  dynprobe dissociate --limit 6 --alphas 0,0.5,1 --timings detector,oracle
  dynprobe dissociate --model smollm2-135m --limit 48
  dynprobe dissociate --model smollm2-135m --mode slerp,shrink --layers 25% --alphas 0,0.5,1,1.5,2
  dynprobe dissociate --model ./my-model --items mine.jsonl --perturb alpha=1,layers=50%,phase=decode
"""


@app.command("dissociate", cls=Command, epilog=_DISSOCIATE)
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
            "repeated. Default slerp.",
            rich_help_panel=LOOP,
            autocompletion=words.listed("controllers/recovery/_modes.py", "MODES"),
        ),
    ] = None,
    alphas: Annotated[
        str,
        typer.Option(
            help="Strengths of the task's own dose–response, in the unit of --scale; 0 shows that nothing "
            "else is changed."
        ),
    ] = "0,0.25,0.5,1,2,3",
    layers: Annotated[str, typer.Option(help="Where the noise is written.")] = "50%",
    scale: Annotated[
        str,
        typer.Option(
            help="What α multiplies: relnorm, coordstd, mad, cov, abs.",
            autocompletion=words.one_of("probes/_scales.py", "SCALES"),
        ),
    ] = "relnorm",
    perturb: Annotated[
        list[str] | None,
        typer.Option(
            help="Fixes noise and dose, e.g. alpha=1,layers=50%,phase=decode. Default the smallest of --alphas that "
            "costs 0.2 of accuracy.",
            autocompletion=words.perturbation,
        ),
    ] = None,
    dynamic: Annotated[
        str, typer.Option(help="Metric of RF_dyn; one that the controller does not act on.")
    ] = "kappa_geom",
    semantic: Annotated[
        str, typer.Option(help="What RF_sem of the verdict is about: right (accuracy), nll_right, choice_margin.")
    ] = "right",
    detector: option.Detector = "kappa_phase_zmax",
    m: option.On = 3,
    m_off: option.MOff = 5,
    q_lo: option.QLo = 0.75,
    q_hi: option.QHi = 0.99,
    gain: option.Gain = 0.5,
    budget: Annotated[
        float, typer.Option(help="Share of the longest item's tokens that may be active.", rich_help_panel=LOOP)
    ] = 1.0,
    site: option.Site = None,
    timings: option.Timings = None,
    prefill: Annotated[
        int, typer.Option(help="Tokens of a question that are read in one forward, where nothing acts.")
    ] = 1,
    calibration: option.Calibration = None,
    operators: Annotated[
        str | None,
        typer.Option(help="File of operators of modes str and dom (.safetensors). Default none.", rich_help_panel=LOOP),
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Keep items of this category; may be repeated. Default all.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Keep N items, in turn from the categories. Default all.")] = None,
    seed: option.Seed = 0,
    metrics: option.Metrics = None,
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
