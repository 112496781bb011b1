"""The way every protocol goes: prepare, calibrate, self-test, work through planned units, summarise.

A protocol brings three things: which units of work there are, how one unit becomes tables, and what is said at the end.
Units are planned once and stored with the run, so that a continued run does exactly what is left of the first plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from dynprobe import models
from dynprobe.engines import Engine, Job, Seat
from dynprobe.errors import CalibrationError, InterruptedRunError, UsageError
from dynprobe.metrics._reduction import compiling, why_not_compiled
from dynprobe.metrics.statistics import interval_words
from dynprobe.probes import Calibration, Check, Subject, load_calibration
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._calibrate import calibrated
from dynprobe.protocols._call import Call, engine_of, job_of, sharers_of
from dynprobe.protocols._conditions import written_depths, yardstick
from dynprobe.protocols._halving import Halving
from dynprobe.protocols._memory import before_the_units
from dynprobe.protocols._plugins_used import warn_if_changed
from dynprobe.protocols._prepare import Prepared
from dynprobe.protocols._selfchecks import all_checks, as_manifest, refuse_if_broken
from dynprobe.protocols._token_text import TokenTexts, prompts_table
from dynprobe.protocols._units import Counts, spread, work_through
from dynprobe.protocols._weights import structure_of
from dynprobe.runs import Run, RunWriter, open_run
from dynprobe.runs._find import find_run

__all__ = ["Begin", "Experiment", "Listener", "Progress", "execute", "nobody"]


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
        disk_bound: Whether the work waits for the disk.
    """

    stage: str
    done: int = 0
    total: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    summary: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    disk_bound: bool = False


Listener = Callable[[Progress], None]


class Experiment(Protocol):
    """What a protocol adds to the common way."""

    def plan(self) -> list[Any]:
        """Return the units of work, as plain data."""

    def conditions(self) -> pd.DataFrame:
        """Return the conditions table."""

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Do one unit; ``early`` wants the first samples as soon as there are any."""

    def summarise(self, run: Run, writer: RunWriter) -> dict[str, Any]:
        """Return the summary of the finished units; further tables may be written first."""

    def first_look(self, samples: pd.DataFrame) -> dict[str, Any]:
        """Return the summary of the first samples."""


#: Makes the experiment of a calibration and of whether only rows of one length may share a forward.
Begin = Callable[[Calibration | None, bool], Experiment]


def execute(
    ready: Prepared,
    begin: Begin,
    tell: Listener | None = None,
    call: Call | None = None,
) -> Run:
    """Carry out an experiment in its run folder, or find it done.

    Args:
        ready: What was asked for, checked.
        begin: Makes the experiment of a calibration and of whether only rows of one length may share a forward.
        tell: Called with :class:`Progress`.
        call: How another process makes the same experiment; given where units read nothing that other units wrote.

    Raises:
        EngineError: If the workers that were asked for cannot be had.
        SelfTestError: If a self-test shows that no number could be trusted.
        InterruptedRunError: If it was stopped by the user; the same call continues it.
    """
    say = tell if tell is not None else nobody
    done = ready.finished()
    if done is not None:
        say(Progress("done", notes=(f"already done: {done.path}",)))
        warn_if_changed(done.path, done.manifest.plugins or (), ready.plugins)
        return done
    with before_the_units(ready.subject):
        say(Progress("calibrate"))
        calibration = calibration_of(ready)
        say(Progress("self-tests"))
        tried = next((p for p in ready.perturbs if not p.noise_scale.needs_clean), None)
        known = None if tried is None else yardstick(ready.subject, tried, calibration)
        checks = all_checks(ready.subject, ready.rows, tried, known)
        broken = refuse_if_broken(checks)
        if "readout" in broken and ready.config.lens:
            raise UsageError(
                "--lens needs the readout self-test to pass, and it failed on this model; leave --lens out"
            )
        exact = ready.config.padding == "none" or "alone" in broken
        experiment = begin(calibration, exact)  # what it refuses leaves no folder behind
    with ExitStack() as stack:
        stack.enter_context(_interruption(ready))
        crew = _crew(ready, call, calibration, exact, say, stack)
        writer = ready.begin()
        if writer.status == "complete":  # another process finished it meanwhile
            return open_run(writer.folder)
        with writer:
            seat = Seat() if crew is None else crew[0].seat()
            sharers = sharers_of(ready.subject.device, {"device": ready.config.device}, seat)
            _record(writer, ready, calibration, checks, exact, experiment, sharers)
            _units(writer, ready, experiment, say, tell is not None, crew, independent=call is not None)
    return open_run(writer.folder)


def _crew(
    ready: Prepared, call: Call | None, calibration: Calibration | None, exact: bool, say: Listener, stack: ExitStack
) -> tuple[Engine, Job] | None:
    """The engine that was asked for, its workers ready; None where this process does the work."""
    found = engine_of(ready.config, call)
    if found is None or call is None:
        return None
    engine, ours = found
    if ours:
        stack.enter_context(engine)
    job = job_of(call, ready, calibration, exact)
    say(Progress("workers"))
    engine.begin(job)
    return engine, job


@contextmanager
def _interruption(ready: Prepared) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        out = Path(ready.config.out)
        folder = (find_run(out, ready.ident) if out.is_dir() else None) or out
        raise InterruptedRunError(f"interrupted; the same command continues {folder}") from stop


def nobody(_: Progress) -> None:
    """Listen to nothing."""


def calibration_of(ready: Prepared, subject: Subject | None = None) -> Calibration | None:
    """The subject's calibration: the one handed in, else that of the built-in texts.

    Without a tokenizer the built-in texts cannot be read; there is none then, and what needs one is NaN or refused.

    Raises:
        CalibrationError: If the one handed in cannot be read, or was made with another model.
    """
    folder = getattr(ready.config, "calibration", None)
    if folder is not None and subject is None:
        return _handed_in(ready, Path(folder))
    subject = subject if subject is not None else ready.subject
    if subject.tokenizer is None:
        return None
    covariances = [
        depth for p in ready.perturbs if "covariance" in p.noise_scale.needs for depth in written_depths(subject, p)
    ]
    return calibrated(subject, cov_depths=sorted(set(covariances)))


def _handed_in(ready: Prepared, folder: Path) -> Calibration:
    found, subject = load_calibration(folder), ready.subject
    # A model is known by its files where they were just read, else by its tensors; a calibration knows both.
    same = "tensors" in found.header and found.header["tensors"] == models.weights_hash(subject.model)
    found.check(
        found.header["weights"] if same else ready.weights,
        str(subject.dtype).removeprefix("torch."),
        subject.name or "the model",
    )
    structure = structure_of(subject)
    if found.header.get("structure", structure) != structure:
        raise CalibrationError(
            f"the calibration in {folder} was made with other blocks or settings of these weights than "
            f"{subject.name} has here; make one with: dynprobe calibrate MODEL --out FOLDER"
        )
    return found


def _record(
    writer: RunWriter, ready: Prepared, calibration: Calibration | None, checks: Mapping[str, Check], exact: bool,
    experiment: Experiment, sharers: int,
) -> None:  # fmt: skip
    """Write down what is known before the first unit."""
    if calibration is not None:
        calibration.save(writer.folder / "calibration" / calibration.hash)
    units = writer.manifest.batch_plan
    writer.update(
        self_tests=as_manifest(dict(checks)),
        noise_floor={k: checks["alone"].detail[k] for k in ("noise_floor", "kappa_phase")},
        calibration_hash=calibration.hash if calibration is not None else None,
        batch_plan=units if isinstance(units, list) else experiment.plan(),
        exact_length_batches=exact,
    )
    if exact and ready.config.padding != "none":
        writer.event("exact-lengths", why="self-test alone failed; padded rows would differ from rows alone")
    decode = checks["alone"].detail.get("decode", math.nan)
    if decode > checks["alone"].limit:
        writer.event("decode-differs", by=decode, why="states of texts being written are not those of texts read")
    texts = TokenTexts(ready.subject.tokenizer)
    writer.write_table("prompts", prompts_table(ready.prompts, ready.rows, texts))
    writer.write_table("conditions", experiment.conditions())
    planned = writer.manifest.batch_plan
    if isinstance(planned, list):
        writer.update(memory_plan=Halving(ready, experiment, sharers=sharers).plan(planned).as_dict())


def _units(
    writer: RunWriter, ready: Prepared, experiment: Experiment, say: Listener, heard: bool,
    crew: tuple[Engine, Job] | None, *, independent: bool,
) -> None:  # fmt: skip
    total = len(writer.manifest.batch_plan or ())
    say(Progress("batch", len(writer.finished), total))

    def first_table(samples: pd.DataFrame) -> None:
        # One table early; the last is made from the disk. In between nothing is kept in memory.
        say(Progress("batch", len(writer.finished), total, summary=experiment.first_look(samples)))

    def tell(now: Counts) -> None:
        say(Progress("batch", now.done, now.total, now.rows, now.tokens, now.seconds, disk_bound=now.disk_bound))

    compiled = ready.config.compile_metrics
    if crew is not None:
        counts = spread(writer, *crew, tell)
    else:
        with compiling(compiled):
            counts = work_through(
                writer, ready.subject, Halving(ready, experiment, writer.event), tell, first_table if heard else None,
                independent=independent,
            )  # fmt: skip
        if compiled:
            writer.event("compile-metrics", used=why_not_compiled() is None, why=why_not_compiled())
    final = experiment.summarise(open_run(writer.folder), writer)
    _pictures(writer)
    writer.finish({**final, "mean_intervals": interval_words(), "seconds": round(counts.seconds, 2)})
    say(Progress("done", total, total, counts.rows, counts.tokens, counts.seconds, final.get("conditions")))


def _pictures(writer: RunWriter) -> None:
    """Draw what belongs to the run, or record why it was not drawn."""
    try:
        files = open_run(writer.folder).plot.write()
    except Exception as why:  # a run is its tables: nothing that goes wrong in a picture may cost them
        writer.event("no-figure", why=f"{type(why).__name__}: {why}")
        writer.update(no_figures=str(why) or type(why).__name__)
        return
    if files:
        writer.update(figures=[f"figures/{file.name}" for file in files])
