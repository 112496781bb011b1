"""What a trajectory must be before a number may be made of it, and what is remarked where it is thin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.errors import UsageError
from dynprobe.runs._trajectory_raw import AXES, Raw, refuse

__all__ = ["FIT", "check_finite", "check_holes", "check_iterations", "compare_prefix", "consecutive", "thin"]

#: Iterations a fit of the convergence needs.
FIT = 5
#: Relative distance up to which two computations of one state are the same.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
_SAME_HALF = 2e-2
#: Words under which authors store the depth a model was trained with.
_TRAINED = ("trained_iterations", "trained_depth")


def check_iterations(iters: NDArray[np.int64], stage: tuple[str, ...], where: str, name: str, least: int = 2) -> None:
    """Refuse iterations that do not strictly increase inside a stage, are negative, or too few for any step.

    Raises:
        UsageError: They are; the message names the first place.
    """
    last: dict[str, int] = {}
    for place, (k, of) in enumerate(zip(iters.tolist(), stage, strict=True)):
        if k < 0:
            raise UsageError(f"{where}: {name}[{place}] = {k}; count updates from 0 (before the first)")
        if of in last and k <= iters[last[of]]:
            before = last[of]
            raise UsageError(
                f"{where}: {name} does not strictly increase in stage {of!r}: {name}[{place}] = {k} after "
                f"{name}[{before}] = {iters[before]}; sort the states, remove doubled ones, or name a second loop with "
                "a stage of its own"
            )
        last[of] = place
    for of in last:
        if (n := stage.count(of)) < least:
            raise UsageError(
                f"{where}: stage {of!r} has {n} iteration, and a change needs 2; store the state before the first "
                "update too (iter 0)"
            )


def check_holes(valid: NDArray[np.bool_], raw: Raw) -> None:
    """Refuse samples whose positions are interrupted: padding stands on one side."""
    begins = np.diff(valid.astype(np.int8), axis=1, prepend=0) == 1
    if len(bad := np.flatnonzero(begins.sum(1) > 1)):
        at = int(np.flatnonzero(begins[bad[0]])[1]) - 1
        refuse(raw, f"valid of sample {bad[0]} has a hole at position {at}", "leave those positions out of the arrays")


def check_finite(states: torch.Tensor, valid: NDArray[np.bool_], raw: Raw, iters: NDArray[np.int64]) -> None:
    """Refuse states with a NaN or infinity at a position that exists, naming the first."""
    real = torch.from_numpy(np.ascontiguousarray(valid))[..., None, None]
    for i, state in enumerate(states):  # one iteration at a time: the mask of all is as large as a quarter of them
        bad = ~torch.isfinite(state) & real
        if bool(bad.any()):
            at = torch.nonzero(bad)[0].tolist()
            value = float(state[tuple(at)])
            place = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, [i, *at], strict=True) if _named(axis, raw))
            count = sum(int((~torch.isfinite(s) & real).sum()) for s in states)
            refuse(
                raw, f"states are not finite: {value} at {place} (iteration {iters[i]}), the first of {count}",
                "store a run without them, or mark the position as padding in valid",
            )  # fmt: skip


def _named(axis: str, raw: Raw) -> bool:
    return raw.dims is None or axis in raw.dims


def compare_prefix(
    states: torch.Tensor, iters: NDArray[np.int64], stage: tuple[str, ...], valid: NDArray[np.bool_],
    finals: Mapping[int, torch.Tensor], raw: Raw,
) -> tuple[dict[int, float], list[str]]:  # fmt: skip
    """Compare the last state of a run of each depth with the same iteration of the full trajectory.

    Returns:
        Depth → largest relative distance of a position, and a remark where the two disagree: then a long run says
        nothing about what a shorter one would have read out.
    """
    if not finals:
        return {}, []
    if len(set(stage)) > 1:
        return {}, ["runs per depth are not compared with a trajectory of several stages"]
    apart, broken = {}, []
    for k, final in sorted(finals.items()):
        at = np.flatnonzero(iters == k)
        if not len(at):
            continue
        full = states[int(at[0])]
        if full.shape != final.shape:
            refuse(
                raw, f"the shape changes: depth {k} has {list(final.shape)}, iteration {k} has {list(full.shape)} "
                "(batch, pos, state, dim)", "give both one shape",
            )  # fmt: skip
        real = torch.from_numpy(np.ascontiguousarray(valid))
        a, b = (x[real].double().flatten(1) for x in (full, final))
        if not bool(torch.isfinite(b).all()):
            refuse(raw, f"the last state of the run of depth {k} is not finite", "store a run without NaN")
        scale = torch.maximum(a.norm(dim=1), b.norm(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)
        apart[k] = float(((a - b).norm(dim=1) / scale).max())
        if apart[k] > _SAME.get(states.dtype, _SAME_HALF):
            broken.append(k)
    said = []
    if missing := sorted(set(finals) - set(apart)):
        said.append(f"depths {', '.join(map(str, missing))} are not among the iterations and were not compared")
    if broken:
        worst = max(broken, key=lambda k: apart[k])
        said.append(
            f"prefix property fails: the run of depth {worst} ends {apart[worst]:.2g} (relative) away from iteration "
            f"{worst} of the full trajectory (depths {', '.join(map(str, broken))} disagree): a random start, or a "
            "step that depends on the depth. The full trajectory is read; curves over the depth need one run per depth"
        )
    return apart, said


def consecutive(iters: NDArray[np.int64]) -> bool:
    """Whether every stored step is one update."""
    return bool((np.diff(iters) == 1).all())


def thin(
    iters: NDArray[np.int64], stage: tuple[str, ...], mode: str, meta: Mapping[str, object], states: torch.Tensor
) -> list[str]:
    """Return what a reader of numbers made of this trajectory should know."""
    said = [_half(states)] if states.dtype in (torch.float16, torch.bfloat16) else []
    if mode == "layers":
        if not consecutive(iters):
            said.append(f"layers are missing between the depths {_some(iters)}: Δ and κ are between stored depths")
        if len(iters) == 1:
            said.append(f"one depth ({iters[0]}): what needs a step along the depth is missing")
        return said
    names = np.array(stage, dtype=object)
    for of in dict.fromkeys(stage):
        mine = iters[names == of]
        if len(mine) < FIT:
            said.append(f"stage {of} has {len(mine)} iterations; a fit of the convergence needs {FIT}")
        if mode == "final_per_depth":
            continue
        if not consecutive(mine):
            said.append(
                f"stage {of} has gaps between its iterations ({_some(mine)}): Δ and κ are between stored states, "
                "convergence metrics are missing"
            )
        if mine[0] > 0:
            said.append(f"stage {of} begins at iteration {mine[0]}; the state before it is not in the file")
    if mode == "final_per_depth":
        said.append(
            "one run per depth: Δ and κ compare the last states of neighbouring depths, convergence metrics are missing"
        )
    trained = next((meta[key] for key in _TRAINED if key in meta), None)
    if isinstance(trained, int | float) and iters.max() > trained:
        said.append(f"iteration {iters.max()} lies above the depth the model was trained with ({trained:g})")
    return said


def _half(states: torch.Tensor) -> str:
    return f"states are {str(states.dtype).removeprefix('torch.')}: rounding alone turns them by up to 5e-4 π"


def _some(iters: NDArray[np.int64]) -> str:
    shown = [str(k) for k in iters[:6]]
    return ", ".join(shown) + (" …" if len(iters) > len(shown) else "")
