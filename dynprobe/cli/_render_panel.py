"""Tables of a panel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table

from dynprobe.cli._console import console as new_console
from dynprobe.cli._render import _bytes as size
from dynprobe.cli._render_reasons import in_words

if TYPE_CHECKING:
    from dynprobe.runs import Panel

__all__ = ["cost", "panel", "variance_table"]

_TERMS = {
    "model": "model", "category": "category", "model:category": "m × c", "prompt": "prompt", "model:prompt": "m × p",
    "seed": "seed",
}  # fmt: skip
_CONDITION = ["condition", "alpha", "temperature", "max_new_tokens"]


def panel(found: Panel) -> None:
    """Print a panel."""
    console = new_console()
    summary = found.summary
    console.print(f"panel {found.path}", soft_wrap=True)
    cells = ", ".join(f"{n} {state}" for state, n in summary["cells"].items())
    console.print(
        f"{summary['models']} models, {summary['prompts']['n']} prompts in "
        f"{len(summary['prompts']['categories'])} categories; cells: {cells}",
        soft_wrap=True,
    )
    if "variance" in found.tables:
        _each(console, found.table("variance"), "share of the variance", "eta2", variance_table)
    if "skeleton" in found.tables:
        _each(console, found.table("skeleton"), "R² of the skeletons", "r2", _skeleton)
    if "topology" in found.tables:
        _topology(console, found.table("topology"))
    for text in summary["warnings"]:
        console.print(f"warning: {text}", soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for row in summary["failed"]:
        reasons.setdefault(str(row["error"]), []).append(row["key"])
    for error, keys in reasons.items():
        console.print(
            f"failed: {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}: {error}", soft_wrap=True
        )
    console.print(f"every table: dynprobe.runs.open_panel({str(found.path)!r}).table('variance')", soft_wrap=True)


def _each(
    console: Any, table: pd.DataFrame, what: str, value: str, show: Callable[[Any, str, pd.DataFrame], None]
) -> None:
    """Print a table for each condition; one that would hold no number is a line, and reasons are said in words once."""
    nothing: dict[tuple[str, ...], list[str]] = {}
    seen: list[Any] = []
    for key, part in table.groupby(_CONDITION, sort=False):
        missing = part[part[value].isna()]
        reasons = tuple(dict.fromkeys(str(r) for r in missing["reason"].dropna()))
        seen += [*reasons, *(part["reason_p"].dropna() if "reason_p" in part else ())]
        if "term" in part:  # a share that is known may have no test
            seen += part.loc[(part["term"] == "model") & part["p"].isna(), "reason"].dropna().tolist()
        if len(missing) < len(part):
            show(console, _named(key), part)
        else:
            nothing.setdefault(reasons, []).append(_named(key))
    for reasons, names in nothing.items():
        console.print(f"{what}: none for {_some(names)} (– {', '.join(reasons)})", soft_wrap=True)
    for line in in_words(seen):
        console.print(f"  – {line}", soft_wrap=True)


def _some(names: list[str]) -> str:
    return "; ".join(names[:4]) + (f" and {len(names) - 4} more conditions" if len(names) > 4 else "")


def variance_table(console: Any, name: str, part: pd.DataFrame) -> None:
    """Print where the variance of one condition lies."""
    table = Table(
        title=f"{name}: share of the variance, η²",
        caption="p: F test under normal errors, which has no smallest value, of models against how they differ over "
        "prompts: it is about these models; * holds what the design cannot part from it",
    )
    table.add_column("metric", no_wrap=True)
    for title in _TERMS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("p", "models", "n"):
        table.add_column(title, justify="right", no_wrap=True)
    for metric, rows in part.groupby("metric", sort=False):
        by = {row["term"]: row for row in rows.to_dict("records")}
        cells = [_share(by[term]) for term in _TERMS]
        model = by["model"]
        table.add_row(str(metric), *cells, _p(model["p"]), str(model["n_models"]), str(model["n"]))
    console.print(table)


def cost(found: dict[str, Any]) -> None:
    """Print what a panel would cost."""
    console = new_console()
    table = Table(title=f"{found['cells']} cells, {found['done']} of them done, {found['prompts']} prompts each")
    table.add_column("model")
    for name in ("cells left", "samples", "tokens through it", "on disk", "memory", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found["models"]:
        if row["reason"] is not None:
            table.add_row(row["model"], str(row["cells"]), *["–"] * 5)
            continue
        table.add_row(
            row["model"], str(row["cells"]), f"{row['samples']:,}", f"{row['forward_tokens']:,}",
            size(row["metric_bytes"]), size(row["memory_bytes"]), _time(row["seconds"]),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"all: {found['samples']:,} samples, {size(found['metric_bytes'])} on disk, at most "
        f"{size(found['memory_bytes'])} of states at a time; about {_time(found['seconds'])} (loading, runs, and "
        f"{_time(found['table_seconds'])} for the tables), more where a model is calibrated for the first time",
        soft_wrap=True,
    )
    if found["copies_left_out"]:
        console.print(
            f"{found['copies_left_out']} cells in which nothing is drawn are left out: another seed gives the same run",
            soft_wrap=True,
        )
    for row in found["models"]:
        if row["reason"] is not None:
            console.print(f"warning: {row['model']}: {row['reason']}", soft_wrap=True)


def _skeleton(console: Any, name: str, table: pd.DataFrame) -> None:
    covariates = max(table["covariates"], key=len)
    shown = Table(
        title=f"{name}: R² of {covariates or 'the skeletons'} between model means",
        caption="null: R² of covariates that mean nothing; out: predicted without the model, or without its skeleton"
        + _least(table),
    )
    shown.add_column("metric", no_wrap=True)
    for title in ("R²", "adjusted", "null", "p", "model out", "skeleton out", "models"):
        shown.add_column(title, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        front = [row["metric"]]
        if row["reason"] is not None and not pd.isna(row["reason"]):
            shown.add_row(*front, f"– {row['reason']}", *[""] * 5, str(row["n_models"]))
            continue
        numbers = [row[c] for c in ("r2", "r2_adjusted", "r2_null")]
        last = [row[c] for c in ("r2_leave_model", "r2_leave_skeleton")]
        shown.add_row(
            *front, *map(_two, numbers), _p_or_why(row), *map(_two, last),
            f"{row['n_models']} ({row['n_skeletons']})",
        )  # fmt: skip
    console.print(shown)


def _p_or_why(row: Mapping[Any, Any]) -> str:
    """The p of a skeleton, or why there is none; panels of older versions do not say."""
    why = row.get("reason_p")
    return f"– {why}" if isinstance(why, str) else _p(row["p_permutation"])


def _least(table: pd.DataFrame) -> str:
    """How small the p of a permutation could be at best; panels of older versions do not say."""
    if "p_least" not in table:
        return ""
    known = table.loc[table["p_permutation"].notna(), "p_least"].dropna().tolist()
    return f"; p: permutations of skeletons, at least {_p(min(known))}" if known else ""


def _topology(console: Any, table: pd.DataFrame) -> None:
    nothing: dict[str, list[str]] = {}
    for row in table.to_dict("records"):
        name = _named(tuple(row[c] for c in _CONDITION))
        if row["reason"] is not None and not pd.isna(row["reason"]):
            nothing.setdefault(str(row["reason"]), []).append(name)
            continue
        console.print(
            f"clusters, {name}: {row['n_clusters']} of {row['n_models']} models (silhouette "
            f"{_two(row['silhouette'])}); the largest stable one has {row['largest_stable']}, fragmentation "
            f"{_two(row['fragmentation'])}; ARI with the families {_two(row['ari_family'])} (by chance "
            f"{_two(row['ari_null_low'])} … {_two(row['ari_null_high'])}, p {_p(row['ari_p'])})",
            soft_wrap=True,
        )
    for reason, names in nothing.items():
        console.print(f"clusters: none for {_some(names)} (– {reason})", soft_wrap=True)
    for line in in_words(nothing):
        console.print(f"  – {line}", soft_wrap=True)


def _named(key: tuple[Any, ...]) -> str:
    condition, alpha, temperature, tokens = key
    words = [str(condition)]
    words += [f"α {alpha:g}"] if alpha else []
    words += [f"T {temperature:g}"] if temperature else []
    return ", ".join([*words, f"{tokens} tokens"])


def _share(row: Mapping[Any, Any]) -> str:
    if pd.isna(row["eta2"]):
        return "–"
    return f"{row['eta2']:.3f}{'*' if row['includes'] else ''}"


def _two(value: float) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def _p(value: float) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
