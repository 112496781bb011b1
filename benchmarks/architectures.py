"""Put every check to every causal architecture of transformers, and write the table ``docs/architectures.md``.

``python benchmarks/architectures.py [--jobs N] [--out FILE] [TYPE …]``; exit code 1 where one is silently wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

from dynprobe.testing import ArchitectureVerdict, architecture_table, causal_types, try_architectures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; default all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--out", type=Path, help="Markdown file; default docs/architectures.md when all types are tried"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    before = [time.perf_counter()]

    def say(verdict: ArchitectureVerdict) -> None:
        before.append(time.perf_counter())
        print(f"{verdict.model_type:28} {verdict.verdict:9} {before[-1] - before[-2]:5.1f} s", flush=True)
        for name, answer in verdict.answers.items():
            if answer.reason:
                print(f"    {name:10} {answer.verdict:9} {answer.reason[:200]}", flush=True)

    verdicts = try_architectures(options.types or None, jobs=options.jobs, progress=say)
    counts = Counter(v.verdict for v in verdicts)
    print(f"{dict(counts)} in {time.perf_counter() - before[0]:.0f} s")
    out = options.out or (None if options.types else Path(__file__).parents[1] / "docs" / "architectures.md")
    if out is not None:
        every = len(causal_types())
        out.write_text(architecture_table(verdicts, of=None if len(verdicts) == every else every), encoding="utf-8")
        print(f"written: {out}")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
