"""A tiny model, calibrations made up for it, and a cache of our own."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from dynprobe.models import weights_hash
from dynprobe.probes import Calibration, Subject
from dynprobe.testing import tiny_llama


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("DYNPROBE_CACHE")
    os.environ["DYNPROBE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("DYNPROBE_CACHE")
    if before is not None:
        os.environ["DYNPROBE_CACHE"] = before


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
