"""``diff``: where two runs on the same tokens part."""

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
  dynprobe diff runs/*float32* runs/*bfloat16*
  dynprobe diff runs/*float32* runs/*bfloat16* --condition clean --floor 1e-3 --figure diff.png
  dynprobe diff OLD_RUN NEW_RUN --check
"""


@app.command("diff", cls=Command, epilog=_EXAMPLES)
def _diff(
    a: option.RunFolder,
    b: Annotated[
        Path,
        typer.Argument(
            help="Another, on the same prompts: other dtype, weights, version or engine.", autocompletion=words.runs
        ),
    ],
    floor: Annotated[
        float | None,
        typer.Option(help="Relative difference that counts as noise. Default from dtype, depth and the self-tests."),
    ] = None,
    condition: Annotated[
        list[str] | None, typer.Option(help="Condition by id; may be repeated. Default all that both have.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt by id; may be repeated. Default all that both have.")
    ] = None,
    track: option.Track = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the verdicts to FILE.json, or every cell to FILE.csv or FILE.parquet. Default none."),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw log10 of the difference over depth and token: .png, .svg or .pdf. Default none."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 1 where they part beyond the noise floor, or cannot be compared.")
    ] = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Find the first depth and token where two runs on the same tokens part beyond the noise floor."""
    from dynprobe.cli._diff_commands import diff_command

    diff_command(
        a, b, out, figure, check, json, quiet, floor=floor, condition=condition or [], prompt=prompt or [], track=track
    )
