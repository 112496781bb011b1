"""Trajectories in ``.parquet``: one row per state vector, in any order, found by its labels.

Rows carry ``sample``, ``pos``, ``iter``, ``stage`` and ``state``, and the vector as ``vec`` (a list of floats) or as
``dim_0, dim_1, …``. With a column ``depth`` and none called ``iter`` every row is the last state of a run of that
depth; with both, the deepest run is the trajectory and the last states of the others are compared with it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.runs._trajectory_raw import Raw, as_tensor, read_meta, refuse

__all__ = ["read_parquet"]

_LABELS = ("sample", "pos", "iter", "stage", "state")
_KNOWN = (*_LABELS, "depth", "vec", "delta", "energy")
_DIM = re.compile(r"dim_(\d+)$")


def read_parquet(path: Path) -> Raw:
    """Read a long table of state vectors.

    Raises:
        UsageError: It is damaged, a row is missing or doubled, or vectors differ in length.
    """
    raw = Raw(str(path))
    try:
        table = pq.read_table(path)
        names = table.column_names
    except (pa.ArrowException, OSError, ValueError) as error:  # also a name that is no UTF-8
        raise UsageError(f"{path} is no .parquet file ({error}); write it with DataFrame.to_parquet") from error
    if not table.num_rows:
        refuse(raw, "the table has no rows", "store one row per state vector")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        refuse(raw, f"the column {twice!r} stands twice", "store every column once")
    if b"meta" in (table.schema.metadata or {}):
        raw.meta = read_meta(raw, table.schema.metadata[b"meta"])
    vectors = _vectors(raw, table)
    labels = _labels(raw, table)
    raw.remarks += [
        f"{name} is not read.{did_you_mean(name, _KNOWN)}"
        for name in names
        if name not in _KNOWN and not _DIM.match(name)
    ]
    _arrange(raw, labels, vectors)
    return raw


def _vectors(raw: Raw, table: pa.Table) -> NDArray[Any]:
    """The vectors [row, dim] in their dtype."""
    dims = sorted(int(m[1]) for name in table.column_names if (m := _DIM.match(name)))
    if "vec" in table.column_names:
        if dims:
            refuse(raw, "there are both vec and dim_ columns", "keep one of them")
        column = table["vec"].combine_chunks()
        if not (
            pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        ) and not pa.types.is_fixed_size_list(column.type):
            refuse(raw, f"vec has the type {column.type}", "store a list of floats per row")
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if not np.isfinite(lengths.astype(float)).all() or len(set(lengths.tolist())) > 1:
            odd = int(np.argmax(lengths != lengths[0]))
            refuse(
                raw, f"the shape changes: vec has {lengths[0]} numbers in row 0 and {lengths[odd]} in row {odd}",
                "give all vectors one length",
            )  # fmt: skip
        flat = column.flatten()
        _no_nulls(raw, "vec", flat)
        return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(table.num_rows, -1)
    if not dims:
        near = next((hint for name in table.column_names if (hint := did_you_mean(name, ("vec",)))), "")
        refuse(
            raw, f"there is neither vec nor dim_0, dim_1, … among the columns {', '.join(table.column_names)}.{near}",
            "store the vector of each row as a list of floats called vec",
        )  # fmt: skip
    if dims != list(range(len(dims))):
        gap = next(k for k in range(dims[-1] + 1) if k not in dims)
        refuse(raw, f"the column dim_{gap} is missing", f"store dim_0 … dim_{dims[-1]}")
    columns = [table[f"dim_{k}"] for k in dims]
    for k, column in enumerate(columns):
        _no_nulls(raw, f"dim_{k}", column)
    return np.stack([c.to_numpy() for c in columns], axis=1)


def _no_nulls(raw: Raw, name: str, column: Any) -> None:
    """Refuse missing values, unless they are how a NaN was stored, which is found and named later."""
    if column.null_count and not pa.types.is_floating(column.type):
        refuse(raw, f"{name} has {column.null_count} missing values", "store a run without them")


def _labels(raw: Raw, table: pa.Table) -> pd.DataFrame:
    """The labels of all rows, with what the file lacks filled in."""
    held = [name for name in (*_LABELS, "depth", "delta", "energy") if name in table.column_names]
    if "iter" not in held and "depth" not in held:
        near = next((hint for n in table.column_names if (hint := did_you_mean(n, ("iter", "depth")))), "")
        refuse(raw, f"there is no column iter.{near}", "number the updates done: 0 before the first")
    try:
        # What pandas noted beside the columns says nothing that is needed, and may be damaged by itself.
        frame: pd.DataFrame = table.select(held).to_pandas(ignore_metadata=True)
    except (pa.ArrowException, ValueError) as error:  # a text that is no UTF-8, a time out of range
        refuse(raw, f"its labels cannot be read ({error})", "write the file again")
    for name in ("pos", "iter", "state", "depth"):
        if name not in frame:
            if name != "depth":
                frame[name] = 0
            continue
        values = frame[name].to_numpy()
        if values.dtype.kind not in "iu":
            whole = values.dtype.kind == "f" and bool(np.isfinite(values).all() and (values == np.floor(values)).all())
            if not whole:
                refuse(raw, f"the column {name} holds no whole numbers ({values.dtype})", f"store {name} as integers")
            frame[name] = values.astype(np.int64)
    for name, default in (("sample", "s0"), ("stage", "core")):
        if name not in frame:
            frame[name] = default
        elif frame[name].isna().any():
            refuse(raw, f"the column {name} is empty in some rows", f"name the {name} of every row")
        frame[name] = frame[name].astype(str)
    if "sample" not in held:
        raw.assumed.append("sample: one sample, called s0")
    raw.dims = ["iter", *(axis for axis, of in _PRESENT.items() if of in held), "dim"]
    return frame


_PRESENT = {"batch": "sample", "pos": "pos", "state": "state"}


def _arrange(raw: Raw, rows: pd.DataFrame, vectors: NDArray[Any]) -> None:
    """Lay the rows out on a grid; the deepest of several runs is the trajectory."""
    full = np.ones(len(rows), bool)
    if "depth" in rows:
        if "iter" in (raw.dims or []) and rows["iter"].nunique() > 1:
            deepest = int(rows["depth"].max())
            full = rows["depth"].to_numpy() == deepest
        else:
            rows = rows.assign(iter=rows["depth"])
            raw.depth = np.empty(0, np.int64)
    axes = _Axes(raw, rows[full])
    raw.states, grids = axes.lay(raw, rows[full].reset_index(drop=True), vectors[full])
    raw.energy, raw.delta = grids.get("energy"), grids.get("delta")
    numbers = np.array([k for _, k in axes.steps], dtype=np.int64)
    if raw.depth is not None:
        raw.depth = numbers
    else:
        raw.iter = numbers
    raw.stage = [of for of, _ in axes.steps]
    raw.ids, raw.valid, raw.positions = axes.samples, axes.valid, axes.positions
    raw.dims = ["iter", "batch", "pos", *(["state"] if "state" in (raw.dims or []) else []), "dim"]
    if "state" not in raw.dims:
        raw.states = raw.states[:, :, :, 0]
    if not full.all():
        for depth, mine in rows[~full].groupby("depth"):
            last = mine[mine["iter"] == mine["iter"].max()]
            if last["iter"].iloc[0] != depth:
                refuse(
                    raw, f"the run of depth {depth} ends at iteration {last['iter'].iloc[0]}", "store its last state"
                )
            alone = _Axes(raw, last, like=axes)
            laid, _ = alone.lay(raw, last.reset_index(drop=True), vectors[last.index])
            raw.finals[int(str(depth))] = laid[0] if "state" in raw.dims else laid[0, :, :, 0]


class _Axes:
    """The labels along every axis of the grid."""

    slots: list[int]
    samples: list[str]
    place: dict[tuple[str, int], int]
    valid: NDArray[np.bool_]
    positions: NDArray[np.int64]

    def __init__(self, raw: Raw, rows: pd.DataFrame, like: _Axes | None = None) -> None:
        stages = list(dict.fromkeys(rows["stage"]))
        steps = set(zip(rows["stage"], rows["iter"].tolist(), strict=True))
        self.steps = sorted(steps, key=lambda step: (stages.index(step[0]), step[1]))
        self.slots = like.slots if like else sorted(set(rows["state"].tolist()))
        self.samples = like.samples if like else list(dict.fromkeys(rows["sample"]))
        if like:
            self.place, self.valid, self.positions = like.place, like.valid, like.positions
            return
        pairs = rows[["sample", "pos"]].drop_duplicates().sort_values("pos", kind="stable")
        rank = pairs.groupby("sample", sort=False).cumcount().to_numpy()
        self.place = {key: int(r) for key, r in zip(zip(pairs["sample"], pairs["pos"], strict=True), rank, strict=True)}
        shape = (len(self.samples), int(rank.max()) + 1)
        self.valid, self.positions = np.zeros(shape, bool), np.zeros(shape, np.int64)
        number = {name: b for b, name in enumerate(self.samples)}
        for (sample, pos), t in self.place.items():
            self.valid[number[sample], t], self.positions[number[sample], t] = True, pos

    def lay(self, raw: Raw, rows: pd.DataFrame, vectors: NDArray[Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return states [iter, batch, pos, state, dim], and energy and delta [iter, batch, pos]."""
        twice = rows.duplicated(list(_LABELS))
        if twice.any():
            refuse(raw, f"two rows have the label {_label(rows[twice].iloc[0])}", "store every state vector once")
        step, sample, slot = ({key: i for i, key in enumerate(of)} for of in (self.steps, self.samples, self.slots))
        i = np.array([step[key] for key in zip(rows["stage"], rows["iter"].tolist(), strict=True)])
        try:
            b = np.array([sample[key] for key in rows["sample"]])
            t = np.array([self.place[key] for key in zip(rows["sample"], rows["pos"], strict=True)])
            n = np.array([slot[key] for key in rows["state"].tolist()])
        except KeyError:
            refuse(raw, "the runs of different depths have different samples, positions or states", "store the same")
        filled = np.zeros((len(self.steps), len(self.samples), self.valid.shape[1], len(self.slots)), bool)
        filled[i, b, t, n] = True
        gaps = np.argwhere(~filled & self.valid[None, :, :, None])
        if len(gaps):
            at = gaps[0]
            (of, k), pos = self.steps[at[0]], self.positions[at[1], at[2]]
            refuse(
                raw, f"{len(gaps)} rows are missing, the first: sample {self.samples[at[1]]!r}, pos {pos}, iter {k}, "
                f"stage {of!r}, state {self.slots[at[3]]}",
                "store every state of every position at every iteration (a state that halted keeps its last value)",
            )  # fmt: skip
        tensor = as_tensor(raw, "vec", vectors)
        states = torch.zeros((*filled.shape, vectors.shape[1]), dtype=tensor.dtype)
        states[tuple(torch.from_numpy(np.array(x)) for x in (i, b, t, n))] = tensor
        grids = {}
        for name in ("energy", "delta"):
            if name in rows:
                values = np.full(filled.shape, np.nan)
                values[i, b, t, n] = rows[name].to_numpy(dtype=np.float64)
                grids[name] = self._over_states(raw, name, values)
        return states, grids

    def _over_states(self, raw: Raw, name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """One value per position: the energy all its rows share, the mean of their Δ."""
        if name == "energy":
            same = (values == values[..., :1]) | (np.isnan(values) & np.isnan(values[..., :1]))
            if not same.all():
                refuse(raw, "the rows of one position have different energies", "store the energy of the whole state")
            return values[..., 0]
        return np.asarray(values.mean(axis=-1))


def _label(row: Any) -> str:
    return ", ".join(f"{name}={row[name]}" for name in _LABELS)
