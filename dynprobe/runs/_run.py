"""A run that was written, for reading.

``open_run`` gives the same object for a run that is complete, interrupted or still being written. Tables are pandas
frames with categorical labels; SQL, pivots and hidden states are one call each. Nothing is read before it is asked
for, and only files that the manifest lists are read at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynprobe.errors import RunFolderError
from dynprobe.runs._advice import ask_doctor
from dynprobe.runs._json import loads
from dynprobe.runs._lock import is_held
from dynprobe.runs._manifest import Manifest, read_manifest
from dynprobe.runs._pivot import pivot_table
from dynprobe.runs._plot import Plots
from dynprobe.runs._repr import as_html, as_text
from dynprobe.runs._sql import query
from dynprobe.runs._states import decode_bfloat16, read_states
from dynprobe.runs._tables import column_facts, hash_file, part_path, read_frame

if TYPE_CHECKING:
    from dynprobe.runs._export import Export

__all__ = ["Run"]


class Run:
    """One run folder; made by :func:`open_run`.

    Attributes:
        path: The folder.
        manifest: What it says about itself.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._frames: dict[str, pd.DataFrame] = {}
        self._columns: pd.DataFrame | None = None

    @property
    def status(self) -> str:
        """``complete``, ``running``, or ``interrupted`` (also when the writer is gone without a word)."""
        status = self.manifest.status
        return "interrupted" if status == "running" and not is_held(self.path) else status

    @property
    def samples(self) -> pd.DataFrame:
        """One row per prompt, condition and replicate."""
        return self.table("samples")

    @property
    def tokens(self) -> pd.DataFrame:
        """One row per token of a sample."""
        return self.table("tokens")

    @property
    def depths(self) -> pd.DataFrame:
        """One row per token and depth of a sample."""
        return self.table("depths")

    @property
    def profiles(self) -> pd.DataFrame:
        """One row per depth of a sample: metrics of the whole set of tokens."""
        return self.table("profiles")

    @property
    def prompts(self) -> pd.DataFrame:
        """The prompts."""
        return self.table("prompts")

    @property
    def conditions(self) -> pd.DataFrame:
        """The conditions."""
        return self.table("conditions")

    @property
    def plot(self) -> Plots:
        """The pictures of the run: ``run.plot.depth()``, ``run.plot.response()``, …; print it for their names."""
        return Plots(self)

    @property
    def summary(self) -> dict[str, Any]:
        """What the run concluded; empty until it is complete."""
        try:
            content: dict[str, Any] = loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{self.path / 'summary.json'} is damaged: {error}. {ask_doctor(self.path)}"
            ) from error
        return content

    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return a table as pandas: labels categorical, a missing value NaN.

        Rows carry labels and have no order to rely on. A whole table is kept in memory after the first call.

        Args:
            name: Name of the table.
            columns: Columns to read; None for all. Naming them reads less.

        Raises:
            RunFolderError: The table or a column is unknown, or a file is missing or damaged.
        """
        if name == "states":
            raise RunFolderError("Hidden states are read with run.states(layer=…), not as a table.")
        if columns is not None:
            return read_frame(self.path, self.manifest, name, list(columns))
        if name not in self._frames:
            self._frames[name] = read_frame(self.path, self.manifest, name)
        return self._frames[name].copy(deep=False)

    def sql(self, text: str) -> pd.DataFrame:
        """Return the result of an SQL query over the tables (DuckDB; nothing is loaded beforehand).

        Args:
            text: For example ``select arm, avg(nll) from samples join conditions using (condition_id) group by arm``.
        """
        return query(self.path, self.manifest, text)

    def columns(self) -> pd.DataFrame:
        """Return what every column is: table, column, dtype, id, unit, digest, span, aggregation, description."""
        if self._columns is None:
            self._columns = column_facts(self.path, self.manifest)
        return self._columns.copy()

    def states(
        self,
        *,
        layer: int | Sequence[int] | None = None,
        depth: int | Sequence[int] | None = None,
        raw: bool = False,
        **labels: Any,
    ) -> tuple[pd.DataFrame, NDArray[Any]]:
        """Return hidden states and their labels, row by row.

        Args:
            layer: Value or values of the label ``layer``.
            depth: Value or values of the label ``depth``.
            raw: Return bfloat16 as its sixteen bits (``uint16``) instead of float32.
            **labels: Further labels: ``sample_id``, ``pos``, ``track`` …

        Returns:
            Keys ``[rows]`` and states ``[rows, …]``. The array is a view over the decoded file when the rows lie
            together in one row group, and one copy otherwise; :meth:`state_parts` never joins.

        Raises:
            RunFolderError: No states were stored, none match, or the rows have different shapes.
        """
        found = list(self.state_parts(layer=layer, depth=depth, raw=raw, **labels))
        if not found:
            raise RunFolderError(self._no_states({"layer": layer, "depth": depth, **labels}))
        shapes = {array.shape[1:] for _, array in found} | {array.dtype for _, array in found}
        if len(shapes) > 2:
            raise RunFolderError(
                f"The states that were asked for have different shapes or dtypes ({', '.join(sorted(map(str, shapes)))}"
                "). Narrow them with depth=…, layer=… or track=…."
            )
        if len(found) == 1:
            return found[0]
        keys = pd.concat([_plain(frame) for frame, _ in found], ignore_index=True)
        return keys, np.concatenate([array for _, array in found])

    def state_parts(
        self,
        *,
        layer: int | Sequence[int] | None = None,
        depth: int | Sequence[int] | None = None,
        raw: bool = False,
        **labels: Any,
    ) -> Iterator[tuple[pd.DataFrame, NDArray[Any]]]:
        """Yield hidden states row group by row group, each a view over its decoded buffer where rows lie together."""
        wanted = {k: v for k, v in {"layer": layer, "depth": depth, **labels}.items() if v is not None}
        for part in self.manifest.parts_of("states"):
            for keys, array, dtype in read_states(part_path(self.path, part), wanted):
                yield keys, decode_bfloat16(array) if dtype == "bfloat16" and not raw else array

    def pivot(
        self,
        value: str,
        index: str | Sequence[str] = "depth",
        columns: str | Sequence[str] = "condition_id",
        *,
        table: str | None = None,
        aggfunc: Any = "mean",
    ) -> pd.DataFrame:
        """Return a value by two labels; labels of samples, conditions and prompts are joined on.

        Args:
            value: Column to aggregate.
            index: Label or labels of the rows.
            columns: Label or labels of the columns.
            table: Table that holds the value, where several do.
            aggfunc: As in ``pandas.pivot_table``; missing values are skipped.
        """
        facts = self.columns()
        names = {str(name): list(group["column"]) for name, group in facts.groupby("table")}
        return pivot_table(lambda name, wanted: self.table(name, wanted), names, value, index, columns, table, aggfunc)

    def events(self) -> pd.DataFrame:
        """Return ``events.jsonl``, oldest first; a last line that a kill cut short is left out."""
        path = self.path / "events.jsonl"
        rows = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    rows.append(loads(line))
                except ValueError:
                    continue
        return pd.DataFrame(rows)

    def verify(self) -> int:
        """Compare every listed file with its checksum and return how many there are.

        Raises:
            RunFolderError: Files are missing or changed; the message names them.
        """
        bad = []
        for part in self.manifest.parts:
            try:
                if hash_file(part_path(self.path, part)) != part.sha256:
                    bad.append(f"{part.path} (changed)")
            except RunFolderError:
                bad.append(f"{part.path} (missing or cut short)")
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise RunFolderError(
                f"{len(bad)} of {len(self.manifest.parts)} files of {self.path} are not what was written: "
                f"{', '.join(bad[:5])}{more}. {ask_doctor(self.path)}"
            )
        return len(self.manifest.parts)

    def export(self, to: str, folder: str | Path, **options: Any) -> Export:
        """Write the run for others: a dataset folder (``hf``), ``arrow``, ``csv``, ``npz``, ``safetensors``, ``zarr``.

        Args:
            to: The format.
            folder: Where it goes; must not be there.
            **options: ``tables``, ``conditions``, ``redact_text``, ``licence``, ``force``, ``push``, ``private``; see
                :func:`dynprobe.runs.export_run`.
        """
        from dynprobe.runs._export import export_run

        return export_run(self, to, folder, **options)

    def report(self, out: str | Path | None = None) -> Path:
        """Write one self-contained HTML page about the run and return its path.

        Args:
            out: File to write; default ``report.html`` in the run's folder.

        Raises:
            RunFolderError: The file cannot be written.
            UsageError: Plotly or jinja2 is missing.
        """
        from dynprobe.runs._report import report

        return report(self, out=out)

    def to_xarray(self, value: str | Sequence[str] = "state", **labels: Any) -> Any:
        """Return hidden states, or columns of the depths table, on axes with names (needs xarray).

        Args:
            value: ``state``, or a column of the depths table, or several.
            **labels: What is wanted: ``depth``, ``sample_id``, ``track``, ``pos`` …

        Returns:
            ``xarray.DataArray`` with the axes ``sample_id, pos, depth`` (and ``slot, dim`` of states), or a
            ``Dataset`` of several columns; see :mod:`dynprobe.runs._xarray`.
        """
        from dynprobe.runs._xarray import on_axes

        return on_axes(self, value, labels)

    def refresh(self) -> Run:
        """Read the manifest again, as a running run grows, and forget the tables in memory."""
        self.manifest = read_manifest(self.path)
        self._frames, self._columns = {}, None
        return self

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def _no_states(self, wanted: dict[str, Any]) -> str:
        parts = self.manifest.parts_of("states")
        if not parts:
            return f"{self.path} holds no hidden states. Run again with --states to store them."
        asked = ", ".join(f"{k}={v!r}" for k, v in wanted.items() if v is not None)
        keys = pd.concat([_plain(k) for p in parts for k, _, _ in read_states(part_path(self.path, p), {})])
        have = "; ".join(f"{c}: {_span(keys[c])}" for c in keys if c in {"layer", "depth", "track"})
        return f"No hidden states with {asked}. Stored are {have}."


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with its categoricals as plain values, for joining frames of different categories."""
    return frame.astype({c: "object" for c in frame if isinstance(frame[c].dtype, pd.CategoricalDtype)})


def _span(values: pd.Series) -> str:
    found = sorted(values.dropna().unique())
    shown = [str(v) for v in found[:12]]
    return ", ".join(shown) + (" …" if len(found) > 12 else "")
