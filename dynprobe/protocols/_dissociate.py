"""``dissociate``: do the dynamics come back while the meaning stays away?

A loop that pulls states towards their neighbours makes trajectories look healthy, whether or not the model makes sense
again. So both sides are measured on the same runs: items with choices whose question is fed token by token, with noise
on it and a controller at work, give an answer (the semantic side) and a trajectory (the dynamic side).

The dose is the task's own: first the same items are answered at every strength of a ladder, and the strength at which
accuracy has fallen by 0.2 is the one that recovery is judged at; a dose at which nothing is lost leaves nothing to
recover, and is refused. Then come the arms, and for each mode the joint verdict ``COUPLED``, ``DISSOCIATED`` (which has
to be shown, by two one-sided tests) or ``INDETERMINATE``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Perturb, Subject
from dynprobe.prompts import Item, Prompt
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._conditions import resolve_perturbations
from dynprobe.protocols._dissociate_asked import items_of, noise_of
from dynprobe.protocols._dissociate_config import DissociateConfig
from dynprobe.protocols._dissociate_summary import dissociation_summary
from dynprobe.protocols._execute import Listener, Progress, execute
from dynprobe.protocols._item_arms import ItemArms, batches_of, item_arms, mode_arms, rung
from dynprobe.protocols._item_dose import dose_of
from dynprobe.protocols._item_rows import Question, content_of, item_facts, item_values, questions_of
from dynprobe.protocols._item_tables import ONCE, ItemTables
from dynprobe.protocols._prepare import Prepared, prepare
from dynprobe.protocols._prompts import learned_positions
from dynprobe.protocols._recover import no_calibration
from dynprobe.protocols._recover_arms import Arm, ArmResult
from dynprobe.protocols._recover_config import Modes
from dynprobe.protocols._streams import check_streams
from dynprobe.runs import Run, RunWriter, open_run
from dynprobe.runs._find import find_run

__all__ = ["dissociate"]

#: Rows of a planned batch, and bytes of their states and logits: a step of many rows costs little more than one of few.
_MOST_ROWS, _BATCH_BYTES = 64, 512 * 2**20
#: Clean answers of all items are kept for the second part up to this size.
_KEPT_BYTES = 256 * 2**20


def dissociate(
    model: str | nn.Module | Subject,
    items: str | Path | Sequence[Item] | None = None,
    *,
    perturb: Any = None,
    mode: Modes = ("slerp",),
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Judge on one set of runs whether a mode brings back the dynamics, the meaning, or both.

    RF_dyn and RF_sem are recovery fractions (clean, perturbed, recovered) of a dynamic metric that no controller acts
    on and of the task's accuracy, with a joint bootstrap over items. ``COUPLED``: both 95 % intervals lie above 0.1.
    ``DISSOCIATED``: that of RF_dyn lies above 0.5 and RF_sem is equivalent to 0 within ±0.1 (TOST).
    ``INDETERMINATE``: everything else. ``DETECTOR_BLIND``: the detector never acted where it should.

    Args:
        model: Hub id, folder, known name, module, or subject; it must decode with a cache, and have a tokenizer.
        items: A built-in set (``cloze``), a ``.jsonl`` file of ``question``, ``choices``, ``answer``, or items.
        perturb: Fixes the noise and its dose; default the smallest strength of ``alphas`` that costs 0.2 of accuracy.
        mode: Recovery modes, or :class:`dynprobe.Controller` objects of your own.
        listener: Called with :class:`dynprobe.protocols.Progress`.
        **settings: Any field of :class:`DissociateConfig`: ``alphas``, ``layers``, ``dynamic``, ``timings``, ….

    Returns:
        The run. ``run.summary["verdicts"]`` has one entry per mode and timing, ``run.summary["dose_response"]`` the
        task's and the dynamics' response to α, ``run.summary["refusal"]`` why there is no semantic fraction.

    Raises:
        CalibrationError: If the model has no calibration, or the detector's band is empty.
        ModelError: If the model cannot be fed token by token.
        PromptError: If there are no such items, or a line of theirs is malformed.
        UsageError: If a setting is wrong.

    Example:
        >>> run = dissociate("smollm2-135m", limit=80)  # doctest: +SKIP
        >>> [(v["condition"], v["verdict"]) for v in run.summary["verdicts"]]  # doctest: +SKIP
    """
    if listener is not None:
        listener(Progress("load"))
    chosen = items_of(items, settings)
    source = "cloze" if items is None else str(items) if isinstance(items, str | Path) else "given"
    wanted, fixed = noise_of(perturb, settings)
    told = {"items": source, "content": content_of(chosen), "mode": mode, "perturb": wanted, "fixed": fixed}
    asked = [Prompt(i.item_id, i.question, i.category, source) for i in chosen]
    ready = prepare(model, asked, {**settings, **told}, kind=DissociateConfig, resolve=_checked)
    ready, questions = _in_tokens(ready, chosen)
    return execute(
        ready, lambda calibration, exact: _Dissociate(ready, questions, calibration, exact, listener), listener
    )


def _checked(subject: Subject, config: Any, given: Sequence[Perturb | str]) -> list[Perturb]:
    check_streams(subject)
    assert isinstance(config, DissociateConfig)
    config.refuse()
    found = resolve_perturbations(subject, config, given)
    if len(found) != 1:
        raise UsageError(f"dynprobe dissociate takes one perturbation, whose strength is the dose; found {len(found)}")
    if found[0].noise_scale.needs_clean:
        raise UsageError("dynprobe dissociate takes scales that need no other text: relnorm, coordstd, mad, cov, abs")
    if not found[0].alpha > 0:
        raise UsageError(f"alpha={found[0].alpha:g} is no dose: nothing is lost, so nothing can be recovered")
    if not mode_arms(config, found[0], config.prefill + 1)[0]:
        raise UsageError(f"mode {', '.join(config.mode)} changes no state, so it does nothing to a given text")
    return found


def _in_tokens(ready: Prepared, items: Sequence[Item]) -> tuple[Prepared, list[Question]]:
    """Items in tokens, and the study with what follows from them."""
    config, subject = ready.config, ready.subject
    assert isinstance(config, DissociateConfig)
    questions = questions_of(subject, items, ready.rows, config.prefill)
    longest = max(len(row) for q in questions for row in q.fed()[0])
    places = learned_positions(subject)
    if places is not None and longest > places:
        raise UsageError(f"the longest item has {longest} tokens; {subject.name} has {places} positions")
    known = {f.name: getattr(ready, f.name) for f in dataclasses.fields(Prepared)}
    filled = config.model_copy(update={"max_new_tokens": max(4, longest - config.prefill)})
    return _Ready(**{**known, "config": filled}), questions


@dataclass(frozen=True, eq=False)
class _Ready(Prepared):
    """A study that could begin."""

    def columns(self) -> dict[str, dict[str, str]]:
        """Return what is known of the columns that will be written."""
        return super().columns() | item_facts()


@dataclass(eq=False)
class _Dissociate:
    """The experiment: every batch of items first at every strength, then, at the dose, with every mode."""

    ready: Prepared
    questions: Sequence[Question]
    calibration: Calibration | None
    exact: bool
    listener: Listener | None

    def __post_init__(self) -> None:
        config, self.subject = self.ready.config, self.ready.subject
        assert isinstance(config, DissociateConfig)
        if self.calibration is None:
            raise no_calibration(self.subject)
        self.config, self.perturb = config, self.ready.perturbs[0]
        config.deadband().bind(self.subject, self.calibration)  # what is refused is refused before anything is run
        longest = config.prefill + config.max_new_tokens
        self.arms, self.notes = mode_arms(config, self.perturb, longest)
        runner = self._runner(self.perturb.alpha)
        for arm in self.arms:
            if arm.timing != "replay":
                runner.check(arm)
        known = "limen_ct" in self.calibration.signals
        self.theta = self.calibration.quantile("limen_ct", 0.9) if known else None
        self._clean: dict[tuple[int, ...], Tensor] = {}
        self._said = False

    @property
    def ladder(self) -> tuple[float, ...]:
        """Strengths of the dose–response, the fixed one among them."""
        fixed = (self.perturb.alpha,) if self.config.fixed else ()
        return tuple(sorted({*self.config.alphas, *fixed}))

    def _runner(self, alpha: float) -> ItemArms:
        assert self.calibration is not None
        return item_arms(self.subject, self.config, self.calibration, self.perturb, alpha)

    def plan(self) -> list[Any]:
        """Return batches, each twice: for the strengths, and for the modes."""
        rows = [q.fed()[0] for q in self.questions]
        lengths = [max(map(len, r)) for r in rows]
        most: Any = self.config.batch_size
        if most == "auto":
            per_token = 4 * ((self.subject.n_layers + 1) * self.subject.width + (self.subject.vocab_size or 1))
            most = max(1, min(_MOST_ROWS, _BATCH_BYTES // (per_token * max(lengths))))
        groups = batches_of([len(r) for r in rows], lengths, most)
        return [[part, *group] for part in (0, 1) for group in groups]

    def conditions(self) -> pd.DataFrame:
        """Return one condition per arm; the dose of those with a mode is known only after the dose–response."""
        return self._conditions(None)

    def _conditions(self, dose: float | None) -> pd.DataFrame:
        arms = [Arm("clean", "forced", False), *(rung(alpha) for alpha in self.ladder), *self.arms]
        strengths = [0.0, *self.ladder, *(dose if arm.perturbed else 0.0 for arm in self.arms)]
        rows = [{"condition_id": ONCE, "arm": "clean", "decode_mode": "forced", "alpha": 0.0}]
        for arm, alpha in zip(arms, strengths, strict=True):
            spec = self.perturb if arm.perturbed else None
            rows.append({
                "condition_id": arm.name, "arm": arm.kind, "decode_mode": "forced", "alpha": alpha,
                "controller": None if arm.mode is None else f"{arm.mode} ({arm.timing})",
                "scale": spec and spec.scale, "kind": spec and spec.kind, "where": spec and str(spec.where),
                "seed": spec and spec.seed,
                "params": [str(spec.replace(alpha=alpha))] if spec is not None and alpha is not None else None,
            })  # fmt: skip
        table = pd.DataFrame(rows)
        return table.astype({"seed": "Int64", "alpha": "float64"})

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Answer one batch of items at every strength, or with every mode at the dose."""
        part, *chosen = unit
        made = ItemTables(self.config, [self.questions[i] for i in chosen], self.theta)
        clean_arm, key = Arm("clean", "forced", False), tuple(chosen)
        if part == 0:
            runner = self._runner(0.0)
            clean = made.keep(runner.run(clean_arm, made.batch.texts), None)
            made.plain(runner, clean, alone=self.exact)
            for alpha in self.ladder:
                made.keep(self._runner(alpha).run(rung(alpha), made.batch.texts), clean)
            if len(self.questions) * clean.shape[1] * 4 <= _KEPT_BYTES:
                self._clean[key] = clean
            return Produced(made.tables())
        dose = self.dose
        if dose is None:
            return Produced({})
        self._say_dose()
        runner = self._runner(dose)
        done: dict[str, ArmResult] = {}
        if key in self._clean:
            clean = self._clean[key]
        else:  # the run was continued, or there are many items: the clean answers are needed once more
            passage, _ = runner.run(clean_arm, made.batch.texts).passages[0]
            clean = item_values(made.batch, [passage], ())[2]
        for arm in self.arms:
            result = runner.run(arm, made.batch.texts, done.get(arm.condition_id.replace("random:", "")))
            if arm.timing != "replay":  # a control replays what was written; the states would fill the memory
                done[arm.condition_id] = dataclasses.replace(result, passages=[])
            made.keep(result, clean)
        return Produced(made.tables())

    @cached_property
    def dose(self) -> float | None:
        """The strength that recovery is judged at, from the finished dose–response; None where there is none."""
        return dose_of(self._so_far(), self.ladder, self.perturb.alpha if self.config.fixed else None)

    def _so_far(self) -> Run:
        out = Path(self.ready.config.out)
        folder = out if (out / "manifest.json").is_file() else find_run(out, self.ready.ident)
        assert folder is not None
        return open_run(folder)

    def _say_dose(self) -> None:
        """Before the first mode acts, tell at which dose, and what the detector can see there."""
        if self._said or self.listener is None:
            return
        self._said = True
        found, _ = dissociation_summary(self._so_far(), self.config, self.perturb, self.ladder, (), self.dose)
        self.listener(Progress("dose", summary=found))

    def first_look(self, samples: pd.DataFrame) -> dict[str, Any]:
        """There is no first table: the dose–response is said when it is known."""
        return {}

    def summarise(self, run: Run, writer: RunWriter) -> dict[str, Any]:
        """Dose–response, detector, arms, verdicts, harm."""
        dose = dose_of(run, self.ladder, self.perturb.alpha if self.config.fixed else None)
        writer.write_table("conditions", self._conditions(dose))
        found, fits = dissociation_summary(run, self.config, self.perturb, self.ladder, self.arms, dose)
        writer.write_table("fits", fits)
        return {"protocol": "dissociate", **found, "notes": self.notes}
