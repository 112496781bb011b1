"""Is an export format one? What it writes it reads back bit for bit, and it writes nowhere else."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from dynprobe.errors import DynprobeError
from dynprobe.runs import Format, Run, export_run, import_export
from dynprobe.runs._export_formats import FORMATS
from dynprobe.runs._tables import read_arrow
from dynprobe.testing._suite import Suite

__all__ = ["EXPORTER_CHECKS", "check_exporter"]

#: What is tried, in this order.
EXPORTER_CHECKS = ("tables", "parts", "empty", "states", "inside", "repeatable", "whole_run")

#: Bits that a careless format loses: signs of zero, payloads, ends of the range, texts that are something elsewhere.
_FLOATS = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, 1.7e308, 0.1])
_TEXTS = ["", "a", None, "=1+1", "'quoted'", "ü…\U0001f642", "two\nlines", "null"]


def _schema() -> pa.Schema:
    return pa.schema([
        pa.field("sample_id", pa.dictionary(pa.int32(), pa.string())), pa.field("text", pa.string()),
        pa.field("pos", pa.int32()), pa.field("value", pa.float64()), pa.field("small", pa.float32()),
        pa.field("flag", pa.bool_()), pa.field("ids", pa.list_(pa.int64())),
    ])  # fmt: skip


def _table(start: int = 0) -> pa.Table:
    n = len(_FLOATS)
    with np.errstate(over="ignore", under="ignore"):
        small = _FLOATS.astype(np.float32)
    labels = pa.array([f"row-{start + i % 3}" for i in range(n)]).dictionary_encode()
    columns = [
        labels, pa.array(_TEXTS), pa.array(range(start, start + n), pa.int32()),
        pa.array(_FLOATS, from_pandas=True), pa.array(small, from_pandas=True),  # what is missing is null in a run
        pa.array([True, False, None, True, False, True, None, False]),
        pa.array([[1, 2], [], None, [3], [4, 5, 6], [], [7], None], pa.list_(pa.int64())),
    ]  # fmt: skip
    return pa.Table.from_arrays(columns, schema=_schema())


def _states(start: int = 0) -> pa.Table:
    values = np.random.default_rng(start).normal(size=(6, 4)).astype(np.float32)
    values[0, :3] = [-0.0, np.inf, np.nan]
    facts = {"dynprobe.dtype": "float32", "dynprobe.shape": "[4]"}
    field = pa.field("state", pa.list_(pa.float32(), 4), metadata=facts)
    schema = pa.schema([pa.field("pos", pa.int32()), field])
    flat = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 4)
    return pa.Table.from_arrays([pa.array(range(start, start + 6), pa.int32()), flat], schema=schema)


def check_exporter(
    exporter: Format | str, run: Run | None = None, *, loses: Sequence[str] = (), only: str | None = None
) -> tuple[str, ...]:
    """Try whether an export format keeps the contract.

    ``tables`` numbers, labels, texts and lists come back bit for bit; ``parts`` also where they came in several pieces;
    ``empty`` a table without rows comes back; ``states`` hidden states come back, where the format says that it takes
    them; ``inside`` nothing is written outside the folder and under no other table's name; ``repeatable`` the same
    table gives the same files; ``whole_run`` a run comes back from ``export`` and ``import``.

    Args:
        exporter: The format, or the name of one that is installed.
        run: A run for the last check, which is left out without one.
        loses: Columns that the format is known not to keep: ``sample_id text pos value small flag ids``.
        only: One check, by name.

    Returns:
        The checks that were made.

    Raises:
        SelfTestError: If one fails; the message says which and why.

    Example:
        >>> check_exporter("arrow")
        ('tables', 'parts', 'empty', 'states', 'inside', 'repeatable')
    """
    name = exporter if isinstance(exporter, str) else "tried"
    found = FORMATS[exporter] if isinstance(exporter, str) else exporter
    with FORMATS.lent(name, found), tempfile.TemporaryDirectory() as folder:
        return _Suite(found, name, Path(folder), run, loses).run(only)


class _Suite(Suite):
    kind, checks = "export formats", EXPORTER_CHECKS

    def __init__(self, exporter: Format, name: str, folder: Path, run: Run | None, loses: Sequence[str]) -> None:
        self.exporter, self.name, self.folder, self._run, self.loses = exporter, name, folder, run, loses
        self._count = 0

    def fresh(self) -> Path:
        self._count += 1
        place = self.folder / str(self._count) / "export"
        place.mkdir(parents=True)
        return place

    def back(self, check: str, chunks: Sequence[pa.Table], schema: pa.Schema) -> list[pa.Table]:
        place = self.fresh()
        try:
            files = self.exporter.write(place, "samples", schema, iter(chunks))
            missing = [file for file in files if not (place / file).exists()]
            if missing:
                self.fail(check, f"it says that it wrote {missing[0]!r}, which is not there")
            return list(self.exporter.read(place, files, schema))
        except DynprobeError:
            raise
        except Exception as error:
            self.fail(check, f"{type(error).__name__}: {error}")

    def compare(self, check: str, wanted: pa.Table, found: Sequence[pa.Table]) -> None:
        if not found and not wanted.num_rows:
            return
        for one in (table.schema for table in found):
            if (one.names, one.types) != (wanted.schema.names, wanted.schema.types):
                self.fail(check, f"the columns that come back are {one.names} of {one.types}")
        whole = pa.concat_tables(found).unify_dictionaries() if found else wanted.slice(0, 0)
        if whole.num_rows != wanted.num_rows:
            self.fail(check, f"{whole.num_rows} rows come back of {wanted.num_rows}")
        for field in wanted.schema:
            if field.name not in self.loses and not _equal(wanted[field.name], whole[field.name]):
                self.fail(check, f"the column {field.name!r} ({field.type}) is not what was written")

    # The checks

    def tables(self) -> None:
        self.compare("tables", _table(), self.back("tables", [_table()], _schema()))

    def parts(self) -> None:
        chunks = [_table(), _table(3), _table(100)]
        self.compare("parts", pa.concat_tables(chunks).unify_dictionaries(), self.back("parts", chunks, _schema()))

    def empty(self) -> None:
        self.compare("empty", _schema().empty_table(), self.back("empty", [], _schema()))

    def states(self) -> bool:
        if self.exporter.states:
            chunks = [_states(), _states(6)]
            self.compare("states", pa.concat_tables(chunks), self.back("states", chunks, chunks[0].schema))
        return self.exporter.states

    def inside(self) -> None:
        place = self.fresh()
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir()
        with _inside(elsewhere):
            files = self.exporter.write(place, "samples", _schema(), iter([_table()]))
            first = {path.relative_to(place) for path in place.rglob("*") if path.is_file()}
            self.exporter.write(place, "tokens", _schema(), iter([_table(50)]))
            outside = [*elsewhere.rglob("*"), *(path for path in place.parent.iterdir() if path != place)]
        if outside:
            self.fail("inside", f"it wrote {outside[0].name!r} outside of its folder")
        if any(not (place / file).resolve().is_relative_to(place.resolve()) for file in files):
            self.fail("inside", f"it names a file that leads out of its folder: {files}")
        if not first <= {path.relative_to(place) for path in place.rglob("*") if path.is_file()}:
            self.fail("inside", "the second table took away a file of the first")
        self.compare("inside", _table(), list(self.exporter.read(place, files, _schema())))

    def repeatable(self) -> None:
        contents = []
        for _ in range(2):
            place = self.fresh()
            self.exporter.write(place, "samples", _schema(), iter([_table()]))
            files = sorted(path for path in place.rglob("*") if path.is_file())
            contents.append({str(path.relative_to(place)): path.read_bytes() for path in files})
        if contents[0] != contents[1]:
            self.fail("repeatable", "the same table gives other files the second time")

    def whole_run(self) -> bool:
        run = self._run
        if run is None or self.loses:
            return False
        folder = self.folder / "run"
        export_run(run, self.name, folder / "export")
        back = import_export(folder / "export", folder / "runs")
        for name in run.manifest.rows():
            if name == "states":
                continue
            wanted, found = (read_arrow(one.path, one.manifest, name) for one in (run, back))
            for column in wanted.column_names:
                if not _equal(wanted[column], found[column]):
                    self.fail("whole_run", f"the column {column!r} of {name} is not what was exported")
        return True


def _equal(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    """Bit for bit, where labels count by what they say."""
    if pa.types.is_dictionary(a.type):
        a, b = a.cast(pa.string()), b.cast(pa.string())
    if pa.types.is_fixed_size_list(a.type):
        a, b = (pa.chunked_array([c.flatten() for c in x.chunks]) for x in (a, b))
    if not pa.types.is_floating(a.type):
        return bool(a.equals(b))
    x, y = (array.to_numpy(zero_copy_only=False) for array in (a.combine_chunks(), b.combine_chunks()))
    return a.null_count == b.null_count and x.tobytes() == y.tobytes()


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
