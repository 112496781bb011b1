"""One short forward with a hook on every module: what each call took in and gave out, in order.

Every tensor is copied at the moment it is seen, since a block may overwrite what it was given.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError
from dynprobe.probes._chunks import out_of_memory
from dynprobe.probes._outputs import hidden_argument, hidden_of
from dynprobe.probes._placement import device_of

__all__ = ["Call", "TrialError", "linked", "record", "same_shape", "trial_ids", "vocabulary"]


_TRIAL_TOKENS = 5


class TrialError(ModelError):
    """The trial forward itself could not be run, so nothing is known about the structure."""


@dataclass
class Call:
    """One call of one module during the trial: tensors as they are afterwards, and copies of what they were then."""

    name: str
    module: nn.Module
    output: Any
    taken: Tensor | None
    given: Tensor | None
    taken_copy: Tensor | None
    given_copy: Tensor | None
    versions: tuple[int, int]

    def overwritten(self) -> bool:
        """Whether its input or output was changed in place after it was seen."""
        return any(
            t is not None and t._version != v for t, v in zip((self.taken, self.given), self.versions, strict=True)
        )


def vocabulary(model: nn.Module) -> int:
    """Number of token ids that the model certainly takes; 0 where it takes none."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = int(getattr(config, "vocab_size", 0) or 0)
    if vocab > 0:
        return vocab
    # No config: ids that fit every embedding fit the vocabulary.
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)


def trial_ids(model: nn.Module) -> Tensor:
    """Token ids that every vocabulary has, away from the special ones where it can be helped."""
    vocab = vocabulary(model)
    if vocab <= 0:
        raise TrialError(
            f"{type(model).__name__} has no vocabulary to try a forward with; pass trial_input=<a tensor it accepts>"
        )
    return torch.arange(_TRIAL_TOKENS)[None] * 3 % max(vocab - 1, 1) + (1 if vocab > 1 else 0)


def _state(find: Any, *what: Any) -> tuple[Tensor | None, Tensor | None, int]:
    try:
        state = find(*what)
    except ModelError:
        return None, None, -1
    return state, state.detach().clone(), state._version


def record(model: nn.Module, inputs: Tensor | None) -> list[Call]:
    calls: list[Call] = []
    entered: dict[str, list[Any]] = {}

    def note(name: str, module: nn.Module) -> list[Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.setdefault(name, []).append(_state(hidden_argument, args, kwargs))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            taken, taken_copy, was = entered[name].pop()
            given, given_copy, now = _state(hidden_of, output)
            calls.append(Call(name, module, output, taken, given, taken_copy, given_copy, (was, now)))

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]

    ids = inputs if inputs is not None else trial_ids(model)
    ids = ids.to(device_of(model))
    names = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in names and inputs is None else {}
    handles = [handle for name, module in model.named_modules() if name for handle in note(name, module)]
    try:
        with torch.no_grad(), torch.inference_mode(False):
            if inputs is None and "input_ids" in names:
                model(input_ids=ids, **extra)
            else:
                model(ids, **extra)
    except Exception as error:
        if out_of_memory(error):  # that says nothing of the structure
            raise
        raise TrialError(
            f"a trial forward of {type(model).__name__} failed ({type(error).__name__}: {error}); "
            "pass trial_input=<a tensor the model accepts>"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def linked(ran: list[Call]) -> list[bool]:
    """Whether each module but the first takes in exactly what the one before gave out."""
    return [
        before.given is after.taken or torch.equal(before.given_copy, after.taken_copy)  # type: ignore[arg-type]
        for before, after in itertools.pairwise(ran)
    ]


def same_shape(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape
