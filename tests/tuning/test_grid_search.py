"""The grid: its cells, each measured once, what each costs on a tiny model, and the choice among candidates."""

import json
import math
from types import SimpleNamespace

import pytest
from searches import search_of
from tiny import tiny_loaded, windows

from gpt2.common.errors import BudgetNotMet, PluginError
from gpt2.common.trial_queue import TrialQueue
from gpt2.compression.codecs.integer import Int4
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.settings import Setting
from gpt2.tuning import grid_search
from gpt2.tuning.codec_search import CodecSearch
from gpt2.tuning.grid_search import Cell, GridSearch, run_grid
from gpt2.tuning.search_space import Space
from gpt2.tuning.trials import Trial, confirm_best, percent, within_budget

INT4, INT8 = Setting("identity", 12, 4), Setting("identity", 12, 8)


def test_grid():
    assert grid_search.default_rank_grid(64) == [64, 60, 56, 48, 32]
    assert grid_search.default_rank_grid(128) == [128, 120, 112, 96, 64]
    cells = grid_search.grid([64, 60], [16, 4], 64, "pca")
    assert cells == [Cell(64, 4), Cell(60, 16), Cell(60, 4)], "the full rank at 16 bits saves nothing"
    assert grid_search.grid(None, [8], 64, "identity") == [Cell(64, 8)]


@pytest.mark.parametrize(("ranks", "bits", "codec", "message"), [
    ([65], [8], "pca", "rank 65 is out of range"),
    ([64], [16], "pca", "compresses nothing"),
    ([60], [5], "pca", "bits 5 is not available"),
    ([60], [8], "identity", "no rank to cut"),
    ([60], [8], "pcaa", "did you mean 'pca'"),
])  # fmt: skip
def test_bad_grids_are_rejected(ranks, bits, codec, message):
    with pytest.raises(PluginError, match=message):
        grid_search.grid(ranks, bits, 64, codec)


def test_cells_of_plans_have_a_name_and_a_key_of_their_own():
    first, second = (Cell.of_plan({"k": [None] * 3, "v": list(v)}) for v in ((INT4, INT8, None), (INT8, INT4, None)))
    assert str(first) == f"per layer {first.digest[:4]}: V 1 × exact + 1 × r12 4 bits + 1 × r12 8 bits"
    assert str(first) != str(second) and (first.rank, first.bits) == (12, 4)
    assert len({first.key, second.key, Cell(12, 4).key}) == 3
    assert first.plan("v", "identity", 3) == {"k": [None] * 3, "v": [INT4, INT8, None]}


def test_every_cell_is_measured_once_and_comes_back_as_it_was(tmp_path):
    cells, seen, said = [Cell(16, 8), Cell(12, 8), Cell(12, 4)], [], []

    def evaluate(cell: Cell) -> Trial:
        seen.append(cell)
        return Trial(cell, math.inf if cell.bits == 4 else 0.01, cell.bits / 4, {"bits": cell.bits})

    for count in (2, 3):  # more cells add to those that are measured
        trials = run_grid(TrialQueue(tmp_path / "s.db", "s"), cells[:count], evaluate,
                          lambda trials, note: said.append((len(trials), note)))  # fmt: skip
    assert seen == cells and said == [(0, ""), (1, ""), (2, ""), (2, ""), (3, "")]
    assert trials == [evaluate(cell) for cell in cells]


def keys(loaded, of: list[dict], kind=GridSearch) -> list[dict]:
    return [search_of(**{"loaded": loaded} | own, kind=kind).key("text") for own in of]


def test_the_key_has_all_that_figures_depend_on(llama):
    of_grids = [{}, {"target": "v"}, {"codec": "hadamard"}, {"sink_tokens": 0}, {"chunk": 8}, {"seed": 1}]
    of_grids += [{"tuning": windows(1, 48)}, {"loaded": tiny_loaded("qwen2")}]
    metas = [{"seed": 0}, {"seed": 0, "compact": True}, {"seed": 0, "fingerprint": "0"}]
    of_grids += [{"calibration": SimpleNamespace(meta=meta)} for meta in metas]
    one, two = (Space(names, 12, (12,)) for names in (("identity",), ("identity", "hadamard")))
    of_codecs = [{"space": one}, {"space": one, "budget": 0.06}, {"space": two}]
    found = [*keys(llama, of_grids), *keys(llama, of_codecs, CodecSearch), search_of(llama).key("other text")]
    assert all(found.count(key) == 1 for key in found) and keys(llama, [{}]) == found[:1]


@pytest.mark.parametrize("kind", [GridSearch, CodecSearch])
def test_another_context_length_is_another_search(llama, kind):
    """Where all layers are alike the usual length isn't in the key: studies from before there was a choice go on."""
    lengths = [{}, {"context_length": 4096}]
    differ, alike = (keys(loaded, lengths, kind) for loaded in (tiny_loaded("gemma3_text"), llama))
    assert [key.pop("context_length") for key in differ] == [2048, 4096] and differ[0] == differ[1]
    assert "context_length" not in alike[0] and alike[1] == alike[0] | {"context_length": 4096}


def test_a_loss_that_is_not_finite_is_recorded_and_over_any_budget(llama, monkeypatch):
    """Codes of 4 bits that are dequantized to NaN: their cell is over any budget on both texts."""
    real = Int4.dequantize
    monkeypatch.setattr(Int4, "dequantize", lambda self, codes, rank: real(self, codes, rank) * math.nan)
    own = search_of(llama)
    good, lost = own.evaluate(Cell(12, 8)), own.evaluate(Cell(12, 4))
    assert math.isfinite(good.ppl_delta) and math.isinf(lost.ppl_delta) and "NaN" in lost.details["note"]
    assert json.loads(json.dumps(lost.record(), allow_nan=False))["ppl_delta"] is None
    assert lost.compression_ratio > good.compression_ratio and within_budget([lost, good], 1e9) == [good]
    held_on_tuning_text = Trial(lost.candidate, 0.0, 9.0, {})
    chosen, _, failed = confirm_best([held_on_tuning_text, good], 0.9, own.confirm, "")
    assert chosen is good and [trial.candidate for trial, _ in failed] == [lost.candidate]
    with pytest.raises(BudgetNotMet, match="no finite loss"):
        confirm_best([lost], 0.05, lambda cell: {}, "")
    assert (percent(None), percent(0.0123)) == ("no finite loss", "+1.23%")


def test_reconstructions_are_kept_while_scoring_and_not_counted(llama, monkeypatch):
    own, kept, real = search_of(llama), [], CompressedDynamicCache.keep_reconstructed
    monkeypatch.setattr(CompressedDynamicCache, "keep_reconstructed", lambda self: kept.append(1) or real(self))
    trial = own.evaluate(Cell(12, 8))
    ratio = own.ratio(trial.candidate)
    assert kept and trial.compression_ratio == pytest.approx(ratio) and ratio > 1.4


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
