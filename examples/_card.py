"""Writing a trained model where the package looks for it: weights, tokenizer, figures, and a card for people.

All figures are measured on the model as it was written and read again, in float32, on text it never saw.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _scores import Corpus, evaluate, evaluate_depths, snippet_nll, task_accuracy
from _text import DATABASE_SHA256, LICENCE, PACKAGE, ngram_entropies
from _training import Recipe

from dynprobe.models import byte_tokenizer
from dynprobe.prompts import SYNTHETIC_TASKS

__all__ = ["figures_of", "write_model"]

#: Depths at which CSM-style models are judged, and recursions at which CEM is.
DEPTHS = (0, 1, 2, 3, 5, 8, 10, 12, 15, 18, 20, 25, 30, 40, 45)
RECURSIONS = (1, 2, 3, 4)
#: How many iterations a call makes when it does not say: the mean depth of the second phase.
DEFAULT_DEPTH = 18
SNIPPET_WINDOWS = 16


def write_model(folder: Path, name: str, model: Any, recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """Write a finished model and return its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.family == "csm":
        model.config.trained_iterations = recipe.depths[1]
        model.config.num_iterations = DEFAULT_DEPTH
    model.config.use_cache = True
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    byte_tokenizer().save_pretrained(folder)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    snippet = corpus.parts["test"][: SNIPPET_WINDOWS * (recipe.length + 1)]
    (folder.parent / "held_out.txt").write_bytes(snippet)
    figures = figures_of(read, recipe, corpus) | {
        "snippet_nll": snippet_nll(read, snippet, recipe.length),
        "snippet_sha256": hashlib.sha256(snippet).hexdigest(),
    }
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    record = {
        "id": f"dynprobe/{name}",
        "files": {"model.safetensors": digest},
        "text": {"package": PACKAGE, "database_sha256": DATABASE_SHA256, "licence": LICENCE},
        "recipe": asdict(recipe),
        "figures": figures,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
    }
    (folder / "dynprobe-model.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    (folder / "README.md").write_text(_card(name, recipe, figures, digest))
    return figures


def figures_of(model: Any, recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """Measure a model on the held-out windows, beside counting on the same bytes."""
    by_depth = evaluate_depths(model, corpus, "test", DEPTHS, recipe.length) if recipe.family == "csm" else {}
    nll = by_depth[DEFAULT_DEPTH] if by_depth else evaluate(model, corpus, "test", recipe.length)
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_trained": recipe.tokens,
        "bytes_scored": len(corpus.windows["test"]) * recipe.length,
        "test_nll": nll,
        "ngram_nll": counted(corpus, recipe.length),
    }
    if recipe.family == "csm":
        figures["test_nll_by_iterations"] = by_depth
        figures["gain_over_one_iteration"] = 1.0 - nll / by_depth[1]
    elif recipe.family == "cem":
        figures["test_nll_by_recursion"] = {
            T: evaluate(model, corpus, "test", recipe.length, steps_attention=T, steps_mlp=T) for T in RECURSIONS
        }
    figures["task_accuracy"] = {
        task: {steps: task_accuracy(model, task, steps) for steps in _spread(most)}
        for task, (most, _) in SYNTHETIC_TASKS.items()
    }
    return figures


def counted(corpus: Corpus, length: int) -> dict[str, float]:
    """Return the n-gram entropies on the bytes on which models are judged."""
    text = np.frombuffer(corpus.parts["test"], np.uint8)
    windows = np.stack([text[at - 4 : at + length] for at in corpus.windows["test"]])
    scored = np.zeros(windows.shape, bool)
    scored[:, 4:] = True
    return ngram_entropies(corpus.parts["train"], windows, scored)


def _spread(most: int) -> list[int]:
    return sorted({1, 2, most // 2, most})


def _card(name: str, recipe: Recipe, figures: dict[str, Any], digest: str) -> str:
    kind = {
        "llama": "Llama",
        "cem": "CEM (causal energy minimisation, T = 2 in both recursions)",
        "csm": "CSM-style model (in the style of what was announced; the original architecture is not public)",
    }[recipe.family]
    ngrams = figures["ngram_nll"]
    nll, trigram = figures["test_nll"], ngrams["trigram"]
    verdict = "below" if nll < trigram else "NOT below"
    lines = [
        "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n",
        f"# {name}\n",
        f"A {kind} of {figures['parameters']:,} parameters that reads bytes. It comes with dynprobe so that "
        "experiments run at once and offline, and beside its siblings (`tiny-llama`, `tiny-cem`, `tiny-csm`: the same "
        "bytes in the same order, same schedule, same size within 2.5 %) so that architectures can be compared with "
        "the rest held equal. It is a toy: do not use its text, and do not take what holds for it to hold for large "
        "models.\n",
        f"- **Text**: {LICENCE}. Whole chapters are held out (1 in 20 for validation, 1 in 20 for the test below). The "
        "Bible repeats itself, so held-out chapters have parallels in the training text.",
        f"- **Synthetic tasks**: {recipe.synthetic:.0%} of the windows (pointer chasing, parity, nested brackets; "
        "`dynprobe.prompts.synthetic_items`); an eighth of all items is held out.",
        f"- **Budget**: {recipe.steps:,} steps of {recipe.batch} × {recipe.length} bytes = {recipe.tokens:,} bytes.",
        f"- **Optimiser**: AdamW (0.9, 0.95), peak rate {recipe.lr:g}, {recipe.warmup:.0%} warm-up, cosine to a tenth, "
        f"weight decay {recipe.decay:g} on matrices, clipping {recipe.clip:g}; seed {recipe.seed}; float32.",
        f"- **Weights**: float32, under the licence of the package (Apache-2.0); `model.safetensors` "
        f"sha256 `{digest}`.",
        "- **Remake**: `python examples/train_zoo.py --only " + name + " --write` (the same torch on the same kind of "
        "processor gives the same bits; elsewhere the last digits differ).\n",
        f"## Held-out text, nats per byte ({figures['bytes_scored']:,} bytes)\n",
        "| unigram | bigram | trigram | 4-gram | 5-gram | this model |\n|---|---|---|---|---|---|",
        "| " + " | ".join(f"{v:.3f}" for v in (*ngrams.values(), nll)) + " |\n",
        f"The model is {verdict} the trigram ({(nll / trigram - 1.0):+.1%}). n-grams are Witten–Bell interpolated "
        "counts of the whole training text (3.7 million bytes, more than the model was shown), on the same bytes. The "
        f"model predicts within windows of {recipe.length} bytes, so its contexts are short at their beginning.\n",
    ]
    if recipe.family == "csm":
        lines += [
            f"Depths 1 to 8 were trained in the first {recipe.shallow:.0%} of the steps, then {recipe.depths[0]} to "
            f"{recipe.depths[1]} with a penalty on the last change of the states. A call that does not say makes "
            f"{DEFAULT_DEPTH} iterations; the largest trained depth is {recipe.depths[1]}.\n",
            _table("iterations", figures["test_nll_by_iterations"]),
            f"At {DEFAULT_DEPTH} iterations the loss is {figures['gain_over_one_iteration']:.1%} below that of one.\n",
        ]
    if recipe.family == "cem":
        lines += [_table("T (both recursions; trained: 2)", figures["test_nll_by_recursion"])]
    lines += ["## Synthetic tasks, held-out items, accuracy of the next byte among the possible ones (100 items)\n"]
    lines += ["Near guessing means that the task was not learned in this budget; one standard error is up to 0.05.\n"]
    for task, found in figures["task_accuracy"].items():
        chance = SYNTHETIC_TASKS[task][1]
        lines.append(_table(f"{task}: steps (guessing {chance:.2f})", found, "{:.2f}"))
    return "\n".join(lines)


def _table(head: str, values: dict[int, float], form: str = "{:.3f}") -> str:
    return (
        f"| {head} | " + " | ".join(str(k) for k in values) + " |\n" + "|---" * (len(values) + 1) + "|\n| | "
        + " | ".join(form.format(v) for v in values.values()) + " |\n"
    )  # fmt: skip
