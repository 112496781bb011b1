"""The tables of a panel, made from its runs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.protocols._panel_config import DECOMPOSED, PanelConfig
from dynprobe.protocols._summary import without_remarks
from dynprobe.runs import Run
from dynprobe.runs._atomic import sync_folder, write_bytes, writing
from dynprobe.runs._panel_folder import PANEL_TABLES, Panel
from dynprobe.runs._panel_statistics import (
    component_rows,
    few_models,
    regime_rows,
    skeleton_rows,
    topology_rows,
    variance_rows,
)

__all__ = ["CONDITION", "write_tables"]

#: Columns that make a condition: runs that differ in one of them are no replicates of each other.
CONDITION = ["condition", "alpha", "temperature", "max_new_tokens"]
_NOT_AS_ASKED = ("not-written", "isokl-unreached")
_LABELS = ("sample_id", "prompt_id", "condition_id", "replicate", "category")


def write_tables(found: Panel, config: PanelConfig) -> dict[str, Any]:
    """Write every table of a panel and return its summary."""
    frames = _tables(found, config)
    folder = found.path / "tables"
    with writing(found.path, "tables"):
        folder.mkdir(exist_ok=True)
        for name in PANEL_TABLES:
            file = folder / f"{name}.parquet"
            if not len(frames[name]):
                file.unlink(missing_ok=True)
                continue
            buffer = io.BytesIO()
            frames[name].to_parquet(buffer, index=False, compression="zstd")
            write_bytes(file, buffer.getbuffer())
        sync_folder(folder)
    return _summary(found, config, frames)


def _tables(found: Panel, config: PanelConfig) -> dict[str, pd.DataFrame]:
    models = {m["name"]: m for m in found.manifest["models"]}
    families = {name: str(m.get("family", "unknown")) for name, m in models.items()}
    frames = {name: pd.DataFrame() for name in PANEL_TABLES}
    frames["models"] = _models(found, models)
    observed = _observations(found, families)
    if not len(observed):
        return frames
    held = [m for m in config.decompose if m in observed]
    covariates = {
        name: {m: row["skeleton"].get(name) for m, row in models.items() if "skeleton" in row}
        for name in config.covariates
    }
    frames["observations"] = observed
    frames["variance"] = variance_rows(observed, CONDITION, held)
    frames["components"] = component_rows(observed, CONDITION, held)
    frames["skeleton"], frames["shares"] = skeleton_rows(
        observed, CONDITION, held, covariates, families, config.n_permutations
    )
    frames["topology"], frames["clusters"] = topology_rows(observed, CONDITION, held, families, config.n_boot)
    frames["regimes"] = regime_rows(observed, CONDITION, config.n_boot)
    return frames


def _models(found: Panel, models: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    cells = found.cells
    rows = []
    for name, row in models.items():
        own = cells[cells["model"] == name]
        skeleton = {key: row.get("skeleton", {}).get(key) for key in _covariates(models)}
        rows.append({
            "model": name, "source": row["model"], "family": row.get("family"), "parameters": row.get("parameters"),
            **skeleton, "weights": row.get("weights"), "cells": len(own),
            "done": int((own["state"] == "done").sum()), "failed": int((own["state"] == "failed").sum()),
            "error": next((e for e in own["error"] if isinstance(e, str)), None),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _covariates(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in models.values() for key in row.get("skeleton", {})))


def _observations(found: Panel, families: Mapping[str, str]) -> pd.DataFrame:
    """Rows of the samples of every cell that is done."""
    done = [cell for cell in found.manifest["cells"] if cell["state"] == "done"]
    clean = _clean_from(done)
    parts = []
    for cell in done:
        rows = _samples(found.run(cell["key"]))
        if (cell["model"], cell["temperature"], cell["max_new_tokens"], cell["alpha"]) not in clean:
            rows = rows[rows["arm"] != "clean"]
        front = {
            "model": cell["model"], "family": families[cell["model"]], "seed": cell["seed"],
            "temperature": cell["temperature"], "max_new_tokens": cell["max_new_tokens"],
        }  # fmt: skip
        parts.append(pd.concat([pd.DataFrame(front, index=rows.index), rows.drop(columns="arm")], axis=1))
    if not parts:
        return pd.DataFrame()
    frame = pd.concat(parts, ignore_index=True)
    return frame.dropna(axis=1, how="all")


def _clean_from(done: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """The strength whose cells give the clean rows of a condition: every cell has a clean arm, and one is enough."""
    least: dict[tuple[Any, ...], float] = {}
    for cell in done:
        key = (cell["model"], cell["temperature"], cell["max_new_tokens"])
        least[key] = min(cell["alpha"], least.get(key, float("inf")))
    return {(*key, alpha) for key, alpha in least.items()}


def _samples(run: Run) -> pd.DataFrame:
    """The samples of a run with their condition; what was not perturbed as asked, or carries a remark, is left out."""
    samples = run.samples
    conditions = run.conditions.astype(object).set_index("condition_id")
    rows = without_remarks(samples[~samples["status"].isin(_NOT_AS_ASKED)])
    rows = rows[rows["condition_id"].astype(object).map(conditions["arm"]) != "sham"]
    named = rows["condition_id"].astype(object)
    numbers = [
        c for c in rows.columns if c not in _LABELS and pd.api.types.is_float_dtype(rows[c]) and rows[c].notna().any()
    ]
    counts = [c for c in ("n_prompt", "n_new") if c in rows]
    return pd.DataFrame(
        {
            "category": rows["category"].astype(object) if "category" in rows else _category(run, rows),
            "prompt_id": rows["prompt_id"].astype(object), "condition": named, "arm": named.map(conditions["arm"]),
            "alpha": named.map(conditions["alpha"]).astype(float), "replicate": rows["replicate"],
            **{c: rows[c].astype(np.float64) for c in [*counts, *numbers]},
        }
    )  # fmt: skip


def _category(run: Run, rows: pd.DataFrame) -> pd.Series:
    prompts = run.prompts.astype({"prompt_id": object}).set_index("prompt_id")
    return rows["prompt_id"].astype(object).map(prompts["category"].astype(object))


def _summary(found: Panel, config: PanelConfig, frames: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    cells = found.cells
    models = frames["models"]
    families = {r["model"]: str(r["family"]) for r in models.to_dict("records") if r["done"]}
    return {
        "cells": {str(k): int(v) for k, v in cells["state"].value_counts().items()},
        "observations": len(frames["observations"]), "models": len(families),
        "prompts": found.manifest["prompts"], "metrics": _decomposed(config, frames),
        "variance": frames["variance"].to_dict("records"), "skeleton": frames["skeleton"].to_dict("records"),
        "topology": frames["topology"].to_dict("records"),
        "failed": cells.loc[cells["state"] == "failed", ["key", "error"]].to_dict("records"),
        "warnings": _warnings(found, config, frames, families),
    }  # fmt: skip


def _decomposed(config: PanelConfig, frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """The declared metrics that some run has."""
    return [m for m in config.decompose if m in frames["observations"]]


def _warnings(
    found: Panel, config: PanelConfig, frames: Mapping[str, pd.DataFrame], families: Mapping[str, str]
) -> list[str]:
    """Say what a reader must know before believing a table."""
    out = []
    cells, variance, skeleton = found.cells, frames["variance"], frames["skeleton"]
    failed = cells[cells["state"] == "failed"]
    if len(failed):
        names = list(dict.fromkeys(failed["model"]))
        out.append(
            f"{len(failed)} of {len(cells)} cells failed ({', '.join(names[:4])}{' …' if len(names) > 4 else ''})"
        )
    if families and (few := few_models(families)):
        out.append(few)
    if found.manifest["copies_left_out"]:
        out.append(
            f"{found.manifest['copies_left_out']} cells in which nothing is drawn (no perturbation, greedy) were left "
            "out: another seed gives the same run, so their conditions have no term for seeds"
        )
    absent = [] if config.decompose == DECOMPOSED else [m for m in config.decompose if m not in frames["observations"]]
    if len(frames["observations"]) and absent:
        out.append(f"no cell that is done has {', '.join(absent)}: there is nothing to decompose")
    if len(variance):
        some = frames["observations"].groupby("model", observed=True)[_decomposed(config, frames)].count()
        lacking = {str(m): tuple(str(v) for v in some.index[some[m] == 0]) for m in some if (some[m] == 0).any()}
        for models in dict.fromkeys(lacking.values()):
            without = [m for m, held in lacking.items() if held == models]
            shown = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
            out.append(f"{shown} have no {', '.join(without)}; tables of these are over the other models")
        copies = variance[(variance["copies"] > 0) & (variance["term"] == "model")]
        if len(copies):
            out.append(
                f"seeds change nothing in {copies['condition'].nunique()} conditions; their copies are not counted"
            )
        uneven = variance[(variance["term"] == "model") & ~variance["balanced"] & variance["reason"].isna()]
        if len(uneven):
            out.append(
                f"{len(uneven)} of {int((variance['term'] == 'model').sum())} tables are unbalanced; their sums of "
                "squares are means over the orders of the terms"
            )
    weights = [m.get("weights") for m in found.manifest["models"] if m.get("weights")]
    if len(set(weights)) < len(weights):
        out.append("two models of the panel have the same weights: they are one model counted twice")
    tokenizers = {c["model"] for c in found.manifest["cells"] if c["state"] == "done"}
    if len(tokenizers) > 1 and "n_prompt" in frames["observations"]:
        lengths = frames["observations"].groupby("model", observed=True)["n_prompt"].mean()
        if lengths.max() > 1.02 * lengths.min():
            out.append(
                f"models read the prompts in {lengths.min():.1f} to {lengths.max():.1f} tokens on average: metrics per "
                "token of other vocabularies, and those that grow with length, are not on one scale"
            )
    if len(skeleton):
        refused = skeleton[skeleton["reason"].notna()]
        if len(refused):
            out.append(
                f"R² of the skeleton is refused in {len(refused)} of {len(skeleton)} tables "
                f"({', '.join(sorted(set(refused['reason'])))})"
            )
        twins = skeleton[skeleton["n_skeletons"] < skeleton["n_models"]]
        if len(twins):
            most = twins.sort_values("n_models", ascending=False, kind="stable").iloc[0]
            out.append(
                f"{int(most['n_models'])} models have {int(most['n_skeletons'])} different "
                "skeletons; models of one skeleton are no independent evidence about it"
            )
        wrong = skeleton[skeleton["consistent"].eq(False)]
        if len(wrong):
            out.append(
                f"R² of the skeleton exceeds η² of the models in {len(wrong)} tables: a defect, please report it"
            )
    return out
