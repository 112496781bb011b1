"""What is wrong with the value of a setting, in the words of this package rather than those of its validator."""

from __future__ import annotations

import re
from collections.abc import Mapping
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

    def __init__(self, message: str, setting: str) -> None:
        self.setting = setting
        super().__init__(message)


def what_is_wrong(error: Mapping[str, Any]) -> str:
    """Return what one of pydantic's errors says, without the value, and the nearest of the words that are allowed.

    Example:
        >>> what_is_wrong({"type": "greater_than_equal", "ctx": {"ge": 1}, "msg": "", "input": -2})
        'expected a number of at least 1'
        >>> choice = {"expected": "'float32' or 'float64'"}
        >>> what_is_wrong({"type": "literal_error", "ctx": choice, "msg": "", "input": "float33"})
        "expected 'float32' or 'float64'. Did you mean 'float32'?"
    """
    expected = _EXPECTED.get(error["type"])
    if expected is None:
        return str(error["msg"]).removeprefix("Value error, ")
    near = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        near = did_you_mean(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return f"expected {expected.format(**error.get('ctx') or {})}{'.' + near if near else ''}"
