"""Which plug-ins a run uses: what its settings name that another package brings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynprobe._plugins import GROUPS, NUMBER_GROUPS, Registry, own, plugins
from dynprobe.probes import Perturb, Subject
from dynprobe.protocols._config import RunConfig

__all__ = ["deciding", "in_words", "plugins_used"]


def plugins_used(config: RunConfig, perturbs: Sequence[Perturb], subject: Subject) -> list[dict[str, str]]:
    """Return group, name, package and version of every plug-in that a run uses, in the order of the groups.

    Args:
        config: The settings; metrics, modes and the engine stand there by name.
        perturbs: What is written, under scales by name.
        subject: The subject, which knows the adapter that read it.
    """
    given = getattr(config, "mode", ())
    modes = [given] if isinstance(given, str) else given
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


def deciding(found: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return those that decide numbers; an engine does not."""
    return [plugin for plugin in found if plugin["group"] in NUMBER_GROUPS]


def in_words(found: Sequence[Mapping[str, str]]) -> str:
    """Return packages and versions as a list in words."""
    return ", ".join(sorted({f"{p['package']} {p['version']}" for p in found})) or "no plug-in"
