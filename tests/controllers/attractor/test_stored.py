"""A stored layer is read whole or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dynprobe.controllers import AttractorLayer
from dynprobe.controllers.attractor._slots import empty_state
from dynprobe.errors import UsageError
from dynprobe.testing import tiny_llama

SITE = "attn_out.1"


def header(layer, **changes):
    said = {"settings": json.dumps(layer.settings.as_dict()), "thetas": json.dumps({SITE: 0.7}), "made_for": "{}"}
    return said | changes


@pytest.fixture
def layer():
    return AttractorLayer(centre="none", slots=3)


def memory(layer, **changes):
    found = empty_state(1, 4, layer.settings) | changes
    return {f"state/{SITE}/{name}": tensor for name, tensor in found.items() if tensor is not None}


def test_a_session_comes_back(tmp_path):
    subject, layer = tiny_llama(), AttractorLayer(centre="running", slots=3, burn_in=0, theta=0.2)
    with layer.session(), layer.attach(subject.model, layers=[1]):
        subject.model(torch.tensor([[5, 6, 7, 8]]))
    with layer.session():
        with layer.attach(subject.model, layers=[1]):
            subject.model(torch.tensor([[5, 6, 7, 8]]))
        again = AttractorLayer.load(layer.save(tmp_path / "layer.safetensors"))
        assert again.settings == layer.settings
        assert again._base.keys() == layer._base.keys() == {SITE}
        for name, tensor in layer._base[SITE].items():
            assert torch.equal(again._base[SITE][name], tensor)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": "[]"}, "no attractor layer"), ({"settings": "{"}, "no attractor layer"),
        ({"settings": '{"slot": 3}'}, "unknown setting 'slot'.*slots"), ({"settings": '{"theta": "x"}'}, "theta='x'"),
        ({"settings": '{"theta_read": null}'}, "theta_read=None"), ({"settings": '{"slots": true}'}, "slots=True"),
        ({"settings": '{"clocks": 1}'}, "clocks=1"), ({"settings": '{"gate": NaN}'}, "gate=nan"),
        ({"thetas": "{}"}, "threshold None"), ({"thetas": json.dumps({SITE: float("inf")})}, "threshold inf"),
    ],
)  # fmt: skip
def test_a_header_that_is_wrong(layer, tmp_path, changes, said):
    save_file({f"centre/{SITE}": torch.zeros(4)}, tmp_path / "x.safetensors", header(layer, **changes))
    with pytest.raises(UsageError, match=said):
        AttractorLayer.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (lambda a: {f"centre/{SITE}": torch.zeros(2, 4)}, r"\[2, 4\]"),
        (lambda a: {f"centre/{SITE}": torch.full((4,), torch.nan)}, "not finite"),
        (lambda a: {"other": torch.zeros(4)}, "'other' is none"),
        (lambda a: memory(a, A=None), "no slots"),
        (lambda a: memory(a, s=None), "other fields.*s"),
        (lambda a: memory(a, A=torch.zeros(1, 5, 4)), "3 slots"),
        (lambda a: memory(a, s=torch.zeros(1, 3)), "float32"),
        (lambda a: memory(a, mean=torch.zeros(1, 9)), "mean"),
    ],
)
def test_tensors_that_do_not_fit(layer, tmp_path, tensors, said):
    save_file(tensors(layer), tmp_path / "x.safetensors", header(layer))
    with pytest.raises(UsageError, match=said):
        AttractorLayer.load(tmp_path / "x.safetensors")


def test_the_right_ones_fit(layer, tmp_path):
    save_file(memory(layer), tmp_path / "x.safetensors", header(layer))
    assert AttractorLayer.load(tmp_path / "x.safetensors")._base.keys() == {SITE}


@pytest.mark.parametrize(
    ("name", "given"),
    [("strength", np.float32(0.5)), ("half_life", np.int64(46)), ("slots", np.int64(3)), ("theta", np.float64(0.5))],
)
def test_numbers_of_numpy_are_numbers(name, given, tmp_path):
    layer = AttractorLayer(**{name: given})
    value = getattr(layer.settings, name)
    assert value == given
    assert type(value) in (int, float) or isinstance(given, float)
    assert AttractorLayer.load(layer.save(tmp_path / "layer.safetensors")).settings == layer.settings


def test_a_truth_of_numpy_is_no_number():
    with pytest.raises(UsageError, match="it is a number"):
        AttractorLayer(strength=np.bool_(True))
