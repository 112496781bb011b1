"""Everything about a run that is known before anything is computed or written.

Whatever can be refused is refused here: a wrong setting, a site the model does not have, a prompt it cannot read. So an
error leaves no folder behind.
"""

from __future__ import annotations

import platform
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynprobe import __version__
from dynprobe.errors import ModelError, UsageError
from dynprobe.probes import Perturb, Site, Subject, Where, ignored_defaults, sites_to_read
from dynprobe.probes import load as load_subject
from dynprobe.probes._backend import on_backend
from dynprobe.probes._generate import end_tokens
from dynprobe.probes._perturb import parse_many
from dynprobe.prompts import Prompt, content_hash
from dynprobe.protocols._columns import column_facts
from dynprobe.protocols._conditions import OWN_UNIT, resolve_perturbations
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._memory import before_the_units, while_loading
from dynprobe.protocols._model_skeleton import skeleton_of
from dynprobe.protocols._plugins_used import plugins_used
from dynprobe.protocols._prompts import choose_prompts, token_rows
from dynprobe.protocols._spread_config import in_words
from dynprobe.protocols._weights import foreign_hooks, structure_of, weights_of
from dynprobe.runs import Run, RunWriter, identity, open_run
from dynprobe.runs._find import find_run

__all__ = ["LOAD_KEYS", "Held", "Prepared", "prepare"]

#: Settings that :func:`dynprobe.load` takes.
LOAD_KEYS = (
    "revision", "dtype", "device", "device_map", "quantization", "trust_remote_code", "allow_bin", "backend",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Held:
    """A subject that was read from files by name and that nobody else holds: its files say what its weights are.

    A panel loads a model once for all of its cells, and each cell is the run that loading it by name would give.

    Attributes:
        name: What it was loaded by.
        subject: The subject.
    """

    name: str
    subject: Subject


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that could begin.

    Attributes:
        subject: The subject.
        config: The settings.
        prompts: The prompts.
        rows: Their token ids.
        perturbs: What acts, with all defaults filled in.
        saved: Sites whose states are written; empty without ``states``.
        just_loaded: Whether the model was loaded by name for this run, so that its files say what it holds.
    """

    subject: Subject
    config: RunConfig
    prompts: Sequence[Prompt]
    rows: Sequence[Sequence[int]]
    perturbs: Sequence[Perturb]
    saved: Sequence[Site]
    just_loaded: bool = False

    @cached_property
    def weights(self) -> str:
        """Hash of the weights."""
        return weights_of(self.subject, just_loaded=self.just_loaded)

    @cached_property
    def ident(self) -> str:
        """Identity of the run: the same exactly where the numbers would be the same."""
        return identity(self.settings, [list(r) for r in self.rows], self.weights)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What, beside prompts and weights, the identity is made of; stored, so that anyone can make it again."""
        return {
            **self.config.identity(),
            "perturb": [str(p) for p in self.perturbs],
            "directions": [p.direction_digest for p in self.perturbs if p.direction_digest],
            # Noise is drawn under the prompts' names, so the same text under another name is another run.
            "prompts": content_hash(list(self.prompts)),
            "structure": structure_of(self.subject),
            # Which tokens end a text stands beside the weights, not in them.
            "ends": sorted(end_tokens(self.subject)) if self.config.stop_at_eos and self.config.max_new_tokens else [],
            # A hook of the caller's own changes the numbers and has no hash: such a run is never taken for another.
            **({"hooks": uuid.uuid4().hex} if foreign_hooks(self.subject) else {}),
        }

    @cached_property
    def plugins(self) -> list[dict[str, str]]:
        """What other packages bring to this run, each with its version."""
        return plugins_used(self.config, self.perturbs, self.subject)

    def finished(self) -> Run | None:
        """Return this run where it lies finished under ``out``."""
        out = Path(self.config.out)
        folder = out if (out / "manifest.json").is_file() else find_run(out, self.ident) if out.is_dir() else None
        run = None if folder is None else open_run(folder)
        return run if run is not None and run.manifest.id8 == self.ident and run.status == "complete" else None

    def begin(self) -> RunWriter:
        """Begin the run's folder, or continue it."""
        # A grid's writes follow from its other settings and stand in the conditions; a run's own are written out.
        written = {"perturb": [str(p) for p in self.perturbs]} if self.config.perturb else {}
        return RunWriter.begin(
            self.config.out,
            model_name=self.subject.name,
            config={**self.config.model_dump(mode="json"), **written},
            ident=self.ident,
            prompts_hash=content_hash(list(self.prompts)),
            manifest_fields={k: v for k, v in self._facts().items() if v is not None},
            columns=self.columns(),
            force=self.config.force,
        )

    def columns(self) -> dict[str, dict[str, str]]:
        """Return what is known of the columns that will be written."""
        return column_facts(self.config)

    def _facts(self) -> dict[str, Any]:
        subject, facts = self.subject, self.subject.facts
        dtype = str(subject.dtype).removeprefix("torch.")
        called = bool(sys.argv) and Path(sys.argv[0]).name.removesuffix(".exe") == "dynprobe"
        return {
            "command": ["dynprobe", *sys.argv[1:]] if called else None,
            "model": {
                **{k: v for k, v in facts.items() if k != "versions"}, "structure": subject.describe(),
                "skeleton": skeleton_of(subject),
            },
            "weights": {"hash": self.weights, "files": facts.get("weights_files")},
            "versions": {
                "dynprobe": __version__, "torch": torch.__version__, "numpy": np.__version__,
                "python": platform.python_version(), **facts.get("versions", {}),
            },
            "device": {
                "device": str(subject.device), "machine": platform.machine(), "threads": torch.get_num_threads(),
            },
            "dtypes": {
                "weights": dtype, "metrics": "float32",
                "low_precision_angles": dtype in ("bfloat16", "float16"),
            },
            "seeds": {"noise": list(dict.fromkeys(p.seed for p in self.perturbs)), "sampling": self.config.seed},
            "foreign_hooks": foreign_hooks(subject),
            "identity": self.settings,
            "ignored_generation_defaults": ignored_defaults(subject),
            "plugins": self.plugins or None,
            "scales": {
                p.scale: {"meaning": p.noise_scale.meaning, "unit": p.noise_scale.unit}
                for p in self.perturbs if p.kind not in OWN_UNIT
            } or None,
        }  # fmt: skip


#: Turns settings into the perturbations of a run, given those that were handed in as objects or text.
Resolve = Callable[[Subject, Any, Sequence[Perturb | str]], list[Perturb]]


def prepare(
    model: Any,
    prompts: Sequence[Any] | Path | None,
    settings: Mapping[str, Any],
    *,
    kind: type[RunConfig] = RunConfig,
    resolve: Resolve = resolve_perturbations,
) -> Prepared:
    """Load what a run needs and refuse what it cannot do.

    Args:
        model: Hub id, folder, GGUF file, known name, module, or subject.
        prompts: Texts, token ids or prompts, or the path of a file of them; None takes those of the settings.
        settings: Fields of ``kind``; ``perturb`` and ``where`` may be objects.
        kind: The settings of the protocol.
        resolve: What makes the perturbations of them.

    Raises:
        UsageError: If a setting is wrong, or the model cannot do what it asks.
        ModelError: If the model cannot be loaded or read.
    """
    if isinstance(model, Path):
        model = str(model)
    if isinstance(prompts, Path):
        prompts, settings = None, {**settings, "prompts": str(prompts)}
    config, given = configured(model, settings, kind)
    if config.remote:
        raise UsageError("remote belongs to dynprobe run: it sends the forced arms of a run; leave it out")
    if config.backend != "hooks" and kind is not RunConfig:
        raise UsageError(
            f"backend={config.backend} carries dynprobe run; this protocol resumes forwards, counts a loop's calls or "
            "lets a controller act, which needs hooks. Leave the backend out"
        )
    parse_many(given)  # what is no perturbation needs no model to be refused
    chosen = choose_prompts(config, prompts)
    with while_loading(str(config.model or type(model).__name__), config.device, config.dtype):
        subject = _load(model, config)
    grow = max(config.max_new_tokens - 1, 0)
    rows = token_rows(subject, chosen, chat_template=config.chat_template, grow=grow)
    with before_the_units(subject):
        perturbs = resolve(subject, config, given)
    where = Where.parse(config.where)
    if config.states and "resid_mid" in where.components():
        raise UsageError(
            "resid_mid is no state of its own on disk; write component=resid_pre+attn_out, whose sum it is"
        )
    sites = sites_to_read(subject, where)
    # One state has one row: the output of a block and the input of the next are the same place.
    places = {(c, at) if c in ("attn_out", "mlp_out") else ("", at + (c == "resid_post")): (c, at) for c, at in sites}
    ready = Prepared(
        subject,
        config,
        chosen,
        rows,
        perturbs,
        tuple(places.values()) if config.states else (),
        isinstance(model, str | Held),
    )
    _refuse(ready)
    return ready


def configured(model: Any, settings: Mapping[str, Any], kind: type[RunConfig]) -> tuple[RunConfig, list[Perturb | str]]:
    """Return the settings with objects turned into the text they stand for, and the perturbations as given."""
    values = dict(settings)
    perturb = values.get("perturb")
    if perturb is None:
        items: list[Any] = []
    else:
        items = [perturb] if isinstance(perturb, str | Perturb) or callable(perturb) else list(perturb)
    if any(callable(i) and not isinstance(i, Perturb) for i in items):
        raise UsageError("dp.run stores what it did and cannot store a function; use dp.capture(perturb=fn) instead")
    values["perturb"] = tuple(str(i) for i in items)
    if isinstance(values.get("where"), Where):
        values["where"] = str(values["where"])
    values = in_words(values)
    if isinstance(model, Subject):
        values.setdefault("backend", model.backend)
    name = model.name if isinstance(model, Held) else model if isinstance(model, str) else None
    return kind.build(**{"model": name, **values}), items


def _load(model: str | nn.Module | Subject | Held, config: RunConfig) -> Subject:
    if isinstance(model, Held):
        return on_backend(model.subject, config.backend)
    if not isinstance(model, str):
        return load_subject(model, backend=config.backend)
    return load_subject(model, **{key: getattr(config, key) for key in LOAD_KEYS})


def _refuse(run: Prepared) -> None:
    """Refuse what would only fail, or write nothing, in the middle of a run."""
    subject, new = run.subject, run.config.max_new_tokens
    if new > 0 and not hasattr(subject.model, "generate"):
        raise ModelError(
            f"{subject.name} ({type(subject.model).__name__}) has no generate(); add --max-new-tokens 0 "
            "(max_new_tokens=0) to measure "
            "the prompts only"
        )
    for perturb in run.perturbs:
        if "donor" in perturb.noise_scale.needs and len(run.rows) < 2:
            raise UsageError(f"scale={perturb.scale} takes its donor from the next prompt; give at least two prompts")
        handed_in = getattr(run.config, "calibration", None) is not None
        if perturb.noise_scale.calibrated and subject.tokenizer is None and not handed_in:
            raise UsageError(
                f"scale={perturb.scale} needs a calibration, and {subject.name} has no tokenizer to read the "
                "calibration prompts with; load it with tokenizer=…, or take relnorm, mad or abs"
            )
        if new < 2 and perturb.where.phases() == ("decode",):
            raise UsageError(
                f"{perturb} writes at generated tokens only, and with max_new_tokens={new} none goes through the "
                "model; take at least 2 (the last token is not fed back)"
            )
