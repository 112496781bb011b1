"""What this package adds keeps the contracts: two lines for each, in dynprobe's own suites."""

import numpy as np
import pytest
from dynprobe_example.brake import MODE
from dynprobe_example.jsonl import FORMAT
from dynprobe_example.looped import LoopedModel, describe
from dynprobe_example.peak import PEAK
from dynprobe_example.reach import REACH
from dynprobe_example.threads import Threads

from dynprobe.controllers.recovery import Always, make_mode
from dynprobe.testing import (
    ADAPTER_CHECKS,
    CONTROLLER_CHECKS,
    ENGINE_CHECKS,
    EXPORTER_CHECKS,
    METRIC_CHECKS,
    SCALE_CHECKS,
    Vector,
    check_adapter,
    check_controller,
    check_engine,
    check_exporter,
    check_metric,
    check_scale,
)

E1, E2 = np.array([1.0, 0.0]), np.array([0.0, 1.0])
VECTORS = [
    Vector((np.array([E1, 2 * E1, 5 * E1])[:, None],), 1.0),
    Vector((np.array([E1, 2 * E1, E1])[:, None],), 0.0),
    Vector((np.array([E2, E1 + E2, E1 + 2 * E2])[:, None],), 2**-0.5),
    Vector((E1[None, None],), None, "depth<2"),
    Vector((np.array([E1, E1])[:, None],), None, "zero-denominator"),
]


@pytest.mark.parametrize("check", METRIC_CHECKS)
def test_metric(check):
    check_metric(REACH, vectors=VECTORS, only=check)


@pytest.mark.parametrize("check", SCALE_CHECKS)
def test_scale(check):
    check_scale(PEAK, only=check)


@pytest.mark.parametrize("check", CONTROLLER_CHECKS)
def test_mode(check):
    check_controller(lambda: MODE(lambda: Always(0.5), site="layers=1"), only=check)


@pytest.mark.parametrize("check", ADAPTER_CHECKS)
def test_adapter(check):
    check_adapter(LoopedModel, describe, only=check)


@pytest.mark.parametrize("check", EXPORTER_CHECKS)
def test_exporter(check):
    check_exporter(FORMAT, only=check)


@pytest.mark.parametrize("check", ENGINE_CHECKS)
def test_engine(check):
    check_engine(lambda folder: Threads(2), only=check)


def test_the_installed_package_brings_its_mode():
    (made,) = make_mode("brake", Always)
    assert made.id == "recovery.brake/1"
