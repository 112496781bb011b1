"""Watch one short forward and report its structure: blocks, final norm, the two updates inside a block.

The evidence is identity and arithmetic, not names: block i + 1 is called with what block i returned; attention and MLP
are the pair of outputs inside a block with ``resid_pre + attn + mlp = resid_post``, up to the rounding of the sums.
Names decide one thing that arithmetic cannot: which of the two an update is.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError
from dynprobe.probes._outputs import Wrapper, wrapper_like
from dynprobe.probes._trial_calls import Call, linked, record, same_shape
from dynprobe.probes._turns import Loop

__all__ = ["Trial", "watch"]

_MLP = re.compile(r"mlp|ffn|feed_?forward|\bfc\d|dense_4h|moe|expert", re.IGNORECASE)


@dataclass
class Trial:
    """What the trial forward showed; the fields are those of :class:`dynprobe.probes.Subject`."""

    blocks: tuple[nn.Module, ...]
    block_path: str
    dim: int
    state_dtype: torch.dtype
    chained: bool
    final_norm: str | None
    updates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sequential: bool = False
    mutates: bool = False
    wrappers: tuple[Wrapper, ...] = ()
    loop: Loop | None = None


def _once_in_order(calls: list[Call], elements: Sequence[nn.Module]) -> list[Call] | None:
    """The calls of these modules, if each ran once, in their order, and has a state on both sides."""
    ran = [call for call in calls if any(call.module is e for e in elements)]
    if [id(c.module) for c in ran] != [id(e) for e in elements]:
        return None
    return ran if all(c.taken is not None and c.given is not None and c.given.dim() >= 3 for c in ran) else None


def _find_blocks(model: nn.Module, calls: list[Call]) -> tuple[str, list[Call]]:
    found: list[tuple[str, list[Call]]] = []
    unlinked: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0:
            ran = _once_in_order(calls, list(module))
            if ran is None or any(c.taken.shape != c.given.shape for c in ran):  # type: ignore[union-attr]
                continue
            links = linked(ran)
            # Sequentials inside a block (an MLP) are chains too: the outermost comes first in named_modules. Some
            # models rescale the state every few blocks, so not every link has to hold.
            if 2 * sum(links) >= len(links) and not any(_inside(name, o) for o, _ in found):
                found.append((name, ran))
            elif not any(links):
                unlinked.append(name)
    # What is chained inside one of several modules that run side by side in the same way is no stream of the model.
    outer = next((o for o in unlinked if all(_inside(name, o) for name, _ in found)), None) if found else None
    if outer is not None:
        raise ModelError(_no_stream(f"{outer}.*" if outer else "*"))
    if not found:
        counts: dict[str, int] = {}
        for call in calls:
            if call.given is not None and call.given.dim() >= 3:
                counts[call.name] = counts.get(call.name, 0) + 1
        looped = [name for name, count in counts.items() if count > 1]
        hint = f" Modules called more than once: {', '.join(sorted(looped)[:3])} (a looped model)." if looped else ""
        raise ModelError(
            f"no chain of blocks was found in {type(model).__name__}: no list of modules runs once each, in order, "
            f"state to state.{hint} If there are such modules, name them with layers='path.to.blocks.*'"
        )
    name, ran = max(found, key=lambda item: len(item[1]))
    return (f"{name}.*" if name else "*"), ran


def _inside(name: str, outer: str) -> bool:
    """Whether a module is one of the sub-modules of another, by their paths."""
    return name != outer and name.startswith(f"{outer}." if outer else "")


def _are_added(ran: list[Call]) -> bool:
    """Whether each module but the first takes in what the one before took in, plus what that one gave out."""
    copies = [(before.taken_copy, before.given_copy, after.taken_copy) for before, after in itertools.pairwise(ran)]
    return bool(copies) and all(
        a is not None and b is not None and c is not None and a.shape == b.shape == c.shape and _adds_up(c, a, b)
        for a, b, c in copies
    )


def _no_stream(pattern: str) -> str:
    return (
        f"the modules {pattern} run once each and in order, but none of them is given what the one before it returned: "
        "perhaps they return what is added to the state, and not the state. Put the sum into a module of its own (h + "
        f"block(h)) and name these with layers='…', or type layers={pattern!r} to read what they return"
    )


def _named_blocks(blocks: Sequence[nn.Module], calls: list[Call]) -> list[Call]:
    """The calls of the blocks that the user named; says what is wrong with them otherwise."""
    ran = _once_in_order(calls, blocks)
    if ran is not None:
        return ran
    for block in blocks:
        mine = [c for c in calls if c.module is block]
        name = mine[0].name if mine else type(block).__name__
        if len(mine) != 1:
            raise ModelError(
                f"the module {name} ran {len(mine)} times in one forward; a layer runs once "
                "(a looped model has iterations and no layers)"
            )
        if mine[0].taken is None or mine[0].given is None or mine[0].given.dim() < 3:
            raise ModelError(f"the module {name} does not map a state [batch, pos, dim] to a state")
    raise ModelError("the named modules do not run in the order of their names")


def _adds_up(total: Tensor, *terms: Tensor) -> bool:
    """Whether the terms sum to ``total`` within the rounding of as many additions."""
    eps = max(torch.finfo(t.dtype).eps for t in (total, *terms))
    wide = [t.double() if t.dtype == torch.float64 else t.float() for t in (total, *terms)]
    room = 2 * eps * sum((t.abs() for t in wide), torch.zeros_like(wide[0]))
    return bool(((sum(wide[1:]) - wide[0]).abs() <= room).all())


def _updates(block: Call, inner: list[Call]) -> tuple[dict[str, Call], bool]:
    """The sub-modules whose outputs add up to what the block adds, and whether they act one after the other."""
    pre, post = block.taken_copy, block.given_copy
    assert pre is not None
    assert post is not None
    if pre.shape != post.shape or torch.equal(pre, post):
        return {}, False
    once = [c for c in inner if sum(o.module is c.module for o in inner) == 1]
    inside = [
        (call, call.given_copy.reshape(post.shape))  # some MLPs work on flattened tokens
        for call in once
        if call.given_copy is not None
        and call.given_copy.numel() == post.numel()
        and call.given_copy.shape[-1] == post.shape[-1]
    ]
    # Outer modules come after their parts in call order; prefer them, so that `attn` wins over `attn.c_proj`.
    for call, update in reversed(inside):
        if _adds_up(post, pre, update):  # one update only: a state-space mixer, or a block that is an MLP
            return {"mlp_out" if _is_mlp(call, block) else "attn_out": call}, False
    for (j, (second, b)), (i, (first, a)) in itertools.product(reversed(list(enumerate(inside))), repeat=2):
        if i < j and _adds_up(post, pre, a, b):
            if _is_mlp(first, block) and not _is_mlp(second, block):
                return {"attn_out": second, "mlp_out": first}, False
            middle = pre + a
            later = (c.taken_copy for c in inner if c.taken_copy is not None)
            halves = (t.reshape(middle.shape) for t in later if t.numel() == middle.numel())
            return {"attn_out": first, "mlp_out": second}, any(_adds_up(middle, half) for half in halves)
    return {}, False


def _is_mlp(call: Call, block: Call) -> bool:
    return _MLP.search(call.name.removeprefix(block.name + ".")) is not None


def watch(model: nn.Module, blocks: tuple[nn.Module, ...] | None, inputs: Tensor | None) -> Trial:
    """Run one short forward and return its structure.

    Args:
        model: The root module, in evaluation mode.
        blocks: The blocks where the user named them; None searches for them.
        inputs: Input of the forward; None makes token ids.

    Raises:
        TrialError: If the forward fails.
        ModelError: If it shows no chain of blocks, or if the named blocks do not run once each and in order.
    """
    calls = record(model, inputs)
    path, ran = _find_blocks(model, calls) if blocks is None else ("", _named_blocks(blocks, calls))
    links = linked(ran)
    if not any(links) and _are_added(ran):  # a chain that begins at a state of zeros adds up as well
        warnings.warn(
            f"the {len(ran)} blocks return what is added to the state, and not the state: that is what is read here. "
            "Put the sum into a module of its own, h + block(h), and name these modules instead",
            stacklevel=2,
        )
    last = ran[-1]
    assert last.given is not None
    after = calls[next(i for i, c in enumerate(calls) if c is last) + 1 :]
    final = next((c.name for c in after if c.taken is last.given and same_shape(c.given, last.given)), None)

    per_block: list[dict[str, Call]] = []
    sequential = True
    for block in ran:
        found, in_order = _updates(block, [c for c in calls if c.name.startswith(block.name + ".")])
        per_block.append(found)
        sequential = sequential and in_order
    updates = {
        component: tuple(f[component].name.removeprefix(b.name + ".") for f, b in zip(per_block, ran, strict=True))
        for component in ("attn_out", "mlp_out")
        if all(component in found for found in per_block)
    }
    handed_out = [*ran, *(call for found in per_block for call in found.values())]
    return Trial(
        blocks=tuple(c.module for c in ran),
        block_path=path,
        dim=int(last.given.shape[-1]),
        state_dtype=last.given.dtype,
        chained=all(links),
        final_norm=final,
        updates=updates,
        sequential=sequential and "mlp_out" in updates,
        mutates=any(call.overwritten() for call in handed_out),
        wrappers=tuple(wrapper_like(c.output) for c in ran),
    )
