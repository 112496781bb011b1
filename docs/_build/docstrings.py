"""Docstrings as the site shows them: roles of reStructuredText become code, ``::`` before a block a colon."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":[a-z]+:`(~?)([^`<]+)`")


def plain(text: str) -> str:
    """Replace roles: ``:func:`~a.b.c``` → ``c`` as code, ``:func:`a.b``` → ``a.b`` as code."""
    text = _ROLE.sub(lambda m: f"`{m[2].rpartition('.')[2] if m[1] else m[2]}`", text)
    text = re.sub(r"::(?=\n\n +\S)", ":", text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


class Plain(Extension):
    """Rewrite every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
