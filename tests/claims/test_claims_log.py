"""The falsification log: what it refuses, and what it finds."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from dynprobe.claims import PILOT_FILE, ClaimLog, LogError, history, plan_hash

PLAN = {"claim": "kappa.rises", "margin": 0.0}


def pair(log: ClaimLog, test: str = "T0001", outcome: str = "survived") -> None:
    log.append("registered", claim="kappa.rises", test=test, plan=PLAN, plan_hash=plan_hash(PLAN))
    log.append("outcome", claim="kappa.rises", test=test, plan_hash=plan_hash(PLAN), outcome=outcome, data_hash="00")


@pytest.fixture
def log(tmp_path: Path) -> ClaimLog:
    made = ClaimLog(tmp_path / "log.jsonl")
    pair(made)
    pair(made, "T0002", "falsified")
    return made


def lines(log: ClaimLog) -> list[str]:
    return log.path.read_text().splitlines()


def put(log: ClaimLog, found: list[str]) -> None:
    log.path.write_text("".join(line + "\n" for line in found))


def test_a_log_that_was_only_appended_to_holds_together(log: ClaimLog) -> None:
    assert log.verify() == []
    found = log.records()
    assert [r["kind"] for r in found] == ["registered", "outcome"] * 2
    assert [r["id"] for r in found] == ["r0001", "o0002", "r0003", "o0004"]
    assert all(b["prev"] == a["hash"] for a, b in itertools.pairwise(found))
    assert ClaimLog(log.path.with_name("none.jsonl")).verify() == []


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_edited_line_is_found(log: ClaimLog, number: int) -> None:
    found = lines(log)
    record = json.loads(found[number])
    record["n"] = 1000
    found[number] = json.dumps(record)
    put(log, found)
    assert number + 1 in [p.line for p in log.verify()]
    with pytest.raises(LogError, match="was edited"):
        pair(log, "T0003")


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_removed_line_is_found_the_last_one_too(log: ClaimLog, number: int) -> None:
    found = lines(log)
    del found[number]
    put(log, found)
    assert log.verify()
    with pytest.raises(LogError, match="does not hold together"):
        pair(log, "T0003")


def test_removed_inserted_swapped_and_torn_lines_are_found(log: ClaimLog) -> None:
    whole = lines(log)
    for damaged in (whole[:2], [], [whole[0], *whole], [whole[2], whole[3], whole[0], whole[1]], [*whole, "{}"]):
        put(log, damaged)
        assert log.verify(), damaged
    put(log, whole)
    assert log.verify() == []
    log.path.write_text(log.path.read_text()[:-1])
    assert "cut" in log.verify()[-1].what
    put(log, whole)
    log.head_path.unlink()
    assert "head" in log.verify()[0].what


def test_an_edit_that_mends_its_own_hash_breaks_the_next_line(log: ClaimLog) -> None:
    from dynprobe.claims._log import _hash

    found = lines(log)
    record = json.loads(found[1])
    record["outcome"] = "falsified"
    record["hash"] = _hash(record)
    found[1] = json.dumps(record)
    put(log, found)
    assert [p.line for p in log.verify()] == [3]


def test_a_cut_between_line_and_head_leaves_a_log_that_goes_on(log: ClaimLog) -> None:
    head = log.head_path.read_text()
    pair(log, "T0003")
    log.head_path.write_text(head)
    assert log.verify() == []
    pair(log, "T0004")
    assert len(log.records()) == 8


def test_an_outcome_needs_a_prediction_registered_before_it(tmp_path: Path) -> None:
    log = ClaimLog(tmp_path / "log.jsonl")
    with pytest.raises(LogError, match="not registered before"):
        log.append("outcome", test="T0001", plan_hash=plan_hash(PLAN), outcome="survived")
    log.append("registered", test="T0001", plan=PLAN, plan_hash=plan_hash(PLAN))
    with pytest.raises(LogError, match="another plan"):
        log.append("outcome", test="T0001", plan_hash=plan_hash({**PLAN, "margin": -1.0}), outcome="survived")
    with pytest.raises(LogError, match="does not have its hash"):
        log.append("registered", test="T0002", plan=PLAN, plan_hash=plan_hash({}))
    with pytest.raises(LogError, match="no field"):
        log.append("registered", test="T0002", verdict="survived")
    assert len(log.records()) == 1
    assert log.verify() == []


def test_a_test_is_registered_once_and_ends_once(log: ClaimLog) -> None:
    with pytest.raises(LogError, match="second outcome of the test T0002"):  # no second throw of one prediction
        log.append("outcome", test="T0002", plan_hash=plan_hash(PLAN), outcome="survived")
    with pytest.raises(LogError, match="registers the test T0002 a second time"):
        log.append("registered", test="T0002", plan=PLAN, plan_hash=plan_hash(PLAN))
    numbered = [log.append("registered", plan=PLAN, plan_hash=plan_hash(PLAN))["test"] for _ in range(2)]
    assert numbered == ["T0003", "T0004"]
    assert log.verify() == []


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\nb", "a\x0bb"])
def test_a_text_with_a_line_separator_is_one_record(log: ClaimLog, text: str) -> None:
    log.append("registered", statement=text, plan=PLAN, plan_hash=plan_hash(PLAN))
    assert log.verify() == []
    pair(log, "T0004")
    assert [r["statement"] for r in log.records()][4] == text


def _writer(path: str, name: str) -> None:
    log = ClaimLog(path)
    for i in range(5):
        log.append("registered", test=f"{name}{i}", plan=PLAN, plan_hash=plan_hash(PLAN))


def test_two_processes_do_not_write_over_each_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    context: Any = multiprocessing.get_context("fork")
    both = [context.Process(target=_writer, args=(str(path), name)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert ClaimLog(path).verify() == []
    assert len(ClaimLog(path).records()) == 10


def test_the_pilot_comes_along_as_what_it_is() -> None:
    found = history()
    assert ClaimLog(PILOT_FILE).verify() == []
    assert {r["kind"] for r in found} == {"pilot"}
    assert [r["outcome"] for r in found] == ["survived", "falsified", "falsified", "falsified"]
    assert all(
        r["plan_hash"] is None and r["data_hash"] is None and "before this log" in r["deviations"][0] for r in found
    )
    assert found[0]["effect"] == 1.0
    assert found[3]["effect"] == pytest.approx(11.3 / 1.09)
