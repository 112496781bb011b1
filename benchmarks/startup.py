"""B9: seconds of `dynprobe --help` and `import dynprobe` beyond the bare interpreter.

python benchmarks/startup.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from dynprobe.protocols._bench_timing import interleaved, machine


def main() -> None:
    """Time whole processes, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds

    def process(*words: str):
        return lambda: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    found = interleaved(
        process("-c", "pass"),
        {"import dynprobe": process("-c", "import dynprobe"), "dynprobe --help": process("-m", "dynprobe", "--help")},
        rounds=rounds,
    )
    bare = found.pop("baseline")[0]
    print(machine())
    for name, (ratio, *_), budget in zip(found, found.values(), (0.05, 0.35), strict=True):
        print(f"{name}: {bare * (ratio - 1):.3f} s beyond the bare interpreter's {bare:.3f} s (budget {budget})")


if __name__ == "__main__":
    main()
