"""The run folder: tables, labels and columns, from the schema and the registry."""

from __future__ import annotations

from collections.abc import Iterator

import mkdocs_gen_files

from dynprobe.metrics import columns
from dynprobe.runs._schema import COLUMNS, SCHEMA_VERSION, TABLES, Table

LAYOUT = """
```
runs/<time>_<model>_<id8>/
  manifest.json       schema version, configuration, weights' hashes, versions, self-tests, noise floor, batch plan
  prompts.parquet     what was asked
  conditions.parquet  the arms
  samples/*.parquet   one row per prompt × condition × replicate
  tokens/*.parquet    one row per token
  depths/*.parquet    one row per token and depth
  profiles/*.parquet  metrics of the whole set of tokens, by depth
  states/*.parquet    only with --states
  calibration/  figures/  events.jsonl  summary.json  README.md
```

Other tables appear where a protocol writes them. A part is written under a temporary name, synced, renamed, and then
listed in the manifest, so a kill at any moment leaves only whole parts. Readers refuse a newer layout and read all
older ones. Rows are found by their labels, never by their order. [A damaged run folder](../runs.md) can be mended.

```python
run = dp.open("runs/…")
run.samples, run.tokens, run.depths      # pandas
run.columns()                            # id, unit, digest, span and aggregation of every column
run.sql("select …")                      # DuckDB
```
"""


def cell(value: str) -> str:
    return value.replace("|", "\\|").replace("$", "\\$").replace("\\x", "\\\\x")


def section(table: Table) -> Iterator[str]:
    """The section of one table: its label, its other columns, the metrics it may carry."""
    yield f"\n## {table.name}\n\n{table.description}\n"
    unique = " (unique)" if table.unique else ""
    yield f"Label{unique}: {', '.join(f'`{key}`' for key in table.keys)}.\n"
    yield "| column | kind | unit | |\n|---|---|---|---|"
    for name in dict.fromkeys((*table.keys, *table.columns)):
        column = COLUMNS[name]
        yield f"| `{name}` | {column.kind} | {column.unit} | {cell(column.description)} |"
    level = table.name.removesuffix("s")
    metrics = [c for c in columns().values() if level in c.levels]
    if metrics:
        yield f'\n??? note "Metric columns of {table.name}: {len(metrics)} that a run may carry"\n'
        yield "    | column | metric | unit | aggregation |\n    |---|---|---|---|"
        for c in metrics:
            page = f"../metrics/{c.metric_id.partition('{')[0].replace('/', '-')}.md"
            yield f"    | `{c.name}` | [`{c.metric_id}`]({page}) | {cell(c.unit)} | {cell(c.levels[level])} |"
        yield ""


def main() -> None:
    rest = sorted(set(COLUMNS) - {name for t in TABLES.values() for name in (*t.keys, *t.columns)})
    page = ["# The run folder\n", f"Schema version {SCHEMA_VERSION}. A minor version only adds.\n", LAYOUT]
    for table in TABLES.values():
        page += section(table)
    page += [
        "\n## Further columns\n\nWritten where a protocol needs them.\n",
        "| column | kind | unit | |\n|---|---|---|---|",
    ]
    page += [f"| `{n}` | {COLUMNS[n].kind} | {COLUMNS[n].unit} | {cell(COLUMNS[n].description)} |" for n in rest]
    with mkdocs_gen_files.open("reference/run_folder.md", "w") as out:
        out.write("\n".join(page))


main()
