"""Compare the ratios of ``dynprobe bench --json`` with budgets.json: a warning up to twice a budget, a failure beyond.

    dynprobe bench --model tiny-llama --json --quiet --out bench.json > /dev/null
    python benchmarks/ratios.py bench.json [--budgets benchmarks/budgets.json]

A shared machine scatters, so that a ratio beyond its budget is only told, and the exit code stays 0; beyond twice the
budget something has changed, and it is 1. A figure that a budget names and the file lacks is a failure too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

#: How far beyond a budget is still only a warning.
SLACK = 2.0


def compared(found: dict[str, Any], budgets: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float | None, str]]:
    """Return each budget of the file's model, the ratio that was measured, and what to say of it."""
    out: list[tuple[dict[str, Any], float | None, str]] = []
    for budget in budgets:
        if budget["model"] != found["model"]["name"]:
            continue
        ratios = [
            case["arms"][budget["arm"]]["ratio"] for case in found["cases"]
            if case["section"] == budget["section"] and budget["case"] in case["case"] and budget["arm"] in case["arms"]
        ]  # fmt: skip
        ratio = max((r for r in ratios if r is not None), default=None)
        if ratio is None:
            out.append((budget, None, "MISSING"))
            continue
        over = ratio / budget["budget"]
        out.append((budget, ratio, "ok" if over <= 1 else "warning" if over <= SLACK else "TOO SLOW"))
    return out


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--budgets", type=Path, default=Path(__file__).parent / "budgets.json")
    args = parser.parse_args()
    found = json.loads(args.file.read_text(encoding="utf-8"))
    rows = compared(found, json.loads(args.budgets.read_text(encoding="utf-8"))["budgets"])
    if not rows:
        print(f"no budget is set for {found['model']['name']}", file=sys.stderr)
        return 1
    print(f"{found['model']['name']}, {found['machine']['processor']}, load {found['machine']['load']}")
    print("| section | case | arm | ratio | budget | |\n|---|---|---|---|---|---|")
    for budget, ratio, said in rows:
        cells = (budget["section"], budget["case"] or "any", budget["arm"], "–" if ratio is None else f"{ratio:.3f}")
        print(f"| {' | '.join(cells)} | {budget['budget']:g} | {said} |")
    return int(any(said in ("TOO SLOW", "MISSING") for _, _, said in rows))


if __name__ == "__main__":
    sys.exit(main())
