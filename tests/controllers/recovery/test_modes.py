"""Modes by name, and modes of other packages."""

from typing import Any

import numpy as np
import pytest
import torch

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


def test_a_package_adds_a_mode(package: Any) -> None:
    package(
        "mine", {"dynprobe.controllers": {"My_Mode": "modes_of_mine:make", "Mine": "modes_of_mine:Mine"}},
        modes_of_mine="""
            from dynprobe.controllers import Controller

            class Mine(Controller):
                pass

            def make(timing, site=None, **_):
                return []
        """,
    )  # fmt: skip
    assert make_mode("My_Mode", Always) == []
    assert [type(c).__name__ for c in make_mode("Mine", Always)] == ["Mine"]
    assert mode_name("random:My_Mode") == "random:My_Mode"
    with pytest.raises(UsageError, match=r"known: .*My_Mode.*Did you mean 'My_Mode'\?"):
        mode_name("My_Mod")


class Fade(Controller):
    writes = "layers=1"

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def act(self, state: Any, site: Any, seen: Any, memory: Any) -> Any:
        return self.factor * state


class FadeAsWell(Controller):
    writes = "layers=1"

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def act(self, state: Any, site: Any, seen: Any, memory: Any) -> Any:
        return self.factor * self.factor * state


def test_a_controller_at_hand_is_a_mode() -> None:
    name = module.adopt(Fade(0.25))
    assert name.startswith("Fade-")
    assert mode_name(name) == name
    assert mode_name(f"random:{name}") == f"random:{name}"
    first, second = (make_mode(name, Always)[0] for _ in range(2))
    assert isinstance(first, Fade)
    assert first is not second  # every arm has its own
    assert first.factor == 0.25


def test_the_name_tells_code_and_settings_apart() -> None:
    assert module.adopt(Fade(0.25)) == module.adopt(Fade(0.25))
    assert module.adopt(Fade) == module.adopt(Fade(0.5))
    names = {module.adopt(given) for given in (Fade(0.25), Fade(0.5), FadeAsWell(0.5))}
    assert len(names) == 3
    assert len({name.split("-")[1] for name in names}) == 3


def test_code_that_no_file_holds_is_told_apart_too() -> None:
    made = []
    for factor in (0.5, 0.25):
        space: dict[str, Any] = {"Controller": Controller}
        exec(f"class Own(Controller):\n    def act(self, state, *_):\n        return {factor} * state", space)
        made.append(module.adopt(space["Own"]()))
    assert made[0] != made[1]


FACTOR = 0.5


class Named(Controller):
    def act(self, state: Any, *_: Any) -> Any:
        return FACTOR * state


class Holds(Controller):
    def __init__(self, held: Any) -> None:
        self.held = held


def _closing_over(factor: float) -> Controller:
    class Own(Controller):
        def act(self, state: Any, *_: Any) -> Any:
            return factor * state

    return Own()


class _Box:
    def __init__(self, value: float) -> None:
        self.value = value


def test_one_source_with_other_values_is_another_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.adopt(_closing_over(0.5)) == module.adopt(_closing_over(0.5))
    assert module.adopt(_closing_over(0.5)) != module.adopt(_closing_over(0.25))
    given = _closing_over(0.5)
    name = module.adopt(given)
    make_mode(name, Always)  # a copy leaves books of Python's on the class
    assert module.adopt(given) == name
    half = module.adopt(Named())
    monkeypatch.setitem(globals(), "FACTOR", 0.25)
    assert module.adopt(Named()) != half


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x, lambda x: 2 * x), (_Box(1.0), _Box(2.0)), ([_Box(1.0)], [_Box(2.0)]), ({"a": 1}, {"a": 2}),
        (torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 2.0, dtype=torch.bfloat16)),
        (torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0 + 1e-12, dtype=torch.float64)),
        (np.arange(2000.0), np.r_[np.arange(1999.0), -1.0]), (np.ones(2), np.ones(2, np.float32)),
    ],
)  # fmt: skip
def test_settings_are_told_apart_by_what_they_hold(one: Any, other: Any) -> None:
    assert module.adopt(Holds(one)) == module.adopt(Holds(one))
    assert module.adopt(Holds(one)) != module.adopt(Holds(other))


def test_a_setting_without_contents_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be told from another object"):
        module.adopt(Holds(object()))


def test_what_is_no_controller_is_refused() -> None:
    class Wants(Controller):
        def __init__(self, needed: int) -> None:
            self.needed = needed

    with pytest.raises(UsageError, match=r"cannot be made without arguments .*hand in one"):
        module.adopt(Wants)
    with pytest.raises(UsageError, match=r"a mode is a name or a dp\.Controller, not int"):
        module.adopt(3)  # type: ignore[arg-type]
