"""Fair timings: everything interleaved in one process, warm-up, median of per-round ratios."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch


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
            begun = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - begun)
    out = {}
    for name in names:
        ratios = sorted(s / b for s, b in zip(seconds[name], seconds["baseline"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        out[name] = (statistics.median(ratios), quartiles[0], quartiles[2])
    out["baseline"] = (statistics.median(seconds["baseline"]), min(seconds["baseline"]), max(seconds["baseline"]))
    return out


def machine() -> str:
    """One line that says where the figures were taken."""
    info = Path("/proc/cpuinfo")
    cpu = info.read_text() if info.exists() else ""
    model = next(
        (line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    return f"{date.today()} · {model} · {torch.get_num_threads()} threads · torch {torch.__version__}"
