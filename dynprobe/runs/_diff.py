"""``diff``: the first depth and token at which two runs on the same tokens part.

Two runs that should agree (another dtype, a quantised copy, another version of a library, another engine) differ
somewhere first, and everything after follows from there. The difference of the two trajectories is laid over depth ×
token and held against the noise floor of the arithmetic. What is said is where it first rises above it, in the order of
the tokens (what a reader of the text meets first) and in the order of depth (what a reader of the model looks for), how
fast it grows from layer to layer, and what became of the output.

What it refuses: prompts that were cut into other tokens, states of different widths, runs without a common sample. It
says nothing about positions after the first token in which two texts differ, because they are not about the same input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.runs._diff_align import align
from dynprobe.runs._diff_cells import LABELS, cells_of
from dynprobe.runs._diff_floor import floor_of
from dynprobe.runs._diff_found import APART, EQUAL, NOTHING, WITHIN, Difference, place
from dynprobe.runs._diff_head import heads_of
from dynprobe.runs._identity import NOT_IDENTITY
from dynprobe.runs._manifest import Manifest
from dynprobe.runs._open_run import open_run
from dynprobe.runs._run import Run

__all__ = ["diff"]

_SAMPLE = ["condition_id", "prompt_id", "replicate"]
#: Fields of the manifest that say how its numbers were made.
_TOLD = (
    "schema_version", "model_name", "model", "weights", "config", "versions", "device", "dtypes", "seeds",
    "prompts_hash", "calibration_hash", "exact_length_batches", "foreign_hooks",
)  # fmt: skip
#: Facts that follow from where a model lies, not from what it is.
_UNTOLD = {"location", "folder", "notes", "display_name", "requested_revision", "name"}


def diff(
    a: Any,
    b: Any,
    *,
    floor: float | None = None,
    condition: str | Sequence[str] = (),
    prompt: str | Sequence[str] = (),
    track: str | None = None,
) -> Difference:
    """Find where two runs on the same tokens part beyond the noise floor.

    At every token and depth: ``e = ‖a − b‖ / max(‖a‖, ‖b‖)`` of the hidden states where both runs stored them, else the
    smallest e that the stored metrics prove. The floor is ``max(8·u·√(depth + 1), √dim · measured)`` with the unit
    roundoff u of the coarser dtype and the deviation that the runs' own self-tests measured.

    Args:
        a: A run, or its folder.
        b: Another.
        floor: A relative difference that counts as noise at every depth, in place of the rule.
        condition: Ids of conditions; default all that both have.
        prompt: Ids of prompts; default all that both have.
        track: One track; default all.

    Returns:
        What was found; print it, or see ``samples``, ``depths``, ``cells``, ``facts``.

    Raises:
        UsageError: The runs share no sample, a prompt is tokenised differently, or states have different widths.
        RunFolderError: A folder is no run, or is damaged.

    Example:
        >>> from dynprobe.errors import RunFolderError
        >>> try:
        ...     diff("no-such-run", "no-such-run")
        ... except RunFolderError as error:
        ...     print(str(error).split(".")[0])
        There is no run folder no-such-run
    """
    left, right = (one if isinstance(one, Run) else open_run(one) for one in (a, b))
    noise = floor_of(left.manifest, right.manifest, floor)
    found = align(left, right, _listed(condition), _listed(prompt))
    made, basis, alone = cells_of(left, right, found.samples)
    warnings = [*found.warnings, *_status(left, "A"), *_status(right, "B"), *_lone(basis, alone)]
    if track is not None:
        made = _on_track(made, track)
    cells = _cells(found.samples, made, noise)
    last = int(cells["depth"].max()) if len(cells) else 0
    heads = heads_of(left, right, found.samples, noise.nats(last))
    heads = _with_parting(left, right, found.samples, heads)
    samples = _judged(found.samples, cells, heads)
    warnings += _uncompared(samples)
    if basis == "metrics" and not samples["verdict"].str.startswith(APART).all():
        warnings.append(
            "no hidden states on both sides: differences are lower bounds from stored metrics, so a cell below the "
            "floor may still differ; run both with --states to measure it"
        )
    if basis == "none":
        warnings.append("the runs hold no states and no depths in common: only tokens and their read-outs are compared")
    return Difference(
        left.path, right.path, basis, noise, samples, _by_condition(samples), _by_depth(cells), cells,
        _facts(left.manifest, right.manifest), found.only_a, found.only_b, warnings,
    )  # fmt: skip


def _listed(words: str | Sequence[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _lone(basis: str, alone: tuple[int, int]) -> list[str]:
    return [
        f"{n} cells are in {name} only ({basis}) and were not compared"
        for name, n in zip("AB", alone, strict=True)
        if n
    ]


def _uncompared(samples: pd.DataFrame) -> list[str]:
    """Say where equality would rest on less than a reader thinks."""
    empty = int((samples["verdict"] == NOTHING).sum())
    mute = int(((samples["n_head"] == 0) & (samples["n_cells"] > 0)).sum())
    out = [f"{empty} of {len(samples)} samples hold nothing to compare; run both with --states"] if empty else []
    return out + ([f"{mute} of {len(samples)} samples have no read-out known in both runs"] if mute else [])


def _status(run: Run, name: str) -> list[str]:
    return [] if run.status == "complete" else [f"run {name} ({run.path}) is {run.status}: part of it is missing"]


def _with_parting(a: Run, b: Run, samples: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """Count the token at which two greedy texts part: each goes on with its most likely one."""
    greedy = all(run.manifest.config.get("temperature") == 0 for run in (a, b))
    if not greedy or not a.manifest.rows().get("conditions"):
        return heads
    table = a.conditions
    forced = set(table.loc[table["decode_mode"] == "forced", "condition_id"]) if "decode_mode" in table else set()
    both = samples["token_a"].notna() & samples["token_b"].notna() & (samples["n_same"] >= samples["n_prompt"])
    return heads.assign(top1_flips=heads["top1_flips"] + (both & ~samples["condition_id"].isin(forced)).astype(int))


def _on_track(cells: pd.DataFrame, track: str) -> pd.DataFrame:
    from dynprobe.errors import UsageError, did_you_mean

    known = list(dict.fromkeys(cells["track"]))
    if track not in known:
        raise UsageError(f"the runs have no track {track!r} in common.{did_you_mean(track, known)} Tracks: {known}.")
    return cells[cells["track"] == track]


def _cells(samples: pd.DataFrame, made: pd.DataFrame, noise: Any) -> pd.DataFrame:
    """Give every sample the cells of the rows that stand for it, up to the first token that differs."""
    joined = samples[[*_SAMPLE, "a", "b", "n_same"]].merge(made, on=["a", "b"], how="inner")
    unknown = joined["n_same"].isna()
    joined = joined[unknown | (joined["pos"] < joined["n_same"])].drop(columns=["n_same", "a", "b"])
    joined = joined.assign(floor=noise.at(joined["depth"].to_numpy(np.float64)))
    return joined.assign(beyond=joined["rel"] > joined["floor"]).reset_index(drop=True)


def _judged(samples: pd.DataFrame, cells: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    groups = dict(list(cells.groupby(_SAMPLE, sort=False))) if len(cells) else {}
    rows = []
    for row, head in zip(samples.to_dict("records"), heads.to_dict("records"), strict=True):
        own = groups.get(tuple(row[name] for name in _SAMPLE))
        rows.append(_judge(row, head, own))
    return pd.DataFrame(rows).convert_dtypes(convert_string=False, convert_boolean=False, convert_floating=False)


def _judge(row: Mapping[Any, Any], head: Mapping[Any, Any], cells: pd.DataFrame | None) -> dict[str, Any]:
    differ = not pd.isna(row["token_a"]) or not pd.isna(row["token_b"])
    out: dict[str, Any] = {name: row[name] for name in _SAMPLE}
    out |= {"verdict": "", "n_tokens": row["n_same"], "n_cells": 0, "n_beyond": 0, "max_rel": np.nan}
    out |= {"growth": np.nan, "growth_track": None}
    equal = (bool(head["head_equal"]) or not head["n_head"]) and not differ
    if cells is not None and len(cells):
        growth, grown = _growth(cells)
        worst = cells.iloc[int(cells["rel"].to_numpy().argmax())]
        beyond = cells[cells["beyond"]]
        out |= {
            "n_cells": len(cells), "n_beyond": len(beyond), "max_rel": float(worst["rel"]),
            "max_depth": int(worst["depth"]), "max_pos": int(worst["pos"]), "growth": growth, "growth_track": grown,
        }  # fmt: skip
        equal = equal and bool(cells["equal"].all())
        for prefix, order in (("token_", ["pos", "depth", "track"]), ("depth_", ["depth", "track", "pos"])):
            if len(beyond):
                out |= _first(beyond.sort_values(order, kind="stable").iloc[0], prefix)
    out |= {"differs_at": int(row["n_same"]) if differ else pd.NA}
    out |= {name: row[name] for name in ("token_a", "token_b", "text_a", "text_b")}
    out |= {name: value for name, value in head.items() if name != "head_equal"}
    out["verdict"] = _verdict(out, equal, differ)
    return out


def _verdict(out: Mapping[str, Any], equal: bool, differ: bool) -> str:
    if out["n_beyond"]:
        return f"{APART} at {place(out, 'depth_')}"
    if not pd.isna(out["head_pos"]):
        return f"{APART} at the readout, token {int(out['head_pos'])}"
    if differ:
        return f"{APART} at token {int(out['differs_at'])} of the text"
    if not out["n_cells"] and not out["n_head"]:
        return NOTHING
    return EQUAL if equal else WITHIN


def _first(cell: pd.Series, prefix: str) -> dict[str, Any]:
    names = [n for n in ("pos", "depth", "track", *LABELS, "slot", "rel", "floor") if n in cell.index]
    return {f"{prefix}{n}": None if pd.isna(cell[n]) else cell[n] for n in names}


def _growth(cells: pd.DataFrame) -> tuple[float, str | None]:
    """Factor per depth of the median over tokens, on the track where it is largest, and that track.

    On each track it is e to the slope of the logarithm; tracks with less than three depths above 0 have none.
    """
    found: dict[str, float] = {}
    for track, own in cells[np.isfinite(cells["rel"])].groupby("track", sort=False, observed=True):
        median = own.groupby("depth")["rel"].median()
        median = median[median > 0]
        if len(median) >= 3:
            slope = np.polyfit(median.index.to_numpy(np.float64), np.log(median.to_numpy()), 1)[0]
            found[str(track)] = float(np.exp(slope))
    if not found:
        return np.nan, None
    best = max(found, key=lambda name: found[name])
    return found[best], best


def _by_condition(samples: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name, own in samples.groupby("condition_id", sort=False, observed=True):
        parting = own[own["verdict"].str.startswith(APART)]
        row: dict[str, Any] = {
            "condition_id": name, "n": len(own), "n_part": len(parting),
            "n_equal": int((own["verdict"] == EQUAL).sum()),
            "verdict": _without_parting(own["verdict"]), "prompt_id": None,
            "max_rel": own["max_rel"].max(), "growth": own["growth"].median(),
            "n_texts_differ": int(own["differs_at"].notna().sum()), "top1_flips": int(own["top1_flips"].sum()),
            "top1_unknown": int(own["top1_unknown"].sum()), "nll_max": own["nll_max"].max(),
        }  # fmt: skip
        if len(parting):
            keys = [c for c in ("depth_depth", "depth_pos") if c in parting]
            first = parting.sort_values(keys, kind="stable", na_position="last").iloc[0] if keys else parting.iloc[0]
            row |= {"verdict": first["verdict"], "prompt_id": first["prompt_id"]}
        rows.append(row)
    return pd.DataFrame(rows)


def _without_parting(verdicts: pd.Series) -> str:
    compared = verdicts[verdicts != NOTHING]
    if not len(compared):
        return NOTHING
    return EQUAL if (compared == EQUAL).all() else WITHIN


def _by_depth(cells: pd.DataFrame) -> pd.DataFrame:
    columns = ["condition_id", "track", "depth", "n", "median", "largest", "floor", "share_beyond"]
    if not len(cells):
        return pd.DataFrame(columns=columns)
    groups = cells.groupby(["condition_id", "track", "depth"], sort=False, observed=True)
    found = groups.agg(
        n=("rel", "size"), median=("rel", "median"), largest=("rel", "max"), floor=("floor", "first"),
        share_beyond=("beyond", "mean"),
    ).reset_index()  # fmt: skip
    order = {c: n for n, c in enumerate(dict.fromkeys(cells["condition_id"]))}
    found = found.assign(order=found["condition_id"].map(order)).sort_values(["order", "track", "depth"])
    return found[columns].reset_index(drop=True)


def _facts(a: Manifest, b: Manifest) -> pd.DataFrame:
    """What the manifests say differently about how the numbers were made."""
    left, right = _told(a), _told(b)
    rows = [(n, left.get(n), right.get(n)) for n in dict.fromkeys([*left, *right]) if left.get(n) != right.get(n)]
    return pd.DataFrame([(n, _said(x), _said(y)) for n, x, y in rows], columns=["fact", "a", "b"])


def _told(manifest: Manifest) -> dict[str, Any]:
    content = manifest.model_dump()
    out: dict[str, Any] = {}
    for name in _TOLD:
        _flat(content.get(name), name, out)
    return out


def _flat(value: Any, name: str, out: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _UNTOLD and not (name == "config" and key in NOT_IDENTITY):
                _flat(item, f"{name}.{key}", out)
    elif value is not None:
        out[name] = value


def _said(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
