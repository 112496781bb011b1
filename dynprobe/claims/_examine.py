"""Testing a claim: the prediction is written down, then the models are run, then the verdict is written down.

The order is the point. What is predicted, which protocol runs with which settings, which numbers are formed and which
margin decides is one plan, hashed and appended to the log before the first forward. A run that was there already (the
same command was given before, and runs are not repeated) is used, but its record says so: data that existed before the
plan can test a reading of the claim, not a prediction.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprobe import __version__
from dynprobe.claims._claim import Claim
from dynprobe.claims._intervals import CONFIDENCE, N_BOOT
from dynprobe.claims._load import find
from dynprobe.claims._log import ClaimLog, plan_hash
from dynprobe.claims._settings import SHARED, check_settings
from dynprobe.claims._shapes import analyse, tables_of
from dynprobe.claims._sides import side_of
from dynprobe.claims._verdict import Verdict
from dynprobe.errors import UsageError
from dynprobe.metrics import parse_id, spec
from dynprobe.runs import Run, open_run
from dynprobe.runs._json import plain

__all__ = ["analyse_runs", "examine", "plan_of"]

#: Fewer models than this at a level of a factor is a small panel: nothing is known of other models.
SMALL = 3
POST_HOC = "post hoc: data existed before registration"


def examine(
    claim: str | Claim,
    models: Sequence[Any] | str = (),
    *,
    runs: Sequence[str | Path | Run] = (),
    out: str | Path = "runs",
    log: str | Path | ClaimLog | None = None,
    listener: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Verdict:
    """Test a claim on models, or on runs that are there, and append what came out to the log.

    Args:
        claim: Id of a claim, or a claim.
        models: One model per role in the order of the claim's panel (commas in a text), or any number for a claim
            about populations: what :func:`dynprobe.load` takes.
        runs: Runs in place of models: as many, in the same order.
        out: Folder of runs.
        log: File of the falsification log; None writes none.
        listener: Hears the progress of every run.
        **settings: Settings of the protocol that win over the claim's: ``limit``, ``perturb``, ``device``, …. They are
            recorded as deviations.

    Returns:
        The verdict, whichever way it fell.

    Raises:
        UsageError: There is no such claim, it cannot be tested here, or models and roles do not match.
        LogError: The log does not hold together.

    Example:
        >>> examine("csm.delta_at_40", ["tiny-csm"], limit=6).outcome  # doctest: +SKIP
        'falsified'
    """
    chosen = find(claim) if isinstance(claim, str) else claim
    if not chosen.testable:
        raise UsageError(f"{chosen.id} cannot be tested here: {chosen.untestable_here}")
    named = [m.strip() for m in models.split(",") if m.strip()] if isinstance(models, str) else list(models)
    if bool(named) == bool(runs):
        raise UsageError(f"name the models of {chosen.id} (or runs of them, not both): {_wanted(chosen)}")
    given = list(runs) if runs else named
    roles = _roles(chosen, len(given))
    book = log if isinstance(log, ClaimLog) or log is None else ClaimLog(log)
    opened = [r if isinstance(r, Run) else open_run(r) for r in runs]
    names = [r.manifest.model_name for r in opened] if runs else [_name(m) for m in named]
    _no_model_twice(chosen, names)
    check_settings(chosen, settings)
    plan = plan_of(chosen, dict(zip(_numbered(roles), names, strict=True)), settings, post_hoc=bool(runs))
    panel = {"models": names, "small": _small(chosen, names)}
    deviations = _deviations(chosen, names, settings)
    head, before = None, _folders(out)
    if book is not None:
        head = _register(book, chosen, plan, panel, [*deviations, *([POST_HOC] if runs else [])])
    done = opened or [
        _run(chosen, role, model, out, settings, listener) for role, model in zip(roles, named, strict=True)
    ]
    old = [r.path.name for r in done if r.path.resolve() in before]
    if not runs and old:
        deviations.append(f"{POST_HOC} ({', '.join(old)} was there already)")
    elif runs:
        deviations.append(POST_HOC)
    verdict = analyse_runs(chosen, done)
    verdict = dataclasses.replace(verdict, notes=(*deviations, *(["small panel"] if panel["small"] else [])))
    if book is not None and head is not None:
        written = book.append(
            "outcome", claim=chosen.id, test=head["test"], statement=chosen.quote, metric_ids=list(chosen.metrics),
            panel=panel, prediction=plan["prediction"], plan_hash=head["plan_hash"], data_hash=_data_hash(done),
            outcome=verdict.outcome, effect=plain(verdict.effect), low=plain(verdict.low), high=plain(verdict.high),
            n=verdict.n, deviations=deviations, supersedes=head["supersedes"],
        )  # fmt: skip
        verdict = dataclasses.replace(verdict, record=written["id"])
    return verdict


def analyse_runs(claim: str | Claim, runs: Sequence[Run]) -> Verdict:
    """Return the verdict of runs on a claim, without a log.

    Args:
        claim: Id of a claim, or a claim.
        runs: One per role in the order of the panel, or any number for a claim about populations.

    Raises:
        UsageError: A run lacks what the claim rests on.
    """
    chosen = find(claim) if isinstance(claim, str) else claim
    if not chosen.testable:
        raise UsageError(f"{chosen.id} cannot be tested here: {chosen.untestable_here}")
    tables = [t for part in chosen.parts for t in tables_of(part)]
    sides = []
    for role, run in zip(_roles(chosen, len(runs)), runs, strict=True):
        own = chosen.panel.roles[role].protocol if chosen.panel else None
        # A role with a protocol of its own (a judge) has only what that makes.
        sides.append(side_of(role, run, ["tokens"] if own else tables))
    verdict = analyse(chosen, sides)
    return dataclasses.replace(verdict, runs=tuple(str(r.path) for r in runs))


def plan_of(
    claim: Claim, models: Mapping[str, str], settings: Mapping[str, Any], *, post_hoc: bool = False
) -> dict[str, Any]:
    """Return everything that decides the outcome, in plain data: what is hashed before the data exist."""
    made = claim.model_dump(mode="json", exclude_defaults=True)
    return {
        "claim": claim.id, "version": __version__, "models": dict(models), "protocol": claim.protocol,
        "settings": plain({**claim.settings, **settings}), "roles": made["panel"]["roles"], "parts": made["parts"],
        "prediction": [
            {"metric": part.metric, **part.prediction.model_dump(mode="json")} for part in claim.parts
        ],
        "definitions": {m: spec(m).digest for m in claim.metrics if _is_metric(m)},
        "confidence": CONFIDENCE, "n_boot": N_BOOT, "post_hoc": post_hoc,
    }  # fmt: skip


def _is_metric(name: str) -> bool:
    try:
        parse_id(name)
    except ValueError:
        return False
    return True


def _register(
    book: ClaimLog, claim: Claim, plan: dict[str, Any], panel: Mapping[str, Any], deviations: Sequence[str]
) -> dict[str, Any]:
    book.check()
    earlier = book.records()
    same = [r for r in earlier if r["kind"] == "outcome" and r["claim"] == claim.id]
    return book.append(
        "registered", claim=claim.id, statement=claim.quote, metric_ids=list(claim.metrics),
        panel=dict(panel), prediction=plan["prediction"], plan=plain(plan), plan_hash=plan_hash(plain(plan)),
        deviations=list(deviations), supersedes=same[-1]["id"] if same else None,
    )  # fmt: skip


def _run(claim: Claim, role: str, model: Any, out: str | Path, settings: Mapping[str, Any], listener: Any) -> Run:
    from dynprobe import protocols

    assert claim.panel is not None
    own = claim.panel.roles[role]
    protocol = own.protocol or claim.protocol
    # A role with a protocol of its own has settings of its own; only what chooses prompts and machines is shared.
    base = dict(own.settings) if own.protocol else {**claim.settings, **own.settings}
    shared = settings if not own.protocol else {k: v for k, v in settings.items() if k in SHARED}
    call = getattr(protocols, str(protocol))
    done: Run = call(model, out=out, listener=listener, **{**base, **shared})
    return done


def _roles(claim: Claim, n: int) -> list[str]:
    assert claim.panel is not None
    names = list(claim.panel.roles)
    if claim.panel.at_least is not None:
        if n < claim.panel.at_least:
            raise UsageError(f"{claim.id} needs {claim.panel.at_least} models or more; found {n}. {_wanted(claim)}")
        return names * n
    if n != len(names):
        raise UsageError(f"{claim.id} needs {len(names)} models, found {n}: {_wanted(claim)}")
    return names


def _no_model_twice(claim: Claim, names: Sequence[str]) -> None:
    """In a claim about populations a model is an observation, and one that comes twice is no second one."""
    assert claim.panel is not None
    twice = next((n for n in names if list(names).count(n) > 1), None)
    if claim.panel.at_least is not None and twice is not None:
        raise UsageError(f"{claim.id} counts models, and {twice} is named twice; name every model once")


def _wanted(claim: Claim) -> str:
    assert claim.panel is not None
    said = "; ".join(f"{name}: {role.what}" for name, role in claim.panel.roles.items())
    return said + (f" ({claim.panel.note})" if claim.panel.note else "")


def _numbered(roles: Sequence[str]) -> list[str]:
    return [f"{r}.{i}" if len(set(roles)) < len(roles) else r for i, r in enumerate(roles)]


def _small(claim: Claim, names: Sequence[str]) -> bool:
    """Fewer than three models at a level: always where a role is one model, and a population needs two such levels."""
    assert claim.panel is not None
    return claim.panel.at_least is None or len(set(names)) < 2 * SMALL


def _deviations(claim: Claim, names: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    assert claim.panel is not None
    out = [
        f"{key}={plain(value)!r}" + (f" in place of {claim.settings[key]!r}" if key in claim.settings else "")
        for key, value in sorted(settings.items())
        if key not in claim.settings or claim.settings[key] != value
    ]
    published = claim.panel.published
    if published and [str(n).lower() for n in names] != [p.lower() for p in published]:
        out.append(f"other models than the published ones ({', '.join(published)})")
    return out


def _name(model: Any) -> str:
    return model if isinstance(model, str) else str(getattr(model, "name", None) or type(model).__name__)


def _folders(out: str | Path) -> set[Path]:
    """Run folders that are there already: ``out`` itself, and those inside it."""
    return {p.parent.resolve() for p in (*Path(out).glob("manifest.json"), *Path(out).glob("*/manifest.json"))}


def _data_hash(runs: Sequence[Run]) -> str:
    """SHA-256 over the hashes of every table of every run, in the order of the roles."""
    parts = [f"{r.manifest.id8}:{p.path}:{p.sha256}" for r in runs for p in sorted(r.manifest.parts, key=_path)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _path(part: Any) -> str:
    return str(part.path)
