"""Regions of README and docs/*.md whose tables are generated from results files, so that no figure is typed by hand.

A region names a results file and, if it shows only some of its rows, the words that select them:

    <!-- results: validate_ppl_smollm2-135m rank,bits -->
    …table…
    <!-- end -->

Of results that were measured on several machines, the first word is `each` to show a table for every machine, or
`machines` for one table with the machines side by side. Results of several models, NAME+NAME, are one table with the
models side by side.
"""

from __future__ import annotations

import re
from pathlib import Path

from gpt2.common import machine
from gpt2.report import tables

REGION = re.compile(r"(<!-- results: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)

EACH, BESIDE = "each", "machines"


def pages(root: Path) -> list[Path]:
    """Files with regions: README, and the pages of docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(text: str, runs: Path) -> str:
    """The text with every region regenerated from the results in `runs`. Raises PluginError if a file is missing."""

    def region(match: re.Match) -> str:
        start, name, words, end = match.groups()
        if "+" in name:
            records = [tables.read(runs / f"{each}.json") for each in name.split("+")]
            return f"{start}{tables.of_models(name, records, words).markdown()}\n{end}"
        how, _, rest = (words or "").partition(",")
        names = machine.siblings(runs, name) if how in (EACH, BESIDE) else []
        if not names:  # one file, which is missed where it isn't there
            names, how, rest = [name], EACH, rest if how in (EACH, BESIDE) else words
        records = [tables.read(runs / f"{each}.json") for each in names]
        made = [tables.of_machines(names, records, rest)] if how == BESIDE else [
            tables.table(each, record, rest) for each, record in zip(names, records, strict=True)
        ]  # fmt: skip
        text = "\n\n".join(table.markdown() for table in made)
        return f"{start}{text}\n{end}"

    return REGION.sub(region, text)
