"""Do README and pages show what the committed results say? Tables are made anew, figures in prose are looked up."""

from __future__ import annotations

from pathlib import Path

from gpt2 import tables
from gpt2.errors import PluginError
from gpt2.reproduce import figures, pages


def check(checkout: Path) -> None:
    """Raise PluginError with every place that shows something else."""
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    wrong = pages.differing(checkout)
    if tables.fill(readme, checkout / "results" / "runs") != readme:
        wrong.append("README.md shows tables that differ from results/runs: run scripts/update_readme.py")
    made = [path.read_text(encoding="utf-8") for path in sorted((checkout / "results" / "tables").glob("*.md"))]
    wrong += figures.unfound(readme, made)
    if wrong:
        raise PluginError("\n".join(["figures that no committed results hold:", *wrong]))
