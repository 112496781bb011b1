"""Turn passages into rows: samples, tokens, depths, profiles.

Rows carry labels, never an order: ``sample_id`` is prompt × condition × replicate, ``pos`` counts real tokens,
``depth`` counts states. A value that could not be computed is NaN, and its reason stands in ``reasons`` of the sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics import Result
from dynprobe.protocols._arms import Passage, span_mask

__all__ = ["Labels", "passage_tables", "repetition_rate", "sample_id"]


def sample_id(prompt_id: str, condition_id: str, replicate: int) -> str:
    """Return the label of one row: ``factual-00|perturbed.forced|0``."""
    return f"{prompt_id}|{condition_id}|{replicate}"


@dataclass(frozen=True)
class Labels:
    """What the rows of one passage are called.

    Attributes:
        condition_id: Condition of all rows.
        prompt_ids: One per row.
        categories: One per row.
        replicate: Number of the text of one prompt.
        decoded: Generated text of each row, or None.
    """

    condition_id: str
    prompt_ids: Sequence[str]
    categories: Sequence[str]
    replicate: int
    decoded: Sequence[str | None]

    @property
    def ids(self) -> list[str]:
        """Sample ids of the rows."""
        return [sample_id(p, self.condition_id, self.replicate) for p in self.prompt_ids]


def repetition_rate(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams that occurred before in the same text; NaN below n + 1 tokens.

    Example:
        >>> repetition_rate([1, 2, 1, 2, 1, 2], n=2)
        0.6
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if len(grams) < 2:
        return math.nan
    return 1.0 - len(set(grams)) / len(grams)


def _mean(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Mean over the kept columns of each row, NaN where there is none; a non-finite value is left out and counted."""
    chosen = keep & np.isfinite(values)
    count = chosen.sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, np.where(chosen, values, 0.0).sum(1) / np.maximum(count, 1), np.nan)


def passage_tables(
    passage: Passage,
    labels: Labels,
    *,
    span: str,
    clean: Passage | None = None,
    paired: Sequence[Result] | None = None,
    paired_outputs: Mapping[str, np.ndarray] | None = None,
    divergence: np.ndarray | None = None,
    lens: Mapping[str, np.ndarray] | None = None,
    affected_from: np.ndarray | None = None,
) -> dict[str, pd.DataFrame]:
    """Return the tables of one passage.

    Args:
        passage: The measured rows.
        labels: Their names.
        span: Tokens of token-axis metrics, as measured.
        clean: The clean passage over the same tokens, for paired columns; None for free arms.
        paired: Paired trajectory read-outs.
        paired_outputs: ``kl_clean_pert`` and ``flip`` ``[batch, pos]``.
        divergence: Angle to the clean state over π, ``[depth, batch, pos]``.
        lens: ``lens_entropy`` and ``lens_kl`` ``[depth, batch, pos]``.
        affected_from: First perturbed position of each row; KL and flip rate are means from there on.
    """
    mask = passage.mask.numpy()
    rows, columns = np.nonzero(mask)
    ids = np.array(labels.ids, dtype=object)
    pos = passage.positions[rows, columns].astype(np.int32)
    n_prompt = np.array([len(t.prompt) for t in passage.texts])
    phase = np.where(pos < n_prompt[rows], "prefill", "decode")
    fed = _lay([t.fed for t in passage.texts], mask)
    targets = _lay([t.targets for t in passage.texts], mask)

    tokens: dict[str, Any] = {
        "sample_id": ids[rows], "pos": pos, "phase": phase,
        "token_id": fed[rows, columns].astype(np.int32), "target_id": targets[rows, columns].astype(np.int32),
    }  # fmt: skip
    for name, values in {**passage.outputs, **(paired_outputs or {}), **passage.measured.token}.items():
        tokens[name] = values[rows, columns].astype(np.float32)

    samples = _samples(passage, labels, span, clean, paired, paired_outputs, affected_from)
    if divergence is not None and affected_from is not None:
        affected = mask & (passage.positions >= np.maximum(affected_from, 1)[:, None])
        samples["diverge_angle"] = _mean(divergence[-1], affected)
    return {
        "samples": samples,
        "tokens": pd.DataFrame(tokens),
        "depths": _depths(passage, ids, rows, columns, pos, divergence, lens),
        "profiles": _profiles(passage, ids),
    }


def _lay(rows: Sequence[Sequence[int]], mask: np.ndarray) -> np.ndarray:
    out = np.full(mask.shape, -1, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, mask[i]] = row
    return out


def _depths(
    passage: Passage, ids: np.ndarray, rows: np.ndarray, columns: np.ndarray, pos: np.ndarray,
    divergence: np.ndarray | None, lens: Mapping[str, np.ndarray] | None,
) -> pd.DataFrame:  # fmt: skip
    n_depths, n = len(passage.tape.states), len(rows)
    depth = np.repeat(np.arange(n_depths, dtype=np.int16), n)
    table: dict[str, Any] = {
        "sample_id": np.tile(ids[rows], n_depths), "pos": np.tile(pos, n_depths),
        "track": pd.Categorical.from_codes(np.zeros(n_depths * n, np.int8), ["resid"]),
        "depth": depth,
        "stage": pd.Categorical.from_codes((depth > 0).astype(np.int8), ["embed", "block"]),
        "layer": depth - 1,
        "iteration": np.zeros(n_depths * n, np.int16),
        "component": pd.Categorical.from_codes((depth > 0).astype(np.int8), ["resid_pre", "resid_post"]),
    }  # fmt: skip
    extra = {**(lens or {})}
    if divergence is not None:
        extra["diverge_angle"] = divergence
    for name, values in {**passage.measured.depth, **extra}.items():
        table[name] = values[:, rows, columns].reshape(-1).astype(np.float32)
    frame = pd.DataFrame(table)
    updates = passage.tape.updates
    if not updates:
        return frame
    more = []
    for (component, layer), state in updates.items():
        norm = state.float().norm(dim=-1).cpu().numpy()[rows, columns]
        more.append(
            pd.DataFrame(
                {
                    "sample_id": ids[rows], "pos": pos, "track": component, "depth": np.int16(layer + 1),
                    "stage": "block", "layer": np.int16(layer), "iteration": np.int16(0), "component": component,
                    "norm": norm.astype(np.float32),
                }
            )
        )  # fmt: skip
    return pd.concat([frame, *more], ignore_index=True)


def _profiles(passage: Passage, ids: np.ndarray) -> pd.DataFrame:
    n_depths = len(passage.tape.states)
    table: dict[str, Any] = {
        "sample_id": np.tile(ids, n_depths),
        "track": "resid",
        "depth": np.repeat(np.arange(n_depths, dtype=np.int16), len(ids)),
    }
    for name, values in passage.measured.profile.items():
        array = np.asarray(values)
        table[name] = array.reshape(-1) if array.dtype == object else array.reshape(-1).astype(np.float32)
    return pd.DataFrame(table)


def _samples(
    passage: Passage, labels: Labels, span: str, clean: Passage | None, paired: Sequence[Result] | None,
    paired_outputs: Mapping[str, np.ndarray] | None, affected_from: np.ndarray | None,
) -> pd.DataFrame:  # fmt: skip
    mask = passage.mask.numpy()
    chosen = span_mask(passage.mask, passage.positions, passage.texts, span).numpy()
    prompt = span_mask(passage.mask, passage.positions, passage.texts, "prompt").numpy()
    out = passage.outputs
    has_target = _lay([t.targets for t in passage.texts], mask) >= 0
    nll, nll_prompt = _mean(out["nll"], chosen & has_target), _mean(out["nll"], prompt & has_target)
    table: dict[str, Any] = {
        "sample_id": labels.ids, "prompt_id": list(labels.prompt_ids), "condition_id": labels.condition_id,
        "replicate": labels.replicate, "category": list(labels.categories),
        "n_prompt": [len(t.prompt) for t in passage.texts], "n_new": [len(t.new) for t in passage.texts],
        "n_fed": mask.sum(1), "text": list(labels.decoded),
        "nll": nll, "ppl": np.exp(nll), "nll_prompt": nll_prompt,
        "entropy": _mean(out["entropy"], chosen), "margin": _mean(out["margin"], chosen),
        "repetition": [repetition_rate(t.new) for t in passage.texts],
    }  # fmt: skip
    results: list[dict[str, Result]] = [dict(r) for r in passage.measured.sample]
    if clean is not None and paired is not None and paired_outputs is not None and affected_from is not None:
        affected = mask & (passage.positions >= np.maximum(affected_from, 1)[:, None])
        table["kl_clean_pert"] = _mean(paired_outputs["kl_clean_pert"], affected)
        table["flip_rate"] = _mean(paired_outputs["flip"], affected)
        table["nll_d"] = nll - _mean(clean.outputs["nll"], chosen & has_target)
        table["entropy_d"] = table["entropy"] - _mean(clean.outputs["entropy"], chosen)
        for i, (mine, theirs) in enumerate(zip(results, clean.measured.sample, strict=True)):
            for name, result in list(mine.items()):
                if name != "kappa_phase" and isinstance(result.value, float) and isinstance(theirs[name].value, float):
                    mine[name + "_d"] = _difference(result, theirs[name])
            mine.update(_paired_columns(paired[i]))
    names = list(dict.fromkeys(name for r in results for name in r))
    for name in names:
        table[name] = [r[name].value if name in r else math.nan for r in results]
    for name, values in passage.tape.passport.items():
        table[name] = values
    table["n_nonfinite"] = passage.measured.n_nonfinite
    table["status"] = ["nonfinite" if n else "ok" for n in passage.measured.n_nonfinite]
    table["reasons"] = [_reasons(r) for r in results]
    return pd.DataFrame(table)


def _paired_columns(result: Result) -> dict[str, Result]:
    """Δκ, its part at the step into the injection, and its part downstream."""
    out = {"kappa_phase_d": result}
    if "delta_inj" in result.extras:
        inj, down = float(result.extras["delta_inj"]), float(result.extras["delta_down"])
        out["kappa_phase_d_inj"] = replace(result, value=inj, reason=result.extras.get("delta_inj_reason"))
        out["kappa_phase_d_down"] = replace(result, value=down, reason="coverage" if math.isnan(down) else None)
    return out


def _difference(mine: Result, theirs: Result) -> Result:
    """Arm minus clean of a scalar whose terms cannot be paired one by one; NaN on either side carries its reason."""
    reason = mine.reason or theirs.reason
    return replace(mine, value=float(mine.value) - float(theirs.value), reason=reason)


def _reasons(results: Mapping[str, Result]) -> str | None:
    found = {name: r.reason for name, r in results.items() if r.reason}
    return json.dumps(found, sort_keys=True) if found else None
