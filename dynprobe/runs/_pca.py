"""The road of the state through depth, seen along its two widest directions.

The axes are principal components of the clean states of all texts that take part, so that every condition is seen from
the same side and a perturbation cannot choose its own axes. Position 0 stays out: in many models its state is many
times longer than the others and would be the first component by itself. Signs are fixed (the largest loading is
positive), and coordinates are rounded to six digits, so that a picture does not depend on the machine that drew it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError
from dynprobe.runs._curves import main_track

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dynprobe.runs._run import Run

__all__ = ["MEAN_UNIT", "pca_numbers"]

MEAN_UNIT = "mean over tokens"
_LAST_UNIT = "last prompt token"
#: Rows of clean states that the components are taken from, at most; evenly chosen.
_MOST_FIT = 2000
#: States on disk that are looked at, at most, in bytes; fewer prompts take part where they are larger.
_MOST_BYTES = 400e6


def pca_numbers(run: Run, most_prompts: int = 12) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the trajectories of every prompt and condition in the plane of the clean states.

    The components are those of the matrix of clean states ``[token × depth, dim]``, centred, positions 1 and later.

    Args:
        run: A run with ``--states``.
        most_prompts: Prompts that take part, at most, in the order of the run.

    Returns:
        Rows ``prompt_id, condition_id, unit, depth, pc1, pc2, n`` (``unit`` is the mean over tokens, or the last token
        of the prompt), and facts: shares of variance of the components, rows and prompts they come from.

    Raises:
        RunFolderError: There are no states, none of the clean condition, or of several widths.
    """
    if not run.manifest.parts_of("states"):
        raise RunFolderError(f"{run.path} holds no hidden states. Run again with --states to store them")
    track = main_track(run, "states")
    samples = run.samples.astype({"sample_id": str, "prompt_id": str, "condition_id": str})
    every = [str(p) for p in run.prompts["prompt_id"]]
    size = sum(part.bytes for part in run.manifest.parts_of("states"))
    prompts = every[: max(1, min(most_prompts, int(len(every) * _MOST_BYTES / max(size, 1))))]
    samples = samples[samples["prompt_id"].isin(prompts)].drop_duplicates(["prompt_id", "condition_id"])
    samples = samples.set_index("sample_id")
    conditions = run.conditions.astype({"condition_id": str, "arm": str})
    clean = list(conditions.loc[conditions["arm"] == "clean", "condition_id"])
    keys, states = _read(run, track, samples)
    of_clean = np.flatnonzero(keys["condition_id"].isin(clean).to_numpy())
    if len(of_clean) < 3:
        raise RunFolderError(f"{run.path} has {len(of_clean)} clean states after position 0; a plane needs three")
    fit = of_clean[np.unique(np.linspace(0, len(of_clean) - 1, min(len(of_clean), _MOST_FIT)).round().astype(int))]
    centre = states[fit].mean(axis=0)
    axes, shares = _components(states[fit] - centre)
    at = pd.DataFrame((states - centre) @ axes.T, columns=["pc1", "pc2"])
    keys = pd.concat([keys.reset_index(drop=True), at], axis=1)
    last = keys[keys["pos"] == keys["n_prompt"] - 1].assign(unit=_LAST_UNIT)
    found = pd.concat([keys.assign(unit=MEAN_UNIT), last])
    by = ["prompt_id", "condition_id", "unit", "depth"]
    found = found.groupby(by, sort=False)[["pc1", "pc2"]].agg(["mean", "size"])
    frame = pd.DataFrame(
        {"pc1": found["pc1", "mean"], "pc2": found["pc2", "mean"], "n": found["pc1", "size"]}
    ).reset_index()  # fmt: skip
    order = (
        {p: i for i, p in enumerate(prompts)},
        {c: i for i, c in enumerate(run.conditions["condition_id"].astype(str))},
    )
    frame = frame.assign(
        a=frame["prompt_id"].map(order[0]), b=frame["condition_id"].map(order[1]), c=frame["unit"] != MEAN_UNIT
    )
    frame = frame.sort_values(["c", "a", "b", "depth"], kind="stable", ignore_index=True).drop(columns=["a", "b", "c"])
    for name in ("pc1", "pc2"):
        frame[name] = [float(f"{v:.6g}") for v in frame[name]]
    facts = {"share1": float(f"{shares[0]:.4g}"), "share2": float(f"{shares[1]:.4g}"), "rows": float(len(fit)),
             "prompts": float(samples["prompt_id"].nunique())}  # fmt: skip
    return frame[["prompt_id", "condition_id", "unit", "depth", "pc1", "pc2", "n"]], facts


def _read(run: Run, track: str, samples: pd.DataFrame) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    frames, arrays = [], []
    for keys, array in run.state_parts(track=track):
        kept = ((keys["pos"] >= 1) & keys["sample_id"].isin(samples.index)).to_numpy()
        if kept.any():
            own = keys.loc[kept, ["sample_id", "pos", "depth"]].astype({"sample_id": str})
            frames.append(own.join(samples[["prompt_id", "condition_id", "n_prompt"]], on="sample_id"))
            arrays.append(np.asarray(array[kept], dtype=np.float64).reshape(int(kept.sum()), -1))
    if not frames:
        raise RunFolderError(f"{run.path} holds no states after position 0 of the prompts that are shown")
    widths = {a.shape[1] for a in arrays}
    if len(widths) > 1:
        raise RunFolderError(f"the states of {run.path} have {len(widths)} widths, so no plane shows them all")
    states = np.concatenate(arrays)
    if not np.isfinite(states).all():
        raise RunFolderError(f"{run.path} holds states that are not finite, so there are no principal components")
    return pd.concat(frames, ignore_index=True), states


def _components(centred: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two unit rows and their shares of variance; a missing second one is 0."""
    _, sizes, rows = np.linalg.svd(centred, full_matrices=False)
    total = float((sizes**2).sum())
    if total == 0:
        raise RunFolderError("all clean states are equal, so there are no principal components")
    axes = np.zeros((2, centred.shape[1]))
    shares = np.zeros(2)
    for i in range(min(2, len(sizes))):
        axes[i] = rows[i] * np.sign(rows[i][np.abs(rows[i]).argmax()])
        shares[i] = sizes[i] ** 2 / total
    return axes, shares
