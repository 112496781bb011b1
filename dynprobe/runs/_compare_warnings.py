"""What a reader of a comparison must know before believing it.

Every line names the runs, what differs, and what that does to the numbers. Nothing here stops a comparison: what would
make a number wrong is refused elsewhere. Grave is what forbids to read some of the tables as they look: no such number
means what its heading says. Whoever prints a comparison says it before the tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from dynprobe.errors import MetricError
from dynprobe.metrics import spec
from dynprobe.runs._compare_columns import Quantity
from dynprobe.runs._compare_pairs import SideValues
from dynprobe.runs._compare_sides import Pairing, Side

__all__ = ["find_warnings"]

#: Whether it is grave, and the text.
Found: TypeAlias = Iterator[tuple[bool, str]]

_HALF = ("bfloat16", "float16", "bf16", "fp16", "half")
_ANGLES = ("kappa", "angle", "limen", "curv", "diverge")
_READOUT = ("nll", "ppl", "entropy", "margin", "kl_clean_pert")
#: Units of a length in the space of states, which another model does not share.
_OWN_UNIT = ("state", "model units")
#: What two conditions of one name must share.
_CONDITION = ("decode_mode", "scale", "alpha", "kind", "seed", "controller", "temperature", "top_p", "max_new_tokens")
#: Lengths that differ by less than this do not matter.
_LENGTH = 0.02
_FEWEST_MODELS = 3


def find_warnings(
    sides: Sequence[Side],
    sampled: Sequence[Side],
    pairings: Sequence[Pairing],
    quantities: Sequence[Quantity],
    values: SideValues,
    prompts: pd.DataFrame,
) -> tuple[list[str], list[str]]:
    """Return the grave warnings, and the others; of both the most serious first."""
    found = [
        *_weights(sides), *_precision(sides, quantities), *_units(sides, quantities),
        *_lengths(sampled, values, quantities),
        *_conditions(sampled, pairings), *_replication(sampled, values, prompts), *_prompts(sides, prompts),
        *_tokenizers(sampled, quantities), *_calibrations(sides), *_versions(sides), *_models(sides),
    ]  # fmt: skip
    return [text for grave, text in found if grave], [text for grave, text in found if not grave]


def _weights(sides: Sequence[Side]) -> Found:
    for a, b in combinations(sides, 2):
        x, y = _model_id(a), _model_id(b)
        if x and x == y and a.weights and b.weights and a.weights != b.weights:
            yield (
                True,
                f"{a.label} and {b.label} are both called {x} and have other weights ({a.weights[-12:]} against "
                f"{b.weights[-12:]}): they are two models",
            )


def _precision(sides: Sequence[Side], quantities: Sequence[Quantity]) -> Found:
    dtypes = {side.label: side.dtype for side in sides}
    low = [label for label, d in dtypes.items() if any(word in d for word in _HALF)]
    if low and (not quantities or any(q.column.startswith(_ANGLES) for q in quantities)):
        yield (
            True,
            f"{_listed(low)}: states are {_listed(sorted({dtypes[x] for x in low}))}, whose rounding alone turns a "
            "state by up to 5e-4 half-turns (bfloat16) or 7e-5 (float16): angles and κ differences of that size mean "
            "nothing; run with --dtype float32",
        )
    known = {d for d in dtypes.values() if d}
    if len(known) > 1:
        yield False, "other dtype: " + "; ".join(f"{label} {d}" for label, d in dtypes.items())


def _units(sides: Sequence[Side], quantities: Sequence[Quantity]) -> Found:
    """Say which quantities are in the lengths of a model's own states."""
    own = list(dict.fromkeys(q.column for q in quantities if q.unit in _OWN_UNIT))
    if own and len({side.weights or side.label for side in sides}) > 1:
        yield (
            True,
            f"{_listed(own)}: the unit is the length of a state, which is each model's own (its width, its scale): "
            "between models a difference or a ratio of these means nothing",
        )


def _lengths(sides: Sequence[Side], values: SideValues, quantities: Sequence[Quantity]) -> Found:
    grows = _growing(quantities)
    for condition, found in values.items():
        for a, b in combinations([s for s in sides if s.number in found], 2):
            x, y = found[a.number], found[b.number]
            for column, word in (("n_fed", "tokens"), ("n_prompt", "prompt tokens"), ("n_new", "new tokens")):
                if column not in x or column not in y:
                    continue
                p, q = x[column].to_numpy(np.float64), y[column].to_numpy(np.float64)
                ok = np.isfinite(p) & np.isfinite(q)
                if not ok.any() or np.allclose(p[ok], q[ok], rtol=_LENGTH, atol=0.5):
                    continue
                more = f" ({', '.join(grows[:6])}{' …' if len(grows) > 6 else ''})" if grows else ""
                yield (
                    True,
                    f"unequal T in {condition}: {a.label} read {p[ok].mean():.4g} {word} a prompt and {b.label} "
                    f"{q[ok].mean():.4g}; metrics that grow with length{more} cannot be compared as they are",
                )
                break


def _growing(quantities: Sequence[Quantity]) -> list[str]:
    """Return the metrics over states or their series whose expectation depends on length, by the catalogue."""
    out = []
    for q in quantities:
        try:
            known = spec(q.metric_id)
        except MetricError:  # of a plug-in that is not installed here, or of another version
            continue
        if "T" not in known.invariances and known.input.startswith(("trajectory", "tokens", "series")):
            out.append(q.column)
    return list(dict.fromkeys(out))


def _conditions(sides: Sequence[Side], pairings: Sequence[Pairing]) -> Found:
    for pairing in pairings:
        rows = [
            (side.label, side.conditions.loc[i]) for side, i in zip(sides, pairing.ids, strict=True) if i is not None
        ]
        for column in _CONDITION:
            seen = {label: row[column] for label, row in rows if column in row.index and not pd.isna(row[column])}
            if len({str(v) for v in seen.values()}) > 1:
                said = "; ".join(f"{label} {_plain(v)}" for label, v in seen.items())
                yield True, f"{pairing.name} is not the same in all runs: {column} is {said}"


def _replication(sides: Sequence[Side], values: SideValues, prompts: pd.DataFrame) -> Found:
    repeated = len(prompts) - prompts["cluster"].nunique()
    if repeated:
        yield False, f"{repeated} prompts have the text of another; prompts with one text are one cluster"
    for condition, found in values.items():
        for side in sides:
            frame = found.get(side.number)
            if frame is None or not frame["n_rows"].sum():
                continue
            rows, n = int(frame["n_rows"].sum()), int((frame["n_rows"] > 0).sum())
            if rows > n:
                word = "pseudo-replication" if rows > 2 * n else "replicates"
                yield (
                    False,
                    f"{word}: {condition} of {side.label} has {rows} rows of {n} prompts; they are averaged inside the "
                    f"prompt, and n is {n}",
                )


def _prompts(sides: Sequence[Side], prompts: pd.DataFrame) -> Found:
    for side in sides:
        if len(side.keys) > len(prompts):
            yield (
                False,
                f"{side.label}: {len(prompts)} of its {len(side.keys)} prompts are in all runs; the others are "
                "left out",
            )
        other = [s.label for s in sides if any(k in s.keys and s.keys[k] != v for k, v in side.keys.items())]
        if other and side is sides[0]:
            yield False, f"some prompts of {side.label} have another text in {_listed(other)}; they are left out"
    nameless = [side.label for side in sides if any(side.keys.get(p) is None for p in prompts["prompt_id"])]
    if nameless:
        yield True, f"{_listed(nameless)} hold no text of some prompts, so these are matched by name alone"
    n = prompts["cluster"].nunique()
    if n < 6:
        yield True, f"{n} prompts in common: no sign-flip p can be below {2 / 2**n:.3g}; intervals of so few are rough"


def _tokenizers(sides: Sequence[Side], quantities: Sequence[Quantity]) -> Found:
    shown = [q.column for q in quantities if q.column in _READOUT]
    kinds = {side.label: _tokenizer(side) for side in sides}
    if shown and len({k for k in kinds.values() if k}) > 1:
        yield (
            True,
            f"the runs have other tokenizers ({'; '.join(f'{k} {v}' for k, v in kinds.items() if v)}): "
            f"{', '.join(shown)} are per token of different vocabularies",
        )


def _calibrations(sides: Sequence[Side]) -> Found:
    for a, b in combinations(sides, 2):
        x, y = a.run.manifest.calibration_hash, b.run.manifest.calibration_hash
        if x and y and x != y and a.weights and a.weights == b.weights:
            yield (
                True,
                f"{a.label} and {b.label} are one model under two calibrations ({x} and {y}): calibrated scales "
                "(coordstd, mad, readiness) are not in one unit",
            )


def _versions(sides: Sequence[Side]) -> Found:
    for library in ("dynprobe", "torch", "transformers"):
        seen = {side.label: str(v) for side in sides if (v := side.run.manifest.versions.get(library))}
        if len(set(seen.values())) > 1:
            yield False, f"other version of {library}: " + "; ".join(f"{label} {v}" for label, v in seen.items())


def _models(sides: Sequence[Side]) -> Found:
    kinds = {side.model_type for side in sides}
    if len(kinds) < 2:
        return
    count = Counter(kind for kind, _ in {(side.model_type, side.weights or side.label) for side in sides})
    few = [f"{n} {kind}" for kind, n in sorted(count.items()) if n < _FEWEST_MODELS]
    if few:
        yield (
            True,
            f"too few models per architecture ({', '.join(few)}; {_FEWEST_MODELS} of each are the least): these are "
            "differences of these models and say nothing about their architectures",
        )


def _model_id(side: Side) -> str:
    return str(side.model.get("model_id") or side.run.manifest.model_name)


def _tokenizer(side: Side) -> str:
    found = side.model.get("tokenizer")
    return f"{found.get('class')} of {found.get('size')}" if isinstance(found, dict) else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
