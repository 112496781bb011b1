"""B3, B4, B5: sweeps and thresholds against the loops users of other libraries write.

    python benchmarks/sweep.py [--quick] [--json FILE] [--only b3 b4 b5] [--no-peers]

B3  16 strengths at every one of the model's layers, one 64-token prompt; logits of all positions, of the last token,
    and of the last token where it alone is written. Layers go in pairs (l, 29 − l), whose blocks above the write add up
    to the same number for every pair. One round times one pair in every arm, in rotating order; its ratio charges us a
    fifteenth of the clean pass, which serves all pairs. The loops named in COMPLETE run all pairs, so theirs is the
    whole sweep; that our parts add up to a sweep made in one go is measured at the end. Where only the last position
    is written, our side is the whole sweep, every round.
B4  16 strengths × 32 new tokens, the write active in prefill and decode at mid depth. The loop over strengths is cut
    into four rounds of four; together they are the whole loop. Our side runs all 16 in every round.
B5  `dp.threshold` on the 24 built-in prompts, beside a grid of 32 strengths.

Both sides end with the same numbers: the logits of every timed pair are compared, and every generated token. Directions
are drawn before the clocks run for the loops, and inside our time for us.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch
from _loops import LOOPS, Batched, LastOnly, Loop, RawHooks, available
from _timing import machine, spread, timed
from torch import Tensor

import dynprobe as dp
from dynprobe.probes import (
    Fork,
    Instrument,
    Perturb,
    PerturbWriter,
    Sampling,
    Subject,
    generate,
    make_batch,
    tokenize,
)
from dynprobe.probes._noise import gaussian_rows
from dynprobe.prompts import load_prompts
from dynprobe.protocols._fits import crossings_of

BUDGETS = {"all": 2.3, "last": 3.3, "position": 25.0, "1 prompt": 6.0, "2 prompts": 8.0}
TITLES = {"all": "logits at all positions", "last": "logits of the last token", "position": "write at the last position"}
#: Loops that run every pair of layers, and how many pairs the others run, by variant.
COMPLETE, ROUNDS = {"all": ("raw hooks", "nnsight")}, {"all": 4, "last": 3, "position": 3}
#: Largest difference of logits, in their standard deviation.
TOLERANCE = 1e-4
CHUNKS, NEW, WIDTH = 4, 32, 64


def directions(subject: Subject, key: str, layer: int, n: int) -> Tensor:
    """Unit vectors of the noise that dynprobe writes, ``[pos, dim]``; the first position gets none."""
    drawn = gaussian_rows(0, [key], f"resid_post.{layer}", np.arange(n)[None], subject.dim)[0]
    unit = torch.from_numpy(drawn)
    unit /= unit.norm(dim=-1, keepdim=True)
    unit[0] = 0
    return unit


def sweep(
    fork: Fork, layers: Iterable[int], alphas: np.ndarray, variant: str, keep: Collection[int] = ()
) -> dict[int, Tensor]:
    """Our side of B3: logits ``[alpha, pos, vocab]`` or ``[alpha, vocab]`` of each layer, of which some are kept."""
    found: dict[int, Tensor] = {}
    at = ",positions=-1" if variant == "position" else ""
    start = fork.batch.mask.shape[1] - 1 if at else 0
    for layer in layers:
        writer = PerturbWriter(fork.subject, Perturb.parse(f"alpha=1,layers={layer}{at}"), magnitude=alphas)
        tape = fork.branch([0] * len(alphas), [writer], start=start, logits="all" if variant == "all" else "last")
        assert tape.logits is not None
        if layer in keep:
            found[layer] = tape.logits
    return found


def difference(ours: Tensor, theirs: list[Tensor]) -> tuple[float, float]:
    """Largest difference of logits, and the same in their standard deviation."""
    other = torch.cat(theirs)
    assert ours.shape == other.shape, (ours.shape, other.shape)
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, other, strict=True))
    return worst, worst / float(other[0].std())


class Table(list):
    """Rows of one table, printed as they come."""

    def __init__(self, *columns: str) -> None:
        super().__init__()
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, *cells: Any) -> None:
        """Print and keep one row."""
        self.append(cells)
        print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def verdict(value: float, name: str, quick: bool) -> str:
    """The budget, and whether it is met."""
    return "" if quick or name not in BUDGETS else f"≥ {BUDGETS[name]:g}: {'met' if value >= BUDGETS[name] else 'MISSED'}"


def b3(subject: Subject, loops: dict[str, Loop], alphas: np.ndarray, quick: bool) -> dict[str, Any]:
    """One prompt, all layers."""
    text = " ".join(p.text for p in load_prompts(limit=4))
    ids = torch.tensor(tokenize(subject, [text]))[:, :WIDTH]
    batch, n_layers = make_batch(subject, ids.tolist(), row_keys=["sweep"]), subject.n_layers
    units = {layer: directions(subject, "sweep", layer, WIDTH) for layer in range(n_layers)}
    out: dict[str, Any] = {"tokens": ids.shape[1], "layers": n_layers}
    table = Table(
        f"B3: {len(alphas)} α × {n_layers} layers, {ids.shape[1]} tokens", "loop", "dynprobe faster (quartiles)",
        "pairs", "loop, all layers", "dynprobe, all layers", "largest difference of logits (in SD)", "budget",
    )  # fmt: skip
    for variant, title in TITLES.items():
        extra = [Batched] if variant == "all" else [LastOnly]
        arms = loops | {kind.name: kind(subject) for kind in extra if "raw hooks" in loops}
        pairs = n_layers // 2
        rounds = 1 if quick else pairs if variant in COMPLETE else ROUNDS[variant]
        seconds: dict[str, dict[int, float]] = defaultdict(dict)
        setups, ours, worst = [], {}, dict.fromkeys(arms, (0.0, 0.0))
        stride = pairs // ROUNDS[variant]
        for turn in range(rounds):
            number = turn if rounds == pairs else turn * stride
            pair = [number, n_layers - 1 - number]
            few = rounds == pairs and (turn % stride or turn // stride >= ROUNDS[variant])
            names = ["dynprobe", *(n for n in arms if not few or n in COMPLETE.get(variant, ()))]
            mine: dict[int, Tensor] = {}
            theirs: dict[str, list[list[Tensor]]] = {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                gc.collect()
                if name == "dynprobe":
                    setup, fork = timed(lambda v=variant: Fork(subject, batch, logits="all" if v == "all" else "last"))
                    at = range(n_layers) if variant == "position" else pair
                    spent, mine = timed(lambda f=fork, at=at, v=variant, p=pair: sweep(f, at, alphas, v, p))
                    ours[number] = setup / pairs + spent * len(pair) / len(at)
                    assert not fork.roads.refusals and not fork.roads.whole, fork.roads
                    setups.append(setup)
                    del fork
                else:
                    loop = arms[name]
                    seconds[name][number], theirs[name] = timed(
                        lambda loop=loop, at=pair, v=variant: [
                            loop.logits(ids, layer, alphas.tolist(), units[layer], v) for layer in at
                        ]
                    )
            for name, logits in theirs.items():
                for layer, other in zip(pair, logits, strict=True):
                    worst[name] = tuple(map(max, worst[name], difference(mine[layer], other)))
            del mine, theirs
        whole = math.nan
        if not quick:
            gc.collect()
            whole, _ = timed(lambda v=variant: sweep(
                Fork(subject, batch, logits="all" if v == "all" else "last"), range(n_layers), alphas, v))  # fmt: skip
        summed = sum(ours.values()) if len(ours) == pairs else math.nan
        out[variant] = {"dynprobe_whole_s": whole, "dynprobe_sum_of_pairs_s": summed, "clean_pass_s": setups, "arms": {}}
        for name in arms:
            ratios = [seconds[name][number] / ours[number] for number in seconds[name]]
            middle, low, high = spread(ratios)
            loop_s = sum(seconds[name].values()) * pairs / len(ratios)
            how = "all" if len(ratios) == pairs else f"{len(ratios)} of {pairs}"
            budget = verdict(middle, variant, quick or name in (Batched.name, LastOnly.name))
            table.row(
                title, name, f"{middle:.2f} ({low:.2f} – {high:.2f})", how, f"{loop_s:.1f} s",
                f"{whole:.1f} s", f"{worst[name][0]:.1e} ({worst[name][1]:.1e})", budget,
            )  # fmt: skip
            assert worst[name][1] <= TOLERANCE, f"{name} and dynprobe differ by {worst[name][1]:.1e} SD in {variant}"
            out[variant]["arms"][name] = {
                "ratio": middle, "low": low, "high": high, "pairs": len(ratios), "loop_s": loop_s,
                "pair_s": seconds[name], "difference": worst[name][0], "difference_sd": worst[name][1],
            }  # fmt: skip
        if not quick:
            print(f"<!-- {title}: our pairs add up to {summed:.1f} s; in one go {whole:.1f} s -->")
    return out


def b4(subject: Subject, loops: dict[str, Loop], alphas: np.ndarray, quick: bool) -> dict[str, Any]:
    """Generation under the write."""
    layer, new = subject.n_layers // 2, 8 if quick else NEW
    prompts = load_prompts(limit=2)
    rows = tokenize(subject, [p.text for p in prompts])
    keys = [p.prompt_id for p in prompts]
    units = [directions(subject, key, layer, len(row) + new) for key, row in zip(keys, rows, strict=True)]
    perturb = Perturb.parse(f"alpha=1,layers={layer}")

    def ours(n: int) -> list[list[int]]:
        """All strengths of the first ``n`` prompts in one batch, prompt by prompt."""
        many = len(alphas)
        batch = make_batch(
            subject, [row for row in rows[:n] for _ in range(many)], side="left",
            row_keys=[key for key in keys[:n] for _ in range(many)],
        )  # fmt: skip
        writer = PerturbWriter(subject, perturb, magnitude=np.tile(alphas, n))
        instrument = Instrument(subject, (), [writer], **batch.rows)
        return generate(subject, batch, Sampling(max_new_tokens=new, stop_at_eos=False), instrument)

    chunks = 1 if quick else CHUNKS
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    tokens: dict[str, dict[tuple[int, int], list[int]]] = defaultdict(dict)
    made: dict[int, list[list[int]]] = {}
    for turn in range(chunks):
        names = ["dynprobe", *loops]
        chosen = range(turn, len(alphas), chunks)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            if name == "dynprobe":
                one, made[1] = timed(lambda: ours(1))
                two, made[2] = timed(lambda: ours(2))
                seconds[name].append((one, two))
                continue
            spent = []
            for number, row in enumerate(rows):
                ids, picked = torch.tensor([row]), alphas[list(chosen)].tolist()
                took, found = timed(
                    lambda loop=loops[name], ids=ids, picked=picked, unit=units[number]: loop.tokens(
                        ids, layer, picked, unit, new
                    )
                )
                spent.append(took)
                tokens[name] |= {(number, i): text for i, text in zip(chosen, found, strict=True)}
            seconds[name].append((spent[0], sum(spent)))
    table = Table(
        f"B4: {len(alphas)} α × {new} tokens, layer {layer}", "loop", "dynprobe faster (quartiles)", "loop", "dynprobe",
        "tokens that differ", "budget",
    )  # fmt: skip
    out: dict[str, Any] = {"prompt_tokens": [len(row) for row in rows], "new": new, "layer": layer, "arms": {}}
    for name, loop in loops.items():
        for side, title in enumerate(("1 prompt", "2 prompts")):
            texts = {key: text for key, text in tokens[name].items() if key[0] <= side}
            apart = [
                first_difference(loop, torch.tensor([rows[p]]), layer, float(alphas[i]), units[p], mine, theirs)
                for (p, i), theirs in texts.items()
                if (mine := made[side + 1][p * len(alphas) + i]) != theirs
            ]
            ratios = [
                chunks * loop_s[side] / own[side]
                for loop_s, own in zip(seconds[name], seconds["dynprobe"], strict=True)
            ]
            middle, low, high = spread(ratios)
            loop_s = sum(s[side] for s in seconds[name])
            own_s = statistics.median(s[side] for s in seconds["dynprobe"])
            table.row(
                title, name, f"{middle:.2f} ({low:.2f} – {high:.2f})", f"{loop_s:.1f} s", f"{own_s:.2f} s",
                f"none of {len(texts)} texts" if not apart else f"{len(apart)} of {len(texts)} texts: {'; '.join(apart)}",
                verdict(middle, title, quick),
            )  # fmt: skip
            out["arms"][f"{name}, {title}"] = {
                "ratio": middle, "low": low, "high": high, "loop_s": loop_s, "dynprobe_s": own_s, "apart": apart,
            }  # fmt: skip
    return out


def first_difference(
    loop: Loop, ids: Tensor, layer: int, alpha: float, unit: Tensor, mine: list[int], theirs: list[int]
) -> str:
    """Where two texts part, and how far apart the two tokens are there; a tie within rounding is no difference.

    Raises:
        AssertionError: If it is none.
    """
    at = next(i for i, (a, b) in enumerate(itertools.zip_longest(mine, theirs)) if a != b)
    fed = torch.cat([ids, torch.tensor([theirs[:at]], dtype=torch.long)], 1)
    logits = loop.logits(fed, layer, [alpha], unit, "all")[0][0, -1]
    gap = float((logits[mine[at]] - logits[theirs[at]]).abs() / logits.std())
    said = f"α={alpha:.3g}, token {at}: {mine[at]} or {theirs[at]}, {gap:.1e} SD apart"
    assert gap <= TOLERANCE, f"{loop.name} and dynprobe part: {said}"
    return f"tie at {said}"


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
        rounds = 1 if quick else 3
        times: dict[str, list[float]] = defaultdict(list)
        for turn in range(rounds):
            for name in ("search", "grid") if turn % 2 == 0 else ("grid", "search"):
                spent, done = timed(
                    lambda name=name, turn=turn: run(f"{name}{turn}", **({"alphas": grid} if name == "grid" else {}))
                )
                times[name].append(spent)
                if name == "search":
                    search = done
                else:
                    dense = done
        found = {}
        for name, done in (("search", search), ("grid", dense)):
            trials = done.table("trials")
            written = trials[trials["alpha"] > 0].groupby("prompt_id", observed=True).size()
            level, floor = float(trials["level"].iloc[0]), float(trials["floor"].max())
            crossings, prompts = crossings_of(trials, level, floor)
            fits = done.table("fits")
            found[name] = {
                "rows": written, "sham": int((trials["alpha"] == 0).sum()), "fit": fits[fits["headline"]].iloc[0],
                "own": {p: c for p, c in zip(prompts, crossings, strict=True)},
            }  # fmt: skip
    n = len(found["search"]["own"])
    log = {p: abs(math.log(c.value / found["grid"]["own"][p].value)) for p, c in found["search"]["own"].items()}
    errors = sorted(v for v in log.values() if math.isfinite(v))
    shifted = found["search"]["fit"]["alpha50"] / found["grid"]["fit"]["alpha50"] - 1
    table = Table(f"B5: threshold of {n} prompts, layer {layer}, relnorm", "search", "grid of 32", "budget")
    per_prompt = {name: f["rows"].mean() + f["sham"] / n for name, f in found.items()}
    table.row(
        "row-forwards per prompt: written, sham",
        *(f"{f['rows'].mean():.2f} (at most {f['rows'].max()}), {f['sham'] / n:.2f}" for f in found.values()),
        "" if quick else f"≤ 8: {'met' if per_prompt['search'] <= 8 else 'MISSED'} ({per_prompt['search']:.2f})",
    )
    for name, fit in ((name, f["fit"]) for name, f in found.items()):
        found[name]["said"] = f"{fit['alpha50']:.4f} ({fit['low']:.4f} – {fit['high']:.4f})"
    table.row("threshold of the population, 95 %", found["search"]["said"], found["grid"]["said"],
              f"± 5 %: {shifted:+.2%} {'met' if abs(shifted) <= 0.05 else 'MISSED'}")  # fmt: skip
    within = sum(e <= math.log(1.05) for e in errors)
    table.row("each prompt against the grid's own crossing", f"within 5 %: {within} of {len(errors)}",
              f"median {math.expm1(statistics.median(errors)):.2%}, worst {math.expm1(errors[-1]):.2%}", "± 5 %")  # fmt: skip
    table.row("wall time", *(f"{statistics.median(times[name]):.1f} s" for name in found),
              f"{spread([g / s for s, g in zip(times['search'], times['grid'], strict=True)])[0]:.2f} × faster")  # fmt: skip
    return {
        "row_forwards": per_prompt, "seconds": times, "population_shift": shifted, "prompt_errors": log,
        "alpha50": {name: float(f["fit"]["alpha50"]) for name, f in found.items()},
    }  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 strengths, one round: shows that it runs and agrees")
    parser.add_argument("--only", nargs="+", choices=("b3", "b4", "b5"), default=("b3", "b4", "b5"))
    parser.add_argument("--no-peers", action="store_true", help="raw hooks alone")
    parser.add_argument("--json", help="file for all numbers")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine())
    subject = dp.load("smollm2-135m")
    assert subject.resumable
    for model in (subject.model,):
        model.generation_config.eos_token_id = None  # every text has its 32 tokens on both sides
    kinds = [kind for kind in ((RawHooks,) if args.no_peers else LOOPS) if available(kind)]
    out: dict[str, Any] = {"machine": machine(), "quick": args.quick}
    alphas = np.geomspace(0.01, 10.0, 4 if args.quick else 16)
    if {"b3", "b4"} & set(args.only):
        loops = {kind.name: kind(subject) for kind in kinds}
        warm = torch.tensor(tokenize(subject, ["Some words to warm everything up."]))
        for loop in loops.values():
            loop.logits(warm, 0, [0.1], directions(subject, "warm", 0, 64), "all")
            loop.tokens(warm, 0, [0.1], directions(subject, "warm", 0, 64), 2)
    if "b3" in args.only:
        out["b3"] = b3(subject, loops, alphas, args.quick)
    if "b4" in args.only:
        out["b4"] = b4(subject, loops, alphas, args.quick)
    loops = {}
    if "b5" in args.only:
        out["b5"] = b5(subject, args.quick)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(out, file, indent=1, default=float)


if __name__ == "__main__":
    main()
