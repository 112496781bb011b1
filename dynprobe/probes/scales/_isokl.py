"""``isokl``: the write of ``relnorm``, with the strength of each row solved so that the mean KL is α nats."""

from __future__ import annotations

from dynprobe.probes._scales import NoiseScale
from dynprobe.probes.scales._relnorm import relnorm

__all__ = ["SCALE"]

SCALE = NoiseScale(
    name="isokl",
    meaning="α is the mean KL in nats that each row's strength was solved for",
    unit="nats of mean KL",
    update=relnorm,
    passport="alpha_relnorm",
    equivariances=frozenset("RS"),
    solved=True,
)
