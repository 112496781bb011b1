"""The benchmark's own arithmetic: who takes turns with whom, what is inside the time, what a ratio is over."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.protocols import _bench_forward, _bench_peers
from dynprobe.protocols._bench import Bench
from dynprobe.protocols._bench_case import Case, Measurement, random_ids
from dynprobe.protocols._bench_peers import PEERS, Peer, RawHooks, chosen, hushed, largest_difference, lasting, made
from dynprobe.protocols._bench_timing import rounds_of
from dynprobe.testing import tiny_gpt2, tiny_llama


def test_arms_take_turns_in_rotating_order_and_clearing_away_is_not_timed(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr("dynprobe.protocols._bench_timing.time.perf_counter", lambda: now[0])

    def arm(name, seconds):
        def work():
            order.append(name)
            now[0] += seconds

        return work

    def wait():
        now[0] += 0.5

    def after():
        now[0] += 100.0

    found = rounds_of({"a": arm("a", 1.0), "b": arm("b", 3.0)}, rounds=3, warmup=1, wait=wait, after=after)
    assert found == {"a": [1.5] * 3, "b": [3.5] * 3}
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    with pytest.raises(UsageError, match="rounds=0"):
        rounds_of({"a": wait}, rounds=0)


def test_rows_longer_than_the_table_of_positions_are_refused():
    with pytest.raises(UsageError, match=r"length=513, and .* has a table of 512 positions; --length 512 or less"):
        dp.bench(tiny_gpt2(), length=513, only="metrics", peers="none", rounds=1)


def test_an_arm_with_a_baseline_of_its_own_is_compared_with_that():
    arms = {"bare": [1.0, 1.0], "own": [2.0, 4.0], "arm": [3.0, 8.0]}
    over = {"bare": "bare", "own": "own", "arm": "own"}
    m = Measurement("capture", "1 × 2", "bare", arms, over, {"arm": math.nan})
    assert m.ratio("arm") == (1.75, 1.625, 1.875)
    assert m.ratio("own")[0] == 1.0
    found = Bench({}, {}, {}, {}, (m,), {})
    assert found.ratio("capture", "arm") == 1.75
    assert found.as_dict()["cases"][0]["arms"]["arm"]["difference"] is None
    with pytest.raises(UsageError, match="Did you mean"):
        found.ratio("capture", "amr")


def test_what_is_written_is_closed_even_where_an_arm_fails():
    closed = []

    def fails():
        raise RuntimeError("no")

    case = Case("disk", "1", "a", {"a": fails}, close=lambda: closed.append(True))
    with pytest.raises(RuntimeError):
        case.measure(torch.device("cpu"), 1)
    assert closed == [True]


def test_captures_of_other_shapes_do_not_pass_for_equal():
    a = [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)]
    assert largest_difference(a, [torch.zeros(1, 2, 3), torch.full((1, 2, 3), -2.0)]) == 2.0
    assert math.isnan(largest_difference(a, a[:1]))
    assert math.isnan(largest_difference(a, [torch.zeros(1, 2, 3), torch.zeros(1, 1, 3)]))


def test_a_peer_that_does_not_run_says_why_and_nothing_stays_silenced():
    class Broken(Peer):
        name, package = "broken", "torch"

        def capture(self, ids):
            raise ValueError("cannot read this\nat all")

    class Elsewhere(Peer):
        name, package = "elsewhere", "no_such_package_at_all"

        def capture(self, ids):
            raise AssertionError

    subject = tiny_llama()
    ids = random_ids(subject, 1, 4)
    found, absent = made((Broken, Elsewhere), None, subject, lambda peer: peer.capture(ids))
    assert found == {}
    assert absent == {
        "broken": "does not run here: ValueError: cannot read this",
        "elsewhere": "not installed: pip install no-such-package-at-all",
    }
    assert made((Broken,), ["raw hooks"], subject, lambda peer: peer.capture(ids)) == ({}, {})
    before = logging.root.manager.disable
    with hushed():
        assert logging.root.manager.disable >= logging.WARNING
    assert logging.root.manager.disable == before


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_peers_capture_our_states_of_models_without_a_folder(make):
    subject = make()
    ids = random_ids(subject, 2, 5)
    ours = dp.capture(subject, ids, logits=None)
    wanted = [ours.states[d] for d in range(1, subject.n_layers + 1)]
    found, absent = made(PEERS, ["raw hooks", "TransformerLens"], subject, lambda peer: peer.capture(ids))
    assert set(found) == {"raw hooks"}
    assert not any("Error: " not in why and "not installed" not in why for why in absent.values())
    assert largest_difference(wanted, found["raw hooks"].capture(ids)) == 0.0


def test_names_of_peers():
    assert chosen("auto") is None
    assert chosen(["TransformerLens", "raw hooks"]) == ["TransformerLens", "raw hooks"]
    with pytest.raises(UsageError, match="torchlens"):
        chosen("torchlense")


def test_bench_of_a_subject_writes_strict_json(tmp_path):
    found = dp.bench(
        tiny_llama(), batch=1, length=6, rounds=1, only=["metrics", "states"], megabytes=0.1, peers="none",
        out=tmp_path / "b.json",
    )  # fmt: skip
    assert [m.section for m in found.measurements] == ["metrics", "states"]
    assert json.loads((tmp_path / "b.json").read_text()) == found.as_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
    assert found.as_dict()["settings"]["peers"] == "none"


def test_a_peer_that_leaves_something_behind_is_measured_last_and_apart(monkeypatch):
    """What it leaves would slow down every arm that is timed after it, the bare forward too."""
    told = []

    class Sticky(RawHooks):
        name, package, lasting = "torchlens", "torch", "leaves something behind"

        def __init__(self, subject):
            told.append("it is there")
            super().__init__(subject)

    for module in (_bench_peers, _bench_forward):
        monkeypatch.setattr(module, "PEERS", (RawHooks, Sticky))
    found = dp.bench(
        tiny_llama(), batch=1, length=8, rounds=2, only="capture,metrics", peers="hooks,torchlens", listener=told.append
    )
    assert [(m.section, m.name) for m in found.measurements] == [
        ("capture", "1 × 8"), ("metrics", "1 × 8"), ("capture", "1 × 8, beside torchlens"),
    ]  # fmt: skip
    assert set(found.measurements[0].seconds) == {"bare forward", "dynprobe", "raw hooks"}
    assert set(found.measurements[2].seconds) == {"bare forward", "dynprobe", "torchlens"}
    assert told.count("it is there") == 1
    assert told.index("it is there") > next(i for i, text in enumerate(told) if text.startswith("metrics: 1 × 8"))
    assert found.settings["peers"] == ["raw hooks", "torchlens"]
    assert lasting(["torchlens"]) == ["torchlens"]
    assert lasting(None) == []
