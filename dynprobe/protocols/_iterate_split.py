"""Means over prompts at each number of iterations, and apart for hard and easy tokens.

A split of tokens by the model's *own* loss at few iterations makes "hard tokens improve, easy ones get worse" out of
nothing: whatever was high by chance comes down by itself, and the other way round. So tokens are split by the loss of
another model, which had its own luck. The split by the model's own first loss is computed beside it under the name
``own_loss``, so that what regression to the mean adds can be seen; it is no evidence of anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.errors import UsageError
from dynprobe.metrics.statistics import mean_interval
from dynprobe.probes import Subject
from dynprobe.probes import load as load_subject
from dynprobe.prompts import Prompt
from dynprobe.protocols._arms import Text, forced
from dynprobe.runs import Run

__all__ = ["difficulty", "iteration_summary"]

_BUCKETS = ("easy", "middle", "hard")
_MEANS = (
    "nll", "kappa_phase", "readiness", "delta_last", "delta_last_angle", "delta_last_radial", "energy_last", "right",
    "entropy",
)  # fmt: skip


def difficulty(
    model: str | Subject, subject: Subject, prompts: Sequence[Prompt], texts: Sequence[Text]
) -> pd.DataFrame:
    """Return the loss of another model at every position of every text.

    Args:
        model: The other model.
        subject: The model under study; both must read a text as the same tokens.
        prompts: The prompts.
        texts: Their token ids, with those of their answers.

    Raises:
        UsageError: If the two models do not share a tokenizer.
    """
    other = load_subject(model)
    if other.vocab_size != subject.vocab_size:
        raise UsageError(
            f"--split-by {other.name} has {other.vocab_size} tokens and {subject.name} has {subject.vocab_size}; a "
            "token is hard or easy only where both models read the same ones"
        )
    for prompt, text in zip(prompts, texts, strict=True):
        if other.tokenizer is not None and prompt.token_ids is None and prompt.text:
            theirs = list(other.tokenizer(prompt.text)["input_ids"])
            if theirs != list(text.prompt):
                raise UsageError(
                    f"--split-by {other.name} reads prompt {prompt.prompt_id!r} as other tokens than {subject.name}"
                )
    parts = []
    for prompt, text in zip(prompts, texts, strict=True):
        passage = forced(other, [text], which=())
        known = passage.mask[0].numpy()
        nll = passage.outputs["nll"][0][known]
        parts.append(pd.DataFrame({"prompt_id": prompt.prompt_id, "pos": passage.positions[0][known], "other": nll}))
    return pd.concat(parts, ignore_index=True)


def iteration_summary(
    run: Run, numbers: Sequence[int], hard: pd.DataFrame | None, split_by: str | None
) -> dict[str, Any]:
    """Return the tables of a study: by T, by category and T, and by hardness and T.

    Args:
        run: The run.
        numbers: Numbers of iterations.
        hard: Loss of another model by prompt and position, or None.
        split_by: Its name.
    """
    samples = run.samples
    arms = samples["condition_id"].astype(str)
    out: dict[str, Any] = {"iterations": [], "categories": []}
    for T in numbers:
        for arm, name in (("clean", f"T{T}"), ("perturbed", f"T{T}|perturbed")):
            rows = samples[arms == name]
            if len(rows):
                out["iterations"].append({"iterations": T, "arm": arm, **_means(rows)})
        clean = samples[arms == f"T{T}"]
        if clean["category"].notna().any():
            for category, rows in clean.groupby("category", observed=True):
                out["categories"].append({"iterations": T, "category": str(category), **_means(rows)})
    clean = samples[arms == f"T{numbers[-1]}"]
    out["best_iteration"] = _middle(clean["best_iteration"])
    out["converged_at"] = {**_middle(clean["converged_at"]), "censored": _censored(clean)}
    tokens = run.table("tokens")
    parts = tokens["sample_id"].astype(str).str.extract(r"^(?P<prompt_id>.*)\|T(?P<T>\d+)\|0$")
    tokens = tokens.assign(prompt_id=parts["prompt_id"], T=pd.to_numeric(parts["T"]))
    tokens = tokens[tokens["T"].notna() & tokens["nll"].notna()]
    wide = tokens.pivot_table(index=["prompt_id", "pos"], columns="T", values="nll").dropna()
    if len(wide) >= 3 * len(_BUCKETS):
        out["hardness"] = _split(wide, numbers, wide[numbers[0]], "own_loss")
        if hard is not None:
            theirs = hard.set_index(["prompt_id", "pos"])["other"].reindex(wide.index)
            out["hardness"] += _split(wide[theirs.notna()], numbers, theirs.dropna(), str(split_by))
    return out


def _means(rows: pd.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {"n": int(rows["prompt_id"].nunique())}
    for name in _MEANS:
        if name in rows and rows[name].notna().any():
            values = rows[name].dropna().to_numpy(np.float64)
            low, high = mean_interval(values)
            found |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    if "nll" in found:
        found |= {f"ppl{end}": math.exp(found[f"nll{end}"]) for end in ("", "_low", "_high")}
    return found


def _middle(values: pd.Series) -> dict[str, float]:
    known = values.dropna().to_numpy(np.float64)
    if not len(known):
        return {"median": math.nan, "low": math.nan, "high": math.nan}
    low, high = np.quantile(known, [0.25, 0.75])
    return {"median": float(np.median(known)), "low": float(low), "high": float(high)}


def _censored(rows: pd.DataFrame) -> int | None:
    """Number of texts that did not converge within the run; None where convergence was not measured."""
    name = next((str(c) for c in rows if str(c).startswith("converge_iterations")), None)
    if name is None:
        return None
    reasons = [json.loads(text) if isinstance(text, str) else {} for text in rows["reasons"]]
    return sum(found.get(name) == "censored" for found in reasons)


def _split(wide: pd.DataFrame, numbers: Sequence[int], by: pd.Series, name: str) -> list[dict[str, Any]]:
    """Perplexity of the terciles of ``by``, and its change against the first T: the quotient of both perplexities − 1.

    The interval draws prompts, each with all its tokens.
    """
    edges = np.quantile(by, [1 / 3, 2 / 3])
    bucket = np.searchsorted(edges, by.to_numpy(), side="right")
    rows = []
    for number, label in enumerate(_BUCKETS):
        chosen = wide[bucket == number]
        for T in numbers:
            gain = (chosen[T] - chosen[numbers[0]]).groupby(level="prompt_id").agg(["mean", "size"])
            mean, size = gain["mean"].to_numpy(np.float64), gain["size"].to_numpy(np.float64)
            low, high = mean_interval(mean, size)
            rows.append(
                {
                    "split": name, "bucket": label, "iterations": T, "n_tokens": len(chosen), "n_prompts": len(gain),
                    "ppl": float(np.exp(chosen[T].mean())), "change": float(np.exp(np.average(mean, weights=size)) - 1),
                    "change_low": math.exp(low) - 1, "change_high": math.exp(high) - 1,
                }
            )  # fmt: skip
    return rows
