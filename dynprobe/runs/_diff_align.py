"""Which rows of two runs are about the same thing.

Rows are found by their labels. A prompt is the same where its tokens are; its text leads to its partner, and where the
partner was cut into other tokens nothing after it can be compared, so that is refused with the first token that
differs. A sample is a prompt under a condition in a replicate. A sample that equals another bit for bit is stored as a
digest; its rows stand with that other one.

Below a text of its own, two runs go on only as long as they have written the same tokens: the state at position p
follows from the tokens 0 … p, so positions from the first differing token on are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs._run import Run
from dynprobe.runs._text_hash import text_hash

__all__ = ["Aligned", "align"]

_FACTS = ("arm", "decode_mode", "scale", "alpha", "kind", "where", "seed", "controller", "temperature", "top_p")


@dataclass(frozen=True)
class Aligned:
    """Samples of two runs side by side.

    Attributes:
        samples: One row per pair: ``condition_id, prompt_id, replicate``, ``a`` and ``b`` (ids of the samples whose
            rows stand for it), ``n_same`` (leading tokens that are the same), ``n_a``, ``n_b`` (tokens of each),
            ``n_prompt``, ``token_a``, ``token_b`` (the first that differ), ``text_a``, ``text_b``.
        only_a: What only run A has, in words.
        only_b: What only run B has.
        warnings: What a reader must know.
    """

    samples: pd.DataFrame
    only_a: list[str]
    only_b: list[str]
    warnings: list[str]


def align(a: Run, b: Run, conditions: Sequence[str] = (), prompts: Sequence[str] = ()) -> Aligned:
    """Find the samples that two runs share.

    Args:
        a: One run.
        b: The other.
        conditions: Ids of conditions; empty for all that both have.
        prompts: Ids of prompts in run A; empty for all that both have.

    Raises:
        UsageError: The runs share no sample, a name is unknown, or a prompt is tokenised differently.
        RunFolderError: A run holds no samples.
    """
    left, right = _samples(a), _samples(b)
    names, lost = _prompts(a, b, prompts)
    same_names = [c for c in dict.fromkeys(left["condition_id"]) if c in set(right["condition_id"])]
    for word in conditions:
        if word not in same_names:
            raise UsageError(
                f"the runs have no condition {word!r} in common.{did_you_mean(word, same_names)} Both have: "
                f"{', '.join(same_names) or 'none'}."
            )
    wanted = list(conditions) or same_names
    left["partner"] = left["prompt_id"].map(names)
    keep = left["partner"].notna() & left["condition_id"].isin(wanted)
    right = right.rename(columns={"prompt_id": "partner", "own": "own_b", "text": "text_b", "n_prompt": "n_prompt_b"})
    pairs = left[keep].merge(right, on=["partner", "condition_id", "replicate"], how="left", indicator=True)
    both = pairs[pairs["_merge"] == "both"]
    if not len(both):
        raise UsageError(
            f"{a.path} and {b.path} share no sample: conditions of A are {_listed(left['condition_id'])}, of B "
            f"{_listed(right['condition_id'])}; {sum(v is not None for v in names.values())} prompts are the same. "
            + ". ".join(lost[2][:3])
        )
    only_a, only_b = _only(left, right, names, wanted if conditions else None, bool(prompts))
    both = both.rename(columns={"own": "a", "own_b": "b", "text": "text_a"}).reset_index(drop=True)
    tokens = _common_tokens(a, b, both)
    rank = {c: n for n, c in enumerate(wanted)}
    table = pd.concat([both[["condition_id", "prompt_id", "replicate", "a", "b", "text_a", "text_b"]], tokens], axis=1)
    order = table["condition_id"].map(rank)
    table = table.assign(order=order).sort_values(["order", "prompt_id", "replicate"]).drop(columns="order")
    return Aligned(
        table.reset_index(drop=True), only_a + lost[0], only_b + lost[1], _other_conditions(a, b, wanted) + lost[2]
    )


def _samples(run: Run) -> pd.DataFrame:
    rows = run.manifest.rows()
    if not rows.get("samples") or not (rows.get("depths") or rows.get("tokens") or rows.get("states")):
        raise RunFolderError(
            f"{run.path} holds no samples with states, depths or tokens: it has {', '.join(rows) or 'no table'}. "
            "diff compares what run, sweep, iterate, recover or import have written."
        )
    found = run.samples
    frame = pd.DataFrame(
        {
            "sample_id": found["sample_id"].astype(str),
            "prompt_id": found["prompt_id"].astype(str),
            "condition_id": found["condition_id"].astype(str),
            "replicate": found.get("replicate", 0),
            "text": found["text"].astype(object) if "text" in found else None,
            "n_prompt": found.get("n_prompt", np.nan),
        }
    )
    frame["own"] = frame["sample_id"]
    if "equal_to" in found and found["equal_to"].notna().any():
        frame["equal_to"] = found["equal_to"].astype(object)
        where = {(p, c, r): s for s, p, c, r in frame[["sample_id", "prompt_id", "condition_id", "replicate"]].values}
        for index in frame.index[frame["equal_to"].notna()]:
            row = frame.loc[index]
            frame.loc[index, "own"] = where.get((row["prompt_id"], row["equal_to"], row["replicate"]), row["sample_id"])
    return frame[["prompt_id", "condition_id", "replicate", "own", "text", "n_prompt"]]


def _prompts(
    a: Run, b: Run, wanted: Sequence[str]
) -> tuple[dict[str, str | None], tuple[list[str], list[str], list[str]]]:
    """Return the partner in B of every prompt of A, and what has none."""
    left, right = _described(a), _described(b)
    for name in wanted:
        if name not in left:
            raise UsageError(f"{a.path} has no prompt {name!r}.{did_you_mean(name, left)}")
    partner = _paired({n: one for n, one in left.items() if not wanted or n in wanted}, right)
    for name, other in partner.items():
        if other is not None:
            _same_tokens(a, b, name, left[name], right[other])
    taken = set(partner.values())
    warned = [_why_not(n, left[n], right[n]) for n, o in partner.items() if o is None and n in right and n not in taken]
    only_a = [f"prompt {n}" for n, o in partner.items() if o is None]
    only_b = [] if wanted else [f"prompt {n}" for n in right if n not in taken]
    return partner, (only_a, only_b, warned)


def _paired(left: dict[str, Any], right: dict[str, Any]) -> dict[str, str | None]:
    """Pair prompts one to one: of equal text or tokens, those of one name first.

    A prompt without text and token ids equals none: nothing says what it is.
    """
    partner: dict[str, str | None] = dict.fromkeys(left)
    free = dict.fromkeys(right)
    for same_name, same_tokens in ((True, False), (False, True), (False, False)):
        waiting: dict[str, list[str]] = {}
        for other in free:
            for key in _keys(right[other]):
                waiting.setdefault(key, []).append(other)
        for name in [n for n, o in partner.items() if o is None]:
            options = [o for key in _keys(left[name]) for o in waiting.get(key, ()) if o in free]
            if same_name:
                options = [o for o in options if o == name]
            if same_tokens:
                options = [o for o in options if left[name][1] == right[o][1]]
            options = [o for o in options if _one_input(left[name], right[o])]
            if options:
                partner[name] = options[0]
                del free[options[0]]
    return partner


def _keys(one: Any) -> list[str]:
    """Hashes by which a prompt is known: of its text, of its tokens."""
    text, ids, _ = one
    known = ids if ids is not None and min(ids) >= 0 else None
    return list(dict.fromkeys(h for h in (text_hash(text), text_hash(None, known)) if h is not None))


def _one_input(left: Any, right: Any) -> bool:
    """Whether two prompts that share a key are one: texts decide where both have one."""
    return left[0] is None or right[0] is None or text_hash(left[0]) == text_hash(right[0])


def _why_not(name: str, left: Any, right: Any) -> str:
    for side, one in (("A", left), ("B", right)):
        if not _keys(one):
            return f"prompt {name} has neither a text nor token ids in {side}, so nothing says what it is: left out"
    if (left[0] is None) != (right[0] is None):
        return f"prompt {name} has a text in one run and other token ids, or only ids, in the other: left out"
    return f"prompt {name} has another text in B and is left out"


def _described(run: Run) -> dict[str, tuple[str | None, tuple[int, ...] | None, list[str] | None]]:
    if not run.manifest.rows().get("prompts"):
        raise RunFolderError(f"{run.path} holds no prompts, so nothing says which rows are about the same text.")
    table = run.prompts
    out = {}
    for row in table.to_dict("records"):
        text, ids, words = row.get("text"), row.get("token_ids"), row.get("token_texts")
        tokens = tuple(int(i) for i in ids) if isinstance(ids, list | tuple | np.ndarray) else None
        if tokens is not None and all(i < 0 for i in tokens):  # an import without token ids
            tokens = None
        out[str(row["prompt_id"])] = (text if isinstance(text, str) and text else None, tokens, _words(words))
    return out


def _words(stored: Any) -> list[str] | None:
    import json

    try:
        found = json.loads(stored) if isinstance(stored, str) else None
    except ValueError:
        return None
    return [str(w) for w in found] if isinstance(found, list) else None


def _same_tokens(a: Run, b: Run, name: str, left: Any, right: Any) -> None:
    (_, mine, words_a), (_, other, words_b) = left, right
    if mine is None or other is None:
        return
    if len(mine) == len(other) and all(x == y or min(x, y) < 0 for x, y in zip(mine, other, strict=True)):
        return
    at = next(
        (i for i, (x, y) in enumerate(zip(mine, other, strict=False)) if x != y and min(x, y) >= 0),
        min(len(mine), len(other)),
    )
    raise UsageError(
        f"prompt {name} is not the same tokens in both runs: {len(mine)} in A ({a.path}), {len(other)} in B "
        f"({b.path}); "
        f"the first that differs is token {at}: {_token(mine, words_a, at)} in A, {_token(other, words_b, at)} in B. "
        "Run both with one tokenizer and one --chat-template, or leave the prompt out with --prompt."
    )


def _token(ids: tuple[int, ...], words: list[str] | None, at: int) -> str:
    if at >= len(ids):
        return "none (it has ended)"
    return f"{words[at]!r} (id {ids[at]})" if words is not None and at < len(words) else f"id {ids[at]}"


def _common_tokens(a: Run, b: Run, pairs: pd.DataFrame) -> pd.DataFrame:
    """Return how far the tokens of each pair are the same, and which differ first."""
    left, right = _written(a), _written(b)
    rows = []
    for x, y, n_prompt in zip(pairs["a"], pairs["b"], pairs["n_prompt"], strict=True):
        one, two = left.get(x), right.get(y)
        if one is None or two is None:  # nothing but the prompt is known to be the same
            rows.append((n_prompt, np.nan, np.nan, n_prompt, pd.NA, pd.NA))
            continue
        short = min(len(one), len(two))
        known = np.minimum(one[:short], two[:short]) >= 0
        apart = np.flatnonzero(known & (one[:short] != two[:short]))
        same = int(apart[0]) if apart.size else short
        # Past the prompt nothing but its tokens says that two texts are the same, so an unknown one ends it.
        lost = np.flatnonzero(~known & (np.arange(short) >= (n_prompt if pd.notna(n_prompt) else 0)))
        ends = bool(lost.size) and int(lost[0]) <= same
        same = int(lost[0]) if ends else same
        first = [int(t[same]) if same < len(t) and not ends else pd.NA for t in (one, two)]
        rows.append((same, len(one), len(two), n_prompt, *first))
    frame = pd.DataFrame(rows, columns=["n_same", "n_a", "n_b", "n_prompt", "token_a", "token_b"])
    return frame.astype({"token_a": "Int64", "token_b": "Int64"})


def _written(run: Run) -> dict[str, np.ndarray]:
    """Return the tokens of every sample in the order of their positions, the last target included; −1 is unknown."""
    if not run.manifest.rows().get("tokens"):
        return {}
    known = set(run.columns().query("table == 'tokens'")["column"])
    if "token_id" not in known:
        return {}
    columns = ["sample_id", "pos", "token_id", *(["target_id"] if "target_id" in known else [])]
    frame = run.table("tokens", columns).sort_values("pos", kind="stable")
    out = {}
    for name, rows in frame.groupby("sample_id", observed=True, sort=False):
        ids = rows["token_id"].to_numpy(np.float64, na_value=np.nan)
        if np.isnan(ids).any() or (rows["pos"].to_numpy() != np.arange(len(rows))).any():
            continue
        last = rows["target_id"].iloc[-1] if "target_id" in rows else np.nan
        out[str(name)] = np.append(ids, [last] if pd.notna(last) else []).astype(np.int64)
    return out


def _other_conditions(a: Run, b: Run, names: Sequence[str]) -> list[str]:
    """Conditions of one name that are not the same write."""
    if not (a.manifest.rows().get("conditions") and b.manifest.rows().get("conditions")):
        return []
    left, right = (run.conditions.astype({"condition_id": str}).set_index("condition_id") for run in (a, b))
    found = []
    for name in names:
        if name not in left.index or name not in right.index:
            continue
        for column in _FACTS:
            x, y = (_cell(table, name, column) for table in (left, right))
            if x != y:
                found.append(f"condition {name} has another {column}: {x} in A, {y} in B")
    return found


def _cell(table: pd.DataFrame, name: str, column: str) -> Any:
    """Return a setting of a condition, None where it has none."""
    value: Any = table.loc[name, column] if column in table else None
    return None if pd.isna(value) else value


def _only(
    left: pd.DataFrame, right: pd.DataFrame, names: dict[str, str | None], wanted: list[str] | None, chosen: bool
) -> tuple[list[str], list[str]]:
    """Conditions, and samples of shared prompts and conditions, that only one run has."""
    mine, theirs = set(left["condition_id"]), set(right["condition_id"])
    only_a = [] if wanted else [f"condition {c}" for c in dict.fromkeys(left["condition_id"]) if c not in theirs]
    only_b = [] if wanted else [f"condition {c}" for c in dict.fromkeys(right["condition_id"]) if c not in mine]
    shared = (mine & theirs) if wanted is None else set(wanted)
    keys = ["partner", "condition_id", "replicate"]
    here = left[left["partner"].notna() & left["condition_id"].isin(shared)]
    there = right[right["partner"].isin(set(here["partner"])) & right["condition_id"].isin(shared)]
    merged = here[keys].merge(there[keys], on=keys, how="outer", indicator=True)
    for side, target in (("left_only", only_a), ("right_only", only_b)):
        rows = merged[merged["_merge"] == side]
        target += [
            f"sample {c} of {p}, replicate {r}"
            for p, c, r in zip(rows["partner"], rows["condition_id"], rows["replicate"], strict=True)
        ]
    return only_a, only_b


def _listed(values: pd.Series) -> str:
    found = list(dict.fromkeys(values))
    return ", ".join(found[:6]) + (" …" if len(found) > 6 else "")
