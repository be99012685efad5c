"""The tuner's study: every cell once, whatever is interrupted, and a choice that holds on other text."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import optuna
import pytest

from gpt2.common.errors import BudgetNotMet, PluginError
from gpt2.tuning import grid_search
from gpt2.tuning.grid_search import Cell, Trial

CELLS = [Cell(rank, bits) for rank in (16, 12, 8) for bits in (8, 4)]


def measured(cell: Cell) -> Trial:
    """A made-up trade-off: fewer ranks and bits compress more and cost more."""
    return Trial(cell, 0.4 / (cell.rank * cell.bits), 100 / (cell.rank * cell.bits), {"bits": cell.bits})


def work(path: Path, log: Path, seconds: float = 0.0) -> None:
    """A worker: notes every cell that it measures."""

    def evaluate(cell: Cell) -> Trial:
        with log.open("a") as file:
            file.write(f"{cell}\n")
        time.sleep(seconds)
        return measured(cell)

    grid_search.run_grid(grid_search.open_study(path, "s"), path, CELLS, evaluate, poll_seconds=0.1)


def test_every_cell_is_measured_once_and_a_second_run_measures_nothing(tmp_path):
    path, log = tmp_path / "study.db", tmp_path / "log"
    work(path, log)
    work(path, log)
    assert sorted(log.read_text().splitlines()) == sorted(map(str, CELLS))
    trials = grid_search.finished(grid_search.open_study(path, "s"), CELLS)
    assert [t.cell for t in trials] == CELLS and trials[0] == measured(CELLS[0])


def test_interrupt_loses_only_the_running_trial(tmp_path):
    path, seen = tmp_path / "study.db", []

    def interrupted(cell: Cell) -> Trial:
        seen.append(cell)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return measured(cell)

    with pytest.raises(KeyboardInterrupt):
        grid_search.run_grid(grid_search.open_study(path, "s"), path, CELLS, interrupted)
    work(path, tmp_path / "log")
    again = (tmp_path / "log").read_text().splitlines()
    assert len(again) == len(CELLS) - 2 and str(seen[2]) in again


def test_two_processes_share_the_work(tmp_path):
    path, log = tmp_path / "study.db", tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(path, log, 0.3)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(log.read_text().splitlines()) == sorted(map(str, CELLS))


def test_a_killed_workers_trial_is_taken_over(tmp_path, monkeypatch):
    path, log = tmp_path / "study.db", tmp_path / "log"
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(path, log, 60))
    worker.start()
    while not log.exists():
        time.sleep(0.1)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    monkeypatch.setattr(grid_search, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(grid_search, "STALE_SECONDS", 2)
    work(path, log)
    lost, *others = log.read_text().splitlines()
    assert sorted(others) == sorted(map(str, CELLS)) and lost in others
    states = [t.state.name for t in grid_search.open_study(path, "s").get_trials()]
    assert states.count("COMPLETE") == len(CELLS) and states.count("FAIL") == 1


def test_a_sign_of_life_that_cant_be_written_is_no_traceback(tmp_path, monkeypatch):
    """On a full disk the worker meets the same error; its thread has nothing to add."""
    failed, tracebacks = [], []

    def full(self, trial_id):
        failed.append(trial_id)
        raise optuna.exceptions.StorageInternalError("full")

    monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", full)
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    work(tmp_path / "study.db", tmp_path / "log")
    assert failed and not tracebacks


def test_a_stray_claim_measures_nothing(tmp_path):
    """Between one worker's look at the queue and its claim, another may take the last cell."""
    path = tmp_path / "study.db"
    study = grid_search.open_study(path, "s")
    evaluated = []
    real = grid_search._enqueue_missing
    looks = iter([lambda *a: (1, 0), real, real, real])  # the first look claims that a cell waits; none does

    def evaluate(cell):
        evaluated.append(cell)
        return measured(cell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_search, "_enqueue_missing", lambda *a: next(looks)(*a))
        grid_search.run_grid(study, path, CELLS[:2], evaluate)
    assert evaluated == CELLS[:2]
    assert [t.state.name for t in study.get_trials()].count("PRUNED") == 1


def test_another_search_is_another_study():
    key = {"model": "a", "text": ["x", 1, 2]}
    assert grid_search.study_name(key) == grid_search.study_name(dict(reversed(key.items())))
    assert grid_search.study_name(key) != grid_search.study_name(key | {"text": ["y", 1, 2]})


def test_the_most_compressed_within_the_budget_wins_if_it_holds_on_other_text():
    trials = [measured(cell) for cell in CELLS]
    within = grid_search.within_budget(trials, 0.005)
    assert within and all(t.ppl_delta <= 0.005 for t in within)
    assert within[0].compression_ratio == max(t.compression_ratio for t in within)
    best, record, failed = grid_search.confirm_best(trials, 0.005, lambda cell: {"ppl_delta": 0.004})
    assert (best, failed) == (within[0], [])
    # the winner on tuning text fails elsewhere: the next one is taken, and the failure told
    worse = {within[0].cell: {"ppl_delta": 0.006}}
    best, record, failed = grid_search.confirm_best(trials, 0.005, lambda cell: worse.get(cell, {"ppl_delta": 0.001}))
    assert best == within[1] and failed == [(within[0], worse[within[0].cell])] and record["ppl_delta"] == 0.001


def test_nothing_within_the_budget_tells_the_nearest_and_what_helps():
    trials = [measured(cell) for cell in CELLS]
    with pytest.raises(BudgetNotMet, match="(?s)PPL degradation too high.*rank 16, 8 bits.*--rank-grid") as caught:
        grid_search.confirm_best(trials, 0.0001, lambda cell: {"ppl_delta": 0.0})
    assert caught.value.exit_code not in (0, 2)
    with pytest.raises(BudgetNotMet, match="met it on tuning text but not on evaluation text"):
        grid_search.confirm_best(trials, 0.005, lambda cell: {"ppl_delta": 1.0})


def test_grid():
    assert grid_search.default_rank_grid(64) == [64, 60, 56, 48, 32]
    assert grid_search.default_rank_grid(128) == [128, 120, 112, 96, 64]
    cells = grid_search.grid([64, 60], [16, 4], 64, "pca")
    assert cells == [Cell(64, 4), Cell(60, 16), Cell(60, 4)], "the full rank at 16 bits saves nothing"
    assert grid_search.grid(None, [8], 64, "identity") == [Cell(64, 8)]


@pytest.mark.parametrize(
    ("ranks", "bits", "codec", "message"),
    [
        ([65], [8], "pca", "rank 65 is out of range"),
        ([64], [16], "pca", "compresses nothing"),
        ([60], [5], "pca", "bits 5 is not available"),
        ([60], [8], "identity", "no rank to cut"),
        ([60], [8], "pcaa", "did you mean 'pca'"),
    ],
)
def test_bad_grids_are_refused(ranks, bits, codec, message):
    with pytest.raises(PluginError, match=message):
        grid_search.grid(ranks, bits, 64, codec)


def test_the_database_may_hold_other_studies(tmp_path):
    path = tmp_path / "study.db"
    optuna.create_study(storage=f"sqlite:///{path}", study_name="mine")
    work(path, tmp_path / "log")
    assert len(grid_search.finished(grid_search.open_study(path, "s"), CELLS)) == len(CELLS)
