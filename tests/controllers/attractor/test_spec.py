"""``slots=16,layers=50%`` as a layer, and back."""

from __future__ import annotations

import pytest

from dynprobe.controllers.attractor import Settings, attractor_spec, parse_attractor
from dynprobe.errors import UsageError


def test_values_get_the_kind_of_their_setting():
    layer, layers = parse_attractor("slots=8, half-life=138,read=hopfield,clocks=yes,theta=none,layers=25%+50%")
    s = layer.settings
    assert (s.slots, s.half_life, s.read, s.clocks, s.theta, layers) == (8, 138.0, "hopfield", True, None, "25%+50%")
    assert isinstance(s.half_life, float)
    assert isinstance(s.slots, int)


@pytest.mark.parametrize("text", ["", "on", "default"])
def test_all_defaults(text):
    layer, layers = parse_attractor(text)
    assert layer.settings == Settings()
    assert layers is None


def test_a_preset_can_be_changed():
    settings = parse_attractor("preset=duality_v1,slots=4,site=attn_out")[0].settings
    assert (settings.read, settings.slots, settings.site) == ("field", 4, "attn_out")


@pytest.mark.parametrize(
    "text", ["slots=8,strength=0.5,layers=2", "burn=strength,burn_in=12.5,theta=0.7", "clocks=true"]
)
def test_there_and_back(text):
    layer, layers = parse_attractor(text)
    again, places = parse_attractor(attractor_spec(layer.settings, layers))
    assert again.settings == layer.settings
    assert places == layers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slot=8", "slots"), ("slots", "key=value"), ("slots=4,slots=5", "twice"), ("slots=4.5", "whole number"),
        ("half_life=long", "a number"), ("clocks=maybe", "true or false"), ("read=mach", "match"),
        ("preset=duality", "duality_v1"), ("slots=-1", "slots"),
    ],
)  # fmt: skip
def test_what_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse_attractor(text)
