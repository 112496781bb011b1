"""``slerp,gain=0.5,detector=entropy`` ↔ a recovery mode, when it acts and how strongly.

For loops that are not ours, where a text's length is not known beforehand: there is no budget of active tokens, and no
timing by an oracle. Modes that take tokens back need our own loop, and one that only narrows what is drawn from changes
no state, so neither is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

from dynprobe.controllers._controller import Controller
from dynprobe.controllers.recovery._detector import Always, Deadband, Never
from dynprobe.controllers.recovery._modes import make_mode, mode_name
from dynprobe.controllers.recovery._recovery import Timing
from dynprobe.errors import UsageError, did_you_mean

__all__ = ["RecoveryWords", "parse_recovery"]

_EXAMPLE: Final = "slerp,detector=entropy,gain=0.5"
#: As good as no budget.
_ENDLESS: Final = 2**31


@dataclass(frozen=True)
class RecoveryWords:
    """A recovery mode in words.

    Attributes:
        mode: Its name.
        timing: ``detector``, or ``always`` (every token after the context, at the largest gain).
        detector: Signal that is watched.
        m: Tokens above the upper level before it switches on.
        m_off: Tokens below the lower level before it switches off.
        q_lo: Lower level, a quantile on clean text.
        q_hi: Upper level.
        gain: Largest gain.
        site: Where it acts; None where the signal points.

    Raises:
        UsageError: If the mode cannot act in another loop, or a setting has no meaning.

    Example:
        >>> [controller.id for controller in RecoveryWords("slerp", gain=0.25).controllers()]
        ['recovery.slerp/1']
    """

    mode: str
    timing: str = "detector"
    detector: str = "kappa_phase_zmax"
    m: int = 3
    m_off: int = 5
    q_lo: float = 0.75
    q_hi: float = 0.99
    gain: float = 0.5
    site: str | None = None

    def __post_init__(self) -> None:
        if self.timing not in ("detector", "always"):
            raise UsageError(f"timing={self.timing}; it is detector or always")
        self._timing()  # refuses settings that make no detector
        if self.mode in ("none", "dom"):
            why = "does nothing" if self.mode == "none" else "reads its operators from a file; use dp.recover"
            raise UsageError(f"mode {self.mode} {why}")
        for controller in make_mode(self.mode, Never, site=self.site):
            if controller.restarts:
                raise UsageError(
                    f"mode {self.mode} takes tokens back, which only dynprobe's own loop can do; use dp.recover, or "
                    "take a mode that acts on states, such as slerp"
                )
            if controller.needs_sampling:
                raise UsageError(
                    f"mode {self.mode} changes what is drawn and no state, so no likelihood changes; use dp.recover"
                )

    def _timing(self) -> Timing:
        if self.timing == "always":
            return Always(self.gain)
        return Deadband(self.detector, self.m, self.m_off, self.q_lo, self.q_hi, self.gain, 1.0, _ENDLESS)

    def controllers(self) -> list[Controller]:
        """Return new controllers of the mode."""
        return make_mode(self.mode, self._timing, site=self.site)

    def __str__(self) -> str:
        said = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return ",".join([self.mode, *said])


def parse_recovery(text: str) -> RecoveryWords:
    """Return what a text describes: the name of a mode, then ``key=value`` pairs, all with commas between them.

    Args:
        text: Keys are the fields of :class:`RecoveryWords`; what is left out keeps its default.

    Raises:
        UsageError: If there is no such mode or key, a value is not of its kind, or the mode cannot act.

    Example:
        >>> words = parse_recovery("slerp,gain=0.25,q-hi=0.95")
        >>> words.gain, str(words), parse_recovery(str(words)) == words
        (0.25, 'slerp,q_hi=0.95,gain=0.25', True)
    """
    kinds = {f.name: str(f.type) for f in fields(RecoveryWords)}
    values: dict[str, Any] = {}
    for number, pair in enumerate(text.split(",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not number and not equals:
            key, value = "mode", key
        key = key.replace("-", "_")
        if not value:
            raise UsageError(f"recover {text!r}: {pair.strip()!r} is no key=value pair; type for example {_EXAMPLE}")
        if key not in kinds:
            raise UsageError(f"recover {text!r}: unknown key {key!r}.{did_you_mean(key, kinds)}")
        if key in values:
            raise UsageError(f"recover {text!r}: {key} is given twice")
        values[key] = _value(text, key, value, kinds[key])
    if "mode" not in values:
        raise UsageError(f"recover {text!r} names no mode; type for example {_EXAMPLE}")
    return RecoveryWords(**{**values, "mode": mode_name(values["mode"])})


def _value(text: str, key: str, value: str, kind: str) -> Any:
    if kind.startswith("str"):
        return value.replace("-", "_").replace(".", "_").removesuffix("/1") if key == "detector" else value
    try:
        return int(value) if kind == "int" else float(value)
    except ValueError:
        word = "a whole number" if kind == "int" else "a number"
        raise UsageError(f"recover {text!r}: {key}={value}; it is {word}") from None
