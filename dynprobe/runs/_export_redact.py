"""Taking the texts out of an export, so that runs on private prompts can be shared.

Removed are the texts themselves, and what gives them back:

* every text column; a hash stands in its place, so that prompts of two runs still pair (answers, choices and token
  texts, which are short enough to be guessed from a hash, are emptied instead);
* token ids, wherever they stand;
* hidden states: the state at depth 0 *is* the token, and deeper ones can be inverted;
* tables with a row per position (tokens, depths, slots, actions). Whoever has the same model can try every token in
  turn and see which one gives the stored numbers. They are kept when they are named, with token ids emptied and the
  numbers of depth 0, which depend on the token alone, removed;
* texts in the command line, the configuration and the summary, by the names of their keys, and any other string that
  shares a longer piece with a text of the run.

What remains can still confirm a guess: a hash of a text that someone already suspects, and means over a short text.
"""

from __future__ import annotations

import json as text_json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dynprobe.errors import UsageError
from dynprobe.runs._export_tables import Leaving
from dynprobe.runs._json import dumps
from dynprobe.runs._schema import COLUMNS, TABLES
from dynprobe.runs._text_hash import hashed_text

__all__ = ["REMOVED", "Redaction", "without_positions"]

REMOVED = "[text removed]"

#: Text columns that hold no text of a prompt or a model; they are searched for pieces of one all the same.
_NO_TEXTS = frozenset(("params", "reasons", "reason", "cell", "mode", "timing", "metric", "cluster"))
#: Texts so short, or out of so few, that a hash of them is no secret.
_EMPTIED = frozenset(
    (
        "token_texts",
        "token_text",
        "target",
        "responses",
        "filtered_response",
        "choices",
        "answer",
        "tokens",
        "contexts",
        "words",
        "words_away",
    )
)
#: Labels out of dynprobe's own words.
_OURS = frozenset(
    (
        "arm", "component", "condition_id", "controller", "criterion", "decode_mode", "equal_to", "estimator", "grain",
        "kind", "phase", "scale", "site", "stage", "status", "track", "where",
    )
)  # fmt: skip
_TOKENS = re.compile(r"(^|_)(token_ids?|target_ids?|ids)$")
#: Keys of a configuration or a summary under which texts stand, and flags that carry them.
_KEYS = frozenset(
    ("prompt", "prompts", "contrast", "text", "texts", "question", "answer", "stop", "system", "examples")
)
_FLAGS = frozenset(("--prompt", "--contrast", "--prompts", "--direction"))
_PIECE, _STRIDE = 24, 12
#: Tokens that belong to a tokenizer and not to a text.
_SPECIAL = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask)_token_ids?$")
_ESCAPED = re.compile(r'\\(u[0-9a-fA-F]{4}|["\\/bfnrt])')


def without_positions(tables: Sequence[str] | None, held: Iterable[str]) -> list[str]:
    """Return the tables of a redacted export: those asked for, else those that have no row per position.

    Raises:
        UsageError: Hidden states were asked for.
    """
    if tables is None:
        return [name for name in held if "pos" not in TABLES[name].keys and name != "states"]
    if "states" in tables:
        raise UsageError(
            "--redact-text leaves hidden states out: texts can be rebuilt from them; leave out one of both"
        )
    return list(tables)


class Redaction:
    """What is taken out, and a list of it in words.

    Texts of fewer than eight characters are replaced where texts stand, and not searched for elsewhere: they are words
    such as ``auto`` that stand everywhere.

    Args:
        texts: Every text of the run.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        known = {text for text in texts if len(text) >= 8}
        self._pieces = {t[i : i + _PIECE] for t in known for i in range(0, len(t) - _PIECE + 1, _STRIDE)}
        self._short = {t for t in known if len(t) < _PIECE + _STRIDE}
        self._done: dict[str, str] = {}

    @property
    def done(self) -> list[str]:
        """One line per thing that was removed."""
        return [f"{name}: {how}" for name, how in sorted(self._done.items())]

    def table(self, given: Leaving) -> Leaving:
        """Return a table without texts."""
        return Leaving(given.name, given.table, given.schema, self._chunks(given))

    def json(self, value: Any, where: str) -> Any:
        """Return plain data without texts and token ids; other numbers stay."""
        if isinstance(value, Mapping):
            out = {}
            for key, item in value.items():
                place = f"{where}.{key}"
                name = str(hashed_text(str(key))) if self.holds(str(key)) else str(key)
                if _TOKENS.search(name) and not _SPECIAL.search(name):
                    item = self._without_ids(item, place)
                out[name] = self._emptied(item, place) if key in _KEYS else self.json(item, place)
            return out
        if isinstance(value, list | tuple):
            return [self.json(item, where) for item in value]
        return self._string(value, where) if isinstance(value, str) else value

    def _string(self, value: str, where: str) -> str:
        """A string without texts; where it is JSON, what is inside it is looked at unescaped and the rest stays."""
        if value.lstrip()[:1] in ("{", "[", '"'):
            try:
                inside = text_json.loads(value)
            except (ValueError, RecursionError):
                inside = None
            clean = self.json(inside, where)
            value = value if clean == inside else dumps(clean)
        if self.holds(value):
            self._done[where] = "texts replaced by hashes"
            return str(hashed_text(value))
        return value

    def _without_ids(self, value: Any, where: str) -> Any:
        """A token id as None, a list of them as an empty list; what is no integer stays."""
        if isinstance(value, Mapping):
            return {key: self._without_ids(item, where) for key, item in value.items()}
        if isinstance(value, list | tuple):
            kept = [self._without_ids(item, where) for item in value if not _is_id(item)]
            if len(kept) < len(value):
                self._done[where] = "token ids emptied"
            return kept
        if _is_id(value):
            self._done[where] = "token ids emptied"
            return None
        return value

    def command(self, command: Any) -> Any:
        """Return a command line without the texts on it."""
        if command is None:
            return None
        try:
            words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
        except ValueError:
            self._done["command"] = "removed"
            return REMOVED
        out: list[str] = []
        texts = False
        for word in words:
            flag, equals, _ = word.partition("=")
            if word.startswith("--"):
                texts = flag.replace("_", "-") in _FLAGS
                hide = bool(equals) and (texts or self.holds(word))
                out.append(f"{flag}={REMOVED}" if hide else word)
            else:
                hide = texts or self.holds(word)
                out.append(REMOVED if hide else word)
            if hide:
                self._done["command"] = "texts of " + ", ".join(sorted(_FLAGS))
        return out

    def holds(self, text: str, short: bool = True) -> bool:
        """Whether a string holds a text of the run, or shares a longer piece with one, plain or with escapes in it.

        Args:
            text: The string.
            short: Whether short texts count too, which may be a word of dynprobe's own.
        """
        for said in {text, _unescaped(text)} if "\\" in text else (text,):
            if any(said[i : i + _PIECE] in self._pieces for i in range(len(said) - _PIECE + 1)):
                return True
            if short and any(known in said for known in self._short):
                return True
        return False

    def leaks(self, value: Any, ours: bool = False) -> bool:
        """Whether anywhere in plain data or in a table a text of the run is left."""
        if isinstance(value, str):
            return self.holds(value, not ours)
        if isinstance(value, Mapping):
            return any(self.holds(str(k), not ours) or self.leaks(v, ours) for k, v in value.items())
        if isinstance(value, list | tuple):
            return any(self.leaks(item, ours) for item in value)
        if isinstance(value, pa.Table):
            return any(
                self.leaks(_strings(value[name]), name in _OURS) for name in value.column_names if name != "state"
            )
        return False

    def _emptied(self, value: Any, where: str) -> Any:
        """Every string in a value as its hash, and every list of token ids empty; a single number is a setting."""
        if isinstance(value, str):
            self._done[where] = "texts replaced by hashes"
            return hashed_text(value)
        if isinstance(value, Mapping):
            return {
                hashed_text(str(key)) if self.holds(str(key)) else key: self._emptied(item, f"{where}.{key}")
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._emptied(item, where) for item in self._without_ids(value, where)]
        return value

    def _chunks(self, given: Leaving) -> Iterator[pa.Table]:
        for chunk in given.chunks:
            yield self._clean(given.table, chunk)

    def _clean(self, table: str, chunk: pa.Table) -> pa.Table:
        tokens = chunk["token_ids"].to_pylist() if "token_ids" in chunk.column_names else None
        embedding = pc.equal(chunk["depth"], 0) if table == "depths" else None
        for at, field in enumerate(chunk.schema):
            column, place = chunk.column(at), f"{table}.{field.name}"
            label = pa.types.is_dictionary(field.type)
            unit = COLUMNS[field.name].unit if field.name in COLUMNS else ""
            new = None
            if field.name in _EMPTIED or unit == "token id" or _TOKENS.search(field.name):
                new, how = pa.nulls(len(chunk), field.type), "emptied"
            elif pa.types.is_string(field.type) and field.name not in _NO_TEXTS:
                new, how = self._hashed(column, tokens if field.name == "text" else None), "replaced by a hash"
            elif (label or pa.types.is_string(field.type)) and field.name not in _OURS:
                new, how = self._searched(column, place), "cells with a piece of a text replaced by a hash"
            elif embedding is not None and pa.types.is_floating(field.type):
                new, how = pc.if_else(embedding, pa.scalar(None, field.type), column), "emptied at depth 0"
            if new is not None and new is not column:
                if new.null_count != column.null_count or how.startswith(("replaced", "cells")):
                    self._done[place] = how
                chunk = chunk.set_column(at, field, new.cast(field.type))
        return chunk

    def _hashed(self, column: Any, tokens: list[Any] | None) -> pa.Array:
        rows = column.to_pylist()
        ids = tokens or [None] * len(rows)
        return pa.array([hashed_text(text, row) for text, row in zip(rows, ids, strict=True)], pa.string())

    def _searched(self, column: Any, place: str) -> Any:
        plain = column.cast(pa.string())
        # A hash, not a word for all: names of prompts and samples still find their rows in other tables.
        unique = [text for text in pc.unique(plain).to_pylist() if text is not None]
        cleaned = {text: self._string(text, place) for text in unique}
        names = {text: clean for text, clean in cleaned.items() if clean != text}
        if not names:
            return column
        kept = pa.array([names.get(text, text) for text in plain.to_pylist()], pa.string())
        return kept.dictionary_encode() if pa.types.is_dictionary(column.type) else kept


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unescaped(text: str) -> str:
    """A string with the escapes of JSON undone, as many as there are; also where it is only a part of JSON."""
    marks = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
    return _ESCAPED.sub(lambda m: chr(int(m[1][1:], 16)) if m[1][0] == "u" else marks.get(m[1], m[1]), text)


def _strings(column: Any) -> list[str]:
    """Every string of a column once; none where it has numbers."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(pa.string())
    elif pa.types.is_list(kind):
        column = pc.list_flatten(column)
    if not pa.types.is_string(column.type):
        return []
    return [text for text in pc.unique(column).to_pylist() if text is not None]
