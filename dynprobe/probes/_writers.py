"""Writers: a perturbation, or a user's function, put to work at its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.probes._calibration import Calibration
from dynprobe.probes._clock import Step
from dynprobe.probes._kinds import Displacement, apply, displacement, realised
from dynprobe.probes._noise import NoiseSource
from dynprobe.probes._passport import Passport, passport, spread
from dynprobe.probes._perturb import Perturb, parse_many
from dynprobe.probes._roles import Site, Writer
from dynprobe.probes._site_stats import SiteStats
from dynprobe.probes._subject import Subject

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["CallableWriter", "Donor", "PerturbWriter", "Perturbs", "Update", "make_writers"]

Perturbs = str | Perturb | Callable[[Tensor, str], Tensor] | Sequence[Any] | None

#: Clean states of another prompt at one site, per row: ``[tokens, dim]``.
Donor = Mapping[Site, Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Update:
    """What one write made of one state.

    Attributes:
        before: The state.
        after: The state to use instead; the very same object where nothing is written.
        shift: The update with its counts; None where no position of the step is written.
    """

    before: Tensor
    after: Tensor
    shift: Displacement | None


class PerturbWriter:
    """Writes one perturbation at its sites and keeps its passport.

    Args:
        subject: The subject.
        perturb: What to write; defaults are filled in.
        calibration: Coordinate statistics for ``coordstd`` and ``cov``, and for the passport.
        donors: Clean states of other prompts, for ``interp``.
        magnitude: Strength of each row in units of its norm, for ``isokl``, ``[batch]``.

    Attributes:
        counts: States of the latest sequence that were ``asked`` to be written, and of those the ones left alone since
            they had no norm (``zero``) or were ``nonfinite``.
    """

    def __init__(
        self,
        subject: Subject,
        perturb: Perturb,
        *,
        calibration: Calibration | None = None,
        donors: Donor | None = None,
        magnitude: np.ndarray | None = None,
    ) -> None:
        self.perturb = perturb.defaults_filled()
        where = self.perturb.where
        self.sites: tuple[Site, ...] = tuple(subject.sites(where, writing=True))
        self._slots: Tensor | None = None
        if where.slots is not None and subject.n_slots is not None:
            self._slots = torch.zeros(subject.n_slots, dtype=torch.bool)
            self._slots[list(where.resolve_slots(subject.n_slots))] = True
        for component, layer in self.sites:
            subject.module_at(component, layer)
        if self.perturb.kind in ("impulse", "sine") and len(self.sites) != 1:
            raise UsageError(
                f"kind={self.perturb.kind} writes at one site; {where} are {len(self.sites)} in {subject.name}. Write "
                f"{subject.where_of(self.sites[0])}"
            )
        scale, writes = self.perturb.noise_scale, self.perturb.alpha != 0
        if scale.solved and magnitude is None and writes:
            raise UsageError(
                f"scale={scale.name} is solved for by a protocol; use dp.run, which finds the strength of each row"
            )
        if "donor" in scale.needs and donors is None and writes:
            raise UsageError(
                f"scale={scale.name} needs states of another prompt; use dp.run, which takes the next prompt's"
            )
        if scale.calibrated and any(c not in ("resid_pre", "resid_post") for c, _ in self.sites):
            raise UsageError(
                f"scale={scale.name} is calibrated along the residual stream; write at resid_post or resid_pre, or "
                "take relnorm, mad or abs for attention and MLP outputs"
            )
        self._stats: dict[Site, SiteStats | None] = {
            site: calibration.site_stats(*site) if calibration is not None else None for site in self.sites
        }
        self._donors, self._magnitude = donors, magnitude
        self.counts = {"asked": 0, "zero": 0, "nonfinite": 0}
        # Each with the number of its forward, so that it can be taken back.
        self._notes: list[tuple[int, np.ndarray, Passport]] = []
        self._asked: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
        self._tally: list[tuple[int, dict[str, int]]] = []
        self._first: Step | None = None
        self._n_rows = 0
        self._index = 0
        self._drive: list[Tensor] = []

    def first_position(self, n_prompt: Sequence[int], length: int) -> np.ndarray:
        """First position this perturbation writes at in each row, ``[batch]``; ``length`` where there is none."""
        pos = np.tile(np.arange(length), (len(n_prompt), 1))
        hit = self.perturb.where.mask(pos, np.asarray(n_prompt), positions="1:")
        return np.where(hit.any(1), hit.argmax(1), length)

    def write(
        self, state: Float[Tensor, "batch pos *slot dim"], site: Site, step: Step
    ) -> Float[Tensor, "batch pos *slot dim"]:
        """Return the perturbed state; the very same object where no position of this step is written."""
        made = self.update(state, site, step)
        self.note(made, site, step)
        return made.after

    def source(self, site: Site, step: Step) -> NoiseSource:
        """Return the address of this step's noise at a site."""
        return NoiseSource(step.row_keys, f"{site[0]}.{site[1]}", step.positions)

    def wanted(self, step: Step) -> np.ndarray:
        """Return which positions of a step are written, bool ``[batch, columns]``."""
        return self.perturb.where.mask(step.positions, step.n_prompt, positions="1:")

    def update(self, state: Tensor, site: Site, step: Step, source: NoiseSource | None = None) -> Update:
        """Compute what is written, and keep no book of it; see :meth:`note`.

        Args:
            state: ``[batch, columns, dim]``.
            site: Where it is.
            step: The forward.
            source: Of the noise, where it was drawn beforehand.
        """
        wanted = self.wanted(step)
        if not wanted.any():
            return Update(state, state, None)
        mask = torch.from_numpy(np.ascontiguousarray(wanted)).to(state.device)
        if self._slots is not None:
            mask = mask[..., None] & self._slots.to(state.device)
        shift = displacement(
            self.perturb,
            state,
            noise_source=source if source is not None else self.source(site, step),
            mask=mask,
            site_stats=self._stats[site],
            donor=self._donor(site, step, state),
            lengths=torch.from_numpy(step.n_prompt.copy()).to(state.device),
            magnitude=self._strengths(step, state),
        )
        return Update(state, apply(state, shift.u, mask), shift)

    def note(self, made: Update, site: Site, step: Step) -> None:
        """Enter an update into the books: its size in every unit, and what was left alone."""
        if step.index == 0 and step is not self._first:  # a new sequence
            self._first, self._n_rows = step, len(step.positions)
            self._notes.clear()
            self._asked.clear()
            self._tally.clear()
            self._drive.clear()
            self.counts = dict.fromkeys(self.counts, 0)
        self._index = step.index
        state, after, shift = made.before, made.after, made.shift
        self._keep_drive(state, after)
        if shift is None:
            return
        found = {"asked": shift.n_asked, "zero": shift.n_zero, "nonfinite": shift.n_nonfinite}
        tally = {key: int(count.sum()) for key, count in found.items()}
        self._tally.append((step.index, tally))
        self.counts = {key: self.counts[key] + tally[key] for key in tally}
        # What was left alone (no norm to be relative to, not finite) has no size; it is counted, not averaged.
        note = passport(state, realised(state, after), shift.written, self._stats[site])
        last = step.positions.max(axis=1)
        asked, alone = shift.n_asked.cpu().numpy(), (shift.n_zero + shift.n_nonfinite).cpu().numpy()
        if step.rows is not None:  # rows that left the batch keep their place in the books
            note = note.spread(step.rows, self._n_rows)
            last, asked, alone = (spread(values, step.rows, self._n_rows) for values in (last, asked, alone))
        self._notes.append((step.index, last, note))
        self._asked.append((step.index, last, asked, alone))

    def _strengths(self, step: Step, state: Tensor) -> Tensor | None:
        if self._magnitude is None:
            return None
        chosen = self._magnitude if step.rows is None else np.asarray(self._magnitude)[step.rows]
        return torch.as_tensor(chosen, device=state.device)

    def _keep_drive(self, before: Tensor, after: Tensor) -> None:
        if self.perturb.kind == "sine":
            self._drive.append(realised(before.detach(), after.detach()))

    def drive(self) -> Tensor | None:
        """Return what a ``sine`` wrote over the latest sequence, ``[batch, columns, dim]``; None for other kinds.

        It is the reference of a lock-in: the update that the model received, zero where nothing was written.
        """
        return torch.cat(self._drive, dim=1) if self._drive else None

    def _donor(self, site: Site, step: Step, state: Tensor) -> Tensor | None:
        if "donor" not in self.perturb.noise_scale.needs:
            return None
        if self._donors is None:  # α = 0: nothing is moved towards anything
            return state
        rows = []
        donors = self._donors[site]
        for i, held in enumerate(donors if step.rows is None else [donors[row] for row in step.rows]):
            index = torch.from_numpy(step.positions[i]).clamp(0, len(held) - 1)
            rows.append(held.to(state.device)[index.to(state.device)])
        return torch.stack(rows).to(state.dtype)

    def rewind(self, columns: int) -> None:
        """Forget what was written in the last ``columns`` forwards, of one token each: they were taken back."""
        if not columns:
            return
        self._index -= columns
        self._notes = [entry for entry in self._notes if entry[0] <= self._index]
        self._asked = [entry for entry in self._asked if entry[0] <= self._index]
        self._tally = [entry for entry in self._tally if entry[0] <= self._index]
        self.counts = {key: sum(tally[key] for _, tally in self._tally) for key in self.counts}
        if self._drive:  # one piece a forward: a drive stands at one site
            del self._drive[-columns:]

    def passport(self, fed: np.ndarray | None = None) -> Passport | None:
        """Return the size of what was written, per row and unit; None where nothing was.

        Args:
            fed: Tokens of each row's text ``[batch]``; steps of rows that had ended by then are left out.
        """
        total: Passport | None = None
        for _, last, note in self._notes:
            counted = note if fed is None else _only(note, last < fed)
            total = counted if total is None else total.add(counted)
        return total

    def asked(self, fed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return, per row, how many states were asked to be written and how many were left alone."""
        kept = [(a * (last < fed), b * (last < fed)) if fed is not None else (a, b) for _, last, a, b in self._asked]
        zero = np.zeros(1, np.int64)
        return sum((a for a, _ in kept), start=zero), sum((b for _, b in kept), start=zero)


def _only(note: Passport, rows: np.ndarray) -> Passport:
    """A passport without the rows that are not chosen."""
    return Passport(
        {u: np.where(rows, v, 0.0) for u, v in note.sums.items()},
        {u: np.where(rows, v, 0) for u, v in note.counts.items()},
        np.where(rows, note.n_states, 0),
        np.where(rows, note.n_nonfinite, 0),
    )


class CallableWriter:
    """Lets a function ``fn(state, site) -> state`` write; ``site`` is e.g. ``"resid_post.6"``."""

    def __init__(self, subject: Subject, function: Callable[[Tensor, str], Tensor]) -> None:
        self._function = function
        self.sites: tuple[Site, ...] = tuple(("resid_post", layer) for layer in range(subject.n_layers))

    def write(
        self, state: Float[Tensor, "batch pos *slot dim"], site: Site, step: Step
    ) -> Float[Tensor, "batch pos *slot dim"]:
        """Call the function and check that it returned a state."""
        after = self._function(state, f"{site[0]}.{site[1]}")
        if not isinstance(after, Tensor) or after.shape != state.shape:
            got = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
            raise UsageError(
                f"the function given as perturbation returned {got} at {site[0]}.{site[1]}; it must return "
                f"{tuple(state.shape)}"
            )
        return after if after.dtype == state.dtype else after.to(state.dtype)


def make_writers(
    subject: Subject,
    perturbs: Perturbs,
    *,
    calibration: Calibration | None = None,
    donors: Donor | None = None,
    magnitude: np.ndarray | None = None,
) -> list[Writer]:
    """Turn strings, objects and functions into writers, in the order given."""
    if perturbs is None:
        return []
    items = [perturbs] if isinstance(perturbs, str | Perturb) or callable(perturbs) else list(perturbs)
    writers: list[Writer] = []
    for item in items:
        if callable(item) and not isinstance(item, Perturb):
            writers.append(CallableWriter(subject, item))
        else:
            writers += [
                PerturbWriter(subject, p, calibration=calibration, donors=donors, magnitude=magnitude)
                for p in parse_many(item)
            ]
    return writers
