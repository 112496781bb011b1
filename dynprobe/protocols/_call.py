"""A protocol's call that another process can make again.

The call is the protocol's name, the model's name, the prompts themselves and the settings. A worker makes it once, up
to the point where the first unit would be done, and must come to the same identity: the same weights, prompts, settings
and noise. A model that was handed over as an object has no name to load it by, and cannot be sent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynprobe import __version__
from dynprobe._plugins import deciding
from dynprobe.engines import Engine, Job, Seat, content_key
from dynprobe.errors import EngineError, UsageError
from dynprobe.metrics._reduction import compiling, why_not_compiled
from dynprobe.probes import Calibration, Subject
from dynprobe.probes import load as load_subject
from dynprobe.protocols._conditions import yardstick
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._halving import Halving
from dynprobe.protocols._plugins_used import in_words
from dynprobe.protocols._prepare import LOAD_KEYS, Held, Prepared
from dynprobe.protocols._selfchecks import all_checks, refuse_if_broken
from dynprobe.protocols._spread_config import SPREAD
from dynprobe.protocols._token_text import TokenTexts
from dynprobe.protocols._units import complete_tables
from dynprobe.runs._pack import pack

__all__ = ["Call", "engine_of", "job_of", "sharers_of"]

#: Protocols whose units need nothing of each other → what makes their experiment of a call.
_OPENERS = {
    "run": "dynprobe.protocols._run:open_run",
    "sweep": "dynprobe.protocols._sweep:open_sweep",
    "threshold": "dynprobe.protocols._threshold:open_threshold",
    "iterate": "dynprobe.protocols._iterate:open_iterate",
}
#: Settings that say which prompts there are, where the run lies and who works; the first are sent as they were found.
_HERE = ("prompt", "prompts", "category", "limit", "out", "force", "quiet", *SPREAD)


@dataclass(frozen=True, eq=False)
class Call:
    """The call of a protocol.

    Attributes:
        protocol: Its name.
        model: What was handed over.
        settings: Its settings, as they were given.
    """

    protocol: str
    model: Any
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Sent:
    """What a worker is told."""

    protocol: str
    model: str
    loading: Mapping[str, Any]
    prompts: Sequence[Any]
    settings: Mapping[str, Any]
    calibration: Calibration | None
    exact: bool
    ident: str
    weights: str
    version: str
    plugins: Sequence[Mapping[str, str]] = ()


def engine_of(config: RunConfig, call: Call | None) -> tuple[Engine, bool] | None:
    """The engine that was asked for, and whether it is ours to close; None where this process does the work.

    Raises:
        UsageError: If the settings do not go together, or the protocol cannot be spread.
    """
    handed = None if call is None else call.settings.get("engine")
    if isinstance(handed, Engine):
        return handed, False
    if config.in_process:
        several = torch.cuda.device_count() > 1 and config.device in ("auto", "cuda") and config.device_map is None
        named = call is not None and isinstance(call.model, str | Held | Path)
        if config.workers == 1 or not (several and named):
            return None
    if call is None:
        raise UsageError(
            f"--engine {config.engine} with --workers {config.workers}: here later units read what earlier ones found, "
            "so one process does them in order. The engines serve run, sweep, threshold, iterate and panel"
        )
    return config.make_engine(config.out), True


def job_of(call: Call, ready: Prepared, calibration: Calibration | None, exact: bool) -> Job:
    """Make the job that a worker opens.

    Raises:
        UsageError: If the model was handed over as an object, or carries hooks of the caller's own.
    """
    if not ready.just_loaded:
        raise UsageError(
            f"workers load the model themselves, by its name, and {ready.subject.name} was handed over as "
            f"{type(call.model).__name__}. Give a hub id, a folder, a GGUF file or a known name, or no engine"
        )
    if "hooks" in ready.settings:
        raise UsageError(
            f"{ready.subject.name} carries hooks of your own, which workers cannot be sent; leave the engine out"
        )
    name = call.model.name if isinstance(call.model, Held) else str(call.model)
    sent = _Sent(
        call.protocol, str(Path(name).resolve()) if Path(name).exists() else name,
        {key: getattr(ready.config, key) for key in LOAD_KEYS}, list(ready.prompts),
        {"model": name, **{key: value for key, value in call.settings.items() if key not in _HERE}},
        calibration, exact, ready.ident, ready.weights, __version__, deciding(ready.plugins),
    )  # fmt: skip
    known = None if calibration is None else calibration.hash
    # The versions too: units that lie in a shared folder outlive the call that asked for them.
    made_by = (__version__, *([sent.plugins] if sent.plugins else ()))
    return Job("dynprobe.protocols._call:open_call", sent, content_key(ready.ident, known, exact, *made_by))


#: The model of the last job, so that the next one need not load it again.
_LAST: dict[str, Subject] = {}


def open_call(sent: _Sent, seat: Seat) -> Callable[[Any], dict[str, bytes]]:
    """Make the call again in a worker, up to its first unit; return what does a unit.

    Raises:
        EngineError: If it comes to another run here: another dynprobe, other weights.
    """
    if sent.version != __version__:
        raise EngineError(
            f"the worker has dynprobe {__version__}, and the run was begun by {sent.version}; install the same version "
            "on every machine"
        )
    if seat.threads:
        torch.set_num_threads(seat.threads)
    subject = _subject(sent, seat)
    module, _, name = _OPENERS[sent.protocol].partition(":")
    opener = getattr(importlib.import_module(module), name)
    ready, begin = opener(Held(sent.settings["model"], subject), sent.prompts, dict(sent.settings))
    if ready.ident != sent.ident:
        raise EngineError(
            f"the worker comes to another run ({ready.ident} and not {sent.ident}): its {sent.settings['model']} has "
            f"the weights {ready.weights}. Give all machines the same files, or name a revision with --revision"
        )
    if deciding(ready.plugins) != list(sent.plugins):
        raise EngineError(
            f"the worker has {in_words(deciding(ready.plugins))}, and the run was begun with {in_words(sent.plugins)}; "
            "install the same packages on every machine"
        )
    tried = next((p for p in ready.perturbs if not p.noise_scale.needs_clean), None)
    known = None if tried is None else yardstick(subject, tried, sent.calibration)
    if "alone" in refuse_if_broken(all_checks(subject, ready.rows, tried, known)) and not sent.exact:
        raise EngineError(
            f"on {subject.device} a padded row of {subject.name} differs from the row alone, and where the run was "
            "begun it does not; add --padding none, so that only rows of one length share a forward"
        )
    return _Work(ready, begin(sent.calibration, sent.exact), sharers_of(subject.device, sent.loading, seat))


def sharers_of(device: torch.device, loading: Mapping[str, Any], seat: Seat) -> int:
    """How many workers take from what is free where a worker's model is."""
    if device.type != "cuda":
        return seat.here
    if seat.gpu_share is not None:
        return max(1, round(1 / seat.gpu_share))
    named = loading["device"] not in ("auto", "cuda") and seat.device != "auto"  # then all of them are on that one
    return seat.here if named else seat.on_device


@dataclass(eq=False)
class _Work:
    """Does units and packs what they become, with what happened meanwhile."""

    ready: Prepared
    experiment: Any
    sharers: int

    def __post_init__(self) -> None:
        subject = self.ready.subject
        self.device, self._dtype = str(subject.device), str(subject.dtype).removeprefix("torch.")
        self._columns, self._texts = self.ready.columns(), TokenTexts(subject.tokenizer)
        self._events: list[dict[str, Any]] = []
        self._halving = Halving(self.ready, self.experiment, self._note, self.sharers)

    def _note(self, kind: str, **fields: Any) -> None:
        self._events.append({"kind": kind, **fields})

    def __call__(self, unit: Any) -> dict[str, bytes]:
        self._events.clear()
        with compiling(self.ready.config.compile_metrics):
            made = self._halving.work(unit)
        if self.ready.config.compile_metrics:
            self._note("compile-metrics", used=why_not_compiled() is None, why=why_not_compiled())
        return pack(
            complete_tables(made.tables, self._texts), made.states, dtype=self._dtype, facts=made.facts or None,
            columns=self._columns, events=self._events,
        )  # fmt: skip


def _subject(sent: _Sent, seat: Seat) -> Subject:
    """The model of a call, kept until another one is asked for."""
    loading = dict(sent.loading)
    if seat.device != "auto" and loading["device"] in ("auto", "cuda") and loading["device_map"] is None:
        loading["device"] = seat.device  # a device that was asked for by name is part of what the run is
    # With the weights, for the files of a name may have changed since its last job.
    key = content_key(sent.model, sent.weights, {name: str(value) for name, value in loading.items()})
    if key not in _LAST:
        _LAST.clear()  # before the next one is loaded: both may not fit
        if seat.gpu_share is not None and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(seat.gpu_share)
        _LAST[key] = load_subject(sent.model, **loading)
    return _LAST[key]
