"""Is a results file what a run would make now? Arguments, and files and texts that they name, must be the same.

The code may have changed since; the commit that made the results must be known, so that anyone can go back to it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shlex
import sys
from pathlib import Path

from gpt2.common import files, provenance
from gpt2.common.errors import PluginError
from gpt2.models import loading
from gpt2.runs.config import Run, Setting
from gpt2.text import sources

IGNORED = {"output", "study", "device"}  # where results go and where they are made
TEXTS = {"text", "eval_text"}  # compared by what they hold


class Matcher:
    """Compares the runs of a setting with the results that lie in its folder.

    any_code: results whose commit is unknown count as well.
    """

    def __init__(self, setting: Setting, runs: dict[str, Run], any_code: bool = False):
        self.setting, self.runs, self.any_code = setting, runs, any_code

    def record_path(self, name: str) -> Path:
        return self.setting.results / "runs" / f"{name}.json"

    def product(self, name: str) -> Path:
        """The file that others read of a run: a calibration or preset, or the results themselves."""
        output = self.setting.results / self.runs[name].output
        return output if output.suffix else self.record_path(name)

    def record(self, name: str) -> dict | None:
        """The results file of a run, None where there is none that can be read."""
        try:
            record = json.loads(self.record_path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) and isinstance(record.get("args"), dict) else None

    def why_not(self, name: str) -> str | None:
        """None where the results are what the run would make now, else in what they differ."""
        run, record = self.runs[name], self.record(name)
        if record is None:
            return "missing"
        for need in run.needs:
            if reason := self.why_not(need):
                return f"needs {need}, which is {reason}" if reason == "missing" else f"needs {need}: {reason}"
        return self._args_differ(run, record) or self._text_differs(run, record) or self._commit_unknown(record)

    def current(self, name: str) -> bool:
        """Whether a run's results match, and its product is there as they say."""
        path = self.product(name)
        if self.why_not(name) or not path.is_file():
            return False
        return files.file_sha256(path) == self.record(name).get("sha256", files.file_sha256(path))

    def to_make(self, wanted: list[str]) -> list[str]:
        """The runs that have to be made for those that are wanted: these where they don't match, and what they need."""
        found: dict[str, None] = {}

        def add(name: str) -> None:
            for need in self.runs[name].needs:
                if not self.current(need):
                    add(need)
            found[name] = None

        for name in wanted:
            if self.why_not(name):
                add(name)
        return list(found)

    def parsed(self, run: Run) -> argparse.Namespace:
        """A run's arguments as its script would parse them, --output and --device apart."""
        parser = script_module(self.setting.checkout / "scripts" / f"{run.script}.py").arguments()
        words = run.words() + self._model(parser)
        try:
            return parser.parse_args(words)
        except SystemExit as error:
            raise PluginError(f"run {run.name}: {run.script}.py doesn't take {shlex.join(words)}") from error

    def command(self, run: Run) -> list[str]:
        """What makes a run's results."""
        script = self.setting.checkout / "scripts" / f"{run.script}.py"
        parser = script_module(script).arguments()
        words = run.words() + self._model(parser)
        if self.setting.device and "--device" in parser._option_string_actions and "device" not in run.args:
            words += ["--device", self.setting.device]
        return [sys.executable, str(script), *words, "--output", str(self.setting.results / run.output)]

    def _model(self, parser: argparse.ArgumentParser) -> list[str]:
        return ["--model", self.setting.model] if "--model" in parser._option_string_actions else []

    def _args_differ(self, run: Run, record: dict) -> str | None:
        now = vars(self.parsed(run))
        held = provenance.inputs(now) | self._made(run)
        now = {key: _plain(value, held) for key, value in now.items()}
        parser = script_module(self.setting.checkout / "scripts" / f"{run.script}.py").arguments()
        before = {key: _plain(value, record.get("inputs", {})) for key, value in record["args"].items()}
        for key in sorted(now.keys() - IGNORED - TEXTS):
            then = before.get(key, _plain(parser.get_default(key), {}))  # older scripts did what is the default now
            if key == "model":
                then, now[key] = loading.slug_of(then), loading.slug_of(now[key])
            if then != now[key]:
                return f"made with --{key.replace('_', '-')} {_short(then)}, now {_short(now[key])}"
        return None

    def _made(self, run: Run) -> dict[str, str]:
        """Files that needed runs have made, which may not be here any more: path as arguments have it to sha256."""
        made = {}
        for need in run.needs:
            record, path = self.record(need), self.product(need)
            if record and "sha256" in record and not path.is_file():
                names = files.shown(path), self.setting.fill("{results}/") + self.runs[need].output
                made |= dict.fromkeys(names, record["sha256"])
        return made

    def _text_differs(self, run: Run, record: dict) -> str | None:
        args = self.parsed(run)
        if "text" not in vars(args):
            return None
        recorded = record.get("text_sha256") or {}
        recorded = dict(recorded) if isinstance(recorded, dict) else {"evaluation": recorded}
        if isinstance(record.get("calibration"), dict) and not getattr(args, "calibration", None):
            recorded["calibration"] = record["calibration"]["text_sha256"]  # it made its own
        if not recorded:
            return "it doesn't say which text it was made from"
        for part, sha256 in recorded.items():
            evaluated = part == "evaluation" and getattr(args, "eval_text", None)
            spec = evaluated or args.text or sources.default_text(self.setting.model)
            if _text_sha256(spec, self.setting.model, part) != sha256:
                return f"made from another text than --text {spec} ({part} part)"
        return None

    def _commit_unknown(self, record: dict) -> str | None:
        """Why nobody could get the code back that made the results. Whether today's code agrees is for a replay."""
        commit = record.get("git_commit")
        if self.any_code or commit == provenance.git_commit():  # also None: outside a repository there is no commit
            return None
        if not isinstance(commit, str) or not commit or commit.endswith("-dirty"):
            return "made from code that was never committed"
        if not provenance.has_commit(self.setting.checkout, commit):
            return f"made at commit {_short(commit)}, which is not in this repository"
        return None


def _plain(value, held: dict[str, str]):
    """An argument as JSON has it, with files by what they hold. held: name of a file to its sha256."""
    if isinstance(value, (list, tuple)):
        return [_plain(item, held) for item in value]
    value = files.shown(value) if isinstance(value, Path) else value
    return f"sha256 {held[value]}" if isinstance(value, str) and value in held else value


def _short(value) -> str:
    words = "nothing" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return words if len(words) <= 40 else f"{words[:37]}…"


@functools.cache
def _text_sha256(spec: str, model: str, part: str) -> str:
    return sources.load_text(spec, model).sha256(part)


@functools.cache
def script_module(path: Path):
    """A script as a module, so that its `arguments` can be asked."""
    spec = importlib.util.spec_from_file_location(f"scripts_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
