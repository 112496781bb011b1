"""Carry a frame of tangents through the model's own forward, and look at it between blocks.

One row of text is run in k copies, each with its own small difference; attention, masks and position embeddings are the
model's business, as everywhere. Between two blocks a *turn* sees the state and the k tangents that arrived and may put
down another frame (an orthonormalised one, a unit matrix), from which the next blocks go on. Nothing above the last
depth of interest is run.

Three roads to the same tangents. ``jvp``: forward-mode automatic differentiation, one forward. Where an operation has
no forward mode, reverse mode applied twice (the derivative of vᵀJ with respect to v), block by block. ``fd``: two-sided
finite differences of size ε‖h‖. On all of them attention takes PyTorch's plain formula, because the fused kernels have
no forward mode; its numbers differ from theirs by rounding.

A model whose blocks look back past the state they are given (shared keys and values, say) has no chain of maps from
depth to depth. It is refused, on the evidence of the ``resume`` self-test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynprobe.errors import ModelError, SelfTestError, SiteError
from dynprobe.probes._dispatch import attach_to
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import Batch
from dynprobe.probes._stub import stubbed
from dynprobe.probes._subject import Subject

__all__ = ["Turn", "carry", "check_chain"]


class Turn(Protocol):
    """What looks at the tangents between two blocks."""

    def placed(self, frame: Tensor) -> None:
        """Take note of the frame that was put down, ``[k, pos, dim]``, as rounded to the model's dtype."""

    def meet(self, depth: int, state: Tensor, tangents: Tensor) -> Tensor | None:
        """Take the state ``[pos, dim]`` and tangents ``[k, pos, dim]`` at a depth; return a new frame or None."""


class _Done(Exception):  # noqa: N818 - control flow, not an error
    """The last depth of interest was met."""


def check_chain(subject: Subject) -> None:
    """Verify that the state at a depth is all that the blocks above it know; tried once per subject.

    Raises:
        ModelError: If blocks are not a chain of maps.
    """
    if not subject.chained:
        raise ModelError(f"{subject.name} changes the state between its blocks, so its blocks are no chain of maps")
    if not subject.resumable:
        raise ModelError(
            f"the upper blocks of {subject.name} look back past the state they are given ({subject.road.reason}), so "
            "there is no map from one depth to the next whose derivative could be taken"
        )


def carry(
    subject: Subject,
    row: Sequence[int],
    state: Tensor,
    frame: Tensor,
    turn: Turn,
    *,
    at: int,
    depths: Sequence[int],
    road: str = "jvp",
    eps: float = 1e-3,
) -> str:
    """Run one row from depth ``at`` with a frame of tangents.

    Args:
        subject: The subject.
        row: Token ids of the row.
        state: Its clean state at depth ``at``, ``[pos, dim]``.
        frame: Tangents ``[k, pos, dim]``.
        turn: Sees what arrives.
        at: Depth to start from.
        depths: Depths at which ``turn.meet`` is called, all above ``at``.
        road: ``"jvp"`` or ``"fd"``.
        eps: Size of the finite differences relative to the norm of the state where the frame stands.

    Returns:
        The road taken: ``"jvp"``, ``"jvp (reverse twice)"`` or ``"fd"``.

    Raises:
        ModelError: If a state does not depend on the tangents at all, or the model cannot be differentiated.
        SiteError: If a depth does not exist.
    """
    wanted = sorted(set(depths))
    if not wanted or wanted[0] <= at or wanted[-1] > subject.n_layers or at < 0:
        raise SiteError(f"depths {wanted} were asked for from depth {at}; they lie in {at + 1}…{subject.n_layers}")
    state, frame = state.to(subject.device, subject.state_dtype), frame.to(subject.device, subject.state_dtype)
    run = _Run(subject, row, at, wanted, turn)
    if road == "fd":
        run(_Differences(state, frame, eps))
        return "fd"
    try:
        run(_Forward(state, frame))
        return "jvp"
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or not _no_forward_mode(error):
            raise
    try:
        run(_Twice(state, frame))
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{subject.name} has an operation that cannot be differentiated ({error}); load it with "
            "attn_implementation='eager', or use method='fd'"
        ) from error
    return "jvp (reverse twice)"


def _no_forward_mode(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or "forward ad" in text or "forward mode" in text or "jvp" in text


class _Run:
    """One forward of a row from a depth, with a road's states put in and taken out."""

    def __init__(self, subject: Subject, row: Sequence[int], at: int, depths: Sequence[int], turn: Turn) -> None:
        self.subject, self.row, self.at, self.depths, self.turn = subject, list(row), at, depths, turn

    def __call__(self, road: Any) -> None:
        subject, at = self.subject, self.at
        ids = torch.tensor([self.row] * road.rows, device=subject.device)
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), ("tangent",) * len(ids), (len(self.row),) * len(ids))
        inputs = batch.model_inputs(subject)
        with ExitStack() as stack:
            stack.enter_context(evaluating(subject.model))
            stack.enter_context(road.context())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            first = road.begin()
            self.turn.placed(road.frame)
            stack.enter_context(stubbed(subject, at, lambda index: first if index == at - 1 else None))
            if at == 0:
                stack.callback(attach_to(subject.door(0), write=lambda _: first).remove)
            met: list[int] = []
            for depth in self.depths:
                meeting = self._meeting(road, depth, met)
                stack.callback(attach_to(subject.door(depth), write=meeting).remove)
            with suppress(_Done):
                subject.model(**inputs)
            if met != list(self.depths):
                raise SelfTestError(f"fired: depths {met} were met on the way up; they must be {list(self.depths)}")

    def _meeting(self, road: Any, depth: int, met: list[int]) -> Callable[[Tensor], Tensor]:
        def meet(arrived: Tensor) -> Tensor:
            met.append(depth)
            shaped = arrived if arrived.dim() == 3 else arrived.reshape(road.rows, -1, arrived.shape[-1])
            state, tangents = road.read(shaped)
            frame = self.turn.meet(depth, state.detach(), tangents.detach())
            if depth == self.depths[-1]:
                raise _Done
            if frame is None:
                return arrived
            after: Tensor = road.write(shaped, frame.to(shaped.device, shaped.dtype)).reshape(arrived.shape)
            self.turn.placed(road.frame)
            return after

        return meet


class _Forward:
    """Forward-mode automatic differentiation: every row is a dual number with its own tangent."""

    def __init__(self, state: Tensor, frame: Tensor) -> None:
        self.state, self.frame, self.rows = state, frame, len(frame)

    def context(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(forward_ad.dual_level())
        return stack

    def begin(self) -> Tensor:
        return self._dual(self.state.expand_as(self.frame), self.frame)

    @staticmethod
    def _dual(state: Tensor, frame: Tensor) -> Tensor:
        # Clones: the model may write in place, and the frame is still the turn's.
        dual: Tensor = forward_ad.make_dual(state.clone(), frame.clone())
        return dual

    def read(self, arrived: Tensor) -> tuple[Tensor, Tensor]:
        primal, tangent = forward_ad.unpack_dual(arrived)
        if tangent is None:
            raise ModelError("a block's output does not depend on its input: it detaches the state on its way")
        return primal[0], tangent

    def write(self, arrived: Tensor, frame: Tensor) -> Tensor:
        self.frame = frame
        return self._dual(forward_ad.unpack_dual(arrived).primal, frame)


class _Twice:
    """Reverse mode twice: g(v) = Jᵀv is linear in v, and the derivative of ⟨g(v), V⟩ by v is JV."""

    def __init__(self, state: Tensor, frame: Tensor) -> None:
        self.state, self.frame, self.rows = state, frame, len(frame)
        self._leaf = state

    @staticmethod
    def context() -> Any:
        return torch.enable_grad()

    def begin(self) -> Tensor:
        self._leaf = self.state.expand_as(self.frame).clone().requires_grad_()
        return self._leaf.clone()

    def read(self, arrived: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.zeros_like(arrived, requires_grad=True)
        (back,) = torch.autograd.grad(arrived, self._leaf, v, create_graph=True, allow_unused=True)
        if back is None or not back.requires_grad:
            raise ModelError("a block's output does not depend on its input: it detaches the state on its way")
        (tangents,) = torch.autograd.grad(back, v, self.frame)
        return arrived[0], tangents

    def write(self, arrived: Tensor, frame: Tensor) -> Tensor:
        self.frame = frame
        self._leaf = arrived.detach().clone().requires_grad_()
        return self._leaf.clone()


class _Differences:
    """Two-sided finite differences: rows at +ε and −ε for every tangent, and the undisturbed row."""

    def __init__(self, state: Tensor, frame: Tensor, eps: float) -> None:
        self.state, self.frame, self.eps, self.rows = state, frame, eps, 2 * len(frame) + 1
        self._where = (frame != 0).flatten(2).any(-1).any(0)  # positions whose norm sets the size

    context = staticmethod(torch.no_grad)

    def begin(self) -> Tensor:
        return self._rows(self.state, self.frame)

    def _rows(self, state: Tensor, frame: Tensor) -> Tensor:
        self._size = self.eps * torch.linalg.vector_norm(state[self._where].double())
        if not float(self._size) > 0:
            raise ModelError("a finite difference is ε times the norm of the state, and the state is 0 there")
        step = (self._size * frame.double()).to(state.dtype)
        rows = torch.cat([state + step, state - step, state[None]])
        # What was really put down after rounding, so that a coarse dtype is not taken for growth.
        self.frame = (rows[: len(frame)].double() - rows[len(frame) : -1].double()) / (2 * self._size)
        return rows

    def read(self, arrived: Tensor) -> tuple[Tensor, Tensor]:
        k = len(self.frame)
        apart = arrived[:k].double() - arrived[k : 2 * k].double()
        return arrived[-1], apart / (2 * self._size)

    def write(self, arrived: Tensor, frame: Tensor) -> Tensor:
        return self._rows(arrived[-1], frame)
