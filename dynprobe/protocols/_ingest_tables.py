"""The rows of an imported trajectory, in the columns of a run of a model."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from dynprobe import metrics
from dynprobe.protocols._columns import _OWN, _with_parameters
from dynprobe.protocols._ingest_measure import Measured, measured
from dynprobe.protocols._tables import row_status, sample_id
from dynprobe.runs import Trajectory, registry_facts
from dynprobe.runs._trajectory_checks import consecutive

__all__ = ["batch_tables", "converged", "ingest_facts", "state_rows"]

#: Columns that need a readout, which a file of states does not have.
_READOUT = ("nll", "ppl", "nll_prompt", "entropy", "margin")
_READOUT_TOKENS = ("entropy", "margin", "nll")
_NO_READOUT = "no-readout"
#: Columns that are judged against a model's calibration, which a file of states does not have either.
_CALIBRATED, _NO_CALIBRATION = ("readiness",), "no-calibration"


def batch_tables(found: Trajectory, tracks: Sequence[Measured], chosen: str, rows: slice) -> dict[str, pd.DataFrame]:
    """Return the tables of some samples.

    Args:
        found: The file.
        tracks: Every track, measured over these samples.
        chosen: The track that samples and tokens speak of.
        rows: The samples.
    """
    main = next(one for one in tracks if one.track.name == chosen)
    ids = np.array([sample_id(name, "clean", 0) for name in found.ids[rows]], dtype=object)
    at = np.nonzero(found.valid[rows])
    return {
        "samples": _samples(found, main, ids, rows),
        "tokens": _tokens(found, main, ids, rows, at),
        "depths": pd.concat([_depths(found, one, ids, rows, at) for one in tracks], ignore_index=True),
        "profiles": pd.concat([_profiles(found, one, ids) for one in tracks], ignore_index=True),
    }


def _samples(found: Trajectory, main: Measured, ids: np.ndarray, rows: slice) -> pd.DataFrame:
    m, count = main.measurement, found.valid[rows].sum(1)
    names = list(dict.fromkeys(name for results in m.sample for name in results))
    values: dict[str, list[Any]] = {}
    for name in names:
        values[name] = [results[name].value for results in m.sample]
        if name.startswith("converge_iterations"):
            for part in ("time", "event"):
                values[f"{name}_{part}"] = [results[name].extras.get(part, math.nan) for results in m.sample]
    return pd.DataFrame(
        {
            "sample_id": ids, "prompt_id": list(found.ids[rows]), "condition_id": "clean", "replicate": 0,
            "category": None, "n_prompt": count, "n_new": 0, "n_fed": count, "text": None,
            **dict.fromkeys((*_READOUT, *_CALIBRATED), math.nan), "repetition": math.nan, **values,
            "n_nonfinite": m.n_nonfinite, "status": row_status(m.n_nonfinite),
            "reasons": [_reasons(results) for results in m.sample],
        }
    )  # fmt: skip


def _reasons(results: Mapping[str, metrics.Result]) -> str:
    found = {name: result.reason for name, result in results.items() if result.reason}
    missing = {**dict.fromkeys(_READOUT, _NO_READOUT), **dict.fromkeys(_CALIBRATED, _NO_CALIBRATION)}
    return json.dumps({**found, **missing, "repetition": "tokens<5"}, sort_keys=True)


def _tokens(
    found: Trajectory, main: Measured, ids: np.ndarray, rows: slice, at: tuple[np.ndarray, ...]
) -> pd.DataFrame:
    fed = np.full(found.valid[rows].shape, -1) if found.token_ids is None else found.token_ids[rows]
    following = np.where(found.valid[rows], fed, -1)
    following = np.concatenate([following[:, 1:], np.full((len(fed), 1), -1)], axis=1)
    table: dict[str, Any] = {
        "sample_id": ids[at[0]], "pos": found.positions[rows][at].astype(np.int32), "phase": "prefill",
        "token_id": fed[at].astype(np.int32), "token_text": None, "target_id": following[at].astype(np.int32),
        **dict.fromkeys((*_READOUT_TOKENS, *_CALIBRATED), np.full(len(at[0]), np.nan, np.float32)),
    }  # fmt: skip
    for name, grid in main.measurement.token.items():
        table[name] = grid[at].astype(np.float32)
    return pd.DataFrame(table)


def _labels(found: Trajectory, one: Measured, ids: np.ndarray, rows: slice, at: tuple[np.ndarray, ...]) -> pd.DataFrame:
    """Labels of the rows of the depths table: depth by depth, position by position."""
    places = list(one.track.places)
    n_depths, n = len(places), len(at[0])
    iteration = np.repeat(found.iter[places].astype(np.int32), n)
    if found.mode == "layers":
        return pd.DataFrame(
            {
                "sample_id": np.tile(ids[at[0]], n_depths), "pos": np.tile(found.positions[rows][at], n_depths),
                "track": one.track.name, "depth": iteration, "stage": np.where(iteration > 0, "block", "embed"),
                "layer": iteration - np.int32(1), "iteration": np.int32(0),
                "component": np.where(iteration > 0, "resid_post", "resid_pre"),
            }
        )  # fmt: skip
    return pd.DataFrame(
        {
            "sample_id": np.tile(ids[at[0]], n_depths), "pos": np.tile(found.positions[rows][at], n_depths),
            "track": one.track.name, "depth": np.repeat(np.arange(n_depths, dtype=np.int32), n),
            "stage": one.track.name, "layer": np.int32(-1), "iteration": iteration,
            "component": np.where(iteration > 0, "resid_post", "resid_pre"),
        }
    )  # fmt: skip


def _depths(found: Trajectory, one: Measured, ids: np.ndarray, rows: slice, at: tuple[np.ndarray, ...]) -> pd.DataFrame:
    places = list(one.track.places)
    table = _labels(found, one, ids, rows, at)
    grids = dict(one.measurement.depth)
    nothing = np.full((len(places), *found.valid[rows].shape), np.nan)
    grids["energy"] = nothing if found.energy is None else found.energy[places][:, rows]
    grids["energy_prev"] = nothing
    if found.delta is not None:
        grids["delta_given"] = found.delta[places][:, rows]
    columns = {name: grid[:, at[0], at[1]].reshape(-1) for name, grid in grids.items()}
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def _depths_of(found: Trajectory, one: Measured) -> np.ndarray:
    """Numbers of the states on the track: those of the file where it names depths, else counted."""
    places = list(one.track.places)
    return found.iter[places].astype(np.int16) if found.mode == "layers" else np.arange(len(places), dtype=np.int16)


def _profiles(found: Trajectory, one: Measured, ids: np.ndarray) -> pd.DataFrame:
    m, n_depths = one.measurement, len(one.track.places)
    table: dict[str, Any] = {
        "sample_id": np.tile(ids, n_depths), "track": one.track.name,
        "depth": np.repeat(_depths_of(found, one), len(ids)),
        **{name: grid.reshape(-1).astype(np.float32) for name, grid in m.profile.items()},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # depth 0 has no terms at all
        table["coverage"] = np.nanmin(np.stack([c.reshape(-1) for c in m.profile_coverage.values()]), axis=0)
    why = {name: grid.reshape(-1) for name, grid in m.profile_reason.items()}
    said = ({name: grid[i] for name, grid in why.items() if grid[i]} for i in range(len(ids) * n_depths))
    table["reason"] = [json.dumps(reasons, sort_keys=True) if reasons else None for reasons in said]
    return pd.DataFrame(table)


def state_rows(found: Trajectory, one: Measured) -> tuple[pd.DataFrame, torch.Tensor]:
    """Return the keys and the states of a track: ``[dim]`` per row, or ``[state, dim]`` where there are slots."""
    rows, places = one.track.rows, list(one.track.places)
    at = np.nonzero(found.valid[rows])
    ids = np.array([sample_id(name, "clean", 0) for name in found.ids[rows]], dtype=object)
    chosen = found.states[places][:, rows][:, torch.from_numpy(at[0]), torch.from_numpy(at[1])].flatten(0, 1)
    return _labels(found, one, ids, rows, at), (chosen if found.has_slots else chosen[:, 0]).contiguous()


def converged(samples: pd.DataFrame) -> dict[str, Any]:
    """Return over all samples the median contraction, and how many met each tolerance after how many iterations.

    The median counts a censored sample as later than any other; where half of them are censored it is missing.
    """
    if "converge_rho" not in samples:
        return {}
    out: dict[str, Any] = {"converge_rho": float(samples["converge_rho"].median())}
    for name in [n for n in samples if f"{n}_event" in samples]:
        event = samples[f"{name}_event"].to_numpy(np.float64)
        known = ~np.isnan(event)
        times = np.where(event[known] == 1, samples[f"{name}_time"].to_numpy(np.float64)[known], np.inf)
        middle = float(np.quantile(times, 0.5, method="higher")) if len(times) else math.nan
        out[str(name)] = {
            "median": middle if math.isfinite(middle) else math.nan, "reached": int((event == 1).sum()),
            "censored": int((event == 0).sum()), "missing": int((~known).sum()),
        }  # fmt: skip
    return out


def ingest_facts(found: Trajectory, sink: int) -> dict[str, dict[str, str]]:
    """Return what every column of an import means."""
    which = measured(found)
    columns = metrics.columns() | _with_parameters(which)
    facts = registry_facts(columns)
    within = "the state vectors of a position" if found.has_slots else "the positions of a sample"
    over = f"positions from the {sink + 1}th on" if sink else "all positions"
    if found.mode == "layers" and sink == 1:
        over = "all"  # the words of a run of a model, which leaves the first position out too
    for name, column in columns.items():
        spec = metrics.spec(metrics.parse_id(column.metric_id).id)
        facts[name] |= {"span": over, "description": spec.sentence}
        for table in ("tokens", "depths"):
            facts[f"{table}.{name}"] = {**facts.get(f"{table}.{name}", {}), "span": "all"}
        if not found.has_slots or not spec.input.startswith("trajectory"):
            continue
        facts[f"depths.{name}"] |= {"aggregation": f"over {within}"}
        for table in ("samples", "profiles"):
            how = facts.get(f"{table}.{name}", {}).get("aggregation", "")
            facts[f"{table}.{name}"] = {"aggregation": f"{how}; then mean over positions".removeprefix("; then ")}
    for name in (*_READOUT, "repetition", "n_fed", "n_nonfinite"):
        if name in _OWN:
            metric_id, unit, _, how, text = _OWN[name]
            digest = metrics.spec(metric_id).digest if metric_id else ""
            facts[f"samples.{name}"] = {
                "id": metric_id, "unit": unit, "digest": digest, "aggregation": how, "description": text,
            }  # fmt: skip
    stored = "" if found.mode != "layers" or consecutive(found.iter) else f"between stored depths {found.iter.tolist()}"
    for name in columns if stored else ():  # so that compare refuses them beside those of all depths
        for table in ("samples", "depths", "tokens", "profiles"):
            how = facts.get(f"{table}.{name}", {}).get("aggregation", "")
            facts[f"{table}.{name}"] = {
                **facts.get(f"{table}.{name}", {}),
                "aggregation": f"{how}; {stored}".strip("; "),
            }
    for full in (i for i in which if i.startswith("converge.iterations")):
        name = metrics.column_name(full)
        facts[f"samples.{name}"] = {"aggregation": f"of the residual over {within}" + ", all positions together"}
        facts[f"{name}_time"] = {
            "id": full, "unit": "iterations", "description": f"{name}, or the last iteration where it is censored.",
        }  # fmt: skip
        facts[f"{name}_event"] = {
            "id": full, "unit": "", "description": f"1 where {name} was reached, 0 where it is censored.",
        }  # fmt: skip
    facts["energy"] = {
        "id": "", "span": "all", "description": "Energy of the state, as the file gives it.",
    }  # fmt: skip
    facts["delta_given"] = {
        "id": "", "unit": "", "span": "all", "description": "The author's own Δ, as the file gives it.",
    }  # fmt: skip
    return facts
