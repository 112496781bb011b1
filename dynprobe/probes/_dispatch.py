"""One hook per module and direction, through which every reader and writer goes.

PyTorch runs hooks in the order they were registered, so a user who opens ``dp.record`` before ``dp.perturb`` would
record states that the perturbation has not touched yet. The dispatcher removes that trap: on one module all writers
run first, in the order they were attached, then all readers; among the writers those that steer come last, so that a
controller meets the perturbed state whichever of the two was opened first. It also counts firings and is gone from the
module when its last client leaves, which is what the ``fired`` self-test verifies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynprobe.probes._outputs import hidden_argument, hidden_of, replace_argument, replace_hidden
from dynprobe.probes._turns import Lens, Place

__all__ = ["Attachment", "attach", "attach_to", "calls_of", "hooks_of_others", "live_hooks"]

Reader = Callable[[Tensor], None]
Writer = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class _Gate:
    """The single hook on one side (input or output) of one module.

    A client of a looped module names the call it is meant for. Calls are counted from the beginning of each forward of
    the root module, so that those of another forward (a decode step, a recomputation in a backward pass) are none.
    """

    module: weakref.ref[nn.Module]
    side: str
    writers: tuple[tuple[Writer, int | None], ...] = ()
    steerers: tuple[tuple[Writer, int | None], ...] = ()
    readers: tuple[tuple[Reader, int | None], ...] = ()
    acting: tuple[tuple[Writer, int | None], ...] = ()
    handle: RemovableHandle | None = None
    roots: dict[int, RemovableHandle] = field(default_factory=dict)
    calls: int = 0

    def admit(self, role: str, client: tuple[Any, int | None]) -> None:
        setattr(self, role, (*getattr(self, role), client))
        self.acting = (*self.writers, *self.steerers)

    def dismiss(self, role: str, client: tuple[Any, int | None]) -> None:
        # Made anew: whoever walks through the old one at this moment is not disturbed.
        held = list(getattr(self, role))
        held.remove(client)
        setattr(self, role, tuple(held))
        self.acting = (*self.writers, *self.steerers)

    def count_from(self, root: nn.Module) -> None:
        if id(root) not in self.roots:
            self.calls = 0
            self.roots[id(root)] = root.register_forward_pre_hook(self._begin, prepend=True)

    def _begin(self, *_: Any) -> None:
        self.calls = 0

    def open(self) -> None:
        module = self.module()
        if self.handle is None and module is not None:
            if self.side == "input":
                self.handle = module.register_forward_pre_hook(self._on_input, with_kwargs=True)
            else:
                self.handle = module.register_forward_hook(self._on_output)

    def close_if_idle(self) -> None:
        if not self.writers and not self.steerers and not self.readers and self.handle is not None:
            self.handle.remove()
            self.handle = None
            for handle in self.roots.values():
                handle.remove()
            self.roots.clear()
            module = self.module()
            if module is not None:
                gates = _GATES.get(module, {})
                gates.pop(self.side, None)
                if not gates:
                    _GATES.pop(module, None)

    def _pass(self, state: Tensor) -> Tensor:
        now, self.calls = self.calls, self.calls + 1
        for write, call in self.acting:
            if call is None or call == now:
                state = write(state)
        for read, call in self.readers:
            if call is None or call == now:
                read(state)
        return state

    def _on_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = hidden_argument(args, kwargs)
        after = self._pass(before)
        return None if after is before else replace_argument(args, kwargs, after)

    def _on_output(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        before = hidden_of(output)
        after = self._pass(before)
        return None if after is before else replace_hidden(output, after)


_GATES: weakref.WeakKeyDictionary[nn.Module, dict[str, _Gate]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Attachment:
    """A reader or writer on a module; ``remove()`` takes it off again."""

    gate: _Gate
    client: tuple[Reader | Writer, int | None] | None
    role: str

    def remove(self) -> None:
        """Take the client off the module; a second call does nothing."""
        if self.client is not None:
            self.gate.dismiss(self.role, self.client)
            self.client = None
        self.gate.close_if_idle()


def attach(
    module: nn.Module,
    *,
    side: str = "output",
    call: int | None = None,
    root: nn.Module | None = None,
    read: Reader | None = None,
    write: Writer | None = None,
    steers: bool = False,
) -> Attachment:
    """Put one reader or one writer on a module's input or output.

    Args:
        module: The module to listen to.
        side: ``"input"`` or ``"output"``.
        call: Listen to this call of the module in each forward only, 0-based; None listens to all.
        root: The module whose calls are forwards; needed with ``call``.
        read: Called with the state after all writers; its return value is ignored.
        write: Called with the state, returns the state to use instead (the same object for no change).
        steers: Let it write after all writers that do not steer, whenever they were attached.

    Returns:
        The attachment; call ``remove()`` on it.
    """
    if (read is None) == (write is None):
        raise TypeError("attach() needs one of read= or write=")
    gates = _GATES.setdefault(module, {})
    gate = gates.setdefault(side, _Gate(weakref.ref(module), side))
    gate.open()
    if call is not None and root is not None:
        gate.count_from(root)
    if write is not None:
        writer, role = (write, call), "steerers" if steers else "writers"
        gate.admit(role, writer)
        return Attachment(gate, writer, role)
    assert read is not None
    reader = read, call
    gate.admit("readers", reader)
    return Attachment(gate, reader, "readers")


def attach_to(
    place: Place, *, read: Reader | None = None, write: Writer | None = None, steers: bool = False
) -> Attachment:
    """Put one reader or one writer on a place of the track."""
    lens = place.lens
    if lens is not None and read is not None:
        read = _seen_through(lens, read)
    if lens is not None and write is not None:
        write = _written_through(lens, write)
    return attach(
        place.module, side=place.side, call=place.call, root=place.root, read=read, write=write, steers=steers
    )


def _seen_through(lens: Lens, read: Reader) -> Reader:
    return lambda whole: read(lens.get(whole))


def _written_through(lens: Lens, write: Writer) -> Writer:
    def put(whole: Tensor) -> Tensor:
        state = lens.get(whole)
        after = write(state)
        return whole if after is state else lens.put(whole, after)

    return put


def live_hooks(root: nn.Module) -> int:
    """Number of dynprobe hooks on ``root`` and its sub-modules; 0 after every context has closed."""
    return sum(len(_GATES.get(module, {})) for module in root.modules())


def calls_of(module: nn.Module) -> int | None:
    """Number of calls of a looped module in the latest forward, or None where nobody listens to it."""
    gates = [gate for gate in _GATES.get(module, {}).values() if gate.roots]
    return max((gate.calls for gate in gates), default=None)


def hooks_of_others(root: nn.Module) -> list[int]:
    """Return the forward hooks that somebody else keeps on ``root`` and its sub-modules, by their ids.

    Those that transformers leaves behind once it was asked for ``output_hidden_states`` only look and are not counted.
    """
    ours = {g.handle.id for m in root.modules() for g in _GATES.get(m, {}).values() if g.handle is not None}
    ours |= {h.id for m in root.modules() for g in _GATES.get(m, {}).values() for h in g.roots.values()}
    return [
        id(hook)
        for module in root.modules()
        for number, hook in (*module._forward_hooks.items(), *module._forward_pre_hooks.items())
        if number not in ours and getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
    ]
