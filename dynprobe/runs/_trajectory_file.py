"""Anyone's trajectory: the states of an iterated model in one file, read, checked and brought into one shape.

An author can share sixteen vectors per step without sharing the model. What such a file holds, in which of three
formats, is said in ``docs/trajectories.md``; here it becomes a :class:`Trajectory`, whose states always have the axes
``[iter, batch, pos, state, dim]``, some of them of size 1.

A file is refused where a number made of it would mean something else than it says: a NaN, iterations that do not
increase, axes nobody named, shapes that change, pickled objects (they run code when they are read). What is merely
thin (two iterations, no name of the model, a run per depth that contradicts the full trajectory) is read, with a
remark. Every refusal says what was found and what to type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.errors import UsageError, near_path
from dynprobe.runs._trajectory_checks import check_finite, check_holes, check_iterations, compare_prefix, thin
from dynprobe.runs._trajectory_layers import Reading
from dynprobe.runs._trajectory_raw import (
    AXES,
    Raw,
    canonical,
    digest_of,
    per_iteration,
    per_position,
    refuse,
    stack_finals,
)

__all__ = ["FORMATS", "Trajectory", "read_trajectory", "trajectory_of"]

FORMATS = (".npz", ".safetensors", ".parquet", ".npy", ".pt")
_TORCH = (".pt", ".pth", ".bin")
_PICKLED = (".ckpt", ".pkl", ".pickle", ".joblib")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The states of an iterated model.

    Attributes:
        states: ``[iter, batch, pos, state, dim]``, in the dtype of the file.
        iter: Updates done at each entry of the first axis; 0 = before the first. Of ``final_per_depth`` the depth that
            was asked for.
        stage: Which state it is, per entry (``core``, or ``L`` and ``H`` of a model with two); a track for each.
        energy: Energy ``[iter, batch, pos]``, or None; NaN where the file has none.
        delta: The author's own Δ ``[iter, batch, pos]``, mean over state vectors, or None.
        valid: Which positions exist ``[batch, pos]``.
        positions: Their numbers ``[batch, pos]``.
        ids: Name of each sample.
        token_ids: Token ids ``[batch, pos]``, or None.
        meta: What the author says: ``model``, ``dtype``, ``seed``, ``trained_iterations`` ….
        mode: ``trajectory``; ``layers`` of a Transformer, whose depths stand in ``iter``; or ``final_per_depth``: the
            last state of a separate run for each depth.
        dims: The axes that the file itself has, in its order.
        prefix: Depth → largest relative distance of the run of that depth to the same iteration of the trajectory.
        remarks: What a reader of its numbers should know.
        assumed: What the file does not say, and what was taken instead.
        path: The file.
        sha256: Its hash.
    """

    states: torch.Tensor
    iter: NDArray[np.int64]
    stage: tuple[str, ...]
    energy: NDArray[np.float64] | None
    delta: NDArray[np.float64] | None
    valid: NDArray[np.bool_]
    positions: NDArray[np.int64]
    ids: tuple[str, ...]
    token_ids: NDArray[np.int64] | None
    meta: Mapping[str, Any]
    mode: str
    dims: tuple[str, ...]
    path: Path
    sha256: str
    prefix: Mapping[int, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def has_slots(self) -> bool:
        """Whether a position has several state vectors, or an axis for them."""
        return "state" in self.dims

    @property
    def stages(self) -> dict[str, NDArray[np.int64]]:
        """Stage → places of its states on the first axis, in order."""
        names = np.array(self.stage, dtype=object)
        return {name: np.flatnonzero(names == name) for name in dict.fromkeys(self.stage)}

    @property
    def dtype(self) -> str:
        """Dtype of the states."""
        return str(self.states.dtype).removeprefix("torch.")

    def describe(self) -> dict[str, Any]:
        """Return what the file holds, as plain data."""
        return {
            "file": str(self.path), "sha256": self.sha256, "mode": self.mode, "dtype": self.dtype,
            "dims": dict(zip(AXES, self.states.shape, strict=True)), "dims_in_file": list(self.dims),
            "stages": {name: self.iter[at].tolist() for name, at in self.stages.items()},
            "samples": list(self.ids), "positions": int(self.valid.sum()),
            "padding": int((~self.valid).sum()), "energy": self.energy is not None, "delta": self.delta is not None,
            "token_ids": self.token_ids is not None, "meta": dict(self.meta),
            "prefix": {str(k): v for k, v in self.prefix.items()},
            "remarks": list(self.remarks), "assumed": list(self.assumed),
        }  # fmt: skip


def read_trajectory(path: Any, reading: Reading | None = None, **extra: Any) -> Trajectory:
    """Read and check a trajectory file, or states that others dumped.

    Args:
        path: ``.npz``, ``.safetensors``, ``.parquet``, ``.npy``, ``.pt``; a folder of speculators' files or of cached
            activations; an ``ActivationCache``, a mapping or a list of tensors in memory.
        reading: What a file of layers does not say.
        **extra: ``token_ids``, ``valid``, ``ids``, ``meta`` of states in memory.

    Raises:
        UsageError: There is no such file, or what is in it cannot be used; the message says what to type.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "states.npz"
        ...     np.savez(file, states=np.random.default_rng(0).normal(size=(6, 16, 8)))
        ...     found = read_trajectory(file)
        >>> list(found.states.shape), found.dims, found.stage[0]
        ([6, 1, 1, 16, 8], ('iter', 'state', 'dim'), 'core')
    """
    reading = reading or Reading()
    if not isinstance(path, str | Path):
        from dynprobe.runs._trajectory_dumps import MEMORY, read_object

        raw = read_object(path, reading, extra)
        return trajectory_of(raw, MEMORY, digest_of(raw))
    file = Path(path)
    return trajectory_of(_reader(file, reading)(file), file, _sha256(file))


def trajectory_of(raw: Raw, path: Path, sha256: str) -> Trajectory:
    """Check what was read and bring it into one shape.

    Args:
        raw: The content.
        path: Where it comes from.
        sha256: Hash of it.

    Raises:
        UsageError: It cannot be used.
    """
    states, iters, mode = _states(raw)
    dims = raw.dims
    assert dims is not None
    n, batch, length = (int(s) for s in states.shape[:3])
    stage = _stages(raw, n)
    iters = _counted(stage) if iters is None else iters
    least = 1 if mode == "layers" else 2
    check_iterations(iters, stage, raw.where, "iter" if mode == "trajectory" else "depth", least)
    if mode == "layers" and not iters.any():
        refuse(raw, "the embedding (depth 0) is all there is", "store the output of a layer")
    valid = per_position(raw, "valid", raw.valid, (batch, length), bool)
    valid = np.ones((batch, length), bool) if valid is None else valid
    if not valid.any():
        refuse(raw, "valid is False everywhere", "set it to True at the positions that exist, or leave it out")
    check_holes(valid, raw)
    check_finite(states, valid, raw, iters)
    finals = {k: canonical(raw, x, [d for d in dims if d != "iter"])[0] for k, x in raw.finals.items()}
    positions = raw.positions if raw.positions is not None else np.broadcast_to(np.arange(length), (batch, length))
    prefix, remarks = compare_prefix(states, iters, stage, valid, finals, raw)
    token_ids = per_position(raw, "token_ids", raw.token_ids, (batch, length), np.int64)
    return Trajectory(
        states, iters, stage, per_iteration(raw, "energy", raw.energy, (n, batch, length)),
        per_iteration(raw, "delta", raw.delta, (n, batch, length)), valid, np.asarray(positions, np.int64),
        _ids(raw, batch), token_ids, raw.meta, mode, tuple(dims), path, sha256, prefix,
        (*raw.remarks, *remarks, *thin(iters, stage, mode, raw.meta, states)), _assumed(raw),
    )  # fmt: skip


def _reader(file: Path, reading: Reading) -> Callable[[Path], Raw]:
    from dynprobe.runs import _trajectory_dumps as dumps

    if file.is_dir():
        return lambda path: dumps.read_folder(path, reading)
    if not file.is_file():
        raise UsageError(f"there is no file {file}.{near_path(file)}")
    suffix = file.suffix.lower()
    if suffix in _PICKLED:
        raise UsageError(
            f"{file} is pickled, and reading a pickle runs the code in it; store the arrays instead: "
            "np.savez('states.npz', states=…, dims=[…]) (dynprobe import --template prints it whole)"
        )
    if suffix in _TORCH:
        return lambda path: dumps.read_pt(path, reading)
    if suffix == ".npy":
        return lambda path: dumps.read_npy(path, reading)
    if suffix == ".npz":
        from dynprobe.runs._trajectory_arrays import read_npz

        return lambda path: read_npz(path, reading)
    if suffix == ".safetensors":
        from dynprobe.runs._trajectory_arrays import read_safetensors

        return lambda path: read_safetensors(path, reading)
    if suffix == ".parquet":
        if dumps.is_activations(file):
            return lambda path: dumps.read_activations(path, [path], reading)
        from dynprobe.runs._trajectory_table import read_parquet

        return read_parquet
    raise UsageError(
        f"{file} ends in {suffix or 'nothing'}; a trajectory file is one of {', '.join(FORMATS)}. From NumPy: "
        "np.savez('states.npz', states=…, dims=[…]) (dynprobe import --template prints it whole)"
    )


def _states(raw: Raw) -> tuple[torch.Tensor, NDArray[np.int64] | None, str]:
    """The states in canonical axes, their iterations, and the mode."""
    if raw.states is None:
        stacked, depths = stack_finals(raw)
        raw.finals = {}
        return stacked, depths, "final_per_depth"
    if raw.dims is None:
        if raw.states.ndim != 3:
            shape = list(raw.states.shape)
            refuse(
                raw,
                f"states have the shape {shape} and no dims say what its axes are (only three axes are read as iter, "
                "state, dim)",
                f"add dims, {len(shape)} names out of {', '.join(AXES)}, such as dims={list(AXES[: len(shape)])!r}",
            )
        raw.dims = ["iter", "state", "dim"]
        raw.assumed.append("dims: read as iter, state, dim")
    if "iter" not in raw.dims:
        refuse(raw, f"dims {raw.dims} have no iter axis", "stack the states of all iterations along one named 'iter'")
    states = canonical(raw, raw.states, raw.dims)
    if raw.depth is not None and raw.iter is not None:
        refuse(
            raw, "both iter and depth number the first axis",
            "iter for the iterations of one run, depth for the last states of a run per depth (then states_depth_3 … "
            "may stand beside a full trajectory)",
        )  # fmt: skip
    numbers = raw.depth if raw.iter is None else raw.iter
    if raw.layers:
        return states, numbers, "layers"
    if numbers is None:
        raw.assumed.append("iter: 0, 1, 2, … (0 = before the first update)")
        return states, None, "trajectory"
    if len(numbers) != len(states):
        name = "depth" if raw.iter is None else "iter"
        refuse(raw, f"{name} has {len(numbers)} entries and states have {len(states)}", f"give one {name} per state")
    return states, numbers, "trajectory" if raw.depth is None else "final_per_depth"


def _stages(raw: Raw, n: int) -> tuple[str, ...]:
    stage = raw.stage
    if stage is None:
        return ("core",) * n
    stage = stage * n if len(stage) == 1 else stage
    if len(stage) != n:
        refuse(raw, f"stage has {len(stage)} names and there are {n} iterations", "give one name per iteration, or one")
    return tuple(stage)


def _counted(stage: tuple[str, ...]) -> NDArray[np.int64]:
    """Running numbers inside every stage."""
    seen: dict[str, int] = {}
    out = []
    for name in stage:
        out.append(seen.get(name, 0))
        seen[name] = out[-1] + 1
    return np.array(out, dtype=np.int64)


def _ids(raw: Raw, batch: int) -> tuple[str, ...]:
    if raw.ids is None:
        raw.assumed.append("ids: samples are called s0, s1, …")
        return tuple(f"s{b}" for b in range(batch))
    ids = tuple(str(name) for name in raw.ids)
    if len(ids) != batch:
        refuse(raw, f"ids have {len(ids)} names and there are {batch} samples", "give one name per sample")
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        refuse(raw, f"the id {twice!r} stands twice", "give every sample a name of its own")
    if "" in ids:
        refuse(raw, f"the id of sample {ids.index('')} is empty", "name every sample")
    return ids


def _assumed(raw: Raw) -> tuple[str, ...]:
    said = list(raw.assumed)
    if not raw.meta:
        said.append("meta: nothing is said of the model (add meta with model, dtype, seed, trained_iterations)")
    if raw.energy is None and not raw.layers:
        said.append("energy: none")
    return tuple(said)


def _sha256(file: Path) -> str:
    if file.is_dir():
        inside = sorted(
            p for p in file.rglob("*") if p.is_file() and p.suffix in (".arrow", ".parquet", ".safetensors")
        )
        lines = [f"{p.relative_to(file).as_posix()} {_sha256(p)}" for p in inside]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
