"""A table of results, apart from how it is written: README shows it as markdown, the report as HTML."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpt2.common.errors import PluginError

NUMBER = re.compile(r"(?:at least )?([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?!\d)")


@dataclass
class Table:
    """Cells as text, with units in them; **bold** and *italics* are all the markup they have.

    columns: one heading each. rows: the cells of each, or fewer than columns: the last one then takes the rest of the
    line. note: a sentence on what was measured, or "".
    """

    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """A pipe table, and the note after an empty line."""
        padded = [row + [""] * (len(self.columns) - len(row)) for row in self.rows]
        lines = [_line(self.columns), "|---" * len(self.columns) + "|", *map(_line, padded)]
        return "\n".join(lines + (["", self.note] if self.note else []))

    def numeric(self) -> list[bool]:
        """Which columns hold figures: those in which most cells are one, with its unit or interval."""
        columns = [[row[i] for row in self.rows if i < len(row)] for i in range(len(self.columns))]
        return [sum(number(cell) is not None for cell in cells) > len(cells) / 2 for cells in columns]


def _line(cells: list[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in escaped)


def number(cell: str) -> float | None:
    """The figure that a cell starts with, by which it is sorted; None where it is words, or a list."""
    found = NUMBER.match(cell)
    return None if found is None or ", " in cell else float(found[1].replace(",", ""))


def select(rows: list[dict], key: str, wanted: list) -> list[dict]:
    """The rows whose `key` is among the wanted, or all if none are. Raises PluginError for one that no row has."""
    if missing := sorted(set(wanted) - {row[key] for row in rows}):
        name, values = key.replace("_", " "), ", ".join(map(str, missing))
        raise PluginError(f"the results have no rows of {name} {values}: run the script with them")
    return [row for row in rows if not wanted or row[key] in wanted]


def interval(bounds: list[float]) -> str:
    """Two shares as `+0.12% … +0.34%`."""
    low, high = bounds
    return f"{low:+.2%} … {high:+.2%}"
