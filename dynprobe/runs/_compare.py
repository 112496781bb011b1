"""``compare``: any number of runs side by side, on the prompts they share.

A comparison refuses before it misleads. Two columns are set beside each other when their metric ids, definitions, spans
and aggregations are equal (:mod:`._compare_columns`); rows when they are about the same text (:mod:`._compare_sides`).
Depth is given on two axes, because models differ in how many updates they make (:mod:`._compare_depth`). Differences
are paired inside prompts, with the prompt as the unit of resampling (:mod:`._compare_pairs`). Where strengths have no
common unit, metrics are read at equal effect (:mod:`._compare_matched`). Where the variance lies between models, and
what their skeletons explain, is said in :mod:`._compare_variance`. What a reader must know stands in ``warnings``
(:mod:`._compare_warnings`).

The tables are read out of core by DuckDB, so their size is not bounded by memory (:mod:`._compare_read`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.errors import UsageError
from dynprobe.metrics.statistics import interval_words
from dynprobe.metrics.statistics._bootstrap import check_bootstrap
from dynprobe.runs._compare_columns import Quantity, common_columns, metric_facts
from dynprobe.runs._compare_correlation import delta_kappa
from dynprobe.runs._compare_matched import matched_kl
from dynprobe.runs._compare_pairs import Settings, sample_tables, sample_values
from dynprobe.runs._compare_profiles import DepthTables, depth_columns, depth_tables, read_profiles
from dynprobe.runs._compare_read import Reader
from dynprobe.runs._compare_sides import Pairing, Side, open_sides, pair_conditions, shared_prompts
from dynprobe.runs._compare_thresholds import threshold_ratios
from dynprobe.runs._compare_variance import variance_tables
from dynprobe.runs._compare_warnings import find_warnings
from dynprobe.runs._comparison import Comparison
from dynprobe.runs._protocol import protocol_of

__all__ = ["compare"]


def compare(
    runs: Sequence[Any],
    *,
    condition: Sequence[str] | str = (),
    metric: Sequence[str] | str = (),
    kl: Sequence[float] = (0.1, 1.0),
    margin: Mapping[str, float] | None = None,
    track: str | None = None,
    grid: int = 51,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare runs on the prompts they share.

    Args:
        runs: Run folders, or opened runs; two or more.
        condition: Conditions by id or arm; a comma separates alternatives (``"clean,T18"``). Default: clean, and up to
            four others that all runs have.
        metric: Columns to compare; default all that two runs have. κ always comes with its path.
        kl: Values of KL in nats at which sweeps are matched.
        margin: Column → largest difference that does not matter, for two one-sided tests; ``kappa_phase.area`` and
            ``kappa_phase.path`` name measures along depth.
        track: Track of runs that have several.
        grid: Points of normalised depth.
        confidence: Nominal coverage of intervals.
        n_boot: Bootstrap replicates, over prompts.
        seed: Seed of the resampling.

    Returns:
        A :class:`Comparison`: tables as pandas, warnings, ``save`` and ``draw``.

    Raises:
        RunFolderError: A folder is no run, or not finished; DuckDB is missing.
        UsageError: The runs share no prompt, no condition or no metric, or a metric that was named has two ids.

    Source:
        Reference §10.4, §10.5, §13.

    Example:
        >>> import tempfile
        >>> from dynprobe.protocols import run
        >>> texts = ["In the beginning God created", "And the earth was without form", "And God said"]
        >>> with tempfile.TemporaryDirectory() as out:
        ...     two = [run(name, texts, max_new_tokens=0, out=out) for name in ("tiny-llama", "tiny-cem")]
        ...     found = compare(two, metric="nll", n_boot=200)
        ...     sorted(found.runs["model"])
        ['tiny-cem', 'tiny-llama']
    """
    how = Settings(confidence, int(n_boot), int(seed), margin)
    check_bootstrap(how.n_boot, confidence)
    wanted = [metric] if isinstance(metric, str) else list(metric)
    conditions = [condition] if isinstance(condition, str) else list(condition)
    if grid < 3 or any(not k > 0 for k in kl):
        raise UsageError(f"grid has at least 3 points and kl is above 0 nats, found grid={grid}, kl={list(kl)}")
    sides = open_sides(runs)
    prompts = shared_prompts(sides)
    sampled = [side for side in sides if side.tables.get("samples")]
    points = np.linspace(0, 1, int(grid))
    quantities: list[Quantity] = []
    pairings: list[Pairing] = []
    tables: dict[str, pd.DataFrame] = {}
    values: Any = {}
    deep: list[Quantity] = []
    notes: list[str] = []
    few: list[str] = []
    with Reader(sides) as reader:
        if len(sampled) > 1:
            facts = [metric_facts(side, "samples") for side in sampled]
            deep, parts, homes = depth_columns(sampled, wanted)
            along = {q.column for q in deep}
            known = {name for frame in facts for name in frame}
            asked = [m for m in wanted if m in known or m not in along]
            quantities = common_columns(sampled, facts, asked) if asked or not wanted else []
            _refuse_all(quantities + deep, wanted)
            pairings = pair_conditions(sampled, conditions)
            values = sample_values(reader, sampled, pairings, quantities, prompts)
            tables["means"], tables["pairs"] = sample_tables(sampled, values, quantities, how)
            profiles, axes = read_profiles(reader, sampled, pairings, parts, homes, prompts, points, track)
            depth = depth_tables(sampled, profiles, axes, deep, points, how)
            for_deltas = [p.name for p in pairings] if conditions else [pairings[0].name]
            tables["variance"], tables["skeleton"], few = variance_tables(sampled, values, quantities, prompts, wanted)
            tables["correlations"] = delta_kappa(sampled, profiles, for_deltas, how)
            tables["matched_means"], tables["matched_pairs"], notes = matched_kl(
                reader, sampled, quantities, prompts, kl, how
            )
        else:
            depth = DepthTables(*[pd.DataFrame()] * 5)
        tables["thresholds"], more = threshold_ratios(sides, prompts, how)
    if not any(len(table) for table in (*tables.values(), depth.areas)):
        raise UsageError(_nothing(sides, sampled, notes + more))
    grave, warned = find_warnings(sides, sampled, pairings, quantities + deep, values, prompts)
    empty = pd.DataFrame()
    return Comparison(
        runs=_runs_table(sides, depth.axes),
        conditions=_conditions_table(sampled, pairings),
        depth_means=depth.areas, depth_pairs=depth.pairs, contrasts=depth.contrasts, profiles=depth.profiles,
        refused=_refused_table(quantities + deep),
        warnings=[*grave, *few, *warned, *notes, *more],
        grave=[*grave, *few],
        facts={
            "prompts": int(prompts["cluster"].nunique()), "confidence": confidence, "n_boot": how.n_boot,
            "intervals": interval_words(confidence),
            "seed": how.seed, "grid": int(grid),
        },
        **{
            name: tables.get(name, empty)
            for name in (
                "means", "pairs", "matched_means", "matched_pairs", "thresholds", "correlations", "variance",
                "skeleton",
            )
        },
    )  # fmt: skip


def _refuse_all(quantities: Sequence[Quantity], wanted: Sequence[str]) -> None:
    """Refuse a metric that was named and that no pair of runs may compare."""
    for q in quantities:
        held = [i for i, s in enumerate(q.sources) if s is not None]
        if q.column in wanted and len(q.refused) == len(held) * (len(held) - 1) // 2:
            raise UsageError(
                f"{q.column} is not one metric in these runs, and no converter is registered. "
                + "; ".join(q.refused.values())
                + ". Make the runs with one version and the same --span, or register a converter "
                "(dynprobe.runs.register_converter)."
            )


def _runs_table(sides: Sequence[Side], axes: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for side in sides:
        manifest = side.run.manifest
        dtypes = manifest.dtypes if isinstance(manifest.dtypes, dict) else {"weights": manifest.dtypes}
        rows.append(
            {
                "run": side.label, "model": manifest.model_name, "architecture": side.model_type,
                "protocol": protocol_of(manifest.config), "prompts": len(side.keys), "dtype": dtypes.get("weights"),
                "parameters": side.model.get("n_parameters"), "id8": manifest.id8, "path": str(side.run.path),
            }
        )  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame.merge(axes, on="run", how="left") if len(axes) else frame


def _conditions_table(sides: Sequence[Side], pairings: Sequence[Pairing]) -> pd.DataFrame:
    rows = []
    for pairing in pairings:
        for side, i in zip(sides, pairing.ids, strict=True):
            if i is not None:
                row = side.conditions.loc[i]
                kept = {
                    c: row[c] for c in ("arm", "decode_mode", "scale", "alpha", "where", "iterations") if c in row.index
                }
                rows.append({"condition": pairing.name, "run": side.label, "condition_id": i, **kept})
    return pd.DataFrame(rows)


def _refused_table(quantities: Sequence[Quantity]) -> pd.DataFrame:
    rows = [
        {"metric": q.column, "metric_id": q.metric_id, "reason": why} for q in quantities for why in q.refused.values()
    ]
    return pd.DataFrame(rows).drop_duplicates(ignore_index=True) if rows else pd.DataFrame()


def _nothing(sides: Sequence[Side], sampled: Sequence[Side], notes: Sequence[str]) -> str:
    what = "; ".join(f"{s.label} ({protocol_of(s.run.manifest.config)}: {', '.join(s.tables)})" for s in sides)
    lines = [f"these runs have no metric in common: {what}.", *notes]
    if len(sampled) < 2:
        lines.append("Means need two runs with samples, threshold ratios two runs of dynprobe threshold.")
    lines.append("dynprobe show RUN --columns prints what a run measures.")
    return "\n".join(lines)
