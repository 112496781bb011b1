"""``report``: a page about a run, or about several side by side."""

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
  dynprobe report runs/*with-states*
  dynprobe report runs/*tiny-cem* runs/*tiny-csm* runs/*tiny-llama* --out trio.html
"""


@app.command("report", cls=Command, epilog=_EXAMPLES)
def _report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders; two or more are compared as well.", autocompletion=words.runs),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. Default report.html in the run, of several runs in the folder they share."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Number of rows of the largest table or map on the page.")] = 24000,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Write one HTML page with pictures, tables and provenance; it needs no network to be read."""
    from dynprobe.cli._commands import print_json
    from dynprobe.runs import report

    page = report(runs, out=out, rows=rows)
    if json:
        print_json({"report": str(page), "bytes": page.stat().st_size})
    elif not quiet:
        typer.echo(f"written: {page} ({page.stat().st_size / 1e6:.1f} MB)")
