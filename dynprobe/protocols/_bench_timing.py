"""Fair timings: every arm interleaved with its baseline in one process, warmed up, and the median of per-round ratios.

A wall time on a shared machine says little; two calls made one after the other a moment apart say how they compare. So
arms take turns, in an order that rotates from round to round, and what is reported is the ratio of each arm to its
baseline in the same round: its median, and the quartiles beside it. On a device a call is over when the device is.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from dynprobe.errors import UsageError

__all__ = ["interleaved", "machine", "machine_facts", "rounds_of", "spread", "timed", "waiter"]

T = TypeVar("T")


def rounds_of(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    wait: Callable[[], object] | None = None,
    after: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of every arm in every round.

    Args:
        arms: What to time.
        rounds: How often; each arm once per round, in rotating order.
        warmup: Calls of each arm before, not timed.
        wait: Called inside the time, behind each arm: returns when the device is done.
        after: Called outside the time, behind each arm: clears away what it left.

    Example:
        >>> seconds = rounds_of({"a": lambda: None, "b": lambda: None}, rounds=3)
        >>> {name: len(found) for name, found in seconds.items()}
        {'a': 3, 'b': 3}
    """
    if rounds < 1:
        raise UsageError(f"rounds={rounds}; at least one round is timed")
    names = list(arms)

    def work(name: str) -> object:
        found = arms[name]()
        if wait is not None:
            wait()
        return found

    for _ in range(warmup):
        for name in names:
            work(name)
            if after is not None:
                after()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(timed(lambda name=name: work(name))[0])  # type: ignore[misc]
            if after is not None:
                after()
    return seconds


def interleaved(
    baseline: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    wait: Callable[[], object] | None = None,
) -> dict[str, tuple[float, float, float]]:
    """Time every arm once per round; return median ratio to the baseline and quartiles.

    Under ``"baseline"`` stand the baseline's own seconds: median, least, most.

    Example:
        >>> sorted(interleaved(lambda: None, {"twice": lambda: None}, rounds=2))
        ['baseline', 'twice']
    """
    seconds = rounds_of({"baseline": baseline, **others}, rounds=rounds, warmup=warmup, wait=wait)
    bare = seconds["baseline"]
    out = {name: spread([s / b for s, b in zip(seconds[name], bare, strict=True)]) for name in others}
    return {**out, "baseline": (statistics.median(bare), min(bare), max(bare))}


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds a call took, and its result."""
    begun = time.perf_counter()
    result = run()
    return time.perf_counter() - begun, result


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median and quartiles.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
        (3.0, 2.0, 4.0)
    """
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return statistics.median(values), quartiles[0], quartiles[2]


def waiter(device: torch.device) -> Callable[[], object] | None:
    """Return what waits until a device is done; None where calls wait by themselves."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return None


def machine_facts(device: torch.device | None = None) -> dict[str, Any]:
    """Return where figures are taken: processor, threads, device, versions, and the load of the machine now."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": cpu or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "system": platform.system(), "python": platform.python_version(), "device": str(device or "cpu"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }  # fmt: skip
    if device is not None and device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"gpu": found.name, "gpu_bytes": found.total_memory, "cuda": torch.version.cuda}
    return facts


def machine() -> str:
    """One line that says where the figures were taken."""
    facts = machine_facts()
    day = facts["date"].split("T")[0]
    return f"{day} · {facts['processor']} · {facts['threads']} threads · torch {torch.__version__}"
