"""Recovery modes by name.

``none`` does nothing; ``sham`` goes through every computation and writes nothing; ``passive`` watches and waits;
``slerp shrink clamp subspace`` change states; ``sampling`` narrows what the next token is drawn from; ``guard`` takes
tokens back and writes them anew; ``hybrid`` (also ``HYBRID_RECOVERY``) is slerp and guard together. ``recync`` and
``dom`` are published relatives with rules of their own for when to act; ``str`` is a stand-in for ``dom`` where there
is no file of its operators. ``random:<mode>`` is made by a study, since it replays what a mode did.

Another package adds modes through the entry-point group ``dynprobe.recovery``: a callable that takes ``timing`` and
``site`` and returns a controller or a list of them. A controller at hand needs no package: ``adopt`` gives it a name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dynprobe.controllers._controller import Controller
from dynprobe.controllers.recovery._actuators import ACTUATORS
from dynprobe.controllers.recovery._guard import Guard
from dynprobe.controllers.recovery._likeness import likeness
from dynprobe.controllers.recovery._operators import LoraPair, TopComponents
from dynprobe.controllers.recovery._recovery import Recovery, Timing
from dynprobe.controllers.recovery._recync import Recync
from dynprobe.controllers.recovery._sampling import Narrowing
from dynprobe.controllers.recovery._str import StrControl
from dynprobe.errors import UsageError, did_you_mean

__all__ = ["MODES", "MODE_ALIASES", "Mode", "adopt", "make_mode", "mode_name"]

#: Makes the controllers of a mode, given a maker of timings and a site (None: where the signal points).
Mode = Callable[..., "Controller | list[Controller]"]

MODE_ALIASES = {"HYBRID_RECOVERY": "hybrid"}
_GROUP = "dynprobe.recovery"


def _deadband(kind: str, *, sham: bool = False, name: str | None = None) -> Mode:
    def make(timing: Callable[[], Timing], site: str | None = None, **_: Any) -> Controller:
        actuator = ACTUATORS[kind]() if kind in ACTUATORS else None
        return Recovery(timing(), actuator, site=site, sham=sham, name=f"recovery.{name or kind}/1")

    return make


def _sampling(timing: Callable[[], Timing], site: str | None = None, **_: Any) -> Controller:
    return Narrowing(timing())


def _guard(timing: Callable[[], Timing], site: str | None = None, **_: Any) -> Controller:
    return Guard()


def _hybrid(timing: Callable[[], Timing], site: str | None = None, **_: Any) -> list[Controller]:
    name = "recovery.hybrid/1"
    return [Recovery(timing(), ACTUATORS["slerp"](), site=site, name=name), Guard(name=name)]


def _recync(
    timing: Callable[[], Timing], site: str | None = None, max_restarts: int | None = None, **_: Any
) -> Controller:
    return Recync() if max_restarts is None else Recync(max_restarts)


def _dom(
    timing: Callable[[], Timing], site: str | None = None, operators: str | Path | None = None, **_: Any
) -> Controller:
    if operators is None:
        raise UsageError(
            "dom mixes two operators that were trained for it; give operators=<a safetensors file>, or take the mode "
            "str, a stand-in along the calibration's components"
        )
    return StrControl(LoraPair(operators))


def _str(timing: Callable[[], Timing], site: str | None = None, **_: Any) -> Controller:
    return StrControl(TopComponents())


def _none(timing: Callable[[], Timing], site: str | None = None, **_: Any) -> list[Controller]:
    return []


MODES: dict[str, Mode] = {
    "none": _none,
    "sham": _deadband("slerp", sham=True, name="sham"),
    "passive": _deadband("passive"),
    **{kind: _deadband(kind) for kind in ACTUATORS},
    "sampling": _sampling,
    "guard": _guard,
    "hybrid": _hybrid,
    "recync": _recync,
    "dom": _dom,
    "str": _str,
}


#: Modes that were handed over as objects in this process.
_ADOPTED: dict[str, Mode] = {}


def adopt(given: Controller | type[Controller]) -> str:
    """Make a controller a mode of this process, and return the mode's name: its class and a digest of what it is.

    Every arm gets a copy of its own. The same class with the same settings has the same name in another process, so
    that a study that was stopped goes on; another one is another study.

    Args:
        given: A controller, or a class of controllers that needs no arguments.

    Raises:
        UsageError: If it is no controller, or its class wants arguments.

    Example:
        >>> class Idle(Controller):
        ...     pass
        >>> adopt(Idle()) == adopt(Idle), adopt(Idle).split("-")[0]
        (True, 'Idle')
    """
    kind = given if isinstance(given, type) else type(given)
    if isinstance(given, type) and issubclass(given, Controller):
        try:
            given = given()
        except TypeError as error:
            raise UsageError(f"{kind.__name__} cannot be made without arguments ({error}); hand in one") from error
    if not isinstance(given, Controller):
        raise UsageError(
            f"a mode is a name or a dp.Controller, not {kind.__name__}. Names: {', '.join(MODES)}; a controller "
            "of your own is a subclass of dp.Controller with decide() and act()"
        )
    kept = given
    name = f"{type(kept).__name__}-{likeness(kept)}"
    _ADOPTED[name] = lambda timing, site=None, **_: copy.deepcopy(kept)
    return name


def mode_name(text: str) -> str:
    """Return the name of a mode as it stands in tables.

    Raises:
        UsageError: If there is no such mode.
    """
    head, base = ("random:", text[7:]) if text.lower().startswith("random:") else ("", text)
    spellings = (base, MODE_ALIASES.get(base.upper(), ""), base.lower().replace("_", "-"))
    if base in _ADOPTED:
        return head + base
    for name in spellings:
        if name in MODES:  # the packages that are installed need not be searched for a mode of ours
            return head + name
    known = (*MODES, *(point.name for point in entry_points(group=_GROUP)))
    for name in spellings:
        if name in known:
            return head + name
    near = did_you_mean(base, known)
    raise UsageError(f"unknown recovery mode {text!r}; known: {', '.join(known)}, random:<mode>.{near}")


def make_mode(name: str, timing: Callable[[], Timing], *, site: str | None = None, **options: Any) -> list[Controller]:
    """Return the controllers of a mode, in the order in which they act.

    Args:
        name: Name of the mode.
        timing: Makes the timing of each controller.
        site: Where it acts; None leaves it to the signal.
        options: What a mode takes besides: ``max_restarts`` of ``recync``, ``operators`` (a file) of ``dom``.

    Raises:
        UsageError: If there is no such mode, or it is ``random``, which replays another one's actions.
    """
    name = mode_name(name)
    if name.startswith("random:"):
        raise UsageError(f"{name} replays what {name.removeprefix('random:')} did; dp.recover makes it from that arm")
    make = _ADOPTED.get(name) or MODES.get(name)
    if make is None:
        make = next(p for p in entry_points(group=_GROUP) if p.name == name).load()
    made = make(timing=timing, site=site, **options)
    return made if isinstance(made, list) else [made]
