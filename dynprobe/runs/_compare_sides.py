"""The runs of a comparison: which they are, which prompts they share, and which conditions stand beside each other.

Two rows are about the same prompt when their prompt has the same name **and** the same text; a name alone proves
nothing (two files of prompts may both have a ``p3``). The unit of every statistic is the text: prompts of one run that
have the same text are one cluster, and so are the replicates of a prompt.

A condition is named by its id, or by its arm where that names one condition; a comma separates alternatives of which a
run takes the first that it has: ``clean,T18`` sets the clean arm of a Transformer beside iteration 18 of a looped
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs._open_run import open_run
from dynprobe.runs._protocol import protocol_of
from dynprobe.runs._run import Run
from dynprobe.runs._text_hash import text_hash

__all__ = ["Pairing", "Side", "open_sides", "pair_conditions", "shared_prompts"]

#: So many conditions beside clean are compared unasked; a sweep has hundreds.
_UNASKED = 4


@dataclass
class Side:
    """One run of a comparison.

    Attributes:
        run: The run.
        label: Name of the run in tables: its model, with the id where a model comes twice.
        number: Its place in the comparison.
        keys: Prompt id → text hash, or None where the run holds neither text nor tokens.
        facts: ``run.columns()``.
        conditions: Its conditions, by id.
    """

    run: Run
    label: str
    number: int
    keys: dict[str, str | None]
    facts: pd.DataFrame
    conditions: pd.DataFrame
    tables: dict[str, int] = field(default_factory=dict)

    @property
    def model(self) -> dict[str, Any]:
        """What the manifest says of the model."""
        found = self.run.manifest.model
        return found if isinstance(found, dict) else {}

    @property
    def weights(self) -> str:
        """The hash of the weights, empty where the run has none."""
        weights = self.run.manifest.weights
        found: Any = weights.get("hash") if isinstance(weights, dict) else weights
        return str(found) if found else ""

    @property
    def dtype(self) -> str:
        """The dtype of weights and states, empty where the run does not say."""
        dtypes = self.run.manifest.dtypes
        found: Any = dtypes.get("weights") if isinstance(dtypes, dict) else dtypes
        return str(found).removeprefix("torch.") if found else ""

    @property
    def model_type(self) -> str:
        """The architecture, as far as the run knows."""
        return str(self.model.get("model_type") or self.model.get("model_class") or self.run.manifest.model_name)


@dataclass(frozen=True)
class Pairing:
    """One condition of a comparison: its name, and the condition of each run (None where a run lacks it)."""

    name: str
    ids: tuple[str | None, ...]


def open_sides(runs: Sequence[Any]) -> list[Side]:
    """Open the runs of a comparison.

    Raises:
        UsageError: Fewer than two runs, or one twice.
        RunFolderError: A folder is no run, or is not finished.
    """
    if isinstance(runs, str | Path | Run) or len(runs) < 2:
        raise UsageError(
            "compare needs two runs or more; type dynprobe compare RUN RUN …, and dynprobe ls to see your runs"
        )
    opened = [one if isinstance(one, Run) else open_run(one) for one in runs]
    seen: dict[Path, Any] = {}
    for given, run in zip(runs, opened, strict=True):
        if (where := run.path.resolve()) in seen:
            raise UsageError(f"{given} and {seen[where]} are one run; leave one out")
        seen[where] = given
        if run.status != "complete":
            command = run.manifest.command
            said = " ".join(command) if isinstance(command, list) else command
            raise RunFolderError(
                f"{run.path} is {run.status}, and means over part of its prompts would be compared with means over "
                f"all. Continue it with the same command{f': {said}' if said else ''}"
            )
    names = [_short(run.manifest.model_name) for run in opened]
    sides = []
    for number, (run, name) in enumerate(zip(opened, names, strict=True)):
        label = name if names.count(name) == 1 else f"{name} {run.manifest.id8[:4]}"
        rows = run.manifest.rows()
        conditions = run.conditions if "conditions" in rows else pd.DataFrame({"condition_id": []})
        conditions = conditions.astype({c: object for c in conditions if conditions[c].dtype == "category"})
        sides.append(
            Side(run, label, number, _keys(run), run.columns(), conditions.set_index("condition_id", drop=False), rows)
        )
    if len({side.label for side in sides}) < len(sides):
        for side in sides:
            side.label = f"{side.label} #{side.number + 1}"
    return sides


def shared_prompts(sides: Sequence[Side]) -> pd.DataFrame:
    """Return the prompts that all runs share: ``prompt_id`` and ``cluster``, the text that it stands for.

    Raises:
        UsageError: There is none; the message says what each pair shares.
    """
    common = [key for key in sides[0].keys.items() if all(side.keys.get(key[0], "") == key[1] for side in sides[1:])]
    if not common:
        raise UsageError(_nothing_shared(sides))
    frame = pd.DataFrame(common, columns=["prompt_id", "cluster"])
    frame["cluster"] = frame["cluster"].where(frame["cluster"].notna(), frame["prompt_id"])
    return frame.sort_values("prompt_id", ignore_index=True)


def pair_conditions(sides: Sequence[Side], wanted: Sequence[str]) -> list[Pairing]:
    """Return the conditions that are set beside each other.

    Args:
        sides: Runs that have samples.
        wanted: Ids, arms, or alternatives of them separated by commas; empty takes clean and what all runs have.

    Raises:
        UsageError: A condition is in fewer than two runs, or a word names several conditions of a run.
    """
    if wanted:
        return [pairing for word in wanted for pairing in _asked(sides, word)]
    found = _asked(sides, "clean")
    common = set.intersection(*(set(side.conditions["condition_id"]) for side in sides))
    taken = {i for pairing in found for i in pairing.ids}
    more = [
        str(i)
        for i in sides[0].conditions["condition_id"]
        if i in common - taken and not all(str(s.conditions.loc[i].get("arm")) in ("clean", "sham") for s in sides)
    ]
    if len(more) <= _UNASKED:
        found += [Pairing(i, (i,) * len(sides)) for i in more]
    return found


def _asked(sides: Sequence[Side], word: str) -> list[Pairing]:
    """Return the conditions a word stands for; an arm that is several equal ids in all runs is each of them."""
    words = [w.strip() for w in word.split(",") if w.strip()]
    ids: list[str | None] = []
    several: dict[str, list[str]] = {}
    for side in sides:
        chosen = None
        for one in words:
            options = _named(side, one)
            if len(options) == 1:
                chosen = options[0]
                break
            if len(options) > 1:
                several[side.label] = options
        ids.append(chosen)
    if len(several) == len(sides) and not any(ids):
        common = [i for i in several[sides[0].label] if all(i in found for found in several.values())]
        if common and len(common) <= _UNASKED:
            return [Pairing(i, (i,) * len(sides)) for i in common]
    unclear = {label: found for label, found in several.items() if not ids[[s.label for s in sides].index(label)]}
    if unclear:
        label, found = next(iter(unclear.items()))
        shown = ", ".join(found[:6]) + (" …" if len(found) > 6 else "")
        raise UsageError(
            f"{word!r} names {len(found)} conditions of {label}: {shown}. Name one, with alternatives for the other "
            f"runs: --condition '{word},{found[-1]}'"
        )
    if sum(i is not None for i in ids) < 2:
        known = sorted({str(c) for side in sides for c in (*side.conditions["condition_id"], *_arms(side))})
        near = did_you_mean(words[0] if words else word, known)
        having = [s.label for s, i in zip(sides, ids, strict=True) if i is not None]
        where = f"only {having[0]} has" if having else "no run has"
        shown = ", ".join(known[:12]) + (" …" if len(known) > 12 else "")
        raise UsageError(f"{where} a condition {word!r}.{near} Two runs must have it. Conditions: {shown}.")
    return [Pairing(words[0], tuple(ids))]


def _named(side: Side, word: str) -> list[str]:
    table = side.conditions
    if word in table.index:
        return [word]
    options = [str(i) for i in table["condition_id"][[a == word for a in _arms(side)]]] if len(table) else []
    trained = _trained(side)
    if len(options) > 1 and trained is not None and "iterations" in table:
        kept = [i for i in options if table.loc[i, "iterations"] == trained]
        return kept if len(kept) == 1 else options
    return options


def _trained(side: Side) -> float | None:
    """Return the number of iterations a looped model was trained with, where its run says so."""
    if protocol_of(side.run.manifest.config) != "iterate":
        return None
    return side.run.summary.get("trained_iterations")


def _arms(side: Side) -> list[str]:
    return [str(a) for a in side.conditions["arm"]] if "arm" in side.conditions else []


def _short(name: str) -> str:
    return Path(name).name if "/" in name or "\\" in name else name


def _keys(run: Run) -> dict[str, str | None]:
    if "prompts" not in run.manifest.rows():
        return {}
    prompts = run.prompts
    ids = [str(i) for i in prompts["prompt_id"]]
    texts = list(prompts["text"]) if "text" in prompts else [None] * len(ids)
    tokens = list(prompts["token_ids"]) if "token_ids" in prompts else [None] * len(ids)
    return {i: text_hash(text, row) for i, text, row in zip(ids, texts, tokens, strict=True)}


def _nothing_shared(sides: Sequence[Side]) -> str:
    lines = ["these runs have no prompt in common, so nothing can be paired:"]
    for i, a in enumerate(sides):
        for b in sides[i + 1 :]:
            same = sum(b.keys.get(k, "") == v for k, v in a.keys.items())
            other = sum(k in b.keys and b.keys[k] != v for k, v in a.keys.items())
            texts = len({v for v in a.keys.values() if v} & {v for v in b.keys.values() if v})
            why = f"; {other} have the same name and another text" if other else ""
            why += f"; {texts} texts are the same under other names" if texts and not same else ""
            lines.append(f"  {a.label} ({len(a.keys)}) and {b.label} ({len(b.keys)}): {same} in common{why}")
    lines.append("Run the models on one file: dynprobe run --model M --prompts prompts.jsonl")
    return "\n".join(lines)
