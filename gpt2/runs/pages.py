"""Pages generated from results files: results/tables, tables within README and docs, and the HTML report."""

from __future__ import annotations

import re
from pathlib import Path

from gpt2.common import files, machine
from gpt2.common.errors import PluginError
from gpt2.models import embedded, loading
from gpt2.report import html, plots, regions, tables
from gpt2.runs.config import RunOptions, TableDefinition, load

COMMAND = "scripts/reproduce_tables.py --pages"
MADE_BY = "<!-- Made by scripts/reproduce_tables.py from results/runs: not to be edited. -->"


def page_path(options: RunOptions, name: str) -> Path:
    """results/tables/NAME.md for the embedded model, NAME_MODEL.md for another."""
    slug = loading.slug_of(options.model)
    return options.results / "tables" / (f"{name}.md" if slug == embedded.EMBEDDED else f"{name}_{slug}.md")


def page(options: RunOptions, table: TableDefinition) -> str:
    """A page in Markdown: the table's text, its parts with their sources, and its pictures."""
    parts = [f"# {table.title}", table.about]
    parts += [part for item in table.show for part in _parts(options, table, item)]
    named = [*(figure["name"] for figure in table.figures), *table.plots]
    pictures = [name for plot in named for name in machine.siblings(options.results / "plots", plot, ".png")]
    parts += [f"![{name}](../plots/{name}.png)" for name in pictures]
    return "\n\n".join([MADE_BY, *parts]) + "\n"


def _parts(options: RunOptions, table: TableDefinition, item: dict) -> list[str]:
    """A heading, and a table for each machine that has measured these results: one never has rows of two machines."""
    heading = [f"## {item['heading']}"] if "heading" in item else []
    names = machine.siblings(options.results / "runs", item["results"])
    if names:
        return heading + [_part(options, name, item) for name in names]
    return [*heading, f"Not measured yet: `{html.command(table.name, options.model)}` makes `{item['results']}`."]


def _part(options: RunOptions, name: str, item: dict) -> str:
    record = tables.read(options.results / "runs" / f"{name}.json")
    made = tables.table(name, record, item.get("rows"), item.get("as"))
    with tables.shown_of(name):
        made_with = f"commit {record['git_commit']}, {record['device']}, {record['created_utc'][:10]}"
        if record.get("wall_s") is not None:
            made_with += f", in {_taken(record['wall_s'])}"
    return f"{made.markdown()}\n\nSource: `{name}.json`, {made_with}."


def _taken(seconds: int) -> str:
    return f"{seconds} s" if seconds < 100 else f"{round(seconds / 60)} minutes"


def write(options: RunOptions, table: TableDefinition) -> Path:
    """Write a table's page to results/tables, and the figures that are made of several results; returns its path."""
    for figure in table.figures:
        draw(options.results, figure)
    return _write(page_path(options, table.name), page(options, table))


def draw(results: Path, figure: dict) -> None:
    """Draw a figure of a table from those of its results that are there; without any it isn't drawn."""
    found = [path for name in figure["results"] for path in sorted((results / "runs").glob(f"{name}.json"))]
    records = [tables.read(path) for path in dict.fromkeys(found)]
    if not records:
        return
    records.sort(key=lambda record: record.get("model") != embedded.EMBEDDED)  # the others in the order of their names
    with tables.shown_of(figure["name"]):
        files.write_figure(results / "plots" / f"{figure['name']}.png", getattr(plots, figure["plot"])(records))


def write_regions(checkout: Path) -> None:
    """Regenerate the tables within README and docs/*.md.

    Raises PluginError, after all pages have been tried, if some can't be made.
    """
    failed = []
    for path in regions.pages(checkout):
        try:
            _write(path, regions.fill(path.read_text(encoding="utf-8"), checkout / "results" / "runs"))
        except PluginError as error:
            failed.append(f"{path.relative_to(checkout)}: {error}")
    if failed:
        raise PluginError("\n".join(failed))


def check_writable(options: RunOptions, chosen: list[TableDefinition], with_regions: bool) -> None:
    """Raise PluginError if a table's page can't be written or, with_regions, README or docs. Called before any work."""
    paths = [page_path(options, table.name) for table in chosen]
    for path in [*paths, *(regions.pages(options.checkout) if with_regions else [])]:
        files.check_writable(path)


def write_html(results: Path, model: str, output: Path) -> list[str]:
    """Write one page with all measurements of a model; returns a line for each part that is missing.

    results: folder with runs/*.json and plots/*.png. Raises PluginError if the page can't be made or written.
    """
    files.check_writable(output)
    text, missing = html.page(results, html.CONFIGS, model)
    _write(output, text)
    return missing


def _write(path: Path, text: str) -> Path:
    with files.atomic(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def differing(checkout: Path) -> list[str]:
    """A line for each page in results/tables that differs from the one that results and configs would give."""
    names = load(RunOptions(checkout=checkout))[0]
    wrong = []
    for path in sorted((checkout / "results" / "tables").glob("*.md")):
        name = max((n for n in names if re.fullmatch(rf"{re.escape(n)}(_.+)?", path.stem)), key=len, default=None)
        shown = f"results/tables/{path.name}"
        if name is None:
            wrong.append(f"{shown} has no table in configs/tables: remove it")
            continue
        options = RunOptions(
            model=path.stem.removeprefix(name).removeprefix("_") or embedded.EMBEDDED, checkout=checkout
        )
        try:
            if page(options, load(options)[0][name]) != path.read_text(encoding="utf-8"):
                wrong.append(f"{shown} differs from its results: run {COMMAND}")
        except PluginError as error:
            wrong.append(f"{shown}: {error}")
    return wrong
