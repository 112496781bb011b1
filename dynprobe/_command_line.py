"""The command that is being carried out, for the record of what it makes; nothing where a program calls dynprobe."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["COMMAND_LINE"]

#: Words of the command, its name first.
COMMAND_LINE: ContextVar[tuple[str, ...] | None] = ContextVar("command_line", default=None)
