"""Branches of a trunk as rows of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.probes import Sampling, Subject, generate, make_batch
from dynprobe.probes._chunks import halving
from dynprobe.protocols._arms import Text, free
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._grid import Cell
from dynprobe.protocols._tables import Labels, passage_tables
from dynprobe.protocols._trunk import Branch, Request, Trunk

__all__ = ["branch_tables", "clean_tables", "free_tables", "write_texts"]

_FREE_ROWS = 64


def write_texts(
    subject: Subject, prompts: Sequence[Any], rows: Sequence[Sequence[int]], config: RunConfig
) -> list[Text]:
    """Return the texts that forced arms run over: the prompts, with what the model writes after them if asked."""
    blank = [Text(p.prompt_id, tuple(row)) for p, row in zip(prompts, rows, strict=True)]
    if config.max_new_tokens == 0:
        return blank
    batch = make_batch(subject, [t.prompt for t in blank], side="left", row_keys=[t.row_key for t in blank])
    new = generate(subject, batch, _sampling(config))
    return [Text(t.row_key, t.prompt, tuple(n)) for t, n in zip(blank, new, strict=True)]


def _sampling(config: RunConfig) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed, 0, config.stop_at_eos)


def _labels(trunk: Trunk, texts: Sequence[Text], conditions: str | Sequence[str], prompts: Sequence[Any]) -> Labels:
    tokenizer = trunk.subject.tokenizer
    decoded = [
        tokenizer.decode(list(t.new), skip_special_tokens=False) if tokenizer is not None and t.new else None
        for t in texts
    ]
    return Labels(conditions, [p.prompt_id for p in prompts], [p.category for p in prompts], 0, decoded)


def _chosen(tables: dict[str, pd.DataFrame], everything: bool) -> dict[str, pd.DataFrame]:
    return tables if everything else {"samples": tables["samples"]}


def clean_tables(
    trunk: Trunk, name: str, prompts: Sequence[Any], span: str, everything: bool
) -> dict[str, pd.DataFrame]:
    """Return the rows of the trunk itself."""
    assert trunk.clean is not None
    labels = _labels(trunk, trunk.clean.texts, name, prompts)
    return _chosen(passage_tables(trunk.clean, labels, span=span), everything)


def branch_tables(
    trunk: Trunk, branch: Branch, prompts: Sequence[Any], span: str, everything: bool
) -> dict[str, pd.DataFrame]:
    """Return the rows of a branch, each under the condition of its request."""
    assert branch.passage is not None
    cells: list[Cell] = [request.label for request in branch.requests]
    own = [prompts[i] for i in branch.source]
    labels = _labels(trunk, branch.passage.texts, [cell.condition_id for cell in cells], own)
    tables = passage_tables(
        branch.passage, labels, span=span, perturbed=True, clean=branch.clean, paired=branch.paired,
        paired_outputs=branch.outputs, divergence=branch.divergence, affected_from=branch.affected_from,
    )  # fmt: skip
    samples = tables["samples"]
    samples["alpha"] = [float(request.perturb.alpha) for request in branch.requests]
    _say_what_was_written(samples)
    unmatched = [
        cell.matched_to is not None and r.perturb.alpha == 0 for cell, r in zip(cells, branch.requests, strict=True)
    ]
    samples.loc[np.array(unmatched) & (samples["status"] == "ok"), "status"] = "not-written"
    return _chosen(tables, everything)


def _say_what_was_written(samples: pd.DataFrame) -> None:
    """Mark rows of which none or not all states could be written, as a run does."""
    asked, alone = samples["n_asked"].to_numpy(), samples["n_left_alone"].to_numpy()
    fine = samples["status"] == "ok"
    samples.loc[fine & (alone == asked), "status"] = "not-written"
    samples.loc[fine & (alone > 0) & (alone < asked), "status"] = "partly-written"


def free_tables(
    trunk: Trunk, cells: Sequence[Cell], prompts: Sequence[Any], config: RunConfig, everything: bool
) -> list[dict[str, pd.DataFrame]]:
    """Let the model write under every cell, rows of different strengths decoding together."""
    requests = [
        Request(row, cell.perturb, cell) for cell in cells if cell.perturb is not None for row in range(len(prompts))
    ]

    def write(rows: Sequence[Request]) -> dict[str, pd.DataFrame]:
        source = np.array([r.text for r in rows])
        blank = [Text(trunk.texts[i].row_key, trunk.texts[i].prompt) for i in source]
        passage = free(
            trunk.subject, blank, _sampling(config), [trunk.writer(rows, source)], span=trunk.span, theta=trunk.theta,
            which=trunk.which,
        )  # fmt: skip
        labels = _labels(trunk, passage.texts, [r.label.condition_id for r in rows], [prompts[i] for i in source])
        tables = passage_tables(passage, labels, span=trunk.span, perturbed=True)
        tables["samples"]["alpha"] = [float(r.perturb.alpha) for r in rows]
        _say_what_was_written(tables["samples"])
        return _chosen(tables, everything)

    return list(halving(requests, trunk.most_rows or _FREE_ROWS, write, trunk.halved.append))
