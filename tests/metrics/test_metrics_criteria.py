"""Criteria and thresholds as catalogue entries: vectors and refusals."""

import math

import numpy as np
import pytest

from dynprobe.errors import MetricError
from dynprobe.metrics import compute, statistics

GRID = np.array([0.1, 0.2, 0.4, 0.8])


def test_criteria_vectors():
    kl = compute("crit.kl/1", GRID, (GRID / 0.3) ** 2)
    assert float(kl) == pytest.approx(0.3, rel=1e-12)
    assert (kl.extras["low"], kl.extras["high"], kl.extras["status"]) == (0.2, 0.4, "resolved")
    assert float(compute("crit.flip/1", GRID, GRID**2)) == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert float(compute("crit.task/1", GRID[:3], [0, 0.1, 0.4])) == pytest.approx(0.2 * math.sqrt(2), rel=1e-12)
    a = np.array([0.1, 0.5, 2.0])
    null = np.arange(1001) / 1000
    assert float(compute("crit.kappa/1", a, a**2, null=null)) == pytest.approx(math.sqrt(0.99), rel=1e-12)


def test_criteria_parameters_join_the_id():
    r = compute("crit.kl/1{level=0.1}", GRID, (GRID / 0.3) ** 2)
    assert (r.metric_id, r.reason) == ("crit.kl/1{level=0.1}", "α*<0.1")
    assert math.isnan(float(r))
    assert compute("crit.kl/1", GRID, (GRID / 0.3) ** 2, floor=0.2).reason == "level<10×floor"
    masked = compute("crit.kl/1", GRID, (GRID / 0.3) ** 2, mask=[True, False, True, True])
    assert (masked.extras["low"], masked.coverage) == (0.1, 0.75)
    with pytest.raises(MetricError, match="null="):
        compute("crit.kappa/1", GRID, GRID)
    with pytest.raises(MetricError, match="null="):
        compute("crit.kappa/1", GRID, GRID, null=np.zeros(50))


def test_threshold_vectors():
    inf = np.inf
    assert float(compute("threshold.prompt/1", [0.1, 0.4, 0.9, inf])) == pytest.approx(0.6, rel=1e-12)
    assert float(compute("threshold.prompt/1", [0, 0.3, inf])) == pytest.approx(0.3, rel=1e-12)
    assert math.isnan(float(compute("threshold.prompt/1", [0.1, inf])))
    r = (GRID / np.array([[0.1], [0.2]])) ** 2
    expected = 1 / math.sqrt((100 + 25) / 2)
    assert float(compute("threshold.mean/1", GRID, r)) == pytest.approx(expected, rel=1e-12)
    t = compute("threshold.prompt/1", np.geomspace(0.1, 1, 9))
    assert t.extras["low"] == statistics.prompt_threshold(np.geomspace(0.1, 1, 9), n_boot=0).low
    assert t.n_units == 9
