"""Where everything for people is printed."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console

__all__ = ["console"]


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Leave it to the program: rich itself would end the process with code 1 (`| head` is no failure)."""
        raise BrokenPipeError


def console() -> Console:
    """Return a console on standard output.

    Formulas and shapes are full of square brackets, so nothing is read as markup. A pipe has no width: a table cut to
    80 columns there would lose numbers.
    """
    found = _Console(highlight=False, markup=False)
    return found if found.is_terminal else _Console(highlight=False, markup=False, width=160)
