"""The one table type: rows of text cells, written for a terminal, as Markdown, or as HTML by `report.html`."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from gpt2.common.errors import PluginError

NUMBER = re.compile(r"(?:at least )?([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?!\d)")
TERMINAL_WIDTH = 120  # characters of a line of the note
WIDEST_CELL = 60  # characters of a cell on a terminal before it is wrapped


@dataclass
class Table:
    """A table whose cells are text, with units; **bold** and *italics* are the only markup.

    columns: one heading per column. rows: the cells of each row; a row with fewer cells than columns lets its last cell
    span the rest of the line. note: a sentence on what was measured, or "".
    """

    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def console(self) -> str:
        """Aligned text for a terminal: figures to the right, words to the left, the note in wrapped lines below."""
        whole = [row for row in self.rows if len(row) == len(self.columns)]
        short = [row[:-1] for row in self.rows if len(row) < len(self.columns)]  # the last cell spans columns
        widths = [
            max(min(len(row[i]), WIDEST_CELL) for row in [self.columns, *whole, *short] if i < len(row))
            for i in range(len(self.columns))
        ]
        aligns = [str.rjust if numeric else str.ljust for numeric in self.numeric()]
        head, *body = [_console_lines(row, widths, aligns) for row in [self.columns, *self.rows]]
        rule = "-" * max(len(line) for line in itertools.chain(head, *body))
        note = textwrap.wrap(self.note, TERMINAL_WIDTH, break_long_words=False)
        return "\n".join([*head, rule, *itertools.chain(*body), *note])

    def markdown(self) -> str:
        """A pipe table, and the note after an empty line."""
        padded = [row + [""] * (len(self.columns) - len(row)) for row in self.rows]
        lines = [_markdown_line(self.columns), "|---" * len(self.columns) + "|", *map(_markdown_line, padded)]
        return "\n".join(lines + (["", self.note] if self.note else []))

    def numeric(self) -> list[bool]:
        """For each column, whether most of its cells start with a figure."""
        columns = [[row[i] for row in self.rows if i < len(row)] for i in range(len(self.columns))]
        return [sum(number(cell) is not None for cell in cells) > len(cells) / 2 for cells in columns]


def _console_lines(row: list[str], widths: list[int], aligns: list[Callable[[str, int], str]]) -> list[str]:
    """A row on a terminal: several lines where a cell is too wide; a cell that spans columns stays whole."""
    cells = [
        textwrap.wrap(cell, width) if len(cell) > width else [cell] for cell, width in zip(row, widths, strict=False)
    ]
    if len(row) < len(widths):
        cells[-1] = [row[-1]]
    lines = itertools.zip_longest(*cells, fillvalue="")
    return [
        "  ".join(align(part, width) for part, width, align in zip(line, widths, aligns, strict=False)).rstrip()
        for line in lines
    ]


def _markdown_line(cells: list[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in escaped)


def number(cell: str) -> float | None:
    """The figure at the start of a cell, by which its column is sorted; None for words and for lists of figures."""
    found = NUMBER.match(cell)
    return None if found is None or ", " in cell else float(found[1].replace(",", ""))


def select(rows: list[dict], key: str, wanted: list) -> list[dict]:
    """The rows whose `key` has a wanted value; all rows if `wanted` is empty.

    Raises PluginError for a wanted value that no row has.
    """
    if missing := sorted(set(wanted) - {row[key] for row in rows}):
        name, values = key.replace("_", " "), ", ".join(map(str, missing))
        raise PluginError(f"the results have no rows of {name} {values}: run the script with them")
    return [row for row in rows if not wanted or row[key] in wanted]


def interval(bounds: list[float]) -> str:
    """Two relative changes as `+0.12% … +0.34%`."""
    low, high = bounds
    return f"{low:+.2%} … {high:+.2%}"
