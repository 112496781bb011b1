"""Watch one short forward and report its structure: blocks, final norm, the two updates inside a block.

The evidence is identity and arithmetic, not names: block i + 1 is called with what block i returned; attention and MLP
are the pair of outputs inside a block with ``resid_pre + attn + mlp = resid_post``.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError
from dynprobe.probes._outputs import hidden_argument, hidden_of

__all__ = ["Trial", "watch"]

_TRIAL_TOKENS = 5


@dataclass
class _Call:
    """One call of one module during the trial."""

    name: str
    module: nn.Module
    taken: Tensor | None
    given: Tensor | None
    output: Any
    taken_copy: Tensor | None
    given_copy: Tensor | None
    version: int


@dataclass
class Trial:
    """What the trial forward showed; the fields are those of :class:`dynprobe.probes.Subject`."""

    blocks: tuple[nn.Module, ...]
    block_path: str
    dim: int
    final_norm: str | None
    updates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sequential: bool = False
    mutates: bool = False
    containers: tuple[Any, ...] = ()


def trial_ids(model: nn.Module) -> Tensor:
    """Token ids that every vocabulary has, away from the special ones where it can be helped."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = int(getattr(config, "vocab_size", 0) or 0)
    if vocab <= 0:
        raise ModelError(f"{type(model).__name__} has no vocabulary to try a forward with; pass layers='path.*' and trial_input=")
    return torch.arange(_TRIAL_TOKENS)[None] * 3 % max(vocab - 1, 1) + (1 if vocab > 1 else 0)


def _state_or_none(find: Any, *what: Any) -> Tensor | None:
    try:
        state = find(*what)
    except ModelError:
        return None
    return state if isinstance(state, Tensor) else None


def _record(model: nn.Module, inputs: Tensor | None) -> list[_Call]:
    calls: list[_Call] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            taken = _state_or_none(hidden_argument, args, kwargs)
            given = _state_or_none(hidden_of, output)
            calls.append(
                _Call(
                    name, module, taken, given, output,
                    None if taken is None else taken.detach().clone(),
                    None if given is None else given.detach().clone(),
                    -1 if given is None else given._version,
                )
            )  # fmt: skip

        return hook

    handles = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in model.named_modules() if n]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    names = inspect.signature(model.forward).parameters
    try:
        with torch.no_grad():
            if inputs is not None:
                model(inputs.to(device))
            else:
                extra = {"use_cache": False} if "use_cache" in names else {}
                ids = trial_ids(model).to(device)
                if "input_ids" in names:
                    model(input_ids=ids, **extra)
                else:
                    model(ids, **extra)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"a trial forward of {type(model).__name__} failed ({type(error).__name__}: {error}); "
            "pass layers='path.to.blocks.*' and trial_input=<a tensor the model accepts>"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _chain(calls: list[_Call], elements: list[nn.Module]) -> list[_Call] | None:
    """The calls of ``elements`` when each ran once, in order, state to state of one shape, each fed by the last."""
    ran = [call for call in calls if any(call.module is e for e in elements)]
    if [id(c.module) for c in ran] != [id(e) for e in elements]:
        return None
    for call in ran:
        if call.taken is None or call.given is None or call.taken.shape != call.given.shape or call.given.dim() < 3:
            return None
    for before, after in itertools.pairwise(ran):
        if before.given is not after.taken and not torch.equal(before.given_copy, after.taken_copy):  # type: ignore[arg-type]
            return None
    return ran


def _find_blocks(model: nn.Module, calls: list[_Call]) -> tuple[str, list[_Call]]:
    found: list[tuple[str, list[_Call]]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0:
            chain = _chain(calls, list(module))
            # Sequentials inside a block (an MLP) are chains too: the outermost comes first in named_modules.
            if chain is not None and not any(name.startswith(outer + ".") for outer, _ in found):
                found.append((name, chain))
    if not found:
        repeated = {c.name for c in calls if sum(o.module is c.module for o in calls) > 1 and c.given is not None and c.given.dim() >= 3}
        hint = f" Modules called more than once: {', '.join(sorted(repeated)[:3])} (a looped model)." if repeated else ""
        raise ModelError(
            f"no chain of blocks was found in {type(model).__name__}: no list of modules runs once each, in order, "
            f"state to state.{hint} Name them with layers='path.to.blocks.*'"
        )
    return max(found, key=lambda item: len(item[1]))


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().max())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(b.dtype, 3e-2)
    return bool((a - b).abs().max() <= tolerance * max(scale, 1e-30))


def _updates(block: _Call, inner: list[_Call]) -> tuple[dict[str, str], bool]:
    """The sub-modules whose outputs add up to what the block adds, and whether they act one after the other."""
    prefix = block.name + "."
    pre, post = block.taken_copy, block.given_copy
    assert pre is not None and post is not None
    once = [c for c in inner if sum(o.module is c.module for o in inner) == 1]
    inside = [
        (c.name.removeprefix(prefix), c.given_copy.reshape(post.shape))  # some MLPs work on flattened tokens
        for c in once
        if c.given_copy is not None and c.given_copy.numel() == post.numel() and c.given_copy.shape[-1] == post.shape[-1]
    ]
    if _close(pre, post):
        return {}, False
    for name, update in reversed(inside):
        if _close(pre + update, post):  # one update only: a state-space mixer
            return {"attn_out": name}, False
    # Outer modules come after their parts in call order; prefer them, so that `attn` wins over `attn.c_proj`.
    for (j, (second, b)), (i, (first, a)) in itertools.product(reversed(list(enumerate(inside))), repeat=2):
        if i < j and _close(pre + a + b, post):
            middle = pre + a
            sequential = any(
                c.taken_copy is not None and c.taken_copy.shape == middle.shape and _close(c.taken_copy, middle)
                for c in inner
            )
            return {"attn_out": first, "mlp_out": second}, sequential
    return {}, False


def watch(model: nn.Module, blocks: tuple[nn.Module, ...] | None, inputs: Tensor | None) -> Trial:
    """Run one short forward and return its structure.

    Args:
        model: The root module, in evaluation mode.
        blocks: The blocks where the user named them; None searches for them.
        inputs: Input of the forward; None makes token ids.

    Raises:
        ModelError: If the forward fails or shows no chain of blocks.
    """
    calls = _record(model, inputs)
    if blocks is None:
        path, chain = _find_blocks(model, calls)
        path += ".*"
    else:
        path, chain_or_none = "", _chain(calls, list(blocks))
        if chain_or_none is None:
            raise ModelError("the named modules do not run once each, in order, state to state")
        chain = chain_or_none
    last = chain[-1]
    position = next(i for i, c in enumerate(calls) if c is last)
    after = [c for c in calls[position + 1 :] if c.taken is last.given and c.given is not None]
    final = next((c.name for c in after if c.given_copy is not None and last.given_copy is not None and c.given_copy.shape == last.given_copy.shape), None)

    per_block: list[dict[str, str]] = []
    sequential = True
    for block in chain:
        found, in_order = _updates(block, [c for c in calls if c.name.startswith(block.name + ".")])
        per_block.append(found)
        sequential = sequential and in_order
    updates = {
        component: tuple(found[component] for found in per_block)
        for component in ("attn_out", "mlp_out")
        if all(component in found for found in per_block)
    }
    mutates = any(c.given is not None and c.given._version != c.version for c in chain)
    assert last.given is not None
    return Trial(
        blocks=tuple(c.module for c in chain),
        block_path=path,
        dim=int(last.given.shape[-1]),
        final_norm=final,
        updates=updates,
        sequential=sequential and "mlp_out" in updates,
        mutates=mutates,
        containers=tuple(_container(c.output) for c in chain),
    )


def _container(output: Any) -> Any:
    """The block's output without its tensors: what a stub must hand back beside the state."""
    if isinstance(output, tuple):
        return tuple(None if isinstance(item, Tensor) else item for item in output)
    return None
