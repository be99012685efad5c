"""Regions of README and docs/*.md that hold tables made from results files, so that no figure is typed by hand.

A region names the results file that it comes from, and rows of it where it shows only some:

    <!-- results: validate_ppl_smollm2-135m rank,bits -->
    …table…
    <!-- end -->
"""

from __future__ import annotations

import re
from pathlib import Path

from gpt2.report import tables

REGION = re.compile(r"(<!-- results: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def pages(root: Path) -> list[Path]:
    """Files with regions: README, and the pages of docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(text: str, runs: Path) -> str:
    """Text with every region made anew from the results in `runs`. Raises PluginError where a file is missing."""

    def region(match: re.Match) -> str:
        start, name, words, end = match.groups()
        table = tables.table(name, tables.read(runs / f"{name}.json"), words)
        return f"{start}{table.markdown()}\n{end}"

    return REGION.sub(region, text)
