"""What ``bench`` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.protocols import Bench
    from dynprobe.protocols._bench_case import Measurement

__all__ = ["result"]


def result(found: Bench) -> None:
    """Print a benchmark: ratios with quartiles, what agrees with what, and what is not there."""
    console = new_console()
    model, machine = found.model, found.machine
    console.print(
        f"{model['name']}: {model['layers']} layers × {model['width']}, {model['parameters']:,} parameters, "
        f"{model['dtype']}, attention {model['attention'] or 'unknown'}",
        soft_wrap=True,
    )
    load = f"load {machine['load']} → {machine['load_after']}" if machine["load"] is not None else "load unknown"
    console.print(
        f"{machine['date']}  {machine.get('gpu') or machine['processor']}, {machine['threads']} threads of "
        f"{machine['cores']} cores, {load}",
        soft_wrap=True,
    )
    console.print("ratio: time of the arm / time of its baseline in the same round; median (quartiles)", soft_wrap=True)
    for measurement in found.measurements:
        console.print(_table(measurement))
        _notes(console, measurement)
    for section, reason in found.left_out.items():
        console.print(f"{section}: not measured: {reason}", soft_wrap=True)
    if machine["load"] is not None and machine["load"] > 1.5 * (machine["threads"] or 1):
        console.print("warning: other work was running; wall times mean little, ratios scatter", soft_wrap=True)
    if found.path is not None:
        console.print(f"written: {found.path}", soft_wrap=True)


def _table(m: Measurement) -> Table:
    table = Table(title=f"{m.section}: {m.name}")
    table.add_column("arm")
    table.add_column("over")
    for name in ("ms", "ratio", "quartiles", "largest difference"):
        table.add_column(name, justify="right")
    data = m.facts.get("bytes")
    if data:
        table.add_column("MB/s", justify="right")
    for name, facts in m.as_dict()["arms"].items():
        base = m.over[name] == name
        apart = facts["difference"]
        cells = [
            name, "–" if base else m.over[name], f"{1000 * facts['seconds_median']:.3g}",
            "1" if base else f"{facts['ratio']:.3f}", "–" if base else f"{facts['low']:.3f} – {facts['high']:.3f}",
            "–" if apart is None else f"{apart:.2g}",
        ]  # fmt: skip
        if data:
            writes = not (base and m.section == "disk")
            cells.append(f"{data / facts['seconds_median'] / 1e6:.0f}" if writes else "–")
        table.add_row(*cells)
    return table


def _notes(console: object, m: Measurement) -> None:
    from rich.console import Console

    assert isinstance(console, Console)
    if "texts_that_differ" in m.facts:
        differ = m.facts["texts_that_differ"]
        console.print(f"texts that differ from the plain call's: {differ} of {m.facts['rows']}", soft_wrap=True)
    if m.facts.get("fired"):
        console.print("warning: the controller fired, so the two sides did not do the same", soft_wrap=True)
    for name, reason in m.absent.items():
        console.print(f"{name}: {reason}", soft_wrap=True)
