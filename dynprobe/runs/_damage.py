"""What may be wrong with a run folder, and what of it can be mended without inventing a number.

A folder is looked at from three sides. *The manifest*: is it there, whole, and what was sealed. *The files it lists*:
is each there, of the right length and hash, of the right table and layout. *The files it does not list*: what a kill
left behind, or somebody copied in. Every finding says what was lost and what a repair would do about it; where nothing
can be done it says so. Looking changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynprobe.errors import RunFolderError
from dynprobe.runs._advice import who_continues
from dynprobe.runs._damage_files import check_parts, check_strangers
from dynprobe.runs._damage_manifest import Found, find_manifest
from dynprobe.runs._damage_report import Damage
from dynprobe.runs._identity import identity
from dynprobe.runs._json import loads
from dynprobe.runs._lock import LOCK_NAME, is_held
from dynprobe.runs._manifest import MANIFEST_NAME, Manifest
from dynprobe.runs._open_run import looks_like_run
from dynprobe.runs._schema import SCHEMA_VERSION
from dynprobe.runs._tables import read_frame

__all__ = ["Examination", "examine", "manifest_digest"]


@dataclass
class Examination:
    """What was found in a run folder.

    Attributes:
        path: The folder.
        manifest: What the manifest says, or what it can be restored to; None where it is lost.
        source: Where that comes from: ``manifest``, ``restored``, ``salvaged``, ``previous`` or ``lost``.
        damages: What is wrong; empty for a whole run.
        notes: What is worth knowing and no damage.
        done: What a repair did; empty before one.
        busy: Whether a living writer holds the folder.
        digest: SHA-256 of ``manifest.json`` as it was looked at; None where it was not there. A repair compares it.
    """

    path: Path
    manifest: Manifest | None
    source: str
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    busy: bool = False
    digest: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages

    @property
    def repairable(self) -> bool:
        """Whether a repair can mend everything that is wrong."""
        return self.manifest is not None and all(damage.remedy for damage in self.damages)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "run": str(self.path), "healthy": self.healthy, "repairable": self.repairable, "busy": self.busy,
            "manifest": self.source, "damages": [vars(damage) for damage in self.damages], "notes": self.notes,
            "done": self.done,
        }  # fmt: skip

    def __repr__(self) -> str:
        if self.healthy:
            files = 0 if self.manifest is None else len(self.manifest.parts)
            return f"{self.path}: whole, {files} files as they were written"
        return "\n".join([f"{self.path}: {len(self.damages)} damages", *(f"- {d}" for d in self.damages)])


def examine(folder: str | Path) -> Examination:
    """Look for damage in a run folder.

    Args:
        folder: The folder, or its ``manifest.json``.

    Raises:
        RunFolderError: It is no run folder, or was written with a newer schema.
    """
    path = Path(folder)
    path = path.parent if path.name == "manifest.json" else path
    if not looks_like_run(path):
        raise RunFolderError(f"{path} is no run folder: it has no manifest.json and no table of a run.")
    digest = manifest_digest(path)  # first: what a writer changes after this, a repair sees
    found = find_manifest(path)
    busy = is_held(path)
    out = Examination(path, found.manifest, found.source, list(found.damages), list(found.notes), [], busy, digest)
    if busy:
        out.notes.append("a living process writes this run: what is unfinished now may be whole in a moment")
    elif (path / LOCK_NAME).exists():
        out.notes.append(f"{LOCK_NAME} is left of a writer that was killed; it locks nothing")
    if found.manifest is None:
        return out
    out.damages += check_parts(path, found.manifest, busy)
    out.damages += [] if busy else check_strangers(path, found.manifest)
    out.damages += _batches(found.manifest)
    out.damages += _texts(path, found)
    out.damages += _identity(path, found.manifest, {d.path for d in out.damages})
    if found.manifest.imported and found.manifest.status != "complete":
        out.notes.append("the run was not complete when it was exported; continue it where it was made")
    elif found.manifest.status != "complete" and not busy:
        out.notes.append(f"the run is not complete; {who_continues(found.manifest.schema_version)}")
    elif found.manifest.schema_version != SCHEMA_VERSION and any(damage.remedy for damage in out.damages):
        out.notes.append(
            f"a repair that takes out a batch reopens it, and {who_continues(found.manifest.schema_version)}"
        )
    return out


def manifest_digest(folder: Path) -> str | None:
    """Return the SHA-256 of ``manifest.json``, or None where it cannot be read."""
    try:
        return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    except OSError:
        return None


def _batches(manifest: Manifest) -> Iterator[Damage]:
    if manifest.imported:  # its files are of no batch, and the conditions of some may have stayed behind
        return
    plan = manifest.batch_plan
    if isinstance(plan, list) and manifest.status == "complete" and len(manifest.finished) < len(plan):
        missing = sorted(set(range(len(plan))) - set(manifest.finished))
        yield Damage(
            "batch", "manifest.json", f"the run is called complete, and batches {_numbers(missing)} are not finished",
            "call it interrupted, so that the same command does them",
        )  # fmt: skip
    loose = sorted({p.batch for p in manifest.parts if p.batch is not None} - set(manifest.finished))
    for number in loose:
        yield Damage(
            "batch", "manifest.json", f"files of batch {number} are listed, and the batch is not finished",
            "unlist them; the same command makes the batch again", batch=number,
        )  # fmt: skip


def _texts(folder: Path, found: Found) -> Iterator[Damage]:
    """The files that are no tables."""
    again = "call the run interrupted, so that the same command writes it again"
    manifest = found.manifest
    assert manifest is not None
    if manifest.imported:  # figures do not travel, and an empty summary is not written
        why = _json_fault(folder / "summary.json") if (folder / "summary.json").exists() else ""
        if why:
            yield Damage("summary", "summary.json", f"{why}; import it again", "")
    elif manifest.status == "complete":
        why = _json_fault(folder / "summary.json")
        if why:
            yield Damage("summary", "summary.json", why, again)
        for name in ("README.md", *_figures(manifest)):
            if not (folder / name).is_file():
                yield Damage("summary", name, "it is missing", again)
    bad = _bad_lines(folder / "events.jsonl")
    if bad:
        cut = "its last line was cut short" if bad == [-1] else f"{len(bad)} of its lines cannot be read"
        yield Damage("events", "events.jsonl", cut, "keep the lines that can be read")


def _figures(manifest: Manifest) -> list[str]:
    listed = (manifest.model_extra or {}).get("figures")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _json_fault(path: Path) -> str:
    try:
        loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    return ""


def _bad_lines(path: Path) -> list[int]:
    """Numbers of the lines that are no JSON; −1 for the last."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    bad = []
    for number, line in enumerate(lines):
        try:
            loads(line)
        except ValueError:
            bad.append(number if number < len(lines) - 1 else -1)
    return bad


def _identity(folder: Path, manifest: Manifest, damaged: set[str]) -> Iterator[Damage]:
    """Recompute the id from what was hashed: settings, tokens of the prompts, weights."""
    settings = (manifest.model_extra or {}).get("identity")
    weights = manifest.weights.get("hash") if isinstance(manifest.weights, dict) else None
    if manifest.partial:  # its id is made of the run's and of what was asked for
        return
    if not isinstance(settings, dict) or not isinstance(weights, str) or "prompts.parquet" in damaged:
        return
    if not manifest.parts_of("prompts"):
        return
    prompts = read_frame(folder, manifest, "prompts", ["token_ids"])
    rows = [[int(i) for i in ids] for ids in prompts["token_ids"] if ids is not None]
    found = identity(settings, rows, weights)
    if found != manifest.id8:
        yield Damage(
            "identity", "manifest.json",
            f"its id is {manifest.id8}, and settings, prompts and weights in the folder make {found}: one of them is "
            "not what the run was made with", "",
        )  # fmt: skip


def _numbers(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown} and {len(values) - 8} more"
