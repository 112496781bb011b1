"""``recover``: perturb a model, close a loop around it, and see what comes back."""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._app import given_flags
from dynprobe.cli._help import LOOP, TEXT, WRITE, Command, new_app

__all__ = ["app"]

app = new_app()

_RECOVER = """
Examples:
  dynprobe recover --mode slerp --limit 3 --max-new-tokens 24
  dynprobe recover --model tiny-llama --mode slerp --watch --prompt "Once upon a time" --max-new-tokens 24
  dynprobe recover --model smollm2-135m --mode all --perturb alpha=0.8,layers=25%,phase=decode --temperature 0.8
"""


@app.command("recover", cls=Command, epilog=_RECOVER)
def _recover(
    context: typer.Context,
    model: option.Model = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="none, sham, passive, slerp, shrink, clamp, subspace, sampling, guard, hybrid, recync, dom, str, with "
            "commas or repeated; all takes every one that can act. Default hybrid.",
            rich_help_panel=LOOP,
            autocompletion=words.listed("controllers/recovery/_modes.py", "MODES", "all"),
        ),
    ] = None,
    perturb: Annotated[
        list[str] | None,
        typer.Option(
            help="What to recover from, e.g. alpha=0.6,layers=50%,phase=decode (the default); repeated ones act "
            "together; none leaves the text clean.",
            rich_help_panel=WRITE,
            autocompletion=words.perturbation,
        ),
    ] = None,
    direction: option.Direction = None,
    contrast: option.Contrast = None,
    detector: option.Detector = "kappa_phase_zmax",
    m: option.On = 3,
    m_off: option.MOff = 5,
    q_lo: option.QLo = 0.75,
    q_hi: option.QHi = 0.99,
    gain: option.Gain = 0.5,
    budget: Annotated[
        float, typer.Option(help="Share of the new tokens that may be active.", rich_help_panel=LOOP)
    ] = 0.25,
    site: option.Site = None,
    decode: Annotated[
        str,
        typer.Option(
            help="forced reads a given text, free writes an own one; both.",
            rich_help_panel=TEXT,
            autocompletion=words.one_of("protocols/_recover_config.py", "decode"),
        ),
    ] = "both",
    timings: option.Timings = None,
    calibration: option.Calibration = None,
    operators: Annotated[
        str | None,
        typer.Option(
            help="File of the operators of mode dom (.safetensors). Default none: str stands in.", rich_help_panel=LOOP
        ),
    ] = None,
    prompt: option.Prompt = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    limit: option.Limit = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens that are read or written after the prompt.", rich_help_panel=TEXT)
    ] = 48,
    temperature: option.Temperature = 0.0,
    top_p: option.TopP = 1.0,
    seed: option.Seed = 0,
    chat_template: option.ChatTemplate = "none",
    stop_at_eos: option.StopAtEos = False,
    metrics: option.Metrics = None,
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
