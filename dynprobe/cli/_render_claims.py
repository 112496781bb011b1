"""Claims, verdicts and the log, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.claims import Claim, Source, Verdict

__all__ = ["claim", "listing", "records", "verdict", "verified"]

_STYLE = {"survived": "green", "falsified": "bold red", "inconclusive": "yellow"}


def listing(claims: Sequence[Claim], last: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the claims, one line each."""
    out = new_console()
    table = Table()
    for heading in ("claim", "sentence", "protocol", "models", *(["last test"] if last else [])):
        table.add_column(heading, no_wrap=heading == "claim")
    for c in claims:
        cells: list[Any] = [c.id, f"“{c.quote}”", c.protocol or "untestable here", _models(c)]
        if last:
            outcome = last.get(c.id, {}).get("outcome") or ""
            cells.append(Text(outcome, style=_STYLE.get(outcome, "")))
        table.add_row(*cells)
    out.print(table)
    n = sum(c.testable for c in claims)
    out.print(f"{len(claims)} claims, {n} of them testable; `dynprobe claims show ID` says how, or why not")


def claim(c: Claim, texts: Mapping[str, Source]) -> None:
    """Print one claim in full."""
    out = new_console()
    source = texts[c.source.text]
    lines = [str(p.line) for p in (c.source, *c.also) if p.text == c.source.text]
    out.print(f"{c.id}   “{c.quote}”")
    out.print(f"  source     {source.title}, line {', '.join(lines)} ({source.author}; {source.reference})")
    for place in c.also:
        if place.text != c.source.text:
            out.print(f"             also {texts[place.text].title}, line {place.line}")
    if c.reading:
        out.print(f"  reading    {c.reading}")
    out.print(f"  metrics    {', '.join(c.metrics)}")
    if c.untestable_here is not None or c.panel is None:
        out.print(f"  refuted by {c.falsified_by}")
        out.print(f"  untestable {c.untestable_here}")
        return
    settings = ", ".join(f"{k}={v}" for k, v in c.settings.items())
    out.print(f"  protocol   {c.protocol} {settings}")
    for name, role in c.panel.roles.items():
        many = f", {c.panel.at_least} or more" if c.panel.at_least else ""
        out.print(f"  model      {name}: {role.what}{many}")
    if c.panel.note:
        out.print(f"             {c.panel.note}")
    if c.panel.published:
        out.print(f"             published of {', '.join(c.panel.published)}")
    for part in c.parts:
        p = part.prediction
        label = f" ({part.label})" if part.label else ""
        out.print(f"  predicts   {part.shape} of {part.metric}{label} {p.expect} {_margin(p.margin)} {p.unit}")
    out.print(f"  refuted by {c.falsified_by}")


def verdict(v: Verdict) -> None:
    """Print a verdict, whichever way it fell."""
    out = new_console()
    out.print(Text.assemble(f"{v.claim}: ", (v.outcome, _STYLE[v.outcome])))
    for f in v.findings:
        out.print(Text.assemble("  ", (f.outcome, _STYLE[f.outcome]), f"  {f.metric}  {f.reason}"))
    for note in v.notes:
        out.print(f"  note: {note}")
    for run in v.runs:
        out.print(f"  run: {run}")
    if v.record is not None:
        out.print(f"  logged as {v.record}")


def records(found: Sequence[Mapping[str, Any]]) -> None:
    """Print a log, one line per record."""
    out = new_console()
    table = Table()
    for heading in ("record", "date", "claim", "models", "outcome", "effect", "n", "deviations"):
        table.add_column(heading)
    for r in found:
        outcome = r["outcome"] or r["kind"]
        interval = "" if r["low"] is None else f" [{_number(r['low'])}, {_number(r['high'])}]"
        effect = "–" if r["effect"] is None else f"{_number(r['effect'])}{interval}"
        panel = r["panel"] or {}
        models = ", ".join(panel.get("models", [])) + (" (small panel)" if panel.get("small") else "")
        table.add_row(
            r["id"], (r["date"] or "")[:19], r["claim"] or "pilot: " + r["statement"], models,
            Text(outcome, style=_STYLE.get(outcome, "")), effect, "–" if r["n"] is None else str(r["n"]),
            "; ".join(r["deviations"] or []),
        )  # fmt: skip
    out.print(table)


def verified(path: Path, n: int) -> None:
    """Say that a log holds together."""
    new_console().print(f"{path}: {n} records, the chain holds")


def _models(c: Claim) -> str:
    if c.panel is None:
        return ""
    names = ", ".join(c.panel.roles)
    return f"{names} × {c.panel.at_least}+" if c.panel.at_least else names


def _margin(margin: float | tuple[float, float]) -> str:
    return f"({margin[0]:g}, {margin[1]:g})" if isinstance(margin, tuple) else f"{margin:g}"


def _number(value: Any) -> str:
    number = float(str(value).replace("Infinity", "inf"))
    return f"{number:.4g}" if math.isfinite(number) else ("∞" if number > 0 else "−∞")
