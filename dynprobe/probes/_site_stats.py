"""What a calibration knows about the states of one site: the units of the scales that are not in the state itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynprobe.errors import CalibrationError

__all__ = ["SiteStats", "missing_stats"]


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
