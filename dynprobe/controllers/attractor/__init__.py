"""The attractor layer: a gated, decaying memory with burn-in on a frozen model."""

from dynprobe.controllers.attractor._baselines import BASELINES, make_baseline
from dynprobe.controllers.attractor._layer import AttractorHandle, AttractorLayer, AttractorSite
from dynprobe.controllers.attractor._rule import Passed, empty_state, pass_tokens, strengths
from dynprobe.controllers.attractor._settings import PRESETS, Settings

__all__ = [
    "BASELINES",
    "PRESETS",
    "AttractorHandle",
    "AttractorLayer",
    "AttractorSite",
    "Passed",
    "Settings",
    "empty_state",
    "make_baseline",
    "pass_tokens",
    "strengths",
]
