"""Do README, docs and pages show what the committed results say? Tables are made anew, prose is looked up."""

from __future__ import annotations

from pathlib import Path

from gpt2.common.errors import PluginError
from gpt2.report import regions
from gpt2.runs import check_figures, pages


def check(checkout: Path) -> None:
    """Raise PluginError with every place that shows something else."""
    wrong = pages.differing(checkout)
    made = [path.read_text(encoding="utf-8") for path in sorted((checkout / "results" / "tables").glob("*.md"))]
    for path in regions.pages(checkout):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(checkout)
        try:
            if regions.fill(text, checkout / "results" / "runs") != text:
                wrong.append(f"{name} shows tables that differ from results/runs: run scripts/update_readme.py")
        except PluginError as error:  # a table that can't be made must not hide what else is wrong
            wrong.append(f"{name}: {error}")
        wrong += [f"{name}, {line}" for line in check_figures.unfound(text, made)]
    if wrong:
        raise PluginError("\n".join(["figures that no committed results hold:", *wrong]))
