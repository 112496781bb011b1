"""What a prompt is: a text with an identity that survives reordering, batching and copying.

Every row of every table is joined by ``prompt_id``, and a prompt's noise is drawn from it, so an id may never depend on
the place of a prompt in a list. Ids given by the user are kept and must be unique; where none is given, the id is made
from the text alone. A text that occurs twice is two prompts, told apart by a suffix.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dynprobe.errors import PromptError

__all__ = ["Prompt", "content_hash", "content_id", "from_texts", "in_turn", "with_ids"]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt_id: unique among the prompts of a run.
        text: what the model reads, before any chat template.
        category: for grouping, or None.
        source: where it came from: ``builtin``, ``calibration``, a file name, ``stdin``, ``given``.
        token_ids: ids to use instead of tokenising the text, or None.
        answer: the continuation that counts as right, for task criteria, or None.
        paraphrase: other words for the same beginning, for null distributions, or None.
        continuation: the text that follows directly (its first character is usually a space), for its
            log-likelihood, or None.
    """

    prompt_id: str
    text: str
    category: str | None = None
    source: str = "given"
    token_ids: tuple[int, ...] | None = None
    answer: str | None = None
    paraphrase: str | None = None
    continuation: str | None = None


def content_id(text: str) -> str:
    """Return the automatic id of a text: ``p-`` and 10 hexadecimal digits of its blake2b hash.

    Example:
        >>> content_id("a prompt") == content_id("a prompt") != content_id("another")
        True
        >>> len(content_id("a prompt"))
        12
    """
    return f"p-{hashlib.blake2b(text.encode('utf-8'), digest_size=5).hexdigest()}"


def from_texts(
    texts: Iterable[str],
    *,
    ids: Sequence[str | None] | None = None,
    categories: Sequence[str | None] | None = None,
    source: str = "given",
) -> list[Prompt]:
    """Make prompts from texts, in their order.

    Args:
        texts: the texts; a single string is refused, because its letters would become prompts.
        ids: an id for each text; None, as a whole or for one text, stands for an automatic id.
        categories: a category for each text.
        source: recorded with every prompt.

    Returns:
        The prompts.

    Raises:
        PromptError: no text, an empty text, or an id given twice.

    Example:
        >>> [p.prompt_id for p in from_texts(["yes", "no", "yes"])]
        ['p-f2596fc907', 'p-0fe736fa82', 'p-f2596fc907-2']
    """
    if isinstance(texts, str):
        raise PromptError(f"A list of prompts was expected, but one string was given. Type [{texts[:40]!r}].")
    found = list(texts)
    if not found:
        raise PromptError("No prompts were given. Type at least one, or leave the argument out for the built-in ones.")
    for number, text in enumerate(found, 1):
        if not isinstance(text, str):
            raise PromptError(f"Prompt {number} is a {type(text).__name__}, not a text.")
        if not text.strip():
            raise PromptError(f"Prompt {number} is empty. A prompt needs at least one character that is not a space.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise PromptError(f"Prompt {number} holds half a character (a lone surrogate) at {exc.start}.") from exc
    for name, given in (("ids", ids), ("categories", categories)):
        if given is not None and len(given) != len(found):
            raise PromptError(f"{len(found)} texts were given with {len(given)} {name}; give one for each text.")
    chosen = list(ids) if ids is not None else [None] * len(found)
    kinds = list(categories) if categories is not None else [None] * len(found)
    return with_ids([(i, Prompt("", t, c, source)) for i, t, c in zip(chosen, found, kinds, strict=True)])


def with_ids(prompts: Sequence[tuple[str | None, Prompt]]) -> list[Prompt]:
    """Give every prompt its id: the given one, else the automatic one (suffix ``-2``, ``-3`` … for a repeated text).

    Raises:
        PromptError: an id was given twice; the message names the ids.
    """
    counts = Counter(given for given, _ in prompts if given is not None)
    double = [name for name, count in counts.items() if count > 1]
    if double:
        shown = ", ".join(repr(name) for name in double[:5]) + (" …" if len(double) > 5 else "")
        raise PromptError(
            f"{len(double)} prompt ids occur more than once: {shown}. Ids join the tables of a run, so each must be "
            "unique; rename them, or leave the ids out to get automatic ones."
        )
    taken, seen, result = set(counts), Counter[str](), []
    for given, prompt in prompts:
        name = given
        if name is None:
            base = content_id(prompt.text)
            while True:
                seen[base] += 1
                name = base if seen[base] == 1 else f"{base}-{seen[base]}"
                if name not in taken:
                    break
            taken.add(name)
        result.append(replace(prompt, prompt_id=name))
    return result


def content_hash(prompts: Iterable[Prompt]) -> str:
    """Return a hash over ids, texts, categories, token ids, answers, paraphrases and continuations, in their order.

    Where a prompt came from is left out: the same prompts read from another file are the same experiment.

    Example:
        >>> a, b = from_texts(["one", "two"])
        >>> content_hash([a, b]) == content_hash(from_texts(["one", "two"], source="elsewhere"))
        True
        >>> content_hash([a, b]) == content_hash([b, a])
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        ids = "" if prompt.token_ids is None else ",".join(map(str, prompt.token_ids))
        answer = () if prompt.answer is None else (prompt.answer,)
        other = () if prompt.paraphrase is None else ("", prompt.paraphrase)  # no answer is empty
        after = () if prompt.continuation is None else ("", "", prompt.continuation)  # no paraphrase is empty
        for part in (prompt.prompt_id, prompt.text, prompt.category or "", ids, *answer, *other, *after):
            data = part.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
        digest.update(bytes([prompt.category is not None, prompt.token_ids is not None]))
    return digest.hexdigest()


def in_turn(categories: Sequence[str | None], limit: int | None) -> list[int]:
    """Return which ``limit`` of a list to take so that a small limit still covers the categories.

    Args:
        categories: The category of each entry.
        limit: At most so many; None takes all, in their order.

    Returns:
        Places in the list, ascending: the first of every category, the second of every category, until there are
        enough.

    Raises:
        PromptError: A limit below 1.

    Example:
        >>> in_turn(["a", "a", "a", "b"], 3)
        [0, 1, 3]
    """
    if limit is not None and limit < 1:
        raise PromptError(f"--limit {limit} leaves no prompt. Type a number of at least 1.")
    if limit is None or limit >= len(categories):
        return list(range(len(categories)))
    rank: Counter[str | None] = Counter()
    turns = []
    for place, category in enumerate(categories):
        turns.append((rank[category], place))
        rank[category] += 1
    return sorted(place for _, place in sorted(turns)[:limit])
