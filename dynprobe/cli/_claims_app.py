"""``claims``: the seeds' sentences, their tests, and the log of what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._help import Command, new_app

__all__ = ["app"]

app = new_app()

_EXAMPLES = """
Examples:
  dynprobe claims
  dynprobe claims show kappa.rises
  dynprobe claims test kappa.rises --models tiny-llama --limit 4 --log claims.jsonl
  dynprobe claims log --verify
"""

_SHOW = """
Examples:
  dynprobe claims show kappa.rises
  dynprobe claims show kappa.rises --json
"""
_TEST = """
Examples:
  dynprobe claims test kappa.rises --models tiny-llama --limit 4
  dynprobe claims test kappa.rises --runs runs/*tiny-llama* --log claims.jsonl
  dynprobe claims test kappa.depth_helps --models panel/llama-depth4-width32-seed0,panel/llama-depth1-width32-seed0
"""
_LOG = """
Examples:
  dynprobe claims log
  dynprobe claims log --verify --json
"""

_claims = new_app(
    name="claims", help="What the seed texts claim; test a sentence; keep the log.", epilog=_EXAMPLES,
    invoke_without_command=True,
)  # fmt: skip
app.add_typer(_claims)


@_claims.callback()
def _list(
    context: typer.Context,
    topic: Annotated[str | None, typer.Option(help="Only claims of this topic. Default all.")] = None,
    testable: Annotated[bool, typer.Option("--testable", help="Only claims that can be tested here.")] = False,
    log: Annotated[
        Path | None, typer.Option(help="Say beside each claim how its last test in this log ended. Default: not said.")
    ] = None,
    json: option.Json = False,
) -> None:
    """List the claims: id, sentence, protocol, models, and whether it can be tested here."""
    if context.invoked_subcommand is None:
        from dynprobe.cli._claims_commands import list_command

        list_command(topic, testable, log, json)


@_claims.command("show", cls=Command, epilog=_SHOW)
def _show(
    claim: Annotated[str, typer.Argument(help="Id of a claim.", autocompletion=words.claims)],
    json: option.Json = False,
) -> None:
    """Print one claim in full: sentence, reading, prediction, what would refute it."""
    from dynprobe.cli._claims_commands import show_command

    show_command(claim, json)


@_claims.command("test", cls=Command, epilog=_TEST)
def _test(
    claim: Annotated[str, typer.Argument(help="Id of a claim.", autocompletion=words.claims)],
    models: Annotated[
        str | None,
        typer.Option(
            help="Models, one per role in the order of `claims show`, with commas. Default those of the claim.",
            autocompletion=words.models,
        ),
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            help="Run in place of a model, same order; may be repeated. Recorded as post hoc. Default: models are run.",
            autocompletion=words.runs,
        ),
    ] = None,
    out: option.Out = "runs",
    log: Annotated[
        Path | None,
        typer.Option(
            help="File of the falsification log; made where there is none. Default: the verdict is only printed."
        ),
    ] = None,
    limit: option.Limit = None,
    prompts: option.Prompts = None,
    category: option.Category = None,
    perturb: Annotated[
        str | None, typer.Option(help="In place of the claim's perturbation; a deviation. Default the claim's.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE (YAML) of the protocol's settings; may be repeated; a deviation. Default none."
        ),
    ] = None,
    dtype: option.OwnDtype = None,
    device: option.OwnDevice = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Register the prediction, run the models, judge, and append the verdict to the log."""
    from dynprobe.cli._claims_commands import test_command

    given = {
        "limit": limit, "prompts": prompts, "category": category, "perturb": perturb, "dtype": dtype, "device": device,
    }  # fmt: skip
    test_command(claim, models, runs or [], out, log, given, setting or [], json, quiet)


@_claims.command("log", cls=Command, epilog=_LOG)
def _log(
    log: Annotated[Path | None, typer.Option(help="File of the log. Default the records that come along.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain: exit code 1 where a line was edited or removed.")
    ] = False,
    json: option.Json = False,
) -> None:
    """Print the falsification log."""
    from dynprobe.cli._claims_commands import log_command

    log_command(log, verify, json)
