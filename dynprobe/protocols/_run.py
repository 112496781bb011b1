"""``run``: clean, sham and perturbed arms over prompts, stored as a run folder."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from dynprobe import __version__, metrics
from dynprobe.errors import InterruptedRunError, PromptError, UsageError
from dynprobe.probes import Calibration, Perturb, Site, Subject, Where, ignored_defaults, sites_to_read, tokenize
from dynprobe.probes import load as load_subject
from dynprobe.prompts import Prompt, content_hash, from_texts, load_prompts, read_prompts
from dynprobe.protocols._batch import BatchRunner
from dynprobe.protocols._calibrate import calibrate
from dynprobe.protocols._columns import column_facts
from dynprobe.protocols._conditions import Push, conditions_table, resolve_perturbations
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._plan import Estimate, estimate, plan_batches
from dynprobe.protocols._selfchecks import all_checks, as_manifest, refuse_if_broken
from dynprobe.protocols._summary import summarise
from dynprobe.runs import Run, RunWriter, identity, open_run

__all__ = ["Progress", "choose_prompts", "plan", "run"]


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
        summary: Table over what is finished, after each batch.
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


def choose_prompts(config: RunConfig, prompts: Sequence[Any] | None = None) -> list[Prompt]:
    """Return the prompts of a run: those handed in, of a file, typed, or the built-in ones.

    Raises:
        PromptError: If none is left.
    """
    if prompts is not None:
        items = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
        chosen = _as_prompts(items)
    elif config.prompts is not None:
        chosen = read_prompts(config.prompts)
        if config.prompt:
            chosen += from_texts(list(config.prompt))
    elif config.prompt:
        chosen = from_texts(list(config.prompt))
    else:
        chosen = load_prompts(source="default" if config.category == () else "all")
    if config.category:
        known = {p.category for p in chosen if p.category}
        missing = [c for c in config.category if c not in known]
        if missing:
            raise PromptError(f"no prompt of category {missing[0]!r}; there are: {', '.join(sorted(known)) or 'none'}")
        chosen = [p for p in chosen if p.category in config.category]
    chosen = chosen[: config.limit]
    if not chosen:
        raise PromptError("no prompt is left to run; give --prompt TEXT or --prompts FILE")
    return chosen


def _as_prompts(items: Sequence[Any]) -> list[Prompt]:
    if not items:
        raise PromptError("an empty list of prompts was given")
    if all(isinstance(i, Prompt) for i in items):
        return list(items)
    if all(isinstance(i, str) for i in items):
        return from_texts(list(items))
    rows = [tuple(int(t) for t in row) for row in items]
    named = from_texts([" ".join(map(str, row)) for row in rows])
    return [Prompt(p.prompt_id, "", p.category, "token ids", row) for p, row in zip(named, rows, strict=True)]


def _token_rows(subject: Subject, prompts: Sequence[Prompt], config: RunConfig) -> list[list[int]]:
    return [
        list(p.token_ids) if p.token_ids else tokenize(subject, [p.text], chat_template=config.chat_template)[0]
        for p in prompts
    ]


def _build(model: Any, settings: Mapping[str, Any]) -> tuple[RunConfig, Any]:
    """The configuration, with objects given in Python turned into the text they stand for."""
    values = dict(settings)
    perturb = values.get("perturb")
    if perturb is not None and not isinstance(perturb, str):
        items = [perturb] if isinstance(perturb, Perturb) else list(perturb)
        if any(callable(i) and not isinstance(i, Perturb) for i in items):
            raise UsageError("dp.run stores what it did and cannot store a function; use dp.capture(perturb=fn) instead")
        values["perturb"] = tuple(str(i) for i in items)
    if isinstance(values.get("where"), Where):
        values["where"] = str(values["where"])
    name = model if isinstance(model, str) else None
    return RunConfig.build(**{"model": name, **values}), model


def run(
    model: str | nn.Module | Subject,
    prompts: Sequence[Any] | None = None,
    *,
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Run prompts through a model, clean and perturbed, and store what happened.

    The arms are: clean; sham (α = 0 through the whole write path, equal to clean bit for bit); the perturbation
    teacher-forced on the clean text, which carries all paired columns; and the perturbation writing its own text.

    Args:
        model: Hub id, folder, GGUF file, known name, module, or subject.
        prompts: Texts, token ids or :class:`dynprobe.prompts.Prompt`; default the 24 built-in ones.
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
    config, model = _build(model, settings)
    tell = listener if listener is not None else (lambda _: None)
    tell(Progress("load"))
    subject = load_subject(
        model, **({} if not isinstance(model, str) else _loading(config))
    )  # fmt: skip
    chosen = choose_prompts(config, prompts)
    rows = _token_rows(subject, chosen, config)
    perturbs = resolve_perturbations(subject, config)
    if any(p.scale == "interp" for p in perturbs) and len(rows) < 2:
        raise UsageError("scale=interp takes its donor from the next prompt; give at least two prompts")
    saved = sites_to_read(subject, Where.parse(config.where)) if config.states else []
    writer = _begin(subject, config, chosen, rows, perturbs)
    if writer.status == "complete":
        tell(Progress("done", notes=(f"already done: {writer.folder}",)))
        return open_run(writer.folder)
    try:
        with writer:
            _work(writer, subject, config, chosen, rows, perturbs, saved, tell)
    except KeyboardInterrupt as stop:
        raise InterruptedRunError(f"interrupted; the same command continues {writer.folder}") from stop
    return open_run(writer.folder)


def _loading(config: RunConfig) -> dict[str, Any]:
    keys = ("revision", "dtype", "device", "device_map", "trust_remote_code", "allow_bin")
    return {key: getattr(config, key) for key in keys}


def _begin(
    subject: Subject, config: RunConfig, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], perturbs: Sequence[Perturb]
) -> RunWriter:
    weights = str(subject.facts.get("weights_hash", ""))
    directions = [p.direction_digest for p in perturbs if p.direction_digest]
    settings = {**config.identity(), "perturb": [str(p) for p in perturbs], "directions": directions}
    ident = identity(settings, [list(r) for r in rows], weights)
    fields: dict[str, Any] = {
        "command": ["dynprobe", *sys.argv[1:]] if sys.argv and sys.argv[0].endswith("dynprobe") else None,
        "model": {**{k: v for k, v in subject.facts.items() if k != "versions"}, "structure": subject.describe()},
        "weights": {"hash": weights, "files": subject.facts.get("weights_files")},
        "versions": {
            "dynprobe": __version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(), **subject.facts.get("versions", {}),
        },
        "device": {"device": str(subject.device), "machine": platform.machine(), "threads": torch.get_num_threads()},
        "dtypes": {
            "weights": str(subject.dtype).removeprefix("torch."), "metrics": "float32",
            "low_precision_angles": subject.dtype in (torch.bfloat16, torch.float16),
        },
        "seeds": {"noise": [p.seed for p in perturbs], "sampling": config.seed},
        "ignored_generation_defaults": ignored_defaults(subject),
    }  # fmt: skip
    return RunWriter.begin(
        config.out,
        model_name=subject.name,
        config={**config.model_dump(mode="json"), "perturb": [str(p) for p in perturbs]},
        ident=ident,
        prompts_hash=content_hash(list(prompts)),
        manifest_fields={k: v for k, v in fields.items() if v is not None},
        columns=column_facts(config),
        force=config.force,
    )


def _work(
    writer: RunWriter, subject: Subject, config: RunConfig, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]],
    perturbs: Sequence[Perturb], saved: Sequence[Site], tell: Listener,
) -> None:  # fmt: skip
    tell(Progress("calibrate"))
    covariances = tuple(
        layer for p in perturbs if p.scale == "cov" for layer in p.where.resolve_layers(subject.n_layers)
    )
    # Without a tokenizer the built-in texts cannot be read; debts are then missing with their reason, never guessed.
    calibration: Calibration | None = calibrate(subject, cov_layers=covariances) if subject.tokenizer is not None else None
    if calibration is not None:
        calibration.save(writer.folder / "calibration" / calibration.hash)
    tell(Progress("self-tests"))
    tried = perturbs[0] if perturbs and perturbs[0].scale not in ("interp", "isokl") else None
    checks = all_checks(subject, rows, tried, calibration)
    broken = refuse_if_broken(checks)
    exact = config.padding == "none" or "alone" in broken
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
    if "readout" in broken and config.lens:
        raise UsageError("--lens needs the readout self-test to pass, and it failed on this model; leave --lens out")
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
    writer.write_table("conditions", conditions_table(config, perturbs))
    push = Push(subject, perturbs, calibration) if perturbs else None
    runner = BatchRunner(subject, config, prompts, rows, push, calibration, exact, _span(config), saved)
    _batches(writer, runner, batches, tell)


def _span(config: RunConfig) -> str:
    if config.span != "auto":
        return config.span
    return "new" if config.max_new_tokens > 0 else "prompt"


def _batches(writer: RunWriter, runner: BatchRunner, batches: Sequence[Sequence[int]], tell: Listener) -> None:
    started, n_rows, n_tokens = time.perf_counter(), 0, 0
    dtype = str(runner.subject.dtype).removeprefix("torch.")
    tell(Progress("batch", len(writer.finished), len(batches)))
    for number, batch in enumerate(batches):
        if number in writer.finished:
            continue
        begun = time.perf_counter()
        made = runner.run(batch)
        for keys, states in made.states:
            writer.write_states(number, keys, states, dtype)
        writer.write_batch(number, made.tables)
        rows = len(made.tables["samples"])
        # A first table early; the last one is made from the disk. In between nothing is kept.
        first = summarise(made.tables["samples"]) if n_rows == 0 else None
        n_rows, n_tokens = n_rows + rows, n_tokens + len(made.tables["tokens"])
        writer.event("batch", number=number, rows=rows, seconds=round(time.perf_counter() - begun, 3))
        tell(Progress("batch", len(writer.finished), len(batches), n_rows, n_tokens, time.perf_counter() - started, first))
    final = summarise(open_run(writer.folder).samples)
    writer.finish({"conditions": final, "seconds": round(time.perf_counter() - started, 2)})
    tell(Progress("done", len(batches), len(batches), n_rows, n_tokens, time.perf_counter() - started, final))


def plan(
    model: str | nn.Module | Subject, prompts: Sequence[Any] | None = None, *, measure: bool = True, **settings: Any
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
    config, model = _build(model, settings)
    subject = load_subject(model, **({} if not isinstance(model, str) else _loading(config)))
    chosen = choose_prompts(config, prompts)
    rows = _token_rows(subject, chosen, config)
    perturbs = resolve_perturbations(subject, config)
    lengths = [len(r) for r in rows]
    sizes = {"n_layers": subject.n_layers, "dim": subject.dim or 1, "vocab": subject.vocab_size or 1}
    batches = plan_batches(
        lengths, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, exact=config.padding == "none", **sizes
    )
    rates: dict[str, float] = {}
    if measure:
        ids = torch.tensor([rows[batches[0][0]]] * len(batches[0]), device=subject.device)
        single = ids[:, :1]
        rates = {"tokens_per_second": ids.numel() / _seconds(subject, ids), "steps_per_second": 1 / _seconds(subject, single)}
    free_arms = (1 + bool(perturbs)) if config.max_new_tokens else 0
    saved = sites_to_read(subject, Where.parse(config.where)) if config.states else []
    return estimate(
        lengths, batches, max_new_tokens=config.max_new_tokens, num_samples=config.num_samples,
        forced_arms=3 if perturbs else 1, free_arms=free_arms, state_sites=len(saved),
        itemsize=torch.empty(0, dtype=subject.dtype).element_size(), **sizes, **rates,
    )  # fmt: skip


def _seconds(subject: Subject, ids: torch.Tensor) -> float:
    with torch.no_grad():
        subject.model(ids)
        begun = time.perf_counter()
        subject.model(ids)
    return max(time.perf_counter() - begun, 1e-6)
