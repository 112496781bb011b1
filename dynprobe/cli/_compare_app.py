"""``compare``: any number of runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._help import STATISTICS, Command, new_app

__all__ = ["app"]

app = new_app()

_EXAMPLES = """
Examples:
  dynprobe compare runs/*tiny-cem* runs/*tiny-csm* runs/*tiny-llama*
  dynprobe compare runs/*tiny-llama* runs/*tiny-cem* --metric kappa_phase --figure profiles.png --out compare.json
  dynprobe compare runs/*sweep-a* runs/*sweep-b* --kl 0.1 --kl 1
"""


@app.command("compare", cls=Command, epilog=_EXAMPLES)
def _compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders: run, sweep, threshold, iterate, recover, import …", autocompletion=words.runs
        ),
    ],
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="Condition by id or arm; alternatives for runs without it after commas (clean,T18); may be repeated. "
            "Default: clean, and up to four that all runs have."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric column; may be repeated. Default all that two runs have, as one family of tests."),
    ] = None,
    kl: Annotated[
        list[float] | None,
        typer.Option(help="KL in nats at which sweeps are matched; may be repeated. Default 0.1, 1."),
    ] = None,
    margin: Annotated[
        list[str] | None,
        typer.Option(
            help="METRIC=VALUE in the metric's unit: a difference below it does not matter (two one-sided tests); may "
            "be repeated. Default none."
        ),
    ] = None,
    track: option.Track = None,
    confidence: option.Confidence = 0.95,
    n_boot: option.NBoot = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.", rich_help_panel=STATISTICS)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write every table to FILE.json, FILE.csv or FILE.md. Default none.")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw profiles on normalised depth beside the path: .png, .svg or .pdf. Default none."),
    ] = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Compare runs on the prompts they share: means, paired differences, profiles, equal KL, thresholds, Δ and κ."""
    from dynprobe.cli._compare_commands import compare_command

    compare_command(
        runs, margin or [], out, figure, json, quiet, condition=condition or [], metric=metric or [],
        kl=kl or (0.1, 1.0), track=track, confidence=confidence, n_boot=n_boot, seed=seed,
    )  # fmt: skip
