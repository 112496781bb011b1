"""Cost models checked: time and bytes of runs, fitted to what ``dynprobe plan`` counts, and drawn.

    python benchmarks/cost.py [--models tiny-llama …] [--rounds 3] [--figures docs/figures] [--json FILE] [--quick]

A run is measured over prompts, new tokens and layers (models of several depths), a sweep over strengths, and a sweep
over workers (1, 2; warm). Every point is the least of its rounds: what else the machine does only ever adds. To each
model's runs the plan's own two counts are fitted by least squares, relative errors:

    seconds = fixed + a · (tokens of forced arms and prefill) + b · (decode steps)
    bytes   = fixed + c · (rows of the tokens table) + d · (rows of the depths table)

and beside the fit stands what ``dynprobe plan`` says before the run, from one timed forward and its constants of bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dynprobe as dp
from dynprobe.protocols._bench_timing import machine, timed

#: Models with the grids of prompts and new tokens that are measured on them.
GRID = {
    "panel/llama-depth1-width32-seed0": ((6, 12, 24), (0, 8, 32)),
    "panel/llama-depth2-width32-seed0": ((6, 12, 24), (0, 8, 32)),
    "panel/llama-depth4-width32-seed0": ((6, 12, 24), (0, 8, 32)),
    "tiny-llama": ((6, 12, 24), (0, 8, 16, 32)),
    "smollm2-135m": ((2, 4), (0, 4, 12)),
}
ALPHAS = (1, 2, 4, 8, 16, 32)
WORKERS = (1, 2)


def size_of(folder: Path) -> int:
    """Bytes of the tables of a run (not its manifest, calibration or states)."""
    return sum(p.stat().st_size for p in folder.rglob("*.parquet") if p.parent.name not in ("states", "calibration"))


def least(rounds: int, work: Callable[[str], Any]) -> tuple[float, Any]:
    """Least seconds of some rounds, each in a folder of its own, and what that round gave."""
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            seconds, result = timed(lambda out=out: work(out))  # type: ignore[misc]
            found.append((seconds, result, size_of(Path(out))))
    seconds, result, size = min(found, key=lambda f: f[0])
    return seconds, (result, size)


def runs(name: str, prompts: tuple[int, ...], new: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Runs of one model, with what the plan counts of each."""
    subject = dp.load(name)
    dp.calibrate(subject)
    settings: dict[str, Any] = {"perturb": "alpha=0.1", "stop_at_eos": False, "quiet": True}
    with tempfile.TemporaryDirectory() as out:
        dp.run(subject, limit=1, max_new_tokens=2, out=out, **settings)  # self-tests and imports are not the run's
    points = []
    for n, tokens in itertools.product(prompts, new):
        counted = dp.plan(subject, limit=n, max_new_tokens=tokens, **settings)
        seconds, (_, size) = least(
            rounds, lambda out, n=n, t=tokens: dp.run(subject, limit=n, max_new_tokens=t, out=out, **settings)
        )
        written = n * tokens * 2
        points.append(
            {
                "model": name, "layers": subject.n_layers, "prompts": n, "new_tokens": tokens, "seconds": seconds,
                "bytes": size, "planned_seconds": counted.seconds, "planned_bytes": counted.metric_bytes,
                "forward_tokens": counted.forward_tokens - written, "steps": steps_of(subject, n, tokens, settings),
                "token_rows": counted.token_rows, "depth_rows": counted.depth_rows,
            }
        )  # fmt: skip
        print(f"<!-- {name}: {n} prompts × {tokens} new: {seconds:.3f} s, {size} bytes -->", flush=True)
    return points


def steps_of(subject: Any, prompts: int, tokens: int, settings: dict[str, Any]) -> int:
    """Decode steps of a run, as the plan counts them: new tokens × free arms × batches."""
    from dynprobe.protocols._prepare import prepare
    from dynprobe.protocols._run import _batches

    ready = prepare(subject, None, {"limit": prompts, "max_new_tokens": tokens, **settings})
    return tokens * 2 * len(_batches(ready, False)) if tokens else 0


def sweeps(name: str, rounds: int) -> list[dict[str, Any]]:
    """One layer of 6 prompts under more and more strengths."""
    subject, points = dp.load(name), []
    layer = subject.n_layers // 2
    for n in (2, *ALPHAS):
        alphas = np.geomspace(0.01, 10, n).tolist()
        seconds, (_, size) = least(
            rounds, lambda out, a=alphas: dp.sweep(subject, limit=6, layers=str(layer), alphas=a, out=out, quiet=True)
        )
        points.append({"model": name, "alphas": n, "seconds": seconds, "bytes": size})
    return points[1:]  # the first one warmed up


def working(name: str, out: str, settings: dict[str, Any]) -> float:
    """Seconds of a sweep from warm workers to the last unit."""
    run = dp.sweep(name, alphas="0.01:10:12", out=out, **settings)
    return float((run.manifest.model_extra or {})["engine"][-1]["seconds"])


def workers(name: str, rounds: int) -> list[dict[str, Any]]:
    """A sweep of 24 prompts at every layer by one and by two warm processes of one thread."""
    from dynprobe.engines import Local

    points = []
    for n in WORKERS:
        with Local(n, threads=1) as crew, tempfile.TemporaryDirectory() as warm:
            settings: dict[str, Any] = {"layers": "all", "batch_size": 2, "quiet": True, "engine": crew}
            dp.sweep(name, limit=4, alphas="0.1", out=warm, **settings)
            seconds, (alone, _) = least(rounds, lambda out, s=settings: working(name, out, s))
            points.append({"model": name, "workers": n, "seconds": seconds, "working_seconds": alone})
    return points


def fit(points: list[dict[str, Any]], target: str, counts: tuple[str, str]) -> dict[str, Any]:
    """Least squares on relative errors; coefficients below zero are set to zero and the rest fitted again."""
    y = np.array([p[target] for p in points], float)
    columns = {"fixed": np.ones(len(points)), **{c: np.array([p[c] for p in points], float) for c in counts}}
    used = list(columns)
    while True:
        x = np.stack([columns[c] for c in used], 1) / y[:, None]
        coefficients, *_ = np.linalg.lstsq(x, np.ones(len(y)), rcond=None)
        if (coefficients >= 0).all() or len(used) == 1:
            break
        used.pop(int(np.argmin(coefficients)))
    found = dict.fromkeys(columns, 0.0) | dict(zip(used, map(float, coefficients), strict=True))
    predicted = sum(found[c] * columns[c] for c in columns)
    error = np.abs(predicted / y - 1)
    return {**found, "median_error": float(np.median(error)), "worst_error": float(error.max()), "points": len(y),
            "predicted": predicted.tolist()}  # fmt: skip


def draw(points: list[dict[str, Any]], fits: dict[str, Any], folder: Path) -> list[Path]:
    """Measured against predicted, for time and bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for target, unit, planned in (("seconds", "s", "planned_seconds"), ("bytes", "bytes", "planned_bytes")):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, constrained_layout=True)
        names = list(dict.fromkeys(p["model"] for p in points))
        for color, name in zip(plt.get_cmap("viridis")(np.linspace(0, 0.85, len(names))), names, strict=True):
            own = [p for p in points if p["model"] == name]
            y = [p[target] for p in own]
            label = name.removeprefix("panel/").removesuffix("-seed0")
            axes[0].scatter(fits[name][target]["predicted"], y, color=color, s=26, label=label)
            axes[1].scatter([p[planned] for p in own], y, color=color, s=26)
        for axis, title in zip(axes, ("fitted afterwards", "dynprobe plan, before the run"), strict=True):
            low, high = (f(*axis.get_xlim(), *axis.get_ylim()) for f in (lambda *a: max(min(a), 1e-9), max))
            low = min(p[target] for p in points) / 3
            axis.plot([low, high], [low, high], color="0.6", lw=1, zorder=0)
            axis.set(xscale="log", yscale="log", xlabel=f"predicted {unit}", title=title)
            axis.grid(True, which="major", alpha=0.25)
        axes[0].set_ylabel(f"measured {unit}")
        axes[0].legend(fontsize=8, frameon=False)
        made.append(folder / f"cost-{'time' if target == 'seconds' else 'bytes'}.png")
        figure.savefig(made[-1], dpi=130)
        plt.close(figure)
    return made


def draw_more(strengths: list[dict[str, Any]], crews: list[dict[str, Any]], folder: Path) -> Path:
    """Seconds over strengths, and over workers."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    x, y = ([p[k] for p in strengths] for k in ("alphas", "seconds"))
    slope, fixed = np.polyfit(x, y, 1)
    axes[0].plot(x, y, "o", color="#31688e")
    axes[0].plot(x, fixed + slope * np.array(x), "-", color="0.6", lw=1)
    axes[0].set(xlabel="strengths", ylabel="seconds of the sweep", ylim=(0, None),
                title=f"{1000 * fixed:.0f} ms + {1000 * slope:.1f} ms per strength")  # fmt: skip
    n = [p["workers"] for p in crews]
    for key, label, color in (("seconds", "whole call", "#31688e"), ("working_seconds", "units alone", "#35b779")):
        axes[1].plot(n, [p[key] for p in crews], "o-", label=label, color=color)
    axes[1].set(xlabel="warm workers, one thread each", xticks=n, ylabel="seconds", ylim=(0, None))
    axes[1].legend(frameon=False)
    path = folder / "cost-sweep.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main() -> None:
    """Measure, fit, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(GRID), choices=list(GRID))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-workers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few points: shows that it runs")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine())
    points: list[dict[str, Any]] = []
    for name in args.models:
        prompts, new = GRID[name]
        points += runs(name, prompts[:2], new[:3], 1) if args.quick else runs(name, prompts, new, args.rounds)
    fits = {}
    for name in args.models:
        own = [p for p in points if p["model"] == name]
        fits[name] = {
            "seconds": fit(own, "seconds", ("forward_tokens", "steps")),
            "bytes": fit(own, "bytes", ("token_rows", "depth_rows")),
        }
    show(points, fits)
    strengths = sweeps("tiny-llama", 1 if args.quick else args.rounds)
    crews = [] if args.no_workers else workers("tiny-llama", 1 if args.quick else args.rounds)
    for p in strengths:
        print(f"| sweep, {p['alphas']} α | {p['seconds']:.3f} s | {p['bytes']} bytes |")
    for p in crews:
        print(f"| sweep, {p['workers']} workers | {p['seconds']:.3f} s | units alone {p['working_seconds']:.3f} s |")
    if args.json:
        everything = {"machine": machine(), "runs": points, "fits": fits, "sweeps": strengths, "workers": crews}
        args.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        paths = draw(points, fits, args.figures)
        if crews:
            paths.append(draw_more(strengths, crews, args.figures))
        print(*paths)


def show(points: list[dict[str, Any]], fits: dict[str, Any]) -> None:
    """Print the fits, and how far the plan was off."""
    print("\n| model | fixed | per forward token | per decode step | error: median, worst | measured / planned |")
    print("|---|---|---|---|---|---|")
    for name, found in fits.items():
        f, own = found["seconds"], [p for p in points if p["model"] == name]
        off = np.quantile([p["seconds"] / p["planned_seconds"] for p in own], [0, 0.5, 1])
        print(
            f"| {name} | {f['fixed']:.2f} s | {1e6 * f['forward_tokens']:.0f} µs | {1e3 * f['steps']:.2f} ms | "
            f"{f['median_error']:.1%}, {f['worst_error']:.1%} | {off[1]:.2f} ({off[0]:.2f} – {off[2]:.2f}) |"
        )
    print("\n| model | fixed | per token row | per depth row | error: median, worst | measured / planned |")
    print("|---|---|---|---|---|---|")
    for name, found in fits.items():
        f, own = found["bytes"], [p for p in points if p["model"] == name]
        off = np.quantile([p["bytes"] / p["planned_bytes"] for p in own], [0, 0.5, 1])
        print(
            f"| {name} | {f['fixed'] / 1000:.0f} kB | {f['token_rows']:.1f} B | {f['depth_rows']:.1f} B | "
            f"{f['median_error']:.1%}, {f['worst_error']:.1%} | {off[1]:.2f} ({off[0]:.2f} – {off[2]:.2f}) |"
        )
    print()


if __name__ == "__main__":
    main()
