"""The writer of a run folder.

A run is written in batches, the units of work that were planned once. All tables of a batch are packed in memory, put
in place under temporary names, synced and renamed; only then does the manifest, replaced in the same way, list them.
A kill at any moment therefore loses at most the batch at hand, and a reader never sees half of one. States, which are
too large to pack in memory, are streamed to disk before their batch and become visible with it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from dynprobe._command_line import COMMAND_LINE
from dynprobe.errors import RunFolderError
from dynprobe.runs._atomic import remove, sync_folder, write_bytes, write_stream, writing
from dynprobe.runs._card import card
from dynprobe.runs._encode import conform, to_bytes
from dynprobe.runs._json import dumps, plain
from dynprobe.runs._manifest import Manifest, Part, validated
from dynprobe.runs._open import OpenFolder
from dynprobe.runs._pack import facts_in, n_rows, table_of
from dynprobe.runs._schema import table_schema
from dynprobe.runs._secrets import scrub
from dynprobe.runs._start import RESERVED, Clock, now, start
from dynprobe.runs._states import states_table, write_states_file

__all__ = ["RunWriter"]


class RunWriter:
    """Writes one run folder; made by :meth:`begin`, used as a context manager or closed by ``finish``/``interrupt``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     writer = RunWriter.begin(out, model_name="tiny", config={"alpha": 0.1}, ident="0123abcd")
        ...     writer.write_batch(0, {"tokens": {"sample_id": ["a"], "pos": [0], "nll": [2.5]}})
        ...     writer.finish({"samples": 1})
        ...     writer.status, writer.finished
        ('complete', {0})
    """

    def __init__(self, folder: OpenFolder, columns: Mapping[str, Mapping[str, str]]) -> None:
        self._open, self._columns = folder, columns
        self._pending: dict[int, list[Part]] = {}
        self._guard = threading.RLock()

    @classmethod
    def begin(
        cls,
        out: str | Path = "runs",
        *,
        model_name: str,
        config: Mapping[str, Any],
        ident: str,
        prompts_hash: str | None = None,
        manifest_fields: Mapping[str, Any] | None = None,
        columns: Mapping[str, Mapping[str, str]] | None = None,
        force: bool = False,
        clock: Clock = now,
    ) -> RunWriter:
        """Begin a run, continue an interrupted one, or find it finished (then ``status`` is ``"complete"``).

        Args:
            out: A run folder, or a parent: there the run with this identity is continued, else a folder
                ``<time>_<model>_<id8>`` is made.
            model_name: Name of the model, as given by the user.
            config: Resolved configuration; secrets are not stored.
            ident: The identity, from :func:`dynprobe.runs.identity`.
            prompts_hash: From :func:`dynprobe.runs.hash_prompts`.
            manifest_fields: Further fields of :class:`dynprobe.runs.Manifest`, known or not. When a run is continued
                they fill only what was not recorded before.
            columns: Facts of the metric columns: name, or ``table.name``, → ``id, unit, digest, span, aggregation,
                description`` and optionally ``dtype`` (``float64``); see :func:`dynprobe.runs.registry_facts`.
            force: Continue a run that another version of the library began.
            clock: Returns the time.

        Raises:
            RunFolderError: ``out`` holds another run, is in use, damaged, or cannot be written.
        """
        typed = COMMAND_LINE.get()
        fields = {**({"command": list(typed)} if typed else {}), **(manifest_fields or {})}
        fields["config"] = scrub(plain(config, "config"))
        if prompts_hash is not None:
            fields["prompts_hash"] = prompts_hash
        folder, manifest, lock = start(Path(out), ident, model_name, plain(fields, "manifest"), force, clock)
        writer = cls(OpenFolder(folder, manifest, lock, clock), columns or {})
        if lock is None:
            return writer
        try:
            continued = bool(manifest.continuations)
            if continued:
                writer._open.commit(manifest)
            writer.event("continue" if continued else "begin", finished=len(manifest.finished))
        except BaseException:
            writer.close()
            raise
        return writer

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._open.path

    @property
    def manifest(self) -> Manifest:
        """What the manifest on disk says."""
        return self._open.manifest

    @property
    def status(self) -> str:
        """``running``, ``complete`` or ``interrupted``."""
        return self.manifest.status

    @property
    def finished(self) -> set[int]:
        """Numbers of the batches that need not be done again."""
        return set(self.manifest.finished)

    def write_table(self, name: str, data: Any) -> None:
        """Write a whole table (``prompts``, ``conditions``, ``fits``); the same content again costs nothing.

        Args:
            name: Name of the table.
            data: ``pandas.DataFrame``, ``pyarrow.Table`` or mapping of columns.

        Raises:
            RunFolderError: A key is missing or doubled, or the file cannot be written.
        """
        path = f"{name}/whole.parquet" if table_schema(name).sharded else f"{name}.parquet"
        table = conform(name, data, self._columns)
        with writing(self.folder, path):
            packed = to_bytes(table)
        with self._guard:
            self._open.require()
            listed = next((part for part in self.manifest.parts if part.path == path), None)
            if listed is not None:
                if listed.sha256 == hashlib.sha256(packed).hexdigest() and (self.folder / path).exists():
                    return
                # Between the rename and the new manifest the old checksum would be wrong: unlist the file first.
                others = [part for part in self.manifest.parts if part.path != path]
                self._open.commit(self._open.changed(parts=others))
            part = self._open.place(name, path, table.num_rows, packed, None)
            with writing(self.folder, path, len(packed)):
                sync_folder((self.folder / path).parent)
            self._open.commit(self._open.changed(parts=[*self.manifest.parts, part]))

    def write_batch(self, number: int, tables: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> None:
        """Write all tables of one batch and call it finished.

        Args:
            number: Number of the batch in the plan.
            tables: Table name → frame. A table without rows is left out.
            facts: What the batch says about itself; stored in the manifest under ``batch_facts``.

        Raises:
            RunFolderError: The batch is finished already, a key is missing, or the files cannot be written; then
                nothing of the batch is visible.
        """
        packed = []
        for name, data in tables.items():
            if not table_schema(name).sharded or name == "states":
                other = "write_states" if name == "states" else "write_table"
                raise RunFolderError(f"Table {name!r} is not written in batches; use {other}.")
            table = conform(name, data, self._columns)
            if table.num_rows:
                with writing(self.folder, name):
                    packed.append((name, table.num_rows, to_bytes(table)))
        self._finish_batch(number, packed, facts)

    def write_files(self, number: int, files: Mapping[str, bytes]) -> dict[str, int]:
        """Write a batch that was packed elsewhere (:func:`dynprobe.runs.pack`) and call it finished.

        Args:
            number: Number of the batch in the plan.
            files: What it was packed into.

        Returns:
            Rows of each table.

        Raises:
            RunFolderError: The batch is finished already, a file is none of a batch, or it cannot be written.
        """
        tables = {name: table_of(name) for name in files}
        rows = {name: n_rows(files[name]) for name, table in tables.items() if table is not None}
        with self._guard:
            self._open.require()
            packed = []
            for name, table in tables.items():
                if table == "states":
                    content = files[name]
                    self._stream_states(number, rows[name], len(content), partial(Path.write_bytes, data=content))
                elif table is not None:
                    if not table_schema(table).sharded:
                        raise RunFolderError(f"Table {table!r} is not written in batches.")
                    packed.append((table, rows[name], memoryview(files[name])))
            self._finish_batch(number, packed, facts_in(files))
        counts: dict[str, int] = {}
        for name, number_of_rows in rows.items():
            counts[str(tables[name])] = counts.get(str(tables[name]), 0) + number_of_rows
        return counts

    def _finish_batch(
        self, number: int, packed: Sequence[tuple[str, int, memoryview]], facts: Mapping[str, Any] | None
    ) -> None:
        """Put packed tables in place and list them, with the states that were streamed before."""
        with self._guard:
            self._open.require()
            if number in self.manifest.finished:
                raise RunFolderError(f"Batch {number} of {self.folder} is finished already; skip writer.finished.")
            placed: list[Part] = []
            needed = sum(len(data) for _, _, data in packed)
            try:
                for name, rows, data in packed:
                    path = f"{name}/part-{number:05d}.parquet"
                    placed.append(self._open.place(name, path, rows, data, number))
                states = self._pending.get(number, [])
                with writing(self.folder, f"batch {number}", needed):
                    for folder in sorted({(self.folder / part.path).parent for part in (*placed, *states)}):
                        sync_folder(folder)
                new = self._open.changed(
                    parts=[*self.manifest.parts, *placed, *states], finished=sorted({*self.manifest.finished, number})
                )
                if facts:
                    stored = plain(facts, f"facts of batch {number}")
                    new = new.model_copy(update={"batch_facts": {**new.batch_facts, str(number): stored}})
                self._open.commit(new)
            except BaseException:
                if number not in self.manifest.finished:
                    for part in placed:
                        remove(self.folder / part.path)
                raise
            self._pending.pop(number, None)

    def write_states(self, number: int, keys: Any, states: Any, dtype: str, *, compression: str = "none") -> None:
        """Stream hidden states of a batch to disk; they become visible when ``write_batch(number, …)`` follows.

        Args:
            number: Number of the batch.
            keys: Frame with ``sample_id, pos, track, depth`` and any further label, one row per state.
            states: Tensor or array ``[rows, …]``; for bfloat16 a tensor, or its bits as ``uint16``.
            dtype: ``float16``, ``bfloat16``, ``float32`` or ``float64``.
            compression: ``none`` (read without a copy) or ``lz4``.

        Raises:
            RunFolderError: Rows or dtypes do not agree, the batch is finished, or the file cannot be written.
        """
        if compression not in {"none", "lz4"}:
            raise RunFolderError(f"States can be stored with compression 'none' or 'lz4', not {compression!r}.")
        table = states_table(keys, states, dtype, self._columns)
        self._stream_states(
            number, table.num_rows, table.nbytes, lambda target: write_states_file(target, table, compression)
        )

    def _stream_states(self, number: int, rows: int, size: int, produce: Callable[[Path], Any]) -> None:
        with self._guard:
            self._open.require()
            if number in self.manifest.finished:
                raise RunFolderError(f"Batch {number} is finished; its states must be written before write_batch.")
            path = f"states/part-{number:05d}-{len(self._pending.get(number, [])):02d}.parquet"
            with writing(self.folder, path, size):
                (self.folder / "states").mkdir(exist_ok=True)
                written = write_stream(self.folder / path, produce)
            part = Part(path=path, table="states", batch=number, rows=rows, **vars(written))
            self._pending.setdefault(number, []).append(part)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to ``events.jsonl``: time, kind, and the fields (secrets scrubbed)."""
        line = dumps(scrub(plain({"time": self._open.time("milliseconds"), "kind": kind, **fields}, "event")))
        with self._guard:
            self._open.require()
            self._open.append("events.jsonl", line)

    def update(self, **manifest_fields: Any) -> None:
        """Set fields of the manifest, known or not.

        Raises:
            RunFolderError: A field belongs to the writer alone, or has the wrong type.
        """
        reserved = sorted(RESERVED.intersection(manifest_fields))
        if reserved:
            raise RunFolderError(f"The manifest field {reserved[0]!r} is set by the writer alone.")
        with self._guard:
            self._open.require()
            content = self.manifest.model_dump() | plain(manifest_fields, "manifest") | {"updated": self._open.time()}
            self._open.commit(validated(content, "the manifest", "Pass the field in that form."))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` and ``README.md``, call the run complete, and release the folder.

        Raises:
            RunFolderError: Batches of the plan, or states without their batch, are still missing.
        """
        with self._guard:
            self._open.require()
            plan = self.manifest.batch_plan
            if isinstance(plan, list) and len(self.manifest.finished) < len(plan):
                raise RunFolderError(
                    f"{self.folder} cannot be called complete: {len(self.manifest.finished)} of {len(plan)} batches "
                    "are finished."
                )
            if self._pending:
                raise RunFolderError(f"States of batch {min(self._pending)} were written, but never its batch.")
            final = self._open.changed(status="complete")
            text = dumps(scrub(plain(summary, "summary")), indent=1) + "\n"
            with writing(self.folder, "summary.json", len(text)):
                write_bytes(self.folder / "summary.json", text.encode("utf-8", "backslashreplace"))
                write_bytes(self.folder / "README.md", card(self.folder, final).encode("utf-8", "replace"))
            self.event("finish")
            self._open.commit(final)
            self.close()

    def interrupt(self, reason: str) -> None:
        """Record that the run stops here, and release the folder; the same command continues it."""
        with self._guard:
            self._open.require()
            note = {"time": self._open.time(), "reason": reason}
            try:
                self.event("interrupt", reason=reason)
                self._open.commit(
                    self._open.changed(status="interrupted", interruptions=[*self.manifest.interruptions, note])
                )
            finally:
                self.close()

    def close(self) -> None:
        """Release the folder; a run that is not complete can be continued."""
        self._open.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open.is_open:
            return
        try:
            self.interrupt("left without finish" if error is None else f"{type(error).__name__}: {error}")
        except RunFolderError as second:
            if error is None:
                raise
            error.add_note(f"The interruption could not be recorded either: {second}")

    def __repr__(self) -> str:
        return f"RunWriter({str(self.folder)!r}, {self.status}, {len(self.manifest.finished)} batches finished)"
