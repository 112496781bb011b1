"""The arms of a run, as rows of the conditions table and as writers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Perturb, PerturbWriter, Site, Subject
from dynprobe.probes._draw import law_of
from dynprobe.probes._perturb import parse_many
from dynprobe.probes._perturb_values import TAKES_DIRECTION
from dynprobe.protocols._arms import Passage, Text
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._strength import contrast_direction, donor_states, read_direction, solve_isokl

__all__ = ["OWN_UNIT", "Push", "conditions_table", "directed", "resolve_perturbations", "written_depths", "yardstick"]


#: Kinds with a unit of their own, which no noise scale multiplies.
OWN_UNIT = ("scale", "rotate", "dropout")


def resolve_perturbations(
    subject: Subject, config: RunConfig, given: Sequence[Perturb | str] | None = None
) -> list[Perturb]:
    """Parse the perturbations of a run, fill defaults, and give directions their vectors.

    Args:
        subject: The subject.
        config: The settings.
        given: The perturbations as they were handed in, where some are objects: a direction is no text.

    Raises:
        UsageError: If a direction is missing, superfluous, or two sources of it are given.
        SpecError: If a text does not parse.
        SiteError: If a site does not exist.
    """
    items = config.perturb if given is None else given
    found = [_seeded(item, p, config.seed).defaults_filled() for item in items for p in parse_many(item)]
    if subject.loop is not None and subject.loop.layered:  # iterations alone leave the layer open
        found = [p if p.where.layers is not None else p.replace(layers="50%") for p in found]
    need = [p for p in found if p.kind == "direction" and p.direction is None]
    could = [p for p in found if p.kind in TAKES_DIRECTION and p.direction is None]
    if config.direction is not None and config.contrast is not None:
        raise UsageError("--direction and --contrast both name a direction; give one of them")
    if (config.direction or config.contrast) and not could:
        raise UsageError("a direction was given and no perturbation needs it; add kind=direction to --perturb")
    if need and not (config.direction or config.contrast):
        raise UsageError("kind=direction needs --direction FILE or --contrast 'TEXT A' 'TEXT B'")
    if any(p.noise_scale.solved for p in found) and len(found) > 1:
        raise UsageError("scale=isokl solves for one strength; it cannot act together with other perturbations")
    if sum(p.kind == "sine" for p in found) > 1:
        raise UsageError("kind=sine is read at one frequency along one direction; run once for each period")
    sites = [set(PerturbWriter(subject, p.replace(alpha=0.0)).sites) for p in found]  # a site that is not there fails
    _refuse_twins(found, sites)
    return [directed(subject, p, config) for p in found]


def directed(subject: Subject, perturb: Perturb, config: RunConfig) -> Perturb:
    """The perturbation with its vector, where its kind has one."""
    if perturb.kind not in TAKES_DIRECTION:
        return perturb
    vector = perturb.direction
    if vector is None and config.direction is not None:
        vector = read_direction(config.direction)
    elif vector is None and config.contrast is not None:
        vector = contrast_direction(subject, perturb, config.contrast)
    if vector is None:  # an impulse of noise, a sine along a direction that is drawn
        return perturb
    if subject.dim is not None and len(vector) != subject.dim:
        raise UsageError(f"the direction has {len(vector)} entries; {subject.name} has width {subject.dim}")
    return perturb.replace(direction=vector)


def _seeded(item: Perturb | str, perturb: Perturb, seed: int) -> Perturb:
    """The run's seed serves a perturbation that names none; an object and a file always say what they mean."""
    unnamed = isinstance(item, str) and not item.strip().startswith("@") and "seed" not in item
    return perturb.replace(seed=seed) if unnamed else perturb


def _refuse_twins(perturbs: Sequence[Perturb], sites: Sequence[set[Site]]) -> None:
    """Two writes of one seed at one place draw the same noise and would add up as one stronger write."""
    for i, j in itertools.combinations(range(len(perturbs)), 2):
        one, other = perturbs[i], perturbs[j]
        drawn = law_of(one) is not None and (law_of(one), one.seed) == (law_of(other), other.seed)
        if drawn and sites[i] & sites[j] and _meet(one, other):
            raise UsageError(
                f"{one} and {other} draw the same noise at the same places; give one of them another seed, "
                f"e.g. seed={one.seed + 1}"
            )


def _meet(one: Perturb, other: Perturb) -> bool:
    """Whether two perturbations write at a common position of a row."""
    pos, n_prompt = np.tile(np.arange(256), (4, 1)), np.array([1, 4, 16, 64])
    masks = [p.where.mask(pos, n_prompt, positions="1:") for p in (one, other)]
    return bool((masks[0] & masks[1]).any())


def written_depths(subject: Subject, perturb: Perturb) -> list[int]:
    """Return the depths of the states that a perturbation is the first to change, one per site."""
    sites = PerturbWriter(subject, perturb.replace(alpha=0.0)).sites
    return [layer if component == "resid_pre" else layer + 1 for component, layer in sites]


def yardstick(subject: Subject, perturb: Perturb, calibration: Calibration | None) -> Calibration | None:
    """The calibration, where it knows the written depths: a broken block gave it no finite state to learn from."""
    if calibration is None:
        return None
    known = torch.isfinite(calibration.tensors["std"]).all(-1)
    return calibration if bool(known[written_depths(subject, perturb)].all()) else None


def conditions_table(config: RunConfig, perturbs: Sequence[Perturb]) -> pd.DataFrame:
    """Return the conditions of a run, one row each."""
    base: dict[str, Any] = {
        "controller": None, "temperature": config.temperature, "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
    }  # fmt: skip

    def row(name: str, arm: str, mode: str, specs: Sequence[Perturb]) -> dict[str, Any]:
        one = specs[0] if len(specs) == 1 else None  # several act together: only ``params`` can say what
        alpha = one.alpha if one else None if specs else 0.0
        return {
            "condition_id": name, "arm": arm, "decode_mode": mode,
            "scale": one.scale if one and one.kind not in OWN_UNIT else None, "alpha": alpha,
            "kind": one.kind if one else None, "where": str(one.where) if one else None,
            "seed": one.seed if one else None,
            "params": [str(p) for p in specs] if specs else None, **base,
        }  # fmt: skip

    rows = [row("clean", "clean", "forced", ())]
    if perturbs:
        rows.append(row("sham", "sham", "forced", [p.replace(alpha=0.0) for p in perturbs]))
        rows.append(row("perturbed.forced", "perturbed", "forced", perturbs))
        if config.max_new_tokens > 0:
            rows.append(row("perturbed.free", "perturbed", "free", perturbs))
    table = pd.DataFrame(rows)
    table["seed"] = table["seed"].astype("Int64")
    return table


@dataclass(eq=False)
class Push:
    """The perturbation of a run, ready to make writers for one batch.

    Attributes:
        subject: The subject.
        perturbs: What acts together.
        calibration: Coordinate statistics.
        donors: Per row clean states of another prompt, for ``interp``.
        magnitude: Per row solved strength, for ``isokl``.
    """

    subject: Subject
    perturbs: Sequence[Perturb]
    calibration: Calibration | None
    donors: dict[Site, list[torch.Tensor]] = field(default_factory=dict)
    magnitude: np.ndarray | None = None

    def prepare(
        self,
        texts: Sequence[Text],
        partners: Sequence[Sequence[int]],
        *,
        clean: Passage | None = None,
        side: str = "right",
        magnitude: np.ndarray | None = None,
    ) -> Push:
        """Return a push that has what its scales need for these rows.

        Args:
            texts: The rows.
            partners: Token ids of the prompt whose states each row moves towards under ``interp``.
            clean: Clean passage over the texts, from which ``isokl`` solves each row's strength.
            side: Padding side of the clean passage.
            magnitude: Strengths that were solved already; used where there is no clean passage.
        """
        donors: dict[Site, list[torch.Tensor]] = {}
        solved: np.ndarray | None = None
        for perturb in self.perturbs:
            if "donor" in perturb.noise_scale.needs:
                sites = PerturbWriter(self.subject, perturb.replace(alpha=0.0)).sites
                donors |= donor_states(self.subject, sites, partners)
            elif perturb.noise_scale.solved:
                solved = (
                    magnitude
                    if clean is None
                    else solve_isokl(self.subject, perturb, texts, clean, self.calibration, side)
                )
        return Push(self.subject, self.perturbs, self.calibration, donors, solved)

    def writers(self, *, sham: bool = False) -> list[PerturbWriter]:
        """Return fresh writers; ``sham`` writes with α = 0 through the same path."""
        return [
            PerturbWriter(
                self.subject,
                p.replace(alpha=0.0) if sham else p,
                calibration=yardstick(self.subject, p, self.calibration),
                donors=self.donors or None,
                magnitude=None if sham or self.magnitude is None else np.nan_to_num(self.magnitude, nan=0.0),
            )
            for p in self.perturbs
        ]

    def first_position(self, texts: Sequence[Text], length: int) -> np.ndarray:
        """First position any of the perturbations writes at, per row."""
        n_prompt = [len(t.prompt) for t in texts]
        return np.min([w.first_position(n_prompt, length) for w in self.writers(sham=True)], axis=0)
