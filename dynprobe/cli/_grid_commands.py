"""What ``sweep``, ``threshold`` and ``iterate`` do: one call of a protocol, then printing."""

from __future__ import annotations

from typing import Any

from dynprobe.cli._carry_out import carry_out
from dynprobe.cli._commands import settings_of
from dynprobe.errors import UsageError

__all__ = ["iterate_command", "sweep_command", "threshold_command"]


def sweep_command(given: dict[str, Any]) -> None:
    """``dynprobe sweep``."""
    from dynprobe.protocols import SweepConfig, sweep

    def settings(typed: dict[str, Any]) -> dict[str, Any]:
        found = settings_of(typed, SweepConfig)
        if "sine" in found.get("kind", ()) and found.get("period") is None:
            raise UsageError("--kind sine needs its period in tokens; add --period 8")
        return found

    carry_out(sweep, given, settings)


def threshold_command(given: dict[str, Any]) -> None:
    """``dynprobe threshold``."""
    from dynprobe.protocols import ThresholdConfig, threshold

    carry_out(threshold, given, lambda typed: settings_of(typed, ThresholdConfig))


def iterate_command(given: dict[str, Any]) -> None:
    """``dynprobe iterate``."""
    from dynprobe.protocols import IterateConfig, iterate

    carry_out(iterate, given, lambda typed: settings_of(typed, IterateConfig, looped=True))
