"""Reasons of missing numbers over models, in words: what would be needed to have them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["in_words"]

_WORDS = {
    "n<=p+2": "the covariates make p columns (a word counts one for each value but the first), and a fit of them "
    "needs p + 3 models at least; name fewer under covariates, or add models",
    "p<1": "no covariate differs between these models",
    "skeletons<=p+1": "the covariates tell all skeletons apart, so that every order explains as much; a p needs "
    "more skeletons than columns + 1",
    "sizes": "no two skeletons have equally many models, so that none can change places",
    "symmetric": "the orders that are allowed leave the covariates as they are",
    "models<2": "a share of the models needs two of them",
    "models<3": "clusters need three models at least",
    "prompts<2": "a test of the models needs two prompts in some category",
    "prompts<3": "clusters need three prompts that every model has",
    "zero-denominator": "all values are equal",
    "range": "the value left the range of the format it is computed in",
    "coverage": "fewer than half of the texts have a value",
    "empty": "no text has a value",
}


def in_words(reasons: Iterable[object]) -> list[str]:
    """Return one line for each of the reasons that is known, in the order in which they come.

    Example:
        >>> in_words(["p<1", None, "p<1"])
        ['p<1: no covariate differs between these models']
    """
    named = [reason for reason in dict.fromkeys(reasons) if isinstance(reason, str)]
    return [f"{reason}: {_WORDS[reason]}" for reason in named if reason in _WORDS]
