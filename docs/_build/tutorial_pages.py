"""Tutorials and concepts: every script is executed, and its text, output and figures become a page.

A script in ``docs/tutorials`` or ``docs/concepts`` is a notebook in percent format that also runs as it is. Each
runs in a kernel of its own, in an empty folder. A cell that fails stops the build.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import mkdocs_gen_files
import nbclient
import nbformat
from nbconvert import MarkdownExporter

DOCS = Path(__file__).parent.parent
_TABLE = re.compile(
    r"<style scoped>.*?</style>|(?<=<table) border=\"1\" class=\"dataframe\"| style=\"text-align: right;\"", re.DOTALL
)
#: What a reader's notebook does by itself, and what keeps tables readable. Not shown.
_SETUP = """%config InlineBackend.figure_formats = ["svg"]
%matplotlib inline
import pandas, warnings
pandas.options.display.max_columns = 12
pandas.options.display.max_colwidth = 60
warnings.simplefilter("ignore", FutureWarning)"""
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
#: What keeps printed output the same on every machine.
_SETTINGS = {
    "COLUMNS": "110",
    "NO_COLOR": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


def executed(script: Path) -> Any:
    """Run a script as a notebook and return it with its output."""
    notebook = jupytext.read(script)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(_SETUP))
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=40"],
            resources={"metadata": {"path": folder}},
        ).execute()
    del notebook.cells[0]
    return notebook


def shown(output: Any) -> Any:
    """Return one output as Markdown that sets it apart from the code; pictures stay as they are."""
    data = output.get("data", {})
    if "text/html" in data:
        body = f'<div class="output">{_TABLE.sub("", data["text/html"])}</div>'
    elif "image/svg+xml" in data or "image/png" in data:
        return output
    else:
        printed = _ANSI.sub("", output.text if output.output_type == "stream" else data.get("text/plain", ""))
        body = f"``` {{ .text .output }}\n{printed.rstrip()}\n```"
    return nbformat.v4.new_output("display_data", {"text/markdown": body})


def clean(notebook: Any) -> Any:
    """Bring the output of every cell into the form of a page; progress, which goes to stderr, is left out."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [shown(o) for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def page(path: str, notebook: Any) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of an executed notebook, and its pictures by file name."""
    name = Path(path).stem
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    pictures = {f"{name}_{key}": data for key, data in resources["outputs"].items()}
    for key in resources["outputs"]:
        body = body.replace(f"]({key})", f"]({name}_{key})")
    title, _, rest = body.lstrip().partition("\n")
    return f"{title}\n\n*This page is `docs/{path}`, executed when the site was built.*\n{rest}", pictures


def main() -> None:
    os.environ.update(_SETTINGS)
    for script in sorted([*DOCS.glob("tutorials/*.py"), *DOCS.glob("concepts/*.py")]):
        folder = script.parent.name
        text, pictures = page(f"{folder}/{script.name}", clean(executed(script)))
        with mkdocs_gen_files.open(f"{folder}/{script.stem}.md", "w") as out:
            out.write(text)
        for name, data in pictures.items():
            with mkdocs_gen_files.open(f"{folder}/{name}", "wb") as out:
                out.write(data)


main()
