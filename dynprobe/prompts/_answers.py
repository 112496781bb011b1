"""Does a generated text give the right answer? Exact match after normalisation.

A small model answers in many shapes: ``The red boat.``, ``red boat``, ``Red boat, which was …``. What counts is that
the answer stands at the beginning of the first line of what was written. It is a strict rule: an answer that comes
after a detour (``It was the red boat``) is a miss, unless it is listed as a variant. Strictness costs every arm of an
experiment alike; a lenient rule would be one more thing that a perturbation could change.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from dynprobe.errors import PromptError

__all__ = ["exact_match", "normalise_answer"]

_ARTICLES = {"a", "an", "the"}


def normalise_answer(text: str) -> str:
    """Return a text in lower case, without articles, punctuation and surplus spaces.

    Apostrophes vanish, all other punctuation becomes a space (so that ``twenty-one`` is ``twenty one``); ``.`` and
    ``,`` between digits vanish (``1,000`` is ``1000``). Accents stay. The articles are those of English.

    Args:
        text: Any text.

    Returns:
        The words, separated by single spaces; an empty text if none are left.

    Example:
        >>> normalise_answer("  The baker's  twenty-one LOAVES. ")
        'bakers twenty one loaves'
        >>> normalise_answer("1,000 m")
        '1000 m'
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = re.sub(r"(?<=\d)[.,](?=\d)", "", re.sub("['’ʼ`´]", "", plain))
    kept = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in plain)
    return " ".join(word for word in kept.split() if word not in _ARTICLES)


def exact_match(generated: str, answers: str | Sequence[str]) -> bool:
    r"""Return whether a generated text begins with one of the accepted answers.

    Both are normalised, and only the first line of ``generated`` that is not blank is read. Whole words are compared:
    ``threefold`` does not begin with ``three``.

    Args:
        generated: What the model wrote after the question.
        answers: The accepted answer, or all accepted variants of it.

    Returns:
        True or False.

    Raises:
        PromptError: No answer is given, or one of them has no word in it.

    Example:
        >>> exact_match(" The red boat, which was new.\n\nQuestion:", ["boat", "red boat"])
        True
        >>> exact_match("It was the red boat.", "red boat")
        False
    """
    accepted = [answers] if isinstance(answers, str) else list(answers)
    wanted = [normalise_answer(answer).split() for answer in accepted]
    if not wanted or not all(wanted):
        raise PromptError(f"An accepted answer needs at least one word besides articles; found {accepted!r:.80}.")
    first = next((line for line in generated.splitlines() if line.strip()), "")
    words = normalise_answer(first).split()
    return any(words[: len(answer)] == answer for answer in wanted)
