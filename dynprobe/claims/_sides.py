"""Rows of runs, found by labels: one frame per table with the words of the condition beside every row.

An analysis is a pure function of frames. A :class:`Side` gives it those of one run, in one role: every table joined
with its samples and conditions, parameters of a condition as columns ``params.NAME``, and the few facts about the model
that claims speak of (layers, parameters).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.claims._parts import Term
from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs import Run

__all__ = ["Side", "clusters", "reason_of", "side_of"]

_OF_SAMPLES = ("prompt_id", "condition_id", "category")
_NOT_AS_ASKED = ("not-written", "isokl-unreached")


@dataclass(eq=False)
class Side:
    """Tables of one run in one role.

    Args:
        role: The role.
        name: The model.
        tables: Name of a table → frame.
        facts: ``n_layers``, ``n_parameters``; NaN where unknown.
    """

    role: str
    name: str
    tables: Mapping[str, pd.DataFrame]
    facts: Mapping[str, float] = field(default_factory=dict)

    def rows(self, table: str, where: Mapping[str, Any], needed: Sequence[str] = ()) -> pd.DataFrame:
        """Return the rows of a table that meet every condition, in the order in which they are named.

        Raises:
            UsageError: The run has no such table or column.
        """
        frame = self._joined(table)
        for column, wanted in where.items():
            frame = frame[_meets(self._column(frame, column, table), wanted)]
        for column in needed:
            self._column(frame, column, table)
        return frame

    def _column(self, frame: pd.DataFrame, column: str, table: str) -> pd.Series:
        if column not in frame:
            raise UsageError(
                f"the {table} of {self.name} (role {self.role}) have no column {column!r}, which the claim rests on."
                f"{did_you_mean(column, [str(c) for c in frame])} Did the protocol that the claim names make the run?"
            )
        return frame[column]

    def _joined(self, table: str) -> pd.DataFrame:
        if table not in self.tables:
            raise UsageError(f"the run of {self.name} (role {self.role}) has no {table}, which the claim rests on")
        frame = self.tables[table]
        samples, conditions = self.tables.get("samples"), self.tables.get("conditions")
        if "sample_id" in frame and samples is not None and table != "samples":
            lacking = [c for c in _OF_SAMPLES if c in samples and c not in frame]
            frame = frame.merge(samples[["sample_id", *lacking]], on="sample_id", how="left", validate="m:1")
        if "condition_id" in frame and conditions is not None:
            words = _with_params(conditions)
            lacking = [str(c) for c in words if c not in frame]
            frame = frame.merge(words[["condition_id", *lacking]], on="condition_id", how="left", validate="m:1")
        return frame


def side_of(role: str, run: Run, tables: Sequence[str]) -> Side:
    """Read the tables that a claim rests on.

    Raises:
        RunFolderError: The run is not complete.
    """
    if run.status != "complete":
        raise RunFolderError(f"{run.path} is {run.status}; a claim is tested on whole runs. The same command ends it.")
    from dynprobe.protocols._summary import without_remarks

    frames = {}
    for table in dict.fromkeys((*tables, "samples", "conditions", "prompts")):
        frame = without_remarks(run.table(table))
        if len(frame) or table in tables:
            frames[table] = frame.astype({c: object for c in frame if isinstance(frame[c].dtype, pd.CategoricalDtype)})
    if "samples" in frames:
        frames["samples"] = _as_asked(frames["samples"])
    known = run.manifest.model
    model: Mapping[str, Any] = known if isinstance(known, dict) else {}
    layers = (model.get("structure") or {}).get("n_layers")
    facts = {"n_layers": _number(layers), "n_parameters": _number(model.get("n_parameters"))}
    return Side(role, str(model.get("display_name") or model.get("model_id") or run.manifest.model_name), frames, facts)


def _as_asked(samples: pd.DataFrame) -> pd.DataFrame:
    """Leave out samples whose push could not be written, and the label of a regime that has no ratio."""
    if "status" in samples:
        samples = samples[~samples["status"].isin(_NOT_AS_ASKED)]
    if "limen_regime" in samples:
        labels = samples["limen_regime"].astype(object)
        samples = samples.assign(limen_regime=labels.where(labels != "UNDEFINED"))
    return samples


def clusters(side: Side, term: Term, table: str, value: str, cluster: str, others: Mapping[str, Side]) -> pd.Series:
    """Return one number per cluster: the mean of the rows of a term."""
    frame = side.rows(table, term.where, (value, cluster))
    if term.keep is not None:
        frame = _third(frame, others[term.keep[0]], term.keep[1])
    numbers = pd.to_numeric(frame[value], errors="coerce").astype(float)
    return numbers.groupby(frame[cluster].astype(str)).mean()


def reason_of(frame: pd.DataFrame, value: str) -> str | None:
    """Return why most rows of samples have no value, as they say themselves; None where they say nothing.

    Example:
        >>> reason_of(pd.DataFrame({"reasons": ['{"kappa_phase": "depth<2"}', None]}), "kappa_phase_d")
        'depth<2'
    """
    texts = frame["reasons"].dropna() if "reasons" in frame else pd.Series(dtype=object)
    said = [json.loads(text) for text in texts if isinstance(text, str)]
    found = Counter(str(why) for row in said if (why := row.get(value) or row.get(value.removesuffix("_d"))))
    return found.most_common(1)[0][0] if found else None


def _third(frame: pd.DataFrame, judge: Side, which: str) -> pd.DataFrame:
    """Keep tokens whose loss under another model is among the highest or lowest third."""
    theirs = judge.rows("tokens", {"arm": "clean"}, ("nll",))[["prompt_id", "pos", "nll"]]
    theirs = theirs.rename(columns={"nll": "_judge"}).groupby(["prompt_id", "pos"]).mean().reset_index()
    both = frame.merge(theirs, on=["prompt_id", "pos"], how="inner").dropna(subset=["_judge"])
    if not len(both):
        return both
    low, high = np.quantile(both.drop_duplicates(["prompt_id", "pos"])["_judge"], [1 / 3, 2 / 3])
    return both[both["_judge"] >= high] if which == "highest" else both[both["_judge"] <= low]


def _meets(column: pd.Series, wanted: Any) -> pd.Series:
    if isinstance(wanted, str) and wanted in ("first", "last"):
        numbers = pd.to_numeric(column, errors="coerce")
        return numbers == (numbers.min() if wanted == "first" else numbers.max())
    if wanted == "above 0":
        return pd.to_numeric(column, errors="coerce") > 0
    if isinstance(wanted, list | tuple):
        return column.isin(list(wanted))
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        return column == wanted
    return pd.Series(np.isclose(pd.to_numeric(column, errors="coerce"), wanted, rtol=1e-9), index=column.index)


def _with_params(conditions: pd.DataFrame) -> pd.DataFrame:
    """Return the conditions with every parameter as a column of its own."""
    if "params" not in conditions:
        return conditions
    taken = [json.loads(p) if isinstance(p, str) and p else p for p in conditions["params"]]
    words = pd.DataFrame([p if isinstance(p, dict) else {} for p in taken], index=conditions.index)
    return pd.concat([conditions.drop(columns="params"), words.add_prefix("params.")], axis=1)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
