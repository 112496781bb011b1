"""One page per metric, one per chapter of families, and an overview, all from the registry."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import mkdocs_gen_files
import yaml

from dynprobe.metrics import ids, spec
from dynprobe.metrics._registry import MetricSpec, entry

CHAPTERS = yaml.safe_load((Path(__file__).parent / "chapters.yaml").read_text(encoding="utf-8"))
INVARIANCES = {
    "R": "one rotation of all states",
    "R_l": "a rotation of its own at every depth",
    "S": "one positive factor on all states",
    "S_l": "a positive factor of its own at every depth",
    "P": "reordering the units",
    "T": "length: its expectation does not grow with more steps or tokens of the same kind",
    "scale-per-state": "a positive factor on any single state",
    "shift": "an added constant",
}
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")


def page_of(metric_id: str) -> str:
    """Return the path of a metric's page: ``kappa.phase/1`` → ``metrics/kappa.phase-1.md``."""
    return f"metrics/{metric_id.replace('/', '-')}.md"


def text(value: str) -> str:
    """Return text as Markdown that shows exactly it."""
    return re.sub(r"([\\`*_{}\[\]|$])", r"\\\1", escape(value, quote=False))


def chapter_of(family: str) -> dict[str, Any]:
    """Return the chapter a family stands in."""
    return next((c for c in CHAPTERS if family in c["families"]), CHAPTERS[-1])


def facts(s: MetricSpec) -> Iterator[tuple[str, str]]:
    """The rows of the table on a metric's page."""
    yield "Input", f"`{s.input}`"
    yield "Range", text(s.value_range)
    yield "Unit", text(s.unit)
    kept = [INVARIANCES[key] for key in INVARIANCES if key in s.invariances]
    yield "Unchanged by", "; ".join(kept) if kept else "nothing that is declared"
    if s.params:
        yield "Parameters", ", ".join(f"`{k}={v}`" for k, v in s.params.items()) + " (defaults; part of the id)"
    if s.column:
        yield "Column", f"`{s.column}`"
    for level, how in s.levels.items():
        yield f"In `{level}s`", text(how)
    yield "Lists", ", ".join(f"`{g}`" for g in sorted(s.groups))
    yield "Digest", f"`{s.digest}`"
    yield "Source", text(s.source)


def vector(line: str) -> tuple[str, str, str]:
    """Take a conformance vector apart: name, input, expected value."""
    name, body = "", line
    if named := re.match(r"([a-z]+-\d+): (.*)", line):
        name, body = named.groups()
    given, arrow, expected = body.partition(" → ")
    if not arrow:
        given, _, expected = body.rpartition(": ")
    return name, given, expected


def notes(s: MetricSpec) -> str:
    """What the module that defines a metric says about it."""
    module = sys.modules.get(getattr(entry(s.id).compute, "__module__", ""))
    paragraphs = (inspect.getdoc(module) or "").split("\n\n")[1:] if module else []
    return "\n\n".join(_ROLE.sub(r"`\1`", p).replace("``", "`") for p in paragraphs)


def metric_page(s: MetricSpec) -> Iterator[str]:
    """The lines of one page."""
    chapter = chapter_of(s.family)
    yield f"# {s.id}\n\n{text(s.sentence)}\n"
    if s.latex:  # ours all have one; a metric of another package may do without
        yield f"$$\n{s.latex}\n$$\n"
    yield '<div class="facts" markdown>\n\n| | |\n|---|---|'
    yield from (f"| {key} | {value} |" for key, value in facts(s))
    yield "\n</div>\n\n## Definition\n"
    yield "The text below is normative; the digest is made from it, the input, the parameters and the vectors.\n"
    yield "\n".join(f"> {text(clause)}  " for clause in re.split(r"(?<=;) ", s.formula)) + "\n"
    if s.vectors:
        yield "## Conformance vectors\n\n| name | input | expected |\n|---|---|---|"
        yield from ("| " + " | ".join(text(part) for part in vector(line)) + " |" for line in s.vectors)
    if found := notes(s):
        yield f"\n## Notes\n\n{found}\n"
    yield f"\nMore of its kind: [{chapter['title']}]({chapter['slug']}/index.md).\n"


def table(members: list[str]) -> Iterator[str]:
    """A table of metrics with links."""
    yield "| metric | what it measures | range | unit |\n|---|---|---|---|"
    for s in map(spec, members):
        link = f"[`{s.id}`]({Path(page_of(s.id)).name})"
        yield f"| {link} | {text(s.sentence)} | {text(s.value_range)} | {text(s.unit)} |"


def write(path: str, lines: Iterator[str] | list[str]) -> None:
    with mkdocs_gen_files.open(path, "w") as out:
        out.write("\n".join(lines))


def main() -> None:
    overview = [
        "# Metrics\n",
        f"{len(ids())} definitions. An id is `family.estimator/major`; the major number changes when any conformance "
        "vector changes, so equal ids mean equal numbers. A digest of the definition stands in every Parquet file "
        "beside the column it made. A value that cannot be computed is NaN with a reason, never 0.\n",
        "`dynprobe metrics` prints the same list, `dynprobe metrics kappa.phase/1` one in full; in Python "
        '`dp.metrics.compute("kappa.phase/1", x)` computes one from arrays.\n',
    ]
    summary = ["- [Overview](index.md)"]
    for chapter in CHAPTERS:
        members = [i for i in ids() if chapter_of(spec(i).family) is chapter]
        if not members:
            continue
        rows = list(table(members))
        home = f"{chapter['slug']}/index.md"
        overview += [f"\n## [{chapter['title']}]({home})\n", chapter["text"] + "\n", *rows]
        summary.append(f"- [{chapter['title']}]({home})")
        summary += [f"    - [{i}]({Path(page_of(i)).name})" for i in members]
        lower = [line.replace("](", "](../") for line in (chapter["text"] + "\n", *rows)]
        write(f"metrics/{home}", [f"# {chapter['title']}\n", *lower])
        for metric_id in members:
            write(page_of(metric_id), metric_page(spec(metric_id)))
    write("metrics/index.md", overview)
    write("metrics/SUMMARY.md", summary)


main()
