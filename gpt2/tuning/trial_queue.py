"""Storage of Optuna studies that several processes work on: who claims what, and who is still alive."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import SQLAlchemyError

from gpt2.common import files
from gpt2.common.errors import PluginError

# Heartbeats have been in Optuna since 2021 and are marked experimental still
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class _Storage(RDBStorage):
    """Optuna's, whose threads that give signs of life don't print tracebacks: the worker meets the same error."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(SQLAlchemyError, optuna.exceptions.StorageInternalError):
            super().record_heartbeat(trial_id)


def open_storage(url: str, heartbeat: int, silence: int, stale_callback=None) -> RDBStorage:
    """A database by its URL. heartbeat: seconds between signs of life; silence: without one a worker counts as dead.

    stale_callback: called with the study and the trial of a dead worker. Raises what SQLAlchemy and Optuna do.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    local = url.startswith("sqlite:")
    # SQLite can't lock a row, and Python's driver begins a transaction when it writes: two workers would both find a
    # trial waiting, and both claim it. So transactions begin when they read, as SQLAlchemy's manual of SQLite does it
    alone = {"connect_args": {"isolation_level": None, "timeout": 60}}
    storage = _Storage(
        url,
        engine_kwargs=alone if local else {"pool_pre_ping": True},
        heartbeat_interval=heartbeat,
        grace_period=silence,
        heartbeat_stale_trial_callback=stale_callback,
    )
    if local:
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


@contextmanager
def usable(study: str | Path) -> Iterator[None]:
    """Raise PluginError for what a database raises within the block. study: its file or URL, as messages name it."""
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        cause = error  # Optuna wraps it, and trips over it at the end of a trial
        while cause and not isinstance(cause, SQLAlchemyError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cant_use(study, cause) from error


def cant_use(study: str | Path, error: Exception) -> PluginError:
    """The error for a database that can't be read or written; a URL is shown without its password."""
    reason, shown = str(error).splitlines()[0], str(study).split("@")[-1]
    return PluginError(f"can't use {shown} as a study ({reason}): give --study another")


def check_file(path: str | Path) -> Path:
    """A study's SQLite file, its folder made. Raises PluginError for one that can't be written or isn't Optuna's."""
    path = files.check_writable(path)
    _refuse_others(path)
    return path


def _refuse_others(path: Path) -> None:
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError:  # somebody is writing: it can't be looked at now
        return
    except sqlite3.DatabaseError as error:
        raise cant_use(path, error) from error
    if tables and "studies" not in tables:
        raise cant_use(path, ValueError("it is a database of something else"))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock beside an SQLite file. Raises PluginError where it can't be made."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire()
    except OSError as error:
        raise cant_use(path, error) from error
    try:
        yield
    finally:
        lock.release()


def without_heartbeat(engine: Engine, study_name: str) -> set[int]:
    """Numbers of running trials that never had a heartbeat, which Optuna never takes for stale."""
    query = """SELECT number FROM trials JOIN studies USING (study_id) LEFT JOIN trial_heartbeats USING (trial_id)
               WHERE study_name = :name AND state = 'RUNNING' AND heartbeat IS NULL"""
    with engine.connect() as database:
        return {number for (number,) in database.execute(text(query), {"name": study_name})}
