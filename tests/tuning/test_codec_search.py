"""The search over codecs: what it finds, what it skips, and that no slot is lost or used twice."""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import optuna
import pytest
import torch
from script_runs import SMALL, SMALL_EVAL, TUNE, listing, run
from tiny import tiny_loaded, tiny_model, windows

from gpt2 import cli
from gpt2.common.errors import BudgetNotMet, PluginError
from gpt2.compression.cache import size as memory
from gpt2.compression.codecs import CODECS, needs_calibration
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.settings import Setting
from gpt2.report import plots
from gpt2.tuning import codec_search, grid_search
from gpt2.tuning.codec_search import run_search
from gpt2.tuning.grid_search import Cell, Trial
from gpt2.tuning.measurement import Search
from gpt2.tuning.search_space import Choice, Space, default_families, families, lossy, metric_for, space_for

SPACE = Space(("joint+mixed", "identity", "pca"), 64, (64, 48))
BUDGET = 0.05


def ratio(choice: Choice) -> float:
    """A made-up size: bits, rank and sinks as one would expect, K and V half of the cache each."""
    side = 16 / (choice.bits + 0.25) * 64 / choice.setting.rank
    whole = side if choice.target == "kv" else 2 / (1 + 1 / side)
    return whole / (1 + 0.001 * choice.sink_tokens)


def measured(choice: Choice, size: float) -> Trial:
    """A made-up loss that falls with bits and with sinks; joint is the best codec."""
    cost = {"joint+mixed": 0.02, "identity": 0.3, "pca": 0.6}[choice.family]
    delta = cost * 2 ** (2 * (4 - choice.bits)) * (1 + math.exp(-choice.sink_tokens / 4)) + (64 - choice.setting.rank)
    return Trial(choice, delta, size, {"ppl_delta": delta, "ppl_delta_interval": [delta, delta]})


def search(path: Path, trials: int, *, evaluate=measured, space=SPACE, seed=0, study=None) -> list[Trial]:
    study = study or grid_search.open_study(path, "s")
    return run_search(study, path, space, BUDGET, ratio, evaluate, num_trials=trials, seed=seed, poll_seconds=0.1)


def best(trials: list[Trial]) -> float:
    return grid_search.within_budget(trials, BUDGET)[0].compression_ratio


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A whole search of 14: its trials, its study, and what was measured in which order."""
    path, seen = tmp_path_factory.mktemp("found") / "s.db", []

    def evaluate(choice, size):
        seen.append(choice)
        return measured(choice, size)

    study = grid_search.open_study(path, "s")
    return search(path, 14, evaluate=evaluate, study=study), study, seen


def test_it_finds_better_than_its_first_points(found):
    trials, _, _ = found
    starts = trials[: len(SPACE.starts())]
    grid = [Choice("joint+mixed", Setting("joint", 64, b / 100, "mixed"), "kv", n) for b in range(150, 800)
            for n in SPACE.sinks]  # fmt: skip
    optimum = max(ratio(choice) for choice in grid if measured(choice, 1.0).ppl_delta <= BUDGET)
    assert best(starts) < 0.95 * optimum, "or there is nothing to find"
    assert best(trials) > max(0.95 * optimum, best(starts))


def test_the_sampler_is_told_the_constraint(found):
    _, study, _ = found
    done = [t for t in study.get_trials() if "ppl_delta" in t.user_attrs]
    told = {t.user_attrs["ppl_delta"] <= BUDGET: t.system_attrs["constraints"][0] <= 0 for t in done}
    assert told == {True: True, False: False}


def test_what_cannot_win_is_skipped_unmeasured_but_the_first_points_are_not(found):
    trials, study, seen = found
    starts, leader = len(SPACE.starts()), 0.0
    assert {choice.family for choice in seen[:starts]} == set(SPACE.families)
    for index, trial in enumerate(trials):
        assert index < starts or trial.compression_ratio > leader
        leader = max(leader, trial.compression_ratio if trial.ppl_delta <= BUDGET else 0)
    skipped = codec_search.skipped_records(study)
    assert skipped and all("can't beat" in s["skipped"] or s["skipped"] == "tried already" for s in skipped)
    assert len(set(seen)) == len(seen) == len(trials) <= 14 and len(trials) + len(skipped) <= 28


def test_a_killed_search_resumes_and_more_trials_add_to_it(tmp_path):
    path, seen = tmp_path / "s.db", []

    def evaluate(choice, size):
        seen.append(choice)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return measured(choice, size)

    with pytest.raises(KeyboardInterrupt):
        search(path, 6, evaluate=evaluate)
    lost = seen[3]
    assert len(search(path, 6, evaluate=evaluate)) <= 6
    assert seen.count(lost) == 2 and len(seen) == len(set(seen)) + 1, "only what was lost is measured again"
    before = len(seen)
    search(path, 6, evaluate=evaluate)
    assert len(seen) == before, "all slots are done"
    search(path, 9, evaluate=evaluate)
    assert before < len(seen) <= 9 + 1


@pytest.mark.parametrize("nth", [2, 7, 11])
def test_a_search_that_loses_a_trial_ends_as_one_that_does_not(found, nth, tmp_path):
    trials, _, _ = found
    seen = []

    def evaluate(choice, size):
        seen.append(choice)
        if len(seen) == nth:
            raise KeyboardInterrupt
        return measured(choice, size)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "s.db", 14, evaluate=evaluate)
    assert search(tmp_path / "s.db", 14, evaluate=evaluate) == trials


def test_a_choice_that_kills_two_workers_is_replaced(found, tmp_path):
    fatal = found[2][-1]  # the sampler has drawn it

    def evaluate(choice, size):
        if choice == fatal:
            raise KeyboardInterrupt
        return measured(choice, size)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "s.db", 14, evaluate=evaluate)
    assert fatal not in [trial.cell for trial in search(tmp_path / "s.db", 14, evaluate=evaluate)]


def work(path: Path, log: Path, trials: int, seconds: float) -> None:
    """A worker: notes every choice that it measures."""

    def evaluate(choice, size):
        with log.open("a") as file:
            file.write(f"{choice}\n")
        time.sleep(seconds)
        return measured(choice, size)

    search(path, trials, evaluate=evaluate)


def test_two_workers_share_the_slots(tmp_path):
    path, log = tmp_path / "s.db", tmp_path / "log"
    workers = [threading.Thread(target=work, args=(path, log, 8, 0.3)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    lines = log.read_text().splitlines()
    assert len(SPACE.starts()) <= len(lines) <= 8 and len(set(lines)) == len(lines)
    assert len(codec_search.finished(grid_search.open_study(path, "s"))) == len(lines)


@pytest.mark.parametrize("late", ["the first", "both"])
def test_two_workers_that_draw_the_same_measure_it_once(late, tmp_path, monkeypatch):
    """Also where the first of them is the last to say what it has drawn, and where both say it before either looks."""
    path, log, together = tmp_path / "s.db", tmp_path / "log", threading.Barrier(2)
    suggest, say, only = Space.suggest, optuna.Trial.set_user_attr, []

    def draw(space, trial):
        only.append(suggest(space, trial))
        if trial.number < 2:
            together.wait(30)
        return only[0]

    def slowly(trial, key, value):
        time.sleep(0.5 * (late == "the first" and key == "choice" and trial.number == 0))
        say(trial, key, value)
        time.sleep(0.5 * (late == "both" and key == "choice" and trial.number < 2))

    monkeypatch.setattr(Space, "suggest", draw)
    monkeypatch.setattr(optuna.Trial, "set_user_attr", slowly)
    workers = [threading.Thread(target=work, args=(path, log, 2, 1)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(log.read_text().splitlines()) == 1
    states = [trial.state for trial in grid_search.open_study(path, "s").trials[:2]]
    assert states.count(optuna.trial.TrialState.COMPLETE) == 1, "neither leaves it to the other"


def test_a_killed_workers_trial_is_redone(tmp_path, monkeypatch):
    path, log = tmp_path / "s.db", tmp_path / "log"
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(path, log, 3, 60))
    worker.start()
    while not log.exists():
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    monkeypatch.setattr(grid_search, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(grid_search, "STALE_SECONDS", 2)
    work(path, log, 3, 0)
    lost, *others = log.read_text().splitlines()
    assert lost in others and len(others) == len(set(others)) == 3


def test_a_claim_without_a_heartbeat_is_taken_over(tmp_path, monkeypatch):
    """A worker killed between its claim and its first heartbeat leaves what Optuna never takes for stale."""
    monkeypatch.setattr(grid_search, "STALE_SECONDS", 1)
    path, cells, seen = tmp_path / "s.db", [Cell(16, 8), Cell(16, 4)], []
    study = grid_search.open_study(path, "s")
    grid_search._enqueue_missing(study, path, lambda: {"rank=16,bits=8": {"rank": 16, "bits": 8}})
    study.ask()  # claims, and never says a word

    def evaluate(cell):
        seen.append(cell)
        return Trial(cell, 0.0, 2.0, {})

    asked = time.monotonic()
    assert len(grid_search.run_grid(study, path, cells, evaluate, poll_seconds=0.1)) == 2
    assert sorted(map(str, seen)) == sorted(map(str, cells)) and 0.5 < time.monotonic() - asked < 30


def test_a_fresh_claim_is_left_to_its_worker(tmp_path):
    path = tmp_path / "s.db"
    study = grid_search.open_study(path, "s")
    wanted = {"a": {"rank": 16, "bits": 8}}
    grid_search._enqueue_missing(study, path, lambda: wanted)
    study.ask()
    assert grid_search._enqueue_missing(study, path, lambda: wanted) == (0, 1)


def test_a_loss_that_is_not_finite_is_over_the_budget(tmp_path):
    study = grid_search.open_study(tmp_path / "s.db", "s")

    def evaluate(choice, size):
        if choice.family == "joint+mixed":
            return Trial(choice, math.inf, size, {"ppl_delta": None, "ppl_delta_interval": None})
        return measured(choice, size)

    trials = search(tmp_path / "s.db", 8, evaluate=evaluate, study=study)
    assert any(math.isinf(t.ppl_delta) for t in trials), "recorded"
    assert all(t.cell.family != "joint+mixed" for t in grid_search.within_budget(trials, BUDGET))
    json.dumps([t.record() for t in trials], allow_nan=False)
    figure = plots.codec_frontier([t.record() for t in trials], BUDGET, None, "t")
    assert [line.get_marker() for line in figure.axes[0].lines].count("x") == sum(
        math.isinf(t.ppl_delta) for t in trials
    )
    with pytest.raises(BudgetNotMet, match="(?s)no finite loss.*--num-trials"):
        lost = [t for t in trials if math.isinf(t.ppl_delta)]
        grid_search.confirm_best(lost, BUDGET, lambda cell: {}, codec_search.ADVICE)


def tiny_search(loaded) -> Search:
    return Search(loaded, None, windows(2, 48), windows(2, 48, seed=1), "kv", "identity", 4, 16, 2, 0, cli.bar)


def test_the_grid_goes_on_after_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    """Codes of 4 bits that come back as NaN: one cell is out, the other is measured, and both are recorded."""
    from gpt2.compression.codecs.integer import Int4

    real = Int4.dequantize
    monkeypatch.setattr(Int4, "dequantize", lambda self, fields, rank: real(self, fields, rank) * math.nan)
    search, path = tiny_search(tiny_loaded()), tmp_path / "s.db"
    cells = [Cell(12, 8), Cell(12, 4)]
    good, lost = grid_search.run_grid(grid_search.open_study(path, "s"), path, cells, search.evaluate)
    assert math.isfinite(good.ppl_delta) and math.isinf(lost.ppl_delta) and "NaN" in lost.details["note"]
    assert lost.record()["ppl_delta"] is None and lost.compression_ratio > good.compression_ratio
    assert search.confirm(cells[1])["ppl_delta"] is None
    trials = [Trial(cells[1], 0.0, 9.0, {}), good]  # as if it had held on tuning text
    chosen, _, failed = grid_search.confirm_best(trials, 0.9, search.confirm)
    assert chosen is good and [trial.cell for trial, _ in failed] == [cells[1]]


def test_reconstructions_are_kept_while_scoring_and_not_counted(monkeypatch):
    kept = []
    real = CompressedDynamicCache.keep_reconstructed
    monkeypatch.setattr(CompressedDynamicCache, "keep_reconstructed", lambda self: kept.append(1) or real(self))
    search = tiny_search(tiny_loaded())
    trial = search.evaluate(Cell(12, 8))
    assert kept
    own = memory.compression_ratio(search.factory(trial.cell), search.loaded.geometry)
    assert trial.compression_ratio == pytest.approx(own) and own > 1.4
    monkeypatch.setattr(CompressedDynamicCache, "keep_reconstructed", lambda self: self)
    assert search.evaluate(Cell(12, 8)).ppl_delta == pytest.approx(trial.ppl_delta, abs=1e-4)


def test_families_come_from_the_registry():
    assert {codec for codec in CODECS if not needs_calibration(codec)} <= families().keys()
    assert {"joint+mixed", "joint+mixed_fixed", "fisher", "attention", "pca"} <= set(default_families())
    assert "random" not in default_families(), "a control"
    names = tuple(families())
    assert {point["family"] for point in Space(names, 64, (64,)).starts()} == set(names)
    assert {"int8", "int4"} <= set(lossy()) and not {"none", "mixed"} & set(lossy())
    assert metric_for(["identity"]) is None and metric_for(["pca", "joint+mixed"]) == "fisher"


def test_without_statistics_a_family_is_left_out_or_refused_when_asked_for():
    allowed, left_out = space_for(None, 64)
    assert {"identity", "hadamard"} <= set(allowed.families) and {"pca", "joint+mixed"} <= left_out.keys()
    assert not set(allowed.families) & left_out.keys()
    with pytest.raises(PluginError, match="codec joint needs a calibration"):
        space_for(None, 64, ["joint+mixed"])
    with pytest.raises(PluginError, match="rank 65 is out of range"):
        space_for(None, 64, ranks=[65])


CODEC = [*SMALL[:2], "--seq-len", "160", *SMALL_EVAL, "--search", "codec", "--study", "s.db", "--output", "p.json"]


def test_script_writes_a_preset_of_the_best_codec(tiny_flags, tmp_path, capsys):
    flags = [*tiny_flags, *CODEC, "--num-trials", "9", "--target-ppl-delta", "0.9"]
    flags += ["--codecs", "identity,joint+mixed,joint+mixed_fixed,pca", "--recent-grid", "8"]
    assert run(TUNE, *flags) == 0
    preset = json.loads((tmp_path / "p.json").read_text())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert {
        "codec",
        "quantizer",
        "bits",
        "rank",
        "sink_tokens",
        "recent_tokens",
        "ppl_delta",
        "trials",
    } <= preset.keys()
    tried = {trial["family"] for trial in preset["trials"]}
    assert tried == {"identity", "joint+mixed", "joint+mixed_fixed", "pca"} and 6 <= len(preset["trials"]) <= 9
    inside = [t["compression_ratio"] for t in preset["trials"] if t["ppl_delta"] <= 0.9]
    refused = len(preset["refused_on_evaluation_text"])
    assert preset["compression_ratio"] == pytest.approx(sorted(inside)[-1 - refused], abs=1e-3)
    assert preset["quantizer"] in ("mixed", "mixed_fixed") and isinstance(preset["bits"], float)
    cache = create_cache_from_preset(preset)
    x = torch.randint(2, 97, (1, 80))
    assert tiny_model("llama").generate(x, past_key_values=cache, use_cache=True, max_new_tokens=5).shape == (1, 85)
    capsys.readouterr()
    assert run(TUNE, *flags) == 0
    said = capsys.readouterr().out
    assert "calibration: using" in said and said.count("tuning: ") == 1, "everything is done"


def test_script_without_a_calibrated_codec_makes_no_calibration(tiny_flags, tmp_path):
    flags = ["--codecs", "identity", "--num-trials", "2", "--target-ppl-delta", "0.9"]
    assert run(TUNE, *tiny_flags, *CODEC, *flags) == 0
    preset = json.loads((tmp_path / "p.json").read_text())
    assert not list(tmp_path.rglob("*.pt")) and preset["calibration_file"] == "" and preset["codec"] == "identity"
    assert create_cache_from_preset(tmp_path / "p.json").codec_bytes() == 0


def test_script_over_budget_writes_nothing(tiny_flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Search, "evaluate", lambda self, cell, ratio: Trial(
        cell, 1.0, ratio, {"ppl_delta": 1.0, "ppl_delta_interval": [1.0, 1.0]}))  # fmt: skip
    assert run(TUNE, *tiny_flags, *CODEC, "--codecs", "identity", "--num-trials", "2") == BudgetNotMet.exit_code
    err = capsys.readouterr().err
    assert "PPL degradation too high" in err and "--num-trials" in err
    assert not {"p.json", "p.png"} & listing(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--per-layer"], "--per-layer belongs to --search grid"),
        (["--search", "grid", "--codecs", "identity"], "--codecs belongs to --search codec"),
        (["--codecs", "identify"], "unknown identify"),
    ],
)
def test_flags_of_the_other_search_are_refused(tiny_flags, flags, message, capsys):
    assert run(TUNE, *tiny_flags, *CODEC, *flags) == 2
    assert message in capsys.readouterr().err


def test_another_budget_or_other_codecs_are_another_study():
    loaded = tiny_loaded()
    names = set()
    for budget, chosen in ((0.05, ("identity",)), (0.06, ("identity",)), (0.05, ("identity", "hadamard"))):
        space = Space(chosen, 12, (12,))
        own = codec_search.CodecSearch(**vars(tiny_search(loaded)), space=space, budget=budget)
        names.add(grid_search.study_name(own.key("text")))
    assert len(names) == 3
