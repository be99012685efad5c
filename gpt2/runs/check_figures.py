"""Figures in the prose of README and docs, looked up in the tables that are made of committed results.

Looked up are figures with a unit that somebody must have measured: `1.47x`, `3.6x`, `+0.47 %`, `-12 %`, `0.0063 nats`:
those in x and nats that have decimals, and percentages that have decimals or a sign. One counts as found where some
table, in the page's own regions or in results/tables, shows a figure of the same unit that rounds to it. That finds
slips and figures that have moved; it doesn't prove that a sentence is about the row where its figure was found. Not
looked up: whole numbers without a sign (5 %, 4x), which are limits and names as often as results, times and sizes,
code, and what is within the regions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

from gpt2.report.regions import REGION

FIGURE = re.compile(r"(?<![\w.,/-])([+−-]?)(\d[\d,]*(?:\.\d+)?) ?(x|%|nats)(?![\w])")
CODE = re.compile(r"```.*?```|`[^`]*`|<!--.*?-->", re.DOTALL)
Figure = tuple[str, Decimal, str]  # sign, size, unit


def shown(text: str) -> set[Figure]:
    """All figures of a text."""
    found = (match.groups() for match in FIGURE.finditer(text))
    return {
        ("-" if sign in "−-" and sign else sign, Decimal(size.replace(",", "")), unit) for sign, size, unit in found
    }


def in_prose(text: str) -> list[tuple[int, str, Figure]]:
    """Figures outside regions and code that were measured by their looks: line, as written, figure."""

    def blank(match: re.Match) -> str:
        return "\n" * match.group().count("\n")

    prose = CODE.sub(blank, REGION.sub(blank, text))
    found = []
    for number, line in enumerate(prose.splitlines(), start=1):
        for match in FIGURE.finditer(line):
            ((sign, size, unit),) = shown(match.group())
            if "." in match.group(2) or (unit == "%" and sign):
                found.append((number, match.group(), (sign, size, unit)))
    return found


def unfound(text: str, pages: Iterable[str]) -> list[str]:
    """Figures in prose that no table shows, each as a line for people."""
    known = shown("\n".join([*(match.group() for match in REGION.finditer(text)), *pages]))
    return [
        f"line {line}: {words} is in no table that is made of committed results"
        for line, words, figure in in_prose(text)
        if not any(_rounds_to(other, figure) for other in known)
    ]


def _rounds_to(measured: Figure, written: Figure) -> bool:
    (sign, size, unit), (wanted_sign, wanted, wanted_unit) = measured, written
    if unit != wanted_unit or (wanted_sign and (sign or "+") != wanted_sign):
        return False
    half = Decimal(1).scaleb(wanted.as_tuple().exponent) / 2
    return abs(size - wanted) <= half
