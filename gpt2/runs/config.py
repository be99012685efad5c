"""The table definitions in `configs/tables`, and the runs that they define.

A table is one JSON file, whose stem is the table's name:

    title, about   a heading, and two or three sentences on what the table shows and how to read it
    runs           name to {script, args, other_models?, models?, quick?, needs?, output?, per_machine?}: one script
                   with arguments, which makes results/runs/NAME.json. other_models: other values of args for models
                   other than the embedded one, which have none of its built-in presets. models: the same for single
                   models, by their names in file names, such as fewer tokens for a model that is slow on the machines
                   where its committed results were made. quick: other values of args for small runs. needs: runs whose
                   files it reads.
                   output: value of --output, relative to the folder of results; default runs/NAME.json.
                   per_machine: whether it measures time: each kind of machine then has results of its own, NAME.json
                   on the reference machine and NAME_TAG.json on others (`gpt2.common.machine`)
    show           [{results, rows?, as?, heading?}]: results to show one below the other, all rows or some. as: a key
                   of `gpt2.report.tables.TABLES`; by default the one that the results' name starts with. Of a run
                   per machine, the results of all machines are shown, one below the other, each with its machine
    plots          names of pictures in results/plots
    figures        [{name, plot, results}]: pictures that are drawn when the page is written, from results of several
                   models, and shown before `plots`. plot: a function of gpt2.report.plots that takes a list of records.
                   results: names of results, or patterns such as peers_*; those that aren't there are left out

Names of runs are global: a table may show results of a run that another file defines. {model} stands for the model's
name in file names, {text} for --text and {results} for the folder of results.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from gpt2.common import files, machine, provenance
from gpt2.common.errors import PluginError
from gpt2.common.schema import Default, ListOf, OneOf, Plain, Record, String, parse, read_json
from gpt2.models import embedded, loading
from gpt2.text import sources

THIS = "this"  # a options's machine: the one that runs
NAMES = ListOf(String())
RUN = Record(
    {
        "script": String(),
        "args": Record(others=Plain()),
        "other_models": Default(Record(others=Plain()), {}),
        "models": Default(Record(others=Record(others=Plain())), {}),
        "quick": Default(Record(others=Plain()), {}),
        "needs": Default(NAMES, []),
        "output": Default(String()),
        "per_machine": Default(OneOf((False, True)), False),
    }
)
SHOW = Record({"results": String(), "rows": Default(Plain()), "as": Default(String()), "heading": Default(String())})
FIGURE = Record({"name": String(), "plot": OneOf(("frontier",)), "results": NAMES})
TABLE = Record(
    {
        "title": String(),
        "about": String(),
        "runs": Record(others=RUN),
        "show": ListOf(SHOW),
        "plots": NAMES,
        "figures": Default(ListOf(FIGURE), []),
    }
)


@dataclass(frozen=True)
class RunOptions:
    """The model, text and other settings for which tables are made.

    model: embedded model's name, local folder or hub id. text: --text of every run; None for the model's default text.
    quick: small runs, with a separate folder of results. device: of every run; None for each script's default.
    machine: tag of the results that runs per machine make; THIS for this machine's own.
    run_generated_code: whether runs may run code that a model has generated.
    checkout: folder with scripts, configs and results.
    """

    model: str = embedded.EMBEDDED
    text: str | None = None
    quick: bool = False
    device: str | None = None
    machine: str = machine.REFERENCE
    run_generated_code: bool = False
    checkout: Path = field(default_factory=lambda: files.ROOT)

    @property
    def results(self) -> Path:
        return self.checkout / "results" / "quick" if self.quick else self.checkout / "results"

    def __post_init__(self):
        if self.machine != THIS and not machine.TAG.fullmatch(f"_{self.machine}"):
            known = ", ".join([*machine.KINDS, machine.GENERIC])
            raise PluginError(f"--machine {self.machine}: a tag is one of {known}, or one of these, - and a name")

    def tag(self, args: dict) -> str:
        """The tag of what a run with these arguments makes, if it is per machine."""
        return self.own_tag(args) if self.machine == THIS else self.machine

    def own_tag(self, args: dict) -> str:
        """The tag of this machine, or of the GPU that a run with these arguments uses."""
        return provenance.machine_tag(args.get("device") or self.device or "auto")

    def fill(self, value):
        """A name, an argument or a list of them with {model}, {text} and {results} replaced."""
        if isinstance(value, list):
            return [self.fill(item) for item in value]
        if not isinstance(value, str):
            return value
        text = self.text or sources.default_text(self.model)
        known = {"{model}": loading.slug_of(self.model), "{text}": text, "{results}": os.path.relpath(self.results)}
        for word, meaning in known.items():
            value = value.replace(word, meaning)
        return "+".join(dict.fromkeys(value.split("+")))  # {text}+embedded must not name `embedded` twice


@dataclass(frozen=True)
class Run:
    """One script with arguments, which makes one results file.

    output: its path relative to the folder of results. base: its name on the reference machine, the same for runs that
    aren't per machine. tag: of the machine, None for those.
    """

    name: str
    script: str
    args: dict = field(hash=False)
    needs: tuple[str, ...] = ()
    output: str = ""
    base: str = ""
    tag: str | None = None

    def words(self) -> list[str]:
        """Its arguments as a list of words for a command line, without --model, --device and --output."""
        words = []
        for flag, value in self.args.items():
            if value is None or value is False:
                continue
            items = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, items)]
        return words


@dataclass(frozen=True)
class TableDefinition:
    """The definition of a table, with placeholders replaced in names. show: dicts as in SHOW, with `run`: the
    name of the run that makes these results on the options's machine. figures: dicts as in FIGURE.
    """

    name: str
    title: str
    about: str
    show: list[dict]
    plots: list[str]
    figures: list[dict] = field(default_factory=list)

    @property
    def results(self) -> list[str]:
        """Names of the runs whose results it shows."""
        return list(dict.fromkeys(item["run"] for item in self.show))


def load(options: RunOptions) -> tuple[dict[str, TableDefinition], dict[str, Run]]:
    """All tables and all runs of a checkout, by name. Raises PluginError for an invalid file."""
    tables, runs, of_base = {}, {}, {}
    for path in sorted((options.checkout / "configs" / "tables").glob("*.json")):
        record = parse(read_json(path, "table"), TABLE, path.name, noun="key")
        for name, defined in record["runs"].items():
            run = _run(options, name, defined, path)
            if runs.setdefault(run.name, run) != run:
                raise PluginError(
                    f"{path.name}: run {name} is defined differently in another table: give it another name"
                )
            of_base[run.base] = run.name
        show = [{key: options.fill(value) for key, value in item.items()} for item in record["show"]]
        tables[path.stem] = TableDefinition(
            path.stem, record["title"], record["about"], show, options.fill(record["plots"]), record["figures"]
        )
    for item in (item for table in tables.values() for item in table.show):
        item["run"] = of_base.get(item["results"], item["results"])
    for wanted, where in _references(tables, runs):
        if wanted not in runs:
            raise PluginError(f"{where}: no table defines a run {wanted}: define it under `runs`, or correct the name")
    return tables, runs


def select(
    names: list[str], tables: dict[str, TableDefinition], runs: dict[str, Run]
) -> tuple[list[TableDefinition], list[str]]:
    """The tables with these names, and the wanted runs: those that the tables show, and those that are named.

    Without names all tables are chosen. Raises PluginError for a name that is neither a table's nor a run's.
    """
    of_base = {run.base: name for name, run in runs.items()}  # without this machine's tag
    names = [name if name in tables else of_base.get(name, name) for name in names]
    if unknown := [name for name in names if name not in tables.keys() | runs.keys()]:
        raise PluginError(f"no table {', '.join(unknown)} in configs/tables: there are {', '.join(tables)}")
    chosen = [tables[name] for name in names or tables if name in tables]
    single = [name for name in names if name not in tables]
    return chosen, list(dict.fromkeys([*single, *(name for table in chosen for name in table.results)]))


def _references(tables: dict[str, TableDefinition], runs: dict[str, Run]):
    for table in tables.values():
        yield from ((name, f"{table.name}.json") for name in table.results)
    for run in runs.values():
        yield from ((name, f"run {run.name}") for name in run.needs)


def _run(options: RunOptions, name: str, defined: dict, path: Path) -> Run:
    if not (options.checkout / "scripts" / f"{defined['script']}.py").is_file():
        raise PluginError(f"{path.name}: run {name}: no script {defined['script']}.py in scripts")
    model = loading.slug_of(options.model)
    others = {} if model == embedded.EMBEDDED else defined["other_models"]
    own = {} if options.quick else defined["models"].get(model, {})
    args = defined["args"] | (defined["quick"] if options.quick else {}) | others | own
    base = name = options.fill(name)
    tag = options.tag(args) if defined["per_machine"] else None
    if tag:
        name = machine.named(base, tag)
    return Run(
        name, defined["script"], {flag: options.fill(value) for flag, value in args.items()},
        tuple(options.fill(defined["needs"])), options.fill(defined.get("output", f"runs/{name}.json")),
        base, tag,
    )  # fmt: skip
