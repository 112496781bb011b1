"""The catalogue entries of the lock-in: gain, phase, total gain and signal-to-noise ratio."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_pair
from dynprobe.metrics._lockin import BINS, lockin
from dynprobe.metrics._registry import MetricSpec, register, register_column
from dynprobe.metrics._result import Bools, Result

__all__: list[str] = []


def _compute(
    inputs: tuple[Any, ...],
    mask: Any,
    params: dict[str, Any],
    metric_id: str,
    period: float | None = None,
    drive: Any = None,
    inject: int | None = None,
) -> Result:
    """Lock-in of one pair; the drive is what was written, or the difference at the depth ``inject``."""
    a, b = as_pair(inputs, mask, metric_id)
    if period is None or (drive is None) == (inject is None):
        raise MetricError(f"{metric_id} needs period, and drive[unit, dim] or inject, the depth that was written.")
    if inject is not None:
        if not 0 <= inject < len(a.states):
            raise MetricError(f"inject={inject} is not one of the depths 0 … {len(a.states) - 1}.")
        reference = b.states[inject] - a.states[inject]
    else:
        reference = torch.as_tensor(np.asarray(drive, dtype=np.float64))[None]
        if not a.states or reference.shape != a.states[0].shape:
            raise MetricError(f"{metric_id}: the drive {list(reference.shape[1:])} is no [unit, dim] of the states.")
    keep: Bools = np.logical_and.reduce(a.keep, axis=0)
    driven = (reference != 0).any(-1).numpy() & keep
    driven = driven if driven.any() else keep  # no drive at all: a window of 0/0
    inside = keep & (np.cumsum(driven, 1) > 0) & (np.cumsum(driven[:, ::-1], 1)[:, ::-1] > 0)
    holes = inside.any() and not keep[0, inside[0].argmax() : len(inside[0]) - inside[0, ::-1].argmax()].all()
    if holes:
        raise MetricError(f"{metric_id}: masked units lie between driven ones; a window has no holes.")
    found = lockin(
        a.states, b.states, reference, inside, period=float(period), bins=params.get("bins", BINS),
        settle=params["settle"],
    )  # fmt: skip
    column = metric_id.split("/")[0].replace(".", "_")
    profile, why = found.profile[column][:, 0], found.reason[column][:, 0]
    extras: dict[str, Any] = {"n_periods": int(found.n_periods[0])}
    if column == "lockin_snr":
        extras |= {"p": found.profile["lockin_p"][:, 0], "snr_total": found.profile["lockin_snr_total"][:, 0]}
    value, reason = (float(profile[-1]), why[-1]) if len(profile) else (float("nan"), "empty")
    seen = ~np.isnan(profile)
    coverage = float(seen.mean()) if len(profile) else float("nan")
    return Result(
        value, reason, coverage, int(found.n_tokens[0]), int(seen.sum()), metric_id, dtype=b.dtype, profile=profile,
        extras=extras,
    )  # fmt: skip


_FORMULA = (
    "δ = x' − x; window: from the first driven unit (after settle), the longest N of whole cycles up to the last, "
    "K ≥ 2 periods; C = (2/N) Σ_j δ_j e^{−2πiKj/N}, C_u the same of the drive u; ê = C_u/‖C_u‖; H = ⟨ê, C⟩/‖C_u‖; "
)
_LATEX = (
    r"C = \frac{2}{N}\sum_j\delta_j\,e^{-2\pi i Kj/N}, \quad \delta = x'-x, \qquad "
    r"\hat e = \frac{C_u}{\lVert C_u\rVert}"
)
_ROTATE = frozenset({"R", "S"})


def _define(
    name: str, sentence: str, formula: str, latex: str, value_range: str, unit: str, vectors: tuple[str, ...],
    more: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    register(
        MetricSpec(
            id=f"lockin.{name}/1",
            sentence=sentence,
            formula=_FORMULA + formula,
            latex=rf"\begin{{aligned}} &{_LATEX} \\ &{latex} \end{{aligned}}",
            input="trajectory[depth,unit,dim]×2, clean first, units in order of time",
            value_range=value_range,
            unit=unit,
            invariances=_ROTATE,
            source="dynprobe",
            params={"settle": 0} | (more or {}),
            column=f"lockin_{name}",
            levels={"profile": "over the window"},
            vectors=vectors,
            groups=frozenset({"paired", "response"}),
        ),
        _compute,
        arity=2,
    )


_define(
    "gain",
    "Size of the response along a periodic drive at the drive's frequency, per unit of drive.",
    "profile |H|; value at the last depth; C_u = 0 → NaN",
    r"|H| = \frac{|\langle\hat e,\,C\rangle|}{\lVert C_u\rVert}",
    "[0, ∞)",
    "1",
    ("δ = A u, A linear → |v̂ᵀAv̂|", "α = 0 → NaN zero-denominator", "δ = 0 → 0"),
)
_define(
    "phase",
    "Phase of the response along a periodic drive against the drive; negative is later.",
    "profile arg H in (−π, π]; value at the last depth; H = 0 → NaN",
    r"\arg H = \arg\frac{\langle\hat e,\,C\rangle}{\lVert C_u\rVert}\in(-\pi,\,\pi]",
    "(−π, π]",
    "rad",
    ("delay of m units, settled → −2πm/period", "δ = −u → π", "α = 0 → NaN zero-denominator"),
)
_define(
    "total",
    "Size of the response over all directions at the drive's frequency, per unit of drive.",
    "profile ‖C‖/‖C_u‖; value at the last depth; C_u = 0 → NaN",
    r"\frac{\lVert C\rVert}{\lVert C_u\rVert}",
    "[0, ∞)",
    "1",
    ("δ = A u, A linear → ‖Av̂‖", "α = 0 → NaN zero-denominator"),
)
_define(
    "snr",
    "Power of the response along a periodic drive against the power in neighbouring frequency bins.",
    "C_b at the nearest `bins` bins b in 1 … ⌈N/2⌉ − 1, not multiples of K; profile |⟨ê, C⟩|²/mean_b |⟨ê, C_b⟩|²; "
    "value at the last depth; p = (1 + snr/m)^{−m} for m bins, exact for white Gaussian noise (F(2, 2m))",
    r"\mathrm{snr} = \frac{|\langle\hat e,\,C\rangle|^2}{\operatorname{mean}_b|\langle\hat e,\,C_b\rangle|^2}, \qquad "
    r"p = \Bigl(1+\frac{\mathrm{snr}}{m}\Bigr)^{-m} \text{ for } m \text{ bins}",
    "[0, ∞)",
    "power ratio",
    ("white noise alone: p uniform on [0, 1]", "noise exactly 0 → NaN zero-denominator, p = 0"),
    {"bins": BINS},
)
register_column("lockin_p", "lockin.snr/1", "probability", {"profile": "p-value of the SNR against flat noise"})
register_column("lockin_snr_total", "lockin.snr/1", "power ratio", {"profile": "SNR over all directions together"})
register_column("lockin_n", "lockin.gain/1", "tokens", {"sample": "tokens in the window"})
