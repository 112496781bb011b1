"""The arms of a recovery study over one batch of texts.

Every arm is read by the same detector, whether or not it acts, so that its signal, duty cycle and onsets are known
everywhere. *Forced* arms read one given text token by token, so they can be paired; *free* arms write their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from dynprobe import metrics
from dynprobe.controllers import Controller, Steering, generate_with, why_not
from dynprobe.controllers.recovery import Always, Never, Oracle, Recovery, Replay, Timing, make_mode
from dynprobe.errors import UsageError
from dynprobe.probes import Batch, Calibration, Instrument, Perturb, PerturbWriter, Sampling, Subject
from dynprobe.probes._take_back import check_takes_back
from dynprobe.protocols._arms import Passage, Text, forced, free
from dynprobe.protocols._recover_config import RecoverConfig
from dynprobe.protocols._recover_rows import all_actions, row_lines
from dynprobe.protocols._streams import streamed

__all__ = ["Arm", "ArmResult", "Arms", "acts_by_itself", "arms_of", "takes_back"]


@dataclass(frozen=True)
class Arm:
    """One condition.

    Attributes:
        name: ``clean``, ``perturbed``, ``perturbed+slerp``, ``perturbed+slerp.always`` …
        decode: ``forced`` or ``free``.
        perturbed: Whether the noise is on.
        mode: Recovery mode, or None.
        timing: ``detector``, ``always``, ``oracle``, or ``replay`` of a random control.
    """

    name: str
    decode: str
    perturbed: bool
    mode: str | None = None
    timing: str = "detector"

    @property
    def condition_id(self) -> str:
        """Name in the tables."""
        return f"{self.name}.{self.decode}"

    @property
    def kind(self) -> str:
        """What the arm is there for."""
        if self.mode is None:
            return "perturbed" if self.perturbed else "clean"
        if self.timing == "replay":
            return "random-control"
        return "recovered" if self.perturbed else "iatrogenic"


def arms_of(config: RecoverConfig, perturbed: bool) -> list[Arm]:
    """Return the arms of a study, those that judge the detector first."""
    roads = ("forced", "free") if config.decode == "both" else (config.decode,)
    found: list[Arm] = []
    for road in roads:
        found += [Arm(base, road, base == "perturbed") for base in ("clean", "perturbed")[: 1 + perturbed]]
    for road in roads:
        for mode in config.mode:
            if mode == "none" or (road == "forced" and not _acts_on_states(mode)):
                continue
            if perturbed:
                for timing in config.timings if _timed(mode) else ("detector",):
                    suffix = "" if timing == "detector" else f".{timing}"
                    found.append(Arm(f"perturbed+{mode}{suffix}", road, True, mode, timing))
                    if _writes(mode):
                        found.append(Arm(f"perturbed+random:{mode}{suffix}", road, True, mode, "replay"))
            if mode not in ("sham", "passive"):
                found.append(Arm(f"clean+{mode}", road, False, mode, "detector"))
    return found


def _sample(mode: str) -> list[Controller]:
    # dom is str with operators of its own, which are read from their file when it is made.
    return make_mode("str" if mode == "dom" else mode, Never)


def _acts_on_states(mode: str) -> bool:
    """Whether a mode changes states, so that it does something to a text that is given."""
    return any(_on_states(c) for c in _sample(mode))


def acts_by_itself(mode: str, decode: str) -> bool:
    """Whether some part of a mode has a trigger of its own and does not wait for the detector.

    Example:
        >>> acts_by_itself("slerp", "free"), acts_by_itself("hybrid", "free"), acts_by_itself("hybrid", "forced")
        (False, True, False)
    """
    acting = [c for c in _sample(mode) if decode == "free" or _on_states(c)]
    return any(not isinstance(getattr(c, "timing", None), Never) for c in acting)


def _on_states(controller: Controller) -> bool:
    return type(controller).act is not Controller.act


def takes_back(mode: str) -> bool:
    """Whether a mode may ask for tokens to be taken back."""
    return any(controller.restarts for controller in _sample(mode))


def _idles(controller: Controller) -> bool:
    """Whether it only goes through the motions."""
    return isinstance(controller, Recovery) and (controller.actuator is None or controller.sham)


def _timed(mode: str) -> bool:
    """Whether another timing than the detector's makes sense."""
    return any(isinstance(getattr(c, "timing", None), Never) and not _idles(c) for c in _sample(mode))


def _writes(mode: str) -> bool:
    """Whether there are writes whose energy can be replayed."""
    return any(_on_states(c) and not _idles(c) for c in _sample(mode))


@dataclass(eq=False)
class ArmResult:
    """What one arm gave.

    Attributes:
        arm: Which arm.
        passages: The measured rows in order, with what wrote the noise; one passage unless rows were run one by one.
        actions: What the controllers did, by row and position.
        rows: One line per row: what the detector saw and what was done.
    """

    arm: Arm
    passages: list[tuple[Passage, list[PerturbWriter]]]
    actions: pd.DataFrame
    rows: pd.DataFrame

    def of_row(self, row: int) -> ArmResult:
        """The actions of one row, as those of a batch of one."""
        mine = self.actions[self.actions["row"] == row].assign(row=0)
        return ArmResult(self.arm, [], mine, self.rows.iloc[row : row + 1])


@dataclass(eq=False)
class Arms:
    """Runs arms over one batch.

    Attributes:
        subject: The model.
        config: The settings.
        calibration: Levels of the detector, statistics of actuators.
        perturbs: The noise.
        push: Makes fresh writers of the noise.
    """

    subject: Subject
    config: RecoverConfig
    calibration: Calibration
    perturbs: Sequence[Perturb]
    push: Callable[[], list[PerturbWriter]]
    theta: float | None = None

    def run(self, arm: Arm, texts: Sequence[Text], replayed: ArmResult | None = None) -> ArmResult:
        """Run one arm.

        Args:
            arm: Which.
            texts: Rows; their continuation is read in forced arms.
            replayed: For a random control the arm whose energies it replays.
        """
        controllers = self._controllers(arm, replayed)
        if any(c.restarts for c in controllers):  # rows go back by themselves, so they are written by themselves
            of_rows = [None if replayed is None else replayed.of_row(i) for i in range(len(texts))]
            alone = [self._controllers(arm, mine) for mine in of_rows]
            return _joined([self._together(arm, [text], made) for text, made in zip(texts, alone, strict=True)])
        return self._together(arm, texts, controllers)

    def check(self, arm: Arm) -> None:
        """Refuse what an arm's controllers would refuse.

        Raises:
            CalibrationError: If the calibration lacks what a controller needs.
            UsageError: If a controller can do nothing under these settings.
        """
        controllers = self._controllers(arm, None)
        for controller in controllers:
            Steering(controller, self.subject, self.calibration)
        reason = why_not(controllers, self._sampling) if arm.decode == "free" else None
        if reason is not None:
            raise UsageError(f"mode {arm.mode}: {reason}")
        if any(controller.restarts for controller in controllers):
            check_takes_back(self.subject)

    def once(self, texts: Sequence[Text]) -> Passage:
        """The clean texts in one forward: what differs from the clean stream is arithmetic."""
        return forced(self.subject, texts, side="left", theta=self.theta, which=self._which)

    @property
    def _which(self) -> tuple[str, ...]:
        return (*metrics.DEFAULT, *self.config.metrics)

    def _timing(self, arm: Arm) -> Timing:
        if arm.timing == "always":
            return Always(self.config.gain)
        if arm.timing == "oracle":
            return Oracle(tuple(self.perturbs), self.config.gain)
        return self.config.deadband()

    def _controllers(self, arm: Arm, replayed: ArmResult | None) -> list[Controller]:
        if arm.mode is None:
            return []
        name = arm.mode.removeprefix("random:")
        made = make_mode(name, partial(self._timing, arm), site=self.config.site, operators=self.config.operators)
        if (
            arm.timing == "replay"
        ):  # only the direction of the writes is another: what else a mode does, its control does
            assert replayed is not None
            replay: list[Controller] = [Replay(replayed.actions, name, self.config.seed)]
            made = replay + [c for c in made if not _on_states(c)]
        return [c for c in made if _on_states(c)] if arm.decode == "forced" else made

    @property
    def _sampling(self) -> Sampling:
        config = self.config
        return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed, 0, config.stop_at_eos)

    def _together(self, arm: Arm, texts: Sequence[Text], controllers: list[Controller]) -> ArmResult:
        remember = any(c.restarts for c in controllers)
        acting = [Steering(c, self.subject, self.calibration, remember=remember) for c in controllers]
        watcher = Steering(
            Recovery(self.config.deadband(), None, name="passive"), self.subject, self.calibration, remember=remember
        )
        writers = self.push() if arm.perturbed else []
        stack = [*writers, *acting, watcher]
        restarts: list[list[Any]] = [[] for _ in texts]

        def write(subject: Subject, batch: Batch, sampling: Sampling, instrument: Instrument) -> list[list[int]]:
            written = generate_with(subject, batch, sampling, instrument, [*acting, watcher])
            restarts[:] = written.restarts
            return written.new

        settings: dict[str, Any] = {"theta": self.theta, "which": self._which}
        if arm.decode == "forced":
            passage = streamed(self.subject, texts, stack, **settings)
        else:
            passage = free(self.subject, texts, self._sampling, stack, write=write, remember=remember, **settings)
        watched = watcher.actions()
        done = all_actions([(s.name, s.actions()) for s in acting], watched)
        rows = row_lines(
            passage.texts, done, watched, restarts, signal=self.config.detector, m=self.config.m, level=self._lower
        )
        return ArmResult(arm, [(passage, writers)], done, rows)

    @property
    def _lower(self) -> float:
        return self.calibration.quantile(self.config.detector, self.config.q_lo)


def _joined(parts: Sequence[ArmResult]) -> ArmResult:
    """Rows that were run one by one, under their numbers in the batch."""
    actions = pd.concat([p.actions.assign(row=i) for i, p in enumerate(parts)], ignore_index=True)
    rows = pd.concat([p.rows for p in parts], ignore_index=True)
    return ArmResult(parts[0].arm, [passage for p in parts for passage in p.passages], actions, rows)
