"""What ``eval`` does: one call of the protocol, then printing."""

from __future__ import annotations

from typing import Any

from dynprobe.cli import _render
from dynprobe.cli._commands import print_json, settings_of
from dynprobe.cli._progress import Listener

__all__ = ["eval_command"]

#: Settings that the other commands refuse or read in another way.
_OWN = ("num_fewshot", "apply_chat_template")


def eval_command(given: dict[str, Any]) -> None:
    """``dynprobe eval``."""
    from dynprobe.protocols import EvaluateConfig, evaluate

    as_json, quiet = bool(given.pop("json", False)), bool(given.get("quiet", False))
    own = {name: given.pop(name) for name in _OWN if name in given}
    settings = settings_of(given, EvaluateConfig) | own
    listener = Listener(quiet=quiet or as_json, tables=False)
    with listener:
        done = evaluate(settings.pop("model"), settings.pop("tasks", ()), listener=listener, **settings)
    if as_json:
        print_json({"run": str(done.path), "status": done.status, "summary": done.summary})
    else:
        _render.run(done)
