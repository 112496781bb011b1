"""Secrets never reach the disk: everything written as JSON passes through ``scrub`` first.

A run folder is made to be shared. Access tokens come into a configuration by three roads: a key that names them
(``token``, ``api_key``, ``password``), a value with the shape of a token (``hf_…``), and the value of an environment
variable copied somewhere by accident. All three are closed here. The vocabulary of language models makes the first one
delicate: ``max_new_tokens``, ``tokenizer`` and ``pad_token`` are no secrets and must survive, or no run could be
repeated.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["REDACTED", "drop_secrets", "is_secret_key", "scrub", "scrub_command"]

REDACTED = "[redacted]"

_SECRET_WORDS = frozenset(
    (
        "secret",
        "secrets",
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "credential",
        "credentials",
        "authorization",
    )
)
_SECRET_PAIRS = ("api_key", "apikey", "access_key", "private_key", "secret_key", "auth_key")
# The word in front of "token" that makes it a unit of text.
_TEXT_TOKENS = frozenset(
    (
        "bos",
        "eos",
        "pad",
        "unk",
        "sep",
        "cls",
        "mask",
        "image",
        "audio",
        "video",
        "special",
        "additional",
        "begin",
        "end",
        "start",
        "stop",
        "first",
        "last",
        "next",
        "prev",
        "decoder",
        "encoder",
        "forced",
        "per",
        "each",
        "new",
        "current",
        "answer",
        "target",
        "source",
        "prefix",
        "suffix",
        "separator",
        "newline",
        "think",
    )
)
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bapi_org_[A-Za-z0-9]{8,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\bglpat-[\w-]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}"
    r"|(?<=://)[^/?#\s]+(?=@)"
)
_FLAG = re.compile(r"(?P<name>--?[A-Za-z][\w-]*|\b[A-Za-z_]\w*(?==))(?P<gap>=|\s+)(?P<value>'[^']*'|\"[^\"]*\"|\S+)")


@functools.lru_cache(maxsize=4096)
def is_secret_key(key: str) -> bool:
    """Return whether a configuration key or flag names a secret.

    Example:
        >>> [k for k in ("HF_TOKEN", "max_new_tokens", "pad_token", "tokenizer", "apiKey") if is_secret_key(k)]
        ['HF_TOKEN', 'apiKey']
    """
    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key)]
    joined = "_".join(words)
    if _SECRET_WORDS.intersection(words) or any(pair in joined for pair in _SECRET_PAIRS):
        return True
    return bool(words) and words[-1] == "token" and not (len(words) > 1 and words[-2] in _TEXT_TOKENS)


def scrub(value: Any) -> Any:
    """Return a copy of a JSON-like value with every secret replaced by ``"[redacted]"``.

    Args:
        value: Mappings, lists and scalars; other objects are returned as they are.

    Example:
        >>> scrub({"model": "gpt2", "hf_token": "abc", "max_new_tokens": 32, "note": ["hf_QwErTyUiOp"]})
        {'model': 'gpt2', 'hf_token': '[redacted]', 'max_new_tokens': 32, 'note': ['[redacted]']}
    """
    return _scrub(value, _environment())


def drop_secrets(value: Any) -> Any:
    """Return a copy without the keys that name a secret: what is left identifies a run.

    Example:
        >>> drop_secrets({"model": "gpt2", "token": None, "hub": {"api_key": "x", "revision": "main"}})
        {'model': 'gpt2', 'hub': {'revision': 'main'}}
    """
    if isinstance(value, Mapping):
        return {k: drop_secrets(v) for k, v in value.items() if not is_secret_key(str(k))}
    if isinstance(value, list | tuple):
        return [drop_secrets(v) for v in value]
    return value


def scrub_command(command: Any) -> Any:
    """Return a command line (one string, or its words) with the values of secret flags replaced.

    Example:
        >>> scrub_command(["dynprobe", "run", "--token", "abc", "--max-new-tokens", "8", "--api-key=x"])
        ['dynprobe', 'run', '--token', '[redacted]', '--max-new-tokens', '8', '--api-key=[redacted]']
        >>> scrub_command("HF_TOKEN=abc dynprobe run --limit 3 --password 'a b'")
        'HF_TOKEN=[redacted] dynprobe run --limit 3 --password [redacted]'
    """
    if isinstance(command, str):

        def replace(found: re.Match[str]) -> str:
            hide = is_secret_key(found["name"])
            return f"{found['name']}{found['gap']}{REDACTED}" if hide else found[0]

        return scrub(_FLAG.sub(replace, command))
    if not isinstance(command, list | tuple):
        return scrub(command)
    words: list[Any] = []
    hide_next = False
    for word in command:
        name, equals, _ = str(word).partition("=")
        if hide_next:
            words.append(REDACTED)
            hide_next = False
        elif equals and " " not in name and is_secret_key(name):
            words.append(f"{name}={REDACTED}")
        else:
            words.append(scrub(word))
            hide_next = str(word).startswith("-") and not equals and is_secret_key(str(word))
    return words


def _environment() -> list[str]:
    return [v for k, v in os.environ.items() if len(v) >= 8 and is_secret_key(k) and not v.startswith(("/", "."))]


def _scrub(value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {k: REDACTED if _hidden(str(k), v) else _scrub(v, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub(v, known) for v in value]
    if isinstance(value, str):
        if value.startswith("hf_"):
            return REDACTED
        for secret in known:
            value = value.replace(secret, REDACTED)
        return _SHAPES.sub(REDACTED, value)
    return value


def _hidden(key: str, value: Any) -> bool:
    if value is None or isinstance(value, bool) or value == "" or not is_secret_key(key):
        return False
    # A number under "token" is an index into a text; under "password" it is a password.
    return not (isinstance(value, int | float) and key.lower().endswith("token"))
