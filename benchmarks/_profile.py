"""Where the time of one call goes, outside the model."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable

__all__ = ["profile"]


def profile(run: Callable[[], object]) -> None:
    """Print what a call spends its time on, after one that warms up."""
    run()
    profiler = cProfile.Profile()
    profiler.runcall(run)
    stats = pstats.Stats(profiler)
    stats.sort_stats("tottime").print_stats("dynprobe")
    stats.sort_stats("cumulative").print_stats(25)
