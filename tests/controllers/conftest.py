"""The zoo's llama, calibrated once; the user's cache is left alone."""

import os
from collections.abc import Iterator

import pytest

import dynprobe as dp
from dynprobe.probes import Calibration, Subject


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("DYNPROBE_CACHE")
    os.environ["DYNPROBE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("DYNPROBE_CACHE")
    if before is not None:
        os.environ["DYNPROBE_CACHE"] = before


@pytest.fixture(scope="session")
def zoo(_own_cache: None) -> Subject:
    """Shared: a test that changes the model loads its own."""
    return dp.load("tiny-llama")


@pytest.fixture(scope="session")
def calibrated(zoo: Subject) -> Calibration:
    return dp.calibrate(zoo)
