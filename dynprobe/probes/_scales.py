"""Noise scales: what α multiplies. One contract, one file each in ``scales/``, one line each in the table below.

A strength means something only together with its scale. For a state h ∈ R^d at one site, ε ~ N(0, I) and ε̂ = ε/‖ε‖:

==========  ==============================  ==============================================================
scale       u                               meaning of α
==========  ==============================  ==============================================================
relnorm     α‖h‖ε̂                           realised ‖u‖/‖h‖, exactly
coordstd    α·s⊙ε                           SDs of each coordinate over calibration tokens at the site
mad         α·1.4826·MAD(h)·ε               robust SD over the coordinates of the state itself
cov         α·Σ^{1/2}ε                      SDs along the principal axes of the calibration states
abs         αε                              the model's own units
interp      α(h′ − h)                       share of the way to a donor's state
neftune     α/√(L·d)·υ, υ ~ U(−1, 1)        the convention of noisy fine-tuning (L = tokens of the prompt)
isokl       m‖h‖ε̂                           m is solved by the caller so that the mean KL is α nats
==========  ==============================  ==============================================================

Another package adds one through the entry-point group ``dynprobe.scales``; :func:`dynprobe.testing.check_scale` tries
whether it keeps the contract. What draws the noise, guards states without a unit and writes is :mod:`._kinds`; a scale
is bare mathematics on [n, dim] float32 or float64 states.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from torch import Tensor

from dynprobe._plugins import Registry
from dynprobe.errors import UsageError
from dynprobe.probes._site_stats import SiteStats, missing_stats

__all__ = ["NEEDS", "SCALES", "NoiseScale", "ScaleStats", "Update"]

#: The update [n, dim] (or what broadcasts to it), alone or with the states [n] that have no unit.
Update: TypeAlias = "Tensor | tuple[Tensor, Tensor]"

#: What a scale may need beside the state and its noise.
NEEDS: Final = ("calibration", "covariance", "donor", "lengths")
_LAWS: Final = ("gaussian", "uniform", None)
_UNITS: Final = ("alpha_relnorm", "alpha_coordstd", "alpha_mad", "alpha_abs")


@dataclass(frozen=True)
class ScaleStats:
    """What is known about the selected states of one write, for a scale's ``update``.

    Attributes:
        norm: ‖h‖ of each state, ``[n, 1]``.
        scale: Name of the scale, for messages.
        site: Calibration of the site, or None.
        place: Name of the site, such as ``"resid_post.6"``; empty where it is not known.
        shape: Shape of all states, selected or not, ``[batch, pos(, slot), dim]``.
        pick: Takes the selected states out of something of that shape.
        given_donor: States of another prompt, of that shape, or None.
        given_lengths: Real tokens of each row's prompt as ``[batch, pos(, slot), 1]``, or None.
    """

    norm: Tensor
    scale: str
    site: SiteStats | None
    place: str
    shape: Sequence[int]
    pick: Callable[[Tensor], Tensor]
    given_donor: Tensor | None = None
    given_lengths: Tensor | None = None

    def _calibrated(self) -> SiteStats:
        if self.site is None:
            raise missing_stats(self.scale, self.place)
        return self.site

    def deviations(self) -> Tensor:
        """Return the SDs of the coordinates over the calibration tokens, ``[dim]``; with slots ``[n, dim]``.

        Raises:
            CalibrationError: There is no calibration, or it is another model's.
        """
        s = self._calibrated().deviations(self.norm.expand(-1, self.shape[-1]), self.scale)
        return s if s.ndim == 1 else self.pick(s.expand(tuple(self.shape)))

    def half_covariance(self) -> tuple[Tensor, ...]:
        """Return the factors whose product with ε ``[n, dim]``, from the left to the right, is Σ^{1/2}ε.

        Raises:
            CalibrationError: There is no covariance, or it is another model's.
        """
        return self._calibrated().half_covariance(self.norm.expand(-1, self.shape[-1]))

    def donor(self) -> Tensor:
        """Return the states of the next prompt at the same positions, ``[n, dim]``.

        Raises:
            UsageError: There are none.
        """
        given = self.given_donor
        if given is None or tuple(given.shape) != tuple(self.shape):
            shape = "none" if given is None else tuple(given.shape)
            raise UsageError(f"scale={self.scale} needs donor states of shape {tuple(self.shape)}, found {shape}.")
        return self.pick(given).to(self.norm)

    def lengths(self) -> Tensor:
        """Return the number of real tokens of each state's prompt, ``[n, 1]``.

        Raises:
            UsageError: They are not known.
        """
        if self.given_lengths is None:
            raise UsageError(f"scale={self.scale} needs lengths, the number of real tokens of each row's prompt.")
        return self.pick(self.given_lengths)


@dataclass(frozen=True)
class NoiseScale:
    """What α multiplies.

    ``update(h, eps, alpha, stats)`` is the whole of it: states ``h`` [n, dim], noise ``eps`` [n, dim] (or one direction
    [1, dim]; None where the scale draws none), strengths ``alpha`` [n, 1] or [1, 1], and what else is known
    (:class:`ScaleStats`). It returns u, float of the dtype of h, with u = 0 exactly at α = 0; beside it, where the unit
    itself can vanish, which states have none. u is linear in α, u(cα) = c·u(α): what solves for a strength or matches
    energies relies on it. A state's answer depends on that state, its own noise and the calibration alone.

    Args:
        name: What ``scale=`` calls it.
        meaning: What α is, in words; a line of the printed run.
        unit: The unit of α in a few words; the label of an axis.
        update: The formula.
        needs: Of :data:`NEEDS`, what it asks of ``stats`` beside the norm.
        law: What it draws: ``"gaussian"``, ``"uniform"`` (in [0, 1)), or None.
        passport: Column of the α passport in which its realised size is proportional to α, or None.
        per_alpha: Mean of that column at α = 1, in law.
        equivariances: ``"R"``: u(Qh) = Q·u(h) in law for rotations Q; ``"S"``: u(ch) = c·u(h) for c > 0. Where it needs
            a calibration or a donor, that is transformed too.
        own_write: What it writes, in words, where it defines that itself and so takes no other kind than ``gaussian``;
            needed where ``law`` is not ``"gaussian"``, because a direction cannot stand for what it draws.
        wave: Whether each state has one unit, which a ``sine`` can swing in.
        solved: Whether α is a target and the strength is solved for.
        at_embedding: Whether its usual place is the embedding.

    Example:
        >>> SCALES["relnorm"].meaning
        "α is the size of the write as a share of each state's norm (‖u‖/‖h‖ = α)"
    """

    name: str
    meaning: str
    unit: str
    update: Callable[[Tensor, Any, Tensor, ScaleStats], Update]
    needs: frozenset[str] = frozenset()
    law: str | None = "gaussian"
    passport: str | None = None
    per_alpha: float = 1.0
    equivariances: frozenset[str] = frozenset()
    own_write: str = ""
    wave: bool = False
    solved: bool = False
    at_embedding: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"the name of a scale is small letters, digits and underscores, not {self.name!r}")
        for what, found, known in (
            ("needs", self.needs, NEEDS), ("law", {self.law}, _LAWS), ("passport", {self.passport}, (*_UNITS, None)),
            ("equivariances", self.equivariances, ("R", "S")),
        ):  # fmt: skip
            wrong = sorted(map(str, set(found) - set(known)))
            if wrong:
                raise ValueError(f"{what} of the scale {self.name} knows {', '.join(map(str, known))}, not {wrong[0]}")
        if self.law != "gaussian" and not self.own_write:
            raise ValueError(
                f"the scale {self.name} with law={self.law!r} cannot write a direction; say in own_write what it writes"
            )

    @property
    def needs_clean(self) -> bool:
        """Whether it can be written only where clean states of the same batch are at hand."""
        return self.solved or "donor" in self.needs

    @property
    def calibrated(self) -> bool:
        """Whether its unit comes from a calibration of the residual stream."""
        return bool(self.needs & {"calibration", "covariance"})

    def written(self, h: Tensor, eps: Tensor | None, alpha: Tensor, stats: ScaleStats) -> tuple[Tensor, Tensor | None]:
        """Return the update and which states have no unit, or refuse what is neither.

        Raises:
            UsageError: The formula gave something that cannot be added to the states.
        """
        made = self.update(h, eps, alpha, stats)
        u, dead = made if isinstance(made, tuple) else (made, None)
        if not isinstance(u, Tensor) or not u.is_floating_point() or not _fits(u, h):
            found = f"{u.dtype} {tuple(u.shape)}" if isinstance(u, Tensor) else type(u).__name__
            raise UsageError(f"scale={self.name} gave {found} for states of shape {tuple(h.shape)}; it is broken.")
        return u, dead


def _fits(u: Tensor, h: Tensor) -> bool:
    return u.ndim == h.ndim and all(a in (1, b) for a, b in zip(u.shape, h.shape, strict=True)) and u.dtype == h.dtype


def _plugin(name: str, found: Any) -> NoiseScale:
    if not isinstance(found, NoiseScale):
        raise TypeError(f"it is a {type(found).__name__}, not a dynprobe.probes.NoiseScale")
    if found.name != name:
        raise ValueError(f"it calls itself {found.name!r} and its entry point calls it {name!r}")
    if found.solved:
        raise ValueError("a strength that is solved for belongs to dynprobe's own isokl")
    return found


SCALES: Registry[NoiseScale] = Registry(
    "dynprobe.scales", "noise scale",
    {
        "relnorm": "dynprobe.probes.scales._relnorm:SCALE",
        "coordstd": "dynprobe.probes.scales._coordstd:SCALE",
        "mad": "dynprobe.probes.scales._mad:SCALE",
        "cov": "dynprobe.probes.scales._cov:SCALE",
        "abs": "dynprobe.probes.scales._abs:SCALE",
        "interp": "dynprobe.probes.scales._interp:SCALE",
        "neftune": "dynprobe.probes.scales._neftune:SCALE",
        "isokl": "dynprobe.probes.scales._isokl:SCALE",
    },
    _plugin,
)  # fmt: skip
