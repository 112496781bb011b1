"""CSV for spreadsheets: a text that one would run as a formula has an apostrophe before it.

The apostrophe says that a cell is text. It is itself among the signs that get one, so that what is put in front can be
taken away again without a question. Full-width signs count, since a spreadsheet set to an East Asian language takes
them for the plain ones.
"""

from __future__ import annotations

import csv
import re
from typing import Any

import pandas as pd

__all__ = ["FORMULA", "as_csv"]

#: How a text begins that a spreadsheet takes for a formula, or that has been guarded.
FORMULA = "^[=+\\-@\uff1d\uff0b\uff0d\uff20\t\r\n']"


def as_csv(frame: pd.DataFrame) -> str:
    """Return a table as CSV without its index.

    Args:
        frame: The table; numbers are written as they are.

    Example:
        >>> print(as_csv(pd.DataFrame({"label": ["=1+1", "a"], "x": [-1.5, 2.0]})), end="")
        label,x
        '=1+1,-1.5
        a,2.0
    """
    safe = frame.rename(columns=_guarded)
    texts = [at for at, dtype in enumerate(frame.dtypes) if _may_hold_text(dtype)]
    for at in texts:
        safe.isetitem(at, frame.iloc[:, at].astype(object).map(_guarded).to_numpy())
    # Python's writer leaves a bare carriage return unquoted, which readers take for the end of a row.
    returns = any("\r" in str(value) for value in (*safe.columns, *(v for at in texts for v in safe.iloc[:, at])))
    return str(safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL))


def _may_hold_text(dtype: Any) -> bool:
    return isinstance(dtype, pd.CategoricalDtype) or bool(
        pd.api.types.is_object_dtype(dtype) or pd.api.types.is_string_dtype(dtype)
    )


def _guarded(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and re.match(FORMULA, value) else value
