"""Tables of a ``recover`` run: the detector first, then what each mode brought back, then what it harmed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dynprobe.cli._console import console as new_console
from dynprobe.runs._stored_number import stored_number

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["detector_table", "recovery"]

_ROADS = {"forced": "given text (forced)", "free": "own text (free)"}
#: Metric → heading; the others stand in the summary and in the table of fits.
_SHOWN = {
    "nll": "NLL", "kl_clean_pert": "KL", "nll_bare": "NLL bare", "repetition": "repeats", "kappa_geom": "κ geom",
    "kappa_phase": "κ phase",
}  # fmt: skip
_OURS = {
    "hybrid": "hybrid is recovery.hybrid/1 (ours): slerp and guard; HYBRID_RECOVERY has no public definition",
    "str": "str writes along calibration components: a stand-in (ours), not DOM",
}


def detector_table(detector: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the detector's power on texts that no mode has touched, one column per way of reading."""
    signal = next((entry["signal"] for entry in detector.values()), "")
    table = Table(title=f"detector {signal}, before any mode acts")
    table.add_column("95 % intervals in brackets", no_wrap=True)
    for road in detector:
        table.add_column(_ROADS[road], justify="right")
    for name, tell in _POWER.items():
        table.add_row(name, *[tell(entry) for entry in detector.values()])
    return table


def _verdict(entry: Mapping[str, Any]) -> Text:
    if not entry["runs_perturbed"]:
        return Text("nothing to detect")
    return Text("DETECTOR_BLIND", style="bold red") if entry.get("blind") else Text("acts where it should")


def _latency(entry: Mapping[str, Any]) -> str:
    if "latency_median" not in entry:
        return "–"
    median, never, n = entry["latency_median"], entry["latency_censored"], entry["runs_perturbed"]
    said = "more than the texts are long" if not math.isfinite(stored_number(median)) else f"{median:g}"
    return f"{said} ({never} of {n} never)"


_POWER: dict[str, Any] = {
    "AUC, clean against perturbed": lambda e: _ends(e.get("auc")),
    "fires in perturbed texts, share": lambda e: f"{_ends(e.get('fire_rate_perturbed'))} of {e['runs_perturbed']}",
    "fires in clean texts, share": lambda e: f"{_ends(e.get('fire_rate_clean'))} of {e['runs_clean']}",
    "tokens until it fires, median": _latency,
    "false fires per 1,000 clean tokens": lambda e: _ends(e.get("false_fires_per_1000")),
    "duty clean → perturbed": lambda e: f"{_short(e['duty_clean'])} → {_short(e.get('duty_perturbed'))}",
    "verdict": _verdict,
}


def recovery(found: Run) -> None:
    """Print a ``recover`` run."""
    console, summary = new_console(), found.summary
    detector, band = summary["detector"], summary["band"]
    console.print(detector_table(detector))
    console.print(
        f"on above {band['q_hi']:.3g} (clean q{100 * band['upper']:g}) for {band['m']} tokens, off below "
        f"{band['q_lo']:.3g} (clean q{100 * band['lower']:g}) for {band['m_off']}; calibration "
        f"{found.manifest.calibration_hash}",
        soft_wrap=True,
    )
    for road in detector:
        rows = [row for row in summary["recovery"] if row["decode"] == road]
        if rows:
            console.print(_fractions(road, rows, summary))
    if summary["iatrogenic"] or summary["changed"]:
        console.print(_harm(summary))
    for line in _notes(found):
        console.print(line, soft_wrap=True)


def _fractions(road: str, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Table:
    by_condition: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_condition.setdefault(row["condition"], {})[row["metric"]] = row
    arms = {arm["condition"]: arm for arm in summary["arms"]}
    entry = summary["detector"][road]
    table = Table(
        title=f"recovery, {_ROADS[road]} · detector AUC {_short(entry['auc']['value'])}, duty "
        f"{_short(entry['duty_clean'])} → {_short(entry['duty_perturbed'])}",
    )  # fmt: skip
    table.add_column("mode, timing", no_wrap=True)
    table.add_column("duty", justify="right")
    table.add_column("energy", justify="right")
    table.add_column("act/calm", justify="right")
    shown = [name for name in _SHOWN if any(name in cells for cells in by_condition.values())]
    marked = {name for name in shown if all(c[name]["acted_on"] for c in by_condition.values() if name in c)}
    for name in shown:
        table.add_column(_SHOWN[name] + ("*" if name in marked else ""), justify="right", no_wrap=True)
    for condition, cells in by_condition.items():
        arm = arms[condition]
        control = arm["timing"] == "replay"
        table.add_row(
            "  random" if control else _named(arm), _mean(arm, "duty"), _mean(arm, "energy_written"),
            "" if control else f"{_tokens(arm, 'acted_after')}/{_calm(arm)}",
            *[_fraction(cells.get(name), star=name not in marked) for name in shown], style="dim" if control else "",
        )  # fmt: skip
    return table


def _named(arm: Mapping[str, Any]) -> str:
    return str(arm["mode"]) + ("" if arm["timing"] == "detector" else f", {arm['timing']}")


def _fraction(row: Mapping[str, Any] | None, *, star: bool) -> str:
    if row is None:
        return ""
    if not math.isfinite(stored_number(row["rf"])):
        return {"DETECTOR_BLIND": "blind"}.get(str(row["reason"]), str(row["reason"] or "–"))
    low, high = stored_number(row["low"]), stored_number(row["high"])
    value = _signed(stored_number(row["rf"])) + ("*" if star and row["acted_on"] else "")
    return value if math.isnan(low) else f"{value}\n{_signed(low)}…{_signed(high)}"


def _signed(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:+.2f}" if abs(value) < 9.995 else f"{value:+.0f}"


def _harm(summary: Mapping[str, Any]) -> Table:
    table = Table(title="harm to clean text (iatrogenic)")
    table.add_column("mode", no_wrap=True)
    for name in ("duty", "texts made worse, share", "ΔNLL", "own texts changed, share"):
        table.add_column(name, justify="right")
    read = {row["mode"]: row for row in summary["iatrogenic"]}
    written = {row["mode"]: row for row in summary["changed"]}
    for mode in dict.fromkeys([*read, *written]):
        forced, free = read.get(mode), written.get(mode)
        table.add_row(
            str(mode), "/".join(_short(row["duty"]) for row in (forced, free) if row is not None),
            "–" if forced is None else f"{_ends(forced)} of {forced['n']}",
            "–" if forced is None else f"{forced['nll_change']:+.3g}",
            "–" if free is None else f"{_ends(free)} of {free['n']}",
        )  # fmt: skip
    return table


def _notes(found: Run) -> list[str]:
    summary = found.summary
    rows = summary["recovery"]
    modes = [str(mode) for mode in found.manifest.config.get("mode") or ()]
    lines = ["there is no recovery fraction: nothing was perturbed, or no mode acted"]
    if rows:
        lines = [
            "recovery fraction: 0 as perturbed, 1 as clean, below 0 harm; random: the same tokens, sites and energies "
            "in random directions"
        ]
    if any(row["acted_on"] for row in rows):
        lines.append(
            "* the controller acts on this: what it shows is the controller's own doing (Goodhart), recovery or harm, "
            "and no evidence; judge by the others"
        )
    if any(row["reason"] == "DETECTOR_BLIND" for row in rows):
        lines.append(
            "blind: DETECTOR_BLIND, the loop acted on under 5 % of perturbed tokens or no more than on clean ones; "
            "read always and oracle, take another --detector, or let it fire sooner (--m, --q-hi) where texts are short"
        )
    if any(row["reason"] == "no-action" for row in rows):
        lines.append("no-action: the noise is on at no new token, so an oracle has nothing to act on")
    if any(row["reason"] == "no-effect" for row in rows):
        lines.append("no-effect: the perturbation changed this by no more than arithmetic does")
    shown = [row for row in rows if row["metric"] in _SHOWN and math.isfinite(stored_number(row["rf"]))]
    if any(math.isinf(stored_number(row[end])) for row in shown for end in ("low", "high")):
        lines.append("∞: over these prompts the perturbation may have done nothing to this, so its share has no bound")
    oracles = [arm.get("duty", {}) for arm in summary["arms"] if arm["timing"] == "oracle"]
    if any(stored_number(duty.get("low")) == 1.0 for duty in oracles):
        lines.append("oracle acts where the perturbation writes: here at every new token, as always does")
    if summary["iatrogenic"]:
        lines.append(
            f"worse: NLL of the given text higher by more than 3 × the noise floor ({summary['nll_floor']:.2g} nats); "
            "exact intervals"
        )
    lines += [text for mode, text in _OURS.items() if mode in modes]
    lines.append('every fraction: .table("fits"); every write and signal: .table("actions")')
    return lines


def _mean(arm: Mapping[str, Any], name: str) -> str:
    return _short(arm.get(name, {}).get("mean"))


def _tokens(arm: Mapping[str, Any], name: str) -> str:
    number = stored_number(arm.get(name, {}).get("mean"))
    return "–" if math.isnan(number) else f"{number:.1f}" if number < 9.95 else f"{number:.0f}"


def _calm(arm: Mapping[str, Any]) -> str:
    """Median tokens from the first action to calm; where most texts never were calm, what it is known to exceed."""
    found = arm.get("calm", {})
    median, exceeds = stored_number(found.get("median")), stored_number(found.get("exceeds"))
    return f"{median:g}" if math.isfinite(median) else f">{exceeds:g}" if math.isfinite(exceeds) else "–"


def _short(value: Any) -> str:
    number = stored_number(value)
    return "–" if not math.isfinite(number) else f"{number:.2f}" if abs(number) < 9.995 else f"{number:.0f}"


def _ends(entry: Mapping[str, Any] | None) -> str:
    if entry is None or not math.isfinite(stored_number(entry["value"])):
        return "–"
    if not math.isfinite(stored_number(entry["high"]) - stored_number(entry["low"])):
        why = entry.get("reason_interval")
        return _short(entry["value"]) + (f" ({why})" if why else "")
    return f"{_short(entry['value'])} [{_short(entry['low'])}, {_short(entry['high'])}]"
