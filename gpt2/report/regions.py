"""Regions of README and docs/*.md whose tables are generated from results files, so that no figure is typed by hand.

A region names a results file and, if it shows only some of its rows, the words that select them:

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
    """The text with every region regenerated from the results in `runs`. Raises PluginError if a file is missing."""

    def region(match: re.Match) -> str:
        start, name, words, end = match.groups()
        table = tables.table(name, tables.read(runs / f"{name}.json"), words)
        return f"{start}{table.markdown()}\n{end}"

    return REGION.sub(region, text)
