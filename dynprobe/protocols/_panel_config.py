"""The design of a panel: models × categories × prompts × seeds × temperatures × token budgets × α, as one YAML file.

Everything that can be wrong in it is found before a model is loaded, and said with the line of the file.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dynprobe._yaml import read_yaml
from dynprobe.errors import UsageError, did_you_mean
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._model_skeleton import COVARIATES
from dynprobe.protocols._panel_columns import no_column
from dynprobe.protocols._spread_config import SPREAD, SpreadConfig
from dynprobe.protocols._wrong_value import what_is_wrong

__all__ = ["DECOMPOSED", "PanelConfig", "PanelModelEntry", "read_panel"]

#: Metrics that are decomposed unless others are named; of these, the ones a condition has.
DECOMPOSED = (
    "kappa_phase", "kappa_path", "delta_rel_prev", "nll", "entropy", "limen_ratio", "kappa_phase_d", "kl_clean_pert",
    "flip_rate",
)  # fmt: skip
#: Settings that the design itself sets in each cell.
_OF_THE_DESIGN = (
    "model", "revision", "prompt", "prompts", "category", "limit", "perturb", "seed", "temperature", "max_new_tokens",
    "metrics", "out", "force", "quiet", "iterations", *SPREAD,
)  # fmt: skip


class PanelModelEntry(BaseModel):
    """One model of a panel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Hub id, local folder, GGUF file or known name.")
    label: str | None = Field(None, description="Its name in tables; default the model.")
    family: str | None = Field(None, description="Its family, for leave-one-family-out; default its architecture.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    covariates: dict[str, float | str] = Field(default_factory=dict, description="Covariates that are set by hand.")

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.label or self.model


class PanelConfig(SpreadConfig):
    """Everything that defines a panel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[PanelModelEntry, ...] = Field(min_length=1, description="Models, or patterns such as panel/*.")
    protocol: Literal["run", "iterate"] = Field("run", description="What a cell is.")
    prompts: str | None = Field(None, description="File of prompts; default the built-in ones.")
    categories: tuple[str, ...] = Field((), description="Categories of prompts; default all.")
    prompts_per_category: int | None = Field(None, ge=1, description="Keep the first prompts of each category.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Seeds of sampling and of noise.")
    temperatures: tuple[float, ...] = Field((0.0,), min_length=1, description="Temperatures; 0 is greedy.")
    max_new_tokens: tuple[int, ...] = Field((32,), min_length=1, description="Token budgets.")
    alphas: tuple[float, ...] = Field((0.0,), min_length=1, description="Strengths; 0 is no perturbation.")
    perturb: str | None = Field(None, description="The perturbation without alpha, such as layers=50%,scale=relnorm.")
    iterations: tuple[int, ...] = Field((), description="Numbers of iterations of protocol: iterate.")
    metrics: tuple[str, ...] = Field((), description="Metrics to store beside the default ones, by id.")
    decompose: tuple[str, ...] = Field(DECOMPOSED, min_length=1, description="Columns whose variance is decomposed.")
    covariates: tuple[str, ...] = Field(COVARIATES, description="Covariates of the skeleton, declared in advance.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Further settings of every run.")
    n_boot: int = Field(1000, ge=0, description="Bootstrap samples of the prompts.")
    n_permutations: int = Field(9999, ge=0, description="Permutations where not all are taken.")
    out: str = Field("runs", description="Folder in which the panel's folder lies, or that folder itself.")
    force: bool = Field(False, description="Continue what another library version began.")

    @field_validator("models", mode="before")
    @classmethod
    def _models(cls, value: Any) -> Any:
        items = [value] if isinstance(value, str | Mapping | PanelModelEntry) else value
        if not isinstance(items, Sequence):
            raise ValueError("a list of models such as [tiny-llama, tiny-cem]")
        return [found for item in items for found in _patterns(item)]

    @field_validator(
        "seeds", "temperatures", "max_new_tokens", "alphas", "iterations", "categories", "metrics", "decompose",
        "covariates", mode="before",
    )  # fmt: skip
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | float) else value

    @field_validator("seeds", "temperatures", "max_new_tokens", "alphas", "iterations")
    @classmethod
    def _numbers(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(v < 0 or v != v or v == float("inf") for v in value):
            raise ValueError("finite numbers from 0 on")
        if len(set(value)) < len(value):
            raise ValueError("one of them stands there twice; a condition that comes twice is no second observation")
        return value

    @field_validator("settings")
    @classmethod
    def _settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in _OF_THE_DESIGN:
                raise ValueError(f"{key} is part of the design; it stands at the top of the file, not in settings")
        return value

    @model_validator(mode="after")
    def _together(self) -> PanelConfig:
        names = [m.name for m in self.models]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise ValueError(f"models: {twice} stands there twice; give one of them a label")
        given = {key for m in self.models for key in m.covariates}
        for name in self.covariates:
            if name not in COVARIATES and name not in given:
                near = did_you_mean(name, [*COVARIATES, *given])
                raise ValueError(f"covariates: {name} is none ({', '.join(COVARIATES)}) and no model sets it.{near}")
        for name in self.decompose:
            if name not in DECOMPOSED and (wrong := no_column(name, self.protocol, self.metrics)):
                raise ValueError(f"decompose: {wrong}")
        if any(self.alphas) and self.perturb is None:
            raise ValueError("alphas above 0 need perturb, such as perturb: scale=relnorm,layers=50%")
        if self.perturb is not None and (self.perturb.startswith("@") or "alpha" in self.perturb):
            raise ValueError("perturb is written without alpha, which the alphas of the design fill in")
        if self.perturb is not None and "seed" in self.perturb:
            raise ValueError("perturb is written without seed, which the seeds of the design fill in")
        if self.perturb is not None and not any(self.alphas):
            raise ValueError("perturb has no strength; add alphas above 0, such as alphas: [0, 0.1]")
        if self.protocol == "iterate":
            odd = [k for k in ("temperatures", "max_new_tokens") if getattr(self, k) != _DEFAULTS[k]]
            if odd:
                raise ValueError(f"{odd[0]}: protocol: iterate reads texts and writes none; leave it out")
        elif self.iterations:
            raise ValueError("iterations belong to protocol: iterate")
        return self

    def identity(self) -> dict[str, Any]:
        """Return what defines the numbers of the panel."""
        content = self.model_dump(
            mode="json", exclude={"out", "force", "prompts", "categories", "prompts_per_category", *SPREAD}
        )
        content["settings"] = {k: v for k, v in content["settings"].items() if k != "batch_size"}
        return content

    @classmethod
    def build(
        cls, values: Mapping[str, Any], lines: Mapping[tuple[Any, ...], int] | None = None, file: str = ""
    ) -> PanelConfig:
        """Validate a design.

        Args:
            values: The design.
            lines: Place in it → line of the file.
            file: The file, for messages.

        Raises:
            UsageError: Naming the key, the line, what was found and what it may be.
        """
        values = {str(k).replace("-", "_"): fspath(v) if isinstance(v, PathLike) else v for k, v in values.items()}
        for key in values:
            if key not in cls.model_fields:
                near = did_you_mean(key, cls.model_fields)
                keys = ", ".join(sorted(cls.model_fields, key=lambda name: name in SPREAD))
                raise UsageError(f"{_at(file, lines, (key,))}unknown key {key!r}.{near} Keys: {keys}")
        if isinstance(values.get("models"), Sequence) and not isinstance(values["models"], str):
            values["models"], lines = _expanded(values["models"], lines, file)
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            said = what_is_wrong(error.errors())
            if not first["loc"]:
                named = said.split(":")[0].split(" ")[0]
                raise UsageError(f"{_at(file, lines, (named,))}{said}") from error
            place = tuple(p for p in first["loc"] if p != "function-before")
            key = ".".join(str(p) for p in place if place[0] != "models" or not isinstance(p, int))
            if first["type"] == "extra_forbidden":
                known = PanelModelEntry.model_fields if place[0] == "models" else cls.model_fields
                said = f"unknown key.{did_you_mean(str(place[-1]), known)} Keys: {', '.join(known)}"
                raise UsageError(f"{_at(file, lines, place)}{key}: {said}") from error
            if first["type"] == "missing":
                raise UsageError(
                    f"{_at(file, lines, place[:-1])}{key} is missing; type {_EXAMPLE[str(place[-1])]}"
                ) from error
            if first["type"] == "too_short":
                raise UsageError(f"{_at(file, lines, place)}{key} is an empty list; name one at least") from error
            found = first["input"]
            raise UsageError(f"{_at(file, lines, place)}{key}: {said}; found {found!r}") from error


_EXAMPLE = {"models": "models: [tiny-llama, tiny-cem]", "model": "model: tiny-llama"}
_DEFAULTS = {"temperatures": (0.0,), "max_new_tokens": (32,)}


def read_panel(path: str | Path) -> PanelConfig:
    """Read a design from a YAML file; a file of prompts it names is looked for beside it first.

    Raises:
        UsageError: The file cannot be read, or something in it is wrong; with the line.
    """
    path = Path(path)
    values, root = read_yaml(path, "panel file", same=lambda key: key.replace("-", "_"))
    if values is None:
        raise UsageError(f"panel file {path} is empty; it must be a mapping with a key models: {_EXAMPLE['models']}")
    if not isinstance(values, dict):
        raise UsageError(f"panel file {path} holds {type(values).__name__}; it must be a mapping with a key models")
    beside = values.get("prompts")
    if isinstance(beside, str) and not Path(beside).is_absolute() and (path.parent / beside).is_file():
        values["prompts"] = str(path.parent / beside)
    return PanelConfig.build(values, _lines(root), str(path))


def _lines(node: Any, place: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """Line of every place in a YAML document."""
    out = {place: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = str(key.value).replace("-", "_")
            out |= _lines(value, (*place, name)) | {(*place, name): key.start_mark.line + 1}
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            out |= _lines(value, (*place, i))
    return out


def _at(file: str, lines: Mapping[tuple[Any, ...], int] | None, place: tuple[Any, ...]) -> str:
    while lines and place and place not in lines:
        place = place[:-1]
    if not lines or not place:
        return f"panel file {file}: " if file else ""
    return f"panel file {file}, line {lines[place]}: "


def _expanded(
    models: Sequence[Any], lines: Mapping[tuple[Any, ...], int] | None, file: str
) -> tuple[list[Any], dict[tuple[Any, ...], int]]:
    """Patterns as the models they stand for, each of which keeps the line of its pattern."""
    out: list[Any] = []
    moved = {place: line for place, line in (lines or {}).items() if place[:1] != ("models",) or len(place) == 1}
    for i, item in enumerate(models):
        try:
            found = _patterns(item)
        except ValueError as error:
            raise UsageError(f"{_at(file, lines, ('models', i))}models: {error}") from error
        for entry in found:
            for place, line in (lines or {}).items():
                if place[:2] == ("models", i):
                    moved[("models", len(out), *place[2:])] = line
            out.append(entry)
    return out, moved


def _patterns(item: Any) -> list[Any]:
    """An entry as it is; a pattern of shipped models as all of them."""
    name = item if isinstance(item, str) else item.get("model") if isinstance(item, Mapping) else None
    if not isinstance(name, str) or not any(c in name for c in "*?["):
        return [{"model": item} if isinstance(item, str) else item]
    from dynprobe.models import known_models, panel_models

    cells = {cell.name: cell.family for cell in panel_models()}
    found = [n for n in (*cells, *known_models()) if fnmatch.fnmatch(n, name)]
    if not found:
        raise ValueError(
            f"no shipped model fits {name}; they are panel/FAMILY-depthD-width32-seedS, {', '.join(known_models())}"
        )
    more = dict(item) if isinstance(item, Mapping) else {}
    return [{**more, "model": n} for n in found]


def check_settings(config: PanelConfig) -> None:
    """Refuse run settings that no run would take, before a model is loaded."""
    from dynprobe.protocols._iterate import IterateConfig

    kind = IterateConfig if config.protocol == "iterate" else RunConfig
    try:
        kind.build(**config.settings, metrics=config.metrics)
    except UsageError as error:
        raise UsageError(f"settings of the panel: {error}") from error
    if config.perturb is not None:
        from dynprobe.probes import Perturb

        Perturb.parse(f"alpha=1,{config.perturb}")
