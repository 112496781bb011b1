"""Tables of a ``dissociate`` run: what a dose costs, the detector, the arms, and one line of verdict for each mode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dynprobe.cli._console import console as new_console
from dynprobe.cli._render_head import mean_intervals
from dynprobe.cli._render_recover import detector_table
from dynprobe.runs._stored_number import stored_number

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["dissociation", "dose_table"]

_SEMANTIC = {"right": "accuracy", "nll_right": "NLL of the right answer", "choice_margin": "margin"}
_HEADINGS = {
    "nll_right": "NLL right", "kl_clean_pert": "KL", "kappa_geom": "κ geom", "kappa_phase": "κ phase",
    "delta_rel_prev": "Δ rel", "limen_ct": "LIMEN ct",
}  # fmt: skip
#: What a verdict rests on.
_MEANING = {
    "COUPLED": "both 95 % intervals lie above 0.1",
    "DISSOCIATED": "RF_dyn lies above 0.5 and RF_sem is equivalent to 0 within ±0.1",
    "INDETERMINATE": "neither coupled nor shown to be dissociated",
    "DETECTOR_BLIND": "the detector acted on under 5 % of perturbed tokens, or no more than on clean ones",
}


def dose_table(summary: Mapping[str, Any]) -> Table:
    """Return the response of task, dynamics and detector to every strength."""
    rows, dynamic = summary["dose_response"], summary["dynamic"]
    table = Table(
        title=f"what a dose costs: {summary['task']['n']} items, chance {_short(summary['task']['chance'])}",
        caption=f"means; in brackets: {mean_intervals(summary, 'items')} (accuracy: Wilson); * the dose",
    )  # fmt: skip
    table.add_column("α", justify="right")
    shown = ["nll_right", "kl_clean_pert", *dict.fromkeys((dynamic, "kappa_geom", "kappa_phase"))]
    table.add_column("accuracy", justify="right", no_wrap=True)
    for name in shown:
        table.add_column(_HEADINGS.get(name, name), justify="right")
    table.add_column("detector AUC", justify="right")
    table.add_column("its duty", justify="right")
    clean, dose = summary["task"]["clean"], summary["dose"]["alpha"]
    table.add_row("clean", _with_ends(clean, "value"), *[""] * (len(shown) + 2))
    for row in rows:
        table.add_row(
            f"{row['alpha']:g}{'*' if row['alpha'] == dose else ''}", _with_ends(row["right"], "value"),
            *[_with_ends(row.get(name) or {}, "mean") for name in shown],
            _short((row["detector"].get("auc") or {}).get("value")), _short(row["detector"].get("duty_perturbed")),
        )  # fmt: skip
    return table


def dissociation(found: Run) -> None:
    """Print a ``dissociate`` run."""
    console, summary = new_console(), found.summary
    console.print(dose_table(summary))
    for line in _dose(summary):
        console.print(line, soft_wrap=True)
    if summary["detector"]:
        console.print(detector_table({"forced": summary["detector"]}))
    if summary["arms"]:
        console.print(_arms(summary))
    for row in summary["iatrogenic"]:
        console.print(
            f"harm to clean items, {row['mode']}: {_with_ends(row, 'value')} of {row['n']} worse or answered otherwise "
            f"({row['answers_changed']} other answers, ΔNLL {_signed(row['nll_change'])} nats, duty "
            f"{_short(row['duty'])})",
            soft_wrap=True,
        )
    for line in _verdicts(summary):
        console.print(line, soft_wrap=True)
    for note in summary["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _dose(summary: Mapping[str, Any]) -> list[str]:
    crossing, dose, refusal = summary["crossing"], summary["dose"], summary["refusal"]
    if crossing["status"] == "resolved":
        said = f"accuracy has fallen by {crossing['level']:g} at α = {_short(crossing['alpha50'])}{_interval(crossing)}"
    else:
        said = f"the α at which accuracy has fallen by {crossing['level']:g} is {crossing['status']} on this ladder"
    lines = [said + ("" if dose["alpha"] is None else f"; dose α = {dose['alpha']:g} ({dose['how']}), {dose['where']}")]
    if refusal is not None:
        lines.append(f"RF_sem is refused ({refusal['reason']}): {refusal['text']}")
    return lines


def _arms(summary: Mapping[str, Any]) -> Table:
    dynamic = summary["dynamic"]
    acted = {row["metric"] for row in summary["recovery"] if row["acted_on"]}
    table = Table(
        title="arms at the dose",
        caption="random: the same tokens, sites and energies in random directions; * the controller acts on this, so "
        "it recovers by construction and is no evidence",
    )  # fmt: skip
    shown = ["nll_right", "kl_clean_pert", *dict.fromkeys((dynamic, "kappa_phase"))]
    table.add_column("arm", no_wrap=True)
    for name in ("duty", "energy", "accuracy"):
        table.add_column(name, justify="right")
    for name in shown:
        heading = _HEADINGS.get(name, name)
        table.add_column(heading + ("*" if name in acted else ""), justify="right")
    for arm in summary["arms"]:
        control = arm["timing"] == "replay"
        table.add_row(
            arm["condition"], _short((arm.get("duty") or {}).get("mean")),
            _short((arm.get("energy_written") or {}).get("mean")), _with_ends(arm["right"], "value"),
            *[_short((arm.get(name) or {}).get("mean")) for name in shown], style="dim" if control else "",
        )  # fmt: skip
    return table


def _verdicts(summary: Mapping[str, Any]) -> list[str]:
    """One line for each mode and timing, and below what the verdicts rest on."""
    primary = [v for v in summary["verdicts"] if v["primary"]]
    if not primary:
        return ["no verdict: there is no dose at which recovery could be judged"]
    controls = {v["condition"].replace("random:", ""): v for v in primary if v["arm"] == "random-control"}
    lines = []
    for v in (v for v in primary if v["arm"] != "random-control"):
        why = f" ({v['reason']})" if v["reason"] else ""
        line = (
            f"verdict {v['condition'].removeprefix('perturbed+')}: {v['verdict']}{why} · RF_dyn "
            f"{_fraction(v['rf_dyn'])} · RF_sem {_fraction(v['rf_sem'])}, TOST {_pair(v['tost'])}, n = {v['n']}"
        )
        other = controls.get(v["condition"])
        if other is not None:
            line += f" · random: {_fraction(other['rf_dyn'], ends=False)}, {_fraction(other['rf_sem'], ends=False)}"
        lines.append(line)
    lines.append(
        f"RF_dyn on {summary['dynamic']}, RF_sem on {_SEMANTIC.get(summary['semantic'], summary['semantic'])}; 0 as "
        "perturbed, 1 as clean, below 0 harm; joint bootstrap over items"
    )
    for verdict in dict.fromkeys(v["verdict"] for v in primary if v["arm"] != "random-control"):
        lines.append(f"{verdict}: {_MEANING[verdict]}")
    return lines + _correlation(summary["spearman"], summary["dynamic"])


def _correlation(rows: Sequence[Mapping[str, Any]], dynamic: str) -> list[str]:
    said = [f"{row['change']} {_with_ends(row, 'value', '+')}" for row in rows if "random:" not in row["condition"]]
    return [f"Spearman ρ over items of Δ{dynamic} and ΔNLL: " + "; ".join(said)] if said else []


def _fraction(entry: Mapping[str, Any], *, ends: bool = True) -> str:
    value = stored_number(entry["value"])
    if math.isnan(value):
        return str(entry["reason"] or "–")
    return _signed(value) + (f" {_pair((entry['low'], entry['high']))}" if ends else "")


def _pair(ends: Sequence[Any]) -> str:
    low, high = map(stored_number, ends)
    return "[–]" if math.isnan(low) or math.isnan(high) else f"[{_signed(low)}, {_signed(high)}]"


def _interval(entry: Mapping[str, Any]) -> str:
    low, high = stored_number(entry["low"]), stored_number(entry["high"])
    return "" if not math.isfinite(high - low) else f" [{_short(low)}, {_short(high)}]"


def _with_ends(entry: Mapping[str, Any], name: str, sign: str = "") -> str:
    value = stored_number(entry.get(name))
    if math.isnan(value):
        return "–"
    return (_signed(value) if sign else _short(value)) + _interval(entry)


def _signed(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value + 0.0:+.2f}" if abs(value) < 9.995 else f"{value:+.0f}"


def _short(value: Any) -> str:
    number = stored_number(value)
    if not math.isfinite(number):
        return "–"
    return f"{number:.3f}" if abs(number) < 0.995 else f"{number:.2f}" if abs(number) < 99.5 else f"{number:.0f}"
