"""What a user hands over to act on a model: words, an attractor layer, a controller, a writer, or a function.

Words are ``kind:settings``, such as ``attractor:slots=16,strength=0.5,layers=50%`` or ``recover:slerp``; a kind is an
entry of :data:`KINDS`. Words can be stored in a run and typed on a command line, and the same words are the same run.
An object is told in words where words can tell it; one that has none is like no other, so that no finished run is taken
for it.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from dynprobe.controllers import AttractorLayer, Controller
from dynprobe.controllers.attractor import attractor_spec, parse_attractor
from dynprobe.controllers.recovery import parse_recovery
from dynprobe.errors import UsageError, did_you_mean
from dynprobe.probes import Subject

__all__ = ["KINDS", "acting", "by_tokens", "checked", "is_writer", "told"]


def _attractor(text: str) -> tuple[str, Callable[[Subject], list[Any]]]:
    layer, layers = parse_attractor(text)
    return attractor_spec(layer.settings, layers), lambda subject: list(layer.controllers(subject, layers))


def _recover(text: str) -> tuple[str, Callable[[Subject], list[Any]]]:
    words = parse_recovery(text)
    return str(words), lambda subject: list(words.controllers())


#: Kind → settings as text → the same settings as they are stored, and what acts on a subject.
KINDS: dict[str, Callable[[str], tuple[str, Callable[[Subject], list[Any]]]]] = {
    "attractor": _attractor, "recover": _recover,
}  # fmt: skip


def checked(controllers: Sequence[Any], *, loop: str) -> list[Any]:
    """Return what was handed over, after refusing what cannot act.

    Args:
        controllers: As the user gave them.
        loop: Whose loop it is that feeds the tokens, for the message.

    Raises:
        UsageError: For words of no kind, settings that mean nothing, or an object that cannot act.
    """
    for given in controllers:
        if isinstance(given, str):
            _parsed(given)
        elif isinstance(given, Controller):
            if given.restarts:
                raise UsageError(f"{given.id} takes tokens back, which {loop} cannot do; use dp.recover")
        elif not isinstance(given, AttractorLayer) and not is_writer(given) and not callable(given):
            raise UsageError(
                f"{given!r:.80} cannot control: give words such as 'attractor:slots=16', an AttractorLayer, a "
                "Controller, a writer with sites and write(state, site, step), or a function of the subject that "
                "returns a context manager"
            )
    return list(controllers)


def acting(controllers: Sequence[Any], subject: Subject) -> list[Any]:
    """Return what acts on a subject: controllers, writers, and functions that return context managers.

    Words and layers become one controller for each of their sites; a layer in the middle of the model where it was told
    no place.

    Raises:
        CalibrationError: If a layer is centred on a calibration and none can be made.
        SiteError: If the model has no such site.
    """
    found: list[Any] = []
    for given in controllers:
        if isinstance(given, str):
            found += _parsed(given)[1](subject)
        elif isinstance(given, AttractorLayer):
            found += given.controllers(subject)
        else:
            found.append(given)
    return found


def told(given: Any) -> str:
    """Return what was handed over in words."""
    if isinstance(given, str):
        return _parsed(given)[0]
    if isinstance(given, AttractorLayer) and given.fresh:
        return f"attractor:{attractor_spec(given.settings)}"
    name = str(getattr(given, "id", "") or type(given).__name__)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        values = [getattr(given, f.name) for f in dataclasses.fields(given)]
        if all(value is None or isinstance(value, str | int | float) for value in values):
            return f"{name} {given!r}"
    return f"{name} {uuid.uuid4().hex[:12]}"


def by_tokens(actors: Sequence[Any]) -> bool:
    """Whether what they do to a row follows from its tokens alone, however these are fed."""
    return all(isinstance(actor, Controller) and actor.by_tokens for actor in actors)


def is_writer(given: Any) -> bool:
    """Whether it writes by itself."""
    return hasattr(given, "sites") and hasattr(given, "write")


def _parsed(words: str) -> tuple[str, Callable[[Subject], list[Any]]]:
    kind, colon, settings = words.partition(":")
    kind = kind.strip()
    if not colon or kind not in KINDS:
        known = ", ".join(f"{name}:key=value,…" for name in KINDS)
        raise UsageError(f"controller {words!r}: words are {known}.{did_you_mean(kind, KINDS)}")
    spec, make = KINDS[kind](settings)
    return f"{kind}:{spec}", make
