"""``run --remote``: the forced arms of a run on a model that others host.

The model is not here: its config and tokenizer are, and a skeleton without weights that says where its blocks are. Each
batch is one session of three forwards (clean, the same write at α = 0, perturbed), of which norms, angles and read-outs
come back. The run folder has the tables of a run, so that it opens, compares and exports like any other.

What needs the states or the weights here is not there, and asking for it is refused: generation, states, the logit
lens, further metrics, scales that need a calibration or another prompt. Of the self-tests the one that can be made is
made on every batch: the sham arm must send back what the clean arm does, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dynprobe import __version__, metrics
from dynprobe.errors import ModelNotFoundError, OfflineError, RunFolderError, SelfTestError, UsageError
from dynprobe.metrics._measure_terms import measure_terms
from dynprobe.metrics.statistics import interval_words
from dynprobe.probes import Batch, Perturb, States, Subject, Tape, load, make_batch
from dynprobe.probes._backend import require_nnsight
from dynprobe.probes._nnsight import forwards_of, restore
from dynprobe.probes._remote import block_path_of, pushes_of, remote_terms, traced_model
from dynprobe.probes._server import check_service, host_of
from dynprobe.prompts import Prompt, content_hash
from dynprobe.protocols._arms import Passage, Text, aligned
from dynprobe.protocols._columns import PASSPORT, column_facts
from dynprobe.protocols._conditions import conditions_table, resolve_perturbations, written_depths
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._execute import Listener, Progress, nobody
from dynprobe.protocols._plan import plan_batches
from dynprobe.protocols._prompts import choose_prompts, token_rows
from dynprobe.protocols._summary import asked_columns, summarise
from dynprobe.protocols._tables import Labels, passage_tables
from dynprobe.protocols._token_text import TokenTexts, prompts_table
from dynprobe.protocols._weights import foreign_hooks, structure_of, weights_of
from dynprobe.runs import Run, RunWriter, identity, open_run
from dynprobe.runs._manifest import MANIFEST_NAME

__all__ = ["run_remote"]


def run_remote(
    model: Any, prompts: Sequence[Any] | None, config: RunConfig, given: Sequence[Perturb | str], tell: Listener | None
) -> Run:
    """Run the forced arms where the model is hosted, and store what came back.

    Args:
        model: Hub id of a model that the service runs; for a dry run (``remote="local"``) anything ``dp.load`` takes.
        prompts: As for :func:`dynprobe.run`.
        config: Its settings, with ``remote``.
        given: Perturbations.
        tell: Called with :class:`Progress`.

    Returns:
        The run, complete.

    Raises:
        UsageError: If a setting asks for what does not come back, or there is no key.
        OfflineError: If the service does not answer.
        ModelNotFoundError: If it does not run the model.
        SelfTestError: If the sham arm is not the clean one.
    """
    _refuse(model, config)
    dry = config.remote == "local"
    held = load(model, revision=config.revision, dtype=config.dtype, device=config.device) if dry else None
    before = [] if held is None else forwards_of(held.model)
    # A model that is here is known by what it holds, as in any run: two of one name are two runs.
    known = None if held is None else _known(held, just_loaded=isinstance(model, str))
    try:
        return _run(held if held is not None else model, prompts, config, given, tell, known)
    finally:
        restore(before)


def _known(subject: Subject, *, just_loaded: bool) -> dict[str, Any]:
    hooks = {"hooks": uuid.uuid4().hex} if foreign_hooks(subject) else {}
    return {"weights": weights_of(subject, just_loaded=just_loaded), "structure": structure_of(subject), **hooks}


def _run(
    model: Subject | str, prompts: Sequence[Any] | None, config: RunConfig, given: Sequence[Perturb | str],
    tell: Listener | None, known: Mapping[str, Any] | None,
) -> Run:  # fmt: skip
    service, refused, earlier = _service(model, config)
    traced, subject = _open(model, config)
    chosen = choose_prompts(config, prompts)
    rows = token_rows(subject, chosen, chat_template=config.chat_template)
    perturbs = resolve_perturbations(subject, config, given)
    pushes_of(perturbs, make_batch(subject, rows[:1]), subject.n_layers, subject.width)  # refuses before anything runs
    settings = {**config.identity(), "perturb": [str(p) for p in perturbs], "prompts": content_hash(list(chosen))}
    settings["directions"] = [p.direction_digest for p in perturbs if p.direction_digest]
    if known is not None:
        settings |= {name: fact for name, fact in known.items() if name != "weights"}
        where = str(known["weights"])
    elif refused is None:
        where = f"{service['host']}:{subject.name}@{service['revision']}"
    else:  # what is finished needs no service
        tokens = [list(r) for r in rows]
        done = next((run for run in earlier if run.manifest.id8 == identity(settings, tokens, _where(run))), None)
        if done is None:
            raise refused
        (tell or nobody)(Progress("done", notes=(f"already done: {done.path}",)))
        return done
    batches = plan_batches(
        [len(r) for r in rows], max_new_tokens=0, n_layers=subject.n_layers, dim=subject.width,
        vocab=subject.vocab_size or 1, batch_size=config.batch_size, exact=config.padding == "none",
    )  # fmt: skip
    called = bool(sys.argv) and Path(sys.argv[0]).name.removesuffix(".exe") == "dynprobe"
    writer = RunWriter.begin(
        config.out,
        model_name=subject.name,
        config={**config.model_dump(mode="json"), "perturb": [str(p) for p in perturbs]},
        ident=identity(settings, [list(r) for r in rows], where),
        prompts_hash=content_hash(list(chosen)),
        manifest_fields={
            "command": ["dynprobe", *sys.argv[1:]] if called else ["dp.run", subject.name],
            "model": {"source": "remote", "model_id": subject.name, "service": service, "blocks": subject.block_path},
            "weights": {"hash": where},  # what the service holds cannot be hashed from here
            "versions": {
                "dynprobe": __version__, "torch": torch.__version__, "numpy": np.__version__,
                "python": platform.python_version(), "nnsight": require_nnsight("--remote"),
            },
            "identity": settings,
            "batch_plan": batches,
            "seeds": {"noise": list(dict.fromkeys(p.seed for p in perturbs))},
        },
        columns=column_facts(config),
        force=config.force,
    )  # fmt: skip
    if writer.status == "complete":
        return open_run(writer.folder)
    with writer:
        _tables(writer, traced, subject, config, chosen, rows, perturbs, tell)
    return open_run(writer.folder)


def _refuse(model: Any, config: RunConfig) -> None:
    if config.backend != "nnsight":
        raise UsageError("--remote goes through nnsight traces; add --backend nnsight")
    if not isinstance(model, str) and config.remote != "local":
        raise UsageError("--remote runs a model that the service hosts; name it by its hub id")
    asked = {
        "--max-new-tokens": config.max_new_tokens > 0, "--states": config.states, "--lens": config.lens,
        "--metrics": bool(config.metrics), "--contrast": config.contrast is not None,
        "--padding left": config.padding == "left", "--num-samples": config.num_samples > 1,
        "--engine": config.engine != "local", "--workers": not config.in_process,
        "--quantization": config.quantization is not None, "--device-map": config.device_map is not None,
        "--span new": config.span == "new",
    }  # fmt: skip
    for flag in (name for name, wanted in asked.items() if wanted):
        how = "add --max-new-tokens 0" if flag == "--max-new-tokens" else f"leave {flag} out"
        found = f" (max_new_tokens={config.max_new_tokens})" if flag == "--max-new-tokens" else ""
        why = (
            "the service loads the model and does every batch itself"
            if flag in ("--engine", "--workers", "--quantization", "--device-map")
            else "--remote sends back norms, angles and read-outs of the prompts and no states"
        )
        raise UsageError(f"{flag} was asked for{found}; {why}, so it cannot be had. Type: {how}")


def _service(model: Subject | str, config: RunConfig) -> tuple[dict[str, Any], Exception | None, list[Run]]:
    """Where the model runs; if it cannot be had now, why, and the finished runs that it may have been asked for.

    Raises:
        UsageError, OfflineError, ModelNotFoundError: If there is no service and nothing was finished with it.
    """
    if isinstance(model, Subject):
        return {"host": "local", "revision": config.revision or "main"}, None, []
    require_nnsight("--remote")  # without it no finished run could be found either
    try:
        return check_service(model, config.revision, config.remote), None, []
    except (OfflineError, ModelNotFoundError, UsageError) as error:
        found = _finished(config, model)
        if not found:
            raise
        return {}, error, found


def _finished(config: RunConfig, name: str) -> list[Run]:
    """Finished runs of a hosted model under ``out``, the newest first, whatever revision the service had then."""
    out, place = Path(config.out), f"{host_of(config.remote)}:{name}@"
    folders = [out] if (out / MANIFEST_NAME).is_file() else sorted(p.parent for p in out.glob(f"*/{MANIFEST_NAME}"))
    found = []
    for folder in reversed(folders):
        with contextlib.suppress(RunFolderError):  # another run's damage is no business of this one
            run = open_run(folder)
            if run.status == "complete" and _where(run).startswith(place):
                found.append(run)
    return found


def _where(run: Run) -> str:
    """What stands for the weights of a hosted model."""
    weights = run.manifest.weights
    return str(weights.get("hash")) if isinstance(weights, dict) else ""


def _open(model: Subject | str, config: RunConfig) -> tuple[Any, Subject]:
    """The traced model, and what is known of it."""
    if isinstance(model, Subject):
        traced = traced_model(model.model)
        name, tokenizer = model.name, model.tokenizer
    else:
        traced = traced_model(model, config.revision)
        name, tokenizer = model, traced.tokenizer
    module = traced._module
    path = block_path_of(module)
    text = module.config.get_text_config() if hasattr(module, "config") else None
    subject = Subject(
        model=module, tokenizer=tokenizer, name=name, block_path=f"{path}.*", blocks=tuple(module.get_submodule(path)),
        dim=int(text.hidden_size) if text is not None else None,
    )  # fmt: skip
    return traced, subject


def _tables(
    writer: RunWriter, traced: Any, subject: Subject, config: RunConfig, chosen: Sequence[Prompt],
    rows: Sequence[Sequence[int]], perturbs: Sequence[Perturb], tell: Listener | None,
) -> None:  # fmt: skip
    words = TokenTexts(subject.tokenizer)
    writer.write_table("prompts", prompts_table(chosen, rows, words))
    writer.write_table("conditions", conditions_table(config, perturbs))
    units, begun = writer.manifest.batch_plan, time.perf_counter()
    assert isinstance(units, list)
    for number, unit in enumerate(units):
        if number in writer.finished:
            continue
        texts = [Text(chosen[i].prompt_id, tuple(rows[i])) for i in unit]
        tables, dtype = _batch(traced, subject, config, texts, [chosen[i] for i in unit], perturbs)
        writer.update(
            dtypes={"weights": dtype, "metrics": "float64", "low_precision_angles": dtype in ("bfloat16", "float16")}
        )
        writer.write_batch(number, {n: words.into(rows) if n == "tokens" else rows for n, rows in tables.items()})
        if tell is not None:
            tell(Progress("batch", len(writer.finished), len(units), seconds=time.perf_counter() - begun))
    null = {"null": {"name": "null", "passed": True, "value": 0.0, "limit": 0.0, "unit": "terms"}}
    writer.update(self_tests=null if perturbs else {})  # without a write there was no sham arm to look at
    found = open_run(writer.folder)
    writer.finish(
        {
            "conditions": summarise(found.samples, asked_columns(found)),
            "mean_intervals": interval_words(),
            "seconds": round(time.perf_counter() - begun, 2),
        }
    )


def _batch(
    traced: Any, subject: Subject, config: RunConfig, texts: Sequence[Text], prompts: Sequence[Prompt],
    perturbs: Sequence[Perturb],
) -> tuple[dict[str, pd.DataFrame], str]:  # fmt: skip
    """One session: the arms of one batch as tables, and the dtype of the states they were read from."""
    batch = make_batch(subject, [t.fed for t in texts], row_keys=[t.row_key for t in texts])
    targets = aligned([t.targets for t in texts], batch.mask.cpu())
    size = (subject.n_layers, subject.width)
    arms: list[Mapping[int, Any]] = [{}]
    if perturbs:
        arms += [pushes_of(perturbs, batch, *size, alpha=0.0), pushes_of(perturbs, batch, *size)]
    path = subject.block_path.removesuffix(".*")
    found = remote_terms(traced, path, batch, targets, arms, config.remote)
    clean = _passage(found[0], texts, batch, config)
    parts = [passage_tables(clean, _labels("clean", prompts), span=config.measured_span)]
    if perturbs:
        _check_sham(found[0], found[1], batch.mask.cpu())
        held = ["prompt_id", "replicate", "category", "n_prompt", "n_new", "n_fed", "n_nonfinite", "status"]
        sham = parts[0]["samples"][held]
        ids = _labels("sham", prompts).ids
        parts.append({"samples": sham.assign(sample_id=ids, condition_id="sham", equal_to="clean")})
        arm = _passage(found[2], texts, batch, config)
        asked = sum(sum((p["w"] != 0).any(-1).sum(1) for p in pushes) for pushes in arms[2].values())
        arm.tape.passport = {
            "n_asked": np.asarray(asked), "n_left_alone": np.asarray(asked - found[2]["wrote"]),
        }  # fmt: skip
        lowest = min(depth for p in perturbs for depth in written_depths(subject, p))
        first = [p.where.mask(arm.positions, np.asarray(batch.n_prompt), positions="1:") for p in perturbs]
        hit = np.any(first, axis=0)
        start = np.where(hit.any(1), hit.argmax(1), batch.mask.shape[1])
        parts.append(
            passage_tables(
                arm, _labels("perturbed.forced", prompts), span=config.measured_span, perturbed=True, clean=clean,
                paired=metrics.paired(clean.measured, arm.measured, inject=lowest),
                paired_outputs={name: found[2][name].double().numpy() for name in ("kl_clean_pert", "flip")},
                affected_from=np.maximum(start, 1),
            )
        )  # fmt: skip
        parts[-1]["samples"] = _without_sizes(parts[-1]["samples"])
    names = dict.fromkeys(name for part in parts for name in part)
    tables = {n: pd.concat([part[n] for part in parts if n in part], ignore_index=True) for n in names}
    return tables, clean.measured.dtype


def _without_sizes(samples: pd.DataFrame) -> pd.DataFrame:
    """Leave out the sizes of the write: the states they are relative to stayed on the service."""
    reasons = [
        {name: why for name, why in json.loads(text or "{}").items() if name not in PASSPORT}
        for text in samples["reasons"]
    ]
    spelled = np.array([json.dumps(r, sort_keys=True) if r else None for r in reasons], dtype=object)
    return samples.drop(columns=list(PASSPORT)).assign(reasons=spelled)


def _check_sham(clean: Mapping[str, Any], sham: Mapping[str, Any], mask: torch.Tensor) -> None:
    """What came back of the write at α = 0 must be what came back without a write."""
    grids = ("norm", "entropy", "margin")
    if not all(torch.equal(clean[g][..., mask].nan_to_num(), sham[g][..., mask].nan_to_num()) for g in grids):
        raise SelfTestError(
            "the sham arm (alpha=0) differs from the clean arm on the service; no number of this batch could be "
            "trusted. Does the service batch requests of others with yours, or run with dropout?"
        )


def _labels(condition: str, prompts: Sequence[Prompt]) -> Labels:
    return Labels(condition, [p.prompt_id for p in prompts], [p.category for p in prompts], 0, [None] * len(prompts))


def _passage(terms: Mapping[str, Any], texts: Sequence[Text], batch: Batch, config: RunConfig) -> Passage:
    """A passage whose states stayed where they were made."""
    mask = batch.mask.cpu()
    positions = torch.where(mask, mask.long().cumsum(1) - 1, -1)
    dtype = terms["dtype"].removeprefix("torch.")
    measured = measure_terms(terms, mask, dtype=dtype, dim=terms["dim"], span=mask)
    depths = range(len(terms["norm"]))
    tape = Tape(
        states=States({d: torch.empty(0) for d in depths}, len(depths) - 1), mask=mask, positions=positions,
        token_ids=batch.input_ids.cpu(), n_prompt=mask.sum(1), row_keys=batch.row_keys,
    )  # fmt: skip
    outputs = {name: terms[name].double().numpy() for name in ("entropy", "margin", "nll")}
    return Passage(list(texts), tape, mask, positions.numpy(), measured, outputs)
