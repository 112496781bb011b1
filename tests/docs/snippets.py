"""Run a page: the commands and the Python of its fenced blocks, in order, as a reader would type them.

Comments in the page's source say what a reader knows and a machine does not:

    <!-- test: skip REASON -->            the next block is not run, and why
    <!-- test: append --limit 2 -->       flags added to every dynprobe command of the next block
    <!-- test: replace LONG => SHORT -->  from here on, SHORT is run where the page says LONG
    <!-- test: setup                      Python run before the next block; the names it sets are the page's names,
    series = … -->                        and a word such as RUN of a command stands for the variable RUN
"""

from __future__ import annotations

import contextlib
import glob
import io
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynprobe.cli import main

_DIRECTIVE = re.compile(r"^<!-- test: (?P<word>skip|append|replace|setup)\s(?P<text>.*?)-->$", re.M | re.S)
_BLOCK = re.compile(r"^```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
_ROW = re.compile(r"^\|.*\|$", re.M)
_TYPED = re.compile(r"`(dynprobe [^`]+)`")
_NUMBER = re.compile(r"^[+-]?\d+(\.\d+)?(e[+-]?\d+)?$")


class SnippetError(AssertionError):
    """A block of a page does not do what a reader expects."""


@dataclass
class Snippet:
    """One block: its language, its text, and what the comments before it say."""

    kind: str
    text: str
    line: int
    skip: str = ""
    append: str = ""
    setup: str = ""


def snippets(page: str, *, tables: bool = False) -> list[Snippet]:
    """The blocks of a page, and with ``tables`` the commands in its tables, in their order."""
    found: list[Snippet] = []
    said: dict[str, str] = {}
    replaced: list[tuple[str, str]] = []
    inside = [match.span() for match in _BLOCK.finditer(page)]
    rows = [m for m in _ROW.finditer(page) if tables and not any(a <= m.start() < b for a, b in inside)]
    parts = sorted([*_DIRECTIVE.finditer(page), *_BLOCK.finditer(page), *rows], key=lambda match: match.start())
    for part in parts:
        line = page.count("\n", 0, part.start()) + 1
        if part.re is _DIRECTIVE and part["word"] == "replace":
            long, short = part["text"].strip().split(" => ")
            replaced.append((long, short))
        elif part.re is _DIRECTIVE:
            said[part["word"]] = part["text"].strip()
        elif part.re is _ROW:
            commands = "\n".join(_TYPED.findall(part[0]))
            if commands:
                found.append(Snippet("bash", commands, line))
        else:
            text = part["text"]
            for long, short in replaced:
                text = text.replace(long, short)
            found.append(Snippet(part["kind"], text, line, **said))
            said = {}
    return found


@dataclass
class Reader:
    """Someone who types a page into an empty folder."""

    folder: Path
    root: Path
    names: dict[str, Any] = field(default_factory=dict)

    def read(self, snippet: Snippet) -> None:
        """Do one block.

        Raises:
            SnippetError: It fails, or prints something else than the page says.
        """
        if snippet.setup:
            exec(compile(snippet.setup, f"setup before line {snippet.line}", "exec"), self.names)
        if snippet.skip:
            return
        if snippet.kind == "python":
            exec(compile("\n" * snippet.line + snippet.text, "page", "exec"), self.names)
        elif snippet.text.startswith("$ "):
            command, expected = snippet.text[2:].split("\n", 1)
            agrees(expected, self.type(command))
        elif snippet.kind in ("bash", "sh") or snippet.text.startswith(("dynprobe ", "export ")):
            for command in snippet.text.replace("\\\n", " ").splitlines():
                if command.strip() and not command.startswith("#"):
                    self.type(f"{command} {snippet.append}" if command.startswith("dynprobe") else command)

    def type(self, command: str) -> str:
        """Type one command and return what it prints."""
        words = shlex.split(command, comments=True)
        into = None
        if ">" in words:
            words, into = words[: words.index(">")], words[words.index(">") + 1]
        if words[0] == "make":
            return self._target(words[1])
        if words[:2] == ["pip", "install"]:
            return self._extras(command)
        if words[0] != "dynprobe":
            raise SnippetError(f"{command!r} is no command that a page may hold; skip it with a reason")
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([done for word in words[1:] for done in self._meant(word)])
        if code:
            raise SnippetError(f"{command!r} ended with {code}:\n{err.getvalue()}")
        if into is not None:
            Path(into).write_text(out.getvalue(), encoding="utf-8")
        return out.getvalue()

    def _meant(self, word: str) -> list[str]:
        """A word as the shell would hand it on: patterns expanded, and the page's own names filled in."""
        if word.isupper() and word in self.names:
            return [str(self.names[word])]
        return sorted(glob.glob(word)) or [word] if "*" in word and "/" in word else [word]  # noqa: PTH207

    def _target(self, name: str) -> str:
        if f"\n{name}:" not in (self.root / "Makefile").read_text(encoding="utf-8"):
            raise SnippetError(f"the Makefile has no target {name}")
        return ""

    def _extras(self, command: str) -> str:
        import tomllib

        known = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extra in re.findall(r"\[([\w,]+)\]", command):
            missing = set(extra.split(",")) - set(known["optional-dependencies"])
            if missing:
                raise SnippetError(f"{command!r} names the unknown extra {missing}")
        return ""


def agrees(expected: str, printed: str) -> None:
    """Hold what a page shows against what is printed: the same words, and numbers equal within two parts in a hundred.

    Rules of boxes are not looked at, and a line of the page may stop early (``…``).

    Raises:
        SnippetError: A line of the page is not among those that were printed.
    """
    lines = [_words(line) for line in printed.splitlines()]
    for shown in expected.splitlines():
        wanted = _words(shown)
        if not any(len(line) >= len(wanted) and all(map(_same, wanted, line)) for line in lines):
            raise SnippetError(f"the page shows\n{shown}\nand this was printed:\n{printed}")


def _words(line: str) -> list[str]:
    return re.sub(r"[│┃━─┏┓┡╇┩└┴┘┳┬]|…$", " ", line).split()


def _same(wanted: str, found: str) -> bool:
    wanted, found = (word.strip("[](),;:") for word in (wanted, found))
    if not (_NUMBER.match(wanted) and _NUMBER.match(found)):
        return wanted == found
    a, b = float(wanted), float(found)
    return abs(a - b) <= 0.02 * max(abs(a), abs(b)) or max(abs(a), abs(b)) < 1e-3
