"""What is wrong with the value of a setting, in the words of this package rather than those of its validator."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dynprobe.errors import UsageError, did_you_mean

__all__ = ["SettingError", "what_is_wrong"]

#: Kind of pydantic's error → what should have stood there.
_EXPECTED = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number", "float_type": "a number", "float_parsing": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "bool_parsing": "true or false",
    "string_type": "a text", "tuple_type": "a list", "list_type": "a list", "dict_type": "names with values",
    "greater_than": "a number above {gt}", "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}", "less_than_equal": "a number of at most {le}",
    "literal_error": "{expected}", "too_short": "a list of at least {min_length}",
}  # fmt: skip


class SettingError(UsageError):
    """The value of one setting is wrong; ``setting`` is its name."""

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__(message, setting)
        self.setting = setting

    def __str__(self) -> str:
        return str(self.args[0])


def what_is_wrong(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return what pydantic says of the first setting, without its value, and the nearest of the words it allows.

    A setting of several kinds (a number or a word) has one error for each of them.

    Example:
        >>> what_is_wrong([{"type": "greater_than_equal", "loc": ("limit",), "ctx": {"ge": 1}, "msg": "", "input": -2}])
        'expected a number of at least 1'
        >>> number = {"type": "int_parsing", "loc": ("batch_size", "int"), "msg": "", "input": "autoo"}
        >>> word = {**number, "type": "literal_error", "ctx": {"expected": "'auto'"}}
        >>> what_is_wrong([number, word])
        "expected a whole number or 'auto'. Did you mean 'auto'?"
    """
    first = errors[0]
    kinds = [error for error in errors if error["loc"][:1] == first["loc"][:1] and error["input"] == first["input"]]
    if any(error["type"] not in _EXPECTED for error in kinds):
        return str(first["msg"]).removeprefix("Value error, ")
    words = [_EXPECTED[error["type"]].format(**error.get("ctx") or {}) for error in kinds]
    near = ""
    if isinstance(first["input"], str):
        near = did_you_mean(first["input"], re.findall(r"'([^']*)'", " ".join(words)))
    return f"expected {' or '.join(dict.fromkeys(words))}{'.' + near if near else ''}"
