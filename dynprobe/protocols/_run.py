"""``run``: clean, sham and perturbed arms over prompts, stored as a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from dynprobe.probes import Calibration, Subject
from dynprobe.protocols._arms import Text, forced
from dynprobe.protocols._batch import BatchRunner, Produced
from dynprobe.protocols._call import Call
from dynprobe.protocols._conditions import Push, conditions_table
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._disk import refuse_full_disk
from dynprobe.protocols._execute import Begin, Listener, Progress, execute
from dynprobe.protocols._halving import state_bytes
from dynprobe.protocols._memory import memory_plan
from dynprobe.protocols._plan import Estimate, estimate, plan_batches
from dynprobe.protocols._prepare import Prepared, configured, prepare
from dynprobe.protocols._summary import asked_columns, summarise
from dynprobe.runs import Run, RunWriter

__all__ = ["plan", "run"]


def run(
    model: str | nn.Module | Subject,
    prompts: Sequence[Any] | Path | None = None,
    *,
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Run prompts through a model, clean and perturbed, and store what happened.

    The arms are: clean; sham (α = 0 through the whole write path, equal to clean bit for bit); the perturbation
    teacher-forced on the clean text, which carries all paired columns; and the perturbation writing its own text.

    Args:
        model: Hub id, folder, GGUF file, known name, module, or subject.
        prompts: Texts, token ids or :class:`dynprobe.prompts.Prompt`, or a :class:`pathlib.Path` to a file of them;
            default the 24 built-in ones.
        listener: Called with :class:`Progress`.
        **settings: Any field of :class:`RunConfig`: ``perturb``, ``max_new_tokens``, ``out``, ``states``, ….

    Returns:
        The run, complete.

    Raises:
        RunFolderError: If its states would not fit on the disk.
        UsageError: If a setting is wrong.
        SelfTestError: If a self-test shows that no number could be trusted.
        InterruptedRunError: If it was stopped by the user; the same call continues it.

    Example:
        >>> import tempfile
        >>> from dynprobe.testing import tiny_llama
        >>> with tempfile.TemporaryDirectory() as out:
        ...     done = run(tiny_llama(), [[5, 6, 7, 8], [9, 10, 11]], perturb="alpha=0.1", max_new_tokens=4, out=out)
        ...     sorted(done.samples["condition_id"].unique())
        ['clean', 'perturbed.forced', 'perturbed.free', 'sham']
    """
    if listener is not None:
        listener(Progress("load"))
    if settings.get("remote"):
        from dynprobe.protocols._remote_run import run_remote

        if isinstance(prompts, Path):
            prompts, settings = None, {**settings, "prompts": str(prompts)}
        return run_remote(model, prompts, *configured(model, settings, RunConfig), listener)
    ready, begin = open_run(model, prompts, settings)
    if ready.saved and ready.finished() is None:
        refuse_full_disk(ready, _cost(ready, measure=False).state_bytes)
    return execute(ready, begin, listener, Call("run", model, settings))


def open_run(model: Any, prompts: Any, settings: Mapping[str, Any]) -> tuple[Prepared, Begin]:
    """Everything of a run but its units."""
    ready = prepare(model, prompts, settings)
    return ready, lambda calibration, exact: _Arms(ready, calibration, exact)


@dataclass(eq=False)
class _Arms:
    """The experiment: every batch of prompts under every arm."""

    ready: Prepared
    calibration: Calibration | None
    exact: bool

    def __post_init__(self) -> None:
        ready = self.ready
        push = Push(ready.subject, ready.perturbs, self.calibration) if ready.perturbs else None
        self.runner = BatchRunner(
            ready.subject, ready.config, ready.prompts, ready.rows, push, self.calibration, self.exact,
            ready.config.measured_span, ready.saved,
        )  # fmt: skip

    def plan(self) -> list[list[int]]:
        """Return the prompts of each batch."""
        return _batches(self.ready, self.exact)

    def conditions(self) -> pd.DataFrame:
        """Return the arms."""
        return conditions_table(self.ready.config, self.ready.perturbs)

    def work(self, unit: Sequence[int], early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Run all arms of one batch."""
        self.runner.early = early
        return self.runner.run(unit)

    def rows_of(self, unit: Sequence[int]) -> Sequence[int]:
        """Return the prompts of a batch."""
        return unit

    def with_rows(self, unit: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Return the batch of some of its prompts."""
        return list(rows)

    def first_look(self, samples: pd.DataFrame) -> dict[str, Any]:
        """Summarise the first forced arms."""
        return summarise(samples)

    def summarise(self, run: Run, writer: RunWriter) -> dict[str, Any]:
        """Summarise all arms."""
        return {"conditions": summarise(run.samples, asked_columns(run))}


def _batches(ready: Prepared, exact: bool) -> list[list[int]]:
    """Group the prompts of a run."""
    subject, config = ready.subject, ready.config
    return plan_batches(
        [len(r) for r in ready.rows], max_new_tokens=config.max_new_tokens, n_layers=subject.n_layers,
        dim=subject.width, vocab=subject.vocab_size or 1, batch_size=config.batch_size, exact=exact,
    )  # fmt: skip


def plan(
    model: str | nn.Module | Subject,
    prompts: Sequence[Any] | Path | None = None,
    *,
    measure: bool = True,
    **settings: Any,
) -> Estimate:
    """Say what a run would cost before it starts: rows, bytes, forwards, seconds.

    Args:
        model: As for :func:`run`.
        prompts: As for :func:`run`.
        measure: Time one short forward and one decode step, with their metrics, on this machine; without it seconds
            are None.
        **settings: As for :func:`run`.

    Returns:
        The estimate.
    """
    return _cost(prepare(model, prompts, settings), measure)


def _cost(ready: Prepared, measure: bool) -> Estimate:
    subject, config, perturbed = ready.subject, ready.config, bool(ready.perturbs)
    lengths = [len(r) for r in ready.rows]
    n_layers, dim, vocab = subject.n_layers, subject.width, subject.vocab_size or 1
    batches = _batches(ready, config.padding == "none")
    per_token = per_step = None
    if measure:
        rows = [ready.rows[i] for i in batches[0]]
        which = config.measured_metrics
        per_token = _seconds(subject, rows, which) / sum(len(r) for r in rows)
        per_step = _seconds(subject, [r[:1] for r in rows], which)
    cost = estimate(
        lengths, batches, max_new_tokens=config.max_new_tokens, num_samples=config.num_samples,
        n_layers=n_layers, dim=dim, vocab=vocab,
        forced_arms=3 if perturbed else 1, free_arms=(1 + perturbed) if config.max_new_tokens else 0,
        state_sites=len(ready.saved), update_sites=sum(c in ("attn_out", "mlp_out") for c, _ in ready.saved),
        itemsize=torch.empty(0, dtype=subject.dtype).element_size(),
        tokens_per_second=None if per_token is None else 1 / per_token,
        steps_per_second=None if per_step is None else 1 / per_step,
    )  # fmt: skip
    units = [[lengths[i] + config.max_new_tokens for i in batch] for batch in batches]
    memory = memory_plan(subject, units, generated=config.max_new_tokens > 0, kept=state_bytes(ready))
    return replace(
        cost, memory_bytes=memory.unit_bytes, weight_bytes=memory.weight_bytes, free_bytes=memory.free_bytes,
        rows_at_once=memory.rows_at_once,
    )  # fmt: skip


def _seconds(subject: Subject, rows: Sequence[Sequence[int]], which: Sequence[str]) -> float:
    """Time of one forward with its metrics, after a first one that warms up."""
    texts = [Text(str(number), tuple(row)) for number, row in enumerate(rows)]
    begun = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        forced(subject, texts, which=which)  # a device has finished when the metrics are here
    return max(time.perf_counter() - begun, 1e-6)
