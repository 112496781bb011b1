"""B5: the adaptive search of thresholds, beside a dense grid."""

from __future__ import annotations

import math
import statistics
import tempfile
from typing import Any

import numpy as np
from _sides import Table

import dynprobe as dp
from dynprobe.probes import Subject
from dynprobe.protocols._bench_timing import timed
from dynprobe.runs._crossings import crossings_of

__all__ = ["b5"]


def b5(subject: Subject, quick: bool) -> dict[str, Any]:
    """The search against a grid."""
    layer, limit = subject.n_layers // 2, 6 if quick else None
    grid = np.geomspace(0.01, 10.0, 32).tolist()
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, **settings: Any) -> Any:
            return dp.threshold(
                subject, scale="relnorm", layers=str(layer), limit=limit, out=f"{folder}/{name}", **settings
            )

        dp.threshold(subject, scale="relnorm", layers=str(layer), limit=1, out=f"{folder}/warm", alphas=[0.1, 1.0])
        times: dict[str, float] = {}
        times["search"], search = timed(lambda: run("search"))
        times["grid"], dense = timed(lambda: run("grid", alphas=grid))
        found = {}
        for name, done in (("search", search), ("grid", dense)):
            trials = done.table("trials")
            written = trials[trials["alpha"] > 0].groupby("prompt_id", observed=True).size()
            level, floor = float(trials["level"].iloc[0]), float(trials["floor"].max())
            crossings = crossings_of(trials, level, floor)
            fits = done.table("fits")
            found[name] = {
                "rows": written, "sham": int((trials["alpha"] == 0).sum()), "fit": fits[fits["headline"]].iloc[0],
                "own": dict(zip(crossings.prompts, crossings.found, strict=True)),
            }  # fmt: skip
    n = len(found["search"]["own"])
    log = {p: abs(math.log(c.value / found["grid"]["own"][p].value)) for p, c in found["search"]["own"].items()}
    errors = sorted(v for v in log.values() if math.isfinite(v))
    shifted = found["search"]["fit"]["alpha50"] / found["grid"]["fit"]["alpha50"] - 1
    table = Table(f"B5: threshold of {n} prompts, layer {layer}, relnorm", "search", "grid of 32", "budget")
    per_prompt = {name: f["rows"].mean() + f["sham"] / n for name, f in found.items()}
    table.row(
        "row-forwards per prompt: written, sham, clean",
        *(f"{f['rows'].mean():.2f} (at most {f['rows'].max()}), {f['sham'] / n:.2f}, 1" for f in found.values()),
        "" if quick else f"≤ 8: {'met' if per_prompt['search'] <= 8 else 'MISSED'} ({per_prompt['search']:.2f})",
    )
    for name, fit in ((name, f["fit"]) for name, f in found.items()):
        found[name]["said"] = f"{fit['alpha50']:.4f} ({fit['low']:.4f} – {fit['high']:.4f})"
    table.row("threshold of the population, 95 %", found["search"]["said"], found["grid"]["said"],
              "no threshold in reach" if math.isnan(shifted) else
              f"± 5 %: {shifted:+.2%} {'met' if abs(shifted) <= 0.05 else 'MISSED'}")  # fmt: skip
    within = sum(e <= math.log(1.05) for e in errors)
    # Weights drawn at random may have no threshold in reach; then there is nothing to compare.
    median, worst = (math.expm1(e) for e in (statistics.median(errors), errors[-1])) if errors else (math.nan,) * 2
    table.row(
        "each prompt against the grid's own crossing", f"{within} of {len(errors)} within 5 %",
        f"median {median:.2%}, worst {worst:.2%}", "" if quick else f"± 5 %: {'met' if worst <= 0.05 else 'MISSED'}",
    )  # fmt: skip
    table.row(
        "wall time", *(f"{times[name]:.1f} s" for name in found), f"{times['grid'] / times['search']:.2f} × faster"
    )
    return {
        "row_forwards": per_prompt, "seconds": times, "population_shift": shifted, "prompt_errors": log,
        "alpha50": {name: float(f["fit"]["alpha50"]) for name, f in found.items()},
    }  # fmt: skip
