"""The arms of a study over items: the same questions, clean, at every strength, and with a controller.

Every arm feeds the question token by token, so that a controller acts where the noise acts, and is watched by the same
detector. All arms of a batch feed the same rows, so they are compared item by item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.controllers import Controller, Steering
from dynprobe.controllers.recovery import Recovery
from dynprobe.probes import Calibration, Perturb, PerturbWriter, Subject
from dynprobe.protocols._arms import Passage, Text, forced
from dynprobe.protocols._conditions import Push
from dynprobe.protocols._dissociate_config import DissociateConfig
from dynprobe.protocols._recover_arms import Arm, ArmResult, Arms, arms_of
from dynprobe.protocols._recover_rows import all_actions
from dynprobe.protocols._streams import streamed

__all__ = ["ItemArms", "batches_of", "item_arms", "mode_arms", "rung"]


@dataclass(eq=False)
class ItemArms(Arms):
    """Runs arms over rows of items; nothing is measured here, since only the question counts."""

    def _together(self, arm: Arm, texts: Sequence[Text], controllers: list[Controller]) -> ArmResult:
        acting = [Steering(c, self.subject, self.calibration) for c in controllers]
        watch = Recovery(self.config.deadband(), None, name="passive")
        watcher = Steering(watch, self.subject, self.calibration)
        writers = self.push() if arm.perturbed else []
        passage = streamed(self.subject, texts, [*writers, *acting, watcher], which=())
        actions = all_actions([(s.name, s.actions()) for s in acting], watcher.actions())
        return ArmResult(arm, [(passage, writers)], actions, pd.DataFrame())

    def plain(self, texts: Sequence[Text], *, alone: bool) -> list[Passage]:
        """The clean rows without streaming: what differs from the clean stream is arithmetic.

        Args:
            texts: The rows.
            alone: Feed every row by itself, where padded rows are read otherwise.
        """
        groups = [[text] for text in texts] if alone else [list(texts)]
        return [forced(self.subject, group, side="right", which=()) for group in groups]


def item_arms(
    subject: Subject, config: DissociateConfig, calibration: Calibration, perturb: Perturb, alpha: float,
) -> ItemArms:  # fmt: skip
    """Return a runner whose noise has this strength."""
    perturbs = [perturb.replace(alpha=alpha)]

    def push() -> list[PerturbWriter]:
        return Push(subject, perturbs, calibration).writers()

    return ItemArms(subject, config, calibration, perturbs, push)


def rung(alpha: float) -> Arm:
    """The arm of one strength of the dose–response.

    Example:
        >>> rung(0.5).name
        'perturbed@0.5'
    """
    return Arm(f"perturbed@{alpha:.12g}", "forced", True)


def mode_arms(config: DissociateConfig, perturb: Perturb, longest: int) -> tuple[list[Arm], list[str]]:
    """Return the arms with a controller, and what is left out because another arm is the same.

    Args:
        config: The settings.
        perturb: The noise.
        longest: Tokens of the longest row.
    """
    arms = [arm for arm in arms_of(config, True) if arm.mode is not None]
    pos = np.arange(config.prefill, longest)[None]
    always: Any = perturb.defaults_filled().where.mask(pos, np.array([config.prefill]), positions="1:")
    if not always.all() or "always" not in config.timings or "oracle" not in config.timings:
        return arms, []
    note = "always and oracle are one arm: the noise is on at every token after the prefill"
    return [arm for arm in arms if "oracle" not in arm.name], [note]


def batches_of(n_rows: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Group items so that no batch has more rows than ``most``, items of like length together.

    Example:
        >>> batches_of([1, 2, 1], [5, 4, 3], 3)
        [[2, 1], [0]]
    """
    found: list[list[int]] = []
    filled = most
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if filled + n_rows[index] > most or not found:
            found.append([])
            filled = 0
        found[-1].append(index)
        filled += n_rows[index]
    return found
