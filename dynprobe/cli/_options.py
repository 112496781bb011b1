"""Options that several commands have: one name, one meaning, one help text.

Each says what it is, its unit where it has one, and what holds where it is left out. A command whose option of the same
name means something else words it itself; a test knows those.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import _words as words
from dynprobe.cli._help import LOOP, MEASURE, MODEL, OUTPUT, PROMPTS, STATISTICS, TEXT, WORK, WRITE

__all__ = [
    "Address",
    "AllowBin",
    "ApplyChatTemplate",
    "Backend",
    "BatchSize",
    "Calibration",
    "Category",
    "ChatTemplate",
    "CompileMetrics",
    "Confidence",
    "Config",
    "Contrast",
    "Detector",
    "Device",
    "DeviceMap",
    "Direction",
    "DryRun",
    "Dtype",
    "Engine",
    "Force",
    "Gain",
    "Json",
    "Limit",
    "MOff",
    "MaxNewTokens",
    "Metrics",
    "Model",
    "ModelArgs",
    "NBoot",
    "NumSamples",
    "On",
    "Out",
    "OwnDevice",
    "OwnDtype",
    "Padding",
    "Perturb",
    "Prompt",
    "Prompts",
    "QHi",
    "QLo",
    "Quantization",
    "Quiet",
    "Remote",
    "RemoteHost",
    "Revision",
    "RunFolder",
    "Seed",
    "Site",
    "Slurm",
    "States",
    "StopAtEos",
    "Temperature",
    "Timings",
    "TopP",
    "Track",
    "TrustRemoteCode",
    "WorkerGpus",
    "WorkerThreads",
    "Workers",
]

_model, _prompts, _write = (partial(typer.Option, rich_help_panel=panel) for panel in (MODEL, PROMPTS, WRITE))
_text, _loop, _measure = (partial(typer.Option, rich_help_panel=panel) for panel in (TEXT, LOOP, MEASURE))
_statistics, _work, _output = (partial(typer.Option, rich_help_panel=panel) for panel in (STATISTICS, WORK, OUTPUT))
_RUN = "protocols/_config.py"

# ---- model
Model = Annotated[
    str | None,
    _model(
        help="Hub id, local folder, GGUF file, or known name (smollm2-135m, tiny-llama, tiny-cem, tiny-csm). "
        "Default tiny-llama, which comes with dynprobe; tiny-csm where a loop is needed.",
        autocompletion=words.models,
    ),
]
Revision = Annotated[str | None, _model(help="Branch, tag or commit of a hub model. Default its main branch.")]
Dtype = Annotated[
    str,
    _model(help="Dtype of the weights: float32, float64, bfloat16, float16.",
           autocompletion=words.one_of(_RUN, "dtype")),
]  # fmt: skip
Device = Annotated[str, _model(help="Device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.")]
OwnDtype = Annotated[
    str | None,
    _model(help="Dtype of the weights: float32, float64, bfloat16, float16. Default the claim's own.",
           autocompletion=words.one_of(_RUN, "dtype")),
]  # fmt: skip
OwnDevice = Annotated[str | None, _model(help="Device: auto, cpu, cuda, cuda:1, mps. Default auto.")]
DeviceMap = Annotated[
    str | None,
    _model(help="How transformers spreads the model: auto, balanced, sequential. Default one device."),
]
Quantization = Annotated[
    str | None,
    _model(
        help="Load weights as int8, nf4, fp4 (bitsandbytes) or torchao-int8wo. Default as they are stored.",
        autocompletion=words.one_of("models/_quantize.py", "QUANTIZATIONS"),
    ),
]
TrustRemoteCode = Annotated[
    bool, _model("--trust-remote-code", help="Run the model's own code; needs --revision COMMIT.")
]
AllowBin = Annotated[bool, _model("--allow-bin", help="Load .bin weights where no safetensors exist.")]
ModelArgs = Annotated[
    str | None, _model(help="lm-eval's spelling: pretrained=NAME,dtype=…,revision=…. Default the options here.")
]
Backend = Annotated[
    str,
    _model(help="What reads and writes states: hooks, or nnsight (traces).",
           autocompletion=words.one_of(_RUN, "backend")),
]  # fmt: skip
Remote = Annotated[bool, _model("--remote", help="Run on NDIF, which hosts the model; needs NDIF_API_KEY.")]
RemoteHost = Annotated[
    str | None, _model(help="Server for --remote: its URL, or local for a dry run here. Default NDIF's own.")
]

# ---- prompts
Prompt = Annotated[
    list[str] | None, _prompts(help="Text of a prompt; may be repeated. Default the 24 built-in prompts.")
]
Prompts = Annotated[
    str | None,
    _prompts(help="File of prompts: .txt, .jsonl, .parquet, or - for standard input. Default the 24 built-in ones.",
             autocompletion=words.files),
]  # fmt: skip
Category = Annotated[
    list[str] | None,
    _prompts(help="Keep prompts of this category; may be repeated. Default all.",
             autocompletion=words.one_of("prompts/_builtin.py", "CATEGORIES")),
]  # fmt: skip
Limit = Annotated[int | None, _prompts(help="Keep the first N prompts. Default all.")]
ChatTemplate = Annotated[
    str,
    _prompts(help="none feeds the text as it is; auto wraps it as a user turn.",
             autocompletion=words.one_of(_RUN, "chat_template")),
]  # fmt: skip
ApplyChatTemplate = Annotated[bool, _prompts("--apply-chat-template", help="Same as --chat-template auto.")]

# ---- perturbation
Perturb = Annotated[
    list[str] | None,
    _write(
        help="Perturbation, e.g. alpha=0.1,scale=relnorm,layers=6:9, or @file.yaml; repeated ones act together. "
        "α is in the unit of its scale. Default none.",
        autocompletion=words.perturbation,
    ),
]
Direction = Annotated[
    str | None,
    _write(help="File of the vector of kind=direction (.npy, .safetensors). Default none.", autocompletion=words.files),
]
Contrast = Annotated[
    tuple[str, str] | None,
    _write(help="Two texts; the difference of their last states is the direction. Default none."),
]

# ---- generation
MaxNewTokens = Annotated[int, _text(help="Tokens to generate; 0 measures the prompts only.")]
Temperature = Annotated[float, _text(help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, _text(help="Nucleus of sampling: share of the probability that is kept.")]
NumSamples = Annotated[int, _text(help="Texts per prompt and arm.")]
Seed = Annotated[int, _text(help="Seed of sampling, random arms, and noise that names none.")]

StopAtEos = Annotated[
    bool, _text(help="End a text at the end-of-sequence token; texts of one arm then differ in length.")
]

# ---- what is measured
Metrics = Annotated[
    list[str] | None,
    _measure(
        help="A metric to store as well, e.g. erank.rv/1 (see dynprobe metrics); may be repeated. Default none.",
        autocompletion=words.metrics,
    ),
]
States = Annotated[bool, _measure("--states", help="Write the hidden states too.")]

# ---- detector and modes
_SIGNALS = ("controllers/recovery/_signals.py", "SIGNALS")
Detector = Annotated[
    str,
    _loop(
        help="Signal that is watched: kappa_phase_zmax, kappa_phase, kappa_phase_z, norm_step_zmax, entropy, limen_ct.",
        autocompletion=words.one_of(*_SIGNALS),
    ),
]
On = Annotated[int, _loop("--m", help="Tokens above the upper level before the detector fires.")]
MOff = Annotated[int, _loop("--m-off", help="Tokens below the lower level before it lets go.")]
QLo = Annotated[float, _loop(help="Lower level: quantile on clean text.")]
QHi = Annotated[float, _loop(help="Upper level: quantile on clean text.")]
Gain = Annotated[float, _loop(help="Largest gain of an actuator: share of its full step.")]
Site = Annotated[str | None, _loop(help="Where actuators act, e.g. layers=60%. Default where the signal points.")]
Timings = Annotated[
    list[str] | None,
    _loop(
        help="When modes act: detector, always, oracle (where the noise is), with commas or repeated. Default all.",
        autocompletion=words.listed("protocols/_recover_config.py", "timings"),
    ),
]
Calibration = Annotated[
    str | None,
    _loop(help="Folder of a calibration of this model. Default: made when first needed.",
          autocompletion=words.folders),
]  # fmt: skip

# ---- statistics
Confidence = Annotated[float, _statistics(help="Coverage of intervals: share, between 0.5 and 1.")]
NBoot = Annotated[int, _statistics(help="Bootstrap resamples of the prompts.")]
Track = Annotated[
    str | None, _measure(help="Track of runs that have several. Default: diff takes all, compare the run's own.")
]

# ---- how the work is done
Padding = Annotated[
    str, _work(help="auto, left, right, or none (exact-length batches).", autocompletion=words.one_of(_RUN, "padding"))
]
BatchSize = Annotated[str, _work(help="Rows per batch, or auto.")]
Engine = Annotated[
    str,
    _work(help="Who does the batches: local (processes here), ray (pip install 'dynprobe[ray]'), slurm.",
          autocompletion=words.one_of("engines/_registry.py", "ENGINES")),
]  # fmt: skip
Workers = Annotated[str, _work(help="Processes that do them; auto is one per GPU, or this one.")]
Address = Annotated[str | None, _work(help="Ray cluster to join, e.g. auto. Default: Ray is started here.")]
WorkerGpus = Annotated[
    float | None,
    _work(help="GPUs of each worker; with ray also a share such as 0.25. Default: ray takes one where there are any."),
]
WorkerThreads = Annotated[
    int | None,
    _work(help="Processor threads of each worker. Default: local shares the cores out, ray and slurm take 1."),
]
Slurm = Annotated[
    list[str] | None,
    _work(help="name=value for the jobs, e.g. timeout_min=60,slurm_partition=gpu (submitit's names). Default none."),
]
CompileMetrics = Annotated[
    bool, _work("--compile-metrics", help="Compile the metrics with torch.compile, never the model.")
]

# ---- input and output
RunFolder = Annotated[Path, typer.Argument(help="A run folder.", autocompletion=words.runs)]
Out = Annotated[
    str,
    _output("--out", "--output-path", help="Folder of runs, or the run to continue.", autocompletion=words.folders),
]
Config = Annotated[
    str | None,
    _output(help="YAML file of settings (dynprobe init writes one); flags win over it. Default none.",
            autocompletion=words.files),
]  # fmt: skip
Force = Annotated[bool, _output("--force", help="Continue a run that another version began.")]
DryRun = Annotated[bool, _output("--dry-run", help="Say what it would cost, and run nothing.")]
Json = Annotated[bool, _output("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, _output("--quiet", help="No progress.")]
