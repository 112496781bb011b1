"""α sweeps as users of other libraries write them: one forward, or one ``generate``, for every strength.

Each loop adds α·‖h‖·ê to the output of one block, with the same directions ê (one per position, drawn before any clock
runs), to all positions after the first or to the last alone. Nothing is made slower than its users would: no gradient,
no key-value cache where nothing is decoded, hooks and configurations as their own documentation shows them. What a loop
returns is a list with the logits, or the tokens, of each strength; it is not even asked to stack them.
"""

from __future__ import annotations

import abc
import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynprobe.probes import Subject

__all__ = ["LOOPS", "Batched", "LastOnly", "Loop", "NNsight", "Pyvene", "RawHooks", "TransformerLens", "available"]


class Loop(abc.ABC):
    """What is common: which columns are written, and with what.

    Args:
        subject: The model; its weights are shared.

    Attributes:
        name: Name in the tables.
        package: What must be installed.
    """

    name, package = "", "torch"

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        # A library may leave its wrappers on the modules; so each loop has modules of its own, on the same weights.
        self.model = copy.deepcopy(subject.model, {id(p): p for p in subject.model.parameters()})

    @abc.abstractmethod
    def logits(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, variant: str) -> list[Tensor]:
        """Logits of each strength: ``[1, pos, vocab]`` for variant ``"all"``, else ``[1, vocab]`` of the last token."""

    @abc.abstractmethod
    def tokens(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, new: int) -> list[list[int]]:
        """New tokens of each strength, the write being active at every position after the first."""


def push(h: Tensor, alpha: float | Tensor, unit: Tensor) -> Tensor:
    """The update of some columns."""
    return alpha * h.norm(dim=-1, keepdim=True) * unit


class RawHooks(Loop):
    """A forward hook of PyTorch on the block."""

    name = "raw hooks"

    def logits(self, ids, layer, alphas, unit, variant):
        found, columns, unit = [], written(variant), unit[: ids.shape[1]]
        for alpha in alphas:

            def hook(module, args, output, alpha=alpha):
                output = output.clone()
                output[:, columns] += push(output[:, columns], alpha, unit[columns])
                return output

            handle = self.model.model.layers[layer].register_forward_hook(hook)
            with torch.no_grad():
                logits = self.forward(ids, variant)
            handle.remove()
            found.append(logits if variant == "all" else logits[:, -1])
        return found

    def forward(self, ids: Tensor, variant: str) -> Tensor:
        """The forward of the loop."""
        return self.model(input_ids=ids, use_cache=False).logits

    def tokens(self, ids, layer, alphas, unit, new):
        found = []
        for alpha in alphas:
            seen = 0

            def hook(module, args, output, alpha=alpha):
                nonlocal seen
                columns = unit[seen : seen + output.shape[1]]
                seen += output.shape[1]
                return output + push(output, alpha, columns)

            handle = self.model.model.layers[layer].register_forward_hook(hook)
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
                )
            handle.remove()
            found.append(out[0, ids.shape[1] :].tolist())
        return found


class LastOnly(RawHooks):
    """The same loop by somebody who knows that the model can leave out the head of all positions but the last."""

    name = "raw hooks, logits_to_keep=1"

    def forward(self, ids, variant):
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


class Batched(RawHooks):
    """No loop at all: every strength in one forward, by hand. What batching alone is worth."""

    name = "raw hooks, one batch"

    def logits(self, ids, layer, alphas, unit, variant):
        columns, unit = written(variant), unit[: ids.shape[1]]
        strength = torch.tensor(alphas, dtype=unit.dtype)[:, None, None]

        def hook(module, args, output):
            output = output.clone()
            output[:, columns] += push(output[:, columns], strength, unit[columns])
            return output

        handle = self.model.model.layers[layer].register_forward_hook(hook)
        with torch.no_grad():
            logits = self.forward(ids.expand(len(alphas), -1), variant)
        handle.remove()
        return [logits if variant == "all" else logits[:, -1]]


class NNsight(Loop):
    """A trace per strength."""

    name, package = "nnsight", "nnsight"

    def __init__(self, subject):
        super().__init__(subject)
        from nnsight import TransformersModel

        self.traced = TransformersModel(self.model, tokenizer=subject.tokenizer)

    def logits(self, ids, layer, alphas, unit, variant):
        model, columns, found = self.traced, written(variant), []
        unit = unit[: ids.shape[1]]
        for alpha in alphas:
            with torch.no_grad(), model.trace(ids, use_cache=False):
                h = model.model.layers[layer].output
                h[:, columns] += push(h[:, columns], alpha, unit[columns])
                logits = model.output.logits if variant == "all" else model.output.logits[:, -1]
                logits = logits.save()
            found.append(logits)
        return found

    def tokens(self, ids, layer, alphas, unit, new):
        model, found = self.traced, []
        n = ids.shape[1]
        for alpha in alphas:
            with torch.no_grad(), model.generate(ids, max_new_tokens=new, do_sample=False) as tracer:
                for step in tracer.iter[:new]:
                    h = model.model.layers[layer].output
                    columns = unit[:n] if step == 0 else unit[n + step - 1 : n + step]
                    h[:] += push(h, alpha, columns)
                out = tracer.result.save()
            found.append(out[0, n:].tolist())
        return found


class TransformerLens(Loop):
    """``run_with_hooks`` and ``generate`` under ``hooks`` of a TransformerBridge, which loads the model itself."""

    name, package = "TransformerLens", "transformer_lens"

    def __init__(self, subject):
        super().__init__(subject)
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge = TransformerBridge.boot_transformers(subject.facts["folder"], dtype=torch.float32)

    def logits(self, ids, layer, alphas, unit, variant):
        found, columns, unit = [], written(variant), unit[: ids.shape[1]]
        for alpha in alphas:

            def write(resid, hook, alpha=alpha):
                resid[:, columns] += push(resid[:, columns], alpha, unit[columns])
                return resid

            with torch.no_grad():
                logits = self.bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.hook_out", write)])
            found.append(logits if variant == "all" else logits[:, -1])
        return found

    def tokens(self, ids, layer, alphas, unit, new):
        found = []
        for alpha in alphas:
            seen = 0

            def write(resid, hook, alpha=alpha):
                nonlocal seen
                columns = unit[seen : seen + resid.shape[1]]
                seen += resid.shape[1]
                return resid + push(resid, alpha, columns)

            with torch.no_grad(), self.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_out", write)]):
                out = self.bridge.generate(
                    ids, max_new_tokens=new, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
                )
            found.append(out[0, ids.shape[1] :].tolist())
        return found


class Pyvene(Loop):
    """An intervenable model per layer, with a function as its intervention."""

    name, package = "pyvene", "pyvene"

    def _wrapped(self, layer: int, write: Callable[[Tensor, Any], Tensor]) -> Any:
        import pyvene

        return pyvene.IntervenableModel(
            {"layer": layer, "component": "block_output", "intervention": write}, model=self.model
        )

    def logits(self, ids, layer, alphas, unit, variant):
        found, columns, unit, alpha = [], written(variant), unit[: ids.shape[1]], 0.0

        def write(base, source):
            base[:, columns] += push(base[:, columns], alpha, unit[columns])
            return base

        wrapped = self._wrapped(layer, write)
        for alpha in alphas:  # noqa: B007 (the function above reads it)
            with torch.no_grad():
                _, output = wrapped({"input_ids": ids}, use_cache=False)
            found.append(output.logits if variant == "all" else output.logits[:, -1])
        return found

    def tokens(self, ids, layer, alphas, unit, new):
        found, alpha, seen = [], 0.0, 0

        def write(base, source):
            nonlocal seen
            columns = unit[seen : seen + base.shape[1]]
            seen += base.shape[1]
            return base + push(base, alpha, columns)

        wrapped = self._wrapped(layer, write)
        for alpha in alphas:  # noqa: B007 (the function above reads it)
            seen = 0
            with torch.no_grad():
                _, out = wrapped.generate(
                    {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                    intervene_on_prompt=True, max_new_tokens=new, do_sample=False,
                )  # fmt: skip
            found.append(out[0, ids.shape[1] :].tolist())
        return found


LOOPS: tuple[type[Loop], ...] = (RawHooks, NNsight, TransformerLens, Pyvene)


def written(variant: str) -> slice:
    """Columns that a variant writes: the last alone, or all but the first."""
    return slice(-1, None) if variant == "position" else slice(1, None)


def available(kind: type[Loop]) -> bool:
    """Whether the library of a loop is installed."""
    return importlib.util.find_spec(kind.package) is not None
