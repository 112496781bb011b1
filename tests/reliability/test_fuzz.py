"""Bad input: what was found once, what reaches every line, and some hundred cases drawn at random."""

from __future__ import annotations

import logging

import fuzz
import fuzz_targets
import pytest

TARGETS = list(fuzz_targets.TARGETS)
#: These write a run folder, or convert a model, in every case.
SLOW = {"manifest", "manifest_raw", "part", "sidecar", "calibration", "gguf_raw"}


@pytest.fixture(autouse=True)
def silent():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_once(target, tmp_path):
    for data in fuzz.stored(fuzz.FOUND, target) + fuzz.stored(fuzz.CORPUS, target):
        bad = fuzz.tried(target, data, tmp_path)
        assert bad is None, f"{bad.what}\n{data!r}"


@pytest.mark.parametrize("target", TARGETS)
def test_at_random(target, tmp_path):
    cases, bad = fuzz.at_random(target, 25 if target in SLOW else 150, 0, tmp_path)
    assert not bad, "\n".join(f"{b.what}\n{b.data!r}" for b in bad.values())
    assert cases


@pytest.mark.parametrize("target", [t for t in TARGETS if t in fuzz_targets._SEEDS])
def test_right_inputs_are_read_or_refused_with_a_reason(target, tmp_path):
    for data in fuzz_targets.seeds(target):
        assert fuzz.tried(target, data, tmp_path) is None


@pytest.mark.parametrize(
    ("raises", "said"),
    [(KeyError("x"), "KeyError"), (ValueError(""), "ValueError"), (RecursionError(), "RecursionError")],
)
def test_a_reader_that_fails_is_noticed(monkeypatch, tmp_path, raises, said):
    def fails(data, scratch):
        raise raises

    monkeypatch.setitem(fuzz.TARGETS, "where", fails)
    assert said in fuzz.tried("where", b"", tmp_path).what


def test_a_reader_that_hangs_is_noticed(monkeypatch, tmp_path):
    def hangs(data, scratch):
        while True:
            pass

    monkeypatch.setitem(fuzz.TARGETS, "where", hangs)
    monkeypatch.setattr(fuzz, "SLOW", 1)
    assert "more than 1 s" in fuzz.tried("where", b"", tmp_path).what


def test_a_refusal_without_words_is_noticed(monkeypatch, tmp_path):
    from dynprobe.errors import UsageError

    def mute(data, scratch):
        raise UsageError("")

    monkeypatch.setitem(fuzz.TARGETS, "where", mute)
    assert "empty message" in fuzz.tried("where", b"", tmp_path).what


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_many_at_random(target, tmp_path):
    _, bad = fuzz.at_random(target, 1000 if target in SLOW else 5000, 1, tmp_path)
    assert not bad, "\n".join(f"{b.what}\n{b.data!r}" for b in bad.values())
