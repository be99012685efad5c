"""A queue of trials in a database, an Optuna study, on which several processes work and which survives their deaths.

A worker repeatedly asks for the keys that are still wanted. It puts the first key that no worker has into the study,
claims one trial, and lets the objective try its key. A trial whose worker sends no heartbeats any more has failed, and
its key is tried again. The database is an SQLite file or, for several machines, a server such as PostgreSQL.
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

# Optuna marks heartbeats, which it has had since 2021, as experimental and would warn
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

LIVE = (TrialState.WAITING, TrialState.RUNNING)
RETRIES = 2  # times that a key is tried again after its worker died, as the key itself may kill workers
OPENINGS = 5  # attempts to open a database: if two processes create its tables at the same moment, one of them fails

Wanted = Callable[[], dict[str, dict]]
Objective = Callable[[optuna.Trial, str], float]


@dataclass(frozen=True)
class Pace:
    """Seconds between heartbeats, without a heartbeat until a worker counts as dead, and between checks of others."""

    heartbeat: int = 5
    silence: int = 20
    look: float = 2.0


PACE = Pace()


class TrialFailed(PluginError):
    """Raised by an objective if its key fails: the queue records the failure and continues with the other keys."""


class TrialQueue:
    """A study as a queue. It is created if it doesn't exist; processes that open it by the same name share it.

    storage: an SQLite file, or a database's URL. sampler: chooses parameters that a wanted key leaves open. Raises
    PluginError if the database can't be used.
    """

    def __init__(self, storage: str | Path, name: str, *, pace: Pace | None = None, sampler: BaseSampler | None = None):
        self.place, self.pace = str(storage), pace or PACE
        self.file = None if "://" in self.place else check_file(storage)
        self.study = self._open(name, sampler)
        with usable(self.place):
            self.first = len(self.trials())  # failures of earlier trials don't count: their keys are tried again
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
                if not left or isinstance(error, ImportError):  # ImportError: the database's driver isn't installed
                    raise cant_use(self.place, error) from error
                time.sleep(0.5)
        raise AssertionError("unreachable")

    def trials(self) -> list[FrozenTrial]:
        """All trials, in the order of their numbers; `key_of` gives a trial's key."""
        return self.study.get_trials(deepcopy=False)

    def work(
        self, wanted: Wanted, objective: Objective, report: Callable[[str], None] = lambda note: None
    ) -> dict[str, str]:
        """Try wanted keys until none is left that this process or another one could try.

        wanted: returns the keys that are still to be tried, in order, each with its parameters; the sampler chooses
        parameters that are left out. objective: gets a trial and its key; it may raise TrialFailed. report: called with
        a note, usually "", at the start, after each trial, and when the keys that this worker waits for change. Returns
        the keys that failed since this worker began, with the reasons.
        """
        note, reported = "", None
        with usable(self.place):
            while True:
                waiting, running = self._look(wanted())
                if running and not waiting:
                    note = f"waiting for other workers, which are trying {', '.join(sorted(running))}"
                if note != reported:
                    report(note)
                    reported = note
                if waiting:
                    note, reported = self._claim(wanted, objective), None
                elif running:
                    time.sleep(self.pace.look)
                else:
                    return self._given_up(self.trials())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the queue's lock, to read other workers' trials and write a consequence before another worker reads."""
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
        """If no trial waits, put the first free key into the study. Returns the keys of waiting and running trials.

        Only one key waits at a time: then a dead worker's key is tried before later ones, and the sampler knows all
        earlier results. Two workers may put the same key at the same time; `_claim` drops the second one.
        """
        self._fail_dead()
        trials = self.trials()
        waiting, running = ({key_of(t) for t in trials if t.state == state} & wanted.keys() for state in LIVE)
        taken = waiting | running | self._given_up(trials).keys()
        free = next((key for key in wanted if key not in taken), None)
        if free is not None and not waiting:
            died = [t.params for t in trials if t.state == TrialState.FAIL and key_of(t) == free]
            # After one death the same parameters are tried again, after two the sampler chooses others
            again = died[0] if len(died) == 1 else {}
            self.study.enqueue_trial(wanted[free] | again, user_attrs={"key": free, "deaths": len(died)})
            waiting = {free}
        return waiting, running

    def _claim(self, wanted: Wanted, objective: Objective) -> str:
        """Try the key that has waited longest. Returns a note for `work`'s report, usually ""."""
        taken_over = False

        def claimed(trial: optuna.Trial) -> float:
            nonlocal taken_over
            key, trials = trial.user_attrs.get("key"), self.trials()
            earlier = {key_of(other) for other in trials[: trial.number] if other.state in LIVE}
            if key in earlier | self._given_up(trials).keys() or key not in wanted():
                raise optuna.TrialPruned  # another worker has the key or has finished it, or no trial waited
            try:
                return objective(trial, key)
            except TrialFailed as error:
                trial.set_user_attr("failed", str(error))
                raise
            finally:
                taken_over = self.trials()[trial.number].state.is_finished()

        try:
            self.study.optimize(claimed, n_trials=1, catch=(TrialFailed,))
        except (ValueError, AssertionError):  # Optuna's errors at the end of a trial that another worker has ended
            if not taken_over:
                raise
            return "this worker sent no heartbeat for so long that another worker took over its trial"
        return ""

    def _given_up(self, trials: list[FrozenTrial]) -> dict[str, str]:
        """Keys that failed since this worker began, with reasons: TrialFailed, or the death of too many workers."""
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
        now = time.monotonic()  # measured here, as clocks of other machines may differ
        self._silent_since = {number: self._silent_since.get(number, now) for number in self._without_heartbeat()}
        for number, since in self._silent_since.items():
            if now - since > self.pace.silence:
                self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _without_heartbeat(self) -> list[int]:
        """Numbers of running trials without any heartbeat, which Optuna never regards as stale."""
        query = """SELECT number FROM trials JOIN studies USING (study_id) LEFT JOIN trial_heartbeats USING (trial_id)
                   WHERE study_name = :name AND state = 'RUNNING' AND heartbeat IS NULL"""
        with self._storage.engine.connect() as database:
            return [number for (number,) in database.execute(text(query), {"name": self.study.study_name})]


def key_of(trial: FrozenTrial) -> str | None:
    """The key of a trial; None for a trial that a worker started although none waited."""
    return trial.user_attrs.get("key")


class _Storage(RDBStorage):
    """Optuna's storage without tracebacks from heartbeat threads, as the worker itself gets the same error."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(SQLAlchemyError, optuna.exceptions.StorageInternalError):
            super().record_heartbeat(trial_id)


def _open_storage(url: str, pace: Pace) -> RDBStorage:
    """Open a database by its URL. Raises errors of SQLAlchemy and Optuna."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    local = url.startswith("sqlite:")
    # SQLite can't lock a row, and Python's driver begins a transaction only at the first write, so two workers could
    # read the same waiting trial and both claim it. So transactions begin at the first read, as SQLAlchemy's SQLite
    # manual recommends
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
    """Turn errors of the database within the block into PluginError. place: its file or URL, for the message."""
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        cause = error  # the database's error may be wrapped by Optuna's
        while cause and not isinstance(cause, SQLAlchemyError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cant_use(place, cause) from error


def cant_use(place: str | Path, error: Exception) -> PluginError:
    """The error for a database that can't be read or written; a URL is shown without its password."""
    reason, shown = str(error).splitlines()[0], str(place).split("@")[-1]
    return PluginError(f"can't use {shown} as a study ({reason}): give --study another")


def storage_of(word: str) -> Path | str:
    """A --study value: an SQLite file as a path, also where it is a URL, or a PostgreSQL server's URL as it is.

    Raises PluginError for another URL.
    """
    if "://" not in word or word.startswith("sqlite:///"):
        return Path(word.removeprefix("sqlite:///"))
    if not word.startswith("postgresql"):
        raise cant_use(word, ValueError("expected an SQLite file, or a URL such as postgresql://user@host/kv"))
    return word


def check_file(path: str | Path) -> Path:
    """Create the folder of an SQLite file. Raises PluginError if the file can't be written or isn't Optuna's."""
    path = files.check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)  # SQLite makes none
    if not path.exists():
        return path
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError:  # locked, as another process is writing to it
        return path
    except sqlite3.DatabaseError as error:
        raise cant_use(path, error) from error
    if tables and "studies" not in tables:
        raise cant_use(path, ValueError("it isn't an Optuna database"))
    return path
