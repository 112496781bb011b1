"""Run the self-tests and remember those that depend on the model alone."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dynprobe import __version__, models
from dynprobe.errors import SelfTestError
from dynprobe.probes import (
    Calibration,
    Check,
    Perturb,
    Subject,
    capture,
    check_alone,
    check_fired,
    check_null,
    check_readout,
    check_resume,
    tokenize,
)
from dynprobe.prompts import load_prompts
from dynprobe.protocols._plugins_used import adapter_used

__all__ = ["all_checks", "model_checks", "refuse_if_broken"]

#: Longer rows make a test slower and no sharper.
_MAX_TOKENS = 12
_MAX_ROWS = 3
#: Raise when a check stores other numbers, so that an old cache is not taken for a new one.
_CACHE_SCHEMA = 6

Rows = Sequence[Sequence[int]]


def _short(rows: Rows) -> list[list[int]]:
    """A few rows of different lengths, so that there is padding to be wrong about."""
    picked = sorted(rows, key=len)
    step = max(1, len(picked) // _MAX_ROWS)
    chosen = picked[::step][:_MAX_ROWS]
    return [list(r)[: max(_MAX_TOKENS - 3 * i, 1)] for i, r in enumerate(chosen)]


def _fixed_rows(subject: Subject, rows: Rows) -> list[list[int]]:
    """Rows of three lengths that do not depend on the run, as a verdict that is kept for a model must not."""
    if subject.tokenizer is not None:
        found = tokenize(subject, [p.text for p in load_prompts(source="calibration", limit=_MAX_ROWS)])
    elif subject.vocab_size:
        vocab = subject.vocab_size
        found = [[(7 * i + 3 * j + 1) % vocab for i in range(_MAX_TOKENS)] for j in range(_MAX_ROWS)]
    else:
        return _short(rows)
    return [row[: _MAX_TOKENS - 3 * i] for i, row in enumerate(found)]


def _cache_file(subject: Subject) -> Path:
    key = {
        "schema": _CACHE_SCHEMA, "weights": subject.facts.get("weights_hash"),
        "class": type(subject.model).__qualname__, "blocks": subject.block_path,
        "dtype": str(subject.dtype), "device": str(subject.device),
        "attention": subject.facts.get("attn_implementation"), "dynprobe": __version__, "torch": torch.__version__,
        "transformers": subject.facts.get("versions", {}).get("transformers"), "threads": torch.get_num_threads(),
        **({} if subject.backend == "hooks" else {"backend": subject.backend}), **adapter_used(subject),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return models.cache_root() / "selftests" / f"{digest}.json"


def model_checks(subject: Subject, rows: Rows, *, fresh: bool = False) -> dict[str, Check]:
    """``alone`` and ``resume``: they depend on weights, dtype, device and versions, and are cached by them.

    Args:
        subject: The subject.
        rows: Token ids to try with where there is no text to take.
        fresh: Ignore the cache.
    """
    path = _cache_file(subject)
    if not fresh and subject.facts.get("weights_hash") and path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            kept = {name: Check(**stored[name]) for name in ("alone", "resume")}
            subject.resumable = kept["resume"].passed
            return kept
        except (ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)  # damaged: measure again
    fixed = _fixed_rows(subject, rows)
    tape = capture(subject, fixed, logits="all")
    found = {"alone": check_alone(subject, fixed), "resume": check_resume(subject, tape)}
    if subject.facts.get("weights_hash"):
        with suppress(OSError):  # what cannot be kept is measured again
            _keep(path, json.dumps({name: check.as_dict() for name, check in found.items()}))
    return found


def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".selftest-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(temporary).replace(path)


def all_checks(
    subject: Subject,
    rows: Rows,
    perturb: Perturb | None = None,
    calibration: Calibration | None = None,
    *,
    fresh: bool = False,
) -> dict[str, Check]:
    """Run the five self-tests.

    Args:
        subject: The subject.
        rows: Token ids of the first batch.
        perturb: Perturbation whose write path ``null`` tries; default a write at every block.
        calibration: For scales that need one.
        fresh: Do not take ``alone`` and ``resume`` from the cache.
    """
    short = _short(rows)
    tape = capture(subject, short, logits="all")
    found = {
        "null": check_null(subject, short, perturb, calibration=calibration),
        "fired": check_fired(subject, short),
        "readout": check_readout(subject, tape),
        **model_checks(subject, short, fresh=fresh),
    }
    return {name: found[name] for name in ("null", "alone", "resume", "fired", "readout")}


def refuse_if_broken(checks: dict[str, Check]) -> list[str]:
    """Stop where numbers could not be trusted; return what has a way around it.

    ``null`` and ``fired`` stop a run. ``alone`` makes it use exact-length batches, ``resume`` the slow road, and
    ``readout`` forbids the logit lens.

    Raises:
        SelfTestError: If ``null`` or ``fired`` failed.
    """
    for name in ("null", "fired"):
        check = checks[name]
        if not check.passed:
            raise SelfTestError(
                f"self-test {name} failed: {check.value:g} {check.unit} where at most {check.limit:g} is right. "
                f"No number of this run could be trusted; details: {_detail(check)}"
            )
    return [name for name, check in checks.items() if not check.passed]


def _detail(check: Check) -> str:
    return json.dumps(check.detail, default=str)[:400]


def as_manifest(checks: dict[str, Check]) -> dict[str, Any]:
    """Return the checks for the manifest."""
    return {name: check.as_dict() for name, check in checks.items()}
