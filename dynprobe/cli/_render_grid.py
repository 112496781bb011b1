"""Tables of sweeps and thresholds for people: the answer first, then what it leaves out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.table import Table

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["sweep", "threshold"]

_MOST_LINES = 40
_UNITS = {"kl": "nats", "flip": "share of flips", "kappa": "half-turns", "task": "accuracy loss"}


def sweep(found: Run) -> None:
    """Print the responses of a sweep: one line per layer and strength."""
    console = new_console()
    table = pd.DataFrame(found.summary["responses"])
    for variant, rows in table[(table["decode_mode"] == "forced") & (table["arm"] == "perturbed")].groupby("variant"):
        shown = Table(
            title=found.manifest.model_name + ("" if variant == "model" else f" · {variant}"),
            caption="means over prompts with 95 % bootstrap intervals; α in units of its scale",
        )
        for heading in ("scale", "layer", "α", "KL/nats", "flips", "Δκ (paired)", "ΔNLL/nats", "prompts"):
            shown.add_column(heading, justify="right")
        chosen = rows if len(rows) <= _MOST_LINES else rows.iloc[:: math.ceil(len(rows) / _MOST_LINES)]
        for _, row in chosen.iterrows():
            shown.add_row(
                str(row["scale"] or row["kind"]), f"{row['layer']:g}", f"{row['alpha']:.4g}",
                _ranged(row, "kl_clean_pert"), f"{row['flip_rate']:.3f}", _ranged(row, "kappa_phase_d"),
                _ranged(row, "nll_d"), str(int(row["n"])),
            )  # fmt: skip
        console.print(shown)
        if len(chosen) < len(rows):
            console.print(f"{len(chosen)} of {len(rows)} lines; all of them: summary.json, run.table('samples')")
    sham = table[table["arm"] == "sham"]["kl_clean_pert"].max()
    if np.isfinite(sham):
        console.print(f"sham rows (α = 0): largest mean KL {sham:.1e} nats", highlight=False)
    others = sorted(
        {f"{r['variant']}:{r['arm']}" for _, r in table.iterrows() if r["arm"] not in ("perturbed", "sham")}
    )
    if others:
        console.print(f"also stored: {', '.join(others)}")
    console.print(f"run: {found.path}")


def _ranged(row: Any, name: str) -> str:
    value, low, high = (row.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None or not np.isfinite(value):
        return "–"
    known = low is not None and high is not None and np.isfinite(low) and np.isfinite(high)
    return f"{value:.3g} [{low:.3g}, {high:.3g}]" if known else f"{value:.3g}"


def threshold(found: Run) -> None:
    """Print thresholds: one line per criterion, scale, kind and layer."""
    console = new_console()
    fits = found.table("fits")
    headline = fits[fits["headline"]]
    shown = Table(
        title=f"{found.manifest.model_name} · thresholds",
        caption="α at which the criterion is reached, in units of its scale; interval over prompts",
    )
    for heading in ("criterion", "scale", "kind", "layer", "α50", "interval", "spread", "prompts", "remarks"):
        shown.add_column(heading, justify="right" if heading in ("layer", "α50", "prompts") else "left")
    places = "pos" in headline and headline["pos"].ge(0).any()
    for _, fit in headline.head(_MOST_LINES).iterrows():
        layer = f"{int(fit['layer'])}" + (f":{int(fit['pos'])}" if places else "")
        shown.add_row(
            f"{fit['criterion']} ≥ {fit['level']:.3g} {_UNITS.get(str(fit['criterion']), '')}", str(fit["scale"]),
            str(fit["kind"]), layer, _value(fit), _interval(fit),
            "–" if pd.isna(fit.get("spread", math.nan)) else f"×/÷ {math.exp(fit['spread']):.2f}",
            str(int(fit["n"])), _remarks(fit),
        )  # fmt: skip
    console.print(shown)
    if len(headline) > _MOST_LINES:
        console.print(f"{_MOST_LINES} of {len(headline)} lines; all of them: run.table('fits')")
    rest = fits[~fits["headline"]]
    for _, fit in rest.head(0 if places else _MOST_LINES).iterrows():
        line = f"  {fit['criterion']} {fit['scale']} layer {int(fit['layer'])}: {fit['estimator']} {_value(fit)}"
        interval = _interval(fit)
        console.print(line + (f" {interval}" if interval != "–" else ""), highlight=False)
    per_prompt = found.summary.get("rows_per_prompt")
    if per_prompt:
        console.print(f"{per_prompt:.1f} perturbed rows per prompt and threshold (+ 1 sham row)", highlight=False)
    console.print(f"run: {found.path}")


def _value(fit: Any) -> str:
    if fit["status"] == "resolved":
        return f"{fit['alpha50']:.4g}"
    return {"left-censored": "below range", "right-censored": "above range"}.get(str(fit["status"]), str(fit["status"]))


def _interval(fit: Any) -> str:
    low, high = fit["low"], fit["high"]
    if pd.isna(low) or pd.isna(high):
        return "–"
    ends = ("< range" if np.isneginf(low) else f"{low:.4g}", "> range" if np.isposinf(high) else f"{high:.4g}")
    return f"[{ends[0]}, {ends[1]}]"


def _remarks(fit: Any) -> str:
    """What the number leaves out."""
    notes = []
    for column, word in (("n_left", "below range"), ("n_right", "above range"), ("n_nonmonotone", "not monotone")):
        if not pd.isna(fit.get(column, math.nan)) and fit[column]:
            notes.append(f"{int(fit[column])} {word}")
    if isinstance(fit.get("reason"), str) and fit["reason"]:
        notes.append(str(fit["reason"]))
    return ", ".join(notes)
