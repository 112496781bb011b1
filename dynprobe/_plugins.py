"""What other packages add: found by entry points, imported when first asked for by name.

Each kind of thing that can be added (a metric, a noise scale, …) has one :class:`Registry`. Its own things stand in a
table ``name → "module:attribute"``, one line each; those of other packages stand in the entry points of its group,
which have the same form. A name of dynprobe's own is never shadowed, and one that two packages claim is neither's.

Looking up a name of dynprobe's own reads no metadata. Listing names reads metadata and imports nothing. A plug-in that
cannot be loaded is an error where its name is asked for and one line of warning where it is only passed by.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from dynprobe.errors import DynprobeError, PluginError, UsageError, did_you_mean

__all__ = ["GROUPS", "NUMBER_GROUPS", "Plugin", "Registry", "Status", "deciding", "own", "plugins", "statuses"]

T = TypeVar("T")

#: Group of entry points → where its registry stands.
GROUPS: Mapping[str, str] = {
    "dynprobe.metrics": "dynprobe.metrics._registry:PLUGINS",
    "dynprobe.scales": "dynprobe.probes._scales:SCALES",
    "dynprobe.controllers": "dynprobe.controllers.recovery._modes:MODES",
    "dynprobe.adapters": "dynprobe.probes._adapters:ADAPTERS",
    "dynprobe.exporters": "dynprobe.runs._export_formats:FORMATS",
    "dynprobe.engines": "dynprobe.engines._registry:ENGINES",
}
#: Groups whose things decide numbers: another version of one of them may compute another number.
NUMBER_GROUPS = ("dynprobe.metrics", "dynprobe.scales", "dynprobe.controllers", "dynprobe.adapters")


@dataclass(frozen=True)
class Plugin:
    """One entry point of another package.

    Attributes:
        group: Group of entry points.
        name: What it is called by.
        package: The package that brings it.
        version: Version of that package.
        value: ``module:attribute``.
    """

    group: str
    name: str
    package: str
    version: str
    value: str

    def __str__(self) -> str:
        return f"{self.name!r} of {self.package} {self.version} ({self.group} = {self.value})"

    def fact(self) -> dict[str, str]:
        """Return what a manifest records of it."""
        return {"group": self.group, "name": self.name, "package": self.package, "version": self.version}


@dataclass(frozen=True)
class Status:
    """Whether a plug-in loads.

    Attributes:
        plugin: The plug-in.
        error: Why it does not; empty where it does.
    """

    plugin: Plugin
    error: str = ""


def deciding(found: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return those of the recorded plug-ins that decide numbers; an engine or a format does not.

    Example:
        >>> deciding([{"group": "dynprobe.engines", "name": "threads", "package": "acme", "version": "1.0"}])
        []
    """
    return [plugin for plugin in found if plugin["group"] in NUMBER_GROUPS]


@cache
def plugins(group: str) -> tuple[Plugin, ...]:
    """Return the entry points of a group, by name and package; nothing is imported.

    Example:
        >>> all(p.group == "dynprobe.metrics" for p in plugins("dynprobe.metrics"))
        True
    """
    found = {_plugin(point) for point in entry_points(group=group)}
    return tuple(sorted(found, key=lambda p: (p.name, p.package, p.version)))


def _plugin(point: EntryPoint) -> Plugin:
    package, version = (point.dist.name, point.dist.version) if point.dist is not None else ("?", "?")
    return Plugin(point.group, point.name, package, version, point.value)


def own(value: str) -> Any:
    """Return what ``"module:attribute"`` names."""
    module, _, attribute = value.partition(":")
    found: Any = importlib.import_module(module)
    for part in filter(None, attribute.split(".")):
        found = getattr(found, part)
    return found


class Registry(Generic[T]):
    """Things of one kind by name: dynprobe's own, then those of other packages.

    Args:
        group: Group of entry points.
        kind: What they are, in words.
        builtin: Name → ``"module:attribute"``, or a function that returns the names that are taken.
        check: Turns what a plug-in's entry point names into a thing, or raises ``TypeError`` or ``ValueError``.
    """

    def __init__(
        self,
        group: str,
        kind: str,
        builtin: Mapping[str, str] | Callable[[], Iterable[str]],
        check: Callable[[str, Any], T],
    ) -> None:
        self.group, self.kind, self._builtin, self._check = group, kind, builtin, check
        self._made: dict[str, T] = {}
        self._warned: set[str] = set()
        self._lent: dict[str, T] = {}

    @property
    def builtin(self) -> tuple[str, ...]:
        """Names of dynprobe's own, in the order of its table."""
        return tuple(self._builtin() if callable(self._builtin) else self._builtin)

    def names(self) -> tuple[str, ...]:
        """Return all names: dynprobe's own, then those of plug-ins that may bear theirs. Nothing is imported."""
        ours = self.builtin
        return (*ours, *(p.name for p in plugins(self.group) if p.name not in ours and self._quarrel(p) is None))

    def __iter__(self) -> Any:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._lent or name in self.builtin or any(p.name == name for p in plugins(self.group))

    def plugin(self, name: str) -> Plugin | None:
        """Return the plug-in of a name, or None where the name is dynprobe's own or nobody's."""
        if name in self.builtin:
            return None
        return next((p for p in plugins(self.group) if p.name == name), None)

    def __getitem__(self, name: str) -> T:
        """Return a thing by name.

        Raises:
            UsageError: If nobody has this name.
            PluginError: If two packages have it, or the one that has it cannot be loaded.
        """
        if name in self._lent:
            return self._lent[name]
        if name not in self._made:
            self._made[name] = self._load(name)
        return self._made[name]

    def _load(self, name: str) -> T:
        if name in self.builtin and not callable(self._builtin):
            found: T = own(self._builtin[name])
            return found
        plugin = self.plugin(name)
        if plugin is None:
            raise UsageError(self.unknown(name))
        quarrel = self._quarrel(plugin)
        if quarrel is not None:
            raise PluginError(quarrel)
        return self._of(plugin)

    def _of(self, plugin: Plugin) -> T:
        remove = f"Repair it, or remove it: pip uninstall {plugin.package}"
        try:
            found = own(plugin.value)
        except Exception as error:  # whatever a package of somebody else's raises while it is imported
            raise PluginError(
                f"the {self.kind} {plugin} cannot be loaded: {type(error).__name__}: {error}. {remove}"
            ) from error
        try:
            return self._check(plugin.name, found)
        except (TypeError, ValueError) as error:
            raise PluginError(f"{plugin} is no {self.kind}: {error}. {remove}") from error

    def _quarrel(self, plugin: Plugin) -> str | None:
        """Why a plug-in may not bear its name."""
        if plugin.name in self.builtin:
            return (
                f"the {self.kind} {plugin} has a name of dynprobe's own, which is not replaced. Rename it there, or "
                f"type: pip uninstall {plugin.package}"
            )
        same = [p for p in plugins(self.group) if p.name == plugin.name]
        if len(same) > 1:
            return (
                f"the {self.kind} {plugin.name!r} is in {' and in '.join(f'{p.package} {p.version}' for p in same)}: "
                f"which is meant cannot be told. Type: pip uninstall {same[-1].package}"
            )
        return None

    def unknown(self, name: str) -> str:
        """Say that nobody has a name, with the nearest one that somebody has."""
        known = self.names()
        return f"unknown {self.kind} {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}"

    @contextmanager
    def lent(self, name: str, thing: T) -> Iterator[None]:
        """Give a thing a name for the length of the block, as a suite does that tries it before it is installed."""
        before = dict(self._lent)
        self._lent[name] = thing
        try:
            yield
        finally:
            self._lent = before

    def status(self, plugin: Plugin) -> Status:
        """Try whether a plug-in of this group loads and may bear its name."""
        quarrel = self._quarrel(plugin)
        if quarrel is not None:
            return Status(plugin, quarrel)
        try:
            self[plugin.name]
        except DynprobeError as error:
            return Status(plugin, str(error))
        return Status(plugin)

    def warn_of_broken(self) -> tuple[Plugin, ...]:
        """Load every plug-in of the group; warn once of each that cannot be had. Return those that can."""
        good = []
        for plugin in plugins(self.group):
            error = self.status(plugin).error
            if not error:
                good.append(plugin)
            elif str(plugin) not in self._warned:
                self._warned.add(str(plugin))
                warnings.warn(f"left out: {error.splitlines()[0]}", stacklevel=3)
        return tuple(good)

    def used(self, names: Iterable[str]) -> list[dict[str, str]]:
        """Return what a manifest records of the plug-ins among some names."""
        found = {name: self.plugin(name) for name in names}
        return [plugin.fact() for _, plugin in sorted(found.items()) if plugin is not None]


def statuses() -> list[Status]:
    """Try every installed plug-in of every group."""
    out: list[Status] = []
    for group, where in GROUPS.items():
        if plugins(group):  # the rooms whose groups are empty need not be imported
            registry: Registry[Any] = own(where)
            out += [registry.status(plugin) for plugin in plugins(group)]
    return out
