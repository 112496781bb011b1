"""A panel at work: its folder, the record of its cells, and the models that are loaded one after another.

``panel.json`` is written before the first cell and replaced after every one, under the lock of the folder. What a cell
is was settled before (:mod:`._panel_cells`); here stand the order of things and what happens when one fails.
"""

from __future__ import annotations

import datetime as dt
import errno
import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from dynprobe import __version__
from dynprobe._plugins import deciding
from dynprobe.engines import Engine
from dynprobe.errors import DynprobeError, InterruptedRunError, RunFolderError, UsageError
from dynprobe.probes import load as load_subject
from dynprobe.prompts import content_hash
from dynprobe.protocols._execute import Listener, Progress
from dynprobe.protocols._iterate import iterate
from dynprobe.protocols._model_skeleton import skeleton_of
from dynprobe.protocols._panel_cells import Cell, cells_of, prompts_of
from dynprobe.protocols._panel_config import PanelConfig, PanelModelEntry, check_settings
from dynprobe.protocols._panel_standing import fault_of, mend
from dynprobe.protocols._panel_tables import write_tables
from dynprobe.protocols._plugins_used import adapter_used, changed, installed, warn_if_changed
from dynprobe.protocols._prepare import Held
from dynprobe.protocols._run import run
from dynprobe.runs import identity
from dynprobe.runs._atomic import sync_folder, write_bytes, writing
from dynprobe.runs._json import dumps
from dynprobe.runs._lock import FolderLock
from dynprobe.runs._manifest import PluginFact
from dynprobe.runs._panel_folder import PANEL_NAME, PANEL_SCHEMA, Panel, open_panel

__all__ = ["PanelWork", "as_model", "cells_by_key", "release"]


class PanelWork:
    """A panel at work: its design, its folder and the record of its cells."""

    def __init__(self, config: PanelConfig, folder: Path | None, tell: Listener, engine: Engine | None = None) -> None:
        check_settings(config)
        self.config, self.tell, self.engine = config, tell, engine
        self.prompts = prompts_of(config)
        self.cells, self.copies = cells_of(config)
        self.ident = identity(
            {**config.identity(), "protocol": f"panel-{config.protocol}"}, [content_hash(self.prompts)], "panel"
        )
        out = Path(config.out)
        self.folder = folder or (out if (out / PANEL_NAME).is_file() else _find(out, self.ident))
        if self.folder is not None and open_panel(self.folder).manifest["id8"] != self.ident:
            raise RunFolderError(
                f"{self.folder} holds another panel (id {open_panel(self.folder).manifest['id8']}; what was asked has "
                f"the id {self.ident}). Choose another folder with --out FOLDER."
            )
        self.record: dict[str, Any] = {}

    def found(self) -> dict[str, Any]:
        """What lies there already."""
        return {} if self.folder is None else open_panel(self.folder).manifest

    def done(self) -> Panel | None:
        """The panel where it is finished, with every run and table in place."""
        if self.folder is None:
            return None
        there = open_panel(self.folder)
        whole = there.status == "complete" and there.summary and "variance" in there.tables
        if not whole or not all(self._stands(cell) for cell in there.manifest["cells"]):
            return None
        self.tell(Progress("done", notes=(f"already done: {there.path}",)))
        then = _recorded(there.path, there.manifest)
        warn_if_changed(there.path, then, installed(then))
        return there

    def carry_out(self) -> Panel:
        """Run the cells that are left, then the tables."""
        folder = self._begin()
        lock = FolderLock(folder)
        with writing(folder, "the lock file"):
            lock.acquire()
        try:
            self._load_record(folder)
            with ExitStack() as stack:
                if self.engine is None and not self.config.in_process:  # one crew for all cells
                    self.engine = stack.enter_context(self.config.make_engine(self.config.out))
                for entry in self.config.models:
                    self._model(folder, entry)
            self._finish(folder)
        except (KeyboardInterrupt, InterruptedRunError) as stop:
            self._save(folder, status="interrupted")
            raise InterruptedRunError(f"interrupted; the same command continues {folder}") from stop
        finally:
            lock.release()
        return open_panel(folder)

    def _begin(self) -> Path:
        """The folder, made where it is not there yet."""
        if self.folder is None:
            out = Path(self.config.out)
            if out.is_file():
                raise RunFolderError(f"--out {out} is a file; name a folder")
            self.folder = out / f"{_now():%Y-%m-%dT%H-%M-%S}_panel_{self.ident}"
            with writing(out, "the folder of the panel"):
                (self.folder / "runs").mkdir(parents=True)
            entries = [entry.model_dump(mode="json") for entry in self.config.models]
            self.record = {
                "schema_version": PANEL_SCHEMA, "id8": self.ident, "status": "running", "created": _stamp(),
                "versions": {"dynprobe": __version__, "torch": torch.__version__},
                "command": ["dynprobe", *sys.argv[1:]] if Path(sys.argv[0]).name == "dynprobe" else None,
                "config": self.config.model_dump(mode="json"), "copies_left_out": self.copies,
                "prompts": {
                    "n": len(self.prompts), "hash": content_hash(self.prompts),
                    "categories": sorted({str(p.category) for p in self.prompts}),
                },
                "models": [{**entry, "name": m.name} for entry, m in zip(entries, self.config.models, strict=True)],
                "cells": [
                    {"key": c.key, **vars(c), "state": "planned", "run": None, "id8": None, "manifest_sha256": None,
                     "seconds": None, "error": None}
                    for c in self.cells
                ],
            }  # fmt: skip
            self._save(self.folder)
        return self.folder

    def _load_record(self, folder: Path) -> None:
        self.record = open_panel(folder).manifest
        began = self.record["versions"].get("dynprobe")
        if began != __version__ and not self.config.force:
            raise RunFolderError(
                f"{folder} was begun by dynprobe {began}, and this is {__version__}: its numbers may differ. Add "
                "--force to continue all the same, or choose another folder with --out FOLDER."
            )
        then = _recorded(folder, self.record)
        how = changed(then, installed(then))
        if how and not self.config.force:
            raise RunFolderError(
                f"{folder} was begun {how}: its numbers may differ. Add --force to continue all the same, or choose "
                "another folder with --out FOLDER."
            )
        for cell in self.record["cells"]:
            why = fault_of(folder, cell) if cell["state"] == "done" else None
            if why:
                self.tell(Progress("again", notes=(f"run again: {why}",)))
            if why or cell["state"] != "done":
                cell |= {"state": "planned", "error": None}
        self._save(folder, status="running")

    def _stands(self, cell: Mapping[str, Any]) -> bool:
        """Whether the run of a cell is there as it was when the cell was done."""
        return cell["state"] == "done" and self.folder is not None and fault_of(self.folder, cell) is None

    def load(self, entry: PanelModelEntry) -> Held:
        """Load a model of the design with the settings that all its runs share."""
        keys = ("dtype", "device", "device_map", "quantization", "trust_remote_code", "allow_bin")
        asked = {key: self.config.settings[key] for key in keys if key in self.config.settings}
        return Held(entry.model, load_subject(entry.model, revision=entry.revision, **{"dtype": "float32", **asked}))

    def _model(self, folder: Path, entry: PanelModelEntry) -> None:
        """Run the cells of one model that are left; it is in memory no longer than this call."""
        records = cells_by_key(self.record)
        own = [cell for cell in self.cells if cell.model == entry.name and records[cell.key]["state"] != "done"]
        if not own:
            return
        self.tell(Progress(f"loading {entry.name}", len(self.cells) - len(own), len(self.cells)))
        held: Held | None = None
        try:
            held = self.load(entry)
            self._describe(entry, held)
        except Exception as error:
            _refuse_to_go_on(error)
            for cell in own:
                records[cell.key] |= {"state": "failed", "error": _said(error)}
            self._save(folder)
        else:
            for cell in own:
                self._cell(folder, cell, held, entry, records[cell.key])
        finally:
            del held
            release()

    def _describe(self, entry: PanelModelEntry, held: Held) -> None:
        """Record what the model is; other weights than before are refused."""
        facts = held.subject.facts
        row = next(row for row in self.record["models"] if row["name"] == entry.name)
        weights = facts.get("weights_hash")
        begun = any(c["model"] == entry.name and c["state"] == "done" for c in self.record["cells"])
        if begun and row.get("weights") not in (None, weights):
            raise UsageError(
                f"{entry.name} has other weights than when its first cells were run ({weights} against "
                f"{row['weights']}); take another folder with --out FOLDER, or the weights of then"
            )
        adapter = adapter_used(held.subject).get("adapter")
        if begun and adapter != row.get("adapter") and not self.config.force:
            raise UsageError(
                f"{entry.name} is read by another adapter than when its first cells were run ({adapter or 'none'} "
                f"against {row.get('adapter') or 'none'}); take another folder with --out FOLDER, or add --force"
            )
        skeleton = {**skeleton_of(held.subject), **entry.covariates}
        family = entry.family or facts.get("model_type") or type(held.subject.model).__name__
        row |= {
            "weights": weights,
            "family": str(family),
            "skeleton": skeleton,
            "parameters": facts.get("n_parameters"),
            **({} if adapter is None else {"adapter": adapter}),
        }

    def _cell(self, folder: Path, cell: Cell, held: Held, entry: PanelModelEntry, record: dict[str, Any]) -> None:
        done = sum(c["state"] != "planned" for c in self.record["cells"])
        self.tell(Progress(f"{done + 1} of {len(self.cells)} · {_in_words(cell)}", done, len(self.cells)))
        asked = {**cell.settings(self.config), "out": str(folder / "runs"), "force": self.config.force}
        # Without an engine the model that is held does the work, also where there are more GPUs than one.
        asked |= {"workers": 1} if self.engine is None else {"engine": self.engine}
        begun = time.perf_counter()
        protocol: Callable[..., Any] = iterate if self.config.protocol == "iterate" else run
        try:
            mended = mend(folder, record)
            if mended:
                record["mended"] = [*record.get("mended", ()), *mended]
                self.tell(Progress("again", notes=(f"mended {record['run']}: {'; '.join(mended)}",)))
            found = protocol(as_model(held), self.prompts, revision=entry.revision, **asked)
        except Exception as error:
            if isinstance(error, InterruptedRunError):
                raise
            _refuse_to_go_on(error)
            record |= {"state": "failed", "error": _said(error)}
        else:
            known = [*self.record.get("plugins", ()), *deciding(found.manifest.plugins or ())]
            if known:  # by name: with force a later version takes the place of an earlier one
                self.record["plugins"] = list({(p["group"], p["name"]): dict(p) for p in known}.values())
            manifest = found.path / "manifest.json"
            record |= {
                "state": "done", "run": f"runs/{found.path.name}", "id8": found.manifest.id8, "error": None,
                "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
                "seconds": round(time.perf_counter() - begun, 3),
            }  # fmt: skip
        self._save(folder)

    def _finish(self, folder: Path) -> None:
        self.tell(Progress("tables", len(self.cells), len(self.cells)))
        failed = sum(cell["state"] == "failed" for cell in self.record["cells"])
        there = Panel(folder, self.record)
        summary = write_tables(there, self.config)
        write_bytes(folder / "summary.json", (dumps(summary, indent=1) + "\n").encode())
        write_bytes(folder / "README.md", _card(there, summary).encode())
        self._save(folder, status="partial" if failed else "complete")
        notes = (f"{failed} of {len(self.cells)} cells failed",) if failed else ()
        self.tell(Progress("done", len(self.cells), len(self.cells), notes=notes))

    def _save(self, folder: Path, **fields: Any) -> None:
        self.record |= {**fields, "updated": _stamp()}
        with writing(folder, PANEL_NAME):
            write_bytes(folder / PANEL_NAME, (dumps(self.record, indent=1) + "\n").encode())
            sync_folder(folder)


def _recorded(folder: Path, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The plug-ins that decided numbers of a panel's cells."""
    try:
        return TypeAdapter(list[PluginFact]).validate_python(record.get("plugins", []))
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"]
        raise RunFolderError(f"{folder / PANEL_NAME} is damaged: plugins: {said}. Restore it from a copy.") from error


def cells_by_key(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the record of every cell by its name."""
    return {str(cell["key"]): cell for cell in record.get("cells", ())}


def release() -> None:
    """Give the memory of a model back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_model(held: Held) -> Any:
    """What the protocols take beside their public types."""
    return held


def _find(out: Path, ident: str) -> Path | None:
    """The panel of this identity under a folder: a complete one first, else the newest."""
    found = []
    for file in sorted(out.glob(f"*/{PANEL_NAME}")) if out.is_dir() else ():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # damaged: no panel that could be continued
            continue
        if isinstance(content, dict) and content.get("id8") == ident:
            found.append((content.get("status") == "complete", str(content.get("created")), file.parent))
    return max(found)[2] if found else None


def _refuse_to_go_on(error: Exception) -> None:
    """A full disk fails every cell that follows: stop there."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise error
        cause = cause.__cause__


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, DynprobeError) else f"{type(error).__name__}: {error}"


def _in_words(cell: Cell) -> str:
    return f"{cell.model} · seed {cell.seed} · T {cell.temperature:g} · {cell.max_new_tokens} tokens · α {cell.alpha:g}"


def _now() -> dt.datetime:
    return dt.datetime.now().astimezone()


def _stamp() -> str:
    return _now().isoformat(timespec="seconds")


def _card(found: Panel, summary: Mapping[str, Any]) -> str:
    cells = found.cells["state"].value_counts()
    lines = [
        f"# Panel {found.manifest['id8']}", "",
        f"{len(found.manifest['models'])} models, {found.manifest['prompts']['n']} prompts, "
        + ", ".join(f"{n} cells {state}" for state, n in cells.items()) + ".", "",
        "```python", "from dynprobe.runs import open_panel", f"panel = open_panel({found.path.name!r})",
        'panel.table("variance")', "```", "", "Continue it with: `dynprobe panel FOLDER`.", "",
    ]  # fmt: skip
    lines += [f"- {text}" for text in summary.get("warnings", ())]
    return "\n".join(lines) + "\n"
