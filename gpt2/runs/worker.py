"""Make runs, each a trial of an Optuna study: killed and resumed, and shared by any number of processes.

Whether a run is done is told by its results file alone; the study tells who is making what. Every worker puts the runs
that can be made into the study, claims one at a time, and takes over what a dead worker has claimed. Two workers may
put the same run into it; then the trial that is first counts and the other is dropped when it is claimed.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.models import loading
from gpt2.runs.record import write_record
from gpt2.runs.up_to_date import Matcher
from gpt2.tuning import trial_queue

LIVE = (TrialState.WAITING, TrialState.RUNNING)
TAKEN_OVER = 2  # times that a run whose worker died is tried again: it may be what kills workers
INTERRUPTED = 130  # exit code of a script at Ctrl-C
FOUND_SOMETHING = (0, 3)  # exit codes of scripts that wrote results; 3: a verdict that isn't the one hoped for
OPENINGS = 5  # two processes that create a database's tables at once trip over each other
# A script must not outlive its worker: another may be making the same by then, on the same GPU
TIED = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


STOPPING = 20  # seconds that a script is given to clean up after Ctrl-C


@dataclass(frozen=True)
class Pace:
    """Seconds: between signs of life, without one until a worker counts as dead, between looks at the others' work."""

    heartbeat: int = 10
    silence: int = 60
    look: float = 3.0


class RunFailed(PluginError):
    """A run's script failed, or didn't write what it should have."""


class Queue:
    """An Optuna study in an SQLite file, or in a database by its URL. It is made where it doesn't exist."""

    def __init__(self, storage: str | Path, name: str, pace: Pace):
        self.url = url = str(storage) if "://" in str(storage) else f"sqlite:///{trial_queue.check_file(storage)}"
        for left in reversed(range(OPENINGS)):
            try:
                self._open(url, name, pace)
                return
            except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
                if not left or isinstance(error, ImportError):
                    raise trial_queue.cant_use(url, error) from error
                time.sleep(0.5)

    def _open(self, url: str, name: str, pace: Pace) -> None:
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=TAKEN_OVER)
        storage = trial_queue.open_storage(url, pace.heartbeat, pace.silence, retry)
        self.engine = storage.engine
        self.study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in some states, in the order of their numbers."""
        return self.study.get_trials(deepcopy=False, states=states or None)


class Worker:
    """Makes runs until all that is wanted is made, by this process or by others.

    storage: an SQLite file, or the URL of a database. say: gets a line on what goes on.
    """

    def __init__(
        self, storage: str | Path, matcher: Matcher, pace: Pace | None = None, say: Callable[[str], None] = print
    ):
        self.matcher, self.pace, self.say = matcher, pace or Pace(), say
        setting = matcher.setting
        # Workers that would make something else of the same name don't share their work
        text, code = Path(setting.text or "").name, "any commit" if matcher.any_code else "known commits"
        name = f"tables of {files.shown(setting.results)}, {loading.slug_of(setting.model)}, {text}, {code}"
        self.queue = Queue(storage, name, self.pace)
        self.first = len(self.queue.trials())  # what failed before is tried again
        self.made: set[str] = set()
        self.failed: dict[str, str] = {}
        self.lost = False  # whether the run that was claimed last has been taken over
        self.silent_since: dict[int, float] = {}

    def work(self, wanted: list[str]) -> dict[str, str]:
        """Make what is wanted. Returns the runs that failed, or that need one that did, and why."""
        with trial_queue.usable(self.queue.url):
            return self._work(wanted)

    def _work(self, wanted: list[str]) -> dict[str, str]:
        said = set()
        while True:
            left = [name for name in self.matcher.to_make(wanted) if name not in self.made]
            waiting, running = self._enqueue(left)
            if waiting:
                self._claim()
            elif running:
                if running != said:
                    self.say(f"waiting for other workers, which make {', '.join(sorted(running))}")
                said = running
                time.sleep(self.pace.look)
            else:
                blocked = {name: "it needs a run that failed" for name in left if name not in self.failed}
                return {name: why for name, why in self.failed.items() if name in left} | blocked

    def _enqueue(self, left: list[str]) -> tuple[set[str], set[str]]:
        """Put into the study what can be made and isn't in it. Returns what waits, and what of `left` is being made."""
        self._fail_stale()
        self._collect_failures()
        waiting, running = ({_run(t) for t in self.queue.trials(state)} for state in LIVE)
        for name in left:
            ready = not set(self.matcher.runs[name].needs) & set(left)
            if ready and name not in self.failed and name not in waiting | running:
                self.queue.study.enqueue_trial({}, user_attrs={"run": name})
                waiting.add(name)
        return waiting, running & set(left)

    def _claim(self) -> None:
        """Make the run that has waited longest."""
        self.lost = False
        try:
            self.queue.study.optimize(self._objective, n_trials=1, catch=(RunFailed,))
        except (ValueError, AssertionError):  # what Optuna raises at the end of a trial that others have ended
            if not self.lost:
                raise
            self.say("this worker was silent for so long that another has taken its run over")

    def _objective(self, trial: optuna.Trial) -> float:
        name = trial.user_attrs.get("run")
        earlier = {_run(t) for t in self.queue.trials(*LIVE) if t.number < trial.number}
        if name not in self.matcher.runs or name in earlier or self.matcher.current(name):
            raise optuna.TrialPruned  # nobody's, somebody else's, or made since we looked
        start = time.monotonic()
        try:
            self._make(name)
        except RunFailed as error:
            trial.set_user_attr("failed", str(error))
            raise
        finally:
            self.lost = self.queue.trials()[trial.number].state.is_finished()
        self.made.add(name)
        return time.monotonic() - start

    def _make(self, name: str) -> None:
        run = self.matcher.runs[name]
        command = self.matcher.command(run)
        self.say(f"\n{name}: {shlex.join(['python', *map(_shown, command[1:])])}")
        code = call(command)
        if code not in FOUND_SOMETHING:
            raise RunFailed(f"exit code {code}")
        try:
            write_record(self.matcher, run)
            reason = self.matcher.why_not(name)
        except PluginError as error:  # of this run alone: the others go on
            raise RunFailed(f"it has run, but what it wrote can't be used: {error}") from error
        if reason:
            raise RunFailed(f"it has run, but its results are not what was asked for: {reason}")

    def _collect_failures(self) -> None:
        """Runs that failed since this worker began, here or elsewhere. Those that were taken over are no failures."""
        for trial in self.queue.trials(TrialState.FAIL):
            deaths = len(trial.system_attrs.get("retry_history", ())) + 1
            why = trial.user_attrs.get("failed", f"{deaths} workers died at it" if deaths > TAKEN_OVER else None)
            if why and trial.number >= self.first:
                self.failed.setdefault(_run(trial), why)

    def _fail_stale(self) -> None:
        """Fail the trials of dead workers, also of those that died before their first sign of life."""
        optuna.storages.fail_stale_trials(self.queue.study)
        now = time.monotonic()  # our own clock: that of another machine may differ
        silent = trial_queue.without_heartbeat(self.queue.engine, self.queue.study.study_name)
        self.silent_since = {n: self.silent_since.get(n, now) for n in silent}
        for number, since in self.silent_since.items():
            if now - since > self.pace.silence:
                self.queue.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def call(command: list[str]) -> int:
    """Run a script to its end; its exit code. At Ctrl-C, which reaches it too, it may clean up before we stop."""
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


def _run(trial: FrozenTrial) -> str | None:
    return trial.user_attrs.get("run")


def _shown(word: str) -> str:
    return files.shown(Path(word)) if word.startswith("/") else word
