"""Is a noise scale one? What sweeps, thresholds and the α passport rely on, tried on random states."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dynprobe.probes import NoiseScale, Perturb, ScaleStats, identical
from dynprobe.probes._kinds import Displacement, apply, displacement
from dynprobe.probes._noise import NoiseSource
from dynprobe.probes._passport import passport
from dynprobe.probes._scales import SCALES
from dynprobe.probes._site_stats import SiteStats
from dynprobe.testing._suite import Suite

__all__ = ["SCALE_CHECKS", "check_scale"]

#: What is tried, in this order.
SCALE_CHECKS = ("identity", "linear", "repeatable", "alone", "untouched", "guarded", "sized", "equivariant")

_ROWS, _LENGTH, _DIM, _SITE = 4, 24, 48, "resid_post.3"


def check_scale(scale: NoiseScale | str, *, only: str | None = None) -> tuple[str, ...]:
    """Try whether a noise scale keeps the contract.

    ``identity`` at α = 0 every state comes back bit for bit, in every dtype; ``linear`` u(cα) = c·u(α), and a direction
    turned round gives −u, unless the scale defines its own write; ``repeatable`` the write depends on (seed, row, site,
    position) and on nothing else; ``alone`` a row, and a position, is written as it is by itself; ``untouched`` states
    and calibration are left as they are; ``guarded`` broken states and states that have no unit are left alone, and the
    others are written as without them; ``sized`` the declared column of the α passport is ``per_alpha``·α in the mean;
    ``equivariant`` the declared equivariances hold, and no other does.

    Args:
        scale: The scale, or the name of one that is installed.
        only: One check, by name.

    Returns:
        The checks that were made; ``sized`` is left out where no column is declared.

    Raises:
        SelfTestError: If one fails; the message says which and why.

    Example:
        >>> check_scale("relnorm")
        ('identity', 'linear', 'repeatable', 'alone', 'untouched', 'guarded', 'sized', 'equivariant')
    """
    found = scale if isinstance(scale, NoiseScale) else SCALES[scale]
    with SCALES.lent(found.name, found), torch.no_grad():
        return _Suite(found).run(only)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


class _Suite(Suite):
    kind, checks = "noise scales", SCALE_CHECKS

    def __init__(self, scale: NoiseScale) -> None:
        self.scale, self.name = scale, scale.name
        self.h = _normal(_ROWS, _LENGTH, _DIM) * torch.exp(_normal(_ROWS, _LENGTH, 1, seed=1)) + 0.2
        self.donor = _normal(_ROWS, _LENGTH, _DIM, seed=2)
        basis = torch.linalg.qr(_normal(_DIM, _DIM, seed=3))[0]
        self.stats = SiteStats(
            mean=_normal(_DIM, seed=4), std=torch.exp(_normal(_DIM, seed=5)), cov_basis=basis,
            cov_sqrt=torch.exp(0.3 * _normal(_DIM, seed=6)), site=_SITE,
        )  # fmt: skip
        self.everywhere = torch.ones(_ROWS, _LENGTH, dtype=torch.bool)

    def write(
        self, h: Tensor, alpha: float, *, rows: slice = slice(None), columns: slice = slice(None),
        mask: Tensor | None = None, seed: int = 0, site: str = _SITE, key: str = "row",
    ) -> Displacement:  # fmt: skip
        positions = np.arange(_LENGTH)[None].repeat(_ROWS, 0)[rows, columns]
        names = [f"{key}-{number}" for number in range(_ROWS)][rows]
        strengths = torch.full((len(h),), alpha, dtype=torch.float64)
        return displacement(
            Perturb(alpha=0.0 if alpha == 0 else abs(alpha), scale=self.name, seed=seed), h,
            mask=self.everywhere[rows, columns] if mask is None else mask,
            noise_source=NoiseSource(names, site, positions), site_stats=self.stats,
            donor=self.donor[rows, columns].to(h), lengths=torch.tensor([5, 9, 12, 24])[rows], magnitude=strengths,
        )  # fmt: skip

    # The checks

    def identity(self) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            h = self.h.to(dtype, copy=True)
            h[0, 0, :4] = torch.tensor([-0.0, torch.inf, torch.nan, 0.0], dtype=dtype)
            h[1, 1] = -0.0
            for alpha in (0.0, -0.0):
                after = apply(h, self.write(h, alpha).u, self.everywhere)
                if not identical(after, h):
                    self.fail("identity", f"α = 0 changes states in {str(dtype).removeprefix('torch.')}")

    def linear(self) -> None:
        one = self.write(self.h, 0.25).u
        for factor in (-1.0, 2.0, 1e-3, 40.0):
            other = self.write(self.h, 0.25 * factor).u
            if not torch.allclose(other, factor * one, rtol=1e-9, atol=1e-12 * abs(factor)):
                self.fail("linear", f"the write at {factor:g}·α is not {factor:g} times the write at α")
        if not bool((one != 0).any()):
            self.fail("linear", "nothing is written at α = 0.25")
        if self.scale.own_write:
            return
        v = _normal(1, _DIM, seed=9)
        there, back = (self.formula(self.h[0], sign * v, self.stats, self.donor[0]) for sign in (1, -1))
        if self.scale.law != "gaussian" or not torch.allclose(back, -there, rtol=1e-9, atol=1e-12):
            self.fail(
                "linear", "a direction turned round does not give −u; declare own_write, which no direction goes with"
            )

    def repeatable(self) -> None:
        one = self.write(self.h, 0.3).u
        if not identical(one, self.write(self.h, 0.3).u):
            self.fail("repeatable", "the same address gives two writes")
        for what, other in (
            ("seed", self.write(self.h, 0.3, seed=1)), ("row", self.write(self.h, 0.3, key="other")),
            ("site", self.write(self.h, 0.3, site="resid_post.4")),
        ):  # fmt: skip
            same = identical(one, other.u)
            if same and self.scale.law is not None:
                self.fail("repeatable", f"another {what} gives the same write, although it draws noise")
            if not same and self.scale.law is None:
                self.fail("repeatable", f"another {what} gives another write, although it draws no noise")

    def alone(self) -> None:
        whole = self.write(self.h, 0.3).u
        for row in range(_ROWS):
            at = slice(row, row + 1)
            if not self.close(whole[at], self.write(self.h[at], 0.3, rows=at).u):
                self.fail("alone", f"row {row} is written otherwise by itself than in a batch")
        at = slice(7, 8)
        if not self.close(whole[:, at], self.write(self.h[:, at], 0.3, columns=at).u):
            self.fail("alone", "a position is written otherwise by itself than in a text")
        mask = self.everywhere.clone()
        mask[:, ::3] = False
        some = self.write(self.h, 0.3, mask=mask).u
        if not self.close(some[mask], whole[mask]) or bool((some[~mask] != 0).any()):
            self.fail("alone", "what is written depends on which other states are")

    def close(self, a: Tensor, b: Tensor) -> bool:
        # A product with the covariance may be summed in another order in another batch.
        return torch.allclose(a, b, rtol=1e-10, atol=1e-12 * float(b.abs().max()))

    def untouched(self) -> None:
        h = self.h.clone()
        held = {name: getattr(self.stats, name).clone() for name in ("mean", "std", "cov_basis", "cov_sqrt")}
        donor = self.donor.clone()
        self.write(h, 0.3)
        if not identical(h, self.h) or not identical(donor, self.donor):
            self.fail("untouched", "it changed the states it was given")
        if any(not identical(before, getattr(self.stats, name)) for name, before in held.items()):
            self.fail("untouched", "it changed the calibration")

    def guarded(self) -> None:
        whole = self.write(self.h, 0.3)
        h = self.h.clone()
        h[0, 3, 5], h[1, 4, 0], h[2, 5] = torch.nan, torch.inf, 0.0
        broken = self.write(h, 0.3)
        after = apply(h, broken.u, self.everywhere)
        for row, column in ((0, 3), (1, 4)):
            if not identical(after[row, column], h[row, column]):
                self.fail("guarded", f"a state with {h[row, column].abs().max():g} in it is written")
        if not bool(broken.u.isfinite().all()):
            self.fail("guarded", "the write of a state of zeros, or beside a broken one, is not finite")
        others = torch.ones_like(self.everywhere)
        others[[0, 1, 2], [3, 4, 5]] = False
        if not self.close(broken.u[others], whole.u[others]):
            self.fail("guarded", "a broken state changes what is written elsewhere")
        if whole.flagged:
            self.fail("guarded", "a state that has nothing wrong about it is left alone")

    def sized(self) -> bool:
        column = self.scale.passport
        if column is None:
            return False
        for alpha in (0.01, 0.5):
            u = self.write(self.h, alpha).u
            rows = passport(self.h, u, self.everywhere, self.stats).rows()[column]
            found, wanted = float(np.mean(rows)), self.scale.per_alpha * alpha
            if not abs(found / wanted - 1) < 0.03:
                self.fail("sized", f"{column} is {found:.4g} at α = {alpha:g}; declared {wanted:.4g}")
        return True

    def equivariant(self) -> None:
        scale, n = self.scale, _ROWS * _LENGTH
        h, donor = self.h.reshape(n, _DIM), self.donor.reshape(n, _DIM)
        eps = None if scale.law is None else _noise(scale.law, n)
        turn, factor, s = torch.linalg.qr(_normal(_DIM, _DIM, seed=9))[0], 3.7, self.stats
        turned = _stats(s, mean=s.mean @ turn, basis=turn.T @ s.cov_basis)
        scaled = _stats(s, mean=factor * s.mean, std=factor * s.std, root=factor * s.cov_sqrt)
        base = self.formula(h, eps, s, donor)
        found = {"S": torch.allclose(self.formula(factor * h, eps, scaled, factor * donor), factor * base, rtol=1e-8)}
        if "calibration" not in scale.needs and scale.law != "uniform":  # SDs of coordinates are not turned
            noise = None if eps is None else eps @ turn
            there = self.formula(h @ turn, noise, turned, donor @ turn)
            found["R"] = torch.allclose(there, base @ turn, rtol=1e-7, atol=1e-9)
        elif "R" in scale.equivariances:
            self.fail("equivariant", "it declares R, and SDs of coordinates, or noise that is not normal, do not turn")
        for letter, holds in found.items():
            what = "rotations (R)" if letter == "R" else "positive scalings (S)"
            if letter in scale.equivariances and not holds:
                self.fail("equivariant", f"it declares {what}, and its formula does not follow them")
            if letter not in scale.equivariances and holds:
                self.fail("equivariant", f"its formula follows {what}, which it does not declare")

    def formula(self, h: Tensor, eps: Tensor | None, stats: SiteStats, donor: Tensor) -> Tensor:
        n = len(h)
        known = ScaleStats(
            torch.linalg.vector_norm(h, dim=-1, keepdim=True), self.name, stats, _SITE, (1, n, _DIM),
            lambda x: x.reshape(-1, x.shape[-1]), donor[None], torch.full((1, n, 1), 9.0, dtype=h.dtype),
        )  # fmt: skip
        return self.scale.written(h, eps, torch.full((n, 1), 0.3, dtype=h.dtype), known)[0].expand(h.shape)


def _noise(law: str | None, n: int) -> Tensor:
    rng = np.random.default_rng(8)
    return torch.from_numpy(rng.normal(size=(n, _DIM)) if law == "gaussian" else rng.random(size=(n, _DIM)))


def _stats(
    stats: SiteStats,
    *,
    mean: Tensor,
    std: Tensor | None = None,
    basis: Tensor | None = None,
    root: Tensor | None = None,
) -> SiteStats:
    """The calibration of states that were transformed."""
    return replace(
        stats, mean=mean, std=stats.std if std is None else std, cov_basis=stats.cov_basis if basis is None else basis,
        cov_sqrt=stats.cov_sqrt if root is None else root, _placed={},
    )  # fmt: skip
