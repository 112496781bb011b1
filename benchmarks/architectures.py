"""Resume every causal architecture of transformers from every depth, and write the table ``docs/architectures.md``.

``python benchmarks/architectures.py [--jobs N] [--out FILE] [TYPE …]``; exit code 1 where one is silently wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

from dynprobe.testing import ResumeVerdict, resume_table, try_architectures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; default all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--out", type=Path, help="Markdown file; default docs/architectures.md when all types are tried"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    def say(verdict: ResumeVerdict) -> None:
        print(f"{verdict.model_type:28} {verdict.verdict:9} {verdict.worst:8.1e}  {verdict.reason[:90]}", flush=True)

    began = time.perf_counter()
    verdicts = try_architectures(options.types or None, jobs=options.jobs, progress=say)
    counts = Counter(v.verdict for v in verdicts)
    print(f"{dict(counts)} in {time.perf_counter() - began:.0f} s")
    out = options.out or (None if options.types else Path(__file__).parents[1] / "docs" / "architectures.md")
    if out is not None:
        out.write_text(resume_table(verdicts), encoding="utf-8")
        print(f"written: {out}")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
