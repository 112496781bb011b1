"""``panel``: one design, one folder: models × prompts × seeds × temperatures × token budgets × α.

Every cell is an ordinary run, the same that ``dynprobe run`` would make, in the folder ``runs`` of the panel. Cells of
one model stand together: a model is loaded once, when the first of its cells is due, and let go before the next.

A second call continues: cells whose run is there, whole and unchanged, are not run again, and a model without a cell to
run is not loaded. A model that fails (not found, out of memory, no such layer) is recorded with its reason, and the
rest goes on; its cells are tried again by the next call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynprobe.engines import Engine
from dynprobe.errors import DynprobeError, UsageError
from dynprobe.protocols._execute import Listener, Progress
from dynprobe.protocols._panel_config import PanelConfig, PanelModelEntry, read_panel
from dynprobe.protocols._panel_work import PanelWork, as_model, cells_by_key, release
from dynprobe.protocols._prepare import Held
from dynprobe.protocols._run import plan
from dynprobe.protocols._spread_config import in_words
from dynprobe.runs._panel_folder import PANEL_NAME, Panel, open_panel

__all__ = ["panel", "plan_panel"]

#: Seconds per condition: of a metric's variance and skeleton, of the clusters, of a model's clusters and regimes.
_PER_METRIC, _PER_CLUSTERING, _PER_MODEL = 0.06, 1.6, 0.07


def panel(
    design: str | Path | PanelConfig | None = None, *, listener: Listener | None = None, **settings: Any
) -> Panel:
    """Run a panel, or continue it.

    Args:
        design: A YAML file, the folder of a panel to continue, or a design; keywords win over it.
        listener: Called with :class:`Progress`.
        **settings: Fields of :class:`PanelConfig`: ``models``, ``seeds``, ``alphas``, ``perturb``, ``out``, ….

    Returns:
        The panel; ``panel.table("variance")`` is where the variance lies, ``panel.failed`` what did not run.

    Raises:
        UsageError: Something in the design is wrong.
        InterruptedRunError: It was stopped by the user; the same call continues it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     found = panel(models=["panel/llama-depth1*", "panel/cem-depth1*"], categories=["factual", "narrative"],
        ...                   prompts_per_category=2, max_new_tokens=2, out=out)
        ...     found.status, len(found.cells), found.table("variance")["term"].nunique()
        ('complete', 4, 6)
    """
    handed = settings.get("engine")
    config, folder = _design(design, in_words(settings))
    engine = handed if isinstance(handed, Engine) else None
    work = PanelWork(config, folder, listener if listener is not None else _nobody, engine)
    return work.done() or work.carry_out()


def plan_panel(
    design: str | Path | PanelConfig | None = None, *, measure: bool = True, **settings: Any
) -> dict[str, Any]:
    """Say what a panel would cost before it starts; models are loaded one after another to be looked at.

    Args:
        design: As for :func:`panel`.
        measure: Time a short forward of every model on this machine.
        **settings: As for :func:`panel`.

    Returns:
        Totals, one row per model, and the models that could not be looked at. ``seconds`` of a model are its loading
        and its cells, each as :func:`dynprobe.plan` has it; those of the panel have ``table_seconds`` in them. What a
        model needs once in its life (self-tests, calibration) is not counted.
    """
    config, folder = _design(design, settings)
    work = PanelWork(config, folder, _nobody)
    finished = {k for k, c in cells_by_key(work.found()).items() if c["state"] == "done"}
    rows = [_cost(work, entry, finished, measure) for entry in config.models]
    known = [row for row in rows if row["reason"] is None]
    totals = {k: sum(row[k] for row in known) for k in ("samples", "forward_tokens", "metric_bytes")}
    seconds = [row["seconds"] for row in known]
    left = len(finished) < len(work.cells)
    tables = table_seconds(config) if left else 0.0
    return {
        "panel": None if work.folder is None else str(work.folder), "cells": len(work.cells), "done": len(finished),
        "copies_left_out": work.copies, "prompts": len(work.prompts), "models": rows, **totals,
        "memory_bytes": max((row["memory_bytes"] for row in known), default=0),
        "seconds": None if None in seconds else sum(seconds) + tables, "table_seconds": tables,
    }  # fmt: skip


def _design(design: str | Path | PanelConfig | None, settings: Mapping[str, Any]) -> tuple[PanelConfig, Path | None]:
    """The design, and the folder where one is to be continued."""
    folder = None
    if isinstance(design, str | Path) and (Path(design) / PANEL_NAME).is_file():
        folder = Path(design)
        config = PanelConfig.build(open_panel(folder).manifest["config"])
    elif isinstance(design, str | Path):
        if Path(design).is_dir():
            raise UsageError(f"{design} is a folder without {PANEL_NAME}; name a YAML file, or the folder of a panel")
        config = read_panel(design)
    elif design is not None:
        config = design
    elif "models" not in settings:
        raise UsageError("a panel needs a YAML file, or models: dynprobe panel panel.yaml; docs/panel.md has one")
    else:
        return PanelConfig.build(settings), None
    return (PanelConfig.build({**config.model_dump(), **settings}) if settings else config), folder


def _cost(work: PanelWork, entry: PanelModelEntry, finished: set[str], measure: bool) -> dict[str, Any]:
    """What the cells of one model that are left would cost."""
    own = [cell for cell in work.cells if cell.model == entry.name and cell.key not in finished]
    row: dict[str, Any] = {
        "model": entry.name, "cells": len(own), "samples": 0, "forward_tokens": 0, "metric_bytes": 0,
        "memory_bytes": 0, "seconds": 0.0, "reason": None,
    }  # fmt: skip
    if not own:
        return row
    estimates: dict[tuple[int, bool], Any] = {}
    held: Held | None = None
    begun = time.perf_counter()
    try:
        held = work.load(entry)
        loading = time.perf_counter() - begun
        for cell in own:
            kind = (cell.max_new_tokens, cell.alpha > 0)
            if kind not in estimates:
                asked = {k: v for k, v in cell.settings(work.config).items() if k != "iterations"}
                texts = {"max_new_tokens": 0} if work.config.protocol == "iterate" else {}
                estimates[kind] = plan(as_model(held), work.prompts, measure=measure, **{**asked, **texts})
            cost = estimates[kind]
            times = max(len(work.config.iterations), 1)
            for key in ("samples", "forward_tokens", "metric_bytes"):
                row[key] += getattr(cost, key) * times
            row["memory_bytes"] = max(row["memory_bytes"], cost.memory_bytes)
            row["seconds"] = None if cost.seconds is None else row["seconds"] + cost.seconds * times
        row["seconds"] = None if row["seconds"] is None else row["seconds"] + loading
    except DynprobeError as error:
        row["reason"] = str(error)
    finally:
        del held
        release()
    return row


def table_seconds(config: PanelConfig) -> float:
    """Return about how long the tables of a panel take: fitted by eye to panels of 2, 6 and 18 models on one core."""
    models, pushed = len(config.models), sum(alpha > 0 for alpha in config.alphas)
    texts = [1] if config.protocol == "iterate" else [1 + (tokens > 0) for tokens in config.max_new_tokens]
    clean = max(len(config.iterations), 1)
    conditions = sum(clean + pushed * arms * clean for arms in texts) * len(config.temperatures)
    fits = _PER_METRIC * len(config.decompose) * (1 + models / 9)
    clusters = (_PER_CLUSTERING * (models >= 3) + _PER_MODEL * models) * config.n_boot / 1000
    return conditions * (fits + clusters)


def _nobody(_: Progress) -> None:
    """Listen to nothing."""
