"""Responses of a sweep or a threshold run as one frame, and the words that axes and titles need.

A sweep keeps its responses in the samples, a threshold run in its trials. Pictures ask one question of both: what did
this prompt answer at this layer, under this scale, at this strength? Seeds are averaged inside their prompt where all
prompts saw the same strengths; in a search, where every seed has strengths of its own, each stays a curve of its own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, UsageError, did_you_mean

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = [
    "LEVELS",
    "Quantity",
    "alpha_label",
    "caption",
    "chosen",
    "in_order",
    "is_sweep",
    "is_threshold",
    "on_a_grid",
    "per_position",
    "prompts_text",
    "quantity",
    "responses",
    "write_name",
]

#: Level at which a response counts as destabilised, by the column that holds the response. ``dynprobe.protocols`` owns
#: the criteria; a test keeps these equal to them.
LEVELS = {"kl_clean_pert": 1.0, "flip_rate": 0.5}

#: Column in which a criterion's response is drawn.
_COLUMN_OF = {"kl": "kl_clean_pert", "flip": "flip_rate", "kappa": "kappa_phase_d", "task": "accuracy_loss"}

_UNITS = {
    "relnorm": "‖u‖ / ‖h‖", "coordstd": "SDs of each coordinate", "mad": "robust SDs of the state",
    "cov": "SDs along the principal axes", "abs": "the model's own units", "interp": "share of the way to the donor",
    "neftune": "in α/√(L·d)", "rotate": "angle in radians", "dropout": "probability", "scale": "factor − 1",
}  # fmt: skip

_LABELS = {
    "kl_clean_pert": ("KL(clean ‖ perturbed)", "nats"), "flip_rate": ("top-1 tokens changed", "share"),
    "kappa_phase_d": ("paired Δκ phase", "half-turns"), "nll_d": ("paired ΔNLL", "nats"),
    "entropy_d": ("paired Δ entropy", "nats"), "diverge_angle": ("angle to the clean state", "half-turns"),
    "accuracy_loss": ("accuracy loss", "share"), "repetition": ("repetition", "share"),
}  # fmt: skip
_WHOLE = 40
_LOG = ("kl_clean_pert", "response_rel")
_SHARES = ("flip_rate", "repetition")


@dataclass(frozen=True)
class Quantity:
    """What is drawn.

    Attributes:
        column: Its column, or for criteria that have none, its name.
        criterion: Criterion of a threshold run; None in a sweep.
        words: What it is.
        unit: Its unit; empty where it has none.
    """

    column: str
    criterion: str | None
    words: str
    unit: str

    @property
    def label(self) -> str:
        """Label of its axis."""
        return f"{self.words}, {self.unit}" if self.unit else self.words

    def with_unit(self, value: float) -> str:
        """A value with its unit."""
        unit = self.unit.removesuffix("s") if value == 1 and self.unit.endswith("s") else self.unit
        return f"{value:.3g} {unit}".strip() if unit != "share" else f"{value:.3g}"

    @property
    def log(self) -> bool:
        """Whether it is drawn on a logarithmic axis."""
        return self.column in _LOG

    @property
    def signed(self) -> bool:
        """Whether 0 is the middle of its colours."""
        return self.column.endswith("_d") or "_d_" in self.column or self.column == "accuracy_loss"

    @property
    def share(self) -> bool:
        """Whether it lies in [0, 1]."""
        return self.column in _SHARES


def is_threshold(run: Run) -> bool:
    """Return whether the run searched thresholds."""
    return "criterion" in run.manifest.config and "alphas" in run.manifest.config


def is_sweep(run: Run) -> bool:
    """Return whether the run is a sweep."""
    return "controls" in run.manifest.config and "alphas" in run.manifest.config


def per_position(run: Run) -> bool:
    """Return whether the run has one threshold per position."""
    return bool(run.manifest.config.get("each_position"))


def quantity(run: Run, column: str | None) -> Quantity:
    """Return what is to be drawn of a run.

    Args:
        run: A sweep or a threshold run.
        column: Column of the samples, or column or name of a criterion of a threshold run; None takes the KL, or the
            first criterion.

    Raises:
        RunFolderError: The run is neither.
        UsageError: It has no such response.
    """
    if is_threshold(run):
        known = {_COLUMN_OF.get(name, name): name for name in map(str, run.manifest.config.get("criterion") or ())}
        names = {**known, **{name: name for name in known.values()}}
        if column is not None and column not in names:
            raise UsageError(
                f"{run.path} searched {', '.join(known.values())}, not {column!r}.{did_you_mean(column, names)} "
                f"Another criterion: dynprobe threshold --criterion …"
            )
        criterion = names[column] if column is not None else next(iter(known.values()))
        return _named(run, _COLUMN_OF.get(criterion, criterion), criterion)
    if not is_sweep(run):
        raise RunFolderError(
            f"{run.path} is neither a sweep nor a threshold run, so it has no response against α. Make one: "
            "dynprobe sweep --model … or dynprobe threshold --model …"
        )
    _has(run, "samples")
    column = column if column is not None else "kl_clean_pert"
    facts = run.columns()
    held = facts[(facts["table"] == "samples") & facts["dtype"].str.startswith(("float", "double"))]["column"]
    if column not in set(held):
        raise UsageError(f"the samples of {run.path} have no number {column!r}.{did_you_mean(column, list(held))}")
    return _named(run, column, None)


def _named(run: Run, column: str, criterion: str | None) -> Quantity:
    if column in _LABELS:
        words, unit = _LABELS[column]
        return Quantity(column, criterion, words, unit)
    facts = run.columns().query("table == 'samples' and column == @column")
    unit = str(facts["unit"].iloc[0] or "") if len(facts) else ""
    return Quantity(column, criterion, column, "" if unit == "1" else unit)


def write_name(scale: Any, kind: Any) -> str:
    """Return the name of a scale and kind of write; gaussian is not said, and kinds with a unit of their own have no scale.

    Example:
        >>> write_name("relnorm", "gaussian"), write_name("mad", "direction"), write_name("", "rotate")
        ('relnorm', 'mad, direction', 'rotate')
    """
    scale, kind = "" if pd.isna(scale) else str(scale), str(kind)
    if scale in ("", kind):
        return kind
    return scale if kind == "gaussian" else f"{scale}, {kind}"


def alpha_label(write: str, symbol: str = "α") -> str:
    """Return the label of an axis of strengths.

    Example:
        >>> alpha_label("coordstd")
        'α, coordstd (SDs of each coordinate)'
    """
    unit = _UNITS.get(write.split(",")[0])
    return f"{symbol}, {write} ({unit})" if unit else f"{symbol}, {write}"


def responses(run: Run, what: Quantity) -> pd.DataFrame:
    """Return one row per response that is drawn.

    Returns:
        ``write`` (its scale and kind), ``series`` (``perturbed``, ``sham``, or a control), ``layer``, ``alpha`` (its
        size), ``prompt_id``, ``curve`` (what is joined by a line) and ``value``, NaN where there is none.

    Raises:
        RunFolderError: Nothing was measured yet.
    """
    rows = _of_trials(run, what) if what.criterion is not None else _of_samples(run, what)
    if not rows["value"].notna().any():
        raise RunFolderError(
            f"{run.path} holds no {what.column} ({run.status}). Continue the run, or draw another column; "
            "run.samples['reasons'] says why values are missing."
        )
    return rows


def _of_samples(run: Run, what: Quantity) -> pd.DataFrame:
    samples = run.table("samples", columns=["prompt_id", "condition_id", "status", what.column])
    samples = samples[samples["status"].astype(str) != "not-written"]
    conditions = run.table("conditions").astype({"condition_id": object}).set_index("condition_id")
    of = conditions.loc[samples["condition_id"].astype(object).to_numpy()].reset_index()
    # A control that repeats an energy elsewhere is drawn where the energy comes from.
    source = conditions.reindex(of["matched_to"].astype(object).to_numpy()).reset_index()
    matched = (of["arm"].astype(str) == "energy-matched").to_numpy()

    def origin(column: str) -> np.ndarray:
        return np.where(matched, source[column].astype(object), of[column].astype(object))

    rows = pd.DataFrame(
        {
            "arm": of["arm"].astype(str), "variant": of["variant"].astype(str), "mode": of["decode_mode"].astype(str),
            "scale": origin("scale"), "kind": origin("kind"), "layer": origin("layer"),
            "alpha": pd.to_numeric(origin("alpha")), "prompt_id": samples["prompt_id"].astype(str).to_numpy(),
            "value": samples[what.column].to_numpy(np.float64),
        }
    )  # fmt: skip
    rows = rows[rows["arm"] != "clean"]
    forced = rows[rows["mode"] == "forced"]
    rows = forced if forced["value"].notna().any() else rows[rows["mode"] == "free"]
    rows["series"] = np.select(
        [rows["variant"] != "model", rows["arm"] != "perturbed", rows["alpha"] < 0],
        [rows["variant"], rows["arm"], "sign-flip"],
        "perturbed",
    )
    rows = rows[(rows["variant"] == "model") | (rows["arm"] == "perturbed") & (rows["alpha"] > 0)]
    rows = rows[(rows["series"] == "sham") | (rows["alpha"] != 0)]
    rows["write"] = [write_name(s, k) for s, k in zip(rows["scale"], rows["kind"], strict=True)]
    rows["layer"], rows["alpha"] = rows["layer"].astype(int), rows["alpha"].abs()
    keys = ["write", "series", "layer", "alpha", "prompt_id"]
    found = rows.groupby(keys, sort=True)["value"].mean().reset_index()
    # Nothing is written under one scale as under another: a layer has one sham for all.
    written, sham = found[found["series"] != "sham"], found[found["series"] == "sham"]
    found = pd.concat([written, *(sham.assign(write=write) for write in written["write"].unique())], ignore_index=True)
    return found.assign(curve=found["prompt_id"])


def _of_trials(run: Run, what: Quantity) -> pd.DataFrame:
    if per_position(run):
        raise RunFolderError(
            f"{run.path} has one threshold per position, so no response of a whole text; draw run.plot.fragility(), or "
            "run dynprobe threshold without --each-position"
        )
    _has(run, "trials")
    rows = run.table("trials")
    rows = rows[rows["criterion"].astype(str) == what.criterion]
    found = pd.DataFrame(
        {
            "write": [write_name(s, k) for s, k in zip(rows["scale"], rows["kind"], strict=True)],
            "series": np.where(rows["alpha"] == 0, "sham", "perturbed"), "layer": rows["layer"].astype(int),
            "alpha": rows["alpha"].astype(float), "prompt_id": rows["prompt_id"].astype(str),
            "seed": rows["seed"].astype(int), "value": rows["response"].astype(float),
        }
    )  # fmt: skip
    if found["seed"].nunique() == 1 or on_a_grid(run):
        found = found.groupby(["write", "series", "layer", "alpha", "prompt_id"])["value"].mean().reset_index()
        return found.assign(curve=found["prompt_id"])
    return found.assign(curve=found["prompt_id"] + ", seed " + found["seed"].astype(str)).drop(columns="seed")


def _has(run: Run, table: str) -> None:
    if table not in run.manifest.rows():
        raise RunFolderError(f"{run.path} is {run.status} and has no {table} yet; continue it with the same command")


def on_a_grid(run: Run) -> bool:
    """Return whether all prompts saw the same strengths."""
    return bool(run.manifest.config.get("alphas"))


def chosen(rows: pd.DataFrame, run: Run, scale: str | None) -> pd.DataFrame:
    """Return the rows of one scale, or all.

    Raises:
        UsageError: The run has no such scale.
    """
    if scale is None:
        return rows
    known = sorted(set(rows["write"]))
    kept = rows[[scale in (write, write.split(",")[0]) for write in rows["write"]]]
    if kept.empty:
        raise UsageError(f"{run.path} has no scale {scale!r}; it has {', '.join(known)}.{did_you_mean(scale, known)}")
    return kept


def in_order(run: Run, writes: Iterable[str]) -> list[str]:
    """Return the writes once each, in the order in which their scales were asked for."""
    asked = [str(scale) for scale in run.manifest.config.get("scale") or ()]
    place = {scale: number for number, scale in enumerate(asked)}
    return sorted(set(writes), key=lambda write: (place.get(write.split(",")[0], len(place)), write))


def prompts_text(n: int) -> str:
    """Return a number of prompts in words."""
    return f"{n} prompt{'s' if n != 1 else ''}"


def caption(run: Run, heading: str, facts: Sequence[str], width: int = 110) -> str:
    """Return a title: model and what is seen; then what was written, where, into how many prompts."""
    config = run.manifest.config
    component = str(config.get("component") or "resid_post")
    said = [f"{component}, positions {config.get('positions') or '1:'}", *facts]
    seeds = config.get("seeds") or [0]
    if len(seeds) > 1:
        said.append(f"{len(seeds)} seeds")
    name = run.manifest.model_name
    name = Path(name).name if name.startswith(("/", ".")) else name
    lines = textwrap.wrap(f"{name}: {heading}", width)
    # A fact is not torn apart at the end of a line.
    whole = "; ".join(s.replace(" ", "\xa0") if len(s) < _WHOLE else s for s in said if s)
    return "\n".join([*lines, *textwrap.wrap(whole, width)]).replace("\xa0", " ")
