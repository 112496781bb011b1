"""Studies that are killed and continued give what an uninterrupted one gives; the harness notices where they do not."""

from __future__ import annotations

import multiprocessing
import shutil

import kills
import pytest

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="children are forked, which this system cannot"
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return kills.Kills("run", tmp_path_factory.mktemp("run"))


def test_killed_at_random_moments(ran):
    tally = ran.random_moments(3, seed=1)
    assert tally.killed == 3
    assert not tally.bad, tally.bad


def test_killed_where_it_touches_the_disk(ran):
    tally = ran.boundaries(step=61)
    assert tally.killed >= 4
    assert not tally.bad, tally.bad


def test_a_part_that_is_half_written_is_noticed(ran, tmp_path):
    (folder,) = kills.visible(ran.scratch / "whole")
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    part = next((copy / "tokens").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    tally = kills.Tally("run", "random")
    ran._after(tally, tmp_path, -9, "now")
    assert tally.killed == 1
    assert len(tally.bad) == 1
    assert part.name in tally.bad[0]


def test_other_bytes_are_noticed(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(ran, "whole", {**ran.whole, "tokens/part-00000.parquet": "0" * 64})
    tally = kills.Tally("run", "random")
    shutil.copytree(ran.scratch / "whole", tmp_path / "out")
    ran._ended(tally, tmp_path / "out", "now")
    assert len(tally.bad) == 1
    assert "tokens/part-00000.parquet" in tally.bad[0]


@pytest.mark.long
@pytest.mark.parametrize("study", list(kills.STUDIES))
def test_killed_seventy_times(study, tmp_path):
    tally = kills.Kills(study, tmp_path).random_moments(70, seed=0)
    assert tally.killed == 70
    assert not tally.bad, tally.bad


@pytest.mark.long
@pytest.mark.parametrize("study", list(kills.STUDIES))
def test_killed_at_every_boundary(study, tmp_path):
    tally = kills.Kills(study, tmp_path).boundaries(1 if study == "run" else 4)
    assert tally.killed > 20
    assert not tally.bad, tally.bad
