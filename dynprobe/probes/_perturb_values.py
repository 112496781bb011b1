"""What each value of a perturbation may be, alone and beside the others.

Reading is separate from meaning: ``READERS`` turn text, numbers and tensors into one plain value per key, ``fault``
knows which values exclude each other, and ``place_fault`` which kinds write at one place only. Every refusal carries
the key it is about, so that whoever holds the text can point at the character.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from dynprobe.errors import UsageError
from dynprobe.probes._grammar import SEVERAL_ALPHAS, Span, is_number, listed, near
from dynprobe.probes._scales import SCALES
from dynprobe.probes._where import Where

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "KINDS",
    "READERS",
    "TAKES_DIRECTION",
    "InvalidError",
    "fault",
    "number_text",
    "place_fault",
    "vector",
]

KINDS: Final = ("gaussian", "direction", "impulse", "sine", "scale", "rotate", "dropout")
#: Kinds that write along a given vector: the first must have one, the others may.
TAKES_DIRECTION: Final = ("direction", "impulse", "sine")

_OWN_UNIT: Final = {"scale": "a factor, h' = (1 + α)h", "rotate": "an angle in radians", "dropout": "a probability"}


class InvalidError(UsageError):
    """A value is wrong; carries the key, so that whoever holds the text can point at it."""

    def __init__(self, key: str, message: str) -> None:
        self.key, self.message = key, message
        super().__init__(message)


def fault(v: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the key and the reason of the first combination of values that has no meaning, or None."""
    alpha, scale, kind = v["alpha"], v["scale"], v["kind"]
    unit = SCALES[scale]
    if kind in _OWN_UNIT and scale != "relnorm":
        return "scale", f"kind={kind} has its own unit ({_OWN_UNIT[kind]}); leave scale={scale} out"
    if unit.own_write and kind != "gaussian":
        return "kind", f"scale={scale} defines its own write ({unit.own_write}); leave kind={kind} out"
    if kind == "dropout" and not 0 <= alpha < 1:
        return "alpha", f"dropout takes a probability, 0 ≤ alpha < 1, not {number_text(alpha)}"
    if unit.solved and alpha < 0:
        return "alpha", f"under {scale} alpha is the target KL in nats, ≥ 0, not {number_text(alpha)}"
    if kind == "sine":
        return _sine_fault(scale, v["period"])
    if v["period"] is not None:
        return "period", f"period has no meaning for kind={kind}; leave it out"
    return None


def _sine_fault(scale: str, period: float | None) -> tuple[str, str] | None:
    if not SCALES[scale].wave:
        known = listed([name for name in SCALES.builtin if SCALES[name].wave])
        return "scale", f"kind=sine takes a scale with one unit per state ({known}), not {scale}"
    if period is None:
        return "kind", "kind=sine needs its period in tokens: add period=8"
    if period <= 2:
        why = "at 2 every token lies on a zero of the sine, below 2 it is the alias of a longer one"
        return "period", f"period takes more than 2 tokens ({why}), not {number_text(period)}"
    return None


def place_fault(kind: str, where: Where) -> tuple[str, str] | None:
    """Return the key and the reason where a kind that writes at one place is given several, or None.

    What only a model can tell (how many layers ``6:9`` are) is checked where the model is known.
    """
    keys = {"impulse": ("layers", "component", "positions"), "sine": ("layers", "component")}.get(kind, ())
    for key in keys:
        items = getattr(where, key) or ()
        many = len(items) > 1 or "all" in items or (key == "positions" and any(isinstance(i, Span) for i in items))
        if many:
            thing, example = (
                ("position", "last") if key == "positions" else ("site", "50%" if key == "layers" else "mlp_out")
            )
            given = "+".join(map(str, items))
            reason = "its response has one origin" if kind == "impulse" else "the lock-in has one reference"
            return key, f"kind={kind} writes at one {thing} ({reason}), not {key}={given}; write {key}={example}"
    return None


def _float(key: str, value: Any) -> float:
    if isinstance(value, str):
        parts = value.replace("[", " ").replace("]", " ").replace("+", " ").replace(";", " ").split()
        if not is_number(value) or "_" in value:  # float() would read the slip 0_1 as 1
            several = key == "alpha" and len(parts) > 1 and all(is_number(part) for part in parts)
            share = f"; a share is written as a number, {key}=0.1" if value.endswith("%") else ""
            raise InvalidError(key, SEVERAL_ALPHAS if several else f"{key} takes one number, not {value!r}{share}")
    elif isinstance(value, bool) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        several = key == "alpha" and isinstance(value, Iterable)
        raise InvalidError(key, SEVERAL_ALPHAS if several else f"{key} takes one number, not {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # an array or tensor of several
        raise InvalidError(
            key, SEVERAL_ALPHAS if key == "alpha" else f"{key} takes one number, not {value!r}"
        ) from None
    if not math.isfinite(number):
        raise InvalidError(key, f"{key} must be finite, not {value}")
    return number + 0.0  # −0 and 0 are one strength and print alike


def _seed(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.lstrip("-").isdigit() and len(value) <= 20:
        value = int(value)
    try:
        seed = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        seed = -1
    if not 0 <= seed < 2**64:
        raise InvalidError("seed", f"seed takes one whole number, 0 ≤ seed < 2^64, not {value!r}")
    return seed


def _named(key: str, known: tuple[str, ...], value: Any) -> str:
    name = str(value).strip().replace("-", "_")
    if name not in known:
        raise InvalidError(key, f"unknown {key} {name!r}; known: {listed(known)}.{near(name, known)}")
    return name


def _scale(value: Any) -> str:
    name = str(value).strip().replace("-", "_")
    if name not in SCALES:
        _named("scale", SCALES.names(), name)
    return SCALES[name].name


READERS: Final = {
    "alpha": lambda v: _float("alpha", v),
    "scale": _scale,
    "kind": lambda v: _named("kind", KINDS, v),
    "seed": _seed,
    "period": lambda v: None if v is None else _float("period", v),
}


def vector(direction: Any) -> tuple[NDArray[np.float64] | None, str | None]:
    """Return a direction as a read-only float64 vector, and its digest."""
    if direction is None:
        return None, None
    import numpy as np

    if hasattr(direction, "detach"):
        direction = direction.detach().cpu().double()
    try:
        found = np.array(direction, dtype=np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"direction takes a vector of numbers, not {direction!r}; load a file first.") from None
    if found.ndim != 1 or not found.size:
        raise UsageError(f"direction takes one vector [dim], not an array of shape {found.shape}.")
    found.flags.writeable = False
    return found, hashlib.blake2b(found.tobytes(), digest_size=8).hexdigest()


def number_text(number: float) -> str:
    """Return the shortest text that reads back as the number."""
    return repr(number).removesuffix(".0")
