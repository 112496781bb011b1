"""Where everything for people is printed, and how wide.

A table that is wider than its console must not lose digits or names: half a p-value is worse than none. On a terminal
its cells go on in the next line; a pipe or a file has no width, so there every table is as wide as its content,
whichever command prints it. No command sets a width, a box or a place for titles itself. Colour is for terminals that
want it (``NO_COLOR``, ``FORCE_COLOR`` and ``TERM=dumb`` are heeded); nothing else gets an escape code.
"""

from __future__ import annotations

from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["console", "error_console"]

#: Columns where there is no terminal: more than any table has.
_PIPE = 100_000


class _Console(Console):
    def print(self, *objects: Any, **settings: Any) -> None:
        """Print; tables have one style, and what does not fit into a cell goes on below and is not cut."""
        for item in objects:
            if isinstance(item, Table):
                item.box = box.HEAVY_HEAD
                item.title_justify = item.caption_justify = "left"
            for column in item.columns if isinstance(item, Table) else ():
                column.overflow = "fold"
        super().print(*objects, **settings)

    def on_broken_pipe(self) -> NoReturn:
        """Leave it to the program: rich itself would end the process with code 1 (`| head` is no failure)."""
        raise BrokenPipeError


def console() -> Console:
    """Return a console on standard output.

    Formulas and shapes are full of square brackets, so nothing is read as markup.
    """
    found = _Console(highlight=False, markup=False)
    return found if found.is_terminal else _Console(highlight=False, markup=False, width=_PIPE)


def error_console() -> Console:
    """Return a console on standard error, for progress."""
    return _Console(stderr=True)
