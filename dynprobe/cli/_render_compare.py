"""Tables of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table

from dynprobe.cli._console import console as new_console
from dynprobe.cli._render_panel import variance_table

if TYPE_CHECKING:
    from dynprobe.runs import Comparison

__all__ = ["comparison"]

#: Runs beside each other in one table of means.
_BESIDE = 4
_EFFECTS = ("kl_clean_pert", "flip_rate")
_ROWS = 24


def comparison(found: Comparison, metrics: Sequence[str], written: Sequence[Path]) -> None:
    """Print a comparison."""
    console = new_console()
    _print_runs(console, found)
    for text in found.grave:
        console.print(f"before you believe it: {text}", soft_wrap=True)
    shown, numbers = _shown(found, metrics), {run: n for n, run in enumerate(found.runs["run"], 1)}
    for at, condition in enumerate(dict.fromkeys(found.means["condition"]) if len(found.means) else ()):
        # Beside clean, what a condition changes is the news.
        now = shown if metrics or not at else [m for m in shown if m.endswith("_d") or m in _EFFECTS] or shown
        _print_means(console, found, condition, now)
        _print_pairs(console, found, condition, now, numbers)
    _print_depth(console, found, metrics, numbers)
    _print_matched(console, found, shown, numbers)
    _print_thresholds(console, found)
    _print_correlations(console, found)
    _print_variance(console, found, shown)
    for text in found.warnings:
        if text not in found.grave:
            console.print(f"warning: {text}", soft_wrap=True)
    for row in found.refused.to_dict("records"):
        console.print(f"refused: {row['metric']}: {row['reason']}", soft_wrap=True)
    for path in written:
        console.print(f"written: {path}", soft_wrap=True)
    if not any(path.suffix in (".json", ".csv", ".md") for path in written):
        console.print("every table: --out FILE.json, .csv or .md; in Python dp.compare([...]).pairs", soft_wrap=True)


def _print_runs(console: Any, found: Comparison) -> None:
    n = found.facts["prompts"]
    table = Table(
        title=f"{len(found.runs)} runs on {n} common prompts", caption=_AXES if "steps" in found.runs else None
    )
    table.add_column("", justify="right")
    for name in ("run", "architecture", "protocol", "dtype"):
        table.add_column(name)
    for name in ("prompts", "track", "depths", "steps"):
        table.add_column(name, justify="right")
    for number, row in enumerate(found.runs.to_dict("records"), 1):
        depths, steps = "–", "–"
        if pd.notna(row.get("steps")):
            depths, steps = f"{row['first_depth']:.0f} … {row['last_depth']:.0f}", f"{row['steps']:.0f}"
        track = row.get("track")
        cells = [
            str(number),
            row["run"],
            row["architecture"],
            row["protocol"],
            row["dtype"] or "–",
            str(row["prompts"]),
        ]
        table.add_row(*cells, "–" if track is None or pd.isna(track) else str(track), depths, steps)
    console.print(table)


_AXES = (
    "depths: first and last state that is measured (0, the embedding, seldom is), steps: those between; κ phase is per "
    "step, κ path per whole depth (rad): a statement about κ needs both"
)


def _shown(found: Comparison, metrics: Sequence[str]) -> list[str]:
    from dynprobe.runs import CORE_METRICS

    held = list(dict.fromkeys(found.means["metric"])) if len(found.means) else []
    return held if metrics else [m for m in CORE_METRICS if m in held] or held[:8]


def _print_means(console: Any, found: Comparison, condition: str, shown: Sequence[str]) -> None:
    rows = found.means[(found.means["condition"] == condition) & found.means["metric"].isin(list(shown))]
    labels = list(dict.fromkeys(rows["run"]))
    order = [m for m in shown if m in set(rows["metric"])]
    for first in range(0, len(labels), _BESIDE):
        part = labels[first : first + _BESIDE]
        table = Table(title=f"{condition}: means over prompts", caption=f"below: {_interval(found)}")
        table.add_column("metric", no_wrap=True)
        table.add_column("unit")
        for label in part:
            table.add_column(label, justify="right")
        for metric in order:
            own = rows[rows["metric"] == metric].set_index("run")
            cells = [_mean(own.loc[label]) if label in own.index else "–" for label in part]
            table.add_row(metric, str(own["unit"].iloc[0]), *cells)
        console.print(table)


def _print_pairs(
    console: Any, found: Comparison, condition: str, shown: Sequence[str], numbers: dict[str, int]
) -> None:
    if not len(found.pairs):
        return
    rows = found.pairs[(found.pairs["condition"] == condition) & found.pairs["metric"].isin(list(shown))]
    if not len(rows):
        return
    family = int(found.pairs["family"].iloc[0])
    rows = rows.assign(order=[list(shown).index(m) for m in rows["metric"]]).sort_values("order", kind="stable")
    caption = f"difference: {_interval(found)}; family of {family} tests; {_least(rows)}"
    caption += "; d: mean/SD of the differences"
    caption += "; within: the declared margin" if "equivalent" in rows else ""
    table = _difference_table(f"{condition}: paired differences a − b", caption)
    _fill(table, rows, numbers, lambda row: row["metric"])
    console.print(table)
    _rest(console, rows)


def _print_depth(console: Any, found: Comparison, metrics: Sequence[str], numbers: dict[str, int]) -> None:
    table = found.depth_pairs
    if not len(table):
        return
    asked = [m for m in metrics if m in set(table["metric"])] or ["kappa_phase", "delta_rel_prev"]
    asked = [m for m in asked if m in set(table["metric"])] or [table["metric"].iloc[0]]
    condition = table["condition"].iloc[0]
    rows = table[(table["condition"] == condition) & table["metric"].isin(asked)]
    # The area of steps and the path of κ stand among the means already.
    said = set(found.pairs["metric"]) if len(found.pairs) else set()
    rows = rows[
        [
            m not in said or (k == "path" and m != "kappa_phase")
            for m, k in zip(rows["metric"], rows["measure"], strict=True)
        ]
    ]
    if len(rows):
        shown = _difference_table(
            f"{condition}: along depth, a − b",
            "area: mean on normalised depth; path: sum over all steps; "
            f"family of {int(table['family'].iloc[0])} tests; {_least(rows)}",
        )
        _fill(shown, rows, numbers, lambda row: f"{row['metric']} {row['measure']}")
        console.print(shown)
        _rest(console, rows)
    contrasts = found.contrasts
    for row in contrasts[(contrasts["condition"] == condition) & contrasts["metric"].isin(asked)].to_dict("records"):
        if pd.notna(row["p_max"]):
            console.print(
                f"profile {row['metric']}: {row['a']} − {row['b']} is largest at depth {row['s_largest']:.2f} "
                f"({_number(row['difference'], True)}; p over the whole profile {_p(row['p_max'])}, at least "
                f"{row['p_least']:.3g} with {row['n']} prompts)",
                soft_wrap=True,
            )  # fmt: skip


def _print_matched(console: Any, found: Comparison, shown: Sequence[str], numbers: dict[str, int]) -> None:
    table = found.matched_pairs
    if not len(table):
        return
    rows = table[table["metric"].isin(["ln_alpha", *shown])]
    for (kl, write), part in rows.groupby(["kl", "write"], sort=False):
        at = _difference_table(
            f"at equal KL of {kl:g} nats ({write}), a − b",
            f"family of {int(table['family'].iloc[0])} tests; {_least(part)}",
        )
        _fill(at, part, numbers, lambda row: "ln α" if row["metric"] == "ln_alpha" else row["metric"])
        console.print(at)
        for row in part[part["metric"] == "ln_alpha"].to_dict("records"):
            ratio = _span(row["ratio"], row["ratio_low"], row["ratio_high"])
            console.print(f"α({row['a']}) / α({row['b']}) at {kl:g} nats: {ratio}", soft_wrap=True)


def _print_thresholds(console: Any, found: Comparison) -> None:
    if not len(found.thresholds):
        return
    table = Table(title="ratios of thresholds, exp(ln α50(a) − ln α50(b))", caption=_of_ratios(found))
    for name in ("a", "b", "criterion", "scale", "estimator"):
        table.add_column(name)
    for name in ("ratio", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.thresholds.to_dict("records"):
        ratio = (
            _span(row["ratio"], row["ratio_low"], row["ratio_high"]) if pd.notna(row["ratio"]) else str(row["reason"])
        )
        scale = f"{row['scale']} at {row['place']:.0%}" if pd.notna(row["place"]) else row["scale"]
        table.add_row(row["a"], row["b"], row["criterion"], scale, row["estimator"], ratio, str(row["n"]))
    console.print(table)


def _print_correlations(console: Any, found: Comparison) -> None:
    table = found.correlations
    if not len(table):
        return
    condition = table["condition"].iloc[0]
    rows = table[table["condition"] == condition]
    shown = Table(
        title=f"{condition}: Spearman's ρ of one run's Δ with another's κ phase",
        caption="prompts: over prompts; depth: mean over prompts of ρ along depth; " + _interval(found),
    )
    for name in ("Δ of", "κ of", "part of Δ"):
        shown.add_column(name)
    for name in ("ρ over prompts", "ρ along depth", "steps"):
        shown.add_column(name, justify="right", no_wrap=True)
    keys = ["delta_of", "kappa_of", "part"]
    for n, (key, part) in enumerate(rows.groupby(keys, sort=False)):
        if n >= _ROWS:
            break
        own = part.set_index("over")
        cells = [_rho(own.loc[over]) for over in ("prompts", "depth")]
        shown.add_row(*key, *cells, str(own.loc["depth", "points"]))
    console.print(shown)


def _print_variance(console: Any, found: Comparison, shown: Sequence[str]) -> None:
    table = found.variance
    if not len(table):
        return
    for condition in list(dict.fromkeys(table["condition"]))[:1]:
        part = table[(table["condition"] == condition) & table["metric"].isin(list(shown))]
        if len(part):
            variance_table(console, condition, part)
    rows = found.skeleton
    known = rows[rows["reason"].isna()] if len(rows) else rows
    for row in (known[known["condition"] == known["condition"].iloc[0]] if len(known) else known).to_dict("records"):
        console.print(
            f"skeleton ({row['covariates']}) of {row['metric']}: R² {row['r2']:.2f} between {row['n_models']} model "
            f"means, adjusted {row['r2_adjusted']:.2f}, by chance {row['r2_null']:.2f}, p {_of_permutations(row)}, "
            f"leaving a model out {row['r2_leave_model']:.2f}",
            soft_wrap=True,
        )


def _difference_table(title: str, caption: str) -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("metric", no_wrap=True)
    table.add_column("a − b", no_wrap=True)
    for name in ("difference", "d", "p", "Holm", "BH", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _fill(table: Table, rows: pd.DataFrame, numbers: dict[str, int], name: Any) -> None:
    tested = "equivalent" in rows
    if tested:
        table.add_column("within", no_wrap=True)
    for row in rows.head(_ROWS).to_dict("records"):
        known = pd.notna(row["difference"])
        cells = [_span(row["difference"], row["low"], row["high"], True) if known else str(row["reason"])]
        cells += [_number(row["effect_dz"], True, 3), _p(row["p"]), _p(row["p_holm"]), _p(row["p_bh"]), str(row["n"])]
        if tested:
            equal = row.get("equivalent")
            cells.append("–" if equal is None or pd.isna(equal) else "yes" if equal else "not shown")
        table.add_row(name(row), f"{numbers[row['a']]} − {numbers[row['b']]}", *cells)


def _rest(console: Any, rows: pd.DataFrame) -> None:
    if len(rows) > _ROWS:
        console.print(f"… {len(rows) - _ROWS} more rows of this table: --out FILE.csv", soft_wrap=True)


def _interval(found: Comparison) -> str:
    return str(found.facts["intervals"])


def _of_permutations(row: dict[Any, Any]) -> str:
    """The p of a skeleton with the smallest that these models allow, or why there is none."""
    if pd.isna(row["p_permutation"]):
        return f"– ({row.get('reason_p') or 'no order of these models gives another R²'})"
    least = f"at least {_p(row['p_least'])} with these {row['n_models']} models"
    return f"{_p(row['p_permutation'])} (permutations: {least})"


def _of_ratios(found: Comparison) -> str:
    """What the intervals of threshold ratios are: other ones than those of means."""
    ways = [str(way) for way in dict.fromkeys(found.thresholds["method"])]
    return f"{100 * found.facts['confidence']:g} % intervals by {' or '.join(ways)}, percentiles not expanded"


def _least(rows: pd.DataFrame) -> str:
    """What p is, and how small it could be at best."""
    n = rows["n"].max()
    return f"p: sign flips, at least {rows['p_least'].min():.3g} with {n} prompts" if n > 1 else "p: sign flips"


def _mean(row: pd.Series) -> str:
    if pd.isna(row["mean"]):
        return f"– {row['reason']}"
    text = _number(row["mean"])
    if pd.isna(row["low"]):
        return f"{text}\n{row['reason'] or ''}".rstrip()
    return f"{text}\n{_number(row['low'])} … {_number(row['high'])}"


def _span(value: float, low: float, high: float, signed: bool = False) -> str:
    text = _number(value, signed)
    return text if pd.isna(low) else f"{text} [{_number(low, signed)}, {_number(high, signed)}]"


def _rho(row: pd.Series) -> str:
    if pd.isna(row["rho"]):
        return f"– {row['reason']}"
    text = f"{row['rho']:+.2f}"
    return f"{text} ({row['reason']})" if pd.isna(row["low"]) else f"{text} [{row['low']:+.2f}, {row['high']:+.2f}]"


def _number(value: float, signed: bool = False, digits: int = 4) -> str:
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    sign = "+" if signed else ""
    return f"{value:{sign}.{digits}g}"


def _p(value: float) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
