"""Texts in tables of others are no formulas in a spreadsheet."""

import io

import pandas as pd
import pytest

from dynprobe.runs._csv import as_csv


@pytest.mark.parametrize("sign", "=+-@\t\r\n'\uff1d\uff0b\uff0d\uff20")
@pytest.mark.parametrize("kind", [object, "category", "string"])
def test_no_cell_and_no_heading_begins_like_a_formula(sign, kind):
    frame = pd.DataFrame({f"{sign}name": pd.Series([f"{sign}1+1", "plain", None], dtype=kind), "x": [-1.5, 2, 3]})
    text = as_csv(frame)
    found = pd.read_csv(io.StringIO(text, newline=""), keep_default_na=False)
    assert found.columns[0] == f"'{sign}name"
    assert found.iloc[:, 0].tolist() == [f"'{sign}1+1", "plain", ""]
    assert found["x"].tolist() == [-1.5, 2, 3]  # a number below zero is none
    assert f"{sign}1+1" in frame.iloc[:, 0].tolist()  # what was handed in stays


def test_a_table_without_such_texts_is_what_pandas_writes():
    frame = pd.DataFrame(
        {"a": ["x", None], "b": [0.1, float("nan")], "c": pd.array([1, None], "Int64"), "d": [True, False],
         "e": pd.Categorical(["u", "v"]), "f": [[1], "y"]}
    )  # fmt: skip
    frame.insert(0, "a", [1, 2], allow_duplicates=True)
    assert as_csv(frame) == frame.to_csv(index=False)
    assert as_csv(frame.iloc[:0]) == frame.iloc[:0].to_csv(index=False)


def test_every_table_that_is_written_as_csv_is_guarded():
    """Whoever writes CSV does it here, or (an export) with the same signs."""
    import re
    from pathlib import Path

    import dynprobe

    for path in Path(dynprobe.__file__).parent.rglob("*.py"):
        if "to_csv" in path.read_text(encoding="utf-8"):
            assert path.name == "_csv.py"
    script = (Path(dynprobe.__file__).parent / "runs/_report/templates/report.js").read_text(encoding="utf-8")
    (signs,) = re.findall(r"/\^(\[=.*?\])/\.test", script)
    assert re.fullmatch(f"{signs}{{11}}", "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
