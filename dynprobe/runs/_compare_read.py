"""What a comparison reads: one number per prompt, and one profile per prompt, straight from the Parquet files.

DuckDB groups the rows where they lie, so a table never stands in memory whole. Averages go from the inside out: tokens
of a sample, then samples of a prompt, so that a long replicate counts no more than a short one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError
from dynprobe.runs._advice import ask_doctor
from dynprobe.runs._compare_sides import Side
from dynprobe.runs._sql import connect, create_views

__all__ = ["Profile", "Reader", "only_ok"]

#: Prefix of the views of each run.
_PREFIX = "r{}_"


@dataclass(frozen=True)
class Profile:
    """Profiles of one condition of one run.

    Attributes:
        depths: The depths [depth].
        values: Column → values [prompt, depth], NaN where there is none.
    """

    depths: np.ndarray
    values: dict[str, np.ndarray]


class Reader:
    """Reads the tables of all runs of a comparison; close it after use.

    Args:
        sides: The runs.
    """

    def __init__(self, sides: Sequence[Side]) -> None:
        self._connection = connect("dynprobe compare")
        self._connection.execute("set memory_limit = '600MB'; set preserve_insertion_order = false")
        for side in sides:
            create_views(self._connection, side.run.path, side.run.manifest, _PREFIX.format(side.number))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def samples(
        self, side: Side, conditions: Sequence[str], columns: Iterable[str], prompts: pd.DataFrame
    ) -> dict[str, pd.DataFrame]:
        """Return the mean over the samples of each prompt, by condition: one row per text of ``prompts``.

        The column ``n_rows`` counts the samples.
        """
        names = list(dict.fromkeys(columns))
        means = "".join(f", avg({_name(c)}) as {_name(c)}" for c in names)
        text = (
            f"select prompt_id::varchar as prompt_id, condition_id::varchar as condition_id, count(*) as n_rows{means} "
            f"from {self._view(side, 'samples')} where condition_id in ({_marks(conditions)}){self._ok(side)} "
            "group by prompt_id, condition_id"
        )
        read = self._run(side, text, list(conditions))
        out = {}
        for condition in conditions:
            frame = read[read["condition_id"] == condition].set_index("prompt_id")[["n_rows", *names]]
            frame = frame.reindex(list(prompts["prompt_id"]))
            frame["n_rows"] = frame["n_rows"].fillna(0).astype(int)
            frame.index = pd.Index(list(prompts["cluster"]), name="cluster")
            if not frame.index.is_unique:
                groups = frame.groupby(level=0, sort=False)
                frame = groups[names].mean().assign(n_rows=groups["n_rows"].sum())
            out[condition] = frame
        return out

    def profiles(
        self,
        side: Side,
        conditions: Sequence[str],
        columns: dict[str, str],
        prompts: pd.DataFrame,
        track: str,
        sink: int,
    ) -> dict[str, Profile]:
        """Return profiles along depth, by condition.

        Args:
            side: The run.
            conditions: Its conditions.
            columns: Column → table that holds it: ``profiles`` or ``depths``.
            prompts: The shared prompts; those of one text become one profile.
            track: The track.
            sink: First positions that stay out of means over ``depths``.
        """
        frames = []
        for table in ("profiles", "depths"):
            names = [c for c, home in columns.items() if home == table]
            if names:
                frames.append(self._profile(side, conditions, table, names, track, sink))
        keys = ["prompt_id", "condition_id", "depth"]
        frame = frames[0] if len(frames) == 1 else pd.merge(frames[0], frames[1], on=keys, how="outer")
        texts = list(dict.fromkeys(prompts["cluster"]))
        place = {text: i for i, text in enumerate(texts)}
        cluster = np.array([place[text] for text in prompts["cluster"]], dtype=np.int64)
        row = pd.Index(list(prompts["prompt_id"])).get_indexer(frame["prompt_id"].astype(object))
        condition = frame["condition_id"].to_numpy(dtype=object)
        out = {}
        for wanted in conditions:
            own = (row >= 0) & (condition == wanted)
            depths = np.sort(frame["depth"].to_numpy()[own])
            depths = np.unique(depths).astype(np.int64)
            at = np.searchsorted(depths, frame["depth"].to_numpy()[own])
            cell, size = cluster[row[own]] * len(depths) + at, len(texts) * len(depths)
            values = {}
            for name in columns:
                found = frame[name].to_numpy(np.float64, na_value=np.nan)[own]
                good = np.isfinite(found)
                count = np.bincount(cell[good], minlength=size)
                total = np.bincount(cell[good], weights=found[good], minlength=size)
                means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
                values[name] = means.reshape(len(texts), len(depths))
            out[wanted] = Profile(depths, values)
        return out

    def tracks(self, side: Side, table: str) -> list[str]:
        """Return the tracks of a run."""
        return sorted(str(t) for t in self._run(side, f"select distinct track from {self._view(side, table)}")["track"])

    def _profile(
        self, side: Side, conditions: Sequence[str], table: str, names: list[str], track: str, sink: int
    ) -> pd.DataFrame:
        samples = self._view(side, "samples")
        chosen = f"select sample_id from {samples} where condition_id in ({_marks(conditions)}){self._ok(side)}"
        means = "".join(f", avg({_name(c)}) as {_name(c)}" for c in names)
        outer = "".join(f", avg(d.{_name(c)}) as {_name(c)}" for c in names)
        where = f"track = ? and sample_id in ({chosen})" + (f" and pos >= {int(sink)}" if table == "depths" else "")
        inner = f"select sample_id, depth{means} from {self._view(side, table)} where {where} group by sample_id, depth"
        text = (
            "select s.prompt_id::varchar as prompt_id, s.condition_id::varchar as condition_id, d.depth as depth"
            f"{outer} from ({inner}) d join {samples} s using (sample_id) group by s.prompt_id, s.condition_id, d.depth"
        )
        return self._run(side, text, [track, *conditions])

    def _run(self, side: Side, text: str, values: list[Any] | None = None) -> pd.DataFrame:
        import duckdb

        try:
            found: pd.DataFrame = self._connection.execute(text, values or []).df()
        except (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException):  # a defect of this code
            raise
        except duckdb.Error as error:
            raise RunFolderError(f"{side.run.path} cannot be read: {error}. {ask_doctor(side.run.path)}") from error
        return found

    def _view(self, side: Side, table: str) -> str:
        return f'"{_PREFIX.format(side.number)}{table}"'

    def _ok(self, side: Side) -> str:
        return only_ok(side)


def only_ok(side: Side) -> str:
    """Return the part of a query that leaves out samples that went wrong."""
    held = side.facts[(side.facts["table"] == "samples") & (side.facts["column"] == "status")]
    return " and coalesce(status, 'ok') = 'ok'" if len(held) else ""


def _marks(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
