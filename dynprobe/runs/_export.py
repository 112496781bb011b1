"""A run as others want it: a dataset folder for the hub, or Arrow, CSV, NumPy, safetensors, Zarr.

An export is a folder: the tables in the format that was asked for, a page that says what they are (``README.md``), and
``dynprobe.json``, which holds what a format cannot: the manifest and the summary, type, metric id, unit, digest and
span of every column, and the checksum of every file. With it ``dynprobe import`` makes the run folder again, the same
tables bit for bit.

The folder appears whole or not at all. Something that is already there is left alone, unless it is an older export and
the user says so; then the old one goes after the new one stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs._atomic import TEMPORARY, sync_folder, writing
from dynprobe.runs._export_card import export_card
from dynprobe.runs._export_formats import FORMATS
from dynprobe.runs._export_redact import Redaction, without_positions
from dynprobe.runs._export_tables import Leaving, describe_columns, leaving
from dynprobe.runs._json import dumps, plain
from dynprobe.runs._manifest import Manifest
from dynprobe.runs._schema import SCHEMA_VERSION
from dynprobe.runs._secrets import scrub, scrub_command
from dynprobe.runs._tables import hash_file, read_arrow

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["EXPORT_FORMATS", "LAYOUT", "SIDECAR", "Export", "export_run"]

#: What an export holds beside its tables.
SIDECAR = "dynprobe.json"
#: Version of the layout of an export; a greater one is refused by older versions.
LAYOUT = 2
#: Formats of dynprobe's own; other packages may bring more.
EXPORT_FORMATS = FORMATS.builtin


@dataclass(frozen=True)
class Export:
    """An export that was written.

    Attributes:
        path: The folder.
        to: The format.
        rows: Table → rows.
        bytes: Size of all files.
        removed: What was taken out, in words.
        remarks: What whoever uses it should know.
        address: Where it was pushed to, or None.
    """

    path: Path
    to: str
    rows: dict[str, int]
    bytes: int
    removed: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    address: str | None = None

    def __str__(self) -> str:
        return f"{self.path} ({self.to}: {', '.join(f'{name} {n:,}' for name, n in self.rows.items())})"


def export_run(
    run: Run,
    to: str,
    folder: str | Path,
    *,
    tables: Sequence[str] | None = None,
    conditions: Sequence[str] | None = None,
    redact_text: bool = False,
    licence: str | None = None,
    force: bool = False,
    push: str | None = None,
    private: bool = True,
    api: Any = None,
) -> Export:
    """Write the tables of a run for others.

    Args:
        run: The run, from :func:`dynprobe.open`.
        to: ``hf`` (Parquet with a dataset card), ``arrow``, ``csv``, ``npz``, ``safetensors`` or ``zarr``; or a format
            of another package.
        folder: Where the export goes; must not be there.
        tables: Names of tables; None for all.
        conditions: Conditions by id or arm; None for all. Prompts are never filtered.
        redact_text: Take out texts, token ids and what gives them back; see ``docs/export.md``.
        licence: Identifier of the licence you give the data, such as ``cc-by-4.0``.
        force: Replace an older export.
        push: ``name/repository`` on the hub that the folder is sent to (``to="hf"`` only).
        private: Whether a repository that has to be made is private.
        api: Stands in for ``huggingface_hub.HfApi()``.

    Returns:
        What was written.

    Raises:
        UsageError: The format, a table or a condition is not known, or the folder is there already.
        RunFolderError: A part of the run is damaged, or the export cannot be written.
    """
    if to not in FORMATS:
        raise UsageError(f"--to {to}: no such format.{did_you_mean(to, FORMATS)} Formats: {', '.join(FORMATS)}")
    if push is not None and to != "hf":
        raise UsageError(f"--push sends a dataset folder; use --to hf instead of --to {to}")
    if push is not None:
        from dynprobe.runs._export_push import check_repository

        check_repository(push)
    target = Path(folder)
    _check_target(target, run.path, force)
    remarks: list[str] = []
    manifest = run.manifest
    held = list(manifest.rows())
    asked: list[str] | None = None if tables is None else list(tables)
    if redact_text:
        asked = without_positions(tables, held)
    elif not FORMATS[to].states and "states" in held:
        if tables is not None and "states" in tables:
            raise UsageError(f"--to {to} cannot hold hidden states; take npz, safetensors, zarr, arrow or hf for them")
        asked = [name for name in (tables or held) if name != "states"]
        remarks.append(f"hidden states were left out: {to} cannot hold them")
    if run.status != "complete":
        remarks.append(f"the run is {run.status}: what it had written was exported")
    gone = Redaction(_texts(run)) if redact_text else None
    leave = leaving(run.path, manifest, asked, conditions)
    leave = leave if gone is None else [gone.table(one) for one in leave]
    temporary = target.parent / f"{TEMPORARY}{os.getpid()}-{target.name}"
    with writing(target.parent, target.name):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        with writing(target.parent, target.name):
            written = [_write(to, temporary, one) for one in leave]
            said = _manifest(manifest, run, gone, asked, conditions)
            summary = run.summary if gone is None else gone.json(run.summary, "summary")
            side: dict[str, Any] = {
                "format": f"dynprobe-export/{LAYOUT}", "to": to, **_by_whom(to), "schema_version": SCHEMA_VERSION,
                "folder": run.path.resolve().name, "filters": {"tables": tables, "conditions": conditions},
                "redacted": redact_text, "removed": [] if gone is None else _removed(gone, held, leave),
                "remarks": remarks, "tables": written, "files": _checksums(temporary), "manifest": said,
                "summary": summary,
            }  # fmt: skip
            shown = Manifest.model_validate({**said, "parts": []})
            schemas = {one.name: one.schema for one in leave}
            page = export_card(plain(side), shown, schemas, licence, side["folder"])
            (temporary / SIDECAR).write_text(dumps(side, indent=1) + "\n", encoding="utf-8", errors="backslashreplace")
            (temporary / "README.md").write_text(page, encoding="utf-8", errors="replace")
            if gone is not None:
                _check_leak(gone, temporary, leave)
            _place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    rows = {table["name"]: table["rows"] for table in written}
    address = None
    if push is not None:
        from dynprobe.runs._export_push import push_folder

        address = push_folder(target, push, private, api)
    return Export(target, to, rows, size, tuple(side["removed"]), tuple(remarks), address)


def _write(to: str, folder: Path, one: Leaving) -> dict[str, Any]:
    count = 0

    def counted() -> Iterator[pa.Table]:
        nonlocal count
        for chunk in one.chunks:
            count += chunk.num_rows
            yield chunk

    files = FORMATS[to].write(folder, one.name, one.schema, counted())
    for file in files:
        if not (folder / file).resolve().is_relative_to(folder.resolve()) or not (folder / file).exists():
            raise RunFolderError(f"--to {to} is broken: it says that it wrote {file!r}, which is no file of the export")
    return {
        "name": one.name, "table": one.table, "rows": count, "files": files, "columns": describe_columns(one.schema),
    }  # fmt: skip


def _by_whom(to: str) -> dict[str, Any]:
    """The package that brought the format, which whoever reads the export needs."""
    plugin = FORMATS.plugin(to)
    return {} if plugin is None else {"plugin": plugin.fact()}


def _check_target(target: Path, run: Path, force: bool) -> None:
    inside, outside = target.resolve(), run.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise UsageError(f"{target} and the run {run} lie in each other; name a folder beside the run")
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not target.is_dir() or not (target / SIDECAR).is_file():
        raise UsageError(f"{target} is there already and is no export; name another folder")
    if not force:
        raise UsageError(f"{target} is there already; add --force to replace that export, or name another folder")


def _place(temporary: Path, target: Path) -> None:
    """Put the finished folder under its name; an older export is removed after that, and put back where it fails."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = target.parent / f"{TEMPORARY}{os.getpid()}-old-{target.name}"
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if replaced:
            old.rename(target)
        raise
    sync_folder(target.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        out[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    return out


def _manifest(
    manifest: Manifest, run: Run, gone: Redaction | None, tables: Sequence[str] | None,
    conditions: Sequence[str] | None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest without its list of files. What is not the whole run has an id of its own."""
    content: dict[str, Any] = plain(manifest.model_dump(exclude={"parts", "seal"}), "manifest")
    command = content.pop("command", None)
    content["status"] = run.status if run.status != "running" else "interrupted"
    if gone is not None:
        config = gone.json(content.pop("config"), "config")
        ours = {key: content[key] for key in ("schema_version", "id8", "status", "created", "updated")}
        rest = {key: gone.json(value, f"manifest.{key}") for key, value in content.items()}  # its keys are ours
        content = {**rest, **ours, "config": config}
        command = gone.command(command)
    content = {**scrub(content), "command": scrub_command(command)}
    whole = set(manifest.rows()) <= set(tables) if tables is not None else True
    if gone is not None or conditions is not None or not whole:
        asked = {
            "id8": manifest.id8, "tables": sorted(tables or manifest.rows()), "conditions": sorted(conditions or ()),
            "redacted": gone is not None,
        }  # fmt: skip
        content["id8"] = hashlib.sha256(dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
        content["exported_from"] = asked
    return content


def _texts(run: Run) -> set[str]:
    """Every text of the run, as far as it is stored."""
    out: set[str] = set()
    for table in ("prompts", "samples", "items"):
        parts = run.manifest.parts_of(table)
        if not parts:
            continue
        read = read_arrow(run.path, run.manifest, table)
        for name in ("text", "responses", "filtered_response"):
            if name in read.column_names and pa.types.is_string(read.schema.field(name).type):
                out |= {text for text in read[name].to_pylist() if text}
    return out


def _removed(gone: Redaction, held: Sequence[str], leave: Sequence[Leaving]) -> list[str]:
    kept = {one.table for one in leave}
    return [*(f"table {name}: left out" for name in held if name not in kept), *gone.done]


def _check_leak(gone: Redaction, folder: Path, leave: Sequence[Leaving]) -> None:
    """Read every file that was written, and refuse where a text is left in one.

    Raises:
        RunFolderError: The message names the file.
    """
    side = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    named = ("schema_version", "id8", "status", "created", "updated", "exported_from")
    ours = {key: side["manifest"].pop(key) for key in named if key in side["manifest"]}
    found = gone.leaks([*side["manifest"].values(), side["summary"], side["folder"]])
    if found or gone.leaks([ours, side["filters"], side["remarks"], side["removed"]], ours=True):
        raise _leak(SIDECAR)
    # The page is dynprobe's own words and what the sidecar says; a short text that is one of those words is no leak.
    if any(gone.holds(line, short=False) for line in (folder / "README.md").read_text(encoding="utf-8").splitlines()):
        raise _leak("README.md")
    for one, said in zip(leave, side["tables"], strict=True):
        for rows in FORMATS[side["to"]].read(folder, said["files"], one.schema):
            if gone.leaks(rows):
                raise _leak(f"table {one.name}")


def _leak(name: str) -> RunFolderError:
    return RunFolderError(
        f"{name} of this export would show a text that was to be removed; nothing was written. The name of the run, of "
        "its model or of a condition holds a piece of a prompt: rename the run folder, or leave that table out"
    )
