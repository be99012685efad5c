"""The choice among measured candidates: within the budget on tuning text, and held to it on other text."""

import json
import math

import pytest

from gpt2.common.errors import BudgetNotMet
from gpt2.tuning.grid_search import Cell
from gpt2.tuning.trials import Trial, confirm_best, percent, within_budget

# Fewer ranks and bits compress more and cost more
TRIALS = [Trial(Cell(rank, bits), 0.4 / (rank * bits), 100 / (rank * bits), {"ppl_delta": 0.4 / (rank * bits)})
          for rank in (16, 12, 8) for bits in (8, 4)]  # fmt: skip


def test_the_most_compressed_within_the_budget_wins_if_it_holds_on_other_text():
    within = within_budget(TRIALS, 0.005)
    assert within and all(t.ppl_delta <= 0.005 for t in within)
    assert within[0].compression_ratio == max(t.compression_ratio for t in within)
    best, record, failed = confirm_best(TRIALS, 0.005, lambda cell: {"ppl_delta": 0.004}, "")
    assert (best, failed) == (within[0], [])
    # The winner on tuning text fails on other text: the next one is taken, and the failure returned
    worse = {within[0].candidate: {"ppl_delta": 0.006}}
    best, record, failed = confirm_best(TRIALS, 0.005, lambda cell: worse.get(cell, {"ppl_delta": 0.001}), "")
    assert best == within[1] and failed == [(within[0], worse[within[0].candidate])] and record["ppl_delta"] == 0.001


def test_nothing_within_the_budget_names_the_nearest_and_what_helps():
    with pytest.raises(BudgetNotMet, match="(?s)PPL degradation too high.*rank 16, 8 bits.*try more") as caught:
        confirm_best(TRIALS, 0.0001, lambda cell: {"ppl_delta": 0.0}, "try more")
    assert caught.value.exit_code not in (0, 2)
    for delta in (1.0, None):
        with pytest.raises(BudgetNotMet, match="met it on tuning text but not on evaluation text"):
            confirm_best(TRIALS, 0.005, lambda cell, delta=delta: {"ppl_delta": delta}, "")
    with pytest.raises(BudgetNotMet, match="(?s)nothing could be measured.*try more"):
        confirm_best([], 0.005, lambda cell: {}, "try more")


def test_a_loss_that_is_not_finite_is_over_any_budget_and_recorded():
    lost = Trial(Cell(8, 2), math.inf, 9.0, {"ppl_delta": None, "note": "NaN"})
    assert lost not in within_budget([*TRIALS, lost], 1e9)
    assert json.loads(json.dumps(lost.record(), allow_nan=False))["ppl_delta"] is None
    with pytest.raises(BudgetNotMet, match="no finite loss"):
        confirm_best([lost], 0.05, lambda cell: {}, "")
    assert (percent(None), percent(0.0123)) == ("no finite loss", "+1.23%")
