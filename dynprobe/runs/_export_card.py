"""The page of an exported run: what the tables are, what every column means, and how it was made.

In the ``hf`` format it is a dataset card, whose front matter tells ``datasets`` and the hub's viewer which table lies
where and what its columns are.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import yaml

from dynprobe.runs._card import facts_lines
from dynprobe.runs._export_formats import FORMATS
from dynprobe.runs._export_tables import describe_columns
from dynprobe.runs._manifest import Manifest
from dynprobe.runs._schema import TABLES

__all__ = ["export_card", "main_table"]

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip


def export_card(
    side: Mapping[str, Any], manifest: Manifest, schemas: Mapping[str, pa.Schema], licence: str | None, title: str
) -> str:
    """Return the ``README.md`` of an export.

    Args:
        side: The sidecar.
        manifest: Manifest of the run, redacted where the export is.
        schemas: Schema of every table.
        licence: Identifier of the licence the user gives the data, or None.
        title: Name of the run.
    """
    lines: list[str] = []
    if side["to"] == "hf":
        lines += [
            "---",
            yaml.safe_dump(_front(side, schemas, licence, title), sort_keys=False, width=120).rstrip(),
            "---",
        ]
    lines += [
        "",
        f"# {title}",
        "",
        f"A [dynprobe](https://pypi.org/project/dynprobe/) run, {manifest.status}, exported",
    ]
    lines[-1] += f" as {side['to']}."
    lines += [""] + [f"- {name}: {_cell(value)}" for name, value in facts_lines(manifest).items()]
    lines += _reading(side) + _made(manifest) + _licence(manifest, licence, bool(side["removed"]))
    if side["removed"]:
        lines += ["", "## What was removed", "", *_REMOVED_NOTE, "", *[f"- {_cell(line)}" for line in side["removed"]]]
    if side["remarks"]:
        lines += ["", "## Remarks", "", *[f"- {_cell(line)}" for line in side["remarks"]]]
    lines += ["", "## Tables", "", "| table | rows | what |", "|---|---:|---|"]
    lines += [f"| {t['name']} | {t['rows']:,} | {_cell(TABLES[t['table']].description)} |" for t in side["tables"]]
    for name, schema in schemas.items():
        lines += ["", f"### {name}", "", "| column | type | unit | metric | what |", "|---|---|---|---|---|"]
        for column in describe_columns(schema):
            said = column.get("aggregation", "")
            what = column.get("description", "") + (f" ({said})" if said else "")
            kind = f"{column['dtype']}{column['shape']}" if "dtype" in column else column["type"]
            cells = (column["name"], kind, column.get("unit", ""), column.get("id", ""), what)
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines).lstrip("\n") + "\n"


def _front(
    side: Mapping[str, Any], schemas: Mapping[str, pa.Schema], licence: str | None, title: str
) -> dict[str, Any]:
    tables = [t for t in side["tables"] if t["files"]]
    main = main_table({t["name"]: t["rows"] for t in tables})
    rows = sum(t["rows"] for t in tables)
    front: dict[str, Any] = {
        "pretty_name": title,
        "tags": ["dynprobe", "interpretability", "hidden-states"],
        "size_categories": [next((name for size, name in _SIZES if rows < size), "1B<n<10B")],
    }
    if licence is not None:
        front["license"] = licence
    front["configs"] = [
        {
            "config_name": t["name"], "data_files": [{"split": "train", "path": f"{t['name']}/*.parquet"}],
            **({"default": True} if t["name"] == main else {}),
        }
        for t in tables
    ]  # fmt: skip
    front["dataset_info"] = [
        {
            "config_name": t["name"],
            "features": [{"name": field.name, **_feature(field.type)} for field in schemas[t["name"]]],
        }
        for t in tables
    ]
    return front


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """A type in the words of the front matter, as ``datasets`` writes it."""
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _feature(kind.value_type)
        out: dict[str, Any] = {"list": inner["dtype"] if set(inner) == {"dtype"} else inner}
        return out | ({"length": kind.list_size} if pa.types.is_fixed_size_list(kind) else {})
    if pa.types.is_dictionary(kind):
        return {"dtype": "string"}
    return {"dtype": {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(kind), str(kind))}


def _reading(side: Mapping[str, Any]) -> list[str]:
    held = [t for t in side["tables"] if t["files"]]
    main = main_table({t["name"]: t["rows"] for t in held})
    lines = ["", "## To read it", "", "```python"]
    if main is not None:
        file = f"FOLDER/{next(t['files'][0] for t in held if t['name'] == main)}"
        code = FORMATS[side["to"]].code
        lines += [code.replace("{file}", file).replace("{table}", main), ""] if code else []
    again = 'import dynprobe as dp\nrun = dp.ingest("FOLDER", out="runs")   # a run folder again, the same tables'
    return [*lines, again, "```"]


def main_table(rows: Mapping[str, int]) -> str | None:
    """Return the table that a reader wants first: the results, else the first one that has rows.

    Example:
        >>> main_table({"prompts": 3, "samples": 6}), main_table({"prompts": 3, "fits": 2}), main_table({"fits": 0})
        ('samples', 'fits', None)
    """
    held = [name for name, n in rows.items() if n]
    return next((name for name in ("samples", "items", "fits", "trials") if name in held), next(iter(held), None))


def _made(manifest: Manifest) -> list[str]:
    command = manifest.command
    text = shlex.join(command) if isinstance(command, list) else command
    text = text or "# made from Python; the configuration stands in dynprobe.json"
    return ["", "## To make it again", "", "```sh", text.replace("```", "` ` `"), "```"]


def _licence(manifest: Manifest, licence: str | None, redacted: bool) -> list[str]:
    given = (
        f"The publisher of this export gives it the licence `{licence}`."
        if licence
        else "No licence was given for this export; ask whoever published it before using it."
    )
    holds = (
        "Texts were removed; numbers of a model's behaviour are left."
        if redacted
        else f"It holds prompts, and what {_cell(manifest.model_name)} made of them: the terms of the model and of the "
        "prompts apply to those. The prompts that come with dynprobe are CC0 (source `builtin`)."
    )
    return ["", "## Licence", "", given, holds]


_REMOVED_NOTE = (
    "Texts were removed from this export. Hashes stand in their place, so that runs on the same prompts still pair.",
    "A hash confirms a text that someone already suspects. Where tables with a row per position were kept, someone who",
    "has the same model can try every token in turn and see which gives the stored numbers.",
)


def _cell(value: Any) -> str:
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in text)
