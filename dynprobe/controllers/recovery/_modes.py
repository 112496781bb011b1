"""Recovery modes by name.

``none`` does nothing; ``sham`` goes through every computation and writes nothing; ``passive`` watches and waits;
``slerp shrink clamp subspace`` change states; ``sampling`` narrows what the next token is drawn from; ``guard`` takes
tokens back and writes them anew; ``hybrid`` (also ``HYBRID_RECOVERY``) is slerp and guard together. ``recync`` and
``dom`` are published relatives with rules of their own for when to act; ``str`` is a stand-in for ``dom`` where there
is no file of its operators. ``random:<mode>`` is made by a study, since it replays what a mode did.

A mode is a file with its :class:`Mode` and a line of the table below. Another package adds modes through the
entry-point group ``dynprobe.controllers``: a :class:`Mode`, a class of controllers, or a callable that takes ``timing``
and ``site`` and returns a controller or a list of them. A controller at hand needs no package: ``adopt`` gives it a
name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from dynprobe._plugins import Registry
from dynprobe.controllers._controller import Controller
from dynprobe.controllers.recovery._likeness import likeness
from dynprobe.controllers.recovery._mode import Mode
from dynprobe.controllers.recovery._recovery import Timing
from dynprobe.errors import UsageError, did_you_mean

__all__ = ["MODES", "MODE_ALIASES", "adopt", "make_mode", "mode_name", "selected_by"]

MODE_ALIASES = {"HYBRID_RECOVERY": "hybrid"}


def _plugin(name: str, found: Any) -> Mode:
    if ":" in name or "," in name or name == "all":
        raise ValueError(f"{name!r} means something else where modes are named")
    if isinstance(found, Mode):
        return found
    if isinstance(found, type) and issubclass(found, Controller):
        return Mode(lambda timing, site=None, **_: found())
    if isinstance(found, type) or not callable(found):
        raise TypeError(f"it is {found!r}, neither a Mode nor a class of controllers nor a function that makes them")
    return Mode(found)


_HERE = "dynprobe.controllers.recovery"
MODES: Registry[Mode] = Registry(
    "dynprobe.controllers", "recovery mode",
    {
        "none": f"{_HERE}._deadband_modes:NONE",
        "sham": f"{_HERE}._deadband_modes:SHAM",
        "passive": f"{_HERE}._deadband_modes:PASSIVE",
        "slerp": f"{_HERE}._deadband_modes:SLERP",
        "shrink": f"{_HERE}._deadband_modes:SHRINK",
        "clamp": f"{_HERE}._deadband_modes:CLAMP",
        "subspace": f"{_HERE}._deadband_modes:SUBSPACE",
        "sampling": f"{_HERE}._sampling:MODE",
        "guard": f"{_HERE}._guard:MODE",
        "hybrid": f"{_HERE}._deadband_modes:HYBRID",
        "recync": f"{_HERE}._recync:MODE",
        "dom": f"{_HERE}._str:DOM",
        "str": f"{_HERE}._str:MODE",
    },
    _plugin,
)  # fmt: skip


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
    _ADOPTED[name] = Mode(lambda timing, site=None, **_: copy.deepcopy(kept))
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
        if name in MODES.builtin:  # the packages that are installed need not be searched for a mode of ours
            return head + name
    known = MODES.names()
    for name in spellings:
        if MODES.plugin(name) is not None:
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
    made = (_ADOPTED.get(name) or MODES[name])(timing=timing, site=site, **options)
    return made if isinstance(made, list) else [made]


def selected_by(mode: str) -> tuple[str, ...]:
    """Return the columns that a mode works on by what it does itself, so that their recovery is no evidence.

    Example:
        >>> selected_by("sampling"), selected_by("slerp")
        (('nll_bare',), ())
    """
    if mode not in _ADOPTED and mode not in MODES:  # a control of a study
        return ()
    return (_ADOPTED.get(mode) or MODES[mode]).selects
