"""Finding out what a manifest said before it was damaged.

Four sources, the surest first. *The manifest itself*, where its seal holds. *Restored*: fields that were edited are
taken from the manifest before it, where they hash to what the last one was sealed with, so that the result is the last
manifest exactly. *Salvaged*: a manifest that was cut short lost its end, which is the list of files; the lines that are
left, and the files that lie in the folder, make the list again. *Previous*: the manifest before the last, which lacks
the last thing that was done, usually one batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dynprobe.errors import RunFolderError
from dynprobe.runs._damage_report import Damage
from dynprobe.runs._json import loads
from dynprobe.runs._manifest import (
    MANIFEST_NAME,
    PREVIOUS_NAME,
    Manifest,
    Part,
    check_version,
    parse_manifest,
    unsealed,
)
from dynprobe.runs._schema import TABLES
from dynprobe.runs._tables import hash_file

__all__ = ["Found", "find_manifest"]

_PARTS = '\n "parts": ['


@dataclass
class Found:
    """A manifest and where it comes from."""

    manifest: Manifest | None
    source: str
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_manifest(folder: Path) -> Found:
    """Return the manifest of a folder, or what can be known of it.

    Raises:
        RunFolderError: It was written with a newer schema.
    """
    path = folder / MANIFEST_NAME
    content, text, why = _content(path)
    if content is not None:
        edited = unsealed(content)
        if edited != ["schema_version"] and str(content.get("schema_version")).split(".")[0].isdigit():
            check_version(content.get("schema_version"), path)
        try:
            manifest = parse_manifest(text, path)
        except RunFolderError as error:
            why = str(error).split(". ", maxsplit=1)[0]
        else:
            if not edited:
                bare = "the manifest is of a version that did not seal it: an edit cannot be told"
                return Found(manifest, "manifest", notes=[] if content.get("seal") else [bare])
        if edited:
            return _edited(folder, content, edited)
    for source, made, how in (
        ("salvaged", _salvaged(folder, text), "list the files again that its lost end had listed"),
        ("previous", _previous(folder), f"put {PREVIOUS_NAME} in its place, which lacks the last step"),
    ):
        if made is not None:
            return Found(made, source, [Damage("manifest", MANIFEST_NAME, why, how)])
    return Found(None, "lost", [Damage("manifest", MANIFEST_NAME, f"{why}, and nothing says what it held", "")])


def _content(path: Path) -> tuple[dict[str, Any] | None, str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, "", "it is missing"
    except (OSError, UnicodeDecodeError) as error:
        return None, "", f"it cannot be read: {error}"
    try:
        content = loads(text)
    except (ValueError, RecursionError) as error:
        return None, text, f"it is cut short or no JSON: {error}"
    if not isinstance(content, dict):
        return None, text, f"it holds {type(content).__name__} instead of an object"
    return content, text, ""


def _edited(folder: Path, content: dict[str, Any], edited: list[str]) -> Found:
    fields = ", ".join(map(repr, edited))
    what = f"it was edited after it was written: {'field' if len(edited) == 1 else 'fields'} {fields}"
    before, _, _ = _content(folder / PREVIOUS_NAME)
    options = [{n: before[n] for n in edited if n in before}] if before is not None else []
    options += [{"status": status} for status in ("complete", "interrupted", "running")] if edited == ["status"] else []
    for values in options:
        whole = {k: v for k, v in content.items() if k not in edited} | values
        if not unsealed(whole):
            made = _parsed(whole, folder / MANIFEST_NAME)
            if made is not None:
                return Found(made, "restored", [Damage("manifest", MANIFEST_NAME, what, f"put {fields} back")])
    previous = _previous(folder)
    if previous is not None:
        how = f"put {PREVIOUS_NAME} in its place, which lacks the last step"
        return Found(previous, "previous", [Damage("manifest", MANIFEST_NAME, what, how)])
    return Found(None, "lost", [Damage("manifest", MANIFEST_NAME, f"{what}, and nothing says what they held", "")])


def _parsed(content: dict[str, Any], path: Path) -> Manifest | None:
    try:
        return parse_manifest(json.dumps(content), path)
    except RunFolderError:
        return None


def _previous(folder: Path) -> Manifest | None:
    content, _, _ = _content(folder / PREVIOUS_NAME)
    return None if content is None or unsealed(content) else _parsed(content, folder / PREVIOUS_NAME)


def _salvaged(folder: Path, text: str) -> Manifest | None:
    """Return what a manifest that lost its end said; None where more than the list of files is gone."""
    start = text.find(_PARTS)
    if start < 0:
        return None
    try:
        content = loads(text[:start].rstrip().rstrip(",") + "\n}")
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    if content.get("imported_from"):  # names of imported files say nothing of batches; importing again is sure
        return None
    seal = content.get("seal")
    parts = _lines(text[start + len(_PARTS) :])
    known = {part["path"] for part in parts}
    finished = {n for n in content.get("finished") or [] if isinstance(n, int)}
    parts += [part for part in _on_disk(folder, finished) if part["path"] not in known]
    whole = {**content, "parts": parts}
    wrong = [name for name in unsealed(whole) if name != "parts"] if isinstance(seal, dict) else []
    return None if wrong else _parsed(whole, folder / MANIFEST_NAME)


def _lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            part = loads(line.strip().rstrip(","))
            found.append(Part.model_validate(part).model_dump())
        except ValueError:
            continue
    return found


def _on_disk(folder: Path, finished: set[int]) -> list[dict[str, Any]]:
    """List the files of finished batches, and whole tables, that can be read from end to end."""
    found = []
    for name, table in TABLES.items():
        files = sorted((folder / name).glob("*.parquet")) if table.sharded else [folder / f"{name}.parquet"]
        for path in files:
            number = path.stem.split("-")[1:2]
            batch = int(number[0]) if number and number[0].isdigit() else None
            if path.name.startswith(".") or not path.is_file() or (batch is not None and batch not in finished):
                continue
            rows = _rows(path)
            if rows is not None:
                found.append(
                    {
                        "path": path.relative_to(folder).as_posix(), "table": name, "batch": batch, "rows": rows,
                        "bytes": path.stat().st_size, "sha256": hash_file(path),
                    }
                )  # fmt: skip
    return found


def _rows(path: Path) -> int | None:
    try:
        with pq.ParquetFile(path) as file:
            return sum(file.read_row_group(group).num_rows for group in range(file.num_row_groups))
    except (pa.ArrowException, OSError):
        return None
