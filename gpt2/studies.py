"""Storage of Optuna studies that several processes work on: who claims what, and who is still alive."""

from __future__ import annotations

import warnings

import optuna
from optuna.storages import RDBStorage
from sqlalchemy import Engine, event, text

# Heartbeats have been in Optuna since 2021 and are marked experimental still
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def open_storage(url: str, heartbeat: int, silence: int, stale_callback=None) -> RDBStorage:
    """A database by its URL. heartbeat: seconds between signs of life; silence: without one a worker counts as dead.

    stale_callback: called with the study and the trial of a dead worker. Raises what SQLAlchemy and Optuna do.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    local = url.startswith("sqlite:")
    # SQLite can't lock a row, and Python's driver begins a transaction when it writes: two workers would both find a
    # trial waiting, and both claim it. So transactions begin when they read, as SQLAlchemy's manual of SQLite does it
    alone = {"connect_args": {"isolation_level": None, "timeout": 60}}
    storage = RDBStorage(
        url,
        engine_kwargs=alone if local else {"pool_pre_ping": True},
        heartbeat_interval=heartbeat,
        grace_period=silence,
        heartbeat_stale_trial_callback=stale_callback,
    )
    if local:
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def without_heartbeat(engine: Engine, study_name: str) -> set[int]:
    """Numbers of running trials that never had a heartbeat, which Optuna never takes for stale."""
    query = """SELECT number FROM trials JOIN studies USING (study_id) LEFT JOIN trial_heartbeats USING (trial_id)
               WHERE study_name = :name AND state = 'RUNNING' AND heartbeat IS NULL"""
    with engine.connect() as database:
        return {number for (number,) in database.execute(text(query), {"name": study_name})}
