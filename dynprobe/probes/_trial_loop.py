"""Watch one short forward of a looped model and report its turns.

The modules of the loop are named by whoever describes it; what is checked is that they run, map a state to a state,
and hand it on unchanged from one turn to the next.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, did_you_mean
from dynprobe.probes._outputs import wrapper_like
from dynprobe.probes._trial import Trial
from dynprobe.probes._trial_calls import Call, linked, record, same_shape
from dynprobe.probes._turns import Loop, Start, Turn

__all__ = ["watch_loop"]


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
    calls = record(model, inputs)
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
    final = next((c.name for c in after if c.taken is last.given and same_shape(c.given, last.given)), None)
    return Trial(
        blocks=tuple(c.module for c in ran),
        block_path="",
        dim=int(last.given.shape[-1]),
        state_dtype=last.given.dtype,
        chained=all(linked(ran)),
        final_norm=final,
        mutates=any(call.overwritten() for call in ran),
        wrappers=tuple(wrapper_like(c.output) for c in ran),
        loop=replace(loop, slots=slots),
    ), turns


def _refuse_injected(ran: list[Call]) -> None:
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


def _check_origin(model: nn.Module, origin: Start, calls: list[Call], state: Tensor) -> None:
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
    if not same_shape(found, state):
        shape = None if found is None else tuple(found.shape)
        where = f"the {origin.side} of start={origin.module!r}"
        raise ModelError(f"{where} is {shape}, and a state is {tuple(state.shape)}")
