"""Tables of a delay diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.table import Table

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.protocols import DelayDiagnostics

__all__ = ["delay"]

_WORDS = {
    "r1": "lag-1 autocorrelation", "fnn": "false neighbours, m = {dim}", "fnn_dimension": "first m below {accept:g}",
    "pc_share": "share of axis {component}, m = {dim}", "pc_cosine": "axis {component} is a cosine, m = {dim}",
    "pc_mirror": "axis {component} even or odd, m = {dim}",
}  # fmt: skip
_KINDS = {"ft": "Fourier", "aaft": "AAFT", "iaaft": "IAAFT", "ar1": "AR(1)"}


def delay(found: DelayDiagnostics, column: str, written: Sequence[Path]) -> None:
    """Print a delay diagnosis: one series with its p values, or the medians of several."""
    console = new_console()
    table = found.table
    one = table["series"].nunique() == 1
    heads = table.drop_duplicates("series")
    console.print(_facts(column, heads), soft_wrap=True)
    kinds = list(dict.fromkeys(table["surrogate"]))
    rows = found.summary()
    if one:
        rows = rows.merge(table[["statistic", "dim", "component", "surrogate", "reason", "p", "p_reason"]])
    shown = Table(
        caption="value; in brackets the central 95 % of surrogates; p from both sides, not corrected for many rows"
        if one
        else "medians over series; in brackets their medians of the central 95 % of surrogates; then series with "
        "p ≤ 0.05 of those tested"
    )
    shown.add_column("", no_wrap=True)
    shown.add_column("value", justify="right", no_wrap=True)
    for kind in kinds:
        shown.add_column(_KINDS[kind], justify="right", no_wrap=True)
    last = _last_dim(rows)
    parts: Any = rows.groupby(["statistic", "dim", "component"], sort=False)
    for (name, dim, component), part in parts:
        if name not in _WORDS or (name == "pc_share" and component > 1) or (name in _AXIS and dim != last):
            continue
        words = _WORDS[name].format(dim=dim, component=component, accept=found.settings["accept"])
        own = part.set_index("surrogate")
        shown.add_row(words, _value(own.iloc[0], one), *[_among(own.loc[kind], one) for kind in kinds])
    console.print(shown)
    for text in _notes(heads, last):
        console.print(text, soft_wrap=True)
    for path in written:
        console.print(f"written: {path}", soft_wrap=True)
    if not any(path.suffix in (".csv", ".json") for path in written):
        console.print("every number of every series: --out FILE.csv or .json", soft_wrap=True)


_AXIS = ("pc_cosine", "pc_mirror")


def _facts(column: str, heads: pd.DataFrame) -> str:
    parts = [f"{column}: {len(heads)} series" if len(heads) > 1 else f"{column}: {heads['series'].iloc[0]}"]
    parts.append(f"{_range(heads['n'])} steps")
    parts.append(f"lag {_range(heads['lag'])} ({_rule(heads['lag_rule'])})")
    parts.append(f"Theiler window {_range(heads['theiler'])} ({_rule(heads['theiler_rule'])})")
    parts.append(f"lag-1 autocorrelation {_range(heads['r1'])}")
    return " · ".join(parts)


def _rule(rules: pd.Series) -> str:
    found = list(dict.fromkeys(rules))
    return found[0] if len(found) == 1 else f"{len(found)} rules, see lag_rule and theiler_rule"


def _range(values: pd.Series) -> str:
    kept = values.dropna()
    if kept.empty:
        return "–"
    low, high = kept.min(), kept.max()
    text = (lambda v: f"{v:.3g}") if isinstance(low, float | np.floating) else str
    return text(low) if low == high else f"{text(low)} … {text(high)}"


def _last_dim(rows: pd.DataFrame) -> int:
    known = rows[(rows["statistic"] == "pc_cosine") & (rows["n_defined"] > 0)]["dim"]
    return int(known.max()) if len(known) else -1


def _value(row: pd.Series, one: bool) -> str:
    if pd.isna(row["value"]):
        return f"–\n{row['reason']}" if one else f"–\n0 of {row['n_series']}"
    some = "" if one or row["n_defined"] == row["n_series"] else f"\n{row['n_defined']} of {row['n_series']}"
    return f"{_number(row['value'])}{some}"


def _among(row: pd.Series, one: bool) -> str:
    if pd.isna(row["low"]):
        return "–"
    band = f"[{_number(row['low'])}, {_number(row['high'])}]"
    if one:
        return band if pd.isna(row["p"]) else f"{band}\np {row['p']:.3g}"
    return f"{band}\n{row['n_outside']} of {row['n_tested']}"


def _number(value: Any) -> str:
    return "none" if np.isinf(value) else f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 10 else f"{value:.3g}"


def _notes(heads: pd.DataFrame, last: int) -> list[str]:
    out = []
    if last > 1:
        out.append(
            "axes that are even, odd or cosines are those of stationary noise, and at m = 2 of every series; what "
            "could be evidence is p, not the value"
        )
    jump = heads[heads["end_mismatch"] > 10 * 2 / heads["n"]]
    if len(jump):
        out.append(
            f"{len(jump)} of {len(heads)} series jump from end to start (end_mismatch over ten times that of noise): "
            "read AR(1), not Fourier or IAAFT"
        )
    return out
