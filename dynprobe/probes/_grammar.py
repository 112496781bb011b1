"""The grammar of the mini-language: from characters to items, with the exact character in every refusal.

One small language names places for reading (``Where``) and for writing (``Perturb``); this is its only parser::

    spec  = pair *("," pair) ;  pair = key "=" value ;  value = item *("+" item)
    item  = number | name | percent | slice
    slice = Python's (6:9 = 6, 7, 8; negatives from the end; bounds may be percents; an optional third part is the step)

Whitespace is free, ``-`` and ``_`` are one character in keys and names, and TransformerLens's site names
(``blocks.6.hook_resid_post``) may stand where a pair stands. Percents are exact fractions: 29 % of 100 is 29, which
binary floating point makes 28. Parsing knows no model, so an item keeps its form until it meets one.

Refused here: unknown and repeated keys, slices that can select nothing (``5:3``), lists of strengths (that is a sweep).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, TypeAlias

from dynprobe._types import COMPONENTS, PHASES
from dynprobe.errors import SpecError, UsageError, did_you_mean

PLACE_KEYS: Final = ("layers", "iterations", "positions", "phase", "component", "slots")
WRITE_KEYS: Final = ("alpha", "scale", "kind", "seed", "period")
INDEX_NAMES: Final = ("all", "mid", "first", "last")
SEVERAL_ALPHAS: Final = "alpha takes one number; for several strengths type `dynprobe sweep --alphas 0.1,0.3,1`"

_INTEGER = re.compile(r"-?[0-9]{1,18}")  # fits a 64-bit tensor
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]{0,6})?|\.[0-9]{1,6})\s*%")
_HOOK = re.compile(r"(?:blocks\.([0-9]+)\.)?(hook_\w+|(?:attn|mlp)\.hook_out)")
_HOOK_COMPONENTS: Final = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
    "hook_attn_out": "attn_out",
    "attn.hook_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
}


@dataclass(frozen=True)
class Percent:
    """A share of a length, 0–100 with at most six decimals, kept exactly.

    Example:
        >>> Percent(Fraction("12.5")).of(30), Percent(Fraction(29)).of(100)
        (3, 29)
    """

    value: Fraction

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 100 or (self.value * 10**6).denominator != 1:
            raise UsageError(f"a percent lies between 0 and 100 with at most six decimals, not {self.value}.")

    def of(self, n: Any) -> Any:
        """Return floor(value/100 · n) for a number, tensor or array of non-negative integers."""
        if hasattr(n, "long"):
            n = n.long()  # 32-bit lengths would overflow in the product
        elif hasattr(n, "astype"):
            n = n.astype("int64")
        return (n * self.value.numerator) // (100 * self.value.denominator)

    def __str__(self) -> str:
        number = format(Decimal(self.value.numerator) / Decimal(self.value.denominator), "f")
        return f"{number}%"


@dataclass(frozen=True)
class Span:
    """A slice with hashable, printable bounds; ``None`` is an open end and the step is positive."""

    start: int | Percent | None = None
    stop: int | Percent | None = None
    step: int | None = None

    def resolve(self, n: int) -> range:
        """Return the indices among ``n`` that Python's slice would select."""
        bounds = [b.of(n) if isinstance(b, Percent) else b for b in (self.start, self.stop)]
        return range(*slice(bounds[0], bounds[1], self.step).indices(n))

    def __str__(self) -> str:
        tail = "" if self.step is None else f":{self.step}"
        return ":".join("" if bound is None else str(bound) for bound in (self.start, self.stop)) + tail


Item: TypeAlias = int | str | Percent | Span
Items: TypeAlias = int | str | Percent | Span | slice | range | Sequence[Any] | None


@dataclass(frozen=True)
class Pair:
    """One ``key=value`` of a spec with the offsets of both in the text."""

    key: str
    value: str
    key_at: int
    value_at: int


def read_pairs(text: str, keys: Sequence[str]) -> list[Pair]:
    """Split a spec into pairs; refuses unknown and repeated keys. Shared by ``Where`` and ``Perturb``."""
    if not isinstance(text, str):
        raise UsageError(f"a spec is a text such as 'layers=6:9,positions=last', not {type(text).__name__}.")
    pairs: list[Pair] = []
    at = 0
    for chunk in text.split(",") if text.strip() else ():
        begin, at = at, at + len(chunk) + 1
        start = begin + len(chunk) - len(chunk.lstrip())
        name, equals, _ = chunk.partition("=")
        value_at = begin + len(name) + 1
        if not chunk.strip():
            raise SpecError("a key=value pair is missing here", text, min(begin, len(text)))
        if not equals:
            found = _bare(chunk.strip(), text, start, keys, pairs[-1].key if pairs else "")
        else:
            key, value = name.strip().replace("-", "_"), text[value_at : at - 1]
            found = [Pair(key, value, start, value_at)]
            if key == "component" and value.strip().startswith("blocks."):
                found = _hook_pairs(value.strip(), text, value_at + len(value) - len(value.lstrip()))
        for pair in found:
            _refuse(pair, keys, pairs, text)
            pairs.append(pair)
    return pairs


def _bare(word: str, text: str, start: int, keys: Sequence[str], before: str) -> list[Pair]:
    if _HOOK.fullmatch(word):
        return _hook_pairs(word, text, start)
    if before == "alpha" and is_number(word):
        raise SpecError(SEVERAL_ALPHAS, text, start)
    hint = f"several values of one key are joined by '+': {before}=…+{word}" if before else f"keys: {listed(keys)}"
    raise SpecError(f"expected '=' after {word!r}; {hint}", text, start + len(word))


def _hook_pairs(word: str, text: str, at: int) -> list[Pair]:
    layer, component = read_hook_name(word, text, at)
    place = [Pair("component", component, at, at)]
    return place if layer is None else [Pair("layers", layer, at, at), *place]


def read_hook_name(name: str, text: str, at: int) -> tuple[str | None, str]:
    """Translate TransformerLens's name of a site into (layer or ``None``, component)."""
    hook = _HOOK.fullmatch(name)
    if hook is None or hook[2] not in _HOOK_COMPONENTS:
        hint = near(name.rpartition(".")[2], _HOOK_COMPONENTS)
        raise SpecError(f"{name!r} is no place dynprobe reads; components: {listed(COMPONENTS)}.{hint}", text, at)
    return hook[1], _HOOK_COMPONENTS[hook[2]]


def _refuse(pair: Pair, keys: Sequence[str], before: Sequence[Pair], text: str) -> None:
    if pair.key in WRITE_KEYS and pair.key not in keys:
        message = f"{pair.key!r} belongs to a perturbation (--perturb), not to a place to read"
        raise SpecError(message, text, pair.key_at)
    if pair.key not in keys:
        word = repr(pair.key) if pair.key else "'' before '='"
        raise SpecError(f"unknown key {word}; keys: {listed(keys)}.{near(pair.key, keys)}", text, pair.key_at)
    if any(pair.key == other.key for other in before):
        hint = "join its values with '+'" if pair.key in PLACE_KEYS else "one perturbation has one; repeat --perturb"
        raise SpecError(f"key {pair.key!r} is given twice; {hint}", text, pair.key_at)


def read_items(key: str, value: Items) -> tuple[Item, ...] | None:
    """Turn what a keyword argument may be (text, int, slice, range, list of those) into items."""
    if value is None:
        return None
    if isinstance(value, slice) or (isinstance(value, range) and 0 <= value.start < value.stop):
        value = Span(value.start, value.stop, None if value.step in (None, 1) else value.step)
    elif (integer := _integer(value)) is not None:
        value = str(integer)
    if isinstance(value, str | Percent | Span):
        return parse_items(key, str(value), f"{key}={value}", len(key) + 1)
    if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        items = [item for part in value for item in (read_items(key, part) or ())]
        if items:
            return tuple(dict.fromkeys(items))
        raise UsageError(f"{key} got an empty list; leave it out for the default, or write {key}='all'.")
    raise UsageError(f"{key}={value!r} is no place: write an int, a list of ints, a slice or a text such as '6:9+50%'.")


def _integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array of several, a float, a list
        return None


def parse_items(key: str, value: str, text: str, at: int) -> tuple[Item, ...]:
    """Read ``item *("+" item)``; ``at`` is the offset of ``value`` in ``text``. Repeated items are kept once."""
    read: Callable[[str, str, str, int], Item] = _word if key in ("phase", "component") else _index
    items: list[Item] = []
    for part in value.split("+"):
        start = at + len(part) - len(part.lstrip())
        if not part.strip():
            raise SpecError(f"a value of {key!r} is missing here", text, min(at + len(part), len(text)))
        items.append(read(key, part.strip(), text, start))
        at += len(part) + 1
    return tuple(dict.fromkeys(items))


def _word(key: str, word: str, text: str, at: int) -> str:
    words = PHASES if key == "phase" else COMPONENTS
    name = _HOOK_COMPONENTS.get(word, word) if key == "component" else word
    name = name.replace("-", "_")
    if name == "all" or name in words:
        return name
    raise SpecError(f"unknown {key} {word!r}; known: {listed((*words, 'all'))}.{near(name, words)}", text, at)


def _index(key: str, word: str, text: str, at: int) -> Item:
    if word in INDEX_NAMES:
        return Percent(Fraction(50)) if word == "mid" else word
    if ":" not in word:
        return _bound_of(key, word, text, at)
    parts, offsets = word.split(":"), [at]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + len(part) + 1)
    if len(parts) > 3:
        raise SpecError("a slice has at most start:stop:step", text, offsets[3] - 1)
    where = [offset + len(part) - len(part.lstrip()) for part, offset in zip(parts, offsets, strict=True)]
    bounds = [_bound_of(key, p.strip(), text, w) if p.strip() else None for p, w in zip(parts, where, strict=True)]
    start, stop, step = (*bounds, None)[:3]
    if step is not None and (isinstance(step, Percent) or step < 1):
        message = "the step of a slice is a whole number ≥ 1 (a place is a set, it has no direction)"
        raise SpecError(message, text, where[2])
    if _empty(start, stop):
        raise SpecError(f"the slice {word} selects nothing", text, at)
    return Span(start, stop, None if step == 1 else step)


def _empty(start: int | Percent | None, stop: int | Percent | None) -> bool:
    if stop == 0 or (isinstance(stop, Percent) and stop.value == 0):
        return True
    if isinstance(start, Percent) and isinstance(stop, Percent):
        return start.value >= stop.value
    both = isinstance(start, int) and isinstance(stop, int)
    return both and (start < 0) == (stop < 0) and start >= stop  # type: ignore[operator]


def _bound_of(key: str, word: str, text: str, at: int) -> int | Percent:
    if _INTEGER.fullmatch(word):
        return int(word)
    if percent := _PERCENT.fullmatch(word):
        value = Fraction(percent[1])
        if value > 100:
            raise SpecError(f"{word} is more than 100 %", text, at)
        return Percent(value)
    prefix = _INTEGER.match(word)  # the fault lies behind the digits that were fine
    hint = near(word, INDEX_NAMES) if prefix is None else ""
    kinds = "a whole number, a slice such as 6:9, a percent such as 50%, or " + listed(INDEX_NAMES)
    message = f"{word!r} is no value of {key!r}: expected {kinds}.{hint}"
    raise SpecError(message, text, at + (prefix.end() if prefix else 0))


def is_number(word: str) -> bool:
    """Whether ``word`` reads as a number (used to recognise lists of strengths)."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def listed(words: Iterable[str]) -> str:
    """Join the words of an error message."""
    return ", ".join(words)


def near(word: str, words: Iterable[str]) -> str:
    """Suggest the nearest known word, with a leading space."""
    return did_you_mean(word, words)
