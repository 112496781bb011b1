"""What a model does when left alone: the yardstick of scales, debts and detectors.

A calibration is made from clean forwards over prompts that no run uses. It holds, per depth, mean, standard deviation
and MAD of every coordinate, the top principal components, the κ profile; and quantiles of every streaming signal.
Position 0 is left out, as in every metric. It is stored as safetensors beside a JSON header under a hash of the
weights, the dtype, the prompts and the sites, and refused for any other model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import eigsh
from torch import Tensor

from dynprobe.errors import CalibrationError
from dynprobe.probes._site_stats import SiteStats

__all__ = ["CALIBRATION_SCHEMA", "QUANTILE_LEVELS", "Calibration", "load_calibration"]

CALIBRATION_SCHEMA = "1.2"
_TENSORS, _HEADER = "calibration.safetensors", "calibration.json"
_RANK = 1e-12  # eigenvalues below this share of the largest are rounding
QUANTILE_LEVELS = np.round(np.linspace(0.0, 1.0, 201), 3)


@dataclass(eq=False)
class Calibration:
    """Clean statistics of one model.

    Attributes:
        tensors: ``mean``, ``std``, ``mad`` ``[L+1, dim]`` (of coordinates over tokens, position 0 left out; SD with
            ddof 1, MAD without the factor 1.4826); ``pcs [L+1, k, dim]`` with ``pc_var [L+1, k]``; ``kappa_mu``,
            ``kappa_sigma`` ``[L+1]`` (mean and SD over prompts of each step's κ; row d is the step into depth d) and
            ``kappa_token_mu``, ``kappa_token_sigma`` (the same over tokens); ``norm_step_mu``, ``norm_step_sigma``
            (of |ln ‖x_d‖ − ln ‖x_{d−1}‖| over tokens), ``norm_q99`` (of ‖x_d‖); ``str_sigma []`` (median distance among
            four consecutive states of one text at depth L, all such windows together); ``cov_basis.D [dim, r]`` and
            ``cov_sqrt.D [r]`` for depths D whose covariance was asked for.
        signals: Per streaming signal its quantiles at :data:`QUANTILE_LEVELS`.
        header: ``hash``, ``weights``, ``dtype``, ``prompts`` (hash), ``n_prompts``, ``n_tokens``, ``n_layers``,
            ``dim``, ``cov_depths``, ``schema``, versions.
    """

    tensors: dict[str, Tensor]
    signals: dict[str, np.ndarray]
    header: dict[str, Any]

    @property
    def hash(self) -> str:
        """Identity of this calibration: 12 hex digits."""
        return str(self.header["hash"])

    def quantile(self, signal: str, q: float) -> float:
        """Return the q-quantile of a clean streaming signal.

        Raises:
            CalibrationError: If the signal was not calibrated.
        """
        if signal not in self.signals:
            held = ", ".join(sorted(self.signals))
            raise CalibrationError(f"signal {signal!r} is not in the calibration; it holds {held}")
        return float(np.interp(q, QUANTILE_LEVELS, self.signals[signal]))

    def site_stats(self, component: str, layer: int) -> SiteStats | None:
        """Return the coordinate statistics of a site, or None for an update (attention or MLP output).

        Calibrations are made along the residual stream only.
        """
        depth = {"resid_pre": layer, "resid_post": layer + 1}.get(component)
        if depth is None:
            return None
        return SiteStats(
            mean=self.tensors["mean"][depth],
            std=self.tensors["std"][depth],
            cov_basis=self.tensors.get(f"cov_basis.{depth}"),
            cov_sqrt=self.tensors.get(f"cov_sqrt.{depth}"),
            site=f"{component}.{layer}",
        )

    def check(self, weights: str, dtype: str, name: str = "the model") -> None:
        """Refuse a calibration of another model.

        Args:
            weights: Hash of the model's weights.
            dtype: Its dtype.
            name: What to call it in the message.

        Raises:
            CalibrationError: If weights or dtype differ.
        """
        for key, found in (("weights", weights), ("dtype", dtype)):
            if self.header.get(key) != found:
                made = f"of {self.header['model']} " if self.header.get("model") else ""
                raise CalibrationError(
                    f"this calibration {made}was made with {key} {self.header.get(key)!r}, {name} has {found!r}; "
                    "make one with: dynprobe calibrate MODEL"
                )

    def save(self, folder: Path) -> Path:
        """Write ``calibration.safetensors`` and ``calibration.json`` into ``folder``, whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".calibration-", dir=folder.parent))
        try:
            save_file({k: v.contiguous() for k, v in self.tensors.items()}, temporary / _TENSORS)
            signals = {k: v.tolist() for k, v in self.signals.items()}
            text = json.dumps({**self.header, "signals": signals, "sha256": _digest(temporary / _TENSORS)}, indent=1)
            (temporary / _HEADER).write_text(text, encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            temporary.replace(folder)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
        return folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_calibration(folder: Path) -> Calibration:
    """Read a calibration.

    Raises:
        CalibrationError: If a file is missing or damaged, or the schema is newer than this version reads.
    """
    try:
        header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
        schema, stored = str(header.get("schema")), header.pop("sha256", None)
        # Copies: the file is mapped into memory, and cutting it short in place would end the process without a word.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / _TENSORS).items()}
        signals = {k: np.asarray(v, dtype=np.float64) for k, v in header.pop("signals").items()}
        for name, levels in signals.items():
            if levels.shape != np.shape(QUANTILE_LEVELS) or not (np.diff(levels) >= -1e-9 * np.abs(levels[1:])).all():
                raise ValueError(f"the quantiles of {name} are {len(QUANTILE_LEVELS)} numbers in ascending order")
        intact = stored == _digest(folder / _TENSORS) and "hash" in header
    except Exception as error:
        raise CalibrationError(
            f"{folder} does not hold a readable calibration ({type(error).__name__}: {error}); make it again with: "
            "dynprobe calibrate MODEL"
        ) from error
    if schema.split(".")[0] != CALIBRATION_SCHEMA.split(".", maxsplit=1)[0]:
        raise CalibrationError(f"{folder} has calibration schema {schema}; this version reads {CALIBRATION_SCHEMA}")
    if not intact:
        raise CalibrationError(
            f"{folder}/{_TENSORS} is not the file its header was written with; make it again with: "
            "dynprobe calibrate MODEL"
        )
    return Calibration(tensors, signals, header)


def principal_components(centred: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the top ``k`` eigenvectors ``[k, dim]`` and eigenvalues of the covariance of centred rows ``[n, dim]``.

    At most ``min(n − 1, dim)`` exist. Directions in which the rows do not vary (repeated rows) come back as zeros with
    eigenvalue 0 where they are not determined.
    """
    n, dim = centred.shape
    k = min(k, n - 1, dim)
    if k <= 0:
        return centred.new_zeros(0, dim), centred.new_zeros(0)
    x = centred.double().cpu()
    values, vectors = _largest((x.T @ x if dim <= n else x @ x.T) / (n - 1), k)
    if dim > n:
        vectors = x.T @ vectors / ((n - 1) * values).sqrt().clamp_min(1e-300)
        seen = values > _RANK * values[0]
        values, vectors = torch.where(seen, values, 0.0), torch.where(seen, vectors, 0.0)
    # An eigenvector's sign is arbitrary; fix it so that the file is the same everywhere.
    signs = torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
    return (vectors * signs).T.to(centred.dtype), values.to(centred.dtype)


def _largest(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest eigenvalues of a symmetric matrix in descending order, and their eigenvectors as columns."""
    if 8 * k > len(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values[-k:], vectors[:, -k:]
    else:  # a few of many: Lanczos, always begun at the same vector so that the result is too
        start = np.random.default_rng(0).standard_normal(len(matrix))
        values, vectors = (torch.from_numpy(part.copy()) for part in eigsh(matrix.numpy(), k=k, which="LA", v0=start))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def covariance_root(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``U [dim, r]`` and ``√λ [r]`` with ``Σ = U diag(λ) Uᵀ`` (ddof 1), r = the rank that was observed."""
    rows, values = principal_components(centred, min(len(centred) - 1, centred.shape[1]))
    keep = values > _RANK * values.max() if len(values) else values > 0
    return rows[keep].T.contiguous(), values[keep].sqrt()


def quantiles(samples: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Quantiles (type 7) of each signal over all tokens, non-finite values left out."""
    out: dict[str, np.ndarray] = {}
    for name, pieces in samples.items():
        values = np.concatenate([np.asarray(p, dtype=np.float64).ravel() for p in pieces])
        values = values[np.isfinite(values)]
        if len(values):
            out[name] = np.quantile(values, QUANTILE_LEVELS)
    return out
