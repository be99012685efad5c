"""Runs as trials of a study: killed workers, shared work, failures; on SQLite, and on PostgreSQL where there is one."""

import contextlib
import importlib.util
import multiprocessing
import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from checkouts import fake, make_checkout, started
from optuna.trial import TrialState

from gpt2.common import provenance
from gpt2.common.errors import PluginError
from gpt2.runs import worker as sweep
from gpt2.runs.config import Setting, load
from gpt2.runs.up_to_date import Matcher
from gpt2.runs.worker import Pace, Queue, Worker

FAST = Pace(heartbeat=1, silence=3, look=0.1)
FORK = multiprocessing.get_context("fork")  # nothing to import again


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.setenv("COMMIT", provenance.git_commit() or "")


def worker_of(checkout: Path, storage, said: list | None = None) -> tuple[Worker, list[str]]:
    setting = Setting(checkout=checkout)
    tables, runs = load(setting)
    wanted = [name for table in tables.values() for name in table.results]
    return Worker(storage, Matcher(setting, runs), FAST, (said if said is not None else []).append), wanted


def work(checkout: Path, storage, said: list | None = None) -> dict[str, str]:
    worker, wanted = worker_of(checkout, storage, said)
    return worker.work(wanted)


def process(target, *args):
    """A process that ends with this one, whatever fails here."""
    return FORK.Process(target=target, args=args, daemon=True)


def completed(checkout: Path, storage) -> Counter:
    """How often each run counts as made."""
    trials = worker_of(checkout, storage)[0].queue.trials(TrialState.COMPLETE)
    return Counter(trial.user_attrs["run"] for trial in trials)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def as_postgres(*command: str) -> list[str]:
    """A command of PostgreSQL, which refuses root, as Debian's own user where we are root."""
    return (
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command] if not os.getuid() else command
    )


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def postgresql(monkeypatch_module):
    """The URL of an empty database of our own, on a socket in a folder of its own."""
    # Debian keeps them beside each other by version, on nobody's PATH
    found = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), os.environ["PATH"]]
    monkeypatch_module.setenv("PATH", os.pathsep.join(found))
    if missing := [name for name in ("initdb", "pg_ctl") if not shutil.which(name)]:
        pytest.skip(f"no PostgreSQL here: {', '.join(missing)} not found")
    if not importlib.util.find_spec("psycopg2"):
        pytest.skip("no driver for PostgreSQL: pip install -r requirements.txt")
    if not os.getuid() and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("PostgreSQL refuses root, and there is no user postgres")
    folder = tempfile.mkdtemp(prefix="pg")  # short and in reach of its user, which pytest's folders aren't
    if not os.getuid():
        shutil.chown(folder, "postgres", "postgres")
    server = as_postgres("pg_ctl", "-D", f"{folder}/data", "-w", "-s", "-l", f"{folder}/log")
    make = as_postgres("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "tables", "--no-sync", "-E", "UTF8")
    subprocess.run(make, check=True, capture_output=True, cwd=folder)
    subprocess.run([*server, "-o", f"-F -c listen_addresses= -k {folder}", "start"], check=True, cwd=folder)
    try:
        yield f"postgresql+psycopg2://tables@/postgres?host={folder}"
    finally:
        subprocess.run([*server, "-m", "immediate", "stop"], check=True, cwd=folder)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request, tmp_path):
    return tmp_path / "study.db" if request.param == "sqlite" else request.getfixturevalue("postgresql")


@pytest.fixture
def checkout(tmp_path):
    """Four runs: one hangs as long as a file is there, another needs it."""
    reads = {"reads": str(tmp_path / "results" / "runs" / "peers_one.json")}
    runs = {"peers_one": fake({"hangs": True}), "peers_two": fake({"size": 2}), "peers_three": fake({"size": 3}),
            "peers_four": fake(reads, needs=["peers_one"])}  # fmt: skip
    return make_checkout(tmp_path, t=runs)


def test_a_killed_workers_run_is_taken_over(checkout, storage):
    (checkout / "hang").touch()
    first, second = (process(work, checkout, storage) for _ in range(2))
    first.start()
    wait_for(lambda: started(checkout) == ["peers_one"])
    second.start()
    wait_for(lambda: len(started(checkout)) == 3)  # the second goes on with the others, and waits for the first
    os.kill(first.pid, signal.SIGKILL)
    (script,) = (int(line.split()[1]) for line in (checkout / "log").read_text().splitlines() if "one" in line)
    if sweep.TIED:
        wait_for(lambda: not alive(script))  # the dead worker's script doesn't go on
    (checkout / "hang").unlink()
    second.join(60)
    assert second.exitcode == 0
    order = started(checkout)
    assert Counter(order) == {"peers_one": 2, "peers_two": 1, "peers_three": 1, "peers_four": 1}
    assert order[-2:] == ["peers_one", "peers_four"], "what needs a run waits until it is made"
    assert completed(checkout, storage) == Counter(["peers_one", "peers_two", "peers_three", "peers_four"])


def alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    return False


def test_workers_that_start_together_share_the_work(tmp_path, storage):
    checkout = make_checkout(tmp_path / "c", t={f"peers_{i}": fake({"size": i}) for i in range(8)})
    workers = [process(work, checkout, storage) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert Counter(started(checkout)) == {f"peers_{i}": 1 for i in range(8)}
    assert set(completed(checkout, storage).values()) == {1}


def claim_all(storage, folder: Path) -> None:
    """Claim what waits until nothing does, and write down the numbers."""
    study = Queue(storage, "claims", FAST).study
    (folder / f"ready-{os.getpid()}").touch()
    wait_for(lambda: len(list(folder.glob("ready-*"))) == 3)
    claimed = []
    while "run" in (trial := study.ask()).user_attrs:
        claimed.append(trial.number)
    (folder / f"claimed-{os.getpid()}").write_text(" ".join(map(str, claimed)))


def test_no_two_workers_claim_the_same(tmp_path, storage):
    queue = Queue(storage, "claims", FAST)
    for i in range(60):
        queue.study.enqueue_trial({}, user_attrs={"run": str(i)})
    workers = [process(claim_all, storage, tmp_path) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    claimed = " ".join(path.read_text() for path in tmp_path.glob("claimed-*")).split()
    assert sorted(map(int, claimed)) == list(range(60))


def test_what_is_made_is_not_made_again(checkout, tmp_path):
    assert work(checkout, tmp_path / "study.db") == {}
    assert len(started(checkout)) == 4
    assert work(checkout, tmp_path / "study.db") == {} and work(checkout, tmp_path / "other.db") == {}
    assert len(started(checkout)) == 4, "results tell, not the study"
    (checkout / "results" / "runs" / "peers_one.json").unlink()
    assert work(checkout, tmp_path / "study.db") == {}
    assert started(checkout)[4:] == ["peers_one"], "made again to the byte, it changes nothing for what has read it"


def test_a_failed_run_is_told_with_what_needs_it_and_tried_again_next_time(tmp_path):
    runs = {
        "peers_bad": fake({"fails": True}),
        "peers_next": fake(needs=["peers_bad"]),
        "peers_good": fake({"size": 2}),
    }
    checkout = make_checkout(tmp_path / "c", t=runs)
    failed = work(checkout, tmp_path / "study.db")
    assert failed == {"peers_bad": "exit code 2", "peers_next": "it needs a run that failed"}
    assert sorted(started(checkout)) == ["peers_bad", "peers_good"]
    work(checkout, tmp_path / "study.db")
    assert started(checkout)[2:] == ["peers_bad"]


def test_a_script_that_writes_something_else_has_failed(checkout, tmp_path, monkeypatch):
    other = ["sh", "-c", "true"]
    monkeypatch.setattr(Matcher, "command", lambda self, run: other)
    failed = work(checkout, tmp_path / "study.db")
    assert "its results are not what was asked for: missing" in failed["peers_one"]


def test_ctrl_c_stops_the_script_and_the_run_waits_for_the_next_start(checkout, tmp_path):
    (checkout / "hang").touch()
    worker = process(stopped_by_ctrl_c, checkout, tmp_path / "study.db")
    worker.start()
    wait_for(lambda: started(checkout) == ["peers_one"])
    os.killpg(worker.pid, signal.SIGINT)
    worker.join(30)
    assert worker.exitcode == 130
    assert not (checkout / "results" / "runs").exists()
    (checkout / "hang").unlink()
    assert work(checkout, tmp_path / "study.db") == {}, "at once, without waiting for a dead worker"
    assert Counter(started(checkout))["peers_one"] == 2


def stopped_by_ctrl_c(checkout, storage):
    os.setpgid(0, 0)  # a terminal sends Ctrl-C to the script as well
    with contextlib.suppress(KeyboardInterrupt):
        work(checkout, storage)
        os._exit(0)
    os._exit(130)


def test_a_worker_that_was_taken_for_dead_goes_on(checkout, tmp_path):
    """Stopped for longer than silence allows, it finds its trial taken over, and neither counts nor makes it twice."""
    (checkout / "hang").touch()
    storage = tmp_path / "study.db"
    paused, other = (process(work, checkout, storage) for _ in range(2))
    paused.start()
    wait_for(lambda: started(checkout) == ["peers_one"])
    os.kill(paused.pid, signal.SIGSTOP)
    other.start()
    wait_for(lambda: started(checkout).count("peers_one") == 2)
    (checkout / "hang").unlink()
    other.join(60)
    os.kill(paused.pid, signal.SIGCONT)
    paused.join(60)
    assert (paused.exitcode, other.exitcode) == (0, 0)
    assert set(completed(checkout, storage).values()) == {1} and len(started(checkout)) == 5


def test_a_study_that_cant_be_used_is_one_line(checkout, tmp_path):
    (tmp_path / "no.db").write_text("no database" * 100)
    with contextlib.closing(sqlite3.connect(tmp_path / "bank.db")) as bank:
        bank.execute("CREATE TABLE accounts (money)")
    for name, reason in (("no.db", "file is not a database"), ("bank.db", "it is a database of something else")):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(PluginError, match=rf"can't use .*{name} as a study \({reason}\)"):
            work(checkout, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(PluginError, match="can't use localhost/x as a study"):
        work(checkout, "nosuchdatabase://name:secret@localhost/x")
