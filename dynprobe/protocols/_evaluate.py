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

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Perturb, PerturbWriter, Subject, Writer
from dynprobe.probes._perturb import parse_many
from dynprobe.probes._subject import evaluating
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._conditions import OWN_UNIT, resolve_perturbations, yardstick
from dynprobe.protocols._evaluate_asked import Asked, asked_of, harness_model, subject_of
from dynprobe.protocols._evaluate_config import EvaluateConfig
from dynprobe.protocols._evaluate_rows import item_facts, items_table, samples_table
from dynprobe.protocols._evaluate_summary import summary_of
from dynprobe.protocols._execute import Listener, Progress, execute
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
        controllers: What acts in the controlled arms: :class:`dynprobe.controllers.Controller` objects, writers (with
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
    config, given = _configured(
        model, perturb, controllers, tasks=_several(tasks), include_path=_several(include_path), limit=limit,
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
        if perturb.scale in ("interp", "isokl"):
            raise UsageError(
                f"scale={perturb.scale} needs clean states of every batch, which the harness's calls do not have; take "
                "relnorm, coordstd, mad, cov or abs"
            )
    for controller in controllers:
        _refuse(controller)
    config = config.model_copy(update={"content": asked.content})
    ready = _Ready(subject, config, asked.prompts, asked.rows, perturbs, (), isinstance(model, str), asked.metrics)
    return execute(
        ready, lambda calibration, exact: _Evaluate(ready, harness, asked, calibration, exact, controllers, listener),
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
        controllers=tuple(_told(controller) for controller in controllers), **settings,
    )  # fmt: skip
    config.refuse()
    return config, items


def _told(controller: Any) -> str:
    """A controller in words; what has none is like no other, so that no finished run is taken for it."""
    name = str(getattr(controller, "id", "") or type(controller).__name__)
    if dataclasses.is_dataclass(controller) and not isinstance(controller, type):
        values = [getattr(controller, f.name) for f in dataclasses.fields(controller)]
        if all(value is None or isinstance(value, str | int | float) for value in values):
            return f"{name} {controller!r}"
    return f"{name} {uuid.uuid4().hex[:12]}"


def _refuse(controller: Any) -> None:
    """Refuse what cannot control."""
    from dynprobe.controllers import Controller

    if isinstance(controller, Controller):
        if controller.restarts:
            raise UsageError(f"{controller.id} takes tokens back, which the harness's loop cannot do; use dp.recover")
    elif not _is_writer(controller) and not callable(controller):
        raise UsageError(
            f"{controller!r:.80} cannot control: give a Controller, a writer with sites and write(state, site, step), "
            "or a function of the subject that returns a context manager"
        )


def _is_writer(controller: Any) -> bool:
    return hasattr(controller, "sites") and hasattr(controller, "write")


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
            nothing = not steered and all(p.alpha == 0 for p in ready.perturbs)
            lm = harness_model(
                subject, batch_size=1 if self.exact else ready.config.batch_size, writers=writers, harmless=nothing,
                stepwise=steered, heard=_Heard(unit, self.listener),
            )  # fmt: skip
            found = self.harness.score(lm)
        items = items_table(found["samples"], self.asked.kinds, unit)
        samples = samples_table(items, unit, lm.books, self.asked.n_prompt, written=written, steered=steered)
        facts = {
            "arm": unit, "results": _numbers(found["results"]), "groups": _numbers(found.get("groups") or {}),
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
            elif _is_writer(controller):
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
            "documents": len(self.asked.prompts), "arms": arms, "tasks": summary_of(run.table("items"), self.plan()),
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


def _numbers(results: Any) -> dict[str, Any]:
    """The harness's numbers by task, without its texts."""
    return {
        str(task): {str(name): value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results.items()
    }
