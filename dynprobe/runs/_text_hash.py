"""What stands for a text where the text may not: a hash by which the prompts of two runs are still known as the same.

A text that was removed from an export is replaced by ``sha256:`` and sixteen hexadecimal digits. The hash of a removed
text is that of the text itself, so a run with texts and an export without them still pair.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

__all__ = ["HASHED", "hashed_text", "text_hash"]

#: What a removed text begins with.
HASHED = "sha256:"
_REMOVED = re.compile(rf"{HASHED}([0-9a-f]{{16}})$")


def text_hash(text: Any, tokens: Any = None) -> str | None:
    """Return a hash of the text, of the tokens where there is no text, or None where there is neither.

    Example:
        >>> text_hash("The sky is") == text_hash("sha256:" + text_hash("The sky is"))
        True
        >>> text_hash(None, [1, 2]) == text_hash("1 2")
        False
    """
    if isinstance(text, str) and text:
        if removed := _REMOVED.match(text):
            return removed[1]
        content = f"text\0{text}"
    elif tokens is not None and len(tokens):
        content = "tokens\0" + " ".join(str(int(t)) for t in tokens)
    else:
        return None
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def hashed_text(text: Any, tokens: Any = None) -> str | None:
    """Return what stands for a removed text; None stays None, and an empty text stays empty."""
    found = text_hash(text, tokens)
    return text if found is None else f"{HASHED}{found}"
