"""What a unit of work needs in memory, against what is free where it will run.

The need is counted, not measured: two passages are held at once (the clean one and the arm that is compared with it),
each with its states at every depth and its logits; a forward needs room of its own beside them; and a text that is
written needs its key–value cache. What a unit becomes stays in the memory of the CPU until it is on the disk, and so
does what was made before it. It is an estimate for choosing how many rows go together, and it is checked against the
resident memory of real runs in ``docs/devices.md``. What is free is asked of the device at that moment; workers on one
machine, or on one device, take equal shares of it.

A CPU under Linux seldom says that memory ran out: it lends more than it has and then ends the process. So a unit that
would not fit by this count is cut into groups before it is begun, and only what the count missed is left to the
halving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dynprobe.errors import ModelError
from dynprobe.probes import Subject
from dynprobe.probes._chunks import out_of_memory
from dynprobe.protocols._behind import WAITING

__all__ = [
    "MemoryPlan",
    "before_the_units",
    "free_memory",
    "held",
    "memory_plan",
    "row_bytes",
    "rows_fitting",
    "too_large",
    "weight_bytes",
    "while_loading",
]

#: Share of the free memory that a group of rows may take by the estimate.
_SHARE = 0.8
#: Widths of the residual stream that one token needs inside a block (MLP inner states, queries, keys, values, norms).
_INNER = 16
_PASSAGES = 2
#: Logits in float32 that stand beside those that are kept: those being made, their exponentials, a comparison.
_OUTPUTS = 3
#: Units that are held finished: the one just made, the one being written, and those that wait for the disk.
_FINISHED = 2 + WAITING


@dataclass(frozen=True)
class MemoryPlan:
    """What the largest unit of a run needs.

    Attributes:
        device: Where.
        free_bytes: What was free when the run began; None where the device does not say.
        weight_bytes: The weights, which are in place already.
        row_bytes: The longest row.
        unit_bytes: The largest unit, all its rows at once.
        rows: Rows of that unit.
        rows_at_once: How many of them fit by this count.
        waiting_bytes: Of the memory of the CPU: what finished units hold until they are on the disk.
        sharers: Workers that share what is free.
    """

    device: str
    free_bytes: int | None
    weight_bytes: int
    row_bytes: int
    unit_bytes: int
    rows: int
    rows_at_once: int
    waiting_bytes: int = 0
    sharers: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return it as a plain mapping."""
        return asdict(self)


def free_memory(device: torch.device | str) -> int | None:
    """Return the bytes that can still be taken on a device, or None where it does not say.

    On CUDA the blocks that torch holds and does not use count as free. On the CPU the limit of the container counts
    where it is below what the machine has.

    Example:
        >>> found = free_memory("cpu")
        >>> found is None or found > 0
        True
        >>> free_memory("meta") is None
        True
    """
    place = torch.device(device)
    if place.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place)
        return int(free + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place))
    if place.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if place.type != "cpu":
        return None
    known = [room for room in (_machine_memory(), _container_memory()) if room is not None]
    return min(known, default=None)


def _machine_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):  # no Linux: psutil knows, where it is installed
        pass
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the memory controller of the container leaves, or None without a limit; cached files can be given back."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((root / limit).read_text(encoding="ascii"))
            now = int((root / used).read_text(encoding="ascii"))
            stat = (root / limit).with_name("memory.stat").read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):  # not this version of the controller, or "max": no limit
            continue
        given_back = sum(int(line.split()[1]) for line in stat if line.split()[0] == cached)
        if most < 2**60:  # version 1 writes a huge number for no limit
            return max(most - now + given_back, 0)
    return None


def weight_bytes(subject: Subject) -> int:
    """Return the bytes of parameters and buffers, as they are stored (quantised weights count what they take)."""
    model = subject.model
    if hasattr(model, "get_memory_footprint"):
        return int(model.get_memory_footprint())  # type: ignore[operator]
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def row_bytes(subject: Subject, tokens: int, *, generated: bool = False) -> int:
    """Return what one row of a text needs while it is run, compared and measured.

    Args:
        subject: The subject.
        tokens: Tokens of the text, those that will be written included.
        generated: Whether it is written token by token, which needs a key–value cache.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> row_bytes(tiny_llama(), 20) == 2 * row_bytes(tiny_llama(), 10)
        True
    """
    item = torch.empty(0, dtype=subject.state_dtype or subject.dtype).element_size()
    vocab, width = subject.vocab_size or 1, subject.width
    held = _PASSAGES * ((subject.n_layers + 1) * width + vocab) * item
    inside = _INNER * width * item + _OUTPUTS * 4 * vocab
    cache = 2 * _cache_width(subject) * subject.n_layers * item if generated else 0
    return tokens * (held + inside + cache)


def _cache_width(subject: Subject) -> int:
    """Width of the keys of one layer."""
    config = getattr(subject.model, "config", None)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None)
    if size is None and getattr(config, "num_attention_heads", None):
        size = subject.width // config.num_attention_heads  # type: ignore[union-attr]
    return int(heads * size) if heads and size else subject.width


def memory_plan(
    subject: Subject, units: Sequence[Sequence[int]], *, generated: bool = False, kept: float = 0.0, sharers: int = 1
) -> MemoryPlan:
    """Say what the largest of several units needs.

    Args:
        subject: The subject.
        units: Tokens of each row of each unit.
        generated: Whether texts are written.
        kept: Bytes that a token of a finished unit holds until it is on the disk.
        sharers: Workers that share what is free.
    """
    widest = max(units, key=lambda lengths: len(lengths) * max(lengths, default=0), default=())
    longest = max((max(lengths, default=0) for lengths in units), default=0)
    tokens = max(widest, default=0)
    return MemoryPlan(
        str(subject.device), free_memory(subject.device), weight_bytes(subject),
        row_bytes(subject, longest, generated=generated),
        len(widest) * row_bytes(subject, tokens, generated=generated), len(widest),
        rows_fitting(subject, len(widest), tokens, generated=generated, kept=kept, sharers=sharers),
        int(_FINISHED * kept * tokens * len(widest)), sharers,
    )  # fmt: skip


def rows_fitting(
    subject: Subject, rows: int, tokens: int, *, generated: bool = False, kept: float = 0.0, sharers: int = 1
) -> int:
    """Return how many rows of a length go together beside what waits for the disk, and beside other workers.

    Args:
        subject: The subject.
        rows: Rows that are wanted.
        tokens: Tokens of the longest.
        generated: Whether texts are written.
        kept: Bytes that a token of a finished unit holds until it is on the disk.
        sharers: Workers that share what is free.
    """
    each, waiting = row_bytes(subject, tokens, generated=generated), int(_FINISHED * kept * tokens)
    free = free_memory(subject.device)
    if subject.device.type == "cpu":
        return rows_that_fit(rows, each + waiting, free, sharers)
    beside = rows_that_fit(rows, waiting, free_memory("cpu"), sharers)
    return min(beside, rows_that_fit(rows, each, free, sharers))


def held(tables: Iterable[Any], states: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tables and states, each text that tables refer to counted as its reference."""
    return sum(int(table.memory_usage(index=True).sum()) for table in tables) + sum(s.nbytes for s in states)


def rows_that_fit(rows: int, each: int, free: int | None, sharers: int = 1) -> int:
    """Return how many of ``rows`` rows go together; one at least, since the count may be wrong.

    Example:
        >>> rows_that_fit(8, 100, 500), rows_that_fit(8, 100, None), rows_that_fit(8, 100, 10)
        (4, 8, 1)
    """
    if free is None or each <= 0:
        return rows
    return max(1, min(rows, int(free * _SHARE / sharers) // each))


def too_large(subject: Subject, rows: Sequence[int], *, whole: bool = False) -> ModelError:
    """Return the error of a row that does not fit by itself: what was asked, what there is, what to type.

    Args:
        subject: The subject.
        rows: Tokens of the rows that were tried.
        whole: They have to go together; else one of them alone did not fit.
    """
    tokens = max(rows, default=0)
    together = len(rows) if whole else 1
    what = f"one row of {tokens} tokens does"
    if whole:
        what = f"{together} rows of up to {tokens} tokens, which have to go together, do"
    need = together * row_bytes(subject, tokens)
    fewer = "fewer (--limit) or " if whole else ""
    return ModelError(
        f"{what} {_no_room(subject, f', the text about {_size(need)}')}. Take {fewer}shorter prompts or a "
        f"smaller --max-new-tokens, or {_more_room(subject)}"
    )


@contextmanager
def before_the_units(subject: Subject) -> Iterator[None]:
    """Turn memory that runs out before the first unit, where there is nothing to halve, into an error that says so.

    Args:
        subject: The subject.

    Raises:
        ModelError: If it ran out.
    """
    with _no_memory(
        lambda: (
            "the trials, calibration and self-tests before the first batch, a few short texts, do "
            f"{_no_room(subject)}. T{_more_room(subject)[1:]}"
        )
    ):
        yield


@contextmanager
def while_loading(name: str, device: str, dtype: str) -> Iterator[None]:
    """Turn memory that runs out while a model is loaded, or tried for the first time, into an error that says so.

    Args:
        name: What is loaded.
        device: Where to.
        dtype: In what.

    Raises:
        ModelError: If it ran out.
    """
    with _no_memory(
        lambda: (
            f"the weights of {name} in {dtype}, with a first short forward, do not fit into the memory of the "
            f"device ({device}). Type --dtype bfloat16 (half the memory of float32; angles are flagged), "
            "--device-map auto (spread over several devices, the rest on the CPU) or --device cpu"
        )
    ):
        yield


@contextmanager
def _no_memory(what: Callable[[], str]) -> Iterator[None]:
    """Raise a ModelError that says ``what`` where memory runs out, after the tensors of what failed are gone."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        failed = error
    raise ModelError(what()) from failed


def _no_room(subject: Subject, beside: str = "") -> str:
    free, dtype = free_memory(subject.device), str(subject.dtype).removeprefix("torch.")
    there = "" if free is None else f"; {_size(free)} are free there now"
    return (
        f"not fit into the memory of {subject.device} beside {subject.name} in {dtype} (weights "
        f"{_size(weight_bytes(subject))}{beside}{there})"
    )


def _more_room(subject: Subject) -> str:
    narrow = subject.dtype in (torch.bfloat16, torch.float16)
    narrower = "" if narrow else "--dtype bfloat16 (half the memory; angles are flagged), "
    elsewhere = "" if subject.device.type == "cpu" else " or --device cpu"
    return f"type {narrower}--device-map auto (spread over several devices, the rest on the CPU){elsewhere}"


def _size(n: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
