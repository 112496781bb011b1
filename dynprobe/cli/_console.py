"""Where everything for people is printed, and how wide.

A table that is wider than its console loses digits and names. On a terminal that cannot be helped; a pipe or a file has
no width, so there every table is as wide as its content, whichever command prints it. No command sets a width itself.
"""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console

__all__ = ["console"]

#: Columns where there is no terminal: more than any table has.
_PIPE = 100_000


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Leave it to the program: rich itself would end the process with code 1 (`| head` is no failure)."""
        raise BrokenPipeError


def console() -> Console:
    """Return a console on standard output.

    Formulas and shapes are full of square brackets, so nothing is read as markup.
    """
    found = _Console(highlight=False, markup=False)
    return found if found.is_terminal else _Console(highlight=False, markup=False, width=_PIPE)
