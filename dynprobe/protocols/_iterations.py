"""One text at several numbers of iterations: a model made to iterate T times, and a long run cut at T."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dynprobe import metrics
from dynprobe.errors import UsageError
from dynprobe.probes import Subject, discover, readout
from dynprobe.probes._tape import States
from dynprobe.protocols._arms import Passage, aligned, measured

__all__ = ["at_iterations", "cut", "right_answers", "with_best"]


@contextmanager
def at_iterations(subject: Subject, T: int) -> Iterator[Subject]:
    """Let a looped model make ``T`` iterations for the length of the block, and give its subject.

    Raises:
        UsageError: If the model has no loop whose length can be chosen.
    """
    loop = subject.loop
    if loop is None or loop.set_iterations is None or loop.iterations is None:
        raise UsageError(
            f"{subject.name} has no loop whose number of iterations can be chosen; dynprobe iterate takes CEM, "
            "CSM-style and looped models (dynprobe run reads the layers of others)"
        )
    before, choose = loop.iterations(subject.model), loop.set_iterations
    back = loop.restore(subject.model) if loop.restore is not None else lambda: choose(subject.model, before)
    try:
        with warnings.catch_warnings():  # what lies above the trained depth is said once, before the first of them
            warnings.simplefilter("ignore", UserWarning)
            choose(subject.model, T)
            other = discover(
                subject.model, loop=loop, tokenizer=subject.tokenizer, name=subject.name, facts=dict(subject.facts)
            )
        made = max(turn.of for turn in other.turns)
        if made != T:
            raise UsageError(
                f"{subject.name} made {made} iterations where {T} were asked for: it halts by itself (in a CSM-style "
                "model, set config.halt_tol = None), or none of its loops has a length that can be chosen"
            )
        yield other
    finally:
        back()


def cut(whole: Passage, T: int, which: Sequence[str], span: str = "auto") -> Passage:
    """The first T updates of a passage, as if its run had ended there."""
    long = whole.tape.subject
    assert long is not None
    subject = replace(long, blocks=long.blocks[:T], turns=long.turns[:T], wrappers=long.wrappers[:T])
    states = States({d: whole.tape.states[d] for d in range(T + 1)}, T)
    energies = {name: values[: T + 1] for name, values in whole.tape.energies.items()}
    tape = replace(whole.tape, states=states, subject=subject, energies=energies)
    logits = readout(long, states[T])
    targets = aligned([t.targets for t in whole.texts], whole.mask)
    outputs = metrics.output_metrics(logits, targets.to(logits.device))
    found = measured(tape, whole.mask, whole.positions, whole.texts, span, None, which)
    return Passage(whole.texts, tape, whole.mask, whole.positions, found, outputs, logits)


def right_answers(passage: Passage) -> np.ndarray:
    """1 where every token of the answer is the top-1 continuation, else 0; NaN for prompts without an answer."""
    assert passage.logits is not None
    top: Tensor = passage.logits.argmax(-1).cpu()
    targets = aligned([t.targets for t in passage.texts], passage.mask)
    right = np.full(len(passage.texts), np.nan)
    for i, text in enumerate(passage.texts):
        if text.new:
            at = torch.from_numpy(passage.positions[i] >= len(text.prompt) - 1) & passage.mask[i]
            right[i] = float(bool((top[i][at] == targets[i][at]).all()))
    return right


def with_best(samples: pd.DataFrame) -> pd.DataFrame:
    """Add ``best_iteration`` (of the T that were run) and ``converged_at`` (NaN where censored) of each row."""
    arm = samples["condition_id"].astype(str).str.contains("perturbed")
    keys = [samples["prompt_id"], arm]
    known = samples["nll"].notna()
    best = samples[known].loc[samples[known].groupby([k[known] for k in keys], observed=True)["nll"].idxmin()]
    table = pd.Series(
        best["iterations"].to_numpy(), index=pd.MultiIndex.from_arrays([best["prompt_id"], arm[best.index]])
    )
    samples["best_iteration"] = table.reindex(pd.MultiIndex.from_arrays(keys)).to_numpy(dtype=float)
    name = next((c for c in samples if str(c).startswith("converge_iterations")), None)
    samples["converged_at"] = samples[name].astype(float) if name is not None else np.nan
    return samples
