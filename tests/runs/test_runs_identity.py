from __future__ import annotations

import enum
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import RunFolderError
from dynprobe.runs import hash_prompts, identity

BASE = {"model": "gpt2", "perturb": {"alpha": 0.1, "layers": [6]}, "max_new_tokens": 32}


def test_identity_is_eight_hex_digits_and_stable_across_versions():
    # A changed value here orphans every interrupted run of every user.
    prompts = hashlib.sha256(b'[["text","The sky"]]').hexdigest()
    text = (
        '{"config":{"max_new_tokens":32,"model":"gpt2","perturb":{"alpha":0.1,"layers":[6]}},'
        f'"prompts":"{prompts}","schema":"1","weights":"w0"}}'
    )
    expected = hashlib.sha256(text.encode()).hexdigest()[:8]
    assert identity(BASE, ["The sky"], "w0") == expected == "d6e2d8a6"


@pytest.mark.parametrize("key", ["out", "output-path", "engine", "batch_size", "quiet", "json", "display"])
def test_what_changes_no_number_does_not_count(key):
    assert identity(BASE | {key: "anything"}, ["a"], "w") == identity(BASE, ["a"], "w")


def test_out_inside_another_key_counts():
    assert identity(BASE | {"hook": {"out": 1}}, ["a"], "w") != identity(BASE | {"hook": {"out": 2}}, ["a"], "w")


@pytest.mark.parametrize(
    "other",
    [
        (BASE | {"max_new_tokens": 33}, ["a"], "w"),
        (BASE, ["a", "a"], "w"),
        (BASE, [[1]], "w"),
        (BASE, ["a"], "w2"),
        (BASE | {"limit": None}, ["a"], "w"),
    ],
)
def test_what_changes_numbers_counts(other):
    assert identity(*other) != identity(BASE, ["a"], "w")


def test_order_of_prompts_counts_and_text_is_not_ids():
    assert hash_prompts(["a", "b"]) != hash_prompts(["b", "a"])
    assert hash_prompts([[1, 2]]) == hash_prompts([np.array([1, 2])]) != hash_prompts(["[1,2]"])


def test_secrets_do_not_count():
    assert identity(BASE | {"hf_token": "hf_x"}, ["a"], "w") == identity(BASE | {"hf_token": None}, ["a"], "w")


def test_spellings_of_one_value_are_one():
    class Scale(enum.Enum):
        REL = "relnorm"

    a = {"alpha": 1.0, "sites": (1, 2), "scale": Scale.REL, "file": Path("x/y"), "n": np.int64(3), "f": np.float32(0.5)}
    b = {"f": 0.5, "n": 3, "file": "x/y", "scale": "relnorm", "sites": [1, 2], "alpha": 1}
    assert identity(a, [], "w") == identity(b, [], "w")


def test_true_is_not_one_and_null_is_not_zero():
    ids = {identity({"x": value}, [], "w") for value in (True, 1, None, 0, False, "1", [1])}
    assert len(ids) == 7


def test_something_without_json_form_is_named():
    with pytest.raises(RunFolderError, match=r"config\.hook\[0\]"):
        identity({"hook": [object()]}, [], "w")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=6), values, max_size=5))
def test_order_of_keys_never_counts(config):
    assert identity(dict(reversed(config.items())), ["p"], "w") == identity(config, ["p"], "w")
