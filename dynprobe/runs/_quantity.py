"""What a picture of a sweep or threshold run shows: which response, under which level, in which words and units."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs._protocol import protocol_of

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = [
    "COLUMN_OF", "LEVELS", "Quantity", "alpha_label", "caption", "has", "is_sweep", "is_threshold", "level_of",
    "per_position", "prompts_text", "quantity", "write_name",
]  # fmt: skip

#: Level at which a response counts as destabilised, by the column that holds the response. ``dynprobe.protocols`` owns
#: the criteria; a test keeps these equal to them.
LEVELS = {"kl_clean_pert": 1.0, "flip_rate": 0.5}

#: Column in which a criterion's response is drawn.
COLUMN_OF = {"kl": "kl_clean_pert", "flip": "flip_rate", "kappa": "kappa_phase_d", "task": "accuracy_loss"}

#: Units of scales in runs that do not say them themselves, and of kinds that have no scale; a test keeps the former
#: equal to what the scales say.
_UNITS = {
    "relnorm": "‖u‖ / ‖h‖", "coordstd": "SDs of each coordinate", "mad": "robust SDs of the state",
    "cov": "SDs along the principal axes", "abs": "the model's own units", "interp": "share of the way to the donor",
    "neftune": "in α/√(L·d)", "isokl": "nats of mean KL",
    "rotate": "angle in radians", "dropout": "probability", "scale": "factor − 1",
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
    return protocol_of(run.manifest.config) == "threshold"


def is_sweep(run: Run) -> bool:
    """Return whether the run is a sweep."""
    return protocol_of(run.manifest.config) == "sweep"


def per_position(run: Run) -> bool:
    """Return whether the run has one threshold per position."""
    return bool(run.manifest.config.get("each_position"))


def has(run: Run, table: str) -> None:
    """Refuse a run that holds nothing of a table.

    Raises:
        RunFolderError: It does not, yet.
    """
    if table not in run.manifest.rows():
        raise RunFolderError(f"{run.path} is {run.status} and has no {table} yet; continue it with the same command")


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
        known = {COLUMN_OF.get(name, name): name for name in map(str, run.manifest.config.get("criterion") or ())}
        names = {**known, **{name: name for name in known.values()}}
        if column is not None and column not in names:
            raise UsageError(
                f"{run.path} searched {', '.join(known.values())}, not {column!r}.{did_you_mean(column, names)} "
                f"Another criterion: dynprobe threshold --criterion …"
            )
        criterion = names[column] if column is not None else next(iter(known.values()))
        return _named(run, COLUMN_OF.get(criterion, criterion), criterion)
    if not is_sweep(run):
        raise RunFolderError(
            f"{run.path} is neither a sweep nor a threshold run, so it has no response against α. Make one: "
            "dynprobe sweep --model … or dynprobe threshold --model …"
        )
    has(run, "samples")
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


def level_of(run: Run, what: Quantity) -> float:
    """Return the level of the criterion, where it is one for all layers; NaN where it is not."""
    if not is_threshold(run):
        return LEVELS.get(what.column, math.nan)
    trials = run.table("trials", columns=["criterion", "level"])
    found = trials[trials["criterion"].astype(str) == what.criterion]["level"].unique()
    return float(found[0]) if len(found) == 1 else math.nan


def write_name(scale: Any, kind: Any) -> str:
    """Return the name of a scale and kind of write; gaussian is not said, and some kinds have no scale.

    Example:
        >>> write_name("relnorm", "gaussian"), write_name("mad", "direction"), write_name("", "rotate")
        ('relnorm', 'mad, direction', 'rotate')
    """
    scale, kind = "" if pd.isna(scale) else str(scale), str(kind)
    if scale in ("", kind):
        return kind
    return scale if kind == "gaussian" else f"{scale}, {kind}"


def alpha_label(write: str, symbol: str = "α", run: Run | None = None) -> str:
    """Return the label of an axis of strengths; a run knows the units of scales that other packages bring.

    Example:
        >>> alpha_label("coordstd")
        'α, coordstd (SDs of each coordinate)'
    """
    scale = write.split(",")[0]
    said = {} if run is None else (run.manifest.scales or {}).get(scale, {})
    unit = said.get("unit") or _UNITS.get(scale)
    return f"{symbol}, {write} ({unit})" if unit else f"{symbol}, {write}"


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
