"""Tokens of a prompt as labels of an axis."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["labels_of", "visible"]

_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
#: Controls, marks that steer the text around them, and spaces that are none of the above.
_UNSEEN = frozenset(("Cc", "Cf", "Zl", "Zp", "Zs"))
_LONGEST = 14


def labels_of(run: Run, prompt: str) -> tuple[list[str], str]:
    """Return one label per token of a prompt, and its text.

    Tokens are shown as the run stored them; in a run without tokenizer their number and id stand in their place.
    """
    prompts = run.prompts
    row = prompts[prompts["prompt_id"].astype(str) == prompt].iloc[0]
    ids = [int(i) for i in row["token_ids"]]
    stored = row.get("token_texts")
    text = row["text"] if isinstance(row["text"], str) else ""
    if isinstance(stored, str) and stored:
        return [visible(token) for token in json.loads(stored)], _supported(" ".join(text.split()))
    return [f"{number}: id {token}" for number, token in enumerate(ids)], _supported(" ".join(text.split()))


def visible(token: str) -> str:
    r"""Return a token as a label: white space as signs, what is unseen escaped, long ones cut, unknown signs boxed.

    Example:
        >>> visible(" the"), visible("a\n"), visible("incomprehensibilities")
        ('·the', 'a⏎', 'incomprehensi…')
        >>> print(visible("\x00\u2028"))
        \x00\u2028
    """
    shown = "".join(_SIGNS.get(c) or (_escape(c) if unicodedata.category(c) in _UNSEEN else c) for c in token)
    return _supported(shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…")


def _escape(sign: str) -> str:
    code = ord(sign)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _supported(text: str) -> str:
    """Replace what the figures' font has no sign for, which would be drawn as a nameless box with a warning."""
    if text.isascii():
        return text
    known = _signs_of_font()
    return "".join(c if ord(c) in known else "□" for c in text)


def _signs_of_font() -> Sequence[int] | set[int]:
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(findfont(FontProperties())).get_charmap())
