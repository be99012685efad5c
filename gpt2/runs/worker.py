"""Make runs as trials of a queue, which can be interrupted, resumed, and shared by any number of processes.

Whether a run is done is decided by its results file alone; the queue only records which worker is making which run.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import optuna

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.common.trial_queue import Pace, TrialFailed, TrialQueue
from gpt2.models import loading
from gpt2.runs.record import write_record
from gpt2.runs.up_to_date import Matcher

PACE = Pace(heartbeat=10, silence=60, look=3.0)  # slow, as runs take minutes and databases may be on a network
INTERRUPTED = 130  # exit code of a script at Ctrl-C
WROTE_RESULTS = (0, 3)  # exit codes of scripts that wrote results; 3: with a negative verdict
STOPPING = 20  # seconds that a script has to clean up after Ctrl-C
# A script must end with its worker, since another worker may then start the same run on the same GPU
TIED = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


class Worker:
    """Makes runs until all wanted runs are made, by this process or by others.

    storage: an SQLite file, or the URL of a database. say: called with lines on the progress.
    """

    def __init__(
        self, storage: str | Path, matcher: Matcher, pace: Pace | None = None, say: Callable[[str], None] = print
    ):
        self.matcher, self.say = matcher, say
        options = matcher.options
        # Workers with other settings, which would make other results under the same names, use another study
        text, code = Path(options.text or "").name, "any commit" if matcher.any_code else "known commits"
        name = f"tables of {files.recorded(options.results)}, {loading.slug_of(options.model)}, {text}, {code}"
        self.queue = TrialQueue(storage, name, pace=pace or PACE)
        self._made: set[str] = set()
        self._refused: dict[str, str] = {}  # what this worker may not make, which others of the study may

    def work(self, wanted: list[str]) -> dict[str, str]:
        """Make the wanted runs. Returns the reasons for runs that failed or that need a failed run, by name."""
        failed = self.queue.work(lambda: self._ready(wanted), self._objective, self._report) | self._refused
        left = self._left(wanted)
        blocked = {name: "it needs a run that failed" for name in left if name not in failed}
        return {name: why for name, why in failed.items() if name in left} | blocked

    def _left(self, wanted: list[str]) -> list[str]:
        return [name for name in self.matcher.to_make(wanted) if name not in self._made]

    def _ready(self, wanted: list[str]) -> dict[str, dict]:
        """The runs that can be made here and now, as all runs that they need are made; they have no parameters."""
        left = self._left(wanted)
        ready = [name for name in left if not set(self.matcher.runs[name].needs) & set(left)]
        return {name: {} for name in ready if self._may_make(name)}

    def _may_make(self, name: str) -> bool:
        run = self.matcher.runs[name]
        try:
            self.matcher.check_machine(run)
            self.matcher.command(run)
        except PluginError as error:
            self._refused[name] = str(error)
            return False
        return True

    def _report(self, note: str) -> None:
        if note:
            self.say(note)

    def _objective(self, trial: optuna.Trial, name: str) -> float:
        start = time.monotonic()
        self._make(name)
        self._made.add(name)
        return time.monotonic() - start

    def _make(self, name: str) -> None:
        run = self.matcher.runs[name]
        command = self.matcher.command(run)
        self.say(f"\n{name}: {shlex.join(['python', *map(_shown, command[1:])])}")
        code = call(command)
        if code not in WROTE_RESULTS:
            raise TrialFailed(f"exit code {code}")
        try:
            write_record(self.matcher, run)
            reason = self.matcher.stale(name)
        except PluginError as error:  # only this run fails; the others continue
            raise TrialFailed(f"its script ended, but its output is invalid: {error}") from error
        if reason:
            raise TrialFailed(f"its script ended, but its results are not up to date: {reason}")


def call(command: list[str]) -> int:
    """Run a script and return its exit code. At Ctrl-C, which the script gets too, wait until it has cleaned up."""
    child = subprocess.Popen([*TIED, *command])
    try:
        code = child.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOPPING)
        child.kill()
        raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code


def _shown(word: str) -> str:
    return files.shown(Path(word)) if word.startswith("/") else word
