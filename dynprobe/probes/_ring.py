"""A buffer on the device that states are written into, and the way from there to the CPU without waiting.

A hook that keeps a reference costs nothing, but what it keeps is scattered over the allocator, and bringing it to the
CPU state by state makes the device wait at every layer. A :class:`Ring` is one tensor ``[site, row, column, dim]`` that
hooks write into by index and that is used again for the next batch; a :class:`Ship` brings it to pinned memory in one
copy, on a stream of its own, while the next forward runs.

Three rules make that safe. The copy waits for the event that the compute stream recorded behind the last write (and
the compute stream is asked for before the side stream is entered, or the wait would be for itself). The ring is not
written again before the copy's own event. And a buffer whose values somebody still holds is never written at all:
another one is taken, so a tape never changes under its owner.

Pinned memory is allocated once and grows with the largest batch. On the CPU nothing of this is worth its copy, so
states are kept there by reference; the ring works there all the same, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.probes._roles import Site

__all__ = ["CpuStreams", "CudaStreams", "Ring", "Ship", "Streams", "streams_of"]


class Streams(Protocol):
    """The four things that are asked of a device's queues."""

    def mark(self) -> Any:
        """Record an event behind everything that was computed so far."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy on the side, behind an event; return the event of the copy."""

    def hold(self, event: Any) -> None:
        """Let what is computed from now on wait for an event; the CPU does not."""

    def settle(self, event: Any) -> None:
        """Let the CPU wait for an event."""

    def host(self, size: int, dtype: torch.dtype) -> Tensor:
        """Allocate memory of the CPU that the device can write while others work."""


class CudaStreams:
    """The compute stream and one side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)

    def mark(self) -> Any:
        """Record an event on the stream that computes now; called outside the side stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy on the side stream."""
        done = torch.cuda.Event()
        with torch.cuda.stream(self.side):
            self.side.wait_event(after)
            target.copy_(source, non_blocking=True)
            source.record_stream(self.side)  # the allocator may not hand it on before the copy is done
            done.record(self.side)
        return done

    def hold(self, event: Any) -> None:
        """Let the compute stream wait."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self, event: Any) -> None:
        """Let the CPU wait for one copy, and for nothing else."""
        event.synchronize()

    def host(self, size: int, dtype: torch.dtype) -> Tensor:
        """Allocate pinned memory; this synchronises the device, so it is done once."""
        return torch.empty(size, dtype=dtype, pin_memory=True)


class CpuStreams:
    """A device that has done everything by the time the call returns."""

    def mark(self) -> Any:
        """There is nothing to wait for."""
        return None

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy."""
        target.copy_(source)

    def hold(self, event: Any) -> None:
        """There is nothing to wait for."""

    def settle(self, event: Any) -> None:
        """There is nothing to wait for."""

    def host(self, size: int, dtype: torch.dtype) -> Tensor:
        """Allocate memory."""
        return torch.empty(size, dtype=dtype)


def streams_of(device: torch.device | str) -> Streams:
    """Return the queues of a device."""
    place = torch.device(device)
    return CudaStreams(place) if place.type == "cuda" else CpuStreams()


def _held(flat: Tensor) -> int:
    """How many tensors share a buffer, itself included."""
    return int(torch._C._storage_Use_Count(flat.untyped_storage()._cdata))


class Ring:
    """One buffer for the states of a batch, written by index and used again.

    Args:
        sites: What is written, in the order of the first axis.
        streams: The queues of the device; None takes those of the first state that comes.

    Example:
        >>> ring = Ring([("resid_post", 0), ("resid_post", 1)])
        >>> ring.begin(rows=2, columns=3)
        >>> for site in ring.sites:
        ...     kept = ring.write(site, torch.ones(2, 3, 4))
        >>> kept.shape, ring.states().shape
        (torch.Size([2, 3, 4]), torch.Size([2, 2, 3, 4]))
    """

    def __init__(self, sites: Sequence[Site], streams: Streams | None = None) -> None:
        self.sites = tuple(sites)
        self.allocated = 0
        self._index = {site: i for i, site in enumerate(self.sites)}
        if len(self._index) != len(self.sites):
            raise UsageError("a ring has one place for each site; a site was named twice")
        self.streams = streams
        self._flat: Tensor | None = None
        self._free = 0
        self._shape = (0, 0)
        self._view: Tensor | None = None
        self._filled = [0] * len(self.sites)
        self._busy: Any = None

    def begin(self, rows: int, columns: int) -> None:
        """Begin a batch of so many rows and columns (those that will be decoded included)."""
        self._shape, self._view = (rows, columns), None
        self._filled = [0] * len(self.sites)

    def write(self, site: Site, state: Tensor) -> Tensor:
        """Copy a state behind what the site holds already, and return where it now is.

        Args:
            site: Where it was read.
            state: ``[row, column, …]``; of a prompt, or of the next decode step.

        Raises:
            UsageError: If it has no room, or is of another dtype, width or device than the others.
        """
        at, (rows, columns) = self._index[site], self._shape
        low, high = self._filled[at], self._filled[at] + state.shape[1]
        if self._view is None:
            self._view = self._make(state, rows, columns)
        view = self._view
        if state.shape[0] != rows or high > columns or state.shape[2:] != view.shape[3:] or state.dtype != view.dtype:
            raise UsageError(
                f"a state {tuple(state.shape)} of {state.dtype} has no room in a ring {tuple(view.shape)} of "
                f"{view.dtype} with {low} columns written; begin it with more columns, or read without a ring"
            )
        place = view[at, :, low:high]
        place.copy_(state)
        self._filled[at] = high
        return place

    def _make(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """The buffer in the shape of this batch: the old one where nobody holds it and it is large enough."""
        shape = (len(self.sites), rows, columns, *like.shape[2:])
        size = torch.Size(shape).numel()
        if self.streams is None:
            self.streams = streams_of(like.device)
        flat = self._flat
        fits = flat is not None and flat.dtype == like.dtype and flat.device == like.device and flat.numel() >= size
        if flat is None or not fits or _held(flat) > self._free:
            with torch.inference_mode(False):
                flat = torch.empty(size, dtype=like.dtype, device=like.device)
            self.allocated += 1
            self._flat, self._busy = flat, None
            self._free = _held(flat)
        if self._busy is not None:  # its last copy may still be on the way
            self.streams.hold(self._busy)
            self._busy = None
        return flat[:size].view(shape)

    def rewind(self, columns: int) -> None:
        """Take the last columns of every site back; what is written next stands in their place."""
        self._filled = [max(n - columns, 0) for n in self._filled]

    def states(self) -> Tensor:
        """Return everything that was written, ``[site, row, column, …]``.

        Raises:
            UsageError: If nothing was written, or sites have unequal numbers of columns.
        """
        if self._view is None or len(set(self._filled)) != 1:
            found = sorted(set(self._filled))
            raise UsageError(f"the sites of the ring hold {found} columns; it is read when all agree")
        return self._view[:, :, : self._filled[0]]

    def busy_until(self, event: Any) -> None:
        """Do not write this buffer again before an event."""
        self._busy = event

    def end(self) -> None:
        """Let the batch go; the buffer is free when nobody else holds it."""
        self._view = None


class Ship:
    """Brings rings to the CPU through two pinned buffers, so that one is filled while the other is read.

    Args:
        streams: The queues of the device.
    """

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self._pinned: list[Tensor | None] = [None, None]
        self._loads: list[_Load | None] = [None, None]
        self._next = 0

    def send(self, ring: Ring) -> _Load:
        """Begin to copy what a ring holds; ``take()`` of what is returned waits for it."""
        source = ring.states()
        after = self.streams.mark()  # before the side stream is entered: behind the last write
        side, self._next = self._next, 1 - self._next
        before = self._loads[side]
        if before is not None:
            before.keep()  # its pinned buffer is needed; what nobody has taken yet is copied out
        size, pinned = source.numel(), self._pinned[side]
        if pinned is None or pinned.numel() < size or pinned.dtype != source.dtype:
            pinned = self._pinned[side] = self.streams.host(size, source.dtype)
        target = pinned[:size].view(source.shape)
        load = _Load(self.streams, target, self.streams.copy(target, source, after))
        ring.busy_until(load.event)
        self._loads[side] = load
        return load


class _Load:
    """One copy on its way."""

    def __init__(self, streams: Streams, target: Tensor, event: Any) -> None:
        self.event = event
        self._streams, self._target = streams, target
        self._kept: Tensor | None = None

    def take(self) -> Tensor:
        """Wait for the copy and return the values, in memory of their own."""
        return self.keep()

    def keep(self) -> Tensor:
        """Move the values out of the pinned buffer."""
        if self._kept is None:
            self._streams.settle(self.event)
            self._kept = self._target.clone()
        return self._kept
