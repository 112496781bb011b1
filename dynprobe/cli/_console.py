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
from rich.text import Text

__all__ = ["console", "error_console"]

#: Columns where there is no terminal: more than any table has.
_PIPE = 100_000
#: Width at which words go on in the next line that are nearly as wide as the console, such as a list of settings.
_FOLDED = 30
#: Width of a column's padding and of the line beside it.
_AROUND = 3


class _Console(Console):
    def print(self, *objects: Any, **settings: Any) -> None:
        """Print; tables have one style, and what does not fit into a cell goes on below and is not cut."""
        shown: list[Any] = []
        for item in objects:
            if isinstance(item, Table):
                item.box = box.HEAVY_HEAD
                item.title_justify = "left"
                for column in item.columns:
                    column.overflow = "fold"
            shown += self._parts(item) if isinstance(item, Table) else [item]
            if isinstance(item, Table) and item.caption is not None:  # as wide as the console, not as the table
                shown.append(Text(str(item.caption), style="table.caption"))
        super().print(*shown, **settings)

    def _parts(self, table: Table) -> list[Table]:
        """A table in parts that are no wider than the console, without its caption."""
        sizes = [self._sizes(column) for column in table.columns]
        if sum(most for _, most in sizes) < self.width:  # each with its padding and a line, and one line more
            return [_only(table, [*range(len(sizes))])]
        names = _naming(table)
        if sum(least for least, _ in sizes) >= self.width and (
            not names or 2 * sum(least for least, _ in sizes[:names]) > self.width
        ):  # in every part a row is known by its number
            table, names = _numbered(table), 1
            sizes.insert(0, self._sizes(table.columns[0]))
        parts: list[list[int]] = [[]]
        for number, (least, _) in enumerate(sizes):
            there = sum(sizes[i][0] for i in parts[-1])
            if len(parts[-1]) > names and there + least >= self.width:
                parts.append([*range(names)])
            parts[-1].append(number)
        made: list[Table] = []
        for numbers in parts:
            part = _only(table, numbers)
            widths = _shared([sizes[i] for i in numbers], self.width - 1)
            for column, width in zip(part.columns, widths, strict=True):  # rich itself would cut some and spare others
                column.width, column.no_wrap = width - _AROUND, False
            part.title = None if made else table.title
            made.append(part)
        return made

    def _sizes(self, column: Column) -> tuple[int, int]:
        """Widths of a column with no word cut (but those nearly as wide as the console), and with nothing below."""
        cells = [
            Measurement.get(self, self.options.update(width=_PIPE), cell) for cell in (column.header, *column.cells)
        ]
        most = max(cell.maximum for cell in cells)
        words = [cell.minimum if cell.minimum < 0.7 * self.width else _FOLDED for cell in cells]
        least = most if column.no_wrap else max(words)
        return least + _AROUND, most + _AROUND

    def on_broken_pipe(self) -> NoReturn:
        """Leave it to the program: rich itself would end the process with code 1 (`| head` is no failure)."""
        raise BrokenPipeError


def _shared(sizes: list[tuple[int, int]], room: int) -> list[int]:
    """Widths of columns in a room: what each needs least, and the rest to those that still lack something.

    Example:
        >>> _shared([(5, 9), (4, 4), (6, 30)], 30)
        [9, 4, 17]
        >>> _shared([(20, 20), (40, 60)], 40)
        [20, 20]
    """
    widths = [least for least, _ in sizes]
    while sum(widths) > room and max(widths) > _AROUND + 1:  # even one column beside the names does not fit
        widest = max(range(len(widths)), key=widths.__getitem__)
        widths[widest] -= 1
    for left, number in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i][1] - widths[i]), 1 - len(sizes)):
        widths[number] += min(sizes[number][1] - widths[number], (room - sum(widths)) // (1 - left))
    return widths


def _naming(table: Table) -> int:
    """Number of the first columns that tell the rows apart; 0 where none do."""
    rows: list[tuple[str, ...]] = [()] * table.row_count
    for number, column in enumerate(table.columns, 1):
        rows = [(*row, str(cell)) for row, cell in zip(rows, column.cells, strict=True)]
        if len({*rows}) == len(rows):
            return number
    return 0


def _numbered(table: Table) -> Table:
    """A table whose first column is the number of the row."""
    made = copy.copy(table)
    numbers = Column(header="#", justify="right")
    numbers._cells = [str(number) for number in range(1, table.row_count + 1)]
    made.columns = [numbers, *table.columns]
    return made


def _only(table: Table, numbers: list[int]) -> Table:
    """A table of some of the columns of another one, without its caption."""
    made = copy.copy(table)
    made.caption = None
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
