"""B13: the bare command on SmolLM2, in a terminal: seconds to the first table on screen and to the end.

    python benchmarks/bare_command.py [--rounds 3]

The weights must be in the cache (`dynprobe fetch smollm2-135m`). The first round starts without a cached
calibration and without cached self-tests, as a newcomer does; the others have them.
"""

from __future__ import annotations

import argparse
import os
import pty
import shutil
import sys
import tempfile
import time

from dynprobe.models import cache_root, fetch
from dynprobe.protocols._bench_timing import machine


def once(out: str) -> tuple[float, float]:
    """Run it in a pseudo-terminal; the first table is seen when its arm `perturbed.forced` appears."""
    begun = time.perf_counter()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS="160", LINES="50", TERM="xterm")
        words = ["-m", "dynprobe", "run", "--model", "smollm2-135m", "--perturb", "alpha=0.1", "--out", out]
        os.execv(sys.executable, [sys.executable, *words])
    first, text = 0.0, b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            break
        if not piece:
            break
        text += piece
        if not first and b"perturbed.forced" in text:
            first = time.perf_counter() - begun
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"the command failed:\n{text.decode(errors='replace')[-2000:]}")
    return first, time.perf_counter() - begun


def main() -> None:
    """Print both times of every round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    fetch("smollm2-135m")
    for name in ("calibrations", "selftests"):
        shutil.rmtree(cache_root() / name, ignore_errors=True)
    print(machine())
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            first, whole = once(out)
        print(f"round {number}: first table {first:.1f} s (budget 20), whole run {whole:.1f} s (budget 60)", flush=True)


if __name__ == "__main__":
    main()
