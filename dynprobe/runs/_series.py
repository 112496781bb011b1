"""Columns of a run as series: one value after another along tokens or depth, one series per sample.

A table is rows with labels; what looks at time needs the rows of one sample in their order, nothing between them left
out. A token without a row is a hole (NaN), never closed up, because closing it would make neighbours of tokens that
are none. Where a row has further labels (a slot, a depth, a track) each of their values is a series of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs._open_run import open_run
from dynprobe.runs._run import Run
from dynprobe.runs._schema import TABLES

__all__ = ["SPANS", "Span", "run_series"]

Span: TypeAlias = Literal["auto", "new", "prompt", "all"]
SPANS: tuple[Span, ...] = ("auto", "new", "prompt", "all")
#: Tables that have an order, the likeliest first.
_ORDERED = ("tokens", "slots", "depths", "profiles", "actions")


def run_series(
    run: Run | str | Path,
    column: str,
    *,
    table: str | None = None,
    condition: str | None = None,
    along: str | None = None,
    at: Mapping[str, Any] | None = None,
    span: Span = "auto",
) -> dict[str, NDArray[np.float64]]:
    """Return a column of a run as series.

    Args:
        run: The run, or its folder.
        column: A column of numbers, such as ``kappa_phase`` of tokens or ``strength`` of slots.
        table: The table, where several have the column; default the first of tokens, slots, depths, profiles, actions.
        condition: Condition by id or arm; default the only one, else ``clean``.
        along: ``pos`` or ``depth``; default ``pos`` where the table has it.
        at: Further labels and their values, such as ``{"slot": 3}``; rows with others are left out.
        span: Tokens that take part: ``new`` (generated), ``prompt``, ``all``; ``auto`` is new where there are any.

    Returns:
        Name → values [step], in the order of the prompts. The name is the prompt's, with ``#replicate`` where there are
        several and ``/label=value`` for further labels.

    Raises:
        UsageError: A setting has no meaning for this table.
        RunFolderError: There is no such column or condition, or nothing is left.
    """
    found = open_run(run) if isinstance(run, str | Path) else run
    name = _table(found, column, table)
    keys = [key for key in TABLES[name].keys if key != "sample_id"]
    axis = along or ("pos" if "pos" in keys else keys[-1])
    if axis not in ("pos", "depth") or axis not in keys:
        raise UsageError(f"along={axis!r} was asked; table {name} is in order of {' or '.join(_axes(keys))}")
    if span not in SPANS:
        raise UsageError(f"span={span!r}; it is one of {', '.join(SPANS)}.{did_you_mean(str(span), SPANS)}")
    rest = [key for key in keys if key != axis]
    wanted = dict(at or {})
    for label in wanted:
        if label not in rest:
            near = did_you_mean(label, rest)
            raise UsageError(
                f"{label!r} is no further label of table {name}.{near} It has: {', '.join(rest) or 'none'}"
            )
    rows = found.table(name, ["sample_id", *keys, column])
    if not pd.api.types.is_numeric_dtype(rows[column]) or pd.api.types.is_bool_dtype(rows[column]):
        raise UsageError(f"column {column!r} of {name} holds no numbers")
    for label, value in wanted.items():
        rows = rows[rows[label].astype(str) == str(value)]
    if wanted and not len(rows):
        raise RunFolderError(f"{found.path}: no rows of {name} have {', '.join(f'{k}={v}' for k, v in wanted.items())}")
    samples = _samples(found, name, condition, rows)
    rows = rows.merge(samples, on="sample_id", how="inner")
    if "pos" in keys and span != "all":
        fresh = rows["pos"] >= rows["n_prompt"]
        new = bool(fresh.any()) if span == "auto" else span == "new"
        rows = rows[fresh if new else ~fresh]
    if not len(rows):
        asked = ", ".join(f"{k}={v}" for k, v in {"condition": condition, "span": span, **wanted}.items() if v)
        raise RunFolderError(f"{found.path}: no rows of {name} are left with {asked}")
    return _cut(rows, column, axis, rest)


def _axes(keys: list[str]) -> list[str]:
    return [key for key in keys if key in ("pos", "depth")]


def _table(run: Run, column: str, table: str | None) -> str:
    facts = run.columns()
    holding = [t for t in _ORDERED if ((facts["table"] == t) & (facts["column"] == column)).any()]
    if table is not None:
        if table not in _ORDERED:
            near = did_you_mean(table, _ORDERED)
            raise UsageError(f"table {table!r} has no order.{near} There are: {', '.join(_ORDERED)}")
        holding = [table] if table in holding else []
    if not holding:
        where = [table] if table else list(_ORDERED)
        known = sorted(set(facts.loc[facts["table"].isin(where), "column"]))
        raise RunFolderError(
            f"{run.path} has no column {column!r} in {', '.join(where)}.{did_you_mean(column, known)} "
            f"Columns: {', '.join(known)}."
        )
    return holding[0]


def _samples(run: Run, table: str, condition: str | None, rows: pd.DataFrame) -> pd.DataFrame:
    """Samples of one condition that have rows, in the order of prompts, with their names."""
    facts = run.columns()
    known = set(facts.loc[facts["table"] == "samples", "column"])
    optional = [c for c in ("replicate", "n_prompt") if c in known]
    samples = run.table("samples", ["sample_id", "prompt_id", "condition_id", *optional])
    # a run that does not know where its prompts end is all prompt
    samples = samples.assign(**{c: np.nan for c in ("replicate", "n_prompt") if c not in known})
    samples = samples.astype(dict.fromkeys(("sample_id", "prompt_id", "condition_id"), "object"))
    samples = samples[samples["sample_id"].isin(set(rows["sample_id"].astype(object)))]
    conditions = run.table("conditions", ["condition_id", "arm"]).astype("object")
    held = [c for c in conditions["condition_id"] if c in set(samples["condition_id"])]
    arms = dict(zip(conditions["condition_id"], conditions["arm"], strict=True))
    if condition is None:
        chosen = held if len(held) == 1 else [c for c in held if c == "clean" or arms[c] == "clean"]
    else:
        chosen = [c for c in held if c == condition] or [c for c in held if arms[c] == condition]
    if len(chosen) != 1:
        asked = "condition was not given" if condition is None else f"condition {condition!r} names {len(chosen)}"
        near = did_you_mean(condition or "", held)
        raise RunFolderError(
            f"{run.path}: {asked}.{near} Conditions with rows in {table}: {', '.join(held) or 'none'}"
            + (f"; type --condition {held[-1]}" if held else "")
        )
    samples = samples[samples["condition_id"] == chosen[0]]
    order = {p: i for i, p in enumerate(run.table("prompts", ["prompt_id"])["prompt_id"].astype(object))}
    samples = samples.assign(order=samples["prompt_id"].map(order)).sort_values(["order", "replicate"], kind="stable")
    several = samples["prompt_id"].duplicated(keep=False)
    label = samples["prompt_id"].astype(str)
    return samples.assign(
        name=label.where(~several, label + "#" + samples["replicate"].astype(str)), place=range(len(samples))
    )[["sample_id", "name", "place", "n_prompt"]]  # fmt: skip


def _cut(rows: pd.DataFrame, column: str, axis: str, rest: list[str]) -> dict[str, NDArray[np.float64]]:
    varied = [key for key in rest if rows[key].nunique() > 1]
    out: dict[str, NDArray[np.float64]] = {}
    for _, own in rows.groupby(["place", *rest], sort=True, observed=True):
        first = own.iloc[0]
        label = str(first["name"]) + "".join(f"/{key}={first[key]}" for key in varied)
        step = own[axis].to_numpy(np.int64)
        if label in out or len(np.unique(step)) != len(step):
            raise RunFolderError(f"two rows of {label} have the same {axis}; the table cannot be read as a series")
        values = np.full(int(step.max() - step.min()) + 1, np.nan)
        values[step - step.min()] = own[column].to_numpy(np.float64)
        out[label] = values
    return out
