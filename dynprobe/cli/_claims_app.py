"""``claims``: the seeds' sentences, their tests, and the log of what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli._app import app

__all__: list[str] = []

_EXAMPLES = """
Examples:

  dynprobe claims

  dynprobe claims show kappa.rises

  dynprobe claims test kappa.rises --models smollm2-135m --limit 8 --log claims.jsonl

  dynprobe claims test kappa.depth_helps --models panel/llama-depth4-width32-seed0,panel/llama-depth1-width32-seed0

  dynprobe claims test kappa.rises --runs runs/2026-11-22T18-48-38_smollm2-135m_55d9e11d

  dynprobe claims log --log claims.jsonl --verify
"""

_claims = typer.Typer(
    name="claims", help="What the seed texts claim; test a sentence; keep the log.", epilog=_EXAMPLES,
    invoke_without_command=True, rich_markup_mode=None,
)  # fmt: skip
app.add_typer(_claims)


@_claims.callback()
def _list(
    context: typer.Context,
    topic: Annotated[str | None, typer.Option(help="Only claims of this topic.")] = None,
    testable: Annotated[bool, typer.Option("--testable", help="Only claims that can be tested here.")] = False,
    log: Annotated[Path | None, typer.Option(help="Say beside each claim how its last test in this log ended.")] = None,
    json: option.Json = False,
) -> None:
    """List the claims: id, sentence, protocol, models, and whether it can be tested here."""
    if context.invoked_subcommand is None:
        from dynprobe.cli._claims_commands import list_command

        list_command(topic, testable, log, json)


@_claims.command("show")
def _show(
    claim: Annotated[str, typer.Argument(help="Id of a claim.")],
    json: option.Json = False,
) -> None:
    """Print one claim in full: sentence, reading, prediction, what would refute it."""
    from dynprobe.cli._claims_commands import show_command

    show_command(claim, json)


@_claims.command("test", epilog=_EXAMPLES)
def _test(
    claim: Annotated[str, typer.Argument(help="Id of a claim.")],
    models: Annotated[str | None, typer.Option(help="Models, one per role in the order of `claims show`.")] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="Run in place of a model, same order; may be repeated. Recorded as post hoc."),
    ] = None,
    out: option.Out = "runs",
    log: Annotated[Path | None, typer.Option(help="File of the falsification log; made where there is none.")] = None,
    limit: option.Limit = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    perturb: Annotated[str | None, typer.Option(help="In place of the claim's perturbation; a deviation.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE (YAML) of the protocol's settings; may be repeated; a deviation."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float64, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Register the prediction, run the models, judge, and append the verdict to the log."""
    from dynprobe.cli._claims_commands import test_command

    given = {
        "limit": limit, "prompts": prompts, "category": category, "perturb": perturb, "dtype": dtype, "device": device,
    }  # fmt: skip
    test_command(claim, models, runs or [], out, log, given, setting or [], json, quiet)


@_claims.command("log")
def _log(
    log: Annotated[Path | None, typer.Option(help="File of the log; default the records that come along.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain: exit code 1 where a line was edited or removed.")
    ] = False,
    json: option.Json = False,
) -> None:
    """Print the falsification log."""
    from dynprobe.cli._claims_commands import log_command

    log_command(log, verify, json)
