"""How far Δκ goes where nothing was done to the model: the level of ``crit.kappa/1``.

Two nulls answer two questions. ``numerical``: is the change larger than what the arithmetic makes of a write of
relative norm 1e-6? Δκ responds linearly to small writes, so nearly every strength exceeds it, and a threshold against
it often lies below the tested range. ``paraphrase``: is the change larger than what other words for the same thing
make? It needs prompts with a paraphrase (the built-in default ones have one), and is the null to quote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from dynprobe.errors import UsageError
from dynprobe.probes import Perturb, Subject
from dynprobe.prompts import Prompt
from dynprobe.protocols._arms import Text
from dynprobe.protocols._criteria import NULL_ALPHA, NULL_SEEDS, Criterion
from dynprobe.protocols._prompts import token_rows
from dynprobe.protocols._trunk import Request, Trunk

__all__ = ["NULLS", "numerical_null", "paraphrase_null", "refuse_without_paraphrases"]

NULLS = ("numerical", "paraphrase")
#: First seed of the null, far from those a user would name.
_SEED = 10_000_019


def numerical_null(trunks: Iterable[Trunk], criterion: Criterion, perturb: Perturb) -> list[float]:
    """Return the responses to writes of numerical size at the places of a perturbation, several per text."""
    tiny = Perturb(NULL_ALPHA, scale="relnorm", where=perturb.where)
    values: list[float] = []
    for trunk in trunks:
        requests = [
            Request(text, tiny.replace(seed=_SEED + s)) for text in range(len(trunk.texts)) for s in range(NULL_SEEDS)
        ]
        for branch in trunk.branches(requests):
            values += criterion.response(branch, trunk).tolist()
    return values


def refuse_without_paraphrases(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts of which some have no paraphrase.

    Raises:
        UsageError: Naming the first of them.
    """
    lacking = [p.prompt_id for p in prompts if p.paraphrase is None]
    if lacking:
        raise UsageError(
            f"--null paraphrase needs a paraphrase for every prompt, and {len(lacking)} have none (first: "
            f'{lacking[0]!r}); give --prompts items.jsonl with {{"text": …, "paraphrase": …}} on each line, or leave '
            "--null out"
        )


def paraphrase_null(
    subject: Subject,
    prompts: Sequence[Prompt],
    trunks: Iterable[tuple[Sequence[int], Trunk]],
    make: Callable[[Sequence[Text]], Trunk],
    chat_template: str,
) -> list[float]:
    r"""Return κ(paraphrase) − κ(prompt) of clean runs, with both signs, for neither of the two came first.

    Args:
        subject: The subject.
        prompts: All prompts.
        trunks: Numbers of the prompts of each group, and its clean trunk.
        make: Makes the clean trunk of other texts.
        chat_template: How texts are wrapped.
    """
    found: list[float] = []
    for chosen, trunk in trunks:
        kappa = np.array(list(_kappa(trunk)))
        said = [Prompt(prompts[i].prompt_id, prompts[i].paraphrase or "") for i in chosen]
        rows = token_rows(subject, said, chat_template=chat_template)
        # Rows of one length each: nothing is known here about padding.
        for length in sorted({len(row) for row in rows}):
            here = [i for i, row in enumerate(rows) if len(row) == length]
            other = make([Text(said[i].prompt_id, tuple(rows[i]), ()) for i in here])
            found += (np.array(list(_kappa(other))) - kappa[here]).tolist()
    return [*found, *(-value for value in found)]


def _kappa(trunk: Trunk) -> Iterator[float]:
    assert trunk.clean is not None
    for row in trunk.clean.measured.sample:
        yield float(row["kappa_phase"].value)
