"""Named noise scales: what α multiplies, and the size of a write in every one of them at once.

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

relnorm, cov and interp are equivariant under rotations and positive scalings of the states, coordstd and mad under
scalings, abs under rotations, neftune under neither (in law; the calibration is transformed too).

The functions here are bare mathematics on [n, dim] float32 or float64 states without masks; ``_kinds`` chooses, guards
and writes. Each returns the update and, where the unit itself can vanish (a zero state has no relative norm), which
states have no unit.

Sources: NEFTune, arXiv 2310.05914; type-7 quantiles, Hyndman and Fan 1996.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.errors import CalibrationError

__all__ = ["SiteStats", "mad"]

Float64: TypeAlias = NDArray[np.float64]

GAUSS_MAD: Final = (
    1.4826  # the SD of a normal law in units of its median absolute deviation, as written in the specification
)


@dataclass(eq=False)
class SiteStats:
    """What a calibration knows about the states of one site.

    Args:
        mean: Mean of each coordinate, [dim].
        std: SD of each coordinate (ddof 1), [dim] or [slot, dim].
        cov_basis: Principal axes U as columns, [dim, rank].
        cov_sqrt: √λ of the same axes, [rank].
        site: Name of the site, for messages.

    Raises:
        CalibrationError: An entry is not finite, an SD is negative, or shapes do not fit.
    """

    mean: Any = None
    std: Any = None
    cov_basis: Any = None
    cov_sqrt: Any = None
    site: str = ""
    _placed: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("mean", "std", "cov_basis", "cov_sqrt"):
            value = getattr(self, name)
            if value is None:
                continue
            value = torch.as_tensor(value)
            setattr(self, name, value)
            if not bool(torch.isfinite(value).all()) or (name in ("std", "cov_sqrt") and bool((value < 0).any())):
                raise CalibrationError(f"{name} {self._of()}holds impossible numbers; run `dynprobe calibrate` again.")
        pair = (self.cov_basis, self.cov_sqrt)
        if (pair[0] is None) != (pair[1] is None) or (pair[0] is not None and pair[0].shape[1:] != pair[1].shape):
            raise CalibrationError(f"cov_basis [dim, rank] and cov_sqrt [rank] {self._of()}do not fit each other.")

    def deviations(self, like: Tensor, scale: str = "coordstd") -> Tensor:
        """Return s on the device and in the dtype of ``like``.

        Raises:
            CalibrationError: The calibration has no SDs, or of another width.
        """
        self._need(self.std, scale, like)
        return self._place("std", like, lambda: self.std)

    def weights(self, like: Tensor) -> Tensor:
        """Return w with ‖w⊙u‖ = RMS_i(u_i/s_i) over the coordinates with s_i > 0 (a constant one has no unit)."""
        self._need(self.std, "coordstd", like)

        def make() -> Tensor:
            s = self.std.double()
            live = (s > 0).double().sum(-1, keepdim=True)
            return torch.where(live > 0, torch.where(s > 0, 1 / s, 0.0) / live.sqrt(), torch.nan)

        return self._place("weights", like, make)

    def half_covariance(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return the factors whose product with ε [n, dim] from the left to the right is (Σ^{1/2}ε) [n, dim].

        Σ^{1/2} = U diag(√λ) Uᵀ is symmetric. A low rank keeps its two thin factors, a high one is multiplied out once.
        """
        self._need(self.cov_basis, "cov", like)
        basis, root = self.cov_basis, self.cov_sqrt
        if 2 * basis.shape[1] <= basis.shape[0]:
            thin = self._place("cov_basis", like, lambda: basis)
            return thin, self._place("cov_rows", like, lambda: (basis.double() * root.double()).T)
        return (self._place("cov_half", like, lambda: (basis.double() * root.double()) @ basis.double().T),)

    def _need(self, value: Tensor | None, scale: str, like: Tensor) -> None:
        if value is None:
            raise missing_stats(scale, self.site)
        width = value.shape[0] if scale == "cov" else value.shape[-1]
        if width != like.shape[-1]:
            found = f"the calibration {self._of()}has {width} coordinates, the states {like.shape[-1]}"
            raise CalibrationError(f"{found}: it was made on another model; run `dynprobe calibrate`.")

    def _place(self, name: str, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        key = (name, like.device, like.dtype)
        if key not in self._placed:
            self._placed[key] = make().to(like.device, like.dtype).contiguous()
        return self._placed[key]

    def _of(self) -> str:
        return f"of {self.site} " if self.site else ""


def missing_stats(scale: str, site: str = "") -> CalibrationError:
    """Build the error of a scale whose unit comes from a calibration that is not there."""
    where = f" at {site}" if site else ""
    what = "principal axes" if scale == "cov" else "coordinate SDs"
    return CalibrationError(
        f"scale={scale} needs the {what}{where}, and there are none: run `dynprobe calibrate MODEL`, "
        "or in Python pass calibration=dp.calibrate(subject)."
    )


def relnorm(h: Tensor, eps: Tensor, alpha: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Return u = α‖h‖ε̂ and which states have norm zero.

    Args:
        h: States [n, dim].
        eps: Noise [n, dim] or one direction [1, dim].
        alpha: Strengths [n, 1].
        norm: ‖h‖, [n, 1].
    """
    unit = norm / torch.linalg.vector_norm(eps, dim=-1, keepdim=True)
    return eps * (alpha * unit), norm[:, 0] == 0


def coordstd(eps: Tensor, alpha: Tensor, s: Tensor) -> Tensor:
    """Return u = α·s⊙ε with the coordinate SDs s [dim] or [n, dim]."""
    return alpha * (s * eps)


def mad_scaled(h: Tensor, eps: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return u = α·1.4826·MAD(h)·ε and which states have MAD zero (half their coordinates equal)."""
    spread = mad(h)[:, None]
    return eps * (alpha * (GAUSS_MAD * spread)), spread[:, 0] == 0


def cov(eps: Tensor, alpha: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """Return u = α·Σ^{1/2}ε, Σ^{1/2} given by ``SiteStats.half_covariance``."""
    for factor in factors:
        eps = eps @ factor
    return alpha * eps


def interp(h: Tensor, donor: Tensor, alpha: Tensor) -> Tensor:
    """Return u = α(h′ − h), linear towards the donor's states h′ [n, dim]."""
    return alpha * (donor - h)


def neftune(uniforms: Tensor, alpha: Tensor, lengths: Tensor) -> Tensor:
    """Return u = α/√(L·d)·(2υ − 1) for υ in [0, 1) and L = real tokens of the prompt of each state's row, [n, 1]."""
    return (alpha / torch.sqrt(lengths * uniforms.shape[-1])) * (2 * uniforms - 1)


def mad(h: Tensor) -> Tensor:
    """Return median(|h_i − median(h)|) over the last axis, medians of type 7 (mean of the two middles).

    Args:
        h: States [..., dim], float32 or float64, finite.

    Returns:
        MAD [...], without the factor 1.4826.

    Example:
        >>> mad(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])), mad(torch.tensor([0.0, 1.0, 3.0, 7.0]))
        (tensor(1.), tensor(1.5000))
    """
    return _median((h - _median(h)[..., None]).abs())


def _median(x: Tensor) -> Tensor:
    # torch.median takes the lower middle, torch.quantile and torch.sort are some twenty times slower than NumPy's sort.
    if x.device.type == "cpu" and not x.requires_grad:
        ordered = torch.from_numpy(np.sort(x.numpy(), axis=-1))
    else:
        ordered = x.sort(dim=-1).values
    upper = x.shape[-1] // 2
    if x.shape[-1] % 2:
        return ordered[..., upper]
    return (ordered[..., upper - 1] + ordered[..., upper]) / 2
