"""Arm minus clean, number by number, as far as the two rest on the same terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from dynprobe.metrics import Result

__all__ = ["paired_columns"]


def paired_columns(mine: Mapping[str, Result], theirs: Mapping[str, Result], pair: Result) -> dict[str, Result]:
    """Arm minus clean of every number; κ is paired term by term and split at the injection."""
    out = {
        f"{name}_d": _difference(result, theirs[name])
        for name, result in mine.items()
        if name != "kappa_phase" and isinstance(result.value, float) and isinstance(theirs[name].value, float)
    }
    out["kappa_phase_d"] = pair
    if "delta_inj" in pair.extras:
        inj, down = float(pair.extras["delta_inj"]), float(pair.extras["delta_down"])
        out["kappa_phase_d_inj"] = replace(pair, value=inj, reason=pair.extras.get("delta_inj_reason"))
        out["kappa_phase_d_down"] = replace(pair, value=down, reason="coverage" if math.isnan(down) else None)
    return out


def _difference(mine: Result, theirs: Result) -> Result:
    """Arm minus clean of a scalar whose terms cannot be paired one by one.

    So both must rest on the same terms: where a state of one run is not finite, the difference is missing.
    """
    reason = mine.reason or theirs.reason
    if (mine.coverage, mine.n_units, mine.n_steps) != (theirs.coverage, theirs.n_units, theirs.n_steps):
        return replace(mine, value=math.nan, reason=reason or "coverage")
    return replace(mine, value=float(mine.value) - float(theirs.value), reason=reason)
