"""A frame of numbers as the lists that a page embeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.runs._report._parts import Frame

__all__ = ["encoded"]


def encoded(frame: Frame) -> dict[str, Any]:
    """Return a frame as plain lists, column by column.

    Labels are numbered, float32 are given with the digits that are theirs and no more, a missing value is None, and an
    infinity is the text JSON has for it.
    """
    columns = []
    for name in frame.rows.columns:
        words, unit, metric = frame.facts.get(str(name), (str(name), "", ""))
        columns.append(
            {"name": str(name), "words": words, "unit": unit, "id": metric, **_values(frame.rows[name])}
        )  # fmt: skip
    total = len(frame.rows) if frame.total is None else frame.total
    return {"columns": columns, "rows": len(frame.rows), "total": total}


def _values(values: pd.Series) -> dict[str, Any]:
    kind = values.dtype
    if pd.api.types.is_bool_dtype(kind):
        return {"kind": "text", "values": [("yes" if v else "no") if pd.notna(v) else None for v in values]}
    if isinstance(kind, pd.CategoricalDtype) or not pd.api.types.is_numeric_dtype(kind):
        return _texts(values)
    array = values.to_numpy()
    if array.dtype.kind in "iu":
        return {"kind": "number", "values": array.tolist()}
    if array.dtype.kind != "f":
        array = values.to_numpy(np.float64, na_value=np.nan)
    # The shortest text that reads back as the same float32; widening it first would invent digits.
    numbers = [float(text) for text in array.astype(str)] if array.dtype.itemsize < 8 else array.tolist()
    return {"kind": "number", "values": [_number(v) for v in numbers]}


def _number(value: float) -> float | int | str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def _texts(values: pd.Series) -> dict[str, Any]:
    texts = [None if _is_missing(v) else str(v) for v in values.astype(object)]
    levels = list(dict.fromkeys(t for t in texts if t is not None))
    if len(levels) * 2 > len(texts):
        return {"kind": "text", "values": texts}
    place = {level: i for i, level in enumerate(levels)}
    return {"kind": "text", "levels": levels, "codes": [-1 if t is None else place[t] for t in texts]}


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
