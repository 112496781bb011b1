"""The command line, from the commands themselves."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import mkdocs_gen_files
import typer

import dynprobe.cli
from dynprobe.cli._app import app

_DEFAULT = re.compile(r"\s*\[default: (.*?)\]")
_LIST = re.compile(r"<list\[(.*?)\]>")


def root() -> Any:
    """Return the whole command: every module of the room enters its own when imported."""
    for module in pkgutil.iter_modules(dynprobe.cli.__path__):
        if module.name.endswith("_app"):
            importlib.import_module(f"dynprobe.cli.{module.name}")
    return typer.main.get_command(app)


def cell(value: Any) -> str:
    """Return text as it may stand in a table."""
    return re.sub(r"([\\*_|$<])", r"\\\1", " ".join(str(value).split()))


def row(parameter: Any, context: Any) -> str:
    """Return one row of the table of parameters: spelling, default, what it does."""
    spelled, text = parameter.get_help_record(context)
    found = _DEFAULT.search(text)
    shown = f"`{found[1]}`" if found else ""
    spelled = _LIST.sub(r"<\1>", spelled)
    return f"| `{spelled}` | {shown} | {cell(_DEFAULT.sub('', text))} |"


def command(path: str, found: Any, level: int) -> Iterator[str]:
    """The section of one command, and of those under it."""
    context = found.make_context(path, [], resilient_parsing=True)
    yield f"\n{'#' * level} {path}\n"
    yield f"{inspect.cleandoc(found.help or '').replace('$', chr(92) + '$')}\n"
    yield f"```\n{' '.join([path, *found.collect_usage_pieces(context)])}\n```\n"
    shown = [p for p in found.params if not getattr(p, "hidden", False)]
    if shown:
        yield "| | default | |\n|---|---|---|"
        yield from (row(p, context) for p in shown)
        yield ""
    if found.epilog:
        lines = [line.strip() for line in inspect.cleandoc(found.epilog).splitlines()]
        examples = [line for line in lines if line and line != "Examples:"]
        yield "\n".join(["```", *examples, "```\n"])
    for name, inner in sorted(getattr(found, "commands", {}).items()):
        if not inner.hidden:
            yield from command(f"{path} {name}", inner, min(level + 1, 3))


def main() -> None:
    page = [
        "# Command line\n",
        "Every command is one Python function with the same parameter names. `-` and `_` in a flag are the same. "
        "Progress goes to stderr and is silent when stderr is no terminal; `--json` prints one object.\n",
        "Exit codes: 0 done, 1 failed, 2 usage, 3 refused by a self-test, 130 interrupted (it can be continued).\n",
        "One small language names sites and strengths for reading and writing, such as "
        "`alpha=0.1,scale=relnorm,layers=6:9,positions=last,phase=prefill`; "
        "see [sweeps and thresholds](../perturbation.md).\n",
    ]
    for name, found in sorted(root().commands.items()):
        if not found.hidden:
            page += command(f"dynprobe {name}", found, 2)
    with mkdocs_gen_files.open("reference/cli.md", "w") as out:
        out.write("\n".join(page))


main()
