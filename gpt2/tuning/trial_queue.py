"""A queue of trials in a database, an Optuna study, that several processes work on and that survives any of them.

A worker asks again and again what is still wanted. It puts the first key that no worker has into the study, claims one
trial, and lets the objective try its key. A trial whose worker gives no sign of life any more has failed, and its key
is tried again. The database is an SQLite file, or a server's, such as PostgreSQL, for several machines.
"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, text
from sqlalchemy.exc import SQLAlchemyError

from gpt2.common import files
from gpt2.common.errors import PluginError

# Heartbeats have been in Optuna since 2021 and are still marked experimental
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

LIVE = (TrialState.WAITING, TrialState.RUNNING)
RETRIES = 2  # times that a key is tried again after its worker died: it may be what kills workers
OPENINGS = 5  # two processes that create a database's tables at the same moment make one of them fail

Wanted = Callable[[], dict[str, dict]]
Objective = Callable[[optuna.Trial, str], float]


@dataclass(frozen=True)
class Pace:
    """Seconds between a worker's heartbeats, without one until it counts as dead, and between looks at the others."""

    heartbeat: int = 5
    silence: int = 20
    look: float = 2.0


PACE = Pace()


class TrialFailed(PluginError):
    """An objective raises it for a failure of its own key: the queue records it and goes on with the other keys."""


class TrialQueue:
    """A study as a queue. It is created where it doesn't exist; processes that open it by the same name share it.

    storage: an SQLite file, or a database's URL. sampler: chooses the parameters that keys are wanted without. Raises
    PluginError where the database can't be used.
    """

    def __init__(self, storage: str | Path, name: str, *, pace: Pace | None = None, sampler: BaseSampler | None = None):
        self.place, self.pace = str(storage), pace or PACE
        self.file = None if "://" in self.place else check_file(storage)
        self.study = self._open(name, sampler)
        with usable(self.place):
            self.first = len(self.trials())  # what failed before is tried again
        self._silent_since: dict[int, float] = {}

    def _open(self, name: str, sampler: BaseSampler | None) -> optuna.Study:
        url = f"sqlite:///{self.file}" if self.file else self.place
        for left in reversed(range(OPENINGS)):
            try:
                self._storage = _open_storage(url, self.pace)
                return optuna.create_study(
                    storage=self._storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True
                )
            except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
                if not left or isinstance(error, ImportError):  # its driver isn't installed
                    raise cant_use(self.place, error) from error
                time.sleep(0.5)
        raise AssertionError("unreachable")

    def trials(self) -> list[FrozenTrial]:
        """All trials, in the order of their numbers; `key_of` says what each is for."""
        return self.study.get_trials(deepcopy=False)

    def work(
        self, wanted: Wanted, objective: Objective, report: Callable[[str], None] = lambda note: None
    ) -> dict[str, str]:
        """Try what is wanted, until nothing is wanted that this process or another could try.

        wanted: returns what is still to be done, in order: keys with their parameters, of which the sampler chooses
        those that are left out. objective: gets a trial and its key; it may raise TrialFailed. report: called with a
        note, mostly empty, at the start, after each trial, and when what this worker waits for has changed. Returns
        the keys that failed since this worker began, and why.
        """
        note, said = "", None
        with usable(self.place):
            while True:
                waiting, running = self._look(wanted())
                if running and not waiting:
                    note = f"waiting for other workers, which are trying {', '.join(sorted(running))}"
                if note != said:
                    report(note)
                    said = note
                if waiting:
                    note, said = self._claim(wanted, objective), None
                elif running:
                    time.sleep(self.pace.look)
                else:
                    return self._given_up(self.trials())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the queue's one lock, to look at other workers' trials and write what follows before they look."""
        if self.file is None:
            held = text("SELECT pg_advisory_xact_lock(hashtext(:name))")  # until its transaction ends
            with self._storage.engine.begin() as connection:
                connection.execute(held, {"name": self.study.study_name})
                yield
            return
        lock = FileLock(f"{self.file}.lock")
        try:
            lock.acquire()
        except OSError as error:
            raise cant_use(self.place, error) from error
        try:
            yield
        finally:
            lock.release()

    def _look(self, wanted: dict[str, dict]) -> tuple[set[str], set[str]]:
        """Put the first key that is free into the study where none waits. Returns the keys that wait and that run.

        One at a time: so a dead worker's key is tried before those that are wanted after it, and the sampler knows all
        that was tried before. Two workers may put the same key at once; `_claim` drops the second.
        """
        self._fail_dead()
        trials = self.trials()
        waiting, running = ({key_of(t) for t in trials if t.state == state} & wanted.keys() for state in LIVE)
        taken = waiting | running | self._given_up(trials).keys()
        free = next((key for key in wanted if key not in taken), None)
        if free is not None and not waiting:
            died = [t.params for t in trials if t.state == TrialState.FAIL and key_of(t) == free]
            # What a dead worker was trying is tried again once; after that the sampler chooses other parameters
            again = died[0] if len(died) == 1 else {}
            self.study.enqueue_trial(wanted[free] | again, user_attrs={"key": free, "deaths": len(died)})
            waiting = {free}
        return waiting, running

    def _claim(self, wanted: Wanted, objective: Objective) -> str:
        """Try the key that has waited longest. Returns a note for `work`'s report, mostly empty."""
        taken_over = False

        def claimed(trial: optuna.Trial) -> float:
            nonlocal taken_over
            key, trials = trial.user_attrs.get("key"), self.trials()
            earlier = {key_of(other) for other in trials[: trial.number] if other.state in LIVE}
            if key in earlier | self._given_up(trials).keys() or key not in wanted():
                raise optuna.TrialPruned  # another worker has it, or has done it since we looked; or nothing waited
            try:
                return objective(trial, key)
            except TrialFailed as error:
                trial.set_user_attr("failed", str(error))
                raise
            finally:
                taken_over = self.trials()[trial.number].state.is_finished()

        try:
            self.study.optimize(claimed, n_trials=1, catch=(TrialFailed,))
        except (ValueError, AssertionError):  # what Optuna raises at the end of a trial that another worker has ended
            if not taken_over:
                raise
            return "this worker was silent for so long that another took its trial over"
        return ""

    def _given_up(self, trials: list[FrozenTrial]) -> dict[str, str]:
        """Keys that failed since this worker began, and why: TrialFailed, or the death of too many workers."""
        found, deaths = {}, Counter()
        for trial in trials[self.first :]:
            if trial.state == TrialState.FAIL:
                key = key_of(trial)
                deaths[key] += 1
                died = f"{deaths[key]} workers died while trying it" if deaths[key] > RETRIES else None
                if why := trial.user_attrs.get("failed", died):
                    found.setdefault(key, why)
        return found

    def _fail_dead(self) -> None:
        """Fail the trials of dead workers, also of those that died before their first heartbeat."""
        optuna.storages.fail_stale_trials(self.study)
        now = time.monotonic()  # not the time of the claim: the clock of another machine may differ
        self._silent_since = {number: self._silent_since.get(number, now) for number in self._without_heartbeat()}
        for number, since in self._silent_since.items():
            if now - since > self.pace.silence:
                self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _without_heartbeat(self) -> list[int]:
        """Numbers of running trials that never had a heartbeat, which Optuna never takes for stale."""
        query = """SELECT number FROM trials JOIN studies USING (study_id) LEFT JOIN trial_heartbeats USING (trial_id)
                   WHERE study_name = :name AND state = 'RUNNING' AND heartbeat IS NULL"""
        with self._storage.engine.connect() as database:
            return [number for (number,) in database.execute(text(query), {"name": self.study.study_name})]


def key_of(trial: FrozenTrial) -> str | None:
    """What a trial of a queue tries; None where its worker claimed one although none waited."""
    return trial.user_attrs.get("key")


class _Storage(RDBStorage):
    """Optuna's, without tracebacks from its heartbeat threads: the worker itself meets the same error."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(SQLAlchemyError, optuna.exceptions.StorageInternalError):
            super().record_heartbeat(trial_id)


def _open_storage(url: str, pace: Pace) -> RDBStorage:
    """A database by its URL. Raises what SQLAlchemy and Optuna do."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    local = url.startswith("sqlite:")
    # SQLite can't lock a row, and Python's driver begins a transaction when it writes: two workers would both find a
    # trial waiting, and both claim it. So transactions begin when they read, as SQLAlchemy's manual of SQLite does it
    alone = {"connect_args": {"isolation_level": None, "timeout": 60}}
    storage = _Storage(
        url,
        engine_kwargs=alone if local else {"pool_pre_ping": True},
        heartbeat_interval=pace.heartbeat,
        grace_period=pace.silence,
    )
    if local:
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


@contextmanager
def usable(place: str | Path) -> Iterator[None]:
    """Raise PluginError for what a database raises within the block. place: its file or URL, for the message."""
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        cause = error  # Optuna wraps it, and raises another at the end of a trial
        while cause and not isinstance(cause, SQLAlchemyError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cant_use(place, cause) from error


def cant_use(place: str | Path, error: Exception) -> PluginError:
    """The error for a database that can't be read or written; a URL is shown without its password."""
    reason, shown = str(error).splitlines()[0], str(place).split("@")[-1]
    return PluginError(f"can't use {shown} as a study ({reason}): give --study another")


def check_file(path: str | Path) -> Path:
    """Make the folder of an SQLite file. Raises PluginError for one that can't be written or isn't Optuna's."""
    path = files.check_writable(path)
    if not path.exists():
        return path
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError:  # another process is writing: it can't be read now
        return path
    except sqlite3.DatabaseError as error:
        raise cant_use(path, error) from error
    if tables and "studies" not in tables:
        raise cant_use(path, ValueError("it is a database of something else"))
    return path
