"""Work that needs no model, done by real workers."""

from pathlib import Path

import pytest

from dynprobe.engines import Item, Job, content_key


@pytest.fixture
def job(tmp_path: Path):
    """Makes a job whose units are numbers; a unit in ``deadly`` kills its worker the first times it is begun."""

    def make(**payload):
        payload = {"scratch": str(tmp_path), "deadly": {}, **payload}
        return Job("engine_jobs:open_job", payload, content_key(payload, str(tmp_path)))

    return make


@pytest.fixture
def items():
    def make(n: int) -> list[Item]:
        return [Item(number, number, content_key("item", number)) for number in range(n)]

    return make
