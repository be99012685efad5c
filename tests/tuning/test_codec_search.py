"""The search over codecs: what it finds, what it skips, and that nothing is lost or measured twice."""

import math
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from searches import search_of
from tiny import tiny_loaded

from gpt2.common.trial_queue import Pace, TrialQueue
from gpt2.compression.settings import Setting
from gpt2.tuning import codec_search
from gpt2.tuning.codec_search import CodecSearch
from gpt2.tuning.search_space import Choice, Space
from gpt2.tuning.trials import Trial, within_budget

SPACE = Space(("joint+mixed", "identity", "pca"), 64, (64, 48))
BUDGET = 0.05
TRIALS = 10


def ratio(choice: Choice) -> float:
    """A made-up size: bits, rank and sinks as one would expect, K and V half of the cache each."""
    side = 16 / (choice.bits + 0.25) * 64 / choice.setting.rank
    whole = side if choice.target == "kv" else 2 / (1 + 1 / side)
    return whole / (1 + 0.001 * choice.sink_tokens)


def measured(choice: Choice, size: float) -> Trial:
    """A made-up loss that falls with bits and with sinks; joint is the best codec."""
    cost = {"joint+mixed": 0.02, "identity": 0.3, "pca": 0.6}[choice.family]
    delta = cost * 2 ** (2 * (4 - choice.bits)) * (1 + math.exp(-choice.sink_tokens / 4)) + (64 - choice.setting.rank)
    return Trial(choice, delta, size, {"ppl_delta": delta})


def queue(path: Path) -> TrialQueue:
    return TrialQueue(path, "s", pace=Pace(look=0.05))


def search(path: Path, trials: int = TRIALS, *, evaluate=measured, space=SPACE) -> list[Trial]:
    return codec_search.run_search(queue(path), space, BUDGET, ratio, evaluate, num_trials=trials)


def best(trials: list[Trial]) -> float:
    return within_budget(trials, BUDGET)[0].compression_ratio


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A whole search: its trials, its queue, and what was measured in which order."""
    path, seen = tmp_path_factory.mktemp("found") / "s.db", []
    trials = search(path, evaluate=lambda choice, size: seen.append(choice) or measured(choice, size))
    return trials, queue(path), seen


def test_it_finds_better_than_its_first_points(found):
    trials, _, _ = found
    starts = trials[: len(SPACE.starts())]
    grid = [Choice("joint+mixed", Setting("joint", 64, b / 100, "mixed"), "kv", n) for b in range(150, 800)
            for n in SPACE.sinks]  # fmt: skip
    optimum = max(ratio(choice) for choice in grid if measured(choice, 1.0).ppl_delta <= BUDGET)
    assert best(starts) < 0.95 * optimum, "or there is nothing to find"
    assert best(trials) > max(0.95 * optimum, best(starts))
    done = [t for t in found[1].trials() if "ppl_delta" in t.user_attrs]
    given = {t.user_attrs["ppl_delta"] <= BUDGET: t.system_attrs["constraints"][0] <= 0 for t in done}
    assert given == {True: True, False: False}, "the sampler is given the constraint"


def test_what_cannot_win_is_skipped_unmeasured_but_the_first_points_are_not(found):
    trials, queue, seen = found
    starts, leader = len(SPACE.starts()), 0.0
    assert {choice.family for choice in seen[:starts]} == set(SPACE.families)
    for index, trial in enumerate(trials):
        assert index < starts or trial.compression_ratio > leader
        leader = max(leader, trial.compression_ratio if trial.ppl_delta <= BUDGET else 0)
    skipped = codec_search.skipped_records(queue)
    assert skipped and all("can't beat" in s["skipped"] or s["skipped"] == "tried already" for s in skipped)
    assert len(set(seen)) == len(seen) == len(trials) <= TRIALS and len(trials) + len(skipped) <= 2 * TRIALS


def test_an_interrupted_search_ends_as_one_that_is_not_and_more_trials_add_to_it(found, tmp_path):
    """Interrupted at a first point, and at what the sampler has drawn, bisected or not."""
    seen, at = [], [2, 6, 8]

    def evaluate(choice, size):
        seen.append(choice)
        if at and len(seen) == at[0]:
            del at[0]
            raise KeyboardInterrupt
        return measured(choice, size)

    for _ in range(len(at)):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "s.db", evaluate=evaluate)
    assert search(tmp_path / "s.db", evaluate=evaluate) == found[0]
    assert len(seen) == len(set(seen)) + 3 == len(found[0]) + 3, "only what was interrupted is measured again"
    more = search(tmp_path / "s.db", TRIALS + 2, evaluate=evaluate)
    assert more[: len(found[0])] == found[0] and len(more) == len(seen) - 3 <= TRIALS + 2


def test_a_choice_that_kills_two_workers_is_replaced(tmp_path):
    """And a loss that is not finite is recorded, over any budget."""
    space, fatal = Space(("joint+mixed",), 64, (64,)), []

    def evaluate(choice, size):
        if choice.bits not in [point["bits"] for point in space.starts()]:  # the sampler has drawn it
            fatal.append(choice)
            if len(fatal) < 3:
                raise MemoryError
            return Trial(choice, math.inf, size, {})
        return measured(choice, size)

    for _ in range(2):
        with pytest.raises(MemoryError):
            search(tmp_path / "s.db", 4, evaluate=evaluate, space=space)
    trials = search(tmp_path / "s.db", 4, evaluate=evaluate, space=space)
    tried = [trial.candidate for trial in trials]
    assert len(tried) == 4 and fatal[0] == fatal[1] and fatal[0] not in tried
    lost = [trial for trial in trials if math.isinf(trial.ppl_delta)]
    assert lost and not set(map(id, lost)) & set(map(id, within_budget(trials, BUDGET)))


@pytest.mark.parametrize("late", ["the first", "both"])
def test_two_workers_that_draw_the_same_measure_it_once(late, tmp_path, monkeypatch):
    """Also where the first of them is the last to write what it has drawn, and where both write before either looks."""
    drawn, seen, together = [], [], threading.Barrier(2)
    suggest, write = Space.suggest, optuna.Trial.set_user_attr

    def draw(space, trial):
        choice = suggest(space, trial)
        drawn.append((trial.number, choice))
        if len(drawn) <= 2:
            together.wait(30)
        return drawn[0][1]

    def slowly(trial, key, value):
        time.sleep(0.3 * (late == "the first" and key == "choice" and trial.number == drawn[0][0]))
        write(trial, key, value)
        time.sleep(0.3 * (late == "both" and key == "choice"))

    def evaluate(choice, size):
        seen.append(choice)
        time.sleep(0.6)
        return measured(choice, size)

    monkeypatch.setattr(Space, "suggest", draw)
    monkeypatch.setattr(optuna.Trial, "set_user_attr", slowly)
    workers = [threading.Thread(target=search, args=(tmp_path / "s.db", 2), kwargs={"evaluate": evaluate})
               for _ in range(2)]  # fmt: skip
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(seen) == 1
    trials = queue(tmp_path / "s.db").trials()
    states = [trials[number].state for number, _ in drawn[:2]]
    assert states.count(TrialState.COMPLETE) == 1, "neither leaves it to the other"


def test_another_budget_or_other_codecs_are_another_search():
    loaded, choices = tiny_loaded(), ((0.05, ("identity",)), (0.06, ("identity",)), (0.05, ("identity", "hadamard")))
    keys = [search_of(loaded, CodecSearch, space=Space(families, 12, (12,)), budget=budget).key("text")
            for budget, families in choices]  # fmt: skip
    assert all(keys.count(key) == 1 for key in keys)
