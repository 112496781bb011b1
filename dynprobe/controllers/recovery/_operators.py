"""The two operators that STR's gate mixes: a contraction S and an expansion L, u ∝ α·ΔH_S + (1 − α)·ΔH_L.

:class:`LoraPair` are the operators of Dynamic Operator Mixing: low-rank maps trained for it, ΔH = H·A·B·s, read from a
file. :class:`TopComponents` is a stand-in for whoever has no such file: ΔH_S = −P(h − μ) and ΔH_L = +P(h − μ), with μ
the calibration mean and P the projection on its top components at the last depth. It pulls states together and pushes
them apart where they vary most, and has nothing learnt in it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dynprobe.errors import CalibrationError, UsageError
from dynprobe.probes import Calibration, Subject

__all__ = ["LoraPair", "Operators", "TopComponents"]

_PARTS = tuple(f"{which}.{name}" for which in ("contraction", "expansion") for name in ("A", "B", "scale"))


class Operators(Protocol):
    """A contraction and an expansion of states."""

    @property
    def id(self) -> str:
        """Id in tables of the controller that mixes them."""

    def bind(self, subject: Subject, calibration: Calibration) -> None:
        """Prepare for a model; refuse one that they do not fit."""

    def __call__(self, state: Tensor, alpha: Tensor, norm: Tensor) -> Tensor:
        """Return the mixture for γ = 1.

        Args:
            state: ``[batch, columns, dim]``, float64.
            alpha: Share of the contraction ``[batch, 1, 1]``.
            norm: Mean norm of the row's states so far ``[batch, 1, 1]``.
        """


class LoraPair:
    """The operators of DOM, from a safetensors file.

    The file holds ``contraction.A [dim, rank]``, ``contraction.B [rank, dim]``, ``contraction.scale []`` and the same
    three of ``expansion``; a state is a row, so ΔH = H·A·B·scale. (Adapters of PEFT hold both factors transposed.)
    The mixture is divided by the mean norm of the states, as published.

    Args:
        path: The file.

    Raises:
        UsageError: If it cannot be read or does not hold two operators.

    Attributes:
        digest: First 12 hex digits of the file's SHA-256.
    """

    id = "recovery.dom/1"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
            tensors = load(data)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"the operators of dom could not be read from {self.path}: {error}") from error
        missing = [name for name in _PARTS if name not in tensors]
        if missing:
            raise UsageError(
                f"{self.path} holds {', '.join(sorted(tensors)) or 'nothing'}; the operators of dom are "
                f"{', '.join(_PARTS)}; {missing[0]} is not there"
            )
        self.digest = hashlib.sha256(data).hexdigest()[:12]
        self._pairs = []
        for which in ("contraction", "expansion"):
            a, b, scale = (tensors[f"{which}.{name}"].double() for name in ("A", "B", "scale"))
            if a.dim() != 2 or b.shape != a.T.shape or scale.numel() != 1:
                raise UsageError(
                    f"{self.path}: {which} has A {list(a.shape)}, B {list(b.shape)}, scale {list(scale.shape)}; A is "
                    "[dim, rank], B [rank, dim] and the scale one number (PEFT stores both factors transposed)"
                )
            if not all(bool(torch.isfinite(part).all()) for part in (a, b, scale)):
                raise UsageError(f"{self.path}: {which} holds values that are not finite")
            self._pairs.append((a, b * scale.reshape(())))
        if len({a.shape[0] for a, _ in self._pairs}) != 1:
            raise UsageError(f"{self.path}: contraction and expansion are of states of different widths")

    def bind(self, subject: Subject, calibration: Calibration) -> None:
        """Check the width.

        Raises:
            UsageError: If the states of the model have another width, or slots.
        """
        dim = self._pairs[0][0].shape[0]
        if subject.n_slots is not None or subject.dim != dim:
            slots = f" in {subject.n_slots} slots" if subject.n_slots is not None else ""
            raise UsageError(
                f"the operators in {self.path} are of states of width {dim}; those of {subject.name} have "
                f"{subject.dim}{slots}"
            )

    def __call__(self, state: Tensor, alpha: Tensor, norm: Tensor) -> Tensor:
        """Return [α·ΔH_S + (1 − α)·ΔH_L] / mean‖H‖; 0 where the norm is 0."""
        contracted, expanded = ((state @ a.to(state.device)) @ b.to(state.device) for a, b in self._pairs)
        mixed = alpha * contracted + (1 - alpha) * expanded
        return torch.where(norm > 0, mixed / torch.where(norm > 0, norm, 1.0), 0.0)


class TopComponents:
    """Contraction and expansion along the calibration's top components at the last depth; not DOM's operators."""

    id = "recovery.str_standin/1"

    def bind(self, subject: Subject, calibration: Calibration) -> None:
        """Take mean and components of the last depth.

        Raises:
            CalibrationError: If the calibration lacks them.
        """
        missing = [name for name in ("mean", "pcs") if name not in calibration.tensors]
        if missing:
            raise CalibrationError(
                f"{self.id} needs {missing[0]!r} and the calibration does not hold it; make it again with: "
                "dynprobe calibrate MODEL --force"
            )
        self._mean = calibration.tensors["mean"][subject.n_layers].double()
        self._pcs = calibration.tensors["pcs"][subject.n_layers].double()

    def __call__(self, state: Tensor, alpha: Tensor, norm: Tensor) -> Tensor:
        """Return α·(−P(h − μ)) + (1 − α)·P(h − μ) = (1 − 2α)·P(h − μ); the norm plays no part."""
        pcs = self._pcs.to(state.device)
        off = (state - self._mean.to(state.device)).flatten(2)
        return (1 - 2 * alpha) * ((off @ pcs.T) @ pcs).reshape(state.shape)
