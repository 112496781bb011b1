"""``eval``: tasks of lm-evaluation-harness on the clean, the perturbed and the controlled model."""

from __future__ import annotations

from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._app import given_flags
from dynprobe.cli._help import WORK, WRITE, Command, new_app

__all__ = ["app"]

app = new_app()

_EVAL = """
Examples:
  dynprobe eval --tasks dynprobe_cloze --limit 6 --perturb alpha=0.5
  dynprobe eval --model tiny-llama --tasks dynprobe_stories_short --limit 2 --attractor slots=16,strength=1,layers=50%
  dynprobe eval --model smollm2-135m --tasks dynprobe_stories_short --limit 20 --perturb alpha=0.3,phase=prefill
  dynprobe eval --model ./my-model --tasks my_task --include-path ./tasks --num-fewshot 2 --perturb alpha=0.5
"""


@app.command("eval", cls=Command, epilog=_EVAL)
def _eval(
    context: typer.Context,
    model: option.Model = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks, groups or tags of lm-evaluation-harness, with commas or repeated; no default. Built in: "
            "dynprobe_cloze, dynprobe_stories_short, dynprobe_stories_long.",
            autocompletion=words.listed("protocols/_harness_tasks.py", "BUILT_IN"),
        ),
    ] = None,
    include_path: Annotated[
        list[str] | None, typer.Option(help="Folder of task files (.yaml); may be repeated. Default none.")
    ] = None,
    perturb: option.Perturb = None,
    attractor: Annotated[
        str | None,
        typer.Option(
            help="Attractor layer of a controlled arm, e.g. slots=16,half_life=46,strength=1,layers=50%, or 'on' for "
            "its defaults; with --perturb an arm that has both comes too. Default none.",
            rich_help_panel=WRITE,
        ),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            help="Recovery mode of a controlled arm, e.g. slerp or shrink,detector=entropy,gain=0.5,timing=always; "
            "modes that take tokens back need dynprobe recover. Default none.",
            rich_help_panel=WRITE,
        ),
    ] = None,
    direction: option.Direction = None,
    contrast: option.Contrast = None,
    limit: Annotated[int | None, typer.Option(help="First N items of each task. Default all.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each item. Default the task's own number.")
    ] = None,
    fewshot_seed: Annotated[int, typer.Option(help="Seed that says which examples stand before an item.")] = 1234,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Wrap prompts by the tokenizer's chat template.")
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="System turn, or text before every prompt. Default none.")
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(help="Generation settings that replace the task's, e.g. max_gen_toks=8. Default the task's."),
    ] = None,
    seed: option.Seed = 0,
    batch_size: Annotated[str, typer.Option(help="Rows per forward, a number.", rich_help_panel=WORK)] = "1",
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
    """Score tasks of lm-evaluation-harness, clean, perturbed, controlled: accuracy, intervals, paired change."""
    from dynprobe.cli._eval_commands import eval_command

    eval_command(given_flags(context, dict(context.params)))
