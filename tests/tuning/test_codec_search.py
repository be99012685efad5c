"""The search over codecs: what it may choose, what it finds and skips, and that nothing is lost or measured twice."""

import math
import threading
import time
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from sampling import sampled
from searches import search_of

from gpt2.common.errors import PluginError
from gpt2.common.trial_queue import Pace, TrialQueue
from gpt2.compression.codecs import CODECS, needs_calibration
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.build import new_preset
from gpt2.compression.settings import Setting
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.loading import wrap
from gpt2.tuning import codec_search
from gpt2.tuning.codec_search import CodecSearch
from gpt2.tuning.search_space import Choice, Space, default_families, families, lossy, metric_for, space_for
from gpt2.tuning.trials import Trial, within_budget

SPACE = Space(("joint+mixed", "identity", "pca"), 64, (64, 48))
BUDGET = 0.05
TRIALS = 10


def ratio(choice: Choice) -> float:
    """A made-up size, K and V half of the cache each."""
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
            search(tmp_path / "s.db", TRIALS - 3, evaluate=evaluate)
    fewer, more = (search(tmp_path / "s.db", count, evaluate=evaluate) for count in (TRIALS - 3, TRIALS))
    assert fewer == found[0][: len(fewer)] and more == found[0] and len(more) > len(fewer)
    assert len(seen) == len(set(seen)) + 3 == len(more) + 3, "only what was interrupted is measured again"


def test_a_choice_that_kills_two_workers_is_replaced(tmp_path):
    """And a loss that is not finite is recorded, over any budget."""
    space, fatal = Space(("joint+mixed",), 64, (64,)), []

    def evaluate(choice, size):
        if choice.bits in [point["bits"] for point in space.starts()]:
            return measured(choice, size)
        fatal.append(choice)  # the sampler has drawn it
        if len(fatal) < 3:
            raise MemoryError
        return Trial(choice, math.inf, size, {})

    for _ in range(2):
        with pytest.raises(MemoryError):
            search(tmp_path / "s.db", 4, evaluate=evaluate, space=space)
    trials = search(tmp_path / "s.db", 4, evaluate=evaluate, space=space)
    assert len(trials) == 4 and fatal[0] == fatal[1] and fatal[0] not in [trial.candidate for trial in trials]
    lost = [trial for trial in trials if math.isinf(trial.ppl_delta)]
    assert lost and not [trial for trial in within_budget(trials, BUDGET) if trial in lost]


@pytest.mark.parametrize("late", sampled(["both", "the first"], 1))
def test_two_workers_that_draw_the_same_measure_it_once(late, tmp_path, monkeypatch):
    """Also where both write what they have drawn before either looks, and where the first is the last to write."""
    drawn, seen, together = [], [], threading.Barrier(2)
    suggest, write = Space.suggest, optuna.Trial.set_user_attr

    def draw(space, trial):
        choice = suggest(space, trial)
        drawn.append((trial.number, choice))
        if len(drawn) <= 2:
            together.wait(30)
        return drawn[0][1]

    def slowly(trial, key, value):
        time.sleep(0.15 * (late == "the first" and key == "choice" and trial.number == drawn[0][0]))
        write(trial, key, value)
        time.sleep(0.15 * (late == "both" and key == "choice"))

    def evaluate(choice, size):
        seen.append(choice)
        time.sleep(0.3)
        return measured(choice, size)

    monkeypatch.setattr(Space, "suggest", draw)
    monkeypatch.setattr(optuna.Trial, "set_user_attr", slowly)
    workers = [threading.Thread(target=search, args=(tmp_path / "s.db", 2), kwargs={"evaluate": evaluate})
               for _ in range(2)]  # fmt: skip
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    trials = queue(tmp_path / "s.db").trials()
    states = [trials[number].state for number, _ in drawn[:2]]
    assert len(seen) == states.count(TrialState.COMPLETE) == 1, "neither leaves it to the other"


def test_families_come_from_the_registry():
    assert {codec for codec in CODECS if not needs_calibration(codec)} <= families().keys()
    assert {"joint+mixed", "joint+mixed_fixed", "fisher", "attention", "pca"} <= set(default_families())
    assert "random" not in default_families(), "a control"
    names = tuple(families())
    assert {point["family"] for point in Space(names, 64, (64,)).starts()} == set(names)
    assert {"int8", "int4"} <= set(lossy()) and not {"none", "mixed"} & set(lossy())
    assert metric_for(["identity"]) is None and metric_for(["pca", "joint+mixed"]) == "fisher"


def test_without_statistics_a_family_is_left_out_or_rejected_when_asked_for():
    allowed, left_out = space_for(None, 64)
    assert {"identity", "hadamard"} <= set(allowed.families) and {"pca", "joint+mixed"} <= left_out.keys()
    assert not set(allowed.families) & left_out.keys()
    with pytest.raises(PluginError, match="codec joint needs a calibration"):
        space_for(None, 64, ["joint+mixed"])
    with pytest.raises(PluginError, match="rank 65 is out of range"):
        space_for(None, 64, ranks=[65])


def test_where_layers_differ_in_width_codecs_that_need_no_calibration_keep_all_of_each():
    space, uniform = (Space(("hadamard", "pca"), 16, (16, 8), mixed=mixed) for mixed in (True, False))
    for own, ranks in ((space, [None, 8]), (uniform, [16, 8])):
        trials = [optuna.trial.FixedTrial(point | {"target": "kv", "rank": 8}) for point in own.starts()]
        assert [own.suggest(trial).setting.rank for trial in trials] == ranks
    assert space.key() != uniform.key() and "mixed" not in uniform.key()

    # So does a preset of such a choice
    loaded = wrap(tiny_family("mimo_v2_flash"), None, "mimo")
    search = search_of(loaded, CodecSearch, space=space)
    keys = search.preset_keys(Choice("hadamard", Setting("hadamard", None, 4, "int4_channel"), "kv", 4))
    figures = {"baseline_ppl": 1.0, "ppl": 1.0, "ppl_delta": 0.0}
    cache = create_cache_from_preset(new_preset(loaded, None, "", compression_ratio=2.0, measured=figures, **keys))
    with torch.no_grad():
        loaded.model(torch.arange(2, 90)[None], past_key_values=cache)
    ranks = [[store.compressor.transform.rank for store in layer.stores.values()] for layer in cache.compressed]
    assert ranks == [[24, 16], [24, 16]]
