"""What a comparison found: tables, warnings, and how they are written to a file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import UsageError
from dynprobe.runs._atomic import write_bytes
from dynprobe.runs._csv import as_csv
from dynprobe.runs._json import dumps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TABLES_OF", "Comparison"]

#: Tables of a comparison and what they are, in the order in which they are written.
TABLES_OF = {
    "runs": "The runs.",
    "conditions": "Conditions that stand beside each other.",
    "means": "Means over prompts of every run.",
    "pairs": "Paired differences a − b on common prompts.",
    "depth_means": "Mean area on normalised depth, and mean path.",
    "depth_pairs": "Paired differences of areas and paths.",
    "contrasts": "Where two profiles differ most, p over the whole profile.",
    "profiles": "Mean profiles on normalised depth s, and the path up to s.",
    "matched_means": "Means at equal KL.",
    "matched_pairs": "Paired differences at equal KL; ln_alpha is the strength itself.",
    "thresholds": "Ratios of thresholds.",
    "correlations": "Rank correlation of one run's Δ with another's κ.",
    "variance": "Where the variance lies: models, categories, prompts, seeds and their interactions.",
    "skeleton": "What the models' skeletons explain of their means.",
    "refused": "Metrics that were not compared, and why.",
}


@dataclass(repr=False)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        runs: One row per run: label, model, architecture, track, steps, path of the folder.
        conditions: One row per condition and run.
        means: Mean over prompts per condition, metric and run, with its bootstrap interval.
        pairs: Paired difference per condition, metric and pair: interval, effect size, p, Holm, Benjamini–Hochberg.
        depth_means: The same of area on normalised depth and of the path, per prompt.
        depth_pairs: Their paired differences.
        contrasts: Largest pointwise difference of each pair of profiles, p by the maximum statistic.
        profiles: Mean profiles on the common grid.
        matched_means: Metrics where KL is equal.
        matched_pairs: Their paired differences.
        thresholds: Ratios of thresholds with intervals.
        correlations: Δ of one run against κ of another.
        variance: Sums of squares, η² and ω² of every term, where the runs are of two models or more.
        skeleton: R² of parameters, depth, width, heads, norm and positions, from four models on.
        refused: Metrics that were not compared.
        warnings: What a reader must know, the grave first.
        grave: Those of the warnings that forbid to read some of the tables as they look.
        facts: Number of common prompts, confidence, replicates, seed.
    """

    runs: pd.DataFrame
    conditions: pd.DataFrame
    means: pd.DataFrame
    pairs: pd.DataFrame
    depth_means: pd.DataFrame
    depth_pairs: pd.DataFrame
    contrasts: pd.DataFrame
    profiles: pd.DataFrame
    matched_means: pd.DataFrame
    matched_pairs: pd.DataFrame
    thresholds: pd.DataFrame
    correlations: pd.DataFrame
    variance: pd.DataFrame
    skeleton: pd.DataFrame
    refused: pd.DataFrame
    warnings: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    grave: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain lists and mappings; a number that is not known is None."""
        tables = {name: _records(getattr(self, name)) for name in TABLES_OF}
        return {"facts": self.facts, "warnings": list(self.warnings), "grave": list(self.grave), **tables}

    def save(self, target: str | Path) -> Path:
        """Write everything to ``.json`` or ``.md``, or the tables below each other to ``.csv``.

        Raises:
            UsageError: The ending is another, or the folder is not there.
        """
        target = Path(target)
        writers = {".json": self._json, ".csv": self._csv, ".md": self._markdown}
        if target.suffix not in writers:
            raise UsageError(f"--out {target}: the ending says the format, one of {', '.join(writers)}")
        if not target.parent.is_dir():
            raise UsageError(f"--out {target}: there is no folder {target.parent}")
        write_bytes(target, writers[target.suffix]().encode("utf-8"))
        return target

    def figure(self, metric: str | None = None, condition: str | None = None) -> Figure:
        """Return the picture: profiles on normalised depth, and the path beside them.

        Args:
            metric: Metric along depth; default κ, else the first.
            condition: Condition; default the first.
        """
        from dynprobe.runs._plot_compare import draw_comparison

        return draw_comparison(self, metric, condition)

    def draw(self, target: str | Path, metric: str | None = None, condition: str | None = None) -> Path:
        """Save the picture; the ending chooses the format."""
        from dynprobe.runs._canvas import save_figure

        return save_figure(self.figure(metric, condition), target)

    def __repr__(self) -> str:
        n = self.facts.get("prompts")
        labels = ", ".join(self.runs["run"])
        held = ", ".join(f"{name} {len(getattr(self, name))}" for name in TABLES_OF if len(getattr(self, name)))
        return f"Comparison of {labels} on {n} common prompts\nrows: {held}\n{len(self.warnings)} warnings"

    def _json(self) -> str:
        return dumps(self.to_dict(), indent=1) + "\n"

    def _csv(self) -> str:
        """All tables in one long table, whose column ``table`` says which one a row is of."""
        frames = [getattr(self, name).assign(table=name) for name in TABLES_OF if len(getattr(self, name))]
        frames.append(pd.DataFrame({"table": "warnings", "reason": self.warnings}))
        whole = pd.concat([f.astype(object) for f in frames], ignore_index=True)
        return as_csv(whole[["table", *(c for c in whole if c != "table")]])

    def _markdown(self) -> str:
        lines = [f"# {', '.join(self.runs['run'])}", ""]
        lines += [f"{key}: {value}  " for key, value in self.facts.items()] + [""]
        lines += [f"- {text}" for text in self.warnings] + [""]
        for name, words in TABLES_OF.items():
            frame = getattr(self, name)
            if not len(frame) or name == "profiles":
                continue
            lines += [f"## {words}", "", "| " + " | ".join(frame.columns) + " |", "|" + " --- |" * frame.shape[1]]
            for row in frame.itertuples(index=False):
                lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
            lines.append("")
        return "\n".join(lines)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): _plain(v) for k, v in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return None if value is pd.NA or value is pd.NaT else value


def _cell(value: Any) -> str:
    value = _plain(value)
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
