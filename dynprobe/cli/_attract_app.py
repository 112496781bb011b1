"""``attract``: what a decaying memory does to a frozen model, against everything it could be mistaken for."""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._app import given_flags
from dynprobe.cli._help import TEXT, Command, new_app

__all__ = ["app"]

app = new_app()

_ATTRACT = """
Examples:
  dynprobe attract --limit 2 --arms layer --doses 0.3 --max-new-tokens 60 --lengths 30 --dose-texts 1
  dynprobe attract --arms layer,random --slots 4,16 --doses 0.3 --limit 1 --max-new-tokens 40 --dose-texts 1
  dynprobe attract --model smollm2-135m --task reading --reset item,never --doses 0.3,1
  dynprobe attract --model smollm2-135m --task recall --distances 50,200,1000 --layers 25%+50%+75%
"""


@app.command("attract", cls=Command, epilog=_ATTRACT)
def _attract(
    context: typer.Context,
    model: option.Model = None,
    task: Annotated[
        str,
        typer.Option(
            help="generate: long texts; reading: questions about stories; recall: names over a distance.",
            autocompletion=words.one_of("protocols/_attract_config.py", "task"),
        ),
    ] = "generate",
    arms: Annotated[
        list[str] | None,
        typer.Option(
            help="none, layer, constant, random, frozen, leaky, hopfield, fast_weights, cache, with commas or "
            "repeated. Default all; none is always run. Also phase2, phase2_leak (historical; reading, recall).",
            autocompletion=words.listed("protocols/_attract_config.py", "DEFAULT_ARMS", "phase2", "phase2_leak", "all"),
        ),
    ] = None,
    attractor: Annotated[
        str,
        typer.Option(
            help="The layer: default, or any of its settings, e.g. read=field,s_ref=1,layers=50% or preset=duality_v1; "
            "the four grids below go over it."
        ),
    ] = "default",
    slots: Annotated[str | None, typer.Option(help="Numbers of slots, e.g. 4,16,64. Default the layer's own.")] = None,
    half_life: Annotated[
        str | None, typer.Option(help="Half-lives in tokens, e.g. 8,46,138,512. Default the layer's own.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Places: commas make a grid, + puts the layer on several blocks at once. Default 50%."),
    ] = None,
    burn_in: Annotated[
        str | None, typer.Option(help="Tokens before anything is injected, e.g. 0,32. Default the layer's own.")
    ] = None,
    doses: Annotated[str, typer.Option(help="Mean KL(bare ‖ layer) in nats per token that ε is solved for.")] = (
        "0.03,0.3,1"
    ),
    strengths: Annotated[
        str | None, typer.Option(help="Raw ε in place of doses, e.g. 0.5,1,2. Default: solved for from --doses.")
    ] = None,
    match: Annotated[
        str, typer.Option(help="strength: all arms get the layer's ε; kl: each one the ε of the same KL.")
    ] = "strength",
    dose_texts: Annotated[int, typer.Option(help="Texts that ε is solved on.")] = 8,
    dose_tokens: Annotated[int, typer.Option(help="Tokens after the prompt that such a text has at most.")] = 128,
    largest: Annotated[float, typer.Option(help="Largest ε that is tried.")] = 64.0,
    lengths: Annotated[str, typer.Option(help="Lengths at which a text is read, in tokens.")] = "50,100,200,500,1000",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens that are written (task reading: at most 20); lengths above it are left out.",
            rich_help_panel=TEXT,
        ),
    ] = 200,
    reset: Annotated[
        str,
        typer.Option(
            help="item empties the memory before each item, never does not (reading, recall); both with a comma."
        ),
    ] = "item",
    stories: Annotated[
        str, typer.Option(help="Lengths of the stories of task reading: short (108–132 tokens), long (432–528).")
    ] = "short,long",
    distances: Annotated[
        str, typer.Option(help="Tokens between fact and question of task recall.")
    ] = "50,100,200,500,1000",
    record: Annotated[
        str, typer.Option(help="Arms whose slots are written token by token: layer, all or none.")
    ] = "layer",
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Measure attention mass on the prompt (eager attention).")
    ] = True,
    prompt: option.Prompt = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    limit: option.Limit = None,
    temperature: option.Temperature = 0.0,
    top_p: option.TopP = 1.0,
    num_samples: option.NumSamples = 1,
    seed: option.Seed = 0,
    chat_template: option.ChatTemplate = "none",
    metrics: option.Metrics = None,
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
    """Study the attractor layer: doses, arms, long texts and where they break down, reading, recall."""
    from dynprobe.cli._attract_commands import attract_command

    attract_command(given_flags(context, dict(context.params)))
