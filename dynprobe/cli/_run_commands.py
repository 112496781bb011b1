"""What ``run`` and ``plan`` do: one call of the protocol, then printing."""

from __future__ import annotations

from typing import Any

from dynprobe.cli import _render
from dynprobe.cli._carry_out import carry_out
from dynprobe.cli._commands import print_json, settings_of

__all__ = ["plan_command", "run_command"]


def run_command(given: dict[str, Any]) -> None:
    """``dynprobe run``."""
    from dynprobe.protocols import run

    carry_out(run, given, settings_of, tables=True)


def plan_command(given: dict[str, Any]) -> None:
    """``dynprobe plan`` and ``--dry-run``."""
    as_json = bool(given.pop("json", False))
    settings = settings_of(given)
    from dynprobe.protocols import plan

    cost = plan(settings.pop("model"), **settings)
    print_json(cost.as_dict()) if as_json else _render.plan(cost)
