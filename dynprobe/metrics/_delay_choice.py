"""Lag and Theiler window of a delay embedding, chosen from the series by a written rule.

The lag is the first local minimum of the average mutual information I(k) of x_t and x_{t+k} (Fraser & Swinney 1986),
in bins that hold equally many values. The Theiler window is the first lag at which the autocorrelation is below 1/e:
neighbours in time are neighbours in space for no other reason (Theiler 1986), and only pairs |i − j| ≥ w may count.

Both are choices, not measurements: on a short series each is decided by noise. They are therefore reported beside
every number, with the rule that made them, and surrogates are read with the choice of the data.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from dynprobe.metrics._delay import constant, one_series
from dynprobe.metrics._result import Array

__all__ = ["Choice", "autocorrelation", "choose_lag", "choose_theiler", "mutual_information"]

_MOST_BINS: Final = 16


class Choice(NamedTuple):
    """A whole number and the rule that gave it."""

    value: int
    rule: str


def autocorrelation(x: Any, most: int) -> Array:
    """Return the autocorrelation at lags 0 … most, Σ(x_t − x̄)(x_{t+k} − x̄)/Σ(x_t − x̄)²; NaN for a constant series.

    Example:
        >>> autocorrelation([1.0, -1.0, 1.0, -1.0], 2).tolist()
        [1.0, -0.75, 0.5]
    """
    values = one_series(x)
    most = min(most, len(values) - 1)
    if constant(values) or not np.isfinite(values).all():
        return np.full(max(most, 0) + 1, np.nan)
    centred = (values - values.mean()) / np.abs(values - values.mean()).max()
    products = [centred[: len(centred) - k] @ centred[k:] for k in range(most + 1)]
    return np.array(products) / products[0]


def mutual_information(x: Any, most: int) -> Array:
    """Return the mutual information of x_t and x_{t+k} in nats at lags 0 … most.

    Values are binned by rank into b = ⌊√(n/5)⌋ bins (2 … 16) of equal numbers, equal values into one bin. The estimate
    is the plug-in one: positive for white noise too, by about (b − 1)²/(2n).

    Example:
        >>> mutual_information(np.arange(40.0) % 2, 2).round(2).tolist()
        [0.69, 0.69, 0.69]
    """
    values = one_series(x)
    n = len(values)
    bins = int(np.clip(np.sqrt(n / 5), 2, _MOST_BINS))
    ordered = np.sort(values)
    label = np.searchsorted(ordered, values, side="left") * bins // max(n, 1)
    out = []
    for k in range(min(most, n - 1) + 1):
        joint = np.bincount(label[: n - k] * bins + label[k:], minlength=bins * bins).reshape(bins, bins) / (n - k)
        product = joint.sum(1)[:, None] * joint.sum(0)
        seen = joint > 0
        out.append(float((joint[seen] * np.log(joint[seen] / product[seen])).sum()))
    return np.array(out)


def choose_lag(x: Any, most: int | None = None) -> Choice:
    """Return the first local minimum of the mutual information: I(k) < I(k−1) and I(k) ≤ I(k+1), 1 ≤ k ≤ most.

    Args:
        x: Series [step].
        most: Largest lag; default n/10, at most 50. Without a minimum up to there the lag is 1, and the rule says so.

    Example:
        >>> choose_lag(np.tile([0.0, 1.0, 0.0, -1.0], 25))
        Choice(value=1, rule='first minimum of mutual information (lags to 10)')
    """
    values = one_series(x)
    most = max(1, min(50, len(values) // 10)) if most is None else most
    if len(values) < 4 or constant(values) or not np.isfinite(values).all():
        return Choice(1, "1: no variation to choose by")
    found = mutual_information(values, most + 1)
    for k in range(1, len(found) - 1):
        if found[k] < found[k - 1] and found[k] <= found[k + 1]:
            return Choice(k, f"first minimum of mutual information (lags to {most})")
    return Choice(1, f"1: mutual information has no minimum up to lag {most}")


def choose_theiler(x: Any) -> Choice:
    """Return the first lag at which the autocorrelation is below 1/e, at least 1; n/4 where there is none before.

    Example:
        >>> choose_theiler(np.random.default_rng(0).standard_normal(300)).value
        1
    """
    values = one_series(x)
    most = max(1, len(values) // 4)
    if constant(values) or not np.isfinite(values).all():
        return Choice(1, "1: no variation to choose by")
    below = np.flatnonzero(autocorrelation(values, most) < np.exp(-1.0))
    if len(below):
        return Choice(max(1, int(below[0])), "first lag with autocorrelation below 1/e")
    return Choice(most, f"{most}: autocorrelation stays above 1/e up to a quarter of the series")
