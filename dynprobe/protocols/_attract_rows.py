"""One arm of an attractor study over one batch: write, read with the bare model, and tabulate at every length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from dynprobe import metrics
from dynprobe.controllers import Steering
from dynprobe.controllers.attractor import Life, Recorded
from dynprobe.probes import Sampling, Subject, readout
from dynprobe.protocols._arms import Passage, Text, forced, free, measured
from dynprobe.protocols._attention_mass import PromptMass, eager
from dynprobe.protocols._attract_arms import Condition, Sites
from dynprobe.protocols._attract_config import AttractConfig
from dynprobe.protocols._tables import Labels, passage_tables, repetition_rate
from dynprobe.protocols._text_measures import distinct, longest_repeat

__all__ = ["Written", "lens_words", "write_arm", "written_tables"]

#: State metrics that are read at every length.
_STATES = (*metrics.CORE, "kappa.geom/1")
#: Logits of the bare model that are held at once.
_LOGIT_BYTES = 512 * 2**20
_COLUMNS = ("kappa_phase", "kappa_geom", "limen_ratio", "limen_ct")
#: Lives of slots in the atlas, contexts of each, words, and tokens on either side of a context.
_MOST_LIVES, _MOST_CONTEXTS, _WORDS, _AROUND = 16, 6, 10, 8
#: Columns of the memory, means over sites: the value after the last token of a length.
_MEMORY = ("n_live", "strength_total")


@dataclass(eq=False)
class Written:
    """What one arm wrote.

    Attributes:
        passage: Texts, states and outputs under the arm.
        bare: The same texts read by the model with nothing on it, ``nll`` ``[batch, pos]``.
        drift: Angle of the final states to the bare model's over π, ``[batch, pos]``.
        attention: Share of attention on the prompt, ``[batch, new tokens fed]``.
        attention_reason: Why there is none.
        notes: Per site, what its memory did.
    """

    passage: Passage
    bare: np.ndarray
    drift: np.ndarray
    attention: np.ndarray
    attention_reason: str | None
    notes: Sequence[Recorded]


def write_arm(
    subject: Subject, sites: Sites, condition: Condition, texts: Sequence[Text], replicate: int, theta: float | None
) -> Written:
    """Let one arm write, every text from an empty memory.

    Args:
        subject: The model.
        sites: Makes the arm's controllers.
        condition: The arm.
        texts: Prompts.
        replicate: Number of the text of one prompt.
        theta: Level of the debts.
    """
    config = sites.config
    temperature, top_p = (1.0, 1.0) if condition.sampled else (config.temperature, config.top_p)
    sampling = Sampling(config.max_new_tokens, temperature, top_p, config.seed, replicate, False)
    kept = config.record == "all" or (config.record == "layer" and condition.arm == "layer")
    steerings = sites.steerings(condition, slots=kept)
    which = tuple(dict.fromkeys([*_STATES, *config.metrics]))
    mass = PromptMass(subject)
    reason: str | None = "not-asked"
    stack = [*steerings, Steering(mass, subject)]
    if config.attention:
        with eager(subject) as reason:
            if reason is None:
                with mass:
                    passage, bare, last = _both(subject, texts, sampling, stack, theta, which)
    if reason is not None:  # a model without explicit attention is read as it is
        passage, bare, last = _both(subject, texts, sampling, steerings, theta, which)
    drift = metrics.diverge([last], [passage.tape.states[-1]], passage.mask)[0]
    grid = mass.table(len(texts), config.max_new_tokens - 1)
    notes = [s.controller for s in steerings if isinstance(s.controller, Recorded)]
    return Written(passage, bare, drift, grid, reason or mass.reason, notes)


def _both(
    subject: Subject, texts: Sequence[Text], sampling: Sampling, writers: Sequence[Any], theta: float | None,
    which: Sequence[str],
) -> tuple[Passage, np.ndarray, torch.Tensor]:  # fmt: skip
    passage = free(subject, texts, sampling, writers, theta=theta, which=which)
    return passage, *judged(subject, passage.texts, passage.mask)


def judged(subject: Subject, texts: Sequence[Text], mask: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Read texts with the bare model, as many at once as their logits leave room for.

    Returns:
        NLL ``[batch, pos]`` and the final states ``[batch, pos, dim]``, in the columns of ``mask``.
    """
    at_once = max(1, _LOGIT_BYTES // (4 * (subject.vocab_size or 1) * mask.shape[1]))
    nll = np.full(mask.shape, np.nan)
    last: torch.Tensor | None = None
    for start in range(0, len(texts), at_once):
        rows = slice(start, start + at_once)
        bare = forced(subject, texts[rows], side="left", which=())
        states, n = bare.tape.states[-1], bare.mask.shape[1]
        assert torch.equal(bare.mask, mask[rows, -n:])  # texts of one batch end in the same column
        nll[rows, -n:] = bare.outputs["nll"]
        if last is None:
            last = states.new_zeros(*mask.shape, states.shape[-1])
        last[rows, -n:] = states
    assert last is not None
    return nll, last


def written_tables(
    config: AttractConfig, subject: Subject, condition: Condition, written: Written, labels: Labels,
    theta: float | None,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Return ``samples``, ``lengths``, ``tokens``, ``slots`` and ``atlas`` of one arm."""
    passage, ids = written.passage, labels.ids
    memory = _memory(written.notes, len(ids))
    lengths = pd.concat(
        [_at_length(written, memory, n, ids, theta, config) for n in config.read_lengths], ignore_index=True
    )
    lengths.insert(1, "condition_id", condition.condition_id)
    lengths.insert(2, "prompt_id", list(labels.prompt_ids) * len(config.read_lengths))
    samples = passage_tables(passage, labels, span="new")["samples"]
    whole = lengths[lengths["length"] == config.max_new_tokens].reset_index(drop=True)
    for name in ("nll_bare", "drift", "attention_prompt", *_MEMORY, "hit_rate", "gain", "written"):
        samples[name] = whole[name]
    tables = {"samples": samples, "lengths": lengths, "tokens": _tokens(written, memory, ids)}
    kept = [note for note in written.notes if note.keeps_slots]
    if kept:
        tables["slots"] = pd.concat([_slots(note, ids) for note in kept], ignore_index=True)
        atlas = [_atlas(subject, note, passage.texts, ids) for note in kept]
        tables["atlas"] = pd.concat(atlas, ignore_index=True)
    return {name: table for name, table in tables.items() if len(table)}


def _memory(notes: Sequence[Recorded], rows: int) -> pd.DataFrame:
    """What the memory did at each token, means over sites; empty for arms without one."""
    tables = [note.tokens() for note in notes]
    if not tables or not any(len(t) for t in tables):
        return pd.DataFrame()
    table = pd.concat([t.assign(hit=t["reinforced"] >= 0) for t in tables], ignore_index=True)
    names = ["gain", "written", *_MEMORY, "hit"]
    return table.groupby(["row", "pos"])[names].mean().astype(np.float64)


def _at_length(
    written: Written, memory: pd.DataFrame, n: int, ids: Sequence[str], theta: float | None, config: AttractConfig
) -> pd.DataFrame:
    passage = written.passage
    cut = [Text(t.row_key, t.prompt, t.new[:n]) for t in passage.texts]
    n_prompt = np.array([len(t.prompt) for t in cut])[:, None]
    inside = passage.mask.numpy() & (passage.positions < n_prompt + n - 1)
    positions = np.where(inside, passage.positions, -1)
    if n == config.max_new_tokens:
        found = passage.measured
    else:
        found = measured(passage.tape, torch.from_numpy(inside), positions, cut, "auto", theta, _STATES)
    emits = passage.mask.numpy() & (passage.positions >= n_prompt - 1) & (passage.positions < n_prompt + n - 1)
    fed = inside & (positions >= n_prompt)
    rows = []
    for i, text in enumerate(cut):
        line: dict[str, Any] = {
            "sample_id": ids[i], "length": n, "distinct_1": distinct(text.new, 1), "distinct_2": distinct(text.new, 2),
            "distinct_3": distinct(text.new, 3), "longest_repeat": longest_repeat(text.new),
            "repetition": repetition_rate(text.new), "nll_bare": _mean(written.bare[i][emits[i]]),
            "nll": _mean(passage.outputs["nll"][i][emits[i]]), "drift": _mean(written.drift[i][fed[i]]),
            "attention_prompt": _mean(written.attention[i][: n - 1]),
        }  # fmt: skip
        reasons = {} if math.isfinite(line["attention_prompt"]) else {"attention_prompt": written.attention_reason}
        for name in _COLUMNS:
            result = found.sample[i].get(name)
            line[name] = math.nan if result is None else float(result)
            if result is not None and result.reason:
                reasons[name] = result.reason
        line |= _of_memory(memory, i, len(text.prompt), len(text.fed))
        if len(memory) == 0:
            reasons |= dict.fromkeys((*_MEMORY, "hit_rate", "gain", "written"), "no-memory")
        line["reasons"] = reasons or None
        rows.append(line)
    return pd.DataFrame(rows)


def _mean(values: np.ndarray) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) and 2 * len(kept) >= len(values) else math.nan


def _of_memory(memory: pd.DataFrame, row: int, n_prompt: int, fed: int) -> dict[str, float]:
    """Occupancy and strength after the last token, and rates over the new ones."""
    names = (*_MEMORY, "hit_rate", "gain", "written")
    if len(memory) == 0 or row not in memory.index.get_level_values(0):
        return dict.fromkeys(names, math.nan)
    mine = memory.loc[row]
    upto = mine[mine.index < fed]
    new = upto[upto.index >= n_prompt]
    last = {name: float(upto[name].iloc[-1]) if len(upto) else math.nan for name in _MEMORY}
    return {
        **last, "hit_rate": float(new["hit"].mean()), "gain": float(new["gain"].mean()),
        "written": float(new["written"].mean()),
    }  # fmt: skip


def _tokens(written: Written, memory: pd.DataFrame, ids: Sequence[str]) -> pd.DataFrame:
    """One line per token: what it is, what it cost, and what the memory did at it."""
    passage, parts = written.passage, []
    for i, text in enumerate(passage.texts):
        columns = np.flatnonzero(passage.mask[i].numpy())
        n = len(text.prompt)
        mass = np.full(len(columns), np.nan)
        mass[n:] = written.attention[i][: len(columns) - n]
        table = pd.DataFrame({
            "sample_id": ids[i], "pos": np.arange(len(columns), dtype=np.int32),
            "phase": np.where(np.arange(len(columns)) < n, "prefill", "decode"),
            "token_id": np.asarray(text.fed, np.int32), "target_id": np.asarray(text.targets[: len(columns)], np.int32),
            "nll": passage.outputs["nll"][i][columns], "nll_bare": written.bare[i][columns],
            "drift": written.drift[i][columns], "attention_prompt": mass,
        })  # fmt: skip
        if len(memory) and i in memory.index.get_level_values(0):
            mine = pd.DataFrame(memory.loc[i]).rename(columns={"hit": "hit_rate"})
            table = table.join(mine, on="pos")
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def _slots(note: Recorded, ids: Sequence[str]) -> pd.DataFrame:
    table = note.slots()
    names = np.array(ids, dtype=object)[table["row"].to_numpy(int)]
    return table.assign(sample_id=names, site=f"{note.site[0]}.{note.site[1]}").drop(columns="row")


def _atlas(subject: Subject, note: Recorded, texts: Sequence[Text], ids: Sequence[str]) -> pd.DataFrame:
    """The slots that were used most in each text: what reinforced them, and where their direction points."""
    chosen: list[Life] = []
    lives = note.lives()
    for row in range(len(texts)):
        mine = [life for life in lives if life.row == row and (life.hits or life.ended < 0)]
        chosen += sorted(mine, key=lambda life: (-len(life.hits), -life.strength, life.born))[:_MOST_LIVES]
    words = lens_words(subject, [life.direction for life in chosen])
    rows = []
    for life, (towards, away) in zip(chosen, words, strict=True):
        fed = texts[life.row].fed
        at = life.hits or ([life.born] if life.born >= 0 else [])
        rows.append({
            "sample_id": ids[life.row], "site": f"{note.site[0]}.{note.site[1]}", "slot": life.slot, "born": life.born,
            "ended": life.ended, "hits": len(life.hits), "strength": life.strength,
            "tokens": Counter(_text(subject, [fed[p]]) for p in at).most_common(),
            "contexts": [_context(subject, fed, p) for p in at[-_MOST_CONTEXTS:]],
            "words": towards, "words_away": away,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _text(subject: Subject, tokens: Sequence[int]) -> str:
    if subject.tokenizer is None:
        return " ".join(map(str, tokens))
    return str(subject.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def _context(subject: Subject, fed: Sequence[int], at: int) -> str:
    before, after = fed[max(0, at - _AROUND) : at], fed[at + 1 : at + 1 + _AROUND // 2]
    return f"{_text(subject, before)}⟦{_text(subject, fed[at : at + 1])}⟧{_text(subject, after)}"


def lens_words(subject: Subject, directions: Sequence[np.ndarray]) -> list[tuple[list[str], list[str]]]:
    """Return the tokens that each direction raises and lowers most when it is read off as a final state.

    A direction v goes through the model's own tail twice, as v and as −v, and half the difference of the logits is
    ranked: what a bias of the last norm or of the head adds is the same in both and drops out. This is the direct path
    alone. An attention or MLP output is added to the residual stream in the middle of the model; what later blocks make
    of it, and how the last norm weighs it against the rest of the state, is left out.

    Args:
        subject: The model.
        directions: Vectors of the residual stream ``[dim]``.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> up, down = lens_words(tiny_llama(), [np.eye(32, dtype=np.float32)[0]])[0]
        >>> len(up), len(down), set(up) & set(down)
        (10, 10, set())
    """
    found: list[tuple[list[str], list[str]]] = []
    for start in range(0, len(directions), 64):
        block = torch.from_numpy(np.stack(directions[start : start + 64]))[:, None].to(subject.device, subject.dtype)
        raised = (readout(subject, block)[:, 0] - readout(subject, -block)[:, 0]).float() / 2
        for logits in raised:
            up, down = logits.topk(_WORDS).indices.tolist(), (-logits).topk(_WORDS).indices.tolist()
            found.append(([_text(subject, [t]) for t in up], [_text(subject, [t]) for t in down]))
    return found
