"""Runs as trials of a queue: made once, shared, taken over, and reported where they fail."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from checkouts import fake, make_checkout, matcher_of, started
from databases import in_a_process, wait_for

from gpt2.common import files, machine
from gpt2.common.errors import PluginError
from gpt2.common.trial_queue import Pace
from gpt2.runs import replay, worker
from gpt2.runs.up_to_date import Matcher


def worker_of(checkout: Path, storage: Path, **how) -> worker.Worker:
    return worker.Worker(storage, matcher_of(checkout, **how), Pace(1, 2, 0.2), lambda line: None)


def work(checkout: Path, storage: Path, wanted: list[str] | None = None, **how) -> dict[str, str]:
    own = worker_of(checkout, storage, **how)
    return own.work(wanted or [*own.matcher.runs])


@pytest.fixture
def storage(tmp_path):
    return tmp_path / "study.db"


@pytest.fixture
def checkout(tmp_path):
    """Three runs: one hangs as long as a file is there, the last needs it."""
    reads = {"reads": str(tmp_path / "results" / "runs" / "peers_one.json")}
    runs = {"peers_one": fake({"hangs": True}), "peers_two": fake(), "peers_three": fake(reads, needs=["peers_one"])}
    return make_checkout(tmp_path, t=runs)


def test_code_that_a_model_has_generated_is_run_only_where_that_is_allowed(tmp_path, storage, monkeypatch):
    checkout = make_checkout(tmp_path, t={"peers_one": fake(), "code_x": fake() | {"script": "generating"}})
    script = (checkout / "scripts" / "fake.py").read_text()
    flag = '"--reads")\n    p.add_argument("--run-generated-code", action="store_true")'
    (checkout / "scripts" / "generating.py").write_text(script.replace('"--reads")', flag))
    failed = work(checkout, storage)
    assert list(failed) == ["code_x"] and "give --run-generated-code to allow it" in failed["code_x"]
    assert started(checkout) == ["peers_one"]
    allowed = worker_of(checkout, storage, run_generated_code=True)
    assert list(work(checkout, storage, ["code_x"])) == ["code_x"]
    assert allowed.work(["code_x"]) == {}, "a worker that began earlier isn't told that it failed"
    assert started(checkout) == ["peers_one", "code_x"]
    forbidden = matcher_of(checkout)
    assert forbidden.stale("code_x") is None, "results are up to date whether new ones may be made or not"
    monkeypatch.setitem(replay.REPLAYS, "generating", replay.REPLAYS["eval_code"])
    assert "give --run-generated-code" in replay.replayable(forbidden, "code_x")


def test_a_killed_workers_run_is_taken_over_and_what_is_made_is_not_made_again(checkout, storage, tmp_path):
    (checkout / "hang").touch()
    first = in_a_process(work, checkout, storage)
    wait_for(lambda: started(checkout) == ["peers_one"])
    second = in_a_process(work, checkout, storage)
    wait_for(lambda: len(started(checkout)) == 2)  # the second makes the other, and waits for the first
    os.kill(first.pid, signal.SIGKILL)
    script = int((checkout / "log").read_text().split()[1])
    if worker.TIED:
        wait_for(lambda: not alive(script))  # the dead worker's script is stopped with it
    (checkout / "hang").unlink()
    second.join(60)
    assert second.exitcode == 0
    assert started(checkout) == ["peers_one", "peers_two", "peers_one", "peers_three"], "what needs a run waits for it"
    assert work(checkout, tmp_path / "other.db") == {}
    assert len(started(checkout)) == 4, "results decide, not the study"
    (checkout / "results" / "runs" / "peers_one.json").unlink()
    assert work(checkout, storage) == {}
    assert started(checkout)[4:] == ["peers_one"], "the same bytes change nothing for what has read them"


def alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    return False


def test_a_failed_run_is_reported_with_what_needs_it_and_tried_again_next_time(tmp_path, storage, monkeypatch):
    runs = {"peers_bad": fake({"fails": True}), "peers_next": fake(needs=["peers_bad"]), "peers_good": fake()}
    checkout = make_checkout(tmp_path / "c", t=runs)
    assert work(checkout, storage) == {"peers_bad": "exit code 2", "peers_next": "it needs a run that failed"}
    assert sorted(started(checkout)) == ["peers_bad", "peers_good"]
    work(checkout, storage)
    assert started(checkout)[2:] == ["peers_bad"]
    monkeypatch.setattr(Matcher, "command", lambda self, run: ["sh", "-c", "true"])
    assert "its results are not up to date: missing" in work(checkout, storage)["peers_bad"], "it writes something else"


def test_a_machine_adds_nothing_to_the_results_of_another(tmp_path, storage, monkeypatch):
    runs = {name: fake(per_machine=True) for name in ("peers_one", "peers_two")} | {"peers_any": fake()}
    checkout = make_checkout(tmp_path / "c", t=runs)
    here = {"processor": "Here", "instruction_sets": ["avx2"], "cores": 2, "kernels_for": "native"}
    monkeypatch.setattr(machine, "describe", lambda device: here)
    other = checkout / "results" / "runs" / "peers_one_avx2.json"

    def rejected(name: str, tag: str) -> str | None:
        matcher = matcher_of(checkout, machine=tag)
        try:
            matcher.check_machine(matcher.runs[name])
        except PluginError as error:
            return str(error)

    for more, shown in (({"machine": here | {"processor": "There"}}, "There, AVX2"), ({}, "machine not recorded")):
        files.write_json(other, {"args": {}} | more)
        assert f"peers_one_avx2.json is of another machine ({shown})" in rejected("peers_two_avx2", "avx2")
    failed = work(checkout, storage, ["peers_two_avx2", "peers_any"], machine="avx2")
    assert failed == {"peers_two_avx2": rejected("peers_two_avx2", "avx2")} and started(checkout) == ["peers_any"]
    assert "this machine is avx2: it makes no results of avx512" in rejected("peers_two", "avx512")
    assert rejected("peers_two_avx2-second", "avx2-second") is None
    files.write_json(other, {"args": {}, "machine": here})
    assert rejected("peers_two_avx2", "avx2") is None


def stopped_by_ctrl_c(checkout: Path, storage: Path) -> None:
    os.setpgid(0, 0)  # a terminal sends Ctrl-C to the script as well
    with contextlib.suppress(KeyboardInterrupt):
        work(checkout, storage)
        os._exit(0)
    os._exit(130)


def test_ctrl_c_stops_the_script_and_the_run_waits_for_the_next_start(checkout, storage):
    (checkout / "hang").touch()
    process = in_a_process(stopped_by_ctrl_c, checkout, storage)
    wait_for(lambda: started(checkout) == ["peers_one"])
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert not (checkout / "results" / "runs").exists()
    (checkout / "hang").unlink()
    assert work(checkout, storage, ["peers_one"]) == {}, "at once, without waiting for a dead worker"
    assert started(checkout) == ["peers_one"] * 2
