"""The trial queue: every key is tried once, whoever is killed, interrupted or fails; on SQLite, and on PostgreSQL."""

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from databases import in_a_process, lines, postgresql, wait_for  # noqa: F401
from optuna.trial import TrialState
from sampling import covering

from gpt2.common import trial_queue
from gpt2.common.errors import PluginError
from gpt2.common.trial_queue import Pace, TrialFailed, TrialQueue, key_of

PATIENT = Pace(heartbeat=1, silence=100, look=0.1)  # nobody who is only slow is taken for dead
FAST = Pace(heartbeat=1, silence=2, look=0.3)
KEYS = {key: {"x": number} for number, key in enumerate("abc")}


class Worker:
    """A queue and the keys that it tried. log: those of all processes; before: called with a key that is tried."""

    def __init__(self, storage, name: str = "q", *, log: Path | None = None, before=lambda key: None, pace=PATIENT):
        self.queue = TrialQueue(storage, name, pace=pace, sampler=optuna.samplers.RandomSampler(seed=0))
        self.log, self.before, self.tried, self.notes = log, before, [], []

    def work(self, wanted: dict = KEYS) -> dict[str, str]:
        def left() -> dict[str, dict]:
            return {key: parameters for key, parameters in wanted.items() if key not in self.done()}

        return self.queue.work(left, self.objective, self.notes.append)

    def objective(self, trial: optuna.Trial, key: str) -> float:
        x = trial.suggest_int("x", 0, 100)
        self.tried.append(key)
        if self.log:
            with self.log.open("a") as log:
                log.write(f"{key}\n")
        self.before(key)
        return x

    def trials(self, key: str) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self.queue.trials() if key_of(trial) == key]

    def states(self, key: str) -> list[str]:
        return [trial.state.name for trial in self.trials(key)]

    def done(self) -> Counter:
        return Counter(key_of(trial) for trial in self.queue.trials() if trial.state == TrialState.COMPLETE)


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """What the first study imports is there before processes are forked."""
    TrialQueue(tmp_path_factory.mktemp("first") / "study.db", "first")


def work_until_silent(storage, log: Path) -> None:
    """Its first key takes as long as there is a file `hang` beside the log."""

    def hang(key: str) -> None:
        wait_for(lambda: key != "a" or not log.with_name("hang").exists())

    Worker(storage, "silent", log=log, before=hang, pace=FAST).work()


def work_then_lock(storage, log: Path, arrived: Path, locked: Path) -> None:
    """Whoever has the lock first holds it until the other has asked for it."""
    worker = Worker(storage, "together", log=log)
    worker.work()
    with arrived.open("a") as file:
        file.write("here\n")
    with worker.queue.lock(), locked.open("a", buffering=1) as file:
        file.write("in\n")
        wait_for(lambda: len(lines(arrived)) == 2)
        time.sleep(0.2)
        file.write("out\n")


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request, tmp_path):
    """A database; on PostgreSQL all tests have the same one, and need names of their own."""
    return tmp_path / "study.db" if request.param == "sqlite" else request.getfixturevalue("postgresql")


def test_workers_that_start_together_try_each_key_once_and_a_lock_has_one_holder(storage, tmp_path):
    log, arrived, locked = (tmp_path / name for name in ("log", "arrived", "locked"))
    processes = [in_a_process(work_then_lock, storage, log, arrived, locked) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert {process.exitcode for process in processes} == {0}
    assert Counter(lines(log)) == Worker(storage, "together").done() == Counter([*KEYS])
    assert lines(locked) == ["in", "out"] * 2


SIGNALS = [signal.SIGSTOP, signal.SIGKILL]


@pytest.mark.parametrize(("storage", "sent"), covering(["sqlite", "postgresql"], SIGNALS), indirect=["storage"])
def test_a_silent_workers_key_is_taken_over_once(storage, sent, tmp_path):
    """Of one that was only stopped, and goes on later, nothing counts."""
    log, hang = tmp_path / "log", tmp_path / "hang"
    hang.touch()
    first = in_a_process(work_until_silent, storage, log)
    wait_for(lambda: lines(log) == ["a"])
    second = in_a_process(work_until_silent, storage, log)
    wait_for(lambda: len(lines(log)) >= len(KEYS))  # the second has done the others, and waits for the first
    os.kill(first.pid, sent)
    wait_for(lambda: len(lines(log)) > len(KEYS))
    hang.unlink()
    second.join(60)
    if sent == signal.SIGSTOP:
        os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert (first.exitcode, second.exitcode) == (0 if sent == signal.SIGSTOP else -sent, 0)
    assert Counter(lines(log)) == Counter([*KEYS, "a"])
    observer = Worker(storage, "silent")
    assert observer.done() == Counter([*KEYS]) and observer.states("a") == ["FAIL", "COMPLETE"]


class Clock:
    """Time that passes only while a worker waits, a second at a time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 1


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(trial_queue, "time", Clock())
    return trial_queue.time


@pytest.fixture
def database(tmp_path):
    return tmp_path / "s.db"


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_claim_without_a_heartbeat_is_taken_over_after_the_silence(database, clock):
    """A worker killed between its claim and its first heartbeat leaves what Optuna never takes for stale."""
    lost, other = Worker(database), Worker(database, pace=FAST)
    lost.queue.study.enqueue_trial({"x": 0}, user_attrs={"key": "a"})
    lost.queue.study.ask()
    other.work()
    assert other.tried == ["b", "c", "a"], "a fresh claim is left to its worker"
    assert other.notes[-2:] == ["waiting for other workers, which are trying a", ""]
    assert clock.now == FAST.silence + 1


def failing(database: Path, **errors: BaseException) -> Worker:
    """A worker that fails at some keys."""

    def fail(key: str) -> None:
        if key in errors:
            raise errors[key]

    return Worker(database, before=fail)


def test_an_interrupted_key_is_tried_again_first_and_as_it_was(database):
    first, wanted = failing(database, b=KeyboardInterrupt()), dict.fromkeys(KEYS, {})  # the sampler chooses
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            first.work(wanted)
    second = Worker(database)
    second.work(wanted)
    assert first.tried == ["a", "b", "b"] and second.tried == ["b", "c"]
    once, again, other = (trial.params["x"] for trial in second.trials("b"))
    assert once == again != other, "what has killed two workers is replaced"
    assert [trial.user_attrs["deaths"] for trial in second.trials("b")] == [0, 1, 2], "a sampler may ask for that"
    second.work(wanted)
    assert len(second.tried) == 2, "all is done"


def test_keys_that_fail_or_kill_three_workers_are_given_up_until_a_worker_begins_anew(database):
    survivor, dying = Worker(database), failing(database, a=TrialFailed("no luck"), b=MemoryError())
    for _ in range(3):
        with pytest.raises(MemoryError):
            dying.work()
    reasons = {"a": "no luck", "b": "3 workers died while trying it"}
    assert survivor.work() == dying.work() == reasons, "all report what failed since they began"
    assert dying.tried == ["a", "b", "b", "b"] and survivor.tried == ["c"]
    later = Worker(database)
    assert later.work() == {} and later.tried == ["a", "b"]


def test_two_trials_of_one_key_are_tried_once(database):
    """Two workers that look at once may both put it into the study, and both claim one; another study is beside it."""
    Worker(database, "other").work({"a": {}})
    first, second, looks = Worker(database), Worker(database), iter([{"a": {}}, {"a": {}}])
    for _ in range(2):
        first.queue.study.enqueue_trial({"x": 0}, user_attrs={"key": "a"})
    first.before = lambda key: second.queue.work(lambda: next(looks, {}), second.objective)
    first.work({"a": {}})
    assert first.tried == ["a"] and second.tried == [] and first.states("a") == ["COMPLETE", "PRUNED"]
    # What is done between a look and a claim is not tried
    looks = iter([{"b": {}}])
    second.queue.work(lambda: next(looks, {}), second.objective)
    assert second.tried == [] and second.states("b") == ["PRUNED"]


def test_a_heartbeat_that_cant_be_written_is_no_traceback(database, monkeypatch):
    """On a full disk the worker meets the same error; its thread has nothing to add."""
    failed, tracebacks = [], []

    def full(self, trial_id):
        failed.append(trial_id)
        raise optuna.exceptions.StorageInternalError("full")

    monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", full)
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    Worker(database).work({"a": {}})
    assert failed and not tracebacks


def test_a_database_that_cant_be_used_is_one_line(tmp_path, clock):
    (tmp_path / "no.db").write_text("no database" * 100)
    with contextlib.closing(sqlite3.connect(tmp_path / "bank.db")) as bank:
        bank.execute("CREATE TABLE accounts (money)")
    for name, reason in (("no.db", "file is not a database"), ("bank.db", "it isn't an Optuna database")):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(PluginError, match=rf"can't use .*{name} as a study \({reason}\)"):
            TrialQueue(tmp_path / name, "q")
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(PluginError, match="can't use localhost/x as a study"):
        TrialQueue("nosuchdatabase://name:secret@localhost/x", "q")
