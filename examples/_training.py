"""One training loop for every model of the zoo and of the panel.

A run is a pure function of its recipe: the batch of step i, and the depth a CSM-style model runs at step i, are drawn
from (seed, i) and from nothing else, so a run that was stopped goes on where it was as if nothing had happened. Weights
and optimizer states are kept as safetensors between evaluations. Progress is one JSON line per evaluation.

Every architecture gets the same bytes in the same order, the same number of them, the same schedule (linear warm-up,
cosine to a tenth), the same weight decay and clipping; only the peak learning rate is its own, because CEM and
CSM-style models want a higher one than a Llama. Matrices decay; gains, biases and scalars do not. A CEM's diagonals and
its ``p`` are no matrices, though they may have a row per head: ``groups="model"`` asks the model which of its weights
decay. The zoo was trained before that question could be asked (``groups="shape"``), and its recipe says so.

CSM-style models learn in two phases that share that one schedule: depth uniform in 1…8 with a part of the loss at one
earlier iteration, then depth uniform in 6…30 with a penalty on the last change of the states, so that they come to
rest. The last four iterations are differentiated in both.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _scores import Corpus, cross_entropy, encode, evaluate, load_corpus
from safetensors.torch import load_file, save_file

from dynprobe.models import CemConfig, CemForCausalLM, CsmConfig, CsmForCausalLM
from dynprobe.prompts import SYNTHETIC_TASKS, synthetic_item

__all__ = [
    "Corpus",
    "Recipe",
    "as_json",
    "batch_of",
    "build",
    "completed",
    "evaluate",
    "learning_rate",
    "load_corpus",
    "loss_of",
    "train",
]

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Recipe:
    """Everything a trained model depends on.

    Attributes:
        family: ``llama``, ``cem`` or ``csm``.
        config: Arguments of the model's configuration; ``preset`` names one to start from.
        lr: Peak learning rate.
        steps: Optimizer steps.
        batch: Windows per step.
        length: Predicted bytes per window.
        warmup: Share of the steps with a rising rate.
        decay: Weight decay of matrices.
        clip: Largest norm of the gradient.
        synthetic: Share of windows made of synthetic tasks.
        shallow: CSM-style only: share of the steps in the first phase.
        shallow_depths: CSM-style only: smallest and largest depth of the first phase.
        depths: CSM-style only: smallest and largest depth of the second phase.
        groups: What decays: ``shape``, every weight with two axes or more; ``model``, what the model says.
        seed: Seed of weights, batches and depths.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    lr: float = 3e-3
    steps: int = 1200
    batch: int = 8
    length: int = 128
    warmup: float = 0.05
    decay: float = 0.1
    clip: float = 1.0
    synthetic: float = 0.1
    shallow: float = 0.5
    shallow_depths: tuple[int, int] = (1, 8)
    depths: tuple[int, int] = (6, 30)
    groups: str = "shape"
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Predicted bytes in all."""
        return self.steps * self.batch * self.length


def build(recipe: Recipe) -> Any:
    """Return the model with fresh weights."""
    torch.manual_seed(recipe.seed)
    given = {**recipe.config, "vocab_size": 259, **_IDS}
    preset = given.pop("preset", None)
    if recipe.family == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**given))
    kinds: dict[str, Any] = {"cem": (CemConfig, CemForCausalLM), "csm": (CsmConfig, CsmForCausalLM)}
    configuration, model = kinds[recipe.family]
    return model(configuration.preset(preset, **given) if preset else configuration(**given))


def batch_of(recipe: Recipe, corpus: Corpus, step: int) -> torch.Tensor:
    """Return the ids of one step ``[batch, length + 1]``: a pure function of the recipe's seed and the step."""
    rng = np.random.default_rng([recipe.seed, step])
    size = recipe.length + 1
    rows = []
    for row in range(recipe.batch):
        if rng.random() < recipe.synthetic:
            rows.append(_tasks(rng, size, index=step * recipe.batch + row))
        else:
            at = int(rng.integers(0, len(corpus.ids["train"]) - size))
            rows.append(corpus.ids["train"][at : at + size])
    return torch.stack(rows)


def _tasks(rng: np.random.Generator, size: int, index: int) -> torch.Tensor:
    names, text, number = list(SYNTHETIC_TASKS), "", 0
    while len(text) < size:
        task = names[int(rng.integers(len(names)))]
        steps = int(rng.integers(1, SYNTHETIC_TASKS[task][0] + 1))
        text += synthetic_item(task, steps, index=1000 * index + number, split="train").text
        number += 1
    return encode(text.encode())[:size]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate of a step: linear warm-up, then cosine to a tenth of the peak."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    along = (step - warm) / max(1, recipe.steps - warm)
    return recipe.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * along)))


def loss_of(model: Any, recipe: Recipe, ids: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is differentiated, and the plain next-byte loss."""
    if recipe.family != "csm":
        plain = cross_entropy(model(input_ids=ids[:, :-1], use_cache=False).logits, ids)
        return plain, plain.detach()
    rng = np.random.default_rng([recipe.seed, step, 7])
    first = step < recipe.shallow * recipe.steps
    low, high = recipe.shallow_depths if first else recipe.depths
    depth = int(rng.integers(low, high + 1))
    out = model(
        input_ids=ids[:, :-1], use_cache=False, num_iterations=depth, grad_iterations=4, output_hidden_states=True
    )
    plain = cross_entropy(out.logits, ids)
    if first:
        earlier = int(rng.integers(max(0, depth - 4), depth))
        return plain + 0.3 * cross_entropy(model.readout(out.hidden_states[earlier]), ids), plain.detach()
    unit = model.model.refine.unit
    change = unit(out.hidden_states[-1]) - unit(out.hidden_states[-2])
    return plain + 20.0 * change.square().mean(), plain.detach()


def train(recipe: Recipe, corpus: Corpus, folder: Path, *, every: int = 100, stop_at: int | None = None) -> Any:
    """Train, or go on training, and return the model.

    Args:
        recipe: What to train.
        corpus: On what.
        folder: Where ``progress.jsonl``, ``recipe.json`` and the state between evaluations are kept.
        every: Steps between evaluations.
        stop_at: Stop before this step, as if interrupted.

    Raises:
        SystemExit: The folder belongs to another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = as_json(recipe)
    kept = folder / "recipe.json"
    if kept.is_file() and completed(json.loads(kept.read_text())) != wanted:
        raise SystemExit(f"{folder} holds a run of another recipe; remove it or name another folder")
    kept.write_text(json.dumps(wanted, indent=1) + "\n")
    model = build(recipe).train()
    optimizer = torch.optim.AdamW(_groups(model, recipe), betas=(0.9, 0.95), eps=1e-9)
    done = _restore(folder, model, optimizer)
    started, losses = time.perf_counter(), []
    for step in range(done, recipe.steps if stop_at is None else min(stop_at, recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss, plain = loss_of(model, recipe, batch_of(recipe, corpus, step), step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if not torch.isfinite(norm):
            raise SystemExit(f"the gradient is not finite at step {step}: lower the rate")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(plain))
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            line = {
                "step": step + 1,
                "tokens": (step + 1) * recipe.batch * recipe.length,
                "lr": round(learning_rate(recipe, step), 6),
                "train_nll": round(float(np.mean(losses)), 4),
                "valid_nll": round(evaluate(model, corpus, "valid", recipe.length), 4),
                "seconds": round(time.perf_counter() - started, 1),
            }
            losses = []
            _save(folder, model, optimizer, step + 1)
            with (folder / "progress.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps({"run": folder.name, **line}), flush=True)
    return model.eval()


def as_json(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as it stands in a file."""
    return dict(json.loads(json.dumps(asdict(recipe))))


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe out of a file, with what was not yet written down when it was made."""
    return {"groups": "shape", **stored}


def _groups(model: Any, recipe: Recipe) -> list[dict[str, Any]]:
    if recipe.groups == "model":
        return list(model.decay_groups(recipe.decay))
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _save(folder: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"weight.{i}": p.detach() for i, p in enumerate(model.parameters())}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"state.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "state.tmp", {"step": str(step)})
    (folder / "state.tmp").replace(folder / "state.safetensors")


def _restore(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    file = folder / "state.safetensors"
    if not file.is_file():
        return 0
    from safetensors import safe_open

    tensors = load_file(file)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(tensors[f"weight.{i}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, number, *rest = name.split(".")
        if kind == "state":
            state.setdefault(int(number), {})[rest[0]] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    with safe_open(file, "pt") as opened:
        return int(opened.metadata()["step"])
