"""Tables from results records, the same ones for a terminal, for Markdown and for HTML.

Every kind of results file in results/runs has one function that makes its table and one line in TABLES. The function
gets the record and some words that choose rows, such as groups of the perplexity ablation; no words mean all rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2.common.errors import PluginError, brief
from gpt2.report.table import Table
from gpt2.report.tables.architectures import architectures
from gpt2.report.tables.by_position import by_position
from gpt2.report.tables.code import code
from gpt2.report.tables.gpu_roofline import attention_bound, gpu_roofline
from gpt2.report.tables.guide import beside_guide
from gpt2.report.tables.needle import needle, needle_cells, needle_pairs
from gpt2.report.tables.parking import parking
from gpt2.report.tables.quality import (
    codec_variations,
    layer_ablation,
    peers,
    ratio_presets,
    ratio_presets_of_models,
    stability,
    tuned,
    validation,
)
from gpt2.report.tables.scaling import scaling
from gpt2.report.tables.side_by_side import side_by_side
from gpt2.report.tables.speed import (
    appending,
    attention_of_machines,
    attention_step,
    cache_bytes,
    calibrating,
    largest_batch,
    profile,
    profile_of_machines,
    profile_parking,
    profile_steps,
)
from gpt2.report.tables.tasks import tasks, tasks_of_models, tasks_pairs

# Start of a results file's name to its table; a kind that no file name starts with is shown by `as` or by a script
TABLES: dict[str, Callable[[dict, list[str]], Table]] = {
    "architectures": architectures,
    "attention_bound": attention_bound,
    "attention_step": attention_step,
    "auto_tune": tuned,
    "benchmark_append": appending,
    "benchmark_calibration": calibrating,
    "beside_guide": beside_guide,
    "by_position": by_position,
    "cache_bytes": cache_bytes,
    "code": code,
    "explore_codecs": codec_variations,
    "gpu_roofline": gpu_roofline,
    "largest_batch": largest_batch,
    "layer_ablation": layer_ablation,
    "long_context": by_position,
    "needle_cells": needle_cells,
    "needle_pairs": needle_pairs,
    "needle": needle,
    "parking": parking,
    "peers": peers,
    "profile_parking": profile_parking,
    "profile_steps": profile_steps,
    "profile": profile,
    "ratio_presets": ratio_presets,
    "scaling": scaling,
    "side_by_side": side_by_side,
    "stability": stability,
    "tasks_pairs": tasks_pairs,
    "tasks": tasks,
    "validate_ppl": validation,
}

# The same for tables that show several machines side by side
OF_MACHINES: dict[str, Callable[[list[dict], list[str]], Table]] = {
    "attention_step": attention_of_machines,
    "profile": profile_of_machines,
}

# The same for tables that show several models side by side
OF_MODELS: dict[str, Callable[[list[dict], list[str]], Table]] = {
    "ratio_presets": ratio_presets_of_models,
    "tasks": tasks_of_models,
}


def show(kind: str, record: dict, *words: str, note: bool = True) -> None:
    """Print a table of TABLES for a terminal, after an empty line. words: as its function takes them."""
    table = TABLES[kind](record, list(words))
    if not note:
        table.note = ""
    print(f"\n{table.console()}", flush=True)


def table(name: str, record: dict, words: str | None = None, kind: str | None = None) -> Table:
    """The table of a results file. words: which of its rows, joined by commas; kind: a key of TABLES, by name if None.

    Raises PluginError if there is no such table, or the record lacks these rows or other keys of the table.
    """
    make = TABLES.get(kind or kind_of(name))
    if make is None:
        raise PluginError(f"no table is made of {name}: give `as`, one of {', '.join(TABLES)}")
    with shown_of(name):
        made = make(record, words.split(",") if words else [])
        made.markdown()  # fails on cells that aren't strings
        return made


def of_machines(names: list[str], records: list[dict], words: str | None = None) -> Table:
    """One table of the same results on several machines, side by side; as `table` where only one has measured them."""
    if len(records) == 1:
        return table(names[0], records[0], words)
    make = OF_MACHINES.get(kind_of(names[0]))
    if make is None:
        raise PluginError(f"no table shows {names[0]} of several machines side by side: take `each`")
    with shown_of(" and ".join(names)):
        return make(records, words.split(",") if words else [])


def of_models(name: str, records: list[dict], words: str | None = None) -> Table:
    """One table of the same measurement of several models, side by side. name: of the results, NAME+NAME."""
    make = OF_MODELS.get(kind_of(name))
    if make is None:
        raise PluginError(f"no table shows {name} side by side: name one results file")
    with shown_of(name):
        return make(records, words.split(",") if words else [])


def kind_of(name: str) -> str | None:
    """The longest key of TABLES that the name of a results file starts with; None where there is none."""
    return max((kind for kind in TABLES if name.startswith(kind)), key=len, default=None)


def read(path: Path) -> dict:
    """A results record. Raises PluginError where the file is missing or isn't a JSON object."""
    if not path.is_file():
        raise PluginError(f"a table asks for {path.name}, which is not among the committed results: run it first")
    with shown_of(path.stem):
        return dict(json.loads(path.read_text(encoding="utf-8")).items())


@contextmanager
def shown_of(name: str) -> Iterator[None]:
    """Turn any error within into a PluginError that names the results file.

    Such a file may come from outside or be cut off: any key may be missing or have a value of another type.
    """
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {brief(str(error))}"
        raise PluginError(f"{name}.json doesn't hold what is shown of it ({why}): make it again") from error
