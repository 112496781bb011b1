"""The program itself: its name, its version, and what a command was really given."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dynprobe.cli._help import Program, new_app

__all__ = ["app", "given_flags"]

_EXAMPLES = """
Examples:
  dynprobe run --perturb alpha=0.1
  dynprobe run --help
  dynprobe metrics kappa.phase/1

Exit codes: 0 done, 1 failed, 2 usage, 3 refused by a self-test,
130 interrupted (the same command continues).
"""

app = new_app(cls=Program, name="dynprobe", no_args_is_help=True, add_completion=True, epilog=_EXAMPLES)


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
