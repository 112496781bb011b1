"""``attract``: what a decaying memory does to a frozen model, against everything it could be mistaken for.

A claim about such a layer needs four things that the first reports did not have. *A dose*: ε is solved for a ladder of
mean KL(bare ‖ layer) on texts that are read, and that table comes first. *Rivals*: a constant vector, random slots,
frozen slots, a leaky mean, a Hopfield read, fast weights and a cache get the same ε. *Length*: texts are long, nothing
ends them, and every measure is taken at several lengths. *A clean start*: every item begins with an empty memory, and
leakage from item to item is an arm of its own. What is reported is the paired difference to the bare model over
prompts, and the dose at which long generation breaks down, or the largest that was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from dynprobe.controllers.attractor import AttractorSite
from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Perturb, Sampling, Subject, generate, make_batch
from dynprobe.prompts import Prompt, passages
from dynprobe.protocols._arms import Text
from dynprobe.protocols._attract_arms import Condition, Sites, conditions_of
from dynprobe.protocols._attract_columns import attract_facts
from dynprobe.protocols._attract_config import UNDOSED, AttractConfig
from dynprobe.protocols._attract_doses import Dose, DoseTexts, solve_doses
from dynprobe.protocols._attract_items import Asked, answer_arm, recall_items, story_items
from dynprobe.protocols._attract_rows import write_arm, written_tables
from dynprobe.protocols._attract_summary import attract_summary, dose_entries, dose_table
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._execute import Listener, Progress, execute
from dynprobe.protocols._plan import plan_batches
from dynprobe.protocols._prepare import Prepared, prepare
from dynprobe.protocols._prompts import answer_tokens, token_rows
from dynprobe.protocols._tables import Labels
from dynprobe.runs import Run, RunWriter

__all__ = ["attract"]

_PROMPTS = 24
#: Most rows that answer questions together; their prompts are long.
_ITEM_ROWS = 8


def attract(
    model: str | nn.Module | Subject,
    prompts: Sequence[Any] | Path | None = None,
    *,
    task: str = "generate",
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Study the attractor layer on a model: doses, arms, long texts, reading, recall.

    For each dose KL* the strength ε solves mean_t KL(p_bare(·|x_<t) ‖ p_layer(·|x_<t)) = KL* over tokens past burn-in
    of texts that are read. Then every arm writes (or answers) with that ε.

    Args:
        model: Hub id, folder, known name, module, or subject.
        prompts: Texts or prompts to write on from; default built-in passages. Tasks ``reading`` and ``recall`` bring
            their own.
        task: ``generate``: long texts, measured at several lengths. ``reading``: questions about stories. ``recall``:
            names over a distance.
        listener: Called with :class:`dynprobe.protocols.Progress`.
        **settings: Any field of :class:`AttractConfig`: ``arms``, ``doses``, ``slots``, ``half_life``, ``layers``,
            ``burn_in``, ``max_new_tokens``, ….

    Returns:
        The run. ``run.summary["doses"]`` is the table dose → ε → KL, ``run.summary["lengths"]`` every measure of every
        arm at every length with its paired difference to the bare model, ``run.summary["breakdown"]`` the dose at which
        long texts break down, ``run.summary["items"]`` the accuracies of a task. Tables: ``lengths``, ``slots``,
        ``atlas``, ``tokens``, ``items``, ``trials``, ``fits``.

    Raises:
        CalibrationError: If the layer is centred on a calibration and the model has no tokenizer.
        ModelError: If the model cannot write.
        SiteError: If it has no such place.
        UsageError: If a setting is wrong, or burn-in outlasts the texts that doses are solved on.

    Example:
        >>> run = attract("smollm2-135m", doses=[0.03, 0.3], max_new_tokens=200)  # doctest: +SKIP
        >>> [(d["condition"], d["strength"], d["kl"]) for d in run.summary["doses"]]  # doctest: +SKIP
    """
    if listener is not None:
        listener(Progress("load"))
    named = any(settings.get(name) for name in ("prompt", "prompts", "category"))
    asked: list[Asked] | None = None
    if task in ("reading", "recall"):
        if prompts is not None or named:
            raise UsageError(f"task {task} brings its own texts; leave prompts out")
        stand_in = [Prompt(task, "A question.", None, "builtin")]
        ready = prepare(model, stand_in, {"max_new_tokens": 20, **settings, "task": task}, kind=AttractConfig,
                        resolve=_no_noise)  # fmt: skip
        assert isinstance(ready.config, AttractConfig)
        asked = (story_items if task == "reading" else recall_items)(ready.subject, ready.config)
        chosen = [a.prompt for a in asked]
        rows = token_rows(ready.subject, chosen, grow=ready.config.max_new_tokens)
        ready = replace(ready, prompts=chosen, rows=rows)
    else:
        if prompts is None and not named:
            prompts = passages(limit=min(_PROMPTS, settings.get("limit") or _PROMPTS))
        ready = prepare(model, prompts, {**settings, "task": task}, kind=AttractConfig, resolve=_no_noise)
    made = _Ready(**{name: getattr(ready, name) for name in Prepared.__dataclass_fields__})
    return execute(made, lambda calibration, exact: _Attract(made, asked, calibration, exact, listener), listener)


def _no_noise(subject: Subject, config: Any, given: Sequence[Perturb | str]) -> list[Perturb]:
    if given:
        raise UsageError("attract writes no noise; leave perturb out")
    return []


@dataclass(frozen=True, eq=False)
class _Ready(Prepared):
    """A study with columns of its own."""

    def columns(self) -> dict[str, dict[str, str]]:
        """Return what is known of the columns."""
        return super().columns() | attract_facts()


@dataclass(eq=False)
class _Attract:
    """The experiment: doses before anything else, then every arm on every batch."""

    ready: Prepared
    asked: Sequence[Asked] | None
    calibration: Calibration | None
    exact: bool
    listener: Listener | None

    def __post_init__(self) -> None:
        config = self.ready.config
        assert isinstance(config, AttractConfig)
        self.config: AttractConfig = config
        self.subject = self.ready.subject
        self.sites = Sites(self.subject, config)
        self.asked_for = conditions_of(config)
        for condition in self.asked_for:  # what is refused is refused before anything is run
            self.sites.steerings(condition)

    @cached_property
    def doses(self) -> list[Dose]:
        """Every arm with its strength."""
        found = solve_doses(self._dose_texts, self.asked_for, match=self.config.match, largest=self.config.largest)
        if self.listener is not None:
            self.listener(Progress("doses", summary={"doses": dose_entries(found)}))
        return found

    @cached_property
    def _dose_texts(self) -> DoseTexts:
        config = self.config
        if self.config.task == "generate":
            prompts, rows = self.ready.prompts, self.ready.rows
        else:  # a dose is one of ordinary text, whatever the task
            prompts = passages(limit=config.dose_texts)
            rows = token_rows(self.subject, prompts, grow=config.dose_tokens)
        chosen = list(zip(prompts, rows, strict=True))[: config.dose_texts]
        return DoseTexts(self.subject, self.sites, [self._continued(p, r) for p, r in chosen])

    def _continued(self, prompt: Prompt, row: Sequence[int]) -> Text:
        """A prompt with the text that really follows it, else with what the bare model writes."""
        n = self.config.dose_tokens
        if prompt.continuation is not None:
            asked = replace(prompt, answer=prompt.continuation)
            following = answer_tokens(self.subject, asked, list(row), self.config.chat_template)[:n]
        else:
            batch = make_batch(self.subject, [list(row)], side="left", row_keys=[prompt.prompt_id])
            following = tuple(generate(self.subject, batch, Sampling(n, stop_at_eos=False))[0])
        return Text(prompt.prompt_id, tuple(row), tuple(following))

    @property
    def _run(self) -> list[Dose]:
        """Arms that are run: those whose dose was reached."""
        return [d for d in self.doses if d.status != "unreached"]

    def plan(self) -> list[Any]:
        """Return units: the doses, then each arm on each batch, the bare model first."""
        n = self.config.max_new_tokens
        batches = plan_batches(  # logits are reduced as they come, so only states count
            [len(r) for r in self.ready.rows], max_new_tokens=n, n_layers=self.subject.n_layers,
            dim=self.subject.width, vocab=1,
            batch_size=_ITEM_ROWS if self.asked is not None and self.config.batch_size == "auto"
            else self.config.batch_size,
            exact=self.exact, early=False,
        )  # fmt: skip
        units: list[Any] = [{"part": "doses"}]
        for number, dose in enumerate(self.doses):
            if dose.status == "unreached":
                continue
            if dose.condition.reset == "never":  # a memory that goes from item to item makes one row after the other
                units.append({"part": number, "replicate": 0, "rows": list(range(len(self.ready.rows)))})
                continue
            for replicate in range(self.config.num_samples if self.asked is None else 1):
                units += [{"part": number, "replicate": replicate, "rows": batch} for batch in batches]
        return units

    def conditions(self) -> pd.DataFrame:
        """Return one condition per arm, settings and dose that was reached."""
        rows = []
        for dose in self._run:
            c = dose.condition
            rows.append({
                "condition_id": c.condition_id, "arm": c.arm, "decode_mode": "free",
                "controller": "" if c.arm == "none" else f"attractor.{c.arm}",
                "alpha": 0.0 if c.arm in UNDOSED else c.strength,
                "scale": c.cell.settings.inject, "where": f"layers={c.cell.layers},component={c.cell.settings.site}",
                "seed": self.config.seed, "temperature": 1.0 if c.sampled else self.config.temperature,
                "top_p": 1.0 if c.sampled else self.config.top_p,
                "max_new_tokens": self.config.max_new_tokens,
                "params": {**c.cell.settings.as_dict(), "strength": c.strength, "dose": c.dose, "kl": dose.kl,
                           "reset": c.reset},
            })  # fmt: skip
        return pd.DataFrame(rows)

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Solve the doses, or run one arm on one batch."""
        if unit["part"] == "doses":
            assert self.doses
            return Produced({"trials": pd.DataFrame(self._dose_texts.trials)})
        condition, chosen = self.doses[unit["part"]].condition, unit["rows"]
        if self.asked is not None:
            return Produced(answer_arm(self.subject, self.sites, condition, [self.asked[i] for i in chosen]))
        prompts = [self.ready.prompts[i] for i in chosen]
        texts = [Text(p.prompt_id, tuple(self.ready.rows[i])) for p, i in zip(prompts, chosen, strict=True)]
        theta = self._theta
        written = write_arm(self.subject, self.sites, condition, texts, unit["replicate"], theta)
        tokenizer = self.subject.tokenizer
        decoded = [None if tokenizer is None else tokenizer.decode(list(t.new)) for t in written.passage.texts]
        labels = Labels(
            condition.condition_id, [p.prompt_id for p in prompts], [p.category for p in prompts],
            unit["replicate"], decoded,
        )  # fmt: skip
        return Produced(written_tables(self.config, self.subject, condition, written, labels, theta))

    @property
    def _theta(self) -> float | None:
        known = self.calibration is not None and "limen_ct" in self.calibration.signals
        return self.calibration.quantile("limen_ct", 0.9) if known and self.calibration is not None else None

    def first_look(self, samples: pd.DataFrame) -> dict[str, Any]:
        """There is no first table: the doses are said when they are known."""
        return {}

    def summarise(self, run: Run, writer: RunWriter) -> dict[str, Any]:
        """Doses, lengths, breakdown, items."""
        writer.write_table("fits", dose_table(self.doses))
        sites = [
            {"cell": cell.name, "site": f"{s.site[0]}.{s.site[1]}", "theta": s.theta}
            for cell in self.config.cells
            for s in self.sites.controllers(Condition("layer", cell))
            if isinstance(s, AttractorSite)
        ]
        return {
            "protocol": "attract",
            "task": self.config.task,
            "sites": sites,
            **attract_summary(run, self.config, self.doses),
        }
