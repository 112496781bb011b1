"""What ``sweep``, ``threshold`` and ``iterate`` do: one call of a protocol, then printing."""

from __future__ import annotations

from typing import Any

from dynprobe.cli import _render
from dynprobe.cli._commands import print_json, settings_of
from dynprobe.cli._progress import Listener
from dynprobe.errors import UsageError

__all__ = ["iterate_command", "sweep_command", "threshold_command"]


def sweep_command(given: dict[str, Any]) -> None:
    """``dynprobe sweep``."""
    from dynprobe.protocols import SweepConfig, sweep

    done, as_json = _carried_out(sweep, SweepConfig, given)
    _as_json(done) if as_json else _render.run(done)


def threshold_command(given: dict[str, Any]) -> None:
    """``dynprobe threshold``."""
    from dynprobe.protocols import ThresholdConfig, threshold

    done, as_json = _carried_out(threshold, ThresholdConfig, given)
    _as_json(done) if as_json else _render.run(done)


def iterate_command(given: dict[str, Any]) -> None:
    """``dynprobe iterate``."""
    from dynprobe.protocols import IterateConfig, iterate

    done, as_json = _carried_out(iterate, IterateConfig, given)
    _as_json(done) if as_json else _render.run(done)


def _carried_out(protocol: Any, kind: Any, given: dict[str, Any]) -> tuple[Any, bool]:
    as_json, quiet = bool(given.pop("json", False)), bool(given.get("quiet", False))
    settings = settings_of(given, kind, looped=protocol.__name__ == "iterate")
    for key in ("scale", "kind", "criterion"):
        if isinstance(settings.get(key), list):
            settings[key] = tuple(item for text in settings[key] for item in str(text).replace("+", ",").split(","))
    if "sine" in settings.get("kind", ()) and settings.get("period") is None and protocol.__name__ == "sweep":
        raise UsageError("--kind sine needs its period in tokens; add --period 8")
    listener = Listener(quiet=quiet or as_json, tables=False)
    with listener:
        done = protocol(settings.pop("model"), listener=listener, **settings)
    return done, as_json


def _as_json(done: Any) -> None:
    print_json({"run": str(done.path), "status": done.status, "summary": done.summary})
