"""What ``eval`` does: one call of the protocol, then printing."""

from __future__ import annotations

from typing import Any

from dynprobe.cli._carry_out import carry_out
from dynprobe.cli._commands import settings_of

__all__ = ["eval_command"]

#: Settings that the other commands refuse or read in another way.
_OWN = ("num_fewshot", "apply_chat_template")


def eval_command(given: dict[str, Any]) -> None:
    """``dynprobe eval``."""
    from dynprobe.protocols import EvaluateConfig, evaluate

    own = {name: given.pop(name) for name in _OWN if name in given}
    carry_out(evaluate, given, lambda typed: {"tasks": ()} | settings_of(typed, EvaluateConfig) | own)
