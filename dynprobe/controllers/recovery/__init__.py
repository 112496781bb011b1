"""Recovery: detectors, actuators and the modes made of them."""

from dynprobe.controllers.recovery._actuators import ACTUATORS, Clamp, Shrink, Slerp, Subspace
from dynprobe.controllers.recovery._detector import Always, Deadband, Never, Oracle
from dynprobe.controllers.recovery._guard import GUARD_WINDOW, Guard
from dynprobe.controllers.recovery._mode import Mode
from dynprobe.controllers.recovery._modes import MODES, adopt, make_mode, mode_name
from dynprobe.controllers.recovery._operators import LoraPair, TopComponents
from dynprobe.controllers.recovery._recovery import Recovery, Timing
from dynprobe.controllers.recovery._recync import Recync
from dynprobe.controllers.recovery._replay import Replay
from dynprobe.controllers.recovery._sampling import Narrowing
from dynprobe.controllers.recovery._signals import SIGNALS, Signal
from dynprobe.controllers.recovery._str import STR_WINDOW, Gate, StrControl
from dynprobe.controllers.recovery._words import RecoveryWords, parse_recovery

__all__ = [
    "ACTUATORS",
    "GUARD_WINDOW",
    "MODES",
    "SIGNALS",
    "STR_WINDOW",
    "Always",
    "Clamp",
    "Deadband",
    "Gate",
    "Guard",
    "LoraPair",
    "Mode",
    "Narrowing",
    "Never",
    "Oracle",
    "Recovery",
    "RecoveryWords",
    "Recync",
    "Replay",
    "Shrink",
    "Signal",
    "Slerp",
    "StrControl",
    "Subspace",
    "Timing",
    "TopComponents",
    "adopt",
    "make_mode",
    "mode_name",
    "parse_recovery",
]
