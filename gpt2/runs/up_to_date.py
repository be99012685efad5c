"""Whether a results file is up to date: made with the run's arguments, from the same files and texts.

Results stay up to date when the code changes. The commit that made them must be known, so that it can be checked out,
or a replay with a known commit must have given the same (`gpt2.runs.replay`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shlex
import sys
from pathlib import Path

from gpt2.common import files, machine, provenance
from gpt2.common.errors import PluginError
from gpt2.models import loading
from gpt2.runs.config import Run, RunOptions
from gpt2.text import sources

IGNORED = {
    "output",
    "study",
    "device",
    "run_generated_code",
}  # arguments that don't change the results, only where they are made and go
REPLAYED = "replays.json"  # in the folder of results: a run's name to the outcome of its latest replay
TEXTS = {"text", "eval_text"}  # compared by their contents


class Matcher:
    """Compares runs, as made with some options, with the files in their folder of results.

    any_code: accept also results whose commit is unknown.
    """

    def __init__(self, options: RunOptions, runs: dict[str, Run], any_code: bool = False):
        self.options, self.runs, self.any_code = options, runs, any_code

    def record_path(self, name: str) -> Path:
        return self.options.results / "runs" / f"{name}.json"

    def product(self, name: str) -> Path:
        """The file of a run that other runs read: a calibration, a preset, or the results file itself."""
        output = self.options.results / self.runs[name].output
        return output if output.suffix else self.record_path(name)

    def record(self, name: str) -> dict | None:
        """The record in a run's results file; None if the file is missing or invalid."""
        try:
            record = json.loads(self.record_path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) and isinstance(record.get("args"), dict) else None

    def stale(self, name: str, any_code: bool = False) -> str | None:
        """The reason why a run's results are stale; None if they are up to date. any_code: whatever code made them."""
        run, record = self.runs[name], self.record(name)
        if record is None:
            return "missing"
        for need in run.needs:
            if reason := self.stale(need):
                return f"needs {need}, which is {reason}" if reason == "missing" else f"needs {need}: {reason}"
        reason = self._args_differ(run, record) or self._text_differs(run, record)
        return reason or (None if any_code or self._replayed(name) else self._commit_unknown(record))

    def replay(self, name: str) -> dict | None:
        """The outcome of the latest replay of a run's results; None if there is none, or the file has changed since."""
        outcome = replays(self.options.results).get(name)
        path = self.record_path(name)
        same = isinstance(outcome, dict) and path.is_file() and outcome.get("sha256") == files.file_sha256(path)
        return outcome if same else None

    def _replayed(self, name: str) -> bool:
        """Whether code at a known commit has given these results again."""
        outcome = self.replay(name)
        return bool(outcome and outcome.get("agrees") and not self._commit_unknown({"git_commit": outcome["commit"]}))

    def check_machine(self, run: Run) -> None:
        """Raise PluginError if a run per machine would mix machines: its tag is not this machine's kind, or has results
        of another machine, of which one without a record on the machine counts as one.
        """
        if run.tag is None:
            return
        own = machine.describe(run.args.get("device") or self.options.device or "auto")
        kind = self.options.own_tag(run.args)
        if run.tag != kind and not run.tag.startswith(f"{kind}-"):
            raise PluginError(f"this machine is {kind}: it makes no results of {run.tag}; give --machine {kind}")
        for other in self.runs.values():
            record = self.record(other.name) if other.tag == run.tag else None
            if record and not machine.same(record.get("machine"), own):
                raise PluginError(
                    f"{other.name}.json is of another machine ({machine.short(record)}), and no table mixes machines: "
                    f"give this one a tag of its own, such as --machine {kind}-2"
                )

    def complete(self, name: str) -> bool:
        """Whether a run's results are up to date and its product has the sha256 that they record."""
        path = self.product(name)
        if self.stale(name) or not path.is_file():
            return False
        return files.file_sha256(path) == self.record(name).get("sha256", files.file_sha256(path))

    def to_make(self, wanted: list[str]) -> list[str]:
        """The wanted runs that are stale, each after the runs that it needs whose products are stale or missing."""
        found: dict[str, None] = {}

        def add(name: str) -> None:
            for need in self.runs[name].needs:
                if not self.complete(need):
                    add(need)
            found[name] = None

        for name in wanted:
            if self.stale(name):
                add(name)
        return list(found)

    def status(self, wanted: list[str]) -> str:
        """A text with a line per wanted run, up to date or the reason why not, and then the runs to make in order."""
        lines = [f"{name:<44} {self.stale(name) or self._confirmed(name)}" for name in wanted]
        made = self.to_make(wanted)
        return "\n".join([*lines, "", f"{len(made)} runs to make" + (f": {', '.join(made)}" if made else "")])

    def _confirmed(self, name: str) -> str:
        """How up-to-date results were confirmed: by a replay, by being made at the present commit, or not since.

        Times never are: they are of the machine and the commit that the file names.
        """
        outcome, made = self.replay(name), self.record(name).get("git_commit")
        if outcome and not outcome.get("agrees"):
            return f"up to date, but its replay at {outcome['commit']} differs"
        if outcome:
            return f"up to date, replayed at {outcome['commit']}"
        if self.runs[name].tag is not None:
            return f"up to date, times measured at {made}"
        return "up to date" if made == provenance.git_commit() else f"up to date, made at {made}, not replayed since"

    def parsed(self, run: Run) -> argparse.Namespace:
        """A run's arguments as its script parses them, without --output and --device.

        Raises PluginError if the script rejects them.
        """
        return self._parse(run)[0]

    def command(self, run: Run) -> list[str]:
        """The command that makes a run's results. Raises PluginError if the script rejects its arguments."""
        parsed, words = self._parse(run)
        if reason := self.not_allowed(run):
            raise PluginError(reason)
        if hasattr(parsed, "run_generated_code"):
            words += ["--run-generated-code"]
        if self.options.device and hasattr(parsed, "device") and "device" not in run.args:
            words += ["--device", self.options.device]
        return [sys.executable, str(self._script(run)), *words, "--output", str(self.options.results / run.output)]

    def not_allowed(self, run: Run) -> str | None:
        """Why a run must not be made with these options: it runs code that a model has written; None if it may."""
        without_flag = self._parser(run).get_default("run_generated_code") is None  # False where the script has it
        if self.options.run_generated_code or without_flag:
            return None
        return f"{run.name} runs code that a model has generated: give --run-generated-code to allow it"

    def _script(self, run: Run) -> Path:
        return self.options.checkout / "scripts" / f"{run.script}.py"

    def _parser(self, run: Run) -> argparse.ArgumentParser:
        return script_module(self._script(run)).arguments()

    def _parse(self, run: Run) -> tuple[argparse.Namespace, list[str]]:
        """A run's arguments, parsed and as words; --model is added where the script has it and the run names none."""
        parser, words = self._parser(run), run.words()
        try:
            if "model" not in run.args and hasattr(parser.parse_known_args(words)[0], "model"):
                words += ["--model", self.options.model]
            return parser.parse_args(words), words
        except SystemExit as error:
            raise PluginError(f"run {run.name}: {run.script}.py doesn't accept {shlex.join(words)}") from error

    def _args_differ(self, run: Run, record: dict) -> str | None:
        now = vars(self.parsed(run))
        held = provenance.inputs(now) | self._made(run)
        now = {key: _plain(value, held) for key, value in now.items()}
        parser = self._parser(run)
        before = {key: _plain(value, record.get("inputs", {})) for key, value in record["args"].items()}
        for key in sorted(now.keys() - IGNORED - TEXTS):
            # Results older than a flag were made as with its default
            then = before.get(key, _plain(parser.get_default(key), {}))
            if key == "model":
                then, now[key] = loading.slug_of(then), loading.slug_of(now[key])
            if then != now[key]:
                return f"made with --{key.replace('_', '-')} {_short(then)}, now {_short(now[key])}"
        return None

    def _made(self, run: Run) -> dict[str, str]:
        """Missing products of needed runs: path, as it stands in arguments, to the sha256 in the run's record."""
        made = {}
        for need in run.needs:
            record, path = self.record(need), self.product(need)
            if record and "sha256" in record and not path.is_file():
                names = files.recorded(path), self.options.fill("{results}/") + self.runs[need].output
                made |= dict.fromkeys(names, record["sha256"])
        return made

    def _text_differs(self, run: Run, record: dict) -> str | None:
        args = self.parsed(run)
        if "text" not in vars(args):
            return None
        recorded = record.get("text_sha256") or {}
        recorded = dict(recorded) if isinstance(recorded, dict) else {"evaluation": recorded}
        if isinstance(record.get("calibration"), dict) and not getattr(args, "calibration", None):
            recorded["calibration"] = record["calibration"]["text_sha256"]  # the run made its own calibration
        if not recorded:
            return "its record names no text"
        for part, sha256 in recorded.items():
            evaluated = part == "evaluation" and getattr(args, "eval_text", None)
            spec = evaluated or args.text or sources.default_text(self.options.model)
            if _text_sha256(spec, self.options.model, part) != sha256:
                return f"made from another text than --text {spec} ({part} part)"
        return None

    def _commit_unknown(self, record: dict) -> str | None:
        """Why the code that made the results can't be checked out again. It is not compared with the present code."""
        commit = record.get("git_commit")
        if self.any_code or commit == provenance.git_commit():  # also None: outside a repository there is no commit
            return None
        if not isinstance(commit, str) or not commit or commit.endswith("-dirty"):
            return "made from code that was never committed"
        if not provenance.has_commit(self.options.checkout, commit):
            return f"made at commit {_short(commit)}, which is not in this repository"
        return None


def replays(results: Path) -> dict[str, dict]:
    """The outcomes of replays by name of run; none if the file is missing or invalid."""
    try:
        record = json.loads((results / REPLAYED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _plain(value, held: dict[str, str]):
    """An argument as it stands in a JSON record, file names replaced by hashes. held: name of a file to its sha256."""
    if isinstance(value, (list, tuple)):
        return [_plain(item, held) for item in value]
    value = files.recorded(value) if isinstance(value, Path) else value
    return f"sha256 {held[value]}" if isinstance(value, str) and value in held else value


def _short(value) -> str:
    words = "nothing" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return words if len(words) <= 40 else f"{words[:37]}…"


@functools.cache
def _text_sha256(spec: str, model: str, part: str) -> str:
    return sources.load_text(spec, model).sha256(part)


@functools.cache
def script_module(path: Path):
    """A script as a module, so that its `arguments` can be called."""
    spec = importlib.util.spec_from_file_location(f"scripts_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
