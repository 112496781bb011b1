"""α sweeps as users of other libraries write them: one forward, or one ``generate``, for every strength.

Each loop adds α·‖h‖·ê to the output of one block, with the same directions ê (one per position, drawn before any clock
runs), to all positions after the first or to the last alone. Nothing is made slower than its users would: no gradient,
no key-value cache where nothing is decoded, hooks and configurations as their own documentation shows them. What a loop
returns is a list with the logits, or the tokens, of each strength; it is not even asked to stack them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dynprobe.probes import Subject
from dynprobe.probes._noise import gaussian_rows
from dynprobe.protocols._bench_peers import bridge_of, descend, paths_of, state_of, twin

__all__ = ["LOOPS", "Batched", "LastOnly", "Loop", "NNsight", "Pyvene", "RawHooks", "TransformerLens", "directions"]


def directions(subject: Subject, key: str, layer: int, n: int) -> Tensor:
    """Unit vectors of the noise that dynprobe writes, ``[pos, dim]``; the first position gets none."""
    drawn = gaussian_rows(0, [key], f"resid_post.{layer}", np.arange(n)[None], subject.dim or 1)[0]
    unit = torch.from_numpy(drawn)
    unit /= unit.norm(dim=-1, keepdim=True)
    unit[0] = 0
    return unit.to(subject.device, subject.state_dtype or subject.dtype)


class Loop(abc.ABC):
    """What is common: which columns are written, and with what.

    Args:
        subject: The model; its weights are shared.

    Attributes:
        name: Name in the tables.
        package: What must be installed.
    """

    name: ClassVar[str] = ""
    package: ClassVar[str] = "torch"

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model = twin(subject)
        self.paths = paths_of(subject)

    @abc.abstractmethod
    def logits(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, variant: str) -> list[Tensor]:
        """Logits of each strength: ``[1, pos, vocab]`` for variant ``"all"``, else ``[1, vocab]`` of the last token."""

    @abc.abstractmethod
    def tokens(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, new: int) -> list[list[int]]:
        """New tokens of each strength, the write being active at every position after the first."""


def replaced(output: Any, state: Tensor) -> Any:
    """What a block returned, with another state in it."""
    return state if isinstance(output, Tensor) else (state, *output[1:])


def push(h: Tensor, alpha: float | Tensor, unit: Tensor) -> Tensor:
    """The update of some columns."""
    return alpha * h.norm(dim=-1, keepdim=True) * unit


class RawHooks(Loop):
    """A forward hook of PyTorch on the block."""

    name = "raw hooks"

    def logits(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, variant: str) -> list[Tensor]:
        found, columns, unit = [], written(variant), unit[: ids.shape[1]]
        for alpha in alphas:

            def hook(module: Any, args: Any, output: Any, alpha: float = alpha) -> Any:
                h = state_of(output).clone()
                h[:, columns] += push(h[:, columns], alpha, unit[columns])
                return replaced(output, h)

            handle = descend(self.model, self.paths[layer]).register_forward_hook(hook)
            with torch.no_grad():
                logits = self.forward(ids, variant)
            handle.remove()
            found.append(logits if variant == "all" else logits[:, -1])
        return found

    def forward(self, ids: Tensor, variant: str) -> Tensor:
        """The forward of the loop."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def tokens(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, new: int) -> list[list[int]]:
        found = []
        for alpha in alphas:
            seen = 0

            def hook(module: Any, args: Any, output: Any, alpha: float = alpha) -> Any:
                nonlocal seen
                h = state_of(output)
                columns = unit[seen : seen + h.shape[1]]
                seen += h.shape[1]
                return replaced(output, h + push(h, alpha, columns))

            handle = descend(self.model, self.paths[layer]).register_forward_hook(hook)
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

    def forward(self, ids: Tensor, variant: str) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits


class Batched(RawHooks):
    """No loop at all: every strength in one forward, by hand. What batching alone is worth."""

    name = "raw hooks, one batch"

    def logits(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, variant: str) -> list[Tensor]:
        columns, unit = written(variant), unit[: ids.shape[1]]
        strength = torch.tensor(alphas, dtype=unit.dtype, device=unit.device)[:, None, None]

        def hook(module: Any, args: Any, output: Any) -> Any:
            h = state_of(output).clone()
            h[:, columns] += push(h[:, columns], strength, unit[columns])
            return replaced(output, h)

        handle = descend(self.model, self.paths[layer]).register_forward_hook(hook)
        with torch.no_grad():
            logits = self.forward(ids.expand(len(alphas), -1), variant)
        handle.remove()
        return [logits if variant == "all" else logits[:, -1]]


class NNsight(Loop):
    """A trace per strength."""

    name, package = "nnsight", "nnsight"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        from nnsight import TransformersModel

        self.traced = TransformersModel(self.model, tokenizer=subject.tokenizer)

    def logits(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, variant: str) -> list[Tensor]:
        model, block, columns, found = self.traced, descend(self.traced, self.paths[layer]), written(variant), []
        unit = unit[: ids.shape[1]]
        for alpha in alphas:
            with torch.no_grad(), model.trace(ids, use_cache=False):
                h = block.output
                h[:, columns] += push(h[:, columns], alpha, unit[columns])
                logits = model.output.logits if variant == "all" else model.output.logits[:, -1]
                logits = logits.save()
            found.append(logits)
        return found

    def tokens(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, new: int) -> list[list[int]]:
        model, block, found = self.traced, descend(self.traced, self.paths[layer]), []
        n = ids.shape[1]
        for alpha in alphas:
            with torch.no_grad(), model.generate(ids, max_new_tokens=new, do_sample=False) as tracer:
                for step in tracer.iter[:new]:
                    h = block.output
                    columns = unit[:n] if step == 0 else unit[n + step - 1 : n + step]
                    h[:] += push(h, alpha, columns)
                out = tracer.result.save()
            found.append(out[0, n:].tolist())
        return found


class TransformerLens(Loop):
    """``run_with_hooks`` and ``generate`` under ``hooks`` of a TransformerBridge, which loads the model itself."""

    name, package = "TransformerLens", "transformer_lens"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.bridge = bridge_of(subject)

    def logits(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, variant: str) -> list[Tensor]:
        found, columns, unit = [], written(variant), unit[: ids.shape[1]]
        for alpha in alphas:

            def write(resid: Tensor, hook: Any, alpha: float = alpha) -> Tensor:
                resid[:, columns] += push(resid[:, columns], alpha, unit[columns])
                return resid

            with torch.no_grad():
                logits = self.bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.hook_out", write)])
            found.append(logits if variant == "all" else logits[:, -1])
        return found

    def tokens(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, new: int) -> list[list[int]]:
        found = []
        for alpha in alphas:
            seen = 0

            def write(resid: Tensor, hook: Any, alpha: float = alpha) -> Tensor:
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

    def logits(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, variant: str) -> list[Tensor]:
        found, columns, unit, alpha = [], written(variant), unit[: ids.shape[1]], 0.0

        def write(base: Tensor, source: Any) -> Tensor:
            base[:, columns] += push(base[:, columns], alpha, unit[columns])
            return base

        wrapped = self._wrapped(layer, write)
        for alpha in alphas:  # noqa: B007 (the function above reads it)
            with torch.no_grad():
                _, output = wrapped({"input_ids": ids}, use_cache=False)
            found.append(output.logits if variant == "all" else output.logits[:, -1])
        return found

    def tokens(self, ids: Tensor, layer: int, alphas: Sequence[float], unit: Tensor, new: int) -> list[list[int]]:
        found, alpha, seen = [], 0.0, 0

        def write(base: Tensor, source: Any) -> Tensor:
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
