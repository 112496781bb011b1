"""W_Q, W_K, W_V and W_O of every layer, per head, found by what they compute and not by what they are called.

Models keep them apart, fused into one matrix in half a dozen interleavings, transposed, with shared key heads, with
norms on queries and keys. Instead of a table of layouts there is evidence. A few two-token rows are run once, and:

- the *attention module* is the innermost module around the attention call that begins with a matrix which reads its
  input and ends with a matrix whose result it returns;
- each coordinate of a query, key or value at position 0 (where a rotation turns by nothing) is the output of exactly
  one row of the matrices that read the input, directly or through one norm; that row is its weight;
- each coordinate of what attention returns is one column of the matrix that ends the module.

Then everything is recomputed from the weights that were found: values at position 1, lengths of queries and keys there
(rotations keep lengths), and the module's own output, to 1e-4. What does not come out is refused with the reason.

Not read, hence refused: attention that does not go through ``scaled_dot_product_attention`` (eager, soft-capped, with
sinks), low-rank projections, gated outputs, matrices wrapped by adapters or quantised, keys of another layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError
from dynprobe.probes._attention_calls import AttentionCall, AttentionWatch
from dynprobe.probes._attention_match import (
    ROWS,
    NoWeightsError,
    Pass,
    columns_of,
    deviation,
    matrix_of,
    moves,
    rows_of,
    same,
    tolerance,
)
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import make_batch
from dynprobe.probes._outputs import hidden_argument, hidden_of
from dynprobe.probes._subject import Subject

__all__ = ["AttentionWeights", "Refusal", "attention_weights"]


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The four matrices of one layer's attention, per query head; grouped key heads are repeated.

    Attributes:
        layer: The block.
        path: Name of the attention module inside the block.
        module: The attention module.
        w_q: ``[head, dh, dim]``.
        w_k: Likewise.
        w_v: ``[head, dv, dim]``.
        w_o: W_O transposed, ``[head, dv, dim]``: the layer adds Σ_h w_oᵀ o.
        b_o: Bias of the output, ``[dim]``, or None.
        scale: Factor on qᵀk, 1/τ.
        factor: What the model multiplies its queries by before attention: 1, or 1/√dh (then attention itself does not).
        normed: Whether queries, keys or values pass a norm on the way to attention, which the matrices leave out.
        error: Largest deviation of the recomputed output, relative to the output's largest entry.
    """

    layer: int
    path: str
    module: nn.Module
    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    b_o: Tensor | None
    scale: float
    factor: float
    normed: bool
    error: float

    @property
    def key_heads(self) -> list[int]:
        """Query heads of which each has another key head than the one before."""
        w = self.w_k
        return [h for h in range(len(w)) if h == 0 or not bool((w[h] == w[h - 1]).all())]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(self.w_q.shape[0])

    def output(self, mixed: Tensor) -> Tensor:
        """Return what the layer adds for mixed values ``[batch, head, pos, dv]``: ``[batch, pos, dim]``."""
        y = torch.einsum("bhtd,hde->bte", mixed, self.w_o.to(mixed.dtype))
        return y if self.b_o is None else y + self.b_o.to(mixed.dtype)


@dataclass(frozen=True)
class Refusal:
    """A layer whose weights were not found, and why."""

    layer: int
    reason: str


@dataclass(eq=False)
class _Block:
    """What happened inside one block during the scouting forward."""

    passes: list[Pass] = field(default_factory=list)
    calls: list[tuple[AttentionCall, tuple[str, ...]]] = field(default_factory=list)


def attention_weights(subject: Subject) -> tuple[AttentionWeights | Refusal, ...]:
    """Find the attention matrices of every layer.

    Args:
        subject: A decoder; it is run once on 16 rows of two tokens.

    Returns:
        One entry per block: the weights (detached, on the subject's device), or the refusal with its reason.

    Raises:
        ModelError: If the model does not take token ids.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> w = attention_weights(tiny_llama())[0]
        >>> w.path, tuple(w.w_q.shape), w.key_heads
        ('self_attn', (4, 8, 32), [0, 2])
    """
    vocab = subject.vocab_size
    if not vocab or vocab < 4:
        raise ModelError(f"{subject.name} does not take token ids of a vocabulary, so its attention cannot be scouted")
    ids = torch.linspace(1, vocab - 1, 2 * ROWS).long().tolist()
    batch = make_batch(subject, [[ids[i], ids[(i + ROWS) % len(ids)]] for i in range(ROWS)])
    found: dict[int, AttentionWeights | Refusal] = {}
    with torch.no_grad(), evaluating(subject.model), _scouting(subject, found):
        subject.model(**batch.model_inputs(subject))
    never = "the block did not run"
    return tuple(found.get(i, Refusal(i, never)) for i in range(subject.n_layers))


@contextmanager
def _scouting(subject: Subject, found: dict[int, AttentionWeights | Refusal]) -> Iterator[None]:
    """Watch every module inside every block; a block is read when it ends, so that one at a time is held."""
    here: list[_Block] = []
    stack: list[str] = []

    def begin(_module: nn.Module, _args: Any) -> None:
        here[:] = [_Block()]
        stack.clear()

    def end(layer: int) -> Callable[..., None]:
        def read(_module: nn.Module, _args: Any, _output: Any) -> None:
            block = here.pop() if here else _Block()
            if layer in found:
                found[layer] = Refusal(layer, "the block runs more than once in a forward")
                return
            try:
                found[layer] = _read_block(layer, subject, block)
            except NoWeightsError as refused:
                found[layer] = Refusal(layer, str(refused))

        return read

    def enter(path: str) -> Callable[..., None]:
        return lambda _module, _args: stack.append(path)

    def leave(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if stack and stack[-1] == path:
                stack.pop()
            try:
                taken, given = hidden_argument(args, kwargs), hidden_of(output)
            except ModelError:
                return
            if here:
                here[0].passes.append(Pass(path, module, taken.clone(), given.clone()))

        return note

    def seen(call: AttentionCall) -> None:
        if here:
            here[0].calls.append((call, tuple(stack)))

    with ExitStack() as hooks:
        for layer, block in enumerate(subject.blocks):
            hooks.callback(block.register_forward_pre_hook(begin).remove)
            hooks.callback(block.register_forward_hook(end(layer)).remove)
            for path, module in block.named_modules():
                if path:
                    hooks.callback(module.register_forward_pre_hook(enter(path)).remove)
                    hooks.callback(module.register_forward_hook(leave(path), with_kwargs=True).remove)
        hooks.enter_context(AttentionWatch(seen))
        yield


def _read_block(layer: int, subject: Subject, block: _Block) -> AttentionWeights:
    if not block.calls:
        raise NoWeightsError(_no_call(subject))
    if len(block.calls) > 1:
        raise NoWeightsError(f"the block calls attention {len(block.calls)} times")
    call, stack = block.calls[0]
    if call.q.dim() != 4 or call.q.shape[0] != ROWS or call.q.shape[2] != 2 or call.k.shape[:3] != call.q.shape[:3]:
        raise NoWeightsError(f"attention is called on queries {list(call.q.shape)} and keys {list(call.k.shape)}")
    for path in reversed(stack):  # innermost first
        inside = [p for p in block.passes if p.path.startswith(path + ".")]
        whole = next((p for p in block.passes if p.path == path), None)
        if whole is None:
            continue
        readers = [p for p in inside if same(p.taken, whole.taken) and matrix_of(p) is not None]
        enders = [p for p in inside if same(p.given, whole.given) and matrix_of(p) is not None]
        if readers and enders:
            if whole.taken.shape[-1] != whole.given.shape[-1]:
                raise NoWeightsError(
                    f"attention reads {whole.taken.shape[-1]} numbers and adds {whole.given.shape[-1]}, so its update "
                    "and its gradient are of different spaces"
                )
            return _assemble(layer, whole, call, readers, enders[-1], inside)
    raise NoWeightsError("no module around attention begins with a matrix on its input and ends with one")


def _no_call(subject: Subject) -> str:
    config: Any = getattr(subject.model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    text = "no attention goes through scaled_dot_product_attention"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{text}: the logits are soft-capped, which has no such energy"
    if getattr(config, "_attn_implementation", "sdpa") != "sdpa":
        return f"{text}; load the model with attn_implementation='sdpa' where it has that"
    return text


def _assemble(
    layer: int, whole: Pass, call: AttentionCall, readers: Sequence[Pass], ender: Pass, inside: Sequence[Pass]
) -> AttentionWeights:
    matrices = [matrix_of(p) for p in readers]
    rows = torch.cat([m[0] for m in matrices if m is not None])
    made = torch.cat([p.given.reshape(ROWS, 2, -1) for p in readers], -1)
    norms = [p for p in inside if p.given.shape == p.taken.shape and p.given.shape[0] == ROWS and moves(p)]
    picked: dict[str, Tensor] = {}
    normed, factor = False, 1.0
    for name, heads in (("query", call.q), ("key", call.k), ("value", call.v)):
        try:
            index, through = rows_of(name, heads, made, rows, norms)
        except NoWeightsError:
            if name != "query":
                raise
            factor = heads.shape[-1] ** -0.5
            heads = heads / factor
            index, through = rows_of(name, heads, made, rows, norms)
        picked[name] = rows[index].unflatten(0, (heads.shape[1], heads.shape[3]))
        normed |= through is not None
        expected = made[:, 1] if through is None else through
        straight = (expected[:, index] if through is None else expected).unflatten(-1, (heads.shape[1], heads.shape[3]))
        later = heads[:, :, 1]
        # Values are not rotated; a rotation keeps the length of queries and keys.
        off = (
            deviation(straight, later)
            if name == "value"
            else deviation(torch.linalg.vector_norm(straight, dim=-1), torch.linalg.vector_norm(later, dim=-1))
        )
        if not off <= tolerance(later.dtype):
            raise NoWeightsError(
                f"a {name} at position 1 is not its projection{'' if name == 'value' else ' turned'} (off by {off:.1e})"
            )
    out = matrix_of(ender)
    assert out is not None
    w_o = columns_of(call.output, ender, out[0])
    found = AttentionWeights(
        layer, whole.path, whole.module, picked["query"], picked["key"], picked["value"], w_o, out[1],
        call.scale * factor, factor, normed, 0.0,
    )  # fmt: skip
    error = deviation(found.output(call.mixed()), whole.given.reshape(ROWS, 2, -1))
    if not error <= tolerance(whole.given.dtype):
        raise NoWeightsError(f"the output recomputed from the weights is off by {error:.1e}")
    return AttentionWeights(**{**found.__dict__, "error": error})
