"""What happens at every layer and token of one text, as rows that a picture lays out as a map.

A token is labelled with its text as the run stored it. Runs of schema 1.0 stored the texts of prompts only: there a
generated token has the text of a prompt that contains the same id, and where none does its id is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs._curves import main_track
from dynprobe.runs._json import loads

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["MAPPED", "map_columns", "token_map", "token_texts"]

#: Columns of ``depths`` that make a map: words, and whether their colours are logarithmic.
MAPPED = {
    "angle": ("angle of the step into this depth", False),
    "delta_rel_prev": ("Δ, step relative to the state before", True),
    "norm": ("norm of the state", True),
    "diverge_angle": ("angle to the clean state", False),
    "response_rel": ("difference from the clean state, relative", True),
    "curv_depth": ("turn between two steps", False),
    "energy": ("energy of the state", False),
}


def map_columns(run: Run) -> list[str]:
    """Return the columns that the run can map.

    Raises:
        RunFolderError: It stored nothing per token and depth.
    """
    if not run.manifest.rows().get("depths"):
        raise RunFolderError(
            f"{run.path} stored nothing per token and depth. dynprobe run does by itself, dynprobe sweep with --tables "
            "all"
        )
    facts = run.columns()
    held = set(facts[facts["table"] == "depths"]["column"])
    found = [c for c in MAPPED if c in held]
    values = run.table("depths", columns=found)
    return [c for c in found if values[c].notna().any()]


def token_texts(run: Run) -> tuple[dict[str, list[str]], dict[int, str]]:
    """Return the text of every token of every prompt, and of every id that stands in one."""
    of_prompt: dict[str, list[str]] = {}
    of_id: dict[int, str] = {}
    prompts = run.prompts
    for _, row in prompts.iterrows():
        stored = row.get("token_texts")
        if isinstance(stored, str) and stored:
            texts = [str(t) for t in loads(stored)]
            of_prompt[str(row["prompt_id"])] = texts
            of_id |= {int(i): t for i, t in zip(row["token_ids"], texts, strict=False) if t}
    return of_prompt, of_id


def token_map(run: Run, prompts: Sequence[str], conditions: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Return one row per prompt, condition, position and depth.

    Args:
        run: A run with ``depths``.
        prompts: Names of the prompts.
        conditions: Names of the conditions.
        columns: Columns of ``depths``.

    Returns:
        ``prompt_id, condition_id, pos, token, new, depth`` and the columns, as stored; of several replicates the first.

    Raises:
        RunFolderError: The run stored nothing per token and depth.
        UsageError: There is no such prompt.
    """
    known = list(run.prompts["prompt_id"].astype(str))
    for prompt in prompts:
        if prompt not in known:
            raise UsageError(f"{run.path} has no prompt {prompt!r}.{did_you_mean(prompt, known)}")
    track = main_track(run, "depths")
    samples = run.samples
    labels = samples[["sample_id", "prompt_id", "condition_id"]].astype(str)
    labels = labels.assign(n_prompt=samples.get("n_prompt", 0))
    if "replicate" in samples:
        labels = labels[(samples["replicate"] == samples["replicate"].min()).to_numpy()]
    labels = labels[labels["prompt_id"].isin(list(prompts)) & labels["condition_id"].isin(list(conditions))]
    labels = labels.drop_duplicates(["prompt_id", "condition_id"]).set_index("sample_id")
    rows = run.table("depths", columns=["sample_id", "track", "pos", "depth", *columns])
    rows = rows[rows["sample_id"].isin(labels.index) & (rows["track"].astype(str) == track)]
    if rows.empty:
        raise RunFolderError(f"{run.path} has no rows of {', '.join(prompts)} under {', '.join(conditions)}")
    rows = rows.assign(sample_id=rows["sample_id"].astype(str)).join(labels, on="sample_id")
    rows = rows.merge(_token_labels(run, labels), on=["sample_id", "pos"], how="left")
    rows["new"] = rows["pos"] >= rows["n_prompt"]
    order = (
        {p: i for i, p in enumerate(known)},
        {c: i for i, c in enumerate(run.conditions["condition_id"].astype(str))},
    )
    rows = rows.assign(a=rows["prompt_id"].map(order[0]), b=rows["condition_id"].map(order[1]))
    rows = rows.sort_values(["a", "b", "pos", "depth"], kind="stable", ignore_index=True)
    return rows[["prompt_id", "condition_id", "pos", "token", "new", "depth", *columns]]


def _token_labels(run: Run, labels: pd.DataFrame) -> pd.DataFrame:
    of_prompt, of_id = token_texts(run)
    frames = [] if (tokens := _stored_texts(run, labels)) is None else [tokens[tokens["token"].notna()]]
    for sample, label in labels.iterrows():
        texts = of_prompt.get(label["prompt_id"], [])[: int(label["n_prompt"]) or None]
        own = pd.DataFrame({"pos": range(len(texts)), "token": pd.Series(texts, dtype=object)})
        frames.append(own.assign(sample_id=str(sample)))
    if tokens is not None:
        ids = tokens.loc[tokens["token_id"].notna(), ["sample_id", "pos", "token_id"]]
        said = [of_id.get(int(i), f"#{int(i)}") for i in ids["token_id"]]
        frames.append(ids.assign(token=pd.Series(said, index=ids.index, dtype=object)))
    found = pd.concat([f[["sample_id", "pos", "token"]] for f in frames], ignore_index=True)
    return found.astype({"pos": np.int64}).drop_duplicates(["sample_id", "pos"])  # what comes first is surest


def _stored_texts(run: Run, labels: pd.DataFrame) -> pd.DataFrame | None:
    """Return ``sample_id, pos, token_id, token`` of samples, the text missing where the run stored none."""
    if not run.manifest.rows().get("tokens"):
        return None
    facts = run.columns()
    held = set(facts[facts["table"] == "tokens"]["column"])
    texts = ["token_text"] if "token_text" in held else []
    tokens = run.table("tokens", columns=["sample_id", "pos", "token_id", *texts])
    tokens = tokens[tokens["sample_id"].isin(labels.index)].astype({"sample_id": str})
    return tokens.assign(token=tokens["token_text"].astype(object) if texts else None)
