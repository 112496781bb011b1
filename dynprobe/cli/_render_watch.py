"""The live view of ``recover --watch``: signal, readiness, actuator and text, as they come."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.protocols import Moment

__all__ = ["line", "picture", "show"]

_BARS = "▁▂▃▄▅▆▇█"
_MOST = 60
#: Text that is kept on the screen; a terminal shows no more than its height anyway.
_TAIL = 1200
#: Seconds that a token stands at least, so that an eye can follow a small model.
_PACE = 0.04


def show(moments: Iterable[Moment]) -> None:
    """Show moments as they come: as a live picture in a terminal, else one line each."""
    console = new_console()
    if not console.is_terminal:
        console.print(_HEAD)
        for moment in moments:
            console.print(line(moment), soft_wrap=True)
        return
    seen: list[Moment] = []
    with Live(console=console, refresh_per_second=12) as live:
        for moment in moments:
            seen.append(moment)
            live.update(picture(seen))
            time.sleep(_PACE)


_HEAD = f"{'pos':>5} {'signal':>8} {'κ':>7} {'ready':>6}  {'detector':<9} {'actuator':<34} token"


def line(moment: Moment) -> str:
    """Return one moment as a line of text."""
    return (
        f"{moment.pos:>5} {moment.signal:>8.3f} {moment.kappa:>7.4f} {moment.readiness:>6.2f}  "
        f"{'on' if moment.detected else '·':<9} {_actuator(moment):<34} {moment.token!r:.40}"
    )


def _actuator(moment: Moment) -> str:
    taken = f" · {moment.restarts} taken back" if moment.restarts else ""
    if not moment.active:
        return "·" + taken
    where = "+".join(moment.sites) or "writes nothing"
    return f"gain {moment.gain:.2f} at {where}, E {moment.energy:.2f}{taken}"


def picture(seen: list[Moment]) -> Group:
    """Return what a terminal shows after these moments."""
    now = seen[-1]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    levels = f"{now.signal:7.3f}   on above {now.q_hi:.3g}, off below {now.q_lo:.3g}"
    table.add_row("signal", _curve([(m.signal, m) for m in seen]), levels)
    table.add_row("κ phase", _curve([(m.kappa, m) for m in seen]), f"{now.kappa:7.4f}   half-turns")
    table.add_row("readiness", _gauge(now.readiness), f"{now.readiness:7.2f}   a function of κ, no evidence beside it")
    table.add_row("detector", Text("ON", style="bold red") if now.detected else Text("off", style="dim"), "")
    table.add_row("actuator", Text(_actuator(now), style="bold green" if now.active else "dim"), "")
    text = Text(seen[0].token[-300:], style="dim")
    text.append(now.text[-_TAIL:], style="default")
    return Group(table, Text(), text)


def _curve(values: list[tuple[float, Moment]]) -> Text:
    """A line of bars; red where the detector was on, green where something was acting."""
    known = [value for value, _ in values if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    out = Text()
    for value, moment in values[-_MOST:]:
        style = "green" if moment.active else "red" if moment.detected else "blue"
        share = (value - low) / (high - low) if high > low else 0.0
        out.append(_BARS[round(share * (len(_BARS) - 1))] if math.isfinite(value) else " ", style=style)
    return out


def _gauge(share: float, width: int = 30) -> Text:
    if not math.isfinite(share):
        return Text("degenerate band", style="dim")
    full = round(share * width)
    style = "green" if share > 0.5 else "yellow" if share > 0.2 else "red"
    return Text("█" * full, style=style).append("░" * (width - full), style="dim")
