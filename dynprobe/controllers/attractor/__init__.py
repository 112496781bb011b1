"""The attractor layer: a gated, decaying memory with burn-in on a frozen model."""

from dynprobe.controllers.attractor._baselines import BASELINES, make_baseline
from dynprobe.controllers.attractor._layer import AttractorHandle, AttractorLayer, AttractorSite
from dynprobe.controllers.attractor._phase2 import Phase2, Phase2Memory, duality_phase2
from dynprobe.controllers.attractor._record import Life, Recorded
from dynprobe.controllers.attractor._rule import Passed, empty_state, pass_tokens, strengths
from dynprobe.controllers.attractor._settings import PRESETS, Settings
from dynprobe.controllers.attractor._spec import attractor_spec, parse_attractor

__all__ = [
    "BASELINES",
    "PRESETS",
    "AttractorHandle",
    "AttractorLayer",
    "AttractorSite",
    "Life",
    "Passed",
    "Phase2",
    "Phase2Memory",
    "Recorded",
    "Settings",
    "attractor_spec",
    "duality_phase2",
    "empty_state",
    "make_baseline",
    "parse_attractor",
    "pass_tokens",
    "strengths",
]
