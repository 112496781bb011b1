"""Put readers and writers on a model for the length of a ``with`` block.

An instrument owns the clock of one root module, one recorder and any number of writers, all reached through the
dispatcher. It counts how often every site fired, so that a hook that did not run, or ran twice, is an error and not a
shorter table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from dynprobe.errors import ModelError, SelfTestError, UsageError
from dynprobe.probes._beams import Beams
from dynprobe.probes._clock import Clock, Step
from dynprobe.probes._dispatch import Attachment, attach_to, calls_of
from dynprobe.probes._energies import EnergyTap
from dynprobe.probes._joined import joined_passport, joined_tape
from dynprobe.probes._outputs import ordinary
from dynprobe.probes._ring import Ring
from dynprobe.probes._roles import HasPassport, Rewinds, Site, Steerer, StepListener, Writer
from dynprobe.probes._subject import Subject
from dynprobe.probes._tape import Tape
from dynprobe.probes._turns import changed_loop

__all__ = ["Instrument"]


class Instrument:
    """Readers and writers on one root module, for the length of a ``with`` block.

    Args:
        subject: Whose modules are touched.
        read: Sites to record.
        writers: What writes, in order; writers run before readers at every site.
        root: Module whose calls are forwards; default the subject's model.
        row_keys: Names of the rows for the noise.
        n_prompt: Prompt lengths under teacher forcing.
        mask: Real tokens of the batch ``[batch, columns]``, for models that take no mask themselves.
        grad: Keep the graph of what is recorded.
        listeners: Called with each forward's output.
        energies: Read the energies of a looped model that has them.
        all_logits: Ask the model for logits at every position, also where its caller asked for the last only.
        ring: Copy what is recorded into this buffer, begun for the batch; None keeps the model's own tensors.
    """

    def __init__(
        self,
        subject: Subject,
        read: Sequence[Site] = (),
        writers: Iterable[Writer] = (),
        *,
        root: nn.Module | None = None,
        row_keys: Sequence[str] | None = None,
        n_prompt: Sequence[int] | None = None,
        mask: Tensor | None = None,
        grad: bool = False,
        listeners: Sequence[StepListener] = (),
        energies: bool = False,
        all_logits: bool = False,
        ring: Ring | None = None,
    ) -> None:
        self.subject, self.read, self.writers = subject, tuple(read), tuple(writers)
        self.root = root if root is not None else subject.model
        self.clock = Clock(self.root, row_keys, n_prompt, mask)
        self.step: Step | None = None
        self.steps: list[Step] = []
        self.fired: dict[tuple[Site, str], int] = {}
        self._grad, self._listeners = grad, tuple(listeners)
        self._all_logits, self._ring = all_logits, ring
        if ring is not None and (grad or set(self.read) - set(ring.sites)):
            raise UsageError("a ring keeps values of its own sites and no graph; read others, or with grad, without it")
        loop = subject.loop
        self._tap = EnergyTap(subject) if energies and loop is not None and loop.energy is not None else None
        self._captured: dict[Site, list[tuple[Tensor, int]]] = {site: [] for site in self.read}
        self._masks: list[np.ndarray] = []
        self.steerers = tuple(writer for writer in self.writers if isinstance(writer, Steerer))
        self._attachments: list[Attachment] = []
        self._handles: list[Any] = []
        self._beams = Beams(self.root)
        self._traces: Any = None  # what carries it where the backend is not hooks

    def __enter__(self) -> Instrument:
        if self.subject.backend != "hooks":
            return self._open_traces()
        try:
            self._handles.append(self.root.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
            self._handles.append(self.root.register_forward_hook(self._end, with_kwargs=True))
            for writer in self.writers:
                for site in writer.sites:
                    place = self.subject.module_at(*site)
                    steers = isinstance(writer, Steerer)
                    self._attachments.append(attach_to(place, write=self._writing(writer, site), steers=steers))
            for steerer in self.steerers:
                for site in steerer.observes:
                    place = self.subject.module_at(*site)
                    self._attachments.append(attach_to(place, read=self._showing(steerer, site)))
            for site in self.read:
                self._attachments.append(attach_to(self.subject.module_at(*site), read=self._reading(site)))
            if self._tap is not None:
                self._tap.open()
        except BaseException:
            self.close()
            raise
        return self

    def _open_traces(self) -> Instrument:
        from dynprobe.probes._nnsight import Traces  # imports this module

        self._traces = Traces(self)
        try:
            self._traces.open()
        except BaseException:
            self.close()
            raise
        return self

    def halt(self) -> bool:
        """Let forwards stop behind the last wanted place; False where the backend leaves that to its caller."""
        if self._traces is not None:
            self._traces.halting = True
        return self._traces is not None

    def __exit__(self, *_: object) -> None:
        self.close()

    def select(self, kept: np.ndarray) -> None:
        """Go on with some of the rows of the running sequence; the tape keeps the place of those that left."""
        self.clock.select(kept)
        self._reorder(kept)

    def _reorder(self, rows: np.ndarray) -> None:
        for steerer in self.steerers:
            steerer.select(rows)

    def rewind(self, columns: int) -> None:
        """Take the last ``columns`` decode steps back, of one token each; the caller has cut the cache likewise.

        Raises:
            ModelError: If the sequence has not so many decode steps.
        """
        if not 0 <= columns < len(self.steps) or any(
            s.positions.shape[1] != 1 for s in self.steps[-columns:][:columns]
        ):
            raise ModelError(f"{columns} decode steps were to be taken back; there are {len(self.steps) - 1}")
        if not columns:
            return
        self.clock.rewind(columns)
        del self.steps[-columns:]
        for site, held in self._captured.items():
            del held[-columns:]
            self.fired[site, "read"] = self.fired.get((site, "read"), 0) - columns
        for writer in self.writers:
            for site in writer.sites:
                self.fired[site, "write"] = self.fired.get((site, "write"), 0) - columns
        if self._ring is not None:
            self._ring.rewind(columns)
        if self._tap is not None:
            self._tap.rewind(columns)
        for party in (*self.writers, *self._listeners):
            if isinstance(party, Rewinds):
                party.rewind(columns)

    def close(self) -> None:
        """Take everything off the model."""
        for attachment in self._attachments:
            attachment.remove()
        for handle in self._handles:
            handle.remove()
        self._attachments.clear()
        self._handles.clear()
        self._beams.release()
        if self._traces is not None:
            self._traces.close()
        if self._tap is not None:
            self._tap.close()
        self.clock.release()

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.step = self.clock.begin(args, kwargs)
        if self.step.index == 0:  # a new sequence: the tape holds the latest one
            self.steps.clear()
            self._captured = {site: [] for site in self.read}
            self.fired.clear()
        self.steps.append(self.step)
        for steerer in self.steerers:
            steerer.begin(self.step)
        if self._tap is not None:
            self._tap.begin(new=self.step.index == 0)
        if self._all_logits and kwargs.get("logits_to_keep"):
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _end(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        assert self.step is not None
        for module in dict.fromkeys(self.subject.blocks) if self.subject.turns else ():
            if calls_of(module) not in (None, self.subject.blocks.count(module)):
                raise changed_loop(self.subject.name, self.subject.blocks.count(module))
        self.clock.end(output)
        for listener in self._listeners:
            listener(self.step, output)
        after = output
        for steerer in self.steerers:
            changed = steerer.end(self.step, after)
            after = after if changed is None else changed
        if self.steerers:
            self._beams.follow(output, self._reorder)
        self.end_step()
        return None if after is output else after

    def end_step(self) -> None:
        """Close the current forward; called by hand where it was stopped on purpose after its last wanted state.

        Raises:
            ModelError: If a recorded state was changed in place after it was handed on.
        """
        self.step = None
        if self._tap is not None:
            self._tap.end()
        for (component, layer), held in self._captured.items():
            if held and held[-1][1] >= 0 and held[-1][0]._version != held[-1][1]:
                raise ModelError(
                    f"{self.subject.name} changed the state of {component}.{layer} in place after handing it on, "
                    "which its trial forward did not show; make a subject = dp.discover(model), set subject.mutates = "
                    "True so that states are copied when they are read, and use it in place of the model"
                )

    def _shaped(self, state: Tensor) -> Tensor:
        """The state with its batch and position axes apart, checked against the positions of this forward."""
        assert self.step is not None
        rows, columns = self.step.positions.shape
        if state.dim() > 2 and state.size(0) == rows and state.size(1) == columns:  # asked at every site and token
            return state
        if state.dim() == 2 and len(state) == rows * columns:
            return state.reshape(rows, columns, state.shape[-1])
        if state.shape[:2] == (rows, columns):
            return state
        if state.dim() >= 3 and len(state) == rows and self.step.token_ids is None and not self.fired:
            # An input that is no text (an image): the positions are those of the first state that is seen.
            positions = np.tile(np.arange(state.shape[1]), (rows, 1))
            self.step = replace(self.step, positions=positions, n_prompt=np.full(rows, state.shape[1]))
            self.steps[-1] = self.step
            return state
        raise ModelError(
            f"a state {tuple(state.shape)} does not fit the {rows} × {columns} positions of the input; "
            f"{self.subject.name} changes the number of positions on the way"
        )

    def _writing(self, writer: Writer, site: Site) -> Any:
        def write(state: Tensor) -> Tensor:
            if self.step is None:  # a block called outside the root's forward is not part of a trajectory
                return state
            shaped = self._shaped(state)
            self.fired[site, "write"] = self.fired.get((site, "write"), 0) + 1
            after = writer.write(shaped, site, self.step)
            return state if after is shaped else after.reshape(state.shape)

        return write

    def _showing(self, steerer: Steerer, site: Site) -> Any:
        def show(state: Tensor) -> None:
            if self.step is not None:
                steerer.observe(self._shaped(state), site, self.step)

        return show

    def _reading(self, site: Site) -> Any:
        def read(state: Tensor) -> None:
            if self.step is None:
                return
            kept = self._shaped(state.detach() if state.requires_grad and not self._grad else state)
            self.fired[site, "read"] = self.fired.get((site, "read"), 0) + 1
            if self._ring is not None:
                self._captured[site].append((self._ring.write(site, kept), -1))
            elif state.is_inference() or self.subject.mutates:
                kept = ordinary(kept) if state.is_inference() else kept.clone()
                self._captured[site].append((kept, -1))
            else:
                self._captured[site].append((kept, kept._version))

        return read

    def check_fired(self) -> dict[str, int]:
        """Verify that every site fired exactly once per forward.

        Returns:
            Expected and observed counts.

        Raises:
            SelfTestError: If one did not.
        """
        expected = len(self.steps)
        wanted = [(site, "read") for site in self.read] + [(s, "write") for w in self.writers for s in w.sites]
        for (component, layer), role in wanted:
            count = self.fired.get(((component, layer), role), 0)
            times = sum(1 for item in wanted if item == ((component, layer), role))
            if count != expected * times:
                raise SelfTestError(
                    f"fired: {component}.{layer} was {'read' if role == 'read' else 'written'} {count} times in "
                    f"{expected} forwards; it must be {expected * times}. Is the block called in a loop, skipped or "
                    "compiled?"
                )
        return {"forwards": expected, "sites": len(wanted), "fired": sum(self.fired.values())}

    def tape(self, logits: Tensor | None = None) -> Tape:
        """Join everything recorded so far into a tape of ordinary tensors.

        Raises:
            ModelError: If nothing was recorded, or the last forward did not finish.
        """
        if not self.steps:
            raise ModelError("nothing was recorded: the model was not called inside the with block")
        if self.step is not None:
            raise ModelError("the last forward did not finish, so there is no whole trajectory; call the model again")
        held = {site: [state for state, _ in states] for site, states in self._captured.items()}
        return joined_tape(self.subject, self.steps, held, logits, self.passport(), self._tap)

    def passport(self, fed: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Mean size of all writes, per row and unit; empty without a perturbation.

        Args:
            fed: Tokens of each row's text ``[batch]``; what was written to a row after its end does not count.
        """
        return joined_passport([writer for writer in self.writers if isinstance(writer, HasPassport)], fed)
