"""``delay``: false neighbours and delay PCA of a column of a run, beside their surrogates."""

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
  dynprobe delay runs/*long-texts* --column entropy --limit 2 --dims 1:3
  dynprobe delay runs/*long-texts* --column nll --lag 1 --theiler 1 --limit 1 --figure delay.png --out delay.csv
  dynprobe delay ATTRACT_RUN --column strength --table slots --at slot=0 --condition layer
"""


@app.command("delay", cls=Command, epilog=_EXAMPLES)
def _delay(
    run: option.RunFolder,
    column: Annotated[str, typer.Option(help="Column of numbers, one series per prompt.")],
    table: Annotated[
        str | None, typer.Option(help="tokens, slots, depths, profiles or actions. Default the first that has it.")
    ] = None,
    condition: Annotated[
        str | None, typer.Option(help="Condition by id or arm. Default the only one, else clean.")
    ] = None,
    along: Annotated[str | None, typer.Option(help="pos or depth. Default pos where the table has it.")] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(help="LABEL=VALUE of a further label, e.g. slot=0 or depth=7; may be repeated. Default all."),
    ] = None,
    span: Annotated[str, typer.Option(help="Tokens: new, prompt or all; auto is new where there are any.")] = "auto",
    limit: Annotated[int | None, typer.Option(help="Keep the first N series. Default all.")] = None,
    dims: Annotated[str, typer.Option(help="Embedding dimensions, e.g. 1:6 or 2,3,8.")] = "1:6",
    lag: Annotated[
        str, typer.Option(help="Steps between coordinates, or auto: first minimum of the mutual information (nats).")
    ] = "auto",
    theiler: Annotated[
        str, typer.Option(help="Least distance in time of neighbours, in steps, or auto: autocorrelation below 1/e.")
    ] = "auto",
    surrogates: Annotated[
        str,
        typer.Option(
            help="ft, aaft, iaaft, ar1, with commas.",
            autocompletion=words.listed("metrics/_surrogates.py", "SURROGATES"),
        ),
    ] = "ft,iaaft,ar1",
    n_surrogates: Annotated[int, typer.Option(help="Number of surrogates of each kind, at least 19.")] = 39,
    seed: Annotated[int, typer.Option(help="Seed of the surrogates.")] = 0,
    rtol: Annotated[float, typer.Option(help="False neighbours: ratio of distances.")] = 15.0,
    atol: Annotated[float, typer.Option(help="False neighbours: size in standard deviations.")] = 2.0,
    series: Annotated[str | None, typer.Option(help="Prompt whose series --figure draws. Default the first.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the table to FILE.csv, or everything to FILE.json. Default none.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw one series: .png, .svg or .pdf. Default none.")] = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Embed a column by delays: false neighbours and principal axes, each beside its surrogates."""
    from dynprobe.cli._delay_commands import delay_command

    delay_command(
        run, column, {"table": table, "condition": condition, "along": along, "span": span}, at or [], limit,
        {"dims": dims, "lag": lag, "theiler": theiler, "surrogates": surrogates},
        {"n_surrogates": n_surrogates, "seed": seed, "rtol": rtol, "atol": atol}, series, out, figure, json, quiet,
    )  # fmt: skip
