"""Prompts from the user's own files: one text a line, JSON lines, Parquet, or standard input.

A prompt file that is silently misread gives a run about other texts than the user believes, so anything unclear is
refused with the line it stands on: a binary file, a wrong encoding, a broken line, a missing column.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dynprobe.errors import PromptError, did_you_mean
from dynprobe.prompts._prompt import Prompt, with_ids

__all__ = ["decode", "half_character", "json_rows", "missing_file", "read_prompts"]

_TEXT_KEYS = ("text", "prompt")
_ID_KEYS = ("prompt_id", "id")
_EXTRA_KEYS = ("answer", "paraphrase", "continuation")
_FORMATS = ".txt (one prompt a line), .jsonl (one object a line with a key 'text'), or .parquet (a column 'text')"


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    r"""Read prompts from a file, in its order.

    Args:
        path: a ``.txt`` file (one prompt a line; blank lines and surrounding spaces are dropped), a ``.jsonl`` file
            or a ``.parquet`` file with ``text`` (or ``prompt``) and optionally ``prompt_id`` (or ``id``),
            ``category``, ``token_ids``, ``answer``, ``paraphrase`` and ``continuation``; ``-`` is standard input, JSON
            lines if its first line starts with ``{`` and plain lines otherwise.

    Returns:
        The prompts; prompts without an id get one made from their text.

    Raises:
        PromptError: the file is missing, empty, binary, not UTF-8, or a line of it cannot be read; the message says
            which line and what to type.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "mine.txt"
        ...     _ = path.write_text("The sea was\n\nOnce upon a time\n")
        ...     [p.text for p in read_prompts(path)]
        ['The sea was', 'Once upon a time']
    """
    if os.fspath(path) == "-":
        text = decode(sys.stdin.buffer.read(), "standard input")
        as_json = text.lstrip().startswith("{")
        return _from_lines(text, "standard input", "stdin", as_json=as_json)
    file = Path(path).expanduser()
    if not file.exists():
        raise PromptError(missing_file(file))
    if file.is_dir():
        inside = [entry.name for entry in sorted(file.iterdir()) if entry.suffix in {".txt", ".jsonl", ".parquet"}]
        hint = f" Did you mean {str(file / inside[0])!r}?" if inside else ""
        raise PromptError(f"{file} is a folder, not a prompt file.{hint} Type a file: {_FORMATS}.")
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(file)
    if suffix not in {".txt", ".jsonl"}:
        hint = " For one JSON object a line, rename it to .jsonl." if suffix in {".json", ".ndjson"} else ""
        raise PromptError(f"{file} has the ending {suffix or '(none)'}; prompts are read from {_FORMATS}.{hint}")
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise PromptError(f"{file} cannot be read ({exc.strerror}). Check its permissions.") from exc
    return _from_lines(decode(data, str(file)), str(file), file.name, as_json=suffix == ".jsonl")


def decode(data: bytes, name: str, *, formats: str = _FORMATS) -> str:
    """Return the text of a file's bytes.

    Args:
        data: The bytes.
        name: What to call the file in a message.
        formats: What may be in it, for a message.

    Raises:
        PromptError: The bytes are not UTF-8; the message says on which line.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PromptError(f"{name} is encoded as UTF-16. Save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    if b"\0" in data:
        raise PromptError(f"{name} is a binary file, not text. Read are: {formats}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise PromptError(
            f"{name}, line {line}: byte 0x{data[exc.start]:02x} is not UTF-8. Save the file as UTF-8, for example: "
            "iconv -f LATIN1 -t UTF-8 FILE > NEW"
        ) from exc


def _from_lines(text: str, name: str, source: str, *, as_json: bool) -> list[Prompt]:
    if as_json:
        rows = json_rows(text, name, '{"text": "Once upon a time"}')
        found = [_row(row, f"{name}, line {number}", source) for number, row in rows]
    else:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        found = [(None, Prompt("", line, None, source)) for line in lines]
    if not found:
        raise PromptError(f"{name} has no prompts in it: it is empty. Prompts are read from {_FORMATS}.")
    return with_ids(found)


def json_rows(text: str, name: str, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    r"""Yield line numbers and objects of a text of JSON lines; blank lines are skipped.

    Args:
        text: The text.
        name: What to call the file in a message.
        example: A line as it should be, for a message.

    Raises:
        PromptError: A line is not JSON, or not an object.

    Example:
        >>> list(json_rows('{"a": 1}\n\n{"a": 2}', "here", "{}"))
        [(1, {'a': 1}), (3, {'a': 2})]
    """
    # Only line feeds end a line: splitlines() would also cut at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as exc:
            raise PromptError(
                f"{name}, line {number}: not JSON ({exc.msg} at character {exc.colno}). Each line must be one object, "
                f"for example {example}."
            ) from exc
        except (ValueError, RecursionError) as exc:  # a number of thousands of digits, brackets without end
            raise PromptError(f"{name}, line {number}: cannot be read as JSON ({exc}).") from exc
        if not isinstance(row, dict):
            raise PromptError(f"{name}, line {number}: a JSON object was expected, found a {type(row).__name__}.")
        yield number, row


def _from_parquet(file: Path) -> list[Prompt]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        wanted = {*_TEXT_KEYS, *_ID_KEYS, "category", "token_ids", *_EXTRA_KEYS}
        table = parquet.read(columns=[name for name in parquet.schema_arrow.names if name in wanted])
        rows = table.to_pylist()  # texts that are no UTF-8 and days that no calendar has come to light here
    except (pa.ArrowException, OSError, ValueError, OverflowError) as exc:
        first = str(exc).split("\n")[0]
        raise PromptError(f"{file} cannot be read as Parquet ({first}). Prompts are read from {_FORMATS}.") from exc
    if not set(table.column_names) & set(_TEXT_KEYS):
        names = parquet.schema_arrow.names
        raise PromptError(
            f"{file} has no column 'text' (or 'prompt'); it has {', '.join(names) or 'none'}."
            f"{_misspelt(names)} Rename the column that holds the prompts to 'text'."
        )
    if table.num_rows == 0:
        raise PromptError(f"{file} has no prompts in it: the table has no rows.")
    return with_ids([_row(row, f"{file}, row {i}", file.name) for i, row in enumerate(rows, 1)])


def _misspelt(names: Iterable[str]) -> str:
    """Ask whether the nearest of the names that are there stands for the one that is needed."""
    near = difflib.get_close_matches("text", list(names), n=1)
    return f" Is {near[0]!r} meant to be 'text'?" if near else ""


def _row(row: Mapping[str, Any], where: str, source: str) -> tuple[str | None, Prompt]:
    key = next((name for name in _TEXT_KEYS if row.get(name) is not None), None)
    if key is None:
        found = ", ".join(map(repr, row)) or "no keys"
        raise PromptError(f"{where}: no 'text' (or 'prompt'); found {found}.{_misspelt(map(str, row))}")
    text = row[key]
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{where}: {key!r} must be a text with at least one character, found {text!r:.60}.")
    if half_character(text):
        raise PromptError(f"{where}: {key!r} holds half a character (a lone surrogate).")
    name = next((row[k] for k in _ID_KEYS if row.get(k) is not None), None)
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip()):
        raise PromptError(f"{where}: an id must be a text or a whole number, found {name!r:.60}.")
    category = row.get("category")
    if category is not None and not isinstance(category, str):
        raise PromptError(f"{where}: 'category' must be a text, found {category!r:.60}.")
    ids = _token_ids(row.get("token_ids"), where)
    for extra in _EXTRA_KEYS:
        value = row.get(extra)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise PromptError(f"{where}: {extra!r} must be a text, found {value!r:.60}.")
        if value is not None and half_character(value):
            raise PromptError(f"{where}: {extra!r} holds half a character (a lone surrogate).")
    extras = {extra: row.get(extra) for extra in _EXTRA_KEYS}
    prompt = Prompt("", text, category, source, ids, **extras)
    return None if name is None else str(name), prompt


def _token_ids(value: Any, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    whole = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    if not whole or not value:
        raise PromptError(f"{where}: 'token_ids' must be a list of whole numbers from 0, found {value!r:.60}.")
    return tuple(value)


def half_character(text: str) -> bool:
    r"""Return whether a text holds a lone surrogate, which no encoding can write.

    Example:
        >>> half_character("whole"), half_character("\ud800")
        (False, True)
    """
    return any("\ud800" <= character <= "\udfff" for character in text)


def missing_file(file: Path, *, what: str = "prompt file", formats: str = _FORMATS) -> str:
    """Return the message for a file that does not exist: near names, and what can be read."""
    folder = file.parent
    if not folder.is_dir():
        return f"There is no {what} {str(file)!r}: the folder {folder} does not exist."
    near = did_you_mean(file.name, [entry.name for entry in folder.iterdir()])
    return f"There is no {what} {str(file)!r} in {folder.absolute()}.{near} Type a file: {formats}."
