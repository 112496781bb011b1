"""The arms of a run, as rows of the conditions table and as writers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Perturb, PerturbWriter, Site, Subject
from dynprobe.probes._perturb import parse_many
from dynprobe.protocols._arms import Passage, Text
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._strength import contrast_direction, donor_states, read_direction, solve_isokl

__all__ = ["Push", "conditions_table", "resolve_perturbations"]


def resolve_perturbations(subject: Subject, config: RunConfig) -> list[Perturb]:
    """Parse the perturbations of a run, fill defaults, and give directions their vectors.

    Raises:
        UsageError: If a direction is missing, superfluous, or two sources of it are given.
        SpecError: If a text does not parse.
        SiteError: If a site does not exist.
    """
    found = [_seeded(text, p, config.seed).defaults_filled() for text in config.perturb for p in parse_many(text)]
    _refuse_twins(found)
    need = [p for p in found if p.kind == "direction"]
    if config.direction is not None and config.contrast is not None:
        raise UsageError("--direction and --contrast both name a direction; give one of them")
    if (config.direction or config.contrast) and not need:
        raise UsageError("a direction was given and no perturbation uses it; add kind=direction to --perturb")
    if need and not (config.direction or config.contrast) and any(p.direction is None for p in need):
        raise UsageError("kind=direction needs --direction FILE or --contrast 'TEXT A' 'TEXT B'")
    if any(p.scale == "isokl" for p in found) and len(found) > 1:
        raise UsageError("scale=isokl solves for one strength; it cannot act together with other perturbations")
    out = []
    for perturb in found:
        if perturb.kind == "direction" and perturb.direction is None:
            vector = (
                read_direction(config.direction)
                if config.direction is not None
                else contrast_direction(subject, perturb, config.contrast or ("", ""))
            )
            if subject.dim is not None and len(vector) != subject.dim:
                raise UsageError(f"the direction has {len(vector)} entries; {subject.name} has width {subject.dim}")
            perturb = perturb.replace(direction=vector)
        PerturbWriter(subject, perturb.replace(alpha=0.0))  # names every site once, so that a wrong one fails now
        out.append(perturb)
    return out


def _seeded(text: str, perturb: Perturb, seed: int) -> Perturb:
    """The run's seed serves a perturbation that names none."""
    return perturb if "seed" in text or text.startswith("@") else perturb.replace(seed=seed)


def _refuse_twins(perturbs: Sequence[Perturb]) -> None:
    """Two writes of one seed at one site draw the same noise and would add up as one stronger write."""
    for i, one in enumerate(perturbs):
        for other in perturbs[:i]:
            if one.kind != "direction" and other.kind != "direction" and (one.seed, one.where) == (other.seed, other.where):
                raise UsageError(
                    f"{one} and {other} draw the same noise at the same sites; give one of them another seed, e.g. seed={one.seed + 1}"
                )


def conditions_table(config: RunConfig, perturbs: Sequence[Perturb]) -> pd.DataFrame:
    """Return the conditions of a run, one row each."""
    base: dict[str, Any] = {
        "controller": None, "temperature": config.temperature, "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
    }  # fmt: skip

    def row(name: str, arm: str, mode: str, specs: Sequence[Perturb]) -> dict[str, Any]:
        one = specs[0] if specs else None
        return {
            "condition_id": name, "arm": arm, "decode_mode": mode,
            "scale": one.scale if one else None, "alpha": one.alpha if one else 0.0,
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
            if perturb.scale == "interp":
                sites = PerturbWriter(self.subject, perturb.replace(alpha=0.0)).sites
                donors |= donor_states(self.subject, sites, partners)
            elif perturb.scale == "isokl":
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
                calibration=self.calibration,
                donors=self.donors or None,
                magnitude=None if sham or self.magnitude is None else np.nan_to_num(self.magnitude, nan=0.0),
            )
            for p in self.perturbs
        ]

    def first_position(self, texts: Sequence[Text], length: int) -> np.ndarray:
        """First position any of the perturbations writes at, per row."""
        n_prompt = [len(t.prompt) for t in texts]
        return np.min([w.first_position(n_prompt, length) for w in self.writers(sham=True)], axis=0)
