"""Watch one short forward and report its structure: blocks, final norm, the two updates inside a block.

The evidence is identity and arithmetic, not names: block i + 1 is called with what block i returned; attention and MLP
are the pair of outputs inside a block with ``resid_pre + attn + mlp = resid_post``, up to the rounding of the sums.
Names decide one thing that arithmetic cannot: which of the two an update is. Every tensor is copied at the moment it is
seen, since a block may overwrite what it was given.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, did_you_mean
from dynprobe.probes._outputs import Wrapper, hidden_argument, hidden_of, wrapper_like
from dynprobe.probes._placement import device_of
from dynprobe.probes._turns import Loop, Start, Turn

__all__ = ["Trial", "TrialError", "vocabulary", "watch", "watch_loop"]

_TRIAL_TOKENS = 5
_MLP = re.compile(r"mlp|ffn|feed_?forward|\bfc\d|dense_4h|moe|expert", re.IGNORECASE)


class TrialError(ModelError):
    """The trial forward itself could not be run, so nothing is known about the structure."""


@dataclass
class _Call:
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


def _record(model: nn.Module, inputs: Tensor | None) -> list[_Call]:
    calls: list[_Call] = []
    entered: dict[str, list[Any]] = {}

    def note(name: str, module: nn.Module) -> list[Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.setdefault(name, []).append(_state(hidden_argument, args, kwargs))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            taken, taken_copy, was = entered[name].pop()
            given, given_copy, now = _state(hidden_of, output)
            calls.append(_Call(name, module, output, taken, given, taken_copy, given_copy, (was, now)))

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
        raise TrialError(
            f"a trial forward of {type(model).__name__} failed ({type(error).__name__}: {error}); "
            "pass trial_input=<a tensor the model accepts>"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _once_in_order(calls: list[_Call], elements: Sequence[nn.Module]) -> list[_Call] | None:
    """The calls of these modules, if each ran once, in their order, and has a state on both sides."""
    ran = [call for call in calls if any(call.module is e for e in elements)]
    if [id(c.module) for c in ran] != [id(e) for e in elements]:
        return None
    return ran if all(c.taken is not None and c.given is not None and c.given.dim() >= 3 for c in ran) else None


def _links(ran: list[_Call]) -> list[bool]:
    """Whether each module but the first takes in exactly what the one before gave out."""
    return [
        before.given is after.taken or torch.equal(before.given_copy, after.taken_copy)  # type: ignore[arg-type]
        for before, after in itertools.pairwise(ran)
    ]


def _find_blocks(model: nn.Module, calls: list[_Call]) -> tuple[str, list[_Call]]:
    found: list[tuple[str, list[_Call]]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0:
            ran = _once_in_order(calls, list(module))
            if ran is None or any(c.taken.shape != c.given.shape for c in ran):  # type: ignore[union-attr]
                continue
            links = _links(ran)
            # Sequentials inside a block (an MLP) are chains too: the outermost comes first in named_modules. Some
            # models rescale the state every few blocks, so not every link has to hold.
            if 2 * sum(links) >= len(links) and not any(name.startswith(f"{o}." if o else "") for o, _ in found):
                found.append((name, ran))
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


def _named_blocks(blocks: Sequence[nn.Module], calls: list[_Call]) -> list[_Call]:
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


def _updates(block: _Call, inner: list[_Call]) -> tuple[dict[str, _Call], bool]:
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


def _is_mlp(call: _Call, block: _Call) -> bool:
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
    calls = _record(model, inputs)
    path, ran = _find_blocks(model, calls) if blocks is None else ("", _named_blocks(blocks, calls))
    last = ran[-1]
    assert last.given is not None
    after = calls[next(i for i, c in enumerate(calls) if c is last) + 1 :]
    final = next((c.name for c in after if c.taken is last.given and _same_shape(c.given, last.given)), None)

    per_block: list[dict[str, _Call]] = []
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
        chained=all(_links(ran)),
        final_norm=final,
        updates=updates,
        sequential=sequential and "mlp_out" in updates,
        mutates=any(call.overwritten() for call in handed_out),
        wrappers=tuple(wrapper_like(c.output) for c in ran),
    )


def watch_loop(model: nn.Module, loop: Loop, inputs: Tensor | None) -> tuple[Trial, tuple[Turn, ...]]:
    """Run one short forward and return the structure of a looped model, with its turns.

    Raises:
        TrialError: If the forward fails.
        ModelError: If a module of the loop does not exist, does not run, or does not map a state to a state.
    """
    named = dict(model.named_modules())
    roles: dict[int, tuple[str, int]] = {}
    for path, stage, layer in loop.modules:
        if path not in named:
            raise ModelError(
                f"loop={path!r} is no module of {type(model).__name__}.{did_you_mean(path, [n for n in named if n])}"
            )
        roles[id(named[path])] = stage, layer
    calls = _record(model, inputs)
    ran = [call for call in calls if id(call.module) in roles]
    silent = [path for path, _, _ in loop.modules if not any(c.module is named[path] for c in ran)]
    if silent:
        raise ModelError(
            f"the module {silent[0]} did not run in a forward of {type(model).__name__}; a loop that makes no "
            "iteration has no track"
        )
    for call in ran:
        if call.taken is None or call.given is None or call.given.dim() < 3 or call.taken.shape != call.given.shape:
            raise ModelError(f"the module {call.name} does not map a state to a state of the same shape")
    counts: dict[tuple[str, int], int] = {}
    heard: dict[int, int] = {}
    bare: list[Turn] = []
    for call in ran:
        stage, layer = role = roles[id(call.module)]
        counts[role] = counts.get(role, 0) + 1
        number = heard[id(call.module)] = heard.get(id(call.module), -1) + 1
        bare.append(Turn(stage, layer, counts[role], 0, number, dict(loop.components).get(stage, "resid_post")))
    turns = tuple(replace(t, of=counts[t.stage, t.layer]) for t in bare)
    last = ran[-1]
    assert last.given is not None
    if loop.origin is None:
        _refuse_injected(ran)
    else:
        _check_origin(model, loop.origin, calls, last.given)
    slots = last.given.shape[2] if last.given.dim() == 4 else None
    after = calls[next(i for i, c in enumerate(calls) if c is last) + 1 :]
    final = next((c.name for c in after if c.taken is last.given and _same_shape(c.given, last.given)), None)
    return Trial(
        blocks=tuple(c.module for c in ran),
        block_path="",
        dim=int(last.given.shape[-1]),
        state_dtype=last.given.dtype,
        chained=all(_links(ran)),
        final_norm=final,
        mutates=any(call.overwritten() for call in ran),
        wrappers=tuple(wrapper_like(c.output) for c in ran),
        loop=replace(loop, slots=slots),
    ), turns


def _refuse_injected(ran: list[_Call]) -> None:
    """Refuse a loop whose turns take in something else than the state that the turn before handed out.

    Up to rounding: a model may form h + (x − h) in between.
    """
    for before, after in itertools.pairwise(ran):
        given, taken = before.given_copy, after.taken_copy
        assert given is not None
        assert taken is not None
        room = 16 * torch.finfo(given.dtype).eps * float(given.abs().max() + taken.abs().max())
        if given.shape != taken.shape or float((given - taken).abs().max()) > room:
            raise ModelError(
                f"{after.name} does not take in what {before.name} handed out, so what it takes in is no state of the "
                "track (something is added to it, or other modules run in between). Describe the loop with "
                "dynprobe.probes.Loop(modules=((path, 'core', -1),), start='path.of.what.hands.out.the.first.state')"
            )


def _check_origin(model: nn.Module, origin: Start, calls: list[_Call], state: Tensor) -> None:
    """Refuse a beginning that is no state, or does not come once: it would be read, and what is read would be wrong."""
    names = [name for name, _ in model.named_modules() if name]
    if origin.module not in names:
        raise ModelError(
            f"start={origin.module!r} is no module of {type(model).__name__}.{did_you_mean(origin.module, names)}"
        )
    module = model.get_submodule(origin.module)
    mine = [call for call in calls if call.module is module]
    if (len(mine) != 1) if origin.call is None else (len(mine) <= origin.call):
        raise ModelError(
            f"start={origin.module!r} ran {len(mine)} times in one forward; the state before the first turn comes "
            "once. Name the call that holds it: dynprobe.probes.Start(module, call=0)"
        )
    call = mine[origin.call or 0]
    whole = call.taken_copy if origin.side == "input" else call.given_copy
    found = origin.lens.get(whole) if origin.lens is not None and whole is not None else whole
    if not _same_shape(found, state):
        shape = None if found is None else tuple(found.shape)
        where = f"the {origin.side} of start={origin.module!r}"
        raise ModelError(f"{where} is {shape}, and a state is {tuple(state.shape)}")


def _same_shape(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape
