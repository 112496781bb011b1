"""What every command that leaves a run does: settings, the protocol with its progress, then the run is printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dynprobe.cli import _render
from dynprobe.cli._commands import print_json
from dynprobe.cli._progress import Listener

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["carry_out"]


def carry_out(
    protocol: Callable[..., Run],
    given: dict[str, Any],
    settings_of: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    kind: type[Listener] = Listener,
    tables: bool = False,
) -> None:
    """Carry a protocol out and print its run.

    Args:
        protocol: Takes the model and its settings by name.
        given: What was typed.
        settings_of: Makes settings of it.
        kind: Class of the listener.
        tables: Whether a terminal shows the table over the first prompts.
    """
    as_json, quiet = bool(given.pop("json", False)), bool(given.get("quiet", False))
    settings = settings_of(given)
    listener = kind(quiet=quiet or as_json, tables=tables)
    with listener:
        done = protocol(settings.pop("model"), listener=listener, **settings)
    if as_json:
        print_json({"run": str(done.path), "status": done.status, "summary": done.summary})
    else:
        _render.run(done, since=listener.began)
