"""Where everything for people is printed, and how wide.

A table that is wider than its console must not lose digits or names: half a p-value is worse than none. On a terminal
texts go on in the next line, and columns that do not fit side by side stand in parts below each other, each with the
columns that name the rows; a pipe or a file has no width, so there every table is as wide as its content, whichever
command prints it. No command sets a width, a box or a place for titles itself. Colour is for terminals that want it
(``NO_COLOR``, ``FORCE_COLOR`` and ``TERM=dumb`` are heeded); nothing else gets an escape code.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

__all__ = ["console", "error_console"]

#: Columns where there is no terminal: more than any table has.
_PIPE = 100_000
#: A longer word than this, a list of settings say, may go on in the next line.
_FOLDED = 30


class _Console(Console):
    def print(self, *objects: Any, **settings: Any) -> None:
        """Print; tables have one style, and what does not fit into a cell goes on below and is not cut."""
        shown: list[Any] = []
        for item in objects:
            if isinstance(item, Table):
                item.box = box.HEAVY_HEAD
                item.title_justify = item.caption_justify = "left"
                for column in item.columns:
                    column.overflow = "fold"
            shown += self._parts(item) if isinstance(item, Table) else [item]
        super().print(*shown, **settings)

    def _parts(self, table: Table) -> list[Any]:
        """A table in parts that are no wider than the console, where they can be, and its caption below."""
        widths = [self._least(column, most=_FOLDED if number else _PIPE) for number, column in enumerate(table.columns)]
        names = _naming(table)
        if 2 * sum(widths[:names]) > self.width:
            names = 1
        parts: list[list[int]] = [[]]
        for number, width in enumerate(widths):
            there = sum(widths[i] for i in parts[-1])
            if len(parts[-1]) > names and there + width + 1 > self.width:  # one line more than columns
                parts.append([*range(names)])
            parts[-1].append(number)
        made: list[Any] = []
        for numbers in parts:
            part = _only(table, numbers)
            if sum(widths[i] for i in numbers) < self.width:
                for number, column in zip(numbers, part.columns, strict=True):  # or the widest one gives way
                    column.min_width = widths[number] - 3
            elif widths[0] + _FOLDED // 2 < self.width:  # the name of a row stays whole, what it says goes on below
                part.columns[0].no_wrap = True
            part.title = None if made else table.title
            part.caption = None if len(parts) > 1 else table.caption
            made.append(part)
        return made if len(parts) == 1 or table.caption is None else [*made, table.caption]

    def _least(self, column: Column, most: int) -> int:
        """Columns of the console that a column needs, with padding and a line, if no word up to ``most`` is cut."""
        sizes = [Measurement.get(self, self.options, cell) for cell in (column.header, *column.cells)]
        return max(size.maximum if column.no_wrap else min(size.minimum, most) for size in sizes) + 3

    def on_broken_pipe(self) -> NoReturn:
        """Leave it to the program: rich itself would end the process with code 1 (`| head` is no failure)."""
        raise BrokenPipeError


def _naming(table: Table) -> int:
    """Number of the first columns that tell the rows apart; 1 where none do."""
    rows: list[tuple[str, ...]] = [()] * table.row_count
    for number, column in enumerate(table.columns, 1):
        rows = [(*row, str(cell)) for row, cell in zip(rows, column.cells, strict=True)]
        if len({*rows}) == len(rows):
            return number
    return 1


def _only(table: Table, numbers: list[int]) -> Table:
    """A table of some of the columns of another one."""
    made = copy.copy(table)
    made.columns = [copy.copy(table.columns[number]) for number in numbers]
    for number, column in enumerate(made.columns):
        column._index = number
    return made


def console() -> Console:
    """Return a console on standard output.

    Formulas and shapes are full of square brackets, so nothing is read as markup.
    """
    found = _Console(highlight=False, markup=False)
    return found if found.is_terminal else _Console(highlight=False, markup=False, width=_PIPE)


def error_console() -> Console:
    """Return a console on standard error, for progress."""
    return _Console(stderr=True)
