"""Put readers and writers on a model for the length of a ``with`` block.

An instrument owns the clock of one root module, one recorder and any number of writers, all reached through the
dispatcher. It counts how often every site fired, so that a hook that did not run, or ran twice, is an error and not a
shorter table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, SelfTestError, UsageError
from dynprobe.probes._clock import Clock, Step
from dynprobe.probes._dispatch import Attachment, attach_to, calls_of
from dynprobe.probes._energies import EnergyTap
from dynprobe.probes._outputs import ordinary
from dynprobe.probes._passport import Passport
from dynprobe.probes._subject import Subject
from dynprobe.probes._tape import States, Tape
from dynprobe.probes._turns import changed_loop
from dynprobe.probes._where import Where

__all__ = ["Instrument", "Site", "StepListener", "Writer", "sites_to_read"]

Site = tuple[str, int]


class Writer(Protocol):
    """What writes at sites: a perturbation, a controller.

    ``write(state, site, step)`` gets the state at one site, ``[batch, columns, dim]``, and returns the state to use
    instead (the very same object for no change).
    """

    @property
    def sites(self) -> Sequence[Site]:
        """The sites it writes at."""

    def write(self, state: Tensor, site: Site, step: Step) -> Tensor:
        """Return the state to use instead."""


@runtime_checkable
class HasPassport(Protocol):
    """A writer that knows how much it wrote."""

    def passport(self, fed: np.ndarray | None = None) -> Passport | None:
        """Return the size of what was written."""

    def asked(self, fed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return how many states of each row were asked to be written, and how many were left alone."""


class StepListener(Protocol):
    """What wants to see the root module's output after each forward."""

    def __call__(self, step: Step, output: Any) -> None:
        """Take note of one forward's output."""


def sites_to_read(subject: Subject, where: Where) -> list[Site]:
    """Resolve a reading spec to sites; ``layers=all`` of the residual stream includes depth 0.

    Raises:
        SiteError: If a layer or component does not exist.
        UsageError: If the spec names a part of a row: a tape holds whole rows.
    """
    for key in ("positions", "phase", "slots") if subject.turns else ("positions", "phase", "iterations", "slots"):
        if getattr(where, key) is not None:
            raise UsageError(
                f"{key} was given in where={str(where)!r}; reading keeps whole rows of a model with layers. Name "
                "layers and component there, and pick from the tape: tape.at(layer=6, pos=-1)"
            )
    if subject.turns:
        return subject.sites(where)
    layers = where.resolve_layers(subject.n_layers)
    sites: list[Site] = []
    for component in where.components():
        if component == "resid_mid" and subject.sequential:
            sites += [(c, layer) for layer in layers for c in ("resid_pre", "attn_out")]
            continue
        if component == "resid_post" and len(layers) == subject.n_layers:
            sites.append(("resid_pre", 0))
        sites += [(component, layer) for layer in layers]
    for component, layer in sites:
        subject.module_at(component, layer)
    return list(dict.fromkeys(sites))


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
    ) -> None:
        self.subject, self.read, self.writers = subject, tuple(read), tuple(writers)
        self.root = root if root is not None else subject.model
        self.clock = Clock(self.root, row_keys, n_prompt, mask)
        self.step: Step | None = None
        self.steps: list[Step] = []
        self.fired: dict[tuple[Site, str], int] = {}
        self._grad, self._listeners = grad, tuple(listeners)
        self._all_logits = all_logits
        loop = subject.loop
        self._tap = EnergyTap(subject) if energies and loop is not None and loop.energy is not None else None
        self._captured: dict[Site, list[tuple[Tensor, int]]] = {site: [] for site in self.read}
        self._masks: list[np.ndarray] = []
        self._attachments: list[Attachment] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Instrument:
        try:
            self._handles.append(self.root.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
            self._handles.append(self.root.register_forward_hook(self._end, with_kwargs=True))
            for writer in self.writers:
                for site in writer.sites:
                    place = self.subject.module_at(*site)
                    self._attachments.append(attach_to(place, write=self._writing(writer, site)))
            for site in self.read:
                self._attachments.append(attach_to(self.subject.module_at(*site), read=self._reading(site)))
            if self._tap is not None:
                self._tap.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def select(self, kept: np.ndarray) -> None:
        """Go on with some of the rows of the running sequence; the tape keeps the place of those that left."""
        self.clock.select(kept)

    def close(self) -> None:
        """Take everything off the model."""
        for attachment in self._attachments:
            attachment.remove()
        for handle in self._handles:
            handle.remove()
        self._attachments.clear()
        self._handles.clear()
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
        if self._tap is not None:
            self._tap.begin(new=self.step.index == 0)
        if self._all_logits and kwargs.get("logits_to_keep"):
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _end(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        assert self.step is not None
        for module in dict.fromkeys(self.subject.blocks) if self.subject.turns else ():
            if calls_of(module) not in (None, self.subject.blocks.count(module)):
                raise changed_loop(self.subject.name, self.subject.blocks.count(module))
        self.clock.end(output)
        for listener in self._listeners:
            listener(self.step, output)
        self.end_step()

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

    def _reading(self, site: Site) -> Any:
        def read(state: Tensor) -> None:
            if self.step is None:
                return
            kept = self._shaped(state if self._grad else state.detach())
            self.fired[site, "read"] = self.fired.get((site, "read"), 0) + 1
            if state.is_inference() or self.subject.mutates:
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
        by_depth, updates = {}, {}
        with torch.inference_mode(False):  # joining inside the user's inference mode would make inference tensors
            joined = {site: self._join(held) for site, held in self._captured.items() if held}
            for (component, layer), state in joined.items():
                if component in ("resid_pre", "resid_post"):
                    by_depth[layer + (component == "resid_post")] = state
                else:
                    updates[component, layer] = state
            n = len(self.steps[0].positions)
            positions = torch.cat([laid_out(torch.from_numpy(s.positions), s.rows, n, -1) for s in self.steps], 1)
            ids = [laid_out(s.token_ids, s.rows, n) for s in self.steps if s.token_ids is not None]
            return Tape(
                states=States(by_depth, self.subject.n_layers),
                mask=positions >= 0,
                positions=positions,
                token_ids=torch.cat(ids, 1) if len(ids) == len(self.steps) else None,
                n_prompt=torch.from_numpy(self.steps[0].n_prompt.copy()),
                logits=None if logits is None else ordinary(logits),
                updates=updates,
                row_keys=self.steps[0].row_keys,
                subject=self.subject,
                passport=self.passport(),
                energies=self._energies(n),
            )

    def _energies(self, n: int) -> dict[str, Tensor]:
        if self._tap is None:
            return {}
        return self._tap.joined(lambda v, i: laid_out(v, self.steps[i].rows, n, np.nan), self.subject.n_layers + 1)

    def passport(self, fed: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Mean size of all writes, per row and unit; empty without a perturbation.

        Args:
            fed: Tokens of each row's text ``[batch]``; what was written to a row after its end does not count.
        """
        notes = [writer.passport(fed) for writer in self.writers if isinstance(writer, HasPassport)]
        total: Passport | None = None
        for note in notes:
            if note is not None:
                total = note if total is None else total.add(note)
        if total is None:
            return {}
        counts = [writer.asked(fed) for writer in self.writers if isinstance(writer, HasPassport)]
        asked, alone = (np.sum([np.broadcast_to(c[i], (len(total.n_states),)) for c in counts], axis=0) for i in (0, 1))
        return {**total.rows(), "n_asked": asked, "n_left_alone": alone}

    def _join(self, held: list[tuple[Tensor, int]]) -> Tensor:
        if len(held) == 1:
            return held[0][0]
        n = len(self.steps[0].positions)
        return torch.cat([laid_out(x, s.rows, n) for (x, _), s in zip(held, self.steps, strict=True)], dim=1)


def laid_out(values: Tensor, rows: np.ndarray | None, n_rows: int, fill: float = 0) -> Tensor:
    """Values of some rows in their place among all rows; ``fill`` stands for the rows that had left."""
    if rows is None:
        return values
    out = values.new_full((n_rows, *values.shape[1:]), fill)
    out[torch.from_numpy(rows).to(values.device)] = values
    return out
