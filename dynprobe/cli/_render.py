"""Tables for people. Numbers carry their unit and their interval; a missing one carries its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dynprobe.cli._console import console as new_console
from dynprobe.cli._render_head import head, mean_intervals
from dynprobe.runs._stored_number import stored_number

if TYPE_CHECKING:
    import pandas as pd

    from dynprobe.probes import Calibration
    from dynprobe.protocols import Diagnosis, Estimate
    from dynprobe.runs import Run

__all__ = [
    "calibration",
    "columns",
    "diagnosis",
    "drawn",
    "listing",
    "plan",
    "run",
    "summary_table",
]

#: Column of the summary → heading, digits, and whether its interval is shown.
_SHOWN = {
    "kappa_phase": ("κ phase", 4, False), "kappa_phase_d": ("Δκ (paired)", 5, True),
    "kl_clean_pert": ("KL/nats", 4, True), "flip_rate": ("flips", 3, False), "nll_d": ("ΔNLL/nats", 4, True),
    "limen_ratio": ("LIMEN ratio", 2, False), "repetition": ("repeats", 3, False),
}  # fmt: skip


def _number(entry: Mapping[str, Any] | None, digits: int, interval: bool) -> str:
    if entry is None:
        return "–"
    mean, low, high = (stored_number(entry.get(name)) for name in ("mean", "low", "high"))
    if math.isnan(mean):
        return f"– {entry.get('reason') or ''}".rstrip()
    if not interval:
        return _digits(mean, digits)
    text = _digits(mean, digits, "+")
    if not math.isnan(low):
        text += f"\n{_digits(low, digits, '+')} … {_digits(high, digits, '+')}"
    return text


def _digits(value: float, digits: int, sign: str = "") -> str:
    """A number with its decimals, or with two significant digits where these would leave fewer of it."""
    if value and abs(value) < 10.0 ** (1 - digits):
        return f"{value:{sign}.2g}"
    return f"{value:{sign}.{digits}f}"


def summary_table(summary: Mapping[str, Any], title: str, intervals: str = "") -> Table:
    """Return one line per condition: means over prompts, 95 % intervals below the paired ones.

    Args:
        summary: Condition → column → mean, interval, reason.
        title: Of the table.
        intervals: What the intervals are, as a finished run says; default those of this version.
    """
    table = Table(
        title=title,
        caption=f"means; below paired columns: {intervals or mean_intervals({})}; – alone: not defined for this arm",
    )
    table.add_column("arm", no_wrap=True)
    used = [name for name in _SHOWN if any(name in entry for entry in summary.values())]
    for name in used:
        table.add_column(_SHOWN[name][0], justify="right", no_wrap=_SHOWN[name][2])
    table.add_column("regime")
    for condition, entry in summary.items():
        if entry.get("equal_to"):
            table.add_row(condition, *["="] * len(used), "equal to clean, bit for bit")
            continue
        regimes = entry.get("regimes") or {}
        regime = next((f"{label} {share:.0%}" for label, share in regimes.items()), "–")
        table.add_row(condition, *[_number(entry.get(name), *_SHOWN[name][1:]) for name in used], regime)
    return table


def run(found: Run, *, since: datetime | None = None) -> None:
    """Print a run of any protocol: what was done, its tables, its self-tests.

    Args:
        found: The run.
        since: When the command began that asked for it, to say so where it was there already.
    """
    from dynprobe.cli import (
        _render_asked,
        _render_attract,
        _render_dissociate,
        _render_eval,
        _render_grid,
        _render_iterate,
        _render_recover,
    )
    from dynprobe.cli._render_ingest import imported_export

    console = new_console()
    manifest = found.manifest
    console.print(Text(f"run {found.path}", style="bold"), soft_wrap=True)
    if since is not None and found.status == "complete" and datetime.fromisoformat(manifest.updated) < since:
        console.print(f"        was finished already ({manifest.updated}); nothing ran again", soft_wrap=True)
    for line in (*imported_export(found), *head(found)):
        console.print(line, soft_wrap=True)
    summary = found.summary
    if found.status != "complete" or not summary:
        console.print(_unfinished(found), soft_wrap=True)
    elif summary.get("protocol") == "sweep":
        _render_grid.sweep(found)
    elif summary.get("protocol") == "threshold":
        _render_grid.threshold(found)
    elif summary.get("protocol") == "iterate":
        _render_iterate.iterate(found)
    elif summary.get("protocol") == "eval":
        _render_eval.evaluation(found)
    elif summary.get("protocol") == "dissociate":
        _render_dissociate.dissociation(found)
    elif summary.get("protocol") == "attract":
        _render_attract.attraction(found)
    elif summary.get("protocol") == "recover":
        _render_recover.recovery(found)
    elif summary.get("conditions"):
        n = next(iter(summary["conditions"].values()))["samples"]
        console.print(
            summary_table(
                summary["conditions"],
                f"{manifest.model_name} · {n} text{'s' * (n != 1)} per arm",
                mean_intervals(summary),
            )
        )
        _render_asked.asked(found, console)
        for line in _flags(summary["conditions"]):
            console.print(line, soft_wrap=True)
    if isinstance(manifest.dtypes, dict) and manifest.dtypes.get("low_precision_angles"):
        console.print(
            f"warning: states are {manifest.dtypes.get('weights')}; its rounding alone turns a state by up to "
            "5e-4 half-turns, so smaller Δκ mean nothing (run with --dtype float32)",
            soft_wrap=True,
        )
    tests = manifest.self_tests if isinstance(manifest.self_tests, dict) else {}
    if tests:
        words = [f"{name} {_verdict(name, t)}" for name, t in tests.items()]
        console.print("self-tests: " + " · ".join(words), soft_wrap=True)
    main = {"threshold": '.table("fits")', "eval": '.table("items")'}
    table = main.get(str(summary.get("protocol")), ".samples")
    console.print(f"tables: dp.open({str(found.path)!r}){table}", soft_wrap=True)
    console.print(
        f"again: dynprobe show {found.path}   columns: the same with --columns{_picture(found)}", soft_wrap=True
    )


def _picture(found: Run) -> str:
    """How to draw a run, where it has something to draw."""
    names = list(found.plot.own()) if found.status == "complete" else []
    return f"   picture: with --plot {names[0]} --figure FILE.png" if names else ""


def _verdict(name: str, test: Mapping[str, Any]) -> str:
    """Outcome and number of a self-test.

    A model that cannot be resumed fast is resumed slowly, and no number suffers; the number is what the fast road would
    have cost.
    """
    if name != "resume" or test["passed"]:
        return f"{'ok' if test['passed'] else 'FAILED'} ({_short(test['value'])})"
    value = test["value"]
    short = "fail" if value is None or not math.isfinite(value) else f"be {_short(value)} SD of the logits off"
    return f"ok, by the slow road (all blocks run; the fast road would {short} and is not taken)"


def _unfinished(found: Run) -> str:
    """How far a run is, and what to do about it."""
    plan = found.manifest.batch_plan
    of = f" of {len(plan)}" if isinstance(plan, list) else ""
    said = f"status {found.status}: {len(found.manifest.finished)}{of} batches finished"
    if found.status != "interrupted":
        return said
    from dynprobe.runs._advice import who_continues

    return f"{said}; {who_continues(found.manifest.schema_version)}"


#: What a row's status means for a reader of the table.
_STATUS = {
    "nonfinite": "had NaN or infinite states, which enter no mean",
    "not-written": "had no state that could be written, and enter no mean",
    "partly-written": "had states that could not be written and were left alone",
    "isokl-unreached": "did not reach the KL at any strength, and enter no mean",
}


def _flags(conditions: Mapping[str, Any]) -> list[str]:
    """One line for each kind of row that did not go as asked."""
    return [
        f"{arm}: {count} of {entry['samples']} texts {_STATUS.get(status, status)}"
        for arm, entry in conditions.items()
        for status, count in (entry.get("status") or {}).items()
        if status != "ok"
    ]


def plan(cost: Estimate) -> None:
    """Print an estimate."""
    console = new_console()
    table = Table(title="before the run", show_header=False)
    for name, value in (
        ("rows of samples", f"{cost.samples:,}"), ("rows of tokens", f"{cost.token_rows:,}"),
        ("rows of depths", f"{cost.depth_rows:,}"), ("tables on disk (estimate)", _bytes(cost.metric_bytes)),
        ("states on disk", _bytes(cost.state_bytes)),
        ("memory beside the weights (estimate)", _bytes(cost.memory_bytes)),
        ("memory free on the device", "unknown" if cost.free_bytes is None else _bytes(cost.free_bytes)),
        ("tokens through the model", f"{cost.forward_tokens:,}"),
        ("time after loading (estimate)", "unknown" if cost.seconds is None else f"{cost.seconds:.0f} s"),
    ):  # fmt: skip
        table.add_row(name, value)
    console.print(table)


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def diagnosis(found: Diagnosis) -> None:
    """Print what ``doctor`` found."""
    console = new_console()
    table = Table(title=f"{found.found['name']}", show_header=False)
    for name, value in (found.found | found.provenance).items():
        if name not in ("name", "versions", "notes"):
            table.add_row(name, "not found" if value is None else str(value))
    console.print(table)
    checks = Table(title="self-tests")
    for heading in ("test", "verdict", "value", "limit", "unit", "numbers"):
        checks.add_column(heading)
    for name, check in found.checks.items():
        slow = name == "resume" and not check.passed
        style = "green" if check.passed else "yellow" if slow else "bold red"
        numbers = ", ".join(f"{k} {_short(v)}" for k, v in check.detail.items())
        verdict = Text("ok" if check.passed else "slow road" if slow else "FAILED", style=style)
        checks.add_row(name, verdict, f"{check.value:.3g}", f"{check.limit:.3g}", check.unit, numbers)
    console.print(checks)
    resume = found.checks.get("resume")
    if resume is not None and not resume.passed:
        console.print(f"resume {_verdict('resume', resume.as_dict())}", soft_wrap=True)
    for note in found.provenance.get("notes") or ():
        console.print(f"note: {note}", soft_wrap=True)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2g}"
    if value is None:  # NaN and infinity have no JSON
        return "not finite"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    return str(value)


def calibration(made: Calibration) -> None:
    """Print a calibration's header and its signals."""
    console = new_console()
    h = made.header
    console.print(
        f"calibration {made.hash} of {h['model']}: {h['n_prompts']} prompts, {h['n_tokens']} tokens, {h['dtype']}",
        soft_wrap=True,
    )
    table = Table(title="clean signals over tokens")
    table.add_column("signal")
    for q in (0.01, 0.25, 0.5, 0.75, 0.9, 0.99):
        table.add_column(f"q{100 * q:g}", justify="right")
    for name in sorted(made.signals):
        table.add_row(name, *[f"{made.quantile(name, q):.4g}" for q in (0.01, 0.25, 0.5, 0.75, 0.9, 0.99)])
    console.print(table)


def columns(found: Run) -> None:
    """Print the columns of a run with their ids and units."""
    _frame(found.columns(), f"columns of {found.path.name}")


def drawn(found: Run, plot: str | None) -> list[str]:
    """What a figure shows, and the names of the run's others."""
    names = list(found.plot.own()) or ["depth"]
    chosen, criteria = plot or names[0], [str(name) for name in found.manifest.config.get("criterion") or ()]
    lines = []
    if chosen == "heatmap" and len(criteria) > 1:
        lines.append(f"drawn: {criteria[0]}; others in Python: dp.open(…).plot.heatmap({criteria[1]!r})")
    others = [name for name in names if name != chosen]
    if others:
        lines.append(f"drawn: {chosen}; other pictures of this run: " + ", ".join(f"--plot {name}" for name in others))
    return lines


def listing(found: pd.DataFrame, folder: Path) -> None:
    """Print the runs of a folder."""
    if not len(found):
        new_console().print(f"no runs in {folder}")
        return
    _frame(found.drop(columns="time"), f"runs in {folder}")  # the name of a folder begins with its time


def _frame(frame: pd.DataFrame, title: str) -> None:
    table = Table(title=title)
    for name in frame.columns:
        table.add_column(str(name), overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*["–" if value is None or value != value or value == "" else str(value) for value in row])
    new_console().print(table)
