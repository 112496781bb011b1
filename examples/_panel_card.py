"""Writing finished cells of the panel where the package looks for them: weights, tokenizers, one table, one card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from _text import DATABASE_SHA256, LICENCE, PACKAGE

__all__ = ["write_panel"]

_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def write_panel(target: Path, trained: Path, lines: list[dict[str, Any]]) -> None:
    """Write the models of these result lines, ``panel.json``, and the card that explains them."""
    target.mkdir(parents=True, exist_ok=True)
    rows = []
    for line in lines:
        folder = target / str(line["run"])
        folder.mkdir(exist_ok=True)
        for name in _FILES:
            shutil.copyfile(trained / str(line["run"]) / name, folder / name)
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        record = {
            "id": f"dynprobe/panel/{line['run']}",
            "files": {"model.safetensors": digest},
            "text": {"package": PACKAGE, "database_sha256": DATABASE_SHA256, "licence": LICENCE},
            "recipe": line["recipe"],
            "figures": {key: line[key] for key in ("parameters", "test_nll", "ngram_nll")},
        }
        (folder / "dynprobe-model.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        family, depth, width, seed = str(line["run"]).split("-")
        rows.append(
            {
                "name": f"panel/{line['run']}",
                "family": family,
                "depth": int(depth.removeprefix("depth")),
                "width": int(width.removeprefix("width")),
                "seed": int(seed.removeprefix("seed")),
                "parameters": line["parameters"],
                "test_nll": line["test_nll"],
            }
        )
    (target / "panel.json").write_text(json.dumps(rows, indent=1) + "\n")
    (target / "README.md").write_text(_card(rows, lines[0]))


def _card(rows: list[dict[str, Any]], line: dict[str, Any]) -> str:
    recipe, ngrams = line["recipe"], line["ngram_nll"]
    table = "\n".join(
        f"| `{row['name']}` | {row['parameters']:,} | {row['test_nll']:.3f} |"
        for row in sorted(rows, key=lambda row: (row["family"], row["depth"], row["seed"]))
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The narrowest models of the panel

Llamas, CEMs (T = 2) and CSM-style models that differ in depth and seed alone: the same bytes in the same order, the
same number of steps, the same schedule but for the peak rate that each architecture wants. Wider ones, for the axis of
width, are made by `python examples/train_panel.py`. Depth is the number of layers; for CSM-style models depth 1, 2, 4
stand for up to 4, 8, 16 trained iterations, and a model's size does not depend on it.

- **Text**: {LICENCE}.
- **Budget**: {recipe["steps"]:,} steps of {recipe["batch"]} × {recipe["length"]} bytes; {recipe["synthetic"]:.0%} of
  the windows are synthetic tasks, as in the zoo.
- **Weights**: float32, under the licence of the package (Apache-2.0).
- **For**: comparing them with each other, and with their random-initialised twins (`--controls twin`). Their text is
  bad.

Held-out loss in nats per byte, beside counting on the same bytes: unigram {ngrams["unigram"]:.3f}, bigram
{ngrams["bigram"]:.3f}, trigram {ngrams["trigram"]:.3f}, 4-gram {ngrams["4-gram"]:.3f}.

| model | parameters | held-out loss |
|---|---|---|
{table}
"""
