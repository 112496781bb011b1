"""Flags that several commands share, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Address",
    "AllowBin",
    "ApplyChatTemplate",
    "Backend",
    "BatchSize",
    "Category",
    "ChatTemplate",
    "Config",
    "Contrast",
    "Device",
    "DeviceMap",
    "Direction",
    "Dtype",
    "Engine",
    "Force",
    "Json",
    "Limit",
    "Model",
    "ModelArgs",
    "Out",
    "Padding",
    "Prompt",
    "Prompts",
    "Quantization",
    "Quiet",
    "Remote",
    "RemoteHost",
    "Revision",
    "Slurm",
    "TrustRemoteCode",
    "WorkerGpus",
    "WorkerThreads",
    "Workers",
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
Engine = Annotated[
    str, typer.Option(help="Who does the batches: local (processes here), ray (pip install 'dynprobe[ray]'), slurm.")
]
Workers = Annotated[str, typer.Option(help="Processes that do them; auto is one per GPU, or this one.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, e.g. auto; left out, Ray is started here.")]
WorkerGpus = Annotated[float | None, typer.Option(help="GPUs of each worker; with ray also a share such as 0.25.")]
WorkerThreads = Annotated[int | None, typer.Option(help="Processor threads of each worker.")]
Slurm = Annotated[
    list[str] | None,
    typer.Option(help="name=value for the jobs, e.g. timeout_min=60,slurm_partition=gpu (submitit's names)."),
]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16.")]
Backend = Annotated[str, typer.Option(help="What reads and writes states: hooks, or nnsight (traces).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DeviceMap = Annotated[str | None, typer.Option(help="Handed to transformers, e.g. auto.")]
Quantization = Annotated[
    str | None, typer.Option(help="Load weights as int8, nf4, fp4 (bitsandbytes) or torchao-int8wo.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
CompileMetrics = Annotated[
    bool, typer.Option("--compile-metrics", help="Compile the metrics with torch.compile, never the model.")
]
Remote = Annotated[bool, typer.Option("--remote", help="Run on NDIF, which hosts the model; needs NDIF_API_KEY.")]
RemoteHost = Annotated[str | None, typer.Option(help="Server for --remote: its URL, or local for a dry run here.")]
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
