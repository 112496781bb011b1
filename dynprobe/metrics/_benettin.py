"""Lyapunov exponents along depth: how fast a small difference grows from map to map.

Benettin's scheme carries a frame of k tangents through the maps and orthonormalises it by QR whenever it is about to
collapse onto its fastest direction; the logarithms of diag R add up to the growth of the i-th volume. In exact
arithmetic the result does not depend on how often that happens. n counts maps, not QR steps. At finite n the exponents
belong to a start frame: only as n → ∞ does a generic frame forget itself.

**Raw and direction-only.** The residual stream grows in length from block to block, so a raw exponent above zero is no
sign of chaos. The direction-only form measures the difference of *directions*: the tangent projected orthogonal to the
state and divided by its length, at both ends of the chain of maps (units, i.e. token positions, one by one). That is
the derivative of the final directions by the initial ones, which a finite difference of unit vectors converges to.

With W = S⁻¹P·V the direction part of a frame V (S lengths, P projection), V₀ → Q_n R_n…R_1 and W = U·R, the direction
form is diag(R′)·diag(R_n…R_1)/diag(R′₀) with W_n = U_n R′ and W_0 = U_0 R′₀: a correction at both ends of the same run.

Token space is discrete: none of this is an exponent of generation.
"""

from __future__ import annotations

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._result import Array

__all__ = ["Benettin", "complement", "finite_difference", "orthonormal", "tangents_of_directions"]

_EPS = float(np.finfo(np.float64).eps)


def orthonormal(frame: Array, eps: float = _EPS) -> tuple[Array, Array]:
    """Orthonormalise tangents by QR.

    Args:
        frame: ``[k, unit, dim]``.
        eps: Rounding unit of the tangents.

    Returns:
        Orthonormal tangents of the same shape, and ln|R_ii| ``[k]`` (−∞ where a tangent lies in the span of those
        before it, up to 16 rounding units of its own length).

    Example:
        >>> q, log_r = orthonormal(np.array([[[2.0, 0.0]], [[1.0, 0.5]]]))
        >>> [round(float(x), 10) for x in np.exp(log_r)]
        [2.0, 0.5]
    """
    flat = frame.reshape(len(frame), -1)
    size = np.linalg.norm(flat, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        q, r = np.linalg.qr(np.where(size[:, None] > 0, flat / size[:, None], 0.0).T)
        part = np.abs(np.diag(r))
        log_r = np.log(np.where(part > 16 * eps, part, 0.0)) + np.log(size)
    return q.T.reshape(frame.shape), log_r


def tangents_of_directions(tangents: Array, states: Array) -> Array:
    """Return the tangents of x/‖x‖: projected orthogonal to each unit's state and divided by its length.

    Args:
        tangents: ``[k, unit, dim]``.
        states: ``[unit, dim]``; a unit without length has no direction and gives NaN where it is moved.
    """
    norm = np.linalg.norm(states, axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = states / norm
        out: Array = (tangents - (tangents * unit).sum(-1, keepdims=True) * unit) / norm
    out[np.broadcast_to((norm == 0) & (tangents == 0).all(-1, keepdims=True), out.shape)] = 0.0
    return out


def complement(state: Array) -> Array:
    """Return d − 1 orthonormal tangents ``[d − 1, 1, d]`` orthogonal to a state ``[d]``."""
    d = len(state)
    q = np.linalg.qr(np.concatenate([state[:, None], np.eye(d)], axis=1))[0]
    return q[:, 1:d].T[:, None, :]


class Benettin:
    """The growth of a frame of tangents, fed map by map or a stretch of maps at a time.

    ``start`` and ``meet`` return the orthonormal frame to carry on; ``placed`` says which frame was really put down,
    where a coarser dtype rounded it, so that rounding of the frame is not taken for growth.

    Args:
        eps: Rounding unit of the tangents: one that lies in the span of those before it up to 16 of them is lost.

    Example:
        >>> growth = Benettin()
        >>> q = growth.start(np.array([[1.0, 0.0]]), np.eye(2)[:, None])
        >>> growth.placed(q)
        >>> for _ in range(3):
        ...     q = growth.meet(np.array([[1.0, 0.0]]), q @ np.diag([2.0, 0.5]), 1)
        >>> growth.exponents("raw").round(10).tolist()
        [0.6931471806, -0.6931471806]
    """

    def __init__(self, eps: float = _EPS) -> None:
        self._eps = eps
        self._states: Array = np.zeros((0, 0))
        self._log: Array = np.zeros(0)
        self._log_start: Array = np.zeros(0)
        self._finite = True
        self.n_maps = 0
        #: After each QR: maps done, ln growth [k] of both forms.
        self.path: list[tuple[int, dict[str, Array]]] = []

    def start(self, states: Array, frame: Array) -> Array:
        """Take the states ``[unit, dim]`` and the start frame ``[k, unit, dim]``; return it orthonormalised."""
        self._states = states
        q, log_r = orthonormal(frame)
        if not np.isfinite(log_r).all():
            raise MetricError(
                f"a start frame of {len(frame)} tangents has only {np.isfinite(log_r).sum()} independent."
            )
        self._log = np.zeros(len(q))
        return q

    def placed(self, frame: Array) -> None:
        """Take note of the frame that was really put down."""
        q, log_r = orthonormal(frame)
        self._log = self._log - log_r
        if not self.path:
            self._log_start = self._directions(q, self._states)

    def meet(self, states: Array, tangents: Array, maps: int) -> Array:
        """Take the tangents ``[k, unit, dim]`` that came out of ``maps`` maps; return the frame to carry on."""
        self._finite &= bool(np.isfinite(tangents).all() and np.isfinite(states).all())
        q, log_r = orthonormal(tangents, self._eps)
        with np.errstate(invalid="ignore"):
            self._log = self._log + log_r
            direction = self._log + self._directions(q, states) - self._log_start
        # A tangent that was radial from the start has no direction, nor has the volume of any later one.
        direction[np.cumsum(~np.isfinite(self._log_start)) > 0] = np.nan
        self.n_maps += maps
        self.path.append((self.n_maps, {"raw": self._log, "direction": direction}))
        return q

    def _directions(self, q: Array, states: Array) -> Array:
        return orthonormal(tangents_of_directions(q, states), self._eps)[1]

    def exponents(self, form: str) -> Array:
        """Return λ_i = ln growth/n, nats per map ``[k]``; −∞ where a map annihilated a tangent."""
        return self.path[-1][1][form] / self.n_maps

    def reasons(self, form: str) -> list[str | None]:
        """Return why each exponent is no number; ``singular``: it was annihilated, or fell onto the faster ones."""
        return [
            None
            if np.isfinite(x)
            else "singular"
            if x == -np.inf
            else "degenerate-frame"
            if self._finite
            else "nonfinite"
            for x in self.exponents(form)
        ]


def finite_difference(start: Array, end: Array, n: int, form: str = "raw") -> Array:
    """Return λ̂(ε) = (1/n)·ln(‖δ_n‖/‖δ_0‖) for every ε, δ = half the difference of the two sides.

    Args:
        start: States at +ε and −ε before the maps, ``[eps, 2, unit, dim]``.
        end: The same after n maps.
        n: Number of maps.
        form: ``"raw"``, or ``"direction"``: δ of the unit vectors x/‖x‖ of each unit.

    Returns:
        ``[eps]``.
    """
    sizes = []
    for x in (start, end):
        if form == "direction":
            with np.errstate(divide="ignore", invalid="ignore"):
                x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        sizes.append(np.linalg.norm((x[:, 0] - x[:, 1]).reshape(len(x), -1), axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        out: Array = (np.log(sizes[1]) - np.log(sizes[0])) / n
    return out
