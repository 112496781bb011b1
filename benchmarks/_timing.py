"""Fair timings: everything interleaved in one process, warm-up, median of per-round ratios."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def interleaved(
    baseline: Callable[[], object], others: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 3
) -> dict[str, tuple[float, float, float]]:
    """Time every arm once per round, in rotating order; return median ratio to the baseline, its quartiles."""
    arms = {"baseline": baseline, **others}
    names = list(arms)
    for _ in range(warmup):
        for run in arms.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order:
            seconds[name].append(timed(arms[name])[0])
    out = {}
    for name in names:
        out[name] = spread([s / b for s, b in zip(seconds[name], seconds["baseline"], strict=True)])
    out["baseline"] = (statistics.median(seconds["baseline"]), min(seconds["baseline"]), max(seconds["baseline"]))
    return out


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds a call took, and its result."""
    begun = time.perf_counter()
    result = run()
    return time.perf_counter() - begun, result


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median and quartiles."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return statistics.median(values), quartiles[0], quartiles[2]


def machine() -> str:
    """One line that says where the figures were taken."""
    info = Path("/proc/cpuinfo")
    cpu = info.read_text() if info.exists() else ""
    model = next(
        (line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    return f"{date.today()} · {model} · {torch.get_num_threads()} threads · torch {torch.__version__}"
