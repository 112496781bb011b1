"""Run the model's own forward with some blocks replaced by their recorded output.

Calling blocks by hand would mean re-implementing every model's masks, position embeddings and caches. Instead the
model runs itself, and each block below the wanted depth answers at once with a state we hand it. The same trick gives
the exact tail: with all blocks stubbed, a state goes through the model's own final norm and head and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dynprobe.errors import ModelError
from dynprobe.probes._outputs import hidden_argument
from dynprobe.probes._subject import Subject
from dynprobe.probes._turns import changed_loop

__all__ = ["stubbed"]

_ABSENT = object()


@contextmanager
def stubbed(subject: Subject, below: int, state_after: Callable[[int], Tensor | None]) -> Iterator[None]:
    """Replace the forward of blocks ``0 … below − 1`` for the length of the block.

    Args:
        subject: Whose blocks are stubbed.
        below: Number of blocks that do not run.
        state_after: What block ``i`` hands on; None passes its input through (nothing looks at it).

    Raises:
        ModelError: If it is not known what the blocks return, because no trial forward could be run; or if a loop made
            fewer updates than were stubbed.
    """
    if len(subject.wrappers) < below:
        raise ModelError(
            f"it is not known what the blocks of {subject.name} return, since no trial forward was run; "
            "make the subject again with trial_input=<a tensor the model accepts>"
        )
    answers: dict[nn.Module, dict[int, int]] = {}
    for index in range(below):
        call = subject.turns[index].call if subject.turns else 0
        answers.setdefault(subject.blocks[index], {})[call] = index
    replaced: list[tuple[Any, Any]] = []
    stubs: list[_Stub] = []

    def begin(*_: Any) -> None:  # calls of a looped module are counted from the beginning of each forward
        for stub in stubs:
            stub.restart()

    handle = subject.model.register_forward_pre_hook(begin) if subject.turns else None
    try:
        for block, numbers in answers.items():
            replaced.append((block, block.__dict__.get("forward", _ABSENT)))
            stub = _Stub(subject, block, numbers, state_after)
            stubs.append(stub)
            object.__setattr__(block, "forward", stub)
        yield
        for stub in stubs if subject.turns else ():
            stub.check()
    finally:
        if handle is not None:
            handle.remove()
        for block, before in replaced:
            if before is _ABSENT:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = before


class _Stub:
    """A forward that answers some of its calls with a recorded state, and leaves the others to the module."""

    def __init__(
        self,
        subject: Subject,
        block: nn.Module,
        numbers: Mapping[int, int],
        state_after: Callable[[int], Tensor | None],
    ) -> None:
        self._wrappers, self._numbers, self._state_after = subject.wrappers, numbers, state_after
        self._forward: Callable[..., Any] | None = block.forward if subject.turns else None
        self._name, self._total, self._calls = subject.name, subject.blocks.count(block), 0

    def restart(self) -> None:
        """Count calls anew."""
        self._calls = 0

    def check(self) -> None:
        """Refuse a forward that ended before all recorded states were handed on: what came out is of another state."""
        if 0 < self._calls <= max(self._numbers):
            raise changed_loop(self._name, self._total)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = self._calls if self._forward is not None else 0
        self._calls += 1
        if now not in self._numbers:
            assert self._forward is not None
            if now >= self._total:
                raise changed_loop(self._name, self._total)
            return self._forward(*args, **kwargs)
        recorded = self._state_after(self._numbers[now])
        wrap = self._wrappers[self._numbers[now]]
        return wrap(recorded if recorded is not None else hidden_argument(args, kwargs))
