"""Check that README, docs and results/tables agree with the committed results, by generating all tables again.

Measured figures in the prose of README and docs are looked up in these tables. A figure counts as measured if it has a
unit and, in x or nats, decimals, or, in percent, decimals or a sign: `1.47x`, `+0.47 %`, `-12 %`, `0.0063 nats`. It is
found if a table of the page or of results/tables has a figure of the same unit that rounds to it. This finds typing
errors and figures that have changed; it doesn't prove that a sentence is about the row in which its figure was found.
Not looked up are whole numbers without a sign (5 %, 4x), which are often limits or names; times and sizes; code; and
the tables themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

from gpt2.common.errors import PluginError
from gpt2.report import regions
from gpt2.runs import pages

FIGURE = re.compile(r"(?<![\w.,/-])([+−-]?)(\d[\d,]*(?:\.\d+)?) ?(x|%|nats)(?![\w])")
CODE = re.compile(r"```.*?```|`[^`]*`|<!--.*?-->", re.DOTALL)
Figure = tuple[str, Decimal, str]  # sign, size, unit


def check(checkout: Path) -> None:
    """Raise PluginError, with a line for each difference, if a page or table differs from the results."""
    wrong = pages.differing(checkout)
    made = [path.read_text(encoding="utf-8") for path in sorted((checkout / "results" / "tables").glob("*.md"))]
    for path in regions.pages(checkout):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(checkout)
        try:
            if regions.fill(text, checkout / "results" / "runs") != text:
                wrong.append(f"{name} shows tables that differ from results/runs: run {pages.COMMAND}")
        except PluginError as error:  # one table that can't be made must not hide other differences
            wrong.append(f"{name}: {error}")
        wrong += [f"{name}, {line}" for line in not_found(text, made)]
    if wrong:
        raise PluginError("\n".join(["figures that differ from the committed results:", *wrong]))


def not_found(text: str, made: Iterable[str]) -> list[str]:
    """A line for each figure in a page's prose that no table has. made: further texts with tables."""
    tables = [match.group() for match in regions.REGION.finditer(text)]
    known = _figures("\n".join([*tables, *made]))
    return [
        f"line {line}: {words} is in no table of committed results"
        for line, words, figure in _in_prose(text)
        if not any(_rounds_to(other, figure) for other in known)
    ]


def _figures(text: str) -> set[Figure]:
    found = (match.groups() for match in FIGURE.finditer(text))
    return {("-" if sign == "−" else sign, Decimal(size.replace(",", "")), unit) for sign, size, unit in found}


def _in_prose(text: str) -> list[tuple[int, str, Figure]]:
    """Measured figures outside regions and code: number of the line, text, parsed figure."""

    def blank(match: re.Match) -> str:
        return "\n" * match.group().count("\n")

    found = []
    for number, line in enumerate(CODE.sub(blank, regions.REGION.sub(blank, text)).splitlines(), start=1):
        for match in FIGURE.finditer(line):
            ((sign, size, unit),) = _figures(match.group())
            if "." in match.group(2) or (unit == "%" and sign):
                found.append((number, match.group(), (sign, size, unit)))
    return found


def _rounds_to(measured: Figure, written: Figure) -> bool:
    (sign, size, unit), (wanted_sign, wanted, wanted_unit) = measured, written
    if unit != wanted_unit or (wanted_sign and (sign or "+") != wanted_sign):
        return False
    half = Decimal(1).scaleb(wanted.as_tuple().exponent) / 2
    return abs(size - wanted) <= half
