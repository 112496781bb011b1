"""The folder of a panel: a plan of cells, a run folder for each, and the tables that say what came of them.

``panel.json`` is its manifest: the design, the models with their covariates, and the state of every cell with the
folder and the hash of its run. It is replaced whole after every cell, so a kill loses the cell at work and nothing
else. Everything else can be made again from the runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from dynprobe.errors import RunFolderError, did_you_mean
from dynprobe.runs._json import loads
from dynprobe.runs._lock import is_held
from dynprobe.runs._open_run import open_run
from dynprobe.runs._run import Run

__all__ = ["PANEL_NAME", "PANEL_SCHEMA", "PANEL_TABLES", "Panel", "open_panel"]

PANEL_NAME = "panel.json"
PANEL_SCHEMA = "1.0"

#: Tables of a panel and what they are.
PANEL_TABLES = {
    "models": "One row per model: family, covariates, weights, cells done.",
    "observations": "One row per model, condition, prompt, seed and replicate: every metric of the samples.",
    "variance": "Sums of squares of each metric in each condition: model, category, prompt, interactions, seeds.",
    "components": "Variance components by REML, and R² of the mixed model with fixed categories.",
    "skeleton": "How much of the model means the declared covariates explain.",
    "shares": "Shapley share of each covariate in that.",
    "topology": "Clusters of models in each condition: stability, fragmentation, agreement with the families.",
    "clusters": "The cluster and the stable cluster of each model.",
    "regimes": "Regime of each model, over all prompts and per category, with bootstrap shares.",
}


def open_panel(path: str | Path) -> Panel:
    """Open the folder of a panel.

    Args:
        path: The folder, or its ``panel.json``.

    Raises:
        RunFolderError: It is no panel, damaged, or of a newer schema.
    """
    folder = Path(path)
    folder = folder.parent if folder.name == PANEL_NAME else folder
    try:
        content = loads((folder / PANEL_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{folder} is no panel folder: it has no {PANEL_NAME}. Make one with: dynprobe panel panel.yaml"
        ) from error
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{folder / PANEL_NAME} is damaged: {error}. Its runs are whole: see {folder / 'runs'}"
        ) from error
    missing = [key for key in ("schema_version", "id8", "status", "config", "models", "cells") if key not in content]
    if missing:
        raise RunFolderError(f"{folder / PANEL_NAME} is damaged: it has no {missing[0]!r}.")
    if str(content["schema_version"]).split(".")[0] != PANEL_SCHEMA.split(".")[0]:
        raise RunFolderError(
            f"{folder} has the panel schema {content['schema_version']}, and this dynprobe reads {PANEL_SCHEMA}. "
            "Install a newer one: pip install --upgrade dynprobe"
        )
    return Panel(folder, content)


class Panel:
    """A panel; made by :func:`open_panel` and by :func:`dynprobe.panel`.

    Attributes:
        path: The folder.
        manifest: What ``panel.json`` says.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._frames: dict[str, pd.DataFrame] = {}

    @property
    def status(self) -> str:
        """``complete``, ``partial`` (some cells failed), ``running`` or ``interrupted``."""
        status = str(self.manifest["status"])
        return "interrupted" if status == "running" and not is_held(self.path) else status

    @property
    def cells(self) -> pd.DataFrame:
        """One row per cell: its place in the design, its state, its run, and why it failed."""
        return pd.DataFrame(self.manifest["cells"])

    @property
    def failed(self) -> pd.DataFrame:
        """The cells that failed."""
        cells = self.cells
        return cells[cells["state"] == "failed"]

    @property
    def runs(self) -> list[Run]:
        """The runs of the cells that are done."""
        return [self.run(str(cell["key"])) for cell in self.manifest["cells"] if cell["state"] == "done"]

    @property
    def summary(self) -> dict[str, Any]:
        """What the panel concluded; empty until its runs are made."""
        try:
            found: dict[str, Any] = loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.path / 'summary.json'} is damaged: {error}.") from error
        return found

    @property
    def tables(self) -> list[str]:
        """Names of the tables that are there."""
        return [name for name in PANEL_TABLES if (self.path / "tables" / f"{name}.parquet").is_file()]

    def run(self, key: str) -> Run:
        """Open the run of a cell.

        Raises:
            RunFolderError: There is no such cell, or it is not done.
        """
        cells = {str(cell["key"]): cell for cell in self.manifest["cells"]}
        if key not in cells:
            raise RunFolderError(f"{self.path} has no cell {key!r}.{did_you_mean(key, cells)}")
        if cells[key]["state"] != "done":
            raise RunFolderError(
                f"the cell {key!r} is {cells[key]['state']}: {cells[key].get('error') or 'not run yet'}"
            )
        return open_run(self.path / cells[key]["run"])

    def table(self, name: str) -> pd.DataFrame:
        """Return a table as pandas.

        Raises:
            RunFolderError: There is no such table, or it cannot be read.
        """
        if name not in self._frames:
            file = self.path / "tables" / f"{name}.parquet"
            if not file.is_file():
                near = did_you_mean(name, self.tables)
                raise RunFolderError(
                    f"{self.path} has no table {name!r}.{near} Tables: {', '.join(self.tables) or 'none yet'}"
                )
            try:
                self._frames[name] = pd.read_parquet(file)
            except Exception as error:  # whatever pyarrow says of a file that is none
                raise RunFolderError(
                    f"{file} cannot be read: {error}. The same dynprobe panel command makes it again."
                ) from error
        return self._frames[name]

    def __repr__(self) -> str:
        cells = self.manifest["cells"]
        count = {state: sum(c["state"] == state for c in cells) for state in ("done", "planned", "failed")}
        said = ", ".join(f"{n} {state}" for state, n in count.items() if n)
        return (
            f"Panel {self.path} ({self.status})\n{len(self.manifest['models'])} models, {len(cells)} cells: {said}\n"
            f"tables: {', '.join(self.tables) or 'none yet'}"
        )
