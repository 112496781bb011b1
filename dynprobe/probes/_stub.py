"""Run the model's own forward with some blocks replaced by their recorded output.

Calling blocks by hand would mean re-implementing every model's masks, position embeddings and caches. Instead the
model runs itself, and each block below the wanted depth answers at once with a state we hand it. The same trick gives
the exact tail: with all blocks stubbed, a state goes through the model's own final norm and head and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dynprobe.errors import ModelError
from dynprobe.probes._outputs import hidden_argument
from dynprobe.probes._subject import Subject

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
        ModelError: If it is not known what the blocks return, because no trial forward could be run.
    """
    if len(subject.wrappers) < below:
        raise ModelError(
            f"it is not known what the blocks of {subject.name} return, since no trial forward was run; "
            "make the subject again with trial_input=<a tensor the model accepts>"
        )
    replaced: list[tuple[Any, Any]] = []
    try:
        for index in range(below):
            block = subject.blocks[index]
            replaced.append((block, block.__dict__.get("forward", _ABSENT)))
            object.__setattr__(block, "forward", _stub(subject, index, state_after))
        yield
    finally:
        for block, before in replaced:
            if before is _ABSENT:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = before


def _stub(subject: Subject, index: int, state_after: Callable[[int], Tensor | None]) -> Callable[..., Any]:
    wrap = subject.wrappers[index]

    def forward(*args: Any, **kwargs: Any) -> Any:
        recorded = state_after(index)
        return wrap(recorded if recorded is not None else hidden_argument(args, kwargs))

    return forward
