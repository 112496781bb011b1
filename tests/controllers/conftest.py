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


@pytest.fixture(scope="session")
def smollm2(_own_cache: None) -> Subject:
    """SmolLM2-135M from the cache of the person who runs the tests, or a skip."""
    from dynprobe.errors import ModelNotFoundError, OfflineError
    from dynprobe.models import fetch

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DYNPROBE_CACHE")
        try:
            fetch("smollm2-135m")
        except (ModelNotFoundError, OfflineError) as error:
            pytest.skip(f"the weights are not in the cache and cannot be had: {error}")
        return dp.load("smollm2-135m")
