"""``doctor``: what was found in a model, and whether its numbers can be trusted; or what is wrong with a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from torch import nn

from dynprobe.errors import CalibrationError, UsageError
from dynprobe.probes import Check, Subject, load_calibration, tokenize
from dynprobe.probes import load as load_subject
from dynprobe.prompts import load_prompts
from dynprobe.protocols._selfchecks import all_checks
from dynprobe.protocols._weights import weights_of
from dynprobe.runs import Damage, Examination, Run, examine
from dynprobe.runs import repair as repair_run

__all__ = ["Diagnosis", "doctor"]


@dataclass(frozen=True)
class Diagnosis:
    """The outcome of ``doctor``.

    Attributes:
        found: Structure of the model.
        checks: The five self-tests.
        provenance: Where the weights came from.
    """

    found: dict[str, Any]
    checks: dict[str, Check]
    provenance: dict[str, Any]

    @property
    def healthy(self) -> bool:
        """Whether all self-tests passed; a model that is resumed by the slow road is resumed right, and counts."""
        return all(check.passed or name == "resume" for name, check in self.checks.items())

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "healthy": self.healthy, "found": self.found, "provenance": self.provenance,
            "checks": {name: check.as_dict() for name, check in self.checks.items()},
        }  # fmt: skip


@overload
def doctor(model: nn.Module | Subject, **options: Any) -> Diagnosis: ...


@overload
def doctor(model: Run | Path, *, repair: bool = ..., **options: Any) -> Examination: ...


@overload
def doctor(model: str, *, repair: bool = ..., **options: Any) -> Diagnosis | Examination: ...


def doctor(
    model: str | Path | nn.Module | Subject | Run, *, repair: bool = False, **options: Any
) -> Diagnosis | Examination:
    """Examine a model: find its parts and run the five self-tests. Or examine a run folder, and mend it.

    Args:
        model: Name of a model, a module, or a subject; or a run folder.
        repair: Of a run: mend what can be mended. Damaged files are moved to ``damaged/`` in the folder, never deleted,
            and the command that made the run makes their batches again.
        **options: Of a model: handed to :func:`dynprobe.load`.

    Returns:
        A diagnosis of a model; an examination of a run, made after the repair where one was asked for.

    Raises:
        ModelError: If no chain of blocks is found.
        RunFolderError: If the folder is no run, is of a newer schema, or is being written while it is repaired.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> doctor(tiny_llama()).checks["null"].value
        0.0
    """
    if isinstance(model, Run):
        return _examined(model.path, repair)
    if isinstance(model, str | Path) and _is_run(Path(model)):
        return _examined(Path(model), repair)
    if repair:
        raise UsageError(f"--repair mends a run folder, and {model} is none: it has no manifest.json")
    model = str(model) if isinstance(model, Path) else model
    subject = load_subject(model, **options)
    weights_of(subject, just_loaded=isinstance(model, str))
    if subject.tokenizer is not None:
        rows = tokenize(subject, [p.text for p in load_prompts(limit=6)])
    else:
        vocab = subject.vocab_size or 2
        rows = [[(7 * i + 3 * j + 1) % vocab for i in range(6 + 2 * j)] for j in range(4)]
    checks = all_checks(subject, rows, fresh=True)
    keep = (
        "model_id",
        "kind",
        "location",
        "commit",
        "weights_hash",
        "original_dtype",
        "n_parameters",
        "versions",
        "notes",
    )
    return Diagnosis(subject.describe(), checks, {k: subject.facts[k] for k in keep if k in subject.facts})


def _is_run(path: Path) -> bool:
    """Whether a path is meant as a run; an empty folder is, for it is no model either."""
    if path.name == "manifest.json":
        return path.is_file()
    if not path.is_dir() or (path / "config.json").is_file():
        return False
    return not any(p.suffix in (".safetensors", ".gguf", ".bin") for p in path.iterdir())


def _examined(path: Path, mend: bool) -> Examination:
    found = _examine(path)
    if not mend or found.healthy:
        return found
    steps = repair_run(found)
    after = _examine(path)
    after.done = steps
    return after


def _examine(path: Path) -> Examination:
    found = examine(path)
    found.damages += _calibration(found)
    return found


def _calibration(found: Examination) -> Iterator[Damage]:
    """The calibration that a run used lies beside its tables, under its hash."""
    name = None if found.manifest is None else found.manifest.calibration_hash
    if not isinstance(name, str) or (found.manifest is not None and found.manifest.imported):
        return  # an export carries the hash of the calibration, not the calibration
    place, again = f"calibration/{name}", "take it out; the same command puts it there again"
    if not (found.path / place).is_dir():
        yield Damage("calibration", place, "it is missing", again)
        return
    try:
        held = load_calibration(found.path / place).hash
    except CalibrationError as error:
        yield Damage("calibration", place, f"it cannot be read: {str(error).split(';')[0]}", again)
        return
    if held != name:
        yield Damage("calibration", place, f"it holds calibration {held}, and the run used {name}", again)
