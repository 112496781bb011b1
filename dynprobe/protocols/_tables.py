"""Turn passages into rows: samples, tokens, depths, profiles.

Rows carry labels, never an order: ``sample_id`` is prompt × condition × replicate, ``pos`` counts real tokens,
``depth`` counts states. A value that could not be computed is NaN, and its reason stands in ``reasons`` of the sample.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics import Result, readiness
from dynprobe.probes import Calibration, Tape
from dynprobe.protocols._arms import Passage, emission_mask
from dynprobe.protocols._columns import PASSPORT, WRITTEN
from dynprobe.protocols._pairs import paired_columns
from dynprobe.protocols._readout import Readout

__all__ = ["Labels", "passage_tables", "places", "repetition_rate", "row_status", "sample_id"]

_NGRAM = 4


def sample_id(prompt_id: str, condition_id: str, replicate: int) -> str:
    """Return the label of one row: ``factual-00|perturbed.forced|0``."""
    return f"{prompt_id}|{condition_id}|{replicate}"


@dataclass(frozen=True)
class Labels:
    """What the rows of one passage are called.

    Attributes:
        condition_id: Condition of all rows, or one per row.
        prompt_ids: One per row.
        categories: One per row, None where a prompt has none.
        replicate: Number of the text of one prompt.
        decoded: Generated text of each row, or None.
    """

    condition_id: str | Sequence[str]
    prompt_ids: Sequence[str]
    categories: Sequence[str | None]
    replicate: int
    decoded: Sequence[str | None]

    @property
    def ids(self) -> list[str]:
        """Sample ids of the rows."""
        conditions = self.conditions
        return [sample_id(p, c, self.replicate) for p, c in zip(self.prompt_ids, conditions, strict=True)]

    @property
    def conditions(self) -> list[str]:
        """Condition of each row."""
        one = self.condition_id
        return [one] * len(self.prompt_ids) if isinstance(one, str) else list(one)


def repetition_rate(tokens: Sequence[int], n: int = _NGRAM) -> float:
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
    """Mean over the kept columns of each row; NaN where fewer than half of them are finite, or there is none."""
    chosen = keep & np.isfinite(values)
    count = chosen.sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(
            (count > 0) & (2 * count >= keep.sum(1)),
            np.where(chosen, values, 0.0).sum(1) / np.maximum(count, 1),
            np.nan,
        )


def row_status(n_nonfinite: Sequence[int] | np.ndarray) -> list[str]:
    """Return how rows ended: ``nonfinite`` where a state was NaN or infinite, else ``ok``."""
    return ["nonfinite" if n else "ok" for n in n_nonfinite]


def passage_tables(
    passage: Passage,
    labels: Labels,
    *,
    span: str,
    perturbed: bool = False,
    clean: Passage | None = None,
    paired: Sequence[Result] | None = None,
    paired_outputs: Mapping[str, np.ndarray] | None = None,
    divergence: np.ndarray | None = None,
    lens: Mapping[str, np.ndarray] | None = None,
    readout: Readout | None = None,
    affected_from: np.ndarray | None = None,
    calibration: Calibration | None = None,
) -> dict[str, pd.DataFrame]:
    """Return the tables of one passage.

    Args:
        passage: The measured rows.
        labels: Their names.
        span: Tokens of token-axis metrics, as measured.
        perturbed: Whether something was written, so that its size belongs into the samples.
        clean: The clean passage over the same tokens, for paired columns; None for free arms.
        paired: Paired trajectory read-outs.
        paired_outputs: ``kl_clean_pert`` and ``flip`` ``[batch, pos]``.
        divergence: Angle to the clean state over π, ``[depth, batch, pos]``.
        lens: ``lens_entropy`` and ``lens_kl`` ``[depth, batch, pos]``, ``prediction_depth`` ``[batch, pos]``.
        readout: Response of the arm: its map, and what belongs to an impulse or a sine.
        affected_from: First position of each row at which an effect can show; KL and flip rate are means from there on.
        calibration: Band of readiness: median and 99 % quantile of κ per clean token. Readiness is a function of κ.
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
    band = _band(calibration)
    if band is not None and "kappa_phase" in passage.measured.token:
        passage.outputs["readiness"] = readiness(passage.measured.token["kappa_phase"], *band)
    by_token = {name: grid for name, grid in (lens or {}).items() if grid.ndim == 2}
    for name, values in {**passage.outputs, **(paired_outputs or {}), **passage.measured.token, **by_token}.items():
        tokens[name] = values[rows, columns].astype(np.float32)

    affected = None if affected_from is None else mask & (passage.positions >= affected_from[:, None])
    effects = {} if affected is None else _effects(affected, paired_outputs or {}, divergence, readout)
    return {
        "samples": _samples(passage, labels, span, effects, perturbed, clean, paired, readout),
        "tokens": pd.DataFrame(tokens),
        "depths": _depths(passage, ids, rows, columns, pos, divergence, lens, readout),
        "profiles": _profiles(passage, ids, readout),
    }


def _band(calibration: Calibration | None) -> tuple[float, float] | None:
    if calibration is None or "kappa_phase" not in calibration.signals:
        return None
    return calibration.quantile("kappa_phase", 0.5), calibration.quantile("kappa_phase", 0.99)


def _lay(rows: Sequence[Sequence[int]], mask: np.ndarray) -> np.ndarray:
    out = np.full(mask.shape, -1, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, mask[i]] = row
    return out


def _depths(
    passage: Passage, ids: np.ndarray, rows: np.ndarray, columns: np.ndarray, pos: np.ndarray,
    divergence: np.ndarray | None, lens: Mapping[str, np.ndarray] | None, readout: Readout | None,
) -> pd.DataFrame:  # fmt: skip
    n_depths, n = len(passage.tape.states), len(rows)
    table: dict[str, Any] = {
        "sample_id": np.tile(ids[rows], n_depths), "pos": np.tile(pos, n_depths), **places(passage.tape, n_depths, n)
    }  # fmt: skip
    extra = {name: grid for name, grid in (lens or {}).items() if grid.ndim == 3}
    nothing = np.full((n_depths, *passage.mask.shape), np.nan)  # most models have none; their tables have the columns
    extra |= {name: np.asarray(passage.tape.energies.get(name, nothing)) for name in ("energy", "energy_prev")}
    if divergence is not None:
        extra["diverge_angle"] = divergence
    if readout is not None:
        extra["response_rel"] = readout.rel
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


def places(tape: Tape, n_depths: int, n: int) -> dict[str, Any]:
    """What each depth is, every one ``n`` times over: track, stage, layer, iteration and component.

    Layer, component and iteration are those that name the depth as a place (``layers=0,component=resid_mid,
    iterations=1``). Depth 0 belongs to no layer (−1). A plain decoder's blocks count as iteration 0.
    """
    turns = tape.subject.turns if tape.subject is not None else ()
    track = tape.subject.track if tape.subject is not None else "resid"
    depths = np.arange(n_depths, dtype=np.int16)
    stages = ["embed", *(t.stage for t in turns)] if turns else ["embed", *["block"] * (n_depths - 1)]
    layers = np.array([-1, *(t.layer for t in turns)], np.int16) if turns else depths - 1
    iterations = np.array([0, *(t.iteration for t in turns)], np.int16) if turns else np.zeros(n_depths, np.int16)
    components = ["resid_pre", *((t.component for t in turns) if turns else ["resid_post"] * (n_depths - 1))]

    def named(values: Sequence[str]) -> Any:
        kinds = list(dict.fromkeys(values))
        codes = np.array([kinds.index(v) for v in values], np.int8)
        return pd.Categorical.from_codes(np.repeat(codes, n), pd.Index(kinds))

    return {
        "track": named([track] * n_depths), "depth": np.repeat(depths, n), "stage": named(stages),
        "layer": np.repeat(layers.astype(np.int16), n), "iteration": np.repeat(iterations, n),
        "component": named(components),
    }  # fmt: skip


def _profiles(passage: Passage, ids: np.ndarray, readout: Readout | None) -> pd.DataFrame:
    measured, n_depths = passage.measured, len(passage.tape.states)
    table: dict[str, Any] = {
        "sample_id": np.tile(ids, n_depths),
        "track": passage.tape.subject.track if passage.tape.subject is not None else "resid",
        "depth": np.repeat(np.arange(n_depths, dtype=np.int16), len(ids)),
    }
    lockin = readout.lockin if readout is not None else None
    for name, values in (measured.profile | (lockin.profile if lockin else {})).items():
        table[name] = np.asarray(values).reshape(-1).astype(np.float32)
    reasons = measured.profile_reason | (lockin.reason if lockin else {})
    missing = {name: grid.reshape(-1) for name, grid in reasons.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # depth 0 has no terms at all
        table["coverage"] = np.nanmin(np.stack([c.reshape(-1) for c in measured.profile_coverage.values()]), axis=0)
    table["reason"] = [_spelled({n: r[i] for n, r in missing.items() if r[i]}) for i in range(len(ids) * n_depths)]
    return pd.DataFrame(table)


def _effects(
    affected: np.ndarray,
    paired_outputs: Mapping[str, np.ndarray],
    divergence: np.ndarray | None,
    readout: Readout | None,
) -> dict[str, np.ndarray]:
    """What the perturbation did, as means over the positions at which an effect can show."""
    grids = {
        "kl_clean_pert": paired_outputs.get("kl_clean_pert"), "flip_rate": paired_outputs.get("flip"),
        "diverge_angle": None if divergence is None else divergence[-1],
        "response_rel": None if readout is None else readout.rel[-1],
    }  # fmt: skip
    return {name: _mean(grid, affected) for name, grid in grids.items() if grid is not None}


def _samples(
    passage: Passage, labels: Labels, span: str, effects: Mapping[str, np.ndarray], perturbed: bool,
    clean: Passage | None, paired: Sequence[Result] | None, readout: Readout | None,
) -> pd.DataFrame:  # fmt: skip
    mask, texts, out = passage.mask.numpy(), passage.texts, passage.outputs
    chosen = emission_mask(passage.mask, passage.positions, texts, span).numpy()
    has_target = _lay([t.targets for t in texts], mask) >= 0
    # The last position of a prompt predicts the first generated token, which is none of the prompt's own.
    own = mask & has_target & (passage.positions < np.array([len(t.prompt) - 1 for t in texts])[:, None])
    predicted = own if span == "prompt" else chosen & has_target
    nll = _mean(out["nll"], predicted)
    numbers: dict[str, np.ndarray] = {
        "nll": nll, "ppl": np.exp(nll), "nll_prompt": _mean(out["nll"], own),
        "entropy": _mean(out["entropy"], chosen), "margin": _mean(out["margin"], chosen),
        "repetition": np.array([repetition_rate(t.new) for t in texts]),
        **effects,
    }  # fmt: skip
    if "readiness" in out:
        numbers["readiness"] = _mean(out["readiness"], passage.measured.keep)
    results: list[dict[str, Result]] = [dict(r) for r in passage.measured.sample]
    if clean is not None and paired is not None:
        # The mean of the differences, not the difference of the means: a term that one run lacks leaves both.
        numbers["nll_d"] = _mean(out["nll"] - clean.outputs["nll"], predicted)
        numbers["entropy_d"] = _mean(out["entropy"] - clean.outputs["entropy"], chosen)
        for mine, theirs, pair in zip(results, clean.measured.sample, paired, strict=True):
            mine.update(paired_columns(mine, theirs, pair))
    if readout is not None:
        for mine, more in zip(results, readout.sample, strict=True):
            mine.update(more)
    if perturbed:
        passport = passage.tape.passport
        numbers |= {name: np.asarray(passport.get(name, np.full(len(texts), np.nan))) for name in PASSPORT}
        counted = {name: np.asarray(passport.get(name, np.zeros(len(texts), np.int64))) for name in WRITTEN}
    else:
        counted = {}
    names = list(dict.fromkeys(name for r in results for name in r))
    return pd.DataFrame(
        {
            "sample_id": labels.ids, "prompt_id": list(labels.prompt_ids), "condition_id": labels.conditions,
            "replicate": labels.replicate, "category": list(labels.categories),
            "n_prompt": [len(t.prompt) for t in texts], "n_new": [len(t.new) for t in texts],
            "n_fed": mask.sum(1), "text": list(labels.decoded), **numbers,
            **{name: [r[name].value if name in r else math.nan for r in results] for name in names},
            **counted, "n_nonfinite": passage.measured.n_nonfinite, "status": row_status(passage.measured.n_nonfinite),
            "reasons": [
                _reasons(r, {name: float(values[i]) for name, values in numbers.items()}, bool(n))
                for i, (r, n) in enumerate(zip(results, passage.measured.n_nonfinite, strict=True))
            ],
        }
    )  # fmt: skip


def _reasons(results: Mapping[str, Result], numbers: Mapping[str, float], broken: bool) -> str | None:
    """Why values of a row are missing, by column, as JSON."""
    found = {name: r.reason for name, r in results.items() if r.reason}
    for name in (n for n, value in numbers.items() if math.isnan(value)):
        if name == "repetition":
            found[name] = f"tokens<{_NGRAM + 1}"
        elif name in PASSPORT and not math.isnan(numbers["alpha_abs"]):  # written, but this unit does not exist
            found[name] = "no-calibration" if name == "alpha_coordstd" else "zero-denominator"
        else:
            found[name] = "nonfinite" if broken else "empty"
    return _spelled(found)


def _spelled(reasons: Mapping[str, str]) -> str | None:
    return json.dumps(reasons, sort_keys=True) if reasons else None
