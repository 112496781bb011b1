"""A trajectory heard while it is made: a model calls back with its state after each iteration.

A loop that no hook can reach (a solver, a compiled step, a framework that is not PyTorch) can still be measured by who
writes it: ``my_model(ids, on_iteration=cb)``, or ``cb.follow(states)`` where the loop is a generator. What was heard is
the same :class:`Trajectory` that a file would give, checked by the same rules, and ``dp.ingest`` makes the same run of
it. Every state is copied when it is heard, so a loop that works in place loses nothing.

Refused at once, where the mistake is made: a shape that changes, an iteration that does not increase inside its stage,
axes that nobody named. What can be known only at the end (a NaN, one iteration alone) is refused when the block closes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.runs._trajectory_file import Trajectory, trajectory_of
from dynprobe.runs._trajectory_raw import AXES, Raw, canonical, digest_of, read_dims

__all__ = ["CALLBACK", "Trace", "trace_callback"]

#: What stands in place of a file's path.
CALLBACK = Path("trace_callback")
_WHERE = str(CALLBACK)


@dataclass
class _Batch:
    """What was heard of one batch: states with all axes but ``iter``."""

    ids: list[str] | None
    valid: Tensor | None
    token_ids: Tensor | None
    places: list[tuple[str, int]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    energies: list[Tensor | None] = field(default_factory=list)


class Trace:
    """Hears the states of one or several batches; :func:`trace_callback` makes one.

    Attributes:
        dims: Names of the axes of a state; None until the first one was heard, where they were not given.
        meta: What is said of the model.
    """

    def __init__(self, dims: str | Sequence[str] | None, meta: Mapping[str, Any] | None) -> None:
        self._raw = Raw(_WHERE)
        self.dims: list[str] | None = None if dims is None else _without_iter(self._raw, dims)
        self.meta = dict(meta or {})
        self._batches: list[_Batch] = []
        self._found: Trajectory | None = None

    def batch(self, ids: Sequence[str] | None = None, valid: Any = None, token_ids: Any = None) -> Trace:
        """Begin another batch; its iterations count anew and must be those of the batch before.

        Args:
            ids: Names of its samples.
            valid: ``[batch, pos]``, False at padding.
            token_ids: ``[batch, pos]``.

        Returns:
            Itself.
        """
        if self._batches and not self._batches[-1].states:
            raise UsageError(f"{_WHERE}: a batch was begun before the one before it had a state; call back in between")
        self._batches.append(_Batch(None if ids is None else [str(i) for i in ids], _flat(valid), _flat(token_ids)))
        return self

    def __call__(self, k: int, state: Any, stage: str = "core", energy: Any = None) -> None:
        """Hear one state.

        Args:
            k: Updates done: 0 for the state before the first.
            state: Tensor or array with the axes ``dims``.
            stage: Which state it is, in a model that has several.
            energy: Its energy, ``[batch, pos]`` or those of the two axes that the state has; or a number.

        Raises:
            UsageError: The shape changed, ``k`` does not increase inside the stage, or the axes are not named.
        """
        if self._found is not None:
            raise UsageError(f"{_WHERE}: iteration {k} was called back after the with block had closed")
        now, heard = self._batches[-1], _copied(state)
        shaped = canonical(self._raw, heard[None], ["iter", *self._axes(heard, now)])[0]
        if now.states and (first := now.states[0].shape) != shaped.shape:
            raise UsageError(
                f"{_WHERE}: the shape changes: {list(shaped.shape)} at {stage} iteration {k}, {list(first)} before "
                "(batch, pos, state, dim); begin another batch with its own states: cb.batch(ids=[…])"
            )
        last = next((i for of, i in reversed(now.places) if of == stage), None)
        if last is not None and int(k) <= last:
            raise UsageError(
                f"{_WHERE}: iteration {k} of stage {stage!r} after {last}; iterations increase. A second text is "
                "another batch (cb.batch(ids=[…])), a second loop another stage (stage=…)"
            )
        if int(k) < 0:
            raise UsageError(f"{_WHERE}: iteration {k}; count updates from 0 (the state before the first)")
        now.places.append((stage, int(k)))
        now.states.append(shaped)
        now.energies.append(None if energy is None else _per_position(energy, shaped, k))

    def follow(self, states: Iterable[Any], stage: str = "core") -> None:
        """Hear the states of a loop that yields them, the one before its first update first."""
        for k, state in enumerate(states):
            self(k, state, stage)

    def _axes(self, state: Tensor, now: _Batch) -> list[str]:
        if self.dims is None:
            grid = next((g.shape for g in (now.valid, now.token_ids) if g is not None), None)
            if state.ndim == 2:
                self.dims = ["state", "dim"]
            elif state.ndim == 4:
                self.dims = ["batch", "pos", "state", "dim"]
            elif state.ndim == 3 and grid is not None and state.shape[:2] == grid:
                self.dims = ["batch", "pos", "dim"]
            else:
                raise UsageError(
                    f"{_WHERE}: a state has the shape {list(state.shape)}, and its axes could be several; say "
                    "trace_callback(dims='batch,pos,dim') for tokens or dims='batch,state,dim' for state vectors"
                )
        if state.ndim != len(self.dims):
            raise UsageError(
                f"{_WHERE}: a state has the shape {list(state.shape)}, and its axes are {', '.join(self.dims)}; give "
                "one name per axis"
            )
        return self.dims

    @property
    def trajectory(self) -> Trajectory:
        """What was heard, checked.

        Raises:
            UsageError: The block has not closed, or did not close well.
        """
        if self._found is None:
            raise UsageError(f"{_WHERE}: the trajectory is there when the with block has closed without an error")
        return self._found

    def close(self) -> None:
        """Check what was heard and make a trajectory of it; the end of the ``with`` block does so."""
        heard = [b for b in self._batches if b.states]
        if not heard:
            raise UsageError(f"{_WHERE}: nothing called back; hand cb to the loop: my_model(ids, on_iteration=cb)")
        for number, one in enumerate(heard):
            _fits(number, one, heard[0])
        raw, dims = self._raw, self.dims
        assert dims is not None
        raw.dims = ["iter", *sorted({*dims, *(["batch"] if len(heard) > 1 else [])}, key=AXES.index)]
        raw.meta, raw.stage = self.meta, [stage for stage, _ in heard[0].places]
        raw.iter = np.array([k for _, k in heard[0].places], dtype=np.int64)
        length = max(b.states[0].shape[1] for b in heard)
        missing = set(AXES) - set(raw.dims)
        whole = torch.cat([_padded(torch.stack(b.states), length, 2) for b in heard], dim=1)
        raw.states = whole.squeeze(tuple(i for i, axis in enumerate(AXES) if axis in missing))
        raw.valid = torch.cat([_padded(_grid(b, b.valid, True), length, 1) for b in heard]).numpy()
        if all(b.token_ids is not None for b in heard):
            raw.token_ids = torch.cat([_padded(_grid(b, b.token_ids, -1), length, 1, -1) for b in heard]).numpy()
        if any(e is not None for b in heard for e in b.energies):
            raw.energy = torch.cat([_padded(_energies(b), length, 2, np.nan) for b in heard], dim=1).numpy()
        if all(b.ids is not None for b in heard):
            raw.ids = [name for b in heard for name in b.ids or ()]
        self._found = trajectory_of(raw, CALLBACK, digest_of(raw))

    def save(self, path: str | Path) -> Path:
        """Write what was heard as a trajectory file, ``.safetensors`` or ``.npz``, for others to read.

        Returns:
            The file.
        """
        found, file = self.trajectory, Path(path)
        absent = tuple(i for i, axis in enumerate(AXES) if axis not in found.dims)
        states = found.states.squeeze(absent).contiguous()  # an axis that is there is read as one: slots are units
        arrays: dict[str, Any] = {"states": states, "iter": torch.from_numpy(found.iter)}
        for name in ("energy", "token_ids", "valid"):
            if (value := getattr(found, name)) is not None:
                arrays[name] = torch.from_numpy(np.ascontiguousarray(value))
        notes = {"dims": list(found.dims), "stage": list(found.stage), "ids": list(found.ids), "meta": dict(found.meta)}
        if file.suffix.lower() == ".safetensors":
            from safetensors.torch import save_file

            save_file(arrays, file, metadata={name: json.dumps(value) for name, value in notes.items()})
        elif file.suffix.lower() == ".npz" and found.states.dtype != torch.bfloat16:
            plain: dict[str, Any] = {name: np.array(value) for name, value in notes.items() if name != "meta"}
            plain |= {name: array.numpy() for name, array in arrays.items()}
            np.savez(file, **plain, meta=np.array(json.dumps(notes["meta"])))
        else:
            raise UsageError(f"{file}: a trajectory is written to .safetensors, or to .npz where it is not bfloat16")
        return file


@contextmanager
def trace_callback(
    dims: str | Sequence[str] | None = None,
    *,
    ids: Sequence[str] | None = None,
    valid: Any = None,
    token_ids: Any = None,
    meta: Mapping[str, Any] | None = None,
) -> Iterator[Trace]:
    """Hear the states of a loop that calls back, and make a trajectory of them.

    Args:
        dims: Names of a state's axes, out of ``batch, pos, state, dim``: ``"batch,pos,dim"``. Without it two axes are
            read as ``state, dim``, four as ``batch, pos, state, dim``, three as ``batch, pos, dim`` where ``valid`` or
            ``token_ids`` have the first two; nothing else is guessed.
        ids: Names of the samples; equal names pair the run with others.
        valid: ``[batch, pos]``, False at padding.
        token_ids: ``[batch, pos]``.
        meta: What is said of the model: ``model``, ``seed``, ``trained_iterations``, ….

    Yields:
        The callback ``cb(k, state, stage="core", energy=None)``. After the block ``dp.ingest(cb)`` makes a run of it,
        ``cb.trajectory`` is what it heard, and ``cb.save("states.safetensors")`` a file of it.

    Raises:
        UsageError: What was heard is no trajectory; see ``docs/trajectories.md``.

    Example:
        >>> import torch
        >>> state = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        >>> with trace_callback(dims="batch,pos,dim", ids=["a", "b"], meta={"model": "halving"}) as cb:
        ...     for k in range(6):
        ...         cb(k, state)
        ...         state *= 0.5
        >>> list(cb.trajectory.states.shape), cb.trajectory.stage[0], cb.trajectory.ids
        ([6, 2, 3, 1, 8], 'core', ('a', 'b'))
    """
    trace = Trace(dims, meta).batch(ids, valid, token_ids)
    yield trace
    trace.close()


def _without_iter(raw: Raw, dims: str | Sequence[str]) -> list[str]:
    found = read_dims(raw, dims if isinstance(dims, str) else list(dims))
    if "iter" in found:
        raise UsageError(f"{_WHERE}: dims {found} name iter, and a call brings one state; leave iter out")
    return found


def _flat(grid: Any) -> Tensor | None:
    if grid is None:
        return None
    found = torch.as_tensor(grid).detach().cpu()
    if found.ndim != 2:
        raise UsageError(f"{_WHERE}: valid and token_ids are [batch, pos]; the shape {list(found.shape)} was given")
    return found.clone()


def _copied(state: Any) -> Tensor:
    found = torch.as_tensor(state).detach().to("cpu", copy=True)
    if not found.is_floating_point():
        raise UsageError(f"{_WHERE}: a state has the dtype {found.dtype}; states are floats")
    return found


def _per_position(energy: Any, state: Tensor, k: int) -> Tensor:
    found, shape = torch.as_tensor(energy).detach().cpu().double(), state.shape[:2]
    if tuple(s for s in found.shape if s != 1) != tuple(s for s in shape if s != 1):
        raise UsageError(
            f"{_WHERE}: the energy at iteration {k} has the shape {list(found.shape)}, and the states need "
            f"{list(shape)} (batch, pos)"
        )
    return found.reshape(shape).clone()


def _fits(number: int, one: _Batch, first: _Batch) -> None:
    """Refuse a batch whose iterations or vectors are others, or whose names do not fit its states."""
    if one.places != first.places:
        raise UsageError(
            f"{_WHERE}: batch {number} has {len(one.places)} states and other iterations than batch 0, which has "
            f"{len(first.places)}; where a loop halts by itself, trace each batch on its own and ingest each"
        )
    batch, length, *vector = one.states[0].shape
    if vector != list(first.states[0].shape[2:]) or one.states[0].dtype != first.states[0].dtype:
        raise UsageError(f"{_WHERE}: states of batch {number} have another number of vectors, width or dtype")
    if (one.ids is None) != (first.ids is None) or (one.token_ids is None) != (first.token_ids is None):
        raise UsageError(f"{_WHERE}: ids and token_ids are given for every batch or for none")
    if one.ids is not None and len(one.ids) != batch:
        raise UsageError(f"{_WHERE}: batch {number} has {batch} samples and {len(one.ids)} ids; give one name each")
    for name, grid in (("valid", one.valid), ("token_ids", one.token_ids)):
        if grid is not None and grid.shape != (batch, length):
            raise UsageError(
                f"{_WHERE}: {name} is {list(grid.shape)}, and the states have {[batch, length]} samples and positions"
            )


def _grid(one: _Batch, grid: Tensor | None, otherwise: Any) -> Tensor:
    """``[batch, pos]``, with one value where nothing was given."""
    return torch.full(one.states[0].shape[:2], otherwise) if grid is None else grid


def _energies(one: _Batch) -> Tensor:
    nothing = torch.full(one.states[0].shape[:2], torch.nan, dtype=torch.float64)
    return torch.stack([nothing if e is None else e for e in one.energies])


def _padded(values: Tensor, length: int, axis: int, fill: Any = 0) -> Tensor:
    """Values with the axis of positions grown to a length, on the right."""
    shape = list(values.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([values, values.new_full(shape, fill)], dim=axis) if shape[axis] else values
