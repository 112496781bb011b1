"""How the states of a batch are reduced: many layers in one go, or one layer after the other.

On the CPU a block of depths that stays in the cache is fastest, and that is what is done. On a device the cost is the
number of kernels, so all layers in one go should win, but a wide model's layers may be large enough that copying them
together costs more than it saves. So on a device both are timed once per (device, dtype, width, layers), on the first
batch of that kind, and the faster is kept for the life of the process. ``reducing`` says it by hand.

The reduction can also be compiled (``reducing(compiled=True)``): the chord between two states, its one operation of two
passes, becomes one fused kernel. The model is never compiled. On the first states of each kind the compiled chord is
compared with the other; where there is no compiler, or they differ by more than rounding, it is not used, and a warning
says so. Both choices change the last bits at most.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch

from dynprobe.errors import UsageError

__all__ = ["chord_length", "compiling", "faster", "reducing", "way_of", "why_not_compiled"]

_WAYS = ("auto", "stack", "layer")
_TRIALS = 3

_way: ContextVar[str] = ContextVar("way", default="auto")
_compiled: ContextVar[bool] = ContextVar("compiled", default=False)
_known: dict[tuple[Any, ...], str] = {}
#: Device, dtypes and width → why the compiled chord is not used there; None where it is.
_unfit: dict[tuple[Any, ...], str | None] = {}
_BACKEND = "inductor"
#: How far the compiled chord may be off, relative to what goes into it.
_ROUNDING = 1e-5
_guard, _compiling = threading.Lock(), threading.Lock()


@contextmanager
def reducing(how: str = "auto", *, compiled: bool = False) -> Iterator[None]:
    """Say how states are reduced inside the block.

    Args:
        how: ``"stack"`` (all layers that fit, in one go), ``"layer"`` (one after the other), or ``"auto"``.
        compiled: Compile the chord with ``torch.compile``; falls back with a warning where that cannot be done.

    Raises:
        UsageError: If ``how`` is none of these.

    Example:
        >>> with reducing("layer"):
        ...     pass
    """
    if how not in _WAYS:
        raise UsageError(f"reducing({how!r}); it is one of {', '.join(_WAYS)}")
    tokens = _way.set(how), _compiled.set(compiled)
    try:
        yield
    finally:
        _way.reset(tokens[0])
        _compiled.reset(tokens[1])


@contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    """Compile the reduction inside the block where that is wanted; what ``reducing`` said around it stays."""
    token = _compiled.set(wanted or _compiled.get())
    try:
        yield
    finally:
        _compiled.reset(token)


def way_of(device: torch.device, kind: tuple[Any, ...], again: Callable[[], object]) -> str:
    """Return how a batch is reduced: ``"cache"`` (blocks that stay in the CPU's cache), ``"stack"`` or ``"layer"``.

    Args:
        device: Where the states are.
        kind: What else the answer depends on: dtype, width, layers.
        again: Reduces the batch; called where both ways are timed.
    """
    way = _way.get()
    if way != "auto":
        return way
    if device.type == "cpu":
        return "cache"
    key = (str(device), *kind)
    with _guard:
        if key not in _known:
            _known[key] = faster({name: partial(_trial, name, again) for name in ("stack", "layer")})
        return _known[key]


def _trial(way: str, again: Callable[[], object]) -> None:
    with reducing(way, compiled=_compiled.get()):
        again()


def faster(ways: dict[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter) -> str:
    """Return the name of the way that took least, best of three in turns; the first of all goes uncounted.

    Example:
        >>> faster({"slow": lambda: time.sleep(0.01), "fast": lambda: None})
        'fast'
    """
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(_TRIALS + 1):
        for name, run in ways.items():
            begun = clock()
            run()
            if turn:
                best[name] = min(best[name], clock() - begun)
    return min(best, key=lambda name: best[name])


def chord_length(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor, scratch: torch.Tensor | None) -> torch.Tensor:
    """Return ‖b − factor·a‖ over the last axis.

    Args:
        a: Vectors ``[..., dim]``.
        b: Vectors of the same shape.
        factor: One number per vector.
        scratch: Buffer of the shape of ``a``, overwritten.
    """
    if _compiled.get() and _fit(a, b, factor):
        made: torch.Tensor = _fused()(a, b, factor)
        return made
    # addcmul is one pass; the buffer keeps it inside the cache
    return torch.linalg.vector_norm(torch.addcmul(b, a, factor[..., None], value=-1.0, out=scratch), dim=-1)


@cache
def _fused() -> Callable[..., Any]:
    def chord(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(b - factor[..., None] * a, dim=-1)

    return torch.compile(chord, dynamic=True, backend=_BACKEND)


def _fit(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor) -> bool:
    """Whether the compiled chord may be used, found out on the first states of each kind and kept for the process."""
    kind = (str(a.device), a.dtype, b.dtype, a.shape[-1])
    with _compiling:  # another lock: what is timed under the first one may come by here
        if kind not in _unfit:
            _unfit[kind] = why = _why_not(a, b, factor)
            if why is not None:
                warnings.warn(f"the metrics are not compiled: {why}; they go on as they are", stacklevel=4)
        return _unfit[kind] is None


def _why_not(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor) -> str | None:
    plain = torch.linalg.vector_norm(torch.addcmul(b, a, factor[..., None], value=-1.0), dim=-1)
    try:
        made = _fused()(a, b, factor)
    except Exception as error:  # no compiler, or one that does not compile: whatever it was, nothing depends on it
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    # A difference of two vectors is known to the rounding of the longer one.
    size = torch.linalg.vector_norm(b, dim=-1).nan_to_num(0.0, 0.0, 0.0)
    finite = torch.isfinite(plain)
    off = torch.where(finite, (made - plain).abs(), 0.0)
    if not torch.equal(torch.isfinite(made), finite) or bool((off > _ROUNDING * (plain.abs() + size)).any()):
        return f"they would differ by {float(off.max()):.3g} from what is not compiled"
    return None


def why_not_compiled() -> str | None:
    """Return why compiled metrics fell back in this process; None where they did not, or were not asked for."""
    return next((why for why in _unfit.values() if why is not None), None)
