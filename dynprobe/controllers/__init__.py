"""Controllers: recovery modes, the attractor layer and their baselines, under one contract."""

from dynprobe.controllers._controller import Controller, Memory, Restart, Seen, attached
from dynprobe.controllers._steering import Steering
from dynprobe.controllers._writing import Written, generate_with, why_not
from dynprobe.controllers.attractor import AttractorLayer

__all__ = [
    "AttractorLayer",
    "Controller",
    "Memory",
    "Restart",
    "Seen",
    "Steering",
    "Written",
    "attached",
    "generate_with",
    "why_not",
]
