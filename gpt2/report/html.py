"""An HTML page of all measurements, made only from results files: tables, figures and their provenance.

Its content is configured: each file in configs/tables is a section, and configs/report.json the start of the page.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from gpt2.common import files, machine, provenance
from gpt2.common.errors import PluginError
from gpt2.models import loading
from gpt2.models.embedded import EMBEDDED
from gpt2.report import chart, tables
from gpt2.report import table as tabular
from gpt2.report.table import Table

CONFIGS = files.ROOT / "configs"
TEMPLATE = Path(__file__).with_name("page.html")
PAGE_KEYS = {"title", "about", "headlines", "picture", "order"}
SECTION_KEYS = {"title", "about", "show", "plots"}


def page(folder: Path, configs: Path, model: str) -> tuple[str, list[str]]:
    """The page as HTML, and a message for each part whose results are missing.

    folder: has runs/*.json and plots/*.png. configs: has report.json and tables/*.json. model: replaces {model} in
    names of results. Raises PluginError if a config can't be read.
    """
    model = loading.slug_of(model)
    config = _read_config(configs / "report.json", model, PAGE_KEYS)
    shown = sections(folder, configs, config["order"], model)
    blocks = [block for section in shown for block in section["blocks"]]
    sources = {block["results"]: block["source"] for block in blocks if block["table"]}
    headlines, absent = _headlines(config["headlines"], folder / "runs")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"inline": inline, "number": tabular.number, "picture": picture}
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=config,
        headlines=headlines,
        chart=_chart(config["picture"]["results"], folder / "runs"),
        sections=shown,
        sources=sources.values(),
        commit=provenance.git_commit(),
    )
    return html, absent + [block["error"] for block in blocks if block["error"]]


def sections(folder: Path, configs: Path, order: list[str], model: str) -> list[dict]:
    """Every section: a dict with id, title, about, plots (paths) and blocks.

    A block is a dict with results, heading, and either an error or a table and its source. order: names of files in
    configs/tables whose sections come first, in this order; then come the other files, then results that no file shows.
    """
    if not (folder / "runs").is_dir():
        raise PluginError(f"{folder} has no folder runs: --results is a folder with runs/*.json and plots/*.png")
    paths = sorted(configs.glob("tables/*.json"), key=lambda path: _place(path.stem, order))
    declared = [
        {"name": path.stem, "command": command(path.stem, model)} | _read_config(path, model, SECTION_KEYS)
        for path in paths
    ]
    return [_section(section, folder) for section in declared + _undeclared(declared, folder / "runs")]


def command(table: str, model: str) -> str:
    """The command that makes a table. model: a spec or its slug; all but the embedded model's is to be filled in."""
    # A page knows its model's short name, which is no hub id; tables of the embedded model are of a text to be named
    return f"python scripts/reproduce_tables.py {table} {'--text TEXT' if model == EMBEDDED else '--model MODEL'}"


def _read_config(path: Path, model: str, keys: set[str]) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8").replace("{model}", model))
    except OSError as error:
        raise PluginError(f"can't read {files.shown(path)}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise PluginError(f"{files.shown(path)} is not JSON: {error}") from error
    if missing := sorted(keys - config.keys()):
        raise PluginError(f"{files.shown(path)} has no {', '.join(missing)}, which the report shows")
    return config


def _place(name: str, order: list[str]) -> tuple[int, str]:
    """The sort key of a section: first those in `order`, in that order, then the others by name."""
    return (order.index(name) if name in order else len(order), name)


def _undeclared(declared: list[dict], runs: Path) -> list[dict]:
    """A section for each results file that no declared section shows, so that nothing measured is left out."""
    shown = {show["results"] for section in declared for show in section["show"]}
    stems = [path.stem for path in runs.glob("*.json") if machine.untagged(path.stem) not in shown]
    names = sorted(stem for stem in stems if stem not in shown and tables.kind_of(stem))
    return [{"name": name, "title": name, "about": "", "show": [{"results": name}], "plots": [name]} for name in names]


def _section(section: dict, folder: Path) -> dict:
    pictures = [name for plot in section["plots"] for name in machine.siblings(folder / "plots", plot, ".png")]
    plots = [folder / "plots" / f"{name}.png" for name in pictures]
    return {
        "id": re.sub("[^a-z0-9]+", "-", section["title"].lower()).strip("-"),
        "title": section["title"],
        "about": section["about"],
        "blocks": [
            _block(show | {"results": name}, section.get("command"), folder / "runs")
            for show in section["show"]
            for name in machine.siblings(folder / "runs", show["results"]) or [show["results"]]
        ],
        "plots": [path for path in plots if path.is_file() and _is_png(path)],
    }


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(24)
    return len(head) == 24 and head.startswith(b"\x89PNG")


def _block(show: dict, command: str | None, runs: Path) -> dict:
    name, table, source, error = show["results"], None, None, None
    path = runs / f"{name}.json"
    if not path.is_file():
        error = f"not measured yet: `{command}` makes `{name}`"
    else:
        try:
            record = tables.read(path)
            source = _source(name, record)
            table = tables.table(name, record, show.get("rows"), show.get("as"))
        except PluginError as problem:
            error = f"`{name}`: {problem}"
    return {"results": name, "heading": show.get("heading"), "table": table, "source": source, "error": error}


def _headlines(wanted: list[dict], runs: Path) -> tuple[list[dict], list[str]]:
    """For each headline its figure, a table's cell, and its sentence; and a message for each with missing results."""
    found, absent = [], []
    for headline in wanted:
        try:
            name = headline["results"]
            cells = _row(tables.table(name, tables.read(runs / f"{name}.json")), headline)
        except PluginError as problem:
            absent.append(f"headline: {problem}")
            continue
        figure, _, spread = cells[headline["figure"]].partition(" (")
        says = headline["says"].format_map(cells)
        found.append({"figure": figure, "spread": spread.rstrip(")"), "says": says, "results": name})
    return found, absent


def _row(table: Table, headline: dict) -> dict[str, str]:
    """Column to cell of the first row that has the cells of headline["row"]; of two equal columns the first counts."""
    for row in table.rows:
        cells = dict(reversed(list(zip(table.columns, row, strict=False))))
        if headline["row"].items() <= cells.items() and headline["figure"] in cells:
            return cells
    wanted = ", ".join(f"{column} {cell}" for column, cell in headline["row"].items())
    raise PluginError(f"{headline['results']}.json has no row of {wanted} with {headline['figure']}: see report.json")


def _chart(name: str, runs: Path) -> chart.Chart | None:
    """The chart of a results file; None if the file is missing or invalid, which the message of its table reports."""
    try:
        record = tables.read(runs / f"{name}.json")
        with tables.shown_of(name):
            return chart.compression_against_loss(record["rows"])
    except PluginError:
        return None


def _source(name: str, record: dict) -> dict:
    threads = record.get("threads")
    with tables.shown_of(name):
        return {
            "name": name,
            "commit": record["git_commit"],
            "date": record.get("created_utc", "")[:10],
            "device": record["device"],
            "threads": threads if isinstance(threads, int) else None,
            "versions": dict(record["versions"]),
            "args": json.dumps(record["args"], indent=1, ensure_ascii=False),
        }


def inline(text: str) -> Markup:
    """**bold**, *italics* and `code` as HTML, everything else escaped; a star after a character opens no italics."""
    html = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text)))
    html = re.sub(r"(?<!\S)\*(?=\S)([^*]+)\*", r"<em>\1</em>", html)
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", html))


def picture(path: Path) -> dict:
    """src, width and height of a PNG to be inlined."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # the PNG header's first fields
    return {"src": f"data:image/png;base64,{base64.b64encode(data).decode()}", "width": width, "height": height}
