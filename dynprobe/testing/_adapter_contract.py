"""Is an adapter one? What it says of a model, tried on that model against plain hooks and whole forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dynprobe.errors import DynprobeError
from dynprobe.probes import (
    Loop,
    Perturb,
    Subject,
    capture,
    discover,
    identical,
    live_hooks,
    readout,
    resume,
)
from dynprobe.probes._adapters import ADAPTERS, Adapter
from dynprobe.probes._dispatch import hooks_of_others
from dynprobe.testing._suite import Suite

__all__ = ["ADAPTER_CHECKS", "check_adapter"]

#: What is tried, in this order.
ADAPTER_CHECKS = ("found", "states", "null", "push", "alone", "resume", "readout", "loop", "detached")

_ROWS = ([5, 17, 9, 33, 21, 64, 90, 11], [7, 60, 23, 51], [3, 88, 19])


def check_adapter(
    make: Callable[[], nn.Module], adapter: Adapter | str | None = None, *, only: str | None = None
) -> tuple[str, ...]:
    """Try whether what an adapter says of a model is true.

    ``found`` a chain of states is found; ``states`` what is captured at every depth is what a plain hook sees there;
    ``null`` a write of strength 0 at every depth leaves states and logits bit for bit as they are; ``push`` a write of
    α = 0.1 at the middle changes that state by a tenth of its norm, nothing before it, and the logits; ``alone`` rows
    in a padded batch are those of rows alone, or the self-test says that they are not; ``resume`` a forward that begins
    at a depth is right, or all blocks run; ``readout`` the last state through the model's own tail gives the model's
    logits; ``loop`` the number of iterations can be chosen and put back, where the adapter says so; ``detached`` no
    hook stays.

    Args:
        make: Returns a model of this family, small and with fixed weights, which takes token ids below 96.
        adapter: The adapter, or the ``model_type`` of one that is installed; None takes that of the model.
        only: One check, by name.

    Returns:
        The checks that were made; ``loop`` is left out for models without a loop whose length can be chosen.

    Raises:
        SelfTestError: If one fails; the message says which and why.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> check_adapter(lambda: tiny_llama().model, lambda model: "model.layers.*", only="states")
        ('states',)
    """
    model = make().eval()
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    found = ADAPTERS[adapter or kind] if adapter is None or isinstance(adapter, str) else adapter
    with ADAPTERS.lent(kind, found), torch.no_grad():
        return _Suite(model, found, kind).run(only)


class _Suite(Suite):
    kind, checks = "adapters", ADAPTER_CHECKS

    def __init__(self, model: nn.Module, adapter: Adapter, name: str) -> None:
        self.model, self.adapter, self.name = model, adapter, name
        self.hooks = hooks_of_others(model)
        self._subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        if self._subject is None:
            try:
                self._subject = discover(self.model, name=self.name)
            except DynprobeError as error:
                self.fail("found", str(error).splitlines()[0])
        return self._subject

    def tape(self, rows: Any = _ROWS, **options: Any) -> Any:
        vocab = self.subject.vocab_size or 96
        return capture(self.subject, [[token % vocab for token in row] for row in rows], logits="all", **options)

    # The checks

    def found(self) -> None:
        said = self.adapter(self.model)
        if said is not None and not isinstance(said, Loop | str):
            self.fail("found", f"it returns {type(said).__name__}, not a Loop, a pattern of blocks, or None")
        if self.subject.n_layers < 1:
            self.fail("found", "no block or iteration is found")

    def states(self) -> None:
        subject = self.subject
        seen: dict[int, Any] = {}
        places: dict[nn.Module, list[int]] = {}
        for number, block in enumerate(subject.blocks):
            places.setdefault(block, []).append(number + 1)

        def look(block: Any, _: Any, output: Any) -> None:
            if places[block]:  # its next call in this forward
                seen[places[block].pop(0)] = (output if isinstance(output, torch.Tensor) else output[0]).clone()

        handles = [block.register_forward_hook(look) for block in list(places)]
        try:
            row = [token % (subject.vocab_size or 96) for token in _ROWS[0]]
            subject.model(torch.tensor([row], device=subject.device))
        finally:
            for handle in handles:
                handle.remove()
        tape = self.tape(_ROWS[:1])
        for depth, state in seen.items():
            if state.shape != tape.states[depth].shape:
                self.fail(
                    "states",
                    f"at depth {depth} a plain hook sees {tuple(state.shape)}, and what is captured is "
                    f"{tuple(tape.states[depth].shape)}",
                )
            if not identical(state, tape.states[depth]):
                self.fail("states", f"the state captured at depth {depth} is not what a plain hook sees there")
        if len(seen) != subject.n_layers:
            self.fail("states", f"{subject.n_layers} updates are said, and plain hooks see {len(seen)}")

    def everywhere(self, alpha: float) -> list[Perturb]:
        places = [self.subject.where_of(("resid_post", layer)) for layer in range(self.subject.n_layers)]
        return [Perturb(alpha, where=place, seed=number) for number, place in enumerate(places)]

    def null(self) -> None:
        bare, written = self.tape(), self.tape(perturb=self.everywhere(0.0))
        pairs = [(bare.logits, written.logits), *zip(bare.states, written.states, strict=True)]
        if not all(identical(a[bare.mask], b[bare.mask]) for a, b in pairs):
            self.fail("null", "a write of strength 0 changes states or logits")

    def push(self) -> None:
        layer = self.subject.n_layers // 2
        bare = self.tape()
        pushed = self.tape(perturb=[Perturb(0.1, where=self.subject.where_of(("resid_post", layer)))])
        written = bare.mask & (bare.positions > 0)
        for depth in range(layer + 1):
            if not identical(bare.states[depth][bare.mask], pushed.states[depth][bare.mask]):
                self.fail("push", f"a write at depth {layer + 1} changes depth {depth}")
        before, after = (tape.states[layer + 1][written].double() for tape in (bare, pushed))
        size = (after - before).norm(dim=-1) / before.norm(dim=-1)
        if not float((size / 0.1 - 1).abs().max()) < 1e-3:
            self.fail("push", f"a write of a tenth of the norm has the size {float(size.mean()):.3g}")
        if identical(bare.logits[written], pushed.logits[written]):
            self.fail("push", "a write changes no logit: what is written does not reach the output")

    def alone(self) -> None:
        together = self.tape()
        worst = 0.0
        for row, tokens in enumerate(_ROWS):
            one = self.tape([tokens])
            here = together.mask[row]
            for padded, bare in zip(together.states, one.states, strict=True):
                scale = float(bare[0].double().flatten(1).norm(dim=-1).max())
                off = float((padded[row][here].double() - bare[0].double()).abs().max())
                worst = max(worst, off / max(scale, 1e-12))
        if worst <= 1e-4:
            return
        from dynprobe.protocols._selfchecks import model_checks

        vocab = self.subject.vocab_size or 96
        if model_checks(self.subject, [[t % vocab for t in row] for row in _ROWS], fresh=True)["alone"].passed:
            self.fail("alone", f"padded rows differ from rows alone by {worst:.1g}, and the self-test does not say so")

    def resume(self) -> None:
        subject = self.subject
        tape = self.tape()
        spread = float(tape.logits[tape.mask].double().std())
        for depth in {1, max(1, subject.n_layers // 2), subject.n_layers}:
            again = resume(tape, at=depth, states=tape.states[depth], logits="all")
            assert again.logits is not None
            off = float((again.logits[tape.mask].double() - tape.logits[tape.mask].double()).abs().max()) / spread
            if not off <= 1e-4:
                self.fail("resume", f"a forward that begins at depth {depth} gives logits {off:.1g} SD off")

    def readout(self) -> None:
        tape = self.tape(_ROWS[:1])
        found = readout(self.subject, tape.states[-1])
        spread = float(tape.logits.double().std())
        off = float((found.double() - tape.logits.double()).abs().max()) / spread
        if not off <= 1e-4:
            self.fail("readout", f"the last state through the model's own tail gives logits {off:.1g} SD off")

    def loop(self) -> bool:
        loop = self.subject.loop
        if loop is None or loop.iterations is None or loop.set_iterations is None:
            return False
        before = loop.iterations(self.model)
        back = loop.restore(self.model) if loop.restore is not None else None
        loop.set_iterations(self.model, before + 1)
        chosen = loop.iterations(self.model)
        if back is not None:
            back()
        else:
            loop.set_iterations(self.model, before)
        if chosen != before + 1 or loop.iterations(self.model) != before:
            self.fail("loop", f"of {before} iterations {before + 1} are made by choice: {chosen}, and not put back")
        return True

    def detached(self) -> None:
        self.tape(perturb=self.everywhere(0.1))
        if live_hooks(self.model) or hooks_of_others(self.model) != self.hooks:
            self.fail("detached", "a hook stays on the model, of the adapter or of what was written")
