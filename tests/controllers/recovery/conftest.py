"""A tiny model, and calibrations made up for it."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from dynprobe.models import weights_hash
from dynprobe.probes import Calibration, Subject
from dynprobe.testing import tiny_llama


@pytest.fixture(scope="module")
def llama() -> Subject:
    """Shared by a module: a test that changes the model makes its own."""
    return tiny_llama()


@pytest.fixture(scope="session")
def made_up() -> Callable[..., Calibration]:
    """``made_up(model, signals, tensors)``: a calibration of this model that says what it is told to."""

    def make(model: Subject, signals: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> Calibration:
        header = {"hash": "made up", "weights": weights_hash(model.model), "dtype": "float32"}
        return Calibration(dict(tensors or {}), dict(signals), header)

    return make
