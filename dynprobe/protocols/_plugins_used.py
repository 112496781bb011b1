"""Which plug-ins a run uses: what its settings name that another package brings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprobe._plugins import GROUPS, Registry, deciding, own, plugins
from dynprobe.controllers.recovery import parse_recovery
from dynprobe.probes import Perturb, Subject
from dynprobe.probes._adapters import ADAPTERS
from dynprobe.protocols._config import RunConfig

__all__ = ["adapter_used", "changed", "in_words", "installed", "plugins_used", "warn_if_changed"]


def plugins_used(config: RunConfig, perturbs: Sequence[Perturb], subject: Subject) -> list[dict[str, str]]:
    """Return group, name, package and version of every plug-in that a run uses, in the order of the groups.

    Args:
        config: The settings; metrics, modes and the engine stand there by name.
        perturbs: What is written, under scales by name.
        subject: The subject, which knows the adapter that read it.
    """
    given = getattr(config, "mode", ())
    modes = [given] if isinstance(given, str) else [*given]
    kind = "recover:"  # a mode that acts in another library's loop is told in words
    words = [text for text in getattr(config, "controllers", ()) if text.startswith(kind)]
    if words and plugins("dynprobe.controllers"):
        modes += [parse_recovery(text.removeprefix(kind)).mode for text in words]
    named: dict[str, Iterable[str]] = {
        "dynprobe.metrics": (name.split("/")[0] for name in config.measured_metrics),
        "dynprobe.scales": (perturb.scale for perturb in perturbs),
        "dynprobe.controllers": (mode.removeprefix("random:") for mode in modes),
        "dynprobe.adapters": filter(None, [subject.facts.get("adapter")]),
        "dynprobe.engines": [config.engine],
    }
    found = []
    for group, names in named.items():
        if plugins(group):  # otherwise nothing there is another package's
            registry: Registry[Any] = own(GROUPS[group])
            found += registry.used(names)
    return found


def installed(then: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return what bears the names of some recorded plug-ins in this installation."""
    found: list[Mapping[str, str]] = []
    for plugin in deciding(then):
        registry: Registry[Any] = own(GROUPS[plugin["group"]])
        found += registry.used([plugin["name"]])
    return found


def changed(then: Iterable[Mapping[str, str]], now: Iterable[Mapping[str, str]]) -> str:
    """Say how the plug-ins that decided numbers differ from those that would decide them; empty where they do not.

    Args:
        then: What was recorded.
        now: What would be recorded.
    """
    old, new = ([dict(plugin) for plugin in deciding(found)] for found in (then, now))
    return "" if old == new else f"with {in_words(old)}, and this is {in_words(new)}"


def warn_if_changed(place: Path, then: Iterable[Mapping[str, str]], now: Iterable[Mapping[str, str]]) -> None:
    """Warn where something finished, which is handed back, was made with other versions of plug-ins."""
    how = changed(then, now)
    if how:
        warnings.warn(
            f"{place} was made {how}: these are the numbers of then. To make them anew, name another folder with --out",
            stacklevel=3,
        )


def adapter_used(subject: Subject) -> dict[str, dict[str, str]]:
    """Return the adapter of another package that read a subject, with its version; nothing for dynprobe's own."""
    name = subject.facts.get("adapter")
    if name is None:
        return {}
    plugin = ADAPTERS.plugin(name)
    return {"adapter": {"name": name} if plugin is None else plugin.fact()}


def in_words(found: Sequence[Mapping[str, str]]) -> str:
    """Return packages and versions as a list in words."""
    return ", ".join(sorted({f"{p['package']} {p['version']}" for p in found})) or "no plug-in"
