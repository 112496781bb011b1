"""The Python reference: one page per room with everything in its ``__all__``, and the public names first."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import mkdocs_gen_files

import dynprobe

ROOMS = (
    "probes", "protocols", "runs", "metrics", "metrics.statistics", "controllers", "models", "prompts", "engines",
    "claims", "testing", "errors",
)  # fmt: skip


def first_line(thing: Any) -> str:
    """Return the first sentence of a docstring, fit for a table."""
    text = (inspect.getdoc(thing) or "").partition("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|").replace("$", "\\$")


def home(name: str) -> tuple[str, str]:
    """Return the room and the name there of a public name."""
    return dynprobe._PUBLIC[name].removeprefix("dynprobe."), dynprobe._ALIASES.get(name, name)


def documented(module: ModuleType) -> list[str]:
    """Names of a room that have a docstring of their own; plain constants stand in the text of the room."""
    return [n for n in module.__all__ if inspect.isclass(v := getattr(module, n)) or inspect.isroutine(v)]


def room_page(room: str) -> Iterator[str]:
    """The page of one room."""
    module = importlib.import_module(f"dynprobe.{room}")
    names = documented(module)
    yield f"# dynprobe.{room}\n"
    yield f"::: dynprobe.{room}\n    options:\n      members: false\n      show_root_heading: false\n"
    constants = [n for n in module.__all__ if n not in names and not inspect.ismodule(getattr(module, n))]
    if constants:
        yield "Constants: " + ", ".join(f"`{n}`" for n in constants) + ".\n"
    for name in names:
        yield f"::: dynprobe.{room}.{name}\n"


def index_page() -> Iterator[str]:
    """The page of the names that ``import dynprobe as dp`` gives."""
    yield "# Python\n\n`import dynprobe as dp` gives these names. Importing it loads the standard library only.\n"
    yield "| name | |\n|---|---|"
    for name in sorted(dynprobe._PUBLIC, key=str.lower):
        room, inner = home(name)
        yield f"| [`dp.{name}`]({room}.md#dynprobe.{room}.{inner}) | {first_line(getattr(dynprobe, name))} |"
    yield "\n## Rooms\n\n| room | |\n|---|---|"
    for room in ROOMS:
        yield f"| [`dp.{room}`]({room}.md) | {first_line(importlib.import_module(f'dynprobe.{room}'))} |"


def main() -> None:
    summary = ["- [Public names](index.md)", *(f"- [dynprobe.{room}]({room}.md)" for room in ROOMS)]
    for path, lines in [("index", index_page()), ("SUMMARY", summary), *((room, room_page(room)) for room in ROOMS)]:
        with mkdocs_gen_files.open(f"reference/api/{path}.md", "w") as out:
            out.write("\n".join(lines))


main()
