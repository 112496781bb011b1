"""Flags that several commands share, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "AllowBin",
    "ApplyChatTemplate",
    "BatchSize",
    "Category",
    "ChatTemplate",
    "Config",
    "Contrast",
    "Device",
    "DeviceMap",
    "Direction",
    "Dtype",
    "Force",
    "Json",
    "Limit",
    "Model",
    "ModelArgs",
    "Out",
    "Padding",
    "Prompt",
    "Prompts",
    "Quiet",
    "Revision",
    "TrustRemoteCode",
]

Model = Annotated[
    str | None,
    typer.Option(
        help="Hub id, local folder, GGUF file, or known name (smollm2-135m, tiny-llama, tiny-cem, tiny-csm). "
        "Left out: tiny-llama, which comes with dynprobe."
    ),
]
Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")]
Prompts = Annotated[str | None, typer.Option(help="File of prompts: .txt, .jsonl, .parquet, or - for standard input.")]
Category = Annotated[list[str] | None, typer.Option(help="Keep prompts of this category; may be repeated.")]
Limit = Annotated[int | None, typer.Option(help="Keep the first N prompts.")]
Direction = Annotated[str | None, typer.Option(help="File of the vector of kind=direction (.npy, .safetensors).")]
Contrast = Annotated[
    tuple[str, str] | None, typer.Option(help="Two texts; the difference of their last states is the direction.")
]
ChatTemplate = Annotated[str, typer.Option(help="none feeds the text as it is; auto wraps it as a user turn.")]
ApplyChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Same as --chat-template auto.")]
Padding = Annotated[str, typer.Option(help="auto, left, right, or none (exact-length batches).")]
BatchSize = Annotated[str, typer.Option(help="Rows per batch, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DeviceMap = Annotated[str | None, typer.Option(help="Handed to transformers, e.g. auto.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own code; needs --revision COMMIT.")
]
AllowBin = Annotated[bool, typer.Option("--allow-bin", help="Load .bin weights where no safetensors exist.")]
Out = Annotated[str, typer.Option("--out", "--output-path", help="Folder of runs, or the run to continue.")]
Config = Annotated[str | None, typer.Option(help="YAML file of settings; flags win over it.")]
ModelArgs = Annotated[str | None, typer.Option(help="lm-eval's spelling: pretrained=NAME,dtype=…,revision=….")]
Force = Annotated[bool, typer.Option("--force", help="Continue a run that another version began.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
