"""The modes of the deadband: an actuator under a timing, alone, as its own control, or with a guard behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynprobe.controllers._controller import Controller
from dynprobe.controllers.recovery._actuators import ACTUATORS
from dynprobe.controllers.recovery._guard import MODE as GUARD
from dynprobe.controllers.recovery._guard import Guard
from dynprobe.controllers.recovery._mode import Mode
from dynprobe.controllers.recovery._recovery import Recovery, Timing

__all__ = ["CLAMP", "HYBRID", "NONE", "PASSIVE", "SHAM", "SHRINK", "SLERP", "SUBSPACE"]


def _deadband(kind: str, *, sham: bool = False, name: str | None = None) -> Mode:
    def make(timing: Callable[[], Timing], site: str | None = None, **_: Any) -> Controller:
        actuator = ACTUATORS[kind]() if kind in ACTUATORS else None
        return Recovery(timing(), actuator, site=site, sham=sham, name=f"recovery.{name or kind}/1")

    return Mode(make)


def _hybrid(timing: Callable[[], Timing], site: str | None = None, **_: Any) -> list[Controller]:
    name = "recovery.hybrid/1"
    return [Recovery(timing(), ACTUATORS["slerp"](), site=site, name=name), Guard(name=name)]


NONE = Mode(lambda timing, site=None, **_: [])
SHAM = _deadband("slerp", sham=True, name="sham")
PASSIVE = _deadband("passive")
SLERP = _deadband("slerp")
SHRINK = _deadband("shrink")
CLAMP = _deadband("clamp")
SUBSPACE = _deadband("subspace")
HYBRID = Mode(_hybrid, GUARD.selects)
