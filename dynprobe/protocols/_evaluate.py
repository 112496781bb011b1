"""``evaluate``: tasks of lm-evaluation-harness on the clean, the perturbed and the controlled model.

The harness asks, samples few-shot examples, scores and aggregates; the model it asks carries our instruments. Nothing
of the harness is re-implemented: without a perturbation, and with α = 0, its numbers are those it gives by itself, to
the last digit, because it makes the same calls. Each arm asks the same questions, so arms are compared document by
document.

What this refuses: strengths that are solved for or borrowed from clean states (``isokl``, ``interp``), since the
harness's batches have no clean twin at hand; automatic batch sizes; tasks that run code; controllers that take tokens
back, which only dynprobe's own loop can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Perturb, PerturbWriter, Subject, Writer
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._perturb import parse_many
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._conditions import OWN_UNIT, resolve_perturbations, yardstick
from dynprobe.protocols._evaluate_asked import Asked, asked_of, harness_model, subject_of
from dynprobe.protocols._evaluate_config import EvaluateConfig
from dynprobe.protocols._evaluate_rows import item_facts, items_table, samples_table
from dynprobe.protocols._evaluate_summary import numbers_of, summary_of
from dynprobe.protocols._execute import Listener, Progress, execute
from dynprobe.protocols._handed import acting, by_tokens, checked, is_writer, told
from dynprobe.protocols._harness import Harness, quiet, require
from dynprobe.protocols._harness_tasks import find_tasks, refuse_unreachable
from dynprobe.protocols._prepare import Prepared
from dynprobe.runs import Run, RunWriter

__all__ = ["evaluate"]


def evaluate(
    model: str | nn.Module | Subject,
    tasks: str | Sequence[str],
    *,
    perturb: Any = None,
    attractor: Any = None,
    recover: str | None = None,
    controllers: Sequence[Any] = (),
    include_path: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 1,
    out: str | Path = "runs",
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Score a model on tasks of lm-evaluation-harness, clean, perturbed and controlled.

    Args:
        model: Hub id, folder, known name, module, or subject; with a tokenizer.
        tasks: Tasks, groups or tags; ``dynprobe_cloze``, ``dynprobe_stories_short`` and ``dynprobe_stories_long`` are
            built in.
        perturb: What to write, in the mini-language or as objects; None has no perturbed arm.
        attractor: An attractor layer for the controlled arms: its settings as text (``"slots=16,layers=50%"``), or a
            :class:`dynprobe.AttractorLayer`, which goes into the middle of the model. Every request starts with the
            layer as it was given, an empty one as a rule.
        recover: A recovery mode for the controlled arms, with settings: ``"slerp,gain=0.5,detector=entropy"``
            (:class:`dynprobe.controllers.recovery.RecoveryWords`). It acts from the second scored or written token on.
        controllers: What else acts in the controlled arms, after these: words
            (``"attractor:slots=16,layers=50%"``), :class:`dynprobe.controllers.Controller` objects, writers (with
            ``sites`` and ``write``), or functions of the subject that return a context manager, such as
            ``lambda subject: layer.attach(subject, layers=[12])``.
        include_path: Folders of task files.
        limit: First items of each task.
        num_fewshot: Examples before each item; default the task's own number.
        apply_chat_template: Wrap prompts by the tokenizer's chat template.
        batch_size: Rows per forward. It changes numbers by rounding only, and no noise.
        out: Folder of runs.
        listener: Called with :class:`dynprobe.protocols.Progress`.
        **settings: Any further field of :class:`EvaluateConfig`: ``gen_kwargs``, ``system_instruction``,
            ``fewshot_seed``, ``dtype``, ``device``, ``seed``, ….

    Returns:
        The run. ``run.table("items")`` has a row per document, filter and arm; ``run.summary["tasks"]`` the accuracy of
        each arm with its exact interval and its paired change; ``run.summary["harness"]`` the harness's own numbers.

    Raises:
        UsageError: If lm-eval is not installed, a task is unknown, or a setting is wrong.
        OfflineError: If a task's data are on the hub and it cannot be reached.
        ModelError: If the model has no tokenizer, or is none of transformers.

    Example:
        >>> run = evaluate("smollm2-135m", "dynprobe_cloze", perturb="alpha=0.3", limit=20)  # doctest: +SKIP
        >>> [(row["arm"], row["mean"]) for row in run.summary["tasks"]]  # doctest: +SKIP
    """
    if listener is not None:
        listener(Progress("load"))
    version = require()
    if recover is not None:
        controllers = [f"recover:{recover}", *controllers]
    if attractor is not None:
        controllers = [f"attractor:{attractor}" if isinstance(attractor, str) else attractor, *controllers]
    handed = checked(controllers, loop="the harness's loop")
    config, given = _configured(
        model, perturb, handed, tasks=_several(tasks), include_path=_several(include_path), limit=limit,
        num_fewshot=num_fewshot, apply_chat_template=apply_chat_template, batch_size=batch_size, out=out,
        harness=version, **settings,
    )  # fmt: skip
    parse_many(given)
    with quiet():
        manager = find_tasks(config.tasks, config.include_path)
        offline = refuse_unreachable(manager, config.tasks)
        subject = subject_of(model, config)
        harness = Harness(
            manager, config.tasks, offline, config.num_fewshot, config.fewshot_seed, config.limit,
            config.apply_chat_template, config.system_instruction, config.generation,
        )  # fmt: skip
        asked = asked_of(subject, harness)
    perturbs = resolve_perturbations(subject, config, given)
    for perturb in perturbs:
        if perturb.noise_scale.needs_clean:
            raise UsageError(
                f"scale={perturb.scale} needs clean states of every batch, which the harness's calls do not have; take "
                "relnorm, coordstd, mad, cov or abs"
            )
    actors = acting(handed, subject)
    config = config.model_copy(update={"content": asked.content})
    ready = _Ready(subject, config, asked.prompts, asked.rows, perturbs, (), isinstance(model, str), asked.metrics)
    return execute(
        ready, lambda calibration, exact: _Evaluate(ready, harness, asked, calibration, exact, actors, listener),
        listener,
    )  # fmt: skip


def _several(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (str(value),) if isinstance(value, str | Path) else tuple(str(item) for item in value)


def _configured(
    model: Any, perturb: Any, controllers: Sequence[Any], **settings: Any
) -> tuple[EvaluateConfig, list[Perturb | str]]:
    items = (
        [] if perturb is None else [perturb] if isinstance(perturb, str | Perturb) or callable(perturb) else [*perturb]
    )
    if any(callable(item) and not isinstance(item, Perturb) for item in items):
        raise UsageError("dp.evaluate stores what it did and cannot store a function; give it as a controller")
    if settings.pop("chat_template", "none") == "auto":  # the spelling of the other commands
        settings["apply_chat_template"] = True
    config = EvaluateConfig.build(
        model=str(model) if isinstance(model, str | Path) else None, perturb=tuple(map(str, items)),
        controllers=tuple(map(told, controllers)), **settings,
    )  # fmt: skip
    config.refuse()
    return config, items


@dataclass(frozen=True, eq=False)
class _Ready(Prepared):
    """An evaluation that could begin; the tasks say what more it will write."""

    metrics: tuple[str, ...] = ()

    def columns(self) -> dict[str, dict[str, str]]:
        """Return what is known of the columns, those of the tasks' metrics among them."""
        return super().columns() | item_facts(self.metrics)


@dataclass(eq=False)
class _Evaluate:
    """The experiment: one unit is an arm, since the harness pools the requests of all tasks."""

    ready: Prepared
    harness: Harness
    asked: Asked
    calibration: Calibration | None
    exact: bool
    controllers: Sequence[Any]
    listener: Listener | None

    def plan(self) -> list[Any]:
        """Return the arms."""
        return [*self._arms]

    @property
    def _arms(self) -> dict[str, tuple[bool, bool]]:
        """Arm → whether a perturbation acts, and whether the controllers do."""
        arms = {"clean": (False, False)}
        if self.ready.perturbs:
            arms["perturbed"] = (True, False)
        if self.controllers:
            arms["controlled"] = (False, True)
        if self.ready.perturbs and self.controllers:
            arms["recovered"] = (True, True)
        return arms

    def conditions(self) -> pd.DataFrame:
        """Return the arms as conditions."""
        rows = []
        for arm, (written, steered) in self._arms.items():
            specs = list(self.ready.perturbs) if written else []
            one = specs[0] if len(specs) == 1 else None
            rows.append({
                "condition_id": arm, "arm": "iatrogenic" if arm == "controlled" else arm,
                "alpha": one.alpha if one else None if specs else 0.0,
                "scale": one.scale if one and one.kind not in OWN_UNIT else None, "kind": one.kind if one else None,
                "where": str(one.where) if one else None, "seed": one.seed if one else None,
                "params": [str(p) for p in specs] or None,
                "decode_mode": "free" if "generate_until" in self.asked.kinds.values() else "forced",
                "controller": "; ".join(self.ready.config.controllers) if steered else None,  # type: ignore[attr-defined]
            })  # fmt: skip
        return pd.DataFrame(rows).astype({"seed": "Int64"})

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Let the harness score one arm."""
        written, steered = self._arms[unit]
        ready, subject = self.ready, self.ready.subject
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(evaluating(subject.model))
            writers: list[Writer] = []
            if written:
                writers += [
                    PerturbWriter(subject, p, calibration=yardstick(subject, p, self.calibration))
                    for p in ready.perturbs
                ]
            if steered:
                writers += self._steering(stack)
            # Names of rows cannot matter where no noise is drawn.
            nameless = all(p.alpha == 0 for p in ready.perturbs if written)
            causal = not steered or by_tokens(self.controllers)
            lm = harness_model(
                subject, batch_size=1 if self.exact else ready.config.batch_size, writers=writers,
                harmless=nameless and causal, stepwise=not causal, heard=_Heard(unit, self.listener),
            )  # fmt: skip
            found = self.harness.score(lm)
        items = items_table(found["samples"], self.asked.kinds, unit)
        samples = samples_table(items, unit, lm.books, self.asked.n_prompt, written=written, steered=steered)
        facts = {
            "arm": unit, "results": numbers_of(found["results"]), "groups": numbers_of(found.get("groups") or {}),
            "versions": dict(found.get("versions") or {}), "scored_without_sharing": lm.split_shared,
        }  # fmt: skip
        return Produced({"items": items, "samples": samples}, facts=facts)

    def _steering(self, stack: ExitStack) -> list[Any]:
        """Bind controllers as writers, and enter those that put themselves on the model."""
        from dynprobe.controllers import Controller, Steering

        writers = []
        for controller in self.controllers:
            if isinstance(controller, Controller):
                writers.append(Steering(controller, self.ready.subject, self.calibration))
            elif is_writer(controller):
                writers.append(controller)
            else:
                stack.enter_context(controller(self.ready.subject))
        return writers

    def first_look(self, samples: pd.DataFrame) -> dict[str, Any]:
        """There is no first table: an arm alone compares nothing."""
        return {}

    def summarise(self, run: Run, writer: RunWriter) -> dict[str, Any]:
        """Accuracy of each arm, its paired change, and the harness's own numbers."""
        facts = [fact for fact in writer.manifest.batch_facts.values() if "arm" in fact]
        samples = run.samples
        strength = [name for name in ("alpha_relnorm", "duty_cycle", "control_energy") if name in samples]
        arms = {
            str(arm): {name: float(rows[name].mean()) for name in strength if rows[name].notna().any()}
            for arm, rows in samples.groupby("condition_id", sort=False, observed=True)
        }
        return {
            "protocol": "eval", "lm_eval": self.ready.config.harness,  # type: ignore[attr-defined]
            "documents": len(self.asked.prompts), "arms": arms,
            "controllers": list(self.ready.config.controllers),  # type: ignore[attr-defined]
            "tasks": summary_of(run.table("items"), self.plan()),
            "harness": {fact["arm"]: {"results": fact["results"], "groups": fact["groups"]} for fact in facts},
        }  # fmt: skip


class _Heard:
    """Turns the calls of the harness into progress."""

    def __init__(self, arm: str, listener: Listener | None) -> None:
        self._arm, self._listener, self._rows = arm, listener, 0
        self._begun = time.perf_counter()

    def __call__(self, rows: int) -> None:
        self._rows += rows
        if self._listener is not None:
            speed = self._rows / max(time.perf_counter() - self._begun, 1e-9)
            self._listener(Progress(f"{self._arm}: {self._rows} forwards · {speed:.1f} a second"))
