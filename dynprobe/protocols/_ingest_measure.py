"""Measuring one track of a trajectory file: what a run stores, and how it converges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from dynprobe.metrics import DEFAULT, Measurement, Result, convergence_ids, measure, measure_slots
from dynprobe.runs import Trajectory
from dynprobe.runs._trajectory_checks import FIT, consecutive

__all__ = ["MEASURED", "Measured", "Track", "measure_track", "measured"]

#: What is measured of every track.
MEASURED: tuple[str, ...] = tuple(dict.fromkeys((*DEFAULT, *convergence_ids())))


def measured(found: Trajectory) -> tuple[str, ...]:
    """Return what is measured: of layers what a run of a model stores, of iterations their convergence as well."""
    return DEFAULT if found.mode == "layers" else MEASURED


class Track(NamedTuple):
    """One stage of some samples.

    Attributes:
        name: The stage.
        places: Its states on the first axis of the file.
        rows: The samples.
    """

    name: str
    places: tuple[int, ...]
    rows: slice


@dataclass(frozen=True, eq=False)
class Measured:
    """A track and what was measured of it."""

    track: Track
    measurement: Measurement


def measure_track(found: Trajectory, track: Track, sink: int) -> Measured:
    """Measure one track.

    Slots are the units where the file has an axis for them, else positions. The residuals and the convergence of every
    single position come with both. Where stored steps are not single updates, what speaks of updates is missing.

    Args:
        found: The file.
        track: The track.
        sink: First positions that stay out of means.
    """
    states = [found.states[place, track.rows] for place in track.places]
    mask = found.valid[track.rows]
    iters = found.iter[list(track.places)]
    if found.mode == "layers":
        return Measured(track, _measure_layers([s[:, :, 0] for s in states], mask, iters, sink))
    grain = "iteration" if found.mode == "trajectory" and consecutive(iters) else "stored"
    if found.mode == "final_per_depth":
        grain = "final-per-depth"
    if found.has_slots:
        said = f"embed=1,final_norm=given,grain={grain},unit=slot,sink=drop{sink},span=all"
        out = measure_slots(states, mask, metrics=MEASURED, embed=1, sink=sink, extractor=said)
    else:
        said = f"embed=1,final_norm=given,grain={grain},sink=drop{sink},span=all"
        plain = [s[:, :, 0] for s in states]
        out = measure(plain, mask, metrics=MEASURED, embed=1, sink=sink, extractor=said)
        alone = measure_slots(states, mask, metrics=convergence_ids(), embed=1, sink=sink)
        out.depth |= {name: grid for name, grid in alone.depth.items() if name not in out.depth}
        out.token |= {name: grid for name, grid in alone.token.items() if name not in out.token}
    _judge(out, iters, grain)
    return Measured(track, out)


def _measure_layers(states: list[torch.Tensor], mask: np.ndarray, depths: np.ndarray, sink: int) -> Measurement:
    """Measure the layers of a Transformer as a run of the model does: depth 0, the embedding, takes no part."""
    grain = "" if consecutive(depths) else ",grain=stored"
    said = f"embed=0,final_norm=pre{grain},sink=drop{sink},span=all"
    return measure(states, mask, metrics=DEFAULT, embed=int(depths[0] != 0), sink=sink, extractor=said)


def _judge(m: Measurement, iters: np.ndarray, grain: str) -> None:
    """Say of the convergence metrics only what the stored iterations allow."""
    if grain != "iteration":
        reason = "final-per-depth" if grain == "final-per-depth" else "iteration-gaps"
        for level in (m.depth, m.token, m.profile):
            for name in filter(_of_updates, level):
                level[name] = np.full_like(level[name], np.nan)
        for name in filter(_of_updates, m.profile):
            m.profile_reason[name][:] = reason
        for results in m.sample:
            for name in filter(_of_updates, results):
                results[name] = _missing(results[name], reason)
        return
    for results in m.sample:
        for name in (n for n in results if n.startswith("converge_iterations")):
            results[name] = _from_start(results[name], int(iters[0]))
        if len(iters) < FIT and not results["converge_rho"].reason:
            results["converge_rho"] = replace(results["converge_rho"], reason=f"iterations<{FIT}")
    if iters[0]:
        _tokens_from_start(m, int(iters[0]))


def _of_updates(column: str) -> bool:
    """Whether a column speaks of single updates, not of distances between stored states."""
    return column.startswith(("converge_", "deq_"))


def _missing(result: Result, reason: str) -> Result:
    extras: dict[str, Any] = dict.fromkeys(result.extras, math.nan)
    return replace(result, value=math.nan, reason=reason, profile=None, per_unit=None, extras=extras)


def _from_start(result: Result, first: int) -> Result:
    """Count from the iterations' own zero. Below at the first look: it may have been so before the file begins."""
    extras = dict(result.extras)
    if not first or math.isnan(extras.get("time", math.nan)):
        return result
    if extras["event"] and float(result) <= _earliest(result.metric_id):
        extras |= {"time": math.nan, "event": math.nan}
        return replace(result, value=math.nan, reason="left-censored", extras=extras)
    extras["time"] += first
    return replace(result, value=float(result) + first, extras=extras)


def _earliest(metric_id: str) -> int:
    """Updates after which a rule can be met at the soonest."""
    text = metric_id.partition("patience=")[2]
    patience = int(text.split(",")[0].rstrip("}")) if text else 1
    return patience + ("of=converge_accel" in metric_id)


def _tokens_from_start(m: Measurement, first: int) -> None:
    """The same for every single position."""
    for name in [n for n in m.token if f"{n}_event" in m.token]:
        unknown = m.token[name] <= _earliest(m.ids[name])
        m.token[f"{name}_event"] = np.where(unknown, np.nan, m.token[f"{name}_event"])
        m.token[name] = np.where(unknown, np.nan, m.token[name] + first)
