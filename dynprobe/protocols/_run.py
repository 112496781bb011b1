"""``run``: clean, sham and perturbed arms over prompts, stored as a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from dynprobe.errors import InterruptedRunError, UsageError
from dynprobe.probes import Calibration, Check, Subject, logits_of, make_batch
from dynprobe.protocols._batch import BatchRunner
from dynprobe.protocols._calibrate import calibrated
from dynprobe.protocols._conditions import Push, conditions_table, written_depths, yardstick
from dynprobe.protocols._plan import Estimate, estimate, plan_batches
from dynprobe.protocols._prepare import Prepared, prepare
from dynprobe.protocols._selfchecks import all_checks, as_manifest, refuse_if_broken
from dynprobe.protocols._summary import summarise
from dynprobe.runs import Run, RunWriter, open_run

__all__ = ["Progress", "plan", "run"]


@dataclass(frozen=True)
class Progress:
    """What a listener hears while a run goes on.

    Attributes:
        stage: ``"load"``, ``"self-tests"``, ``"calibrate"``, ``"batch"``, ``"done"``.
        done: Batches finished.
        total: Batches planned.
        rows: Rows of the samples table so far in this process.
        tokens: Token rows so far in this process.
        seconds: Seconds since the batches began.
        summary: A first table over the forced arms of the first batch, and the last one over all.
        notes: What a person should know.
    """

    stage: str
    done: int = 0
    total: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    summary: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()


Listener = Callable[[Progress], None]


def _nobody(_: Progress) -> None:
    """Listen to nothing."""


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
    tell = listener if listener is not None else _nobody
    tell(Progress("load"))
    ready = prepare(model, prompts, settings)
    done = ready.finished()
    if done is not None:
        tell(Progress("done", notes=(f"already done: {done.path}",)))
        return done
    tell(Progress("calibrate"))
    calibration = _calibration(ready)
    tell(Progress("self-tests"))
    tried = next((p for p in ready.perturbs if p.scale not in ("interp", "isokl")), None)
    known = None if tried is None else yardstick(ready.subject, tried, calibration)
    checks = all_checks(ready.subject, ready.rows, tried, known)
    broken = refuse_if_broken(checks)
    if "readout" in broken and ready.config.lens:
        raise UsageError("--lens needs the readout self-test to pass, and it failed on this model; leave --lens out")
    writer = ready.begin()
    if writer.status == "complete":  # another process finished it meanwhile
        return open_run(writer.folder)
    try:
        with writer:
            _work(writer, ready, calibration, checks, "alone" in broken, tell)
    except KeyboardInterrupt as stop:
        raise InterruptedRunError(f"interrupted; the same command continues {writer.folder}") from stop
    return open_run(writer.folder)


def _calibration(ready: Prepared) -> Calibration | None:
    """The subject's calibration; without a tokenizer the built-in texts cannot be read, and what needs one is NaN."""
    if ready.subject.tokenizer is None:
        return None
    covariances = [depth for p in ready.perturbs if p.scale == "cov" for depth in written_depths(ready.subject, p)]
    return calibrated(ready.subject, cov_depths=covariances)


def _work(
    writer: RunWriter, ready: Prepared, calibration: Calibration | None, checks: dict[str, Check], alone: bool,
    tell: Listener,
) -> None:  # fmt: skip
    subject, config, prompts, rows = ready.subject, ready.config, ready.prompts, ready.rows
    if calibration is not None:
        calibration.save(writer.folder / "calibration" / calibration.hash)
    exact = config.padding == "none" or alone
    batches = writer.manifest.batch_plan
    if not isinstance(batches, list):
        batches = plan_batches(
            [len(r) for r in rows], max_new_tokens=config.max_new_tokens, n_layers=subject.n_layers,
            dim=subject.dim or 1, vocab=subject.vocab_size or 1, batch_size=config.batch_size, exact=exact,
        )  # fmt: skip
    writer.update(
        self_tests=as_manifest(checks),
        noise_floor={k: checks["alone"].detail[k] for k in ("noise_floor", "kappa_phase")},
        calibration_hash=calibration.hash if calibration is not None else None,
        batch_plan=batches,
        exact_length_batches=exact,
    )
    if exact and config.padding != "none":
        writer.event("exact-lengths", why="self-test alone failed; padded rows would differ from rows alone")
    writer.write_table(
        "prompts",
        pd.DataFrame(
            {
                "prompt_id": [p.prompt_id for p in prompts], "text": [p.text for p in prompts],
                "token_ids": [list(r) for r in rows], "category": [p.category for p in prompts],
                "source": [p.source for p in prompts],
            }
        ),
    )  # fmt: skip
    writer.write_table("conditions", conditions_table(config, ready.perturbs))
    push = Push(subject, ready.perturbs, calibration) if ready.perturbs else None
    runner = BatchRunner(subject, config, prompts, rows, push, calibration, exact, config.measured_span, ready.saved)
    _batches(writer, runner, batches, tell)


def _batches(writer: RunWriter, runner: BatchRunner, batches: Sequence[Sequence[int]], tell: Listener) -> None:
    started, n_rows, n_tokens = time.perf_counter(), 0, 0
    dtype = str(runner.subject.dtype).removeprefix("torch.")
    tell(Progress("batch", len(writer.finished), len(batches)))

    def first_table(samples: pd.DataFrame) -> None:
        # One table early; the last is made from the disk. In between nothing is kept in memory.
        tell(Progress("batch", len(writer.finished), len(batches), summary=summarise(samples)))

    runner.early = first_table if tell is not _nobody else None
    for number, batch in enumerate(batches):
        if number in writer.finished:
            continue
        begun = time.perf_counter()
        made = runner.run(batch)
        for keys, states in made.states:
            writer.write_states(number, keys, states, dtype)
        writer.write_batch(number, made.tables)
        rows = len(made.tables["samples"])
        n_rows, n_tokens = n_rows + rows, n_tokens + len(made.tables["tokens"])
        writer.event("batch", number=number, rows=rows, seconds=round(time.perf_counter() - begun, 3))
        tell(Progress("batch", len(writer.finished), len(batches), n_rows, n_tokens, time.perf_counter() - started))
    final = summarise(open_run(writer.folder).samples)
    writer.finish({"conditions": final, "seconds": round(time.perf_counter() - started, 2)})
    tell(Progress("done", len(batches), len(batches), n_rows, n_tokens, time.perf_counter() - started, final))


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
        measure: Time one short forward and one decode step on this machine; without it seconds are None.
        **settings: As for :func:`run`.

    Returns:
        The estimate.
    """
    ready = prepare(model, prompts, settings)
    subject, config, perturbed = ready.subject, ready.config, bool(ready.perturbs)
    lengths = [len(r) for r in ready.rows]
    n_layers, dim, vocab = subject.n_layers, subject.dim or 1, subject.vocab_size or 1
    batches = plan_batches(
        lengths, max_new_tokens=config.max_new_tokens, n_layers=n_layers, dim=dim, vocab=vocab,
        batch_size=config.batch_size, exact=config.padding == "none",
    )  # fmt: skip
    per_token = per_step = None
    if measure:
        rows = [ready.rows[i] for i in batches[0]]
        per_token = _seconds(subject, rows) / sum(len(r) for r in rows)
        per_step = _seconds(subject, [r[:1] for r in rows])
    return estimate(
        lengths, batches, max_new_tokens=config.max_new_tokens, num_samples=config.num_samples,
        n_layers=n_layers, dim=dim, vocab=vocab,
        forced_arms=3 if perturbed else 1, free_arms=(1 + perturbed) if config.max_new_tokens else 0,
        state_sites=len(ready.saved), update_sites=sum(c in ("attn_out", "mlp_out") for c, _ in ready.saved),
        itemsize=torch.empty(0, dtype=subject.dtype).element_size(),
        tokens_per_second=None if per_token is None else 1 / per_token,
        steps_per_second=None if per_step is None else 1 / per_step,
    )  # fmt: skip


def _seconds(subject: Subject, rows: Sequence[Sequence[int]]) -> float:
    """Time of one forward after a first one that warms up."""
    inputs = make_batch(subject, rows).model_inputs(subject)
    begun = 0.0
    with torch.no_grad():
        for _ in range(2):
            begun = time.perf_counter()
            logits_of(subject.model(**inputs)).flatten()[-1].item()  # a device has finished when a number arrives
    return max(time.perf_counter() - begun, 1e-6)
