"""Modes by name, and modes of other packages."""

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from dynprobe.controllers import Controller
from dynprobe.controllers.recovery import ACTUATORS, MODES, Always, Recovery, make_mode, mode_name
from dynprobe.controllers.recovery import _modes as module
from dynprobe.errors import UsageError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("slerp", "slerp"), ("SLERP", "slerp"), ("none", "none"), ("random:slerp", "random:slerp"),
        ("Random:Clamp", "random:clamp"),
    ],
)  # fmt: skip
def test_names(text: str, name: str) -> None:
    assert mode_name(text) == name


@pytest.mark.parametrize("text", ["HYBRID_RECOVERY", "hybrid_recovery", "hybrid"])
def test_the_published_name_of_hybrid(text: str) -> None:
    assert mode_name(text) == "hybrid"
    assert mode_name(f"random:{text}") == "random:hybrid"
    assert {c.id for c in make_mode(text, Always)} == {"recovery.hybrid/1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slrep", r"unknown recovery mode 'slrep'; known: none, sham, .*random:<mode>\. Did you mean 'slerp'\?"),
        ("random:slrep", r"Did you mean 'slerp'\?"),
        ("random", "unknown recovery mode 'random'"),
        ("random:random:slerp", "unknown recovery mode"),
        ("", "unknown recovery mode ''"),
    ],
)
def test_names_of_nothing(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mode_name(text)


def test_modes_make_controllers() -> None:
    assert make_mode("none", Always) == []
    for kind in ACTUATORS:
        (made,) = make_mode(kind, Always, site="layers=1")
        assert isinstance(made, Recovery)
        assert (made.id, str(made.site), type(made.actuator)) == (f"recovery.{kind}/1", "layers=1", ACTUATORS[kind])
    (sham,) = make_mode("sham", Always)
    (passive,) = make_mode("passive", Always)
    assert isinstance(sham, Recovery)
    assert isinstance(passive, Recovery)
    assert (sham.sham, passive.actuator) == (True, None)
    assert all(isinstance(c, Controller) for name in set(MODES) - {"dom"} for c in make_mode(name, Always))
    with pytest.raises(UsageError, match=r"random:slerp replays what slerp did; dp\.recover makes it"):
        make_mode("random:slerp", Always)


def test_a_package_adds_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [EntryPoint("My_Mode", "dynprobe.controllers.recovery._modes:_none", "dynprobe.recovery")]
    monkeypatch.setattr(module, "entry_points", lambda group: found if group == "dynprobe.recovery" else [])
    made: Any = make_mode("My_Mode", Always)
    assert made == []
    assert mode_name("random:My_Mode") == "random:My_Mode"
    with pytest.raises(UsageError, match=r"known: .*My_Mode.*Did you mean 'My_Mode'\?"):
        mode_name("My_Mod")
