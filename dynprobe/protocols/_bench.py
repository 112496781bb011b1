"""``bench``: what reading, measuring, storing, writing, sweeping and holding cost, on the user's machine and model.

Every figure is a ratio of two calls in the same process, taken in turns (:mod:`dynprobe.protocols._bench_timing`), and
what two arms computed is compared before they are timed. Nothing here is a budget: a budget belongs to a machine and a
model, and is compared outside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynprobe import __version__
from dynprobe.errors import DynprobeError, UsageError, did_you_mean
from dynprobe.probes import Subject, as_subject, load
from dynprobe.protocols._bench_case import Case, Measurement, Size
from dynprobe.protocols._bench_disk import disk_case, states_case
from dynprobe.protocols._bench_forward import capture_case, metrics_case
from dynprobe.protocols._bench_peers import chosen, hushed, lasting
from dynprobe.protocols._bench_sweep import sweep_cases
from dynprobe.protocols._bench_texts import attractor_cases, generation_case
from dynprobe.protocols._bench_timing import machine_facts
from dynprobe.protocols._prompts import learned_positions

__all__ = ["SECTIONS", "Bench", "bench"]

SECTIONS = ("capture", "metrics", "states", "disk", "generation", "sweep", "attractor")
#: Sections with arms that capture, which peers have.
_CAPTURING = ("capture", "disk")
_LIBRARIES = (
    "torch", "transformers", "numpy", "pyarrow", "safetensors", "nnsight", "transformer-lens", "pyvene", "torchlens",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        model: Facts of the model: name, class, parameters, layers, width, dtype, hash of its weights.
        machine: Where: processor, threads, device, date, load of the machine before and after.
        versions: Of dynprobe and of what is installed beside it.
        settings: Size of the work.
        measurements: One per comparison.
        left_out: Section → why it could not be measured.
        path: Where it was written.
    """

    model: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    measurements: tuple[Measurement, ...]
    left_out: dict[str, str]
    path: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as a plain mapping, the raw times among it; a figure that is none is None."""
        found: dict[str, Any] = _finite(
            {
                "kind": "dynprobe-bench", "schema_version": 1, "model": self.model, "machine": self.machine,
                "versions": self.versions, "settings": self.settings,
                "cases": [m.as_dict() for m in self.measurements], "left_out": self.left_out,
            }
        )  # fmt: skip
        return found

    def ratio(self, section: str, arm: str, case: str | None = None) -> float:
        """Return the median ratio of an arm to its baseline.

        Args:
            section: One of the sections.
            arm: Name of the arm.
            case: Name of the case, where a section has several with such an arm; default the first.

        Raises:
            UsageError: If it was not measured.
        """
        for m in self.measurements:
            if m.section == section and arm in m.seconds and case in (None, m.name):
                return m.ratio(arm)[0]
        known = [f"{m.section}: {arm}" for m in self.measurements for arm in m.seconds]
        raise UsageError(f"{section}: {arm} was not measured.{did_you_mean(f'{section}: {arm}', known)}")

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        target = Path(path)
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        target.write_text(text + "\n", encoding="utf-8")
        return target


def bench(
    model: str | nn.Module | Subject = "tiny-llama",
    *,
    batch: int = 8,
    length: int = 64,
    rounds: int = 7,
    new_tokens: int = 32,
    strengths: int = 16,
    layers: int = 4,
    megabytes: float = 64.0,
    only: str | Sequence[str] | None = None,
    peers: str | Sequence[str] = "auto",
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    listener: Callable[[str], None] | None = None,
) -> Bench:
    """Measure what everything costs on this machine and with this model, beside what else is installed.

    An arm's figure is the median over rounds of (its time / its baseline's time in the same round). Where two arms give
    the same thing, the largest difference of what they gave is recorded beside their times.

    Args:
        model: Hub id, folder, GGUF file, known name, module, or subject.
        batch: Rows of a forward and of a text.
        length: Tokens of each row.
        rounds: Rounds of every comparison.
        new_tokens: Tokens that are written in ``generation`` and ``attractor``.
        strengths: Strengths of ``sweep``.
        layers: Layers of ``sweep``, at most; they are spread over the model.
        megabytes: Size of the states of ``states``.
        only: Sections, in a list or with commas between: capture, metrics, states, disk, generation, sweep, attractor.
            Default all.
        peers: ``"auto"`` (all that are installed), ``"none"``, or of hooks, nnsight, transformer_lens, pyvene,
            torchlens.
        out: File to write the result to, JSON. States that are written for a moment lie in the same folder, so that it
            is that disk which is measured; without it, in the system's folder for temporary files.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, …
        dtype: Of the weights.
        listener: Told in words what is measured now.

    Returns:
        What was measured.

    Raises:
        UsageError: If a section or peer is unknown, or a size is none.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> found = bench(tiny_llama(), batch=1, length=8, rounds=2, only="metrics", peers="none")
        >>> found.measurements[0].name, found.ratio("metrics", "core") > 0
        ('1 × 8', True)
    """
    sections, asked = _sections(only), chosen(peers)
    last = lasting(asked)
    wanted = None if asked is None else [name for name in asked if name not in last]
    sizes = {"batch": batch, "length": length, "rounds": rounds, "new_tokens": new_tokens, "strengths": strengths}
    for name, value in {**sizes, "layers": layers}.items():
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value!r}; it is a number from 1")
    if not (math.isfinite(megabytes) and megabytes > 0):
        raise UsageError(f"megabytes={megabytes!r}; it is a number above 0")
    if length < 2:
        raise UsageError("length=1; a row has at least two tokens, since a write begins at the second")
    target = None if out is None else Path(out)
    if target is not None and not target.resolve().parent.is_dir():
        raise UsageError(f"out={str(out)!r}: there is no folder {target.resolve().parent}")
    folder = None if target is None else target.resolve().parent
    subject = load(model, device=device, dtype=dtype) if isinstance(model, str) else as_subject(model)
    if (limit := learned_positions(subject)) is not None and length > limit:
        raise UsageError(
            f"length={length}, and {subject.name} has a table of {limit} positions; --length {limit} or less"
        )
    size = Size(batch, length, new_tokens, strengths, layers, megabytes, rounds)
    before = machine_facts(subject.device)
    measurements: list[Measurement] = []
    left_out: dict[str, str] = {}
    # A peer that leaves something behind in the process would be in every time that is taken after it.
    turns: list[tuple[str, list[str] | None]] = [(section, wanted) for section in sections]
    turns += [(section, [name]) for name in last for section in sections if section in _CAPTURING]
    for section, some in turns:
        if listener is not None:
            listener(section)
        try:
            with hushed():
                for case in _cases(section, subject, size, some, folder):
                    if not case.arms:
                        left_out[section] = "; ".join(f"{name} {why}" for name, why in case.absent.items())
                        continue
                    if listener is not None:
                        listener(f"{section}: {case.name}, {len(case.arms)} arms × {rounds} rounds")
                    if some is not wanted:
                        case.name = f"{case.name}, beside {', '.join(some or ())}"
                    measurements.append(case.measure(subject.device, rounds))
        except DynprobeError as error:  # what this model cannot do is said; the other sections stand
            left_out[section] = str(error)
    machine = {**before, "load_after": machine_facts(subject.device)["load"]}
    found = Bench(
        _model_facts(subject), machine, _versions(), {**asdict(size), "peers": asked or peers}, tuple(measurements),
        left_out, target,
    )  # fmt: skip
    if target is not None:
        found.save(target)
    return found


def _sections(only: str | Sequence[str] | None) -> list[str]:
    if only is None:
        return list(SECTIONS)
    words = [w.strip() for w in (only.split(",") if isinstance(only, str) else only) if w.strip()]
    for word in words:
        if word not in SECTIONS:
            raise UsageError(f"only={word!r}; known: {', '.join(SECTIONS)}.{did_you_mean(word, SECTIONS)}")
    if not words:
        raise UsageError(f"only={only!r} names no section; known: {', '.join(SECTIONS)}")
    return [section for section in SECTIONS if section in words]


def _cases(
    section: str, subject: Subject, size: Size, wanted: Sequence[str] | None, folder: Path | None
) -> Iterator[Case]:
    single: dict[str, Callable[[Subject, Size, Sequence[str] | None], Case]] = {
        "capture": capture_case, "metrics": metrics_case, "generation": generation_case,
        "states": lambda s, z, _: states_case(s, z, folder), "disk": partial(disk_case, folder=folder),
    }  # fmt: skip
    several = {"sweep": sweep_cases, "attractor": attractor_cases}
    if section in single:
        yield single[section](subject, size, wanted)
    else:
        yield from several[section](subject, size, wanted)


def _model_facts(subject: Subject) -> dict[str, Any]:
    facts = subject.facts
    return {
        "name": subject.name, "class": type(subject.model).__name__, "layers": subject.n_layers, "width": subject.width,
        "vocab": subject.vocab_size, "parameters": sum(p.numel() for p in subject.model.parameters()),
        "dtype": str(subject.dtype).removeprefix("torch."), "weights_hash": facts.get("weights_hash"),
        "attention": facts.get("attn_implementation"),
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"dynprobe": __version__, "torch": torch.__version__}
    for name in _LIBRARIES[1:]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
