"""What a run says about itself to a person: the README of its folder, and the facts a person asks for first.

Both are made from the manifest alone. Names and texts in it come from users, so everything is escaped for the place it
is shown in.
"""

from __future__ import annotations

import html
import shlex
from pathlib import Path

from dynprobe.runs._json import dumps
from dynprobe.runs._manifest import Manifest
from dynprobe.runs._protocol import MAIN_TABLE, in_short, protocol_of
from dynprobe.runs._schema import TABLES
from dynprobe.runs._secrets import scrub_command
from dynprobe.runs._tables import column_facts

__all__ = ["card", "facts_lines"]


def card(folder: Path, manifest: Manifest) -> str:
    """Return the README of a run folder as Markdown."""
    rows = manifest.rows()
    facts = column_facts(folder, manifest)
    lines = [
        f"# {_md(folder.name)}",
        "",
        f"A [dynprobe](https://pypi.org/project/dynprobe/) run, {manifest.status}.",
        "",
    ]
    lines += [f"- {name}: {_md(value)}" for name, value in facts_lines(manifest).items()]
    lines += ["", "## To run it again", "", *_block(_command(folder, manifest), "sh")]
    lines += [
        "",
        "## To read it",
        "",
        *_block(f"import dynprobe as dp\nrun = dp.open({str(folder)!r})\n{_reading(manifest)}", "python"),
    ]
    lines += _figures(manifest)
    lines += ["", "## Tables", "", "| table | rows | what |", "|---|---:|---|"]
    lines += [f"| {name} | {rows[name]:,} | {_md(TABLES[name].description)} |" for name in TABLES if name in rows]
    lines += ["", "## Columns", "", "| table | column | type | unit | metric | what |", "|---|---|---|---|---|---|"]
    for row in facts.to_dict("records"):
        cells = (row[k] for k in ("table", "column", "dtype", "unit", "id", "description"))
        lines.append("| " + " | ".join(_md(cell) for cell in cells) + " |")
    lines += ["", "## Configuration", "", *_block(dumps(manifest.config, indent=1), "json"), ""]
    return "\n".join(lines)


def _figures(manifest: Manifest) -> list[str]:
    """The pictures that were drawn, or how to draw them."""
    known = manifest.model_extra or {}
    if files := known.get("figures"):
        shown = [f"![{Path(file).stem}]({file})" for file in files if str(file).endswith(".png")]
        return ["", "## Figures", "", *shown]
    if why := known.get("no_figures"):
        return ["", "## Figures", "", f"None were drawn: {_md(why)}. `run.plot.write()` draws them at any time."]
    return []


def facts_lines(manifest: Manifest) -> dict[str, str]:
    """Return the facts a person asks for first."""
    lines = {"model": manifest.model_name, "id": manifest.id8, "made": manifest.created}
    lines["protocol"] = protocol_of(manifest.config)
    lines["perturbation"] = in_short(manifest) or "none"
    for name in ("device", "dtypes", "noise_floor"):
        value = getattr(manifest, name)
        if value is not None:
            lines[name.replace("_", " ")] = value if isinstance(value, str) else dumps(value)
    if isinstance(manifest.batch_plan, list):
        lines["batches"] = f"{len(manifest.finished)} of {len(manifest.batch_plan)}"
    if manifest.versions.get("dynprobe"):
        lines["dynprobe"] = str(manifest.versions["dynprobe"])
    return lines


def _reading(manifest: Manifest) -> str:
    """The expressions that give the tables a reader wants first."""
    table = MAIN_TABLE[protocol_of(manifest.config)]
    if table == "trials":
        return 'run.table("fits"), run.table("trials")'
    return "run.samples" + (', run.table("conditions")' if protocol_of(manifest.config) == "sweep" else "")


def _command(folder: Path, manifest: Manifest) -> str:
    command = scrub_command(manifest.command)
    if isinstance(command, list):
        return shlex.join(command)
    return command or f"# made from Python by dynprobe.run(…) with the configuration in {folder.name}/manifest.json"


def _block(text: str, language: str) -> list[str]:
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{language}", text, fence]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _md(text: str) -> str:
    escaped = html.escape(_one_line(str(text)), quote=False)
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in escaped)
