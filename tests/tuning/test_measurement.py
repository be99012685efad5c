"""What a candidate costs, measured on a tiny model."""

import math

import pytest
from tiny import tiny_loaded, windows

from gpt2 import cli
from gpt2.compression.cache import size
from gpt2.compression.codecs.integer import Int4
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.tuning.grid_search import Cell, GridSearch
from gpt2.tuning.trials import Trial, confirm_best


@pytest.fixture
def search():
    return GridSearch(
        loaded=tiny_loaded(), calibration=None, tuning=windows(2, 48), evaluation=windows(2, 48, seed=1), target="kv",
        codec="identity", sink_tokens=4, chunk=16, batch_size=2, seed=0, bar=cli.bar,
    )  # fmt: skip


def test_a_loss_that_is_not_finite_is_recorded_and_others_are_measured(search, monkeypatch):
    """Codes of 4 bits that are dequantized to NaN: their cell is over any budget on both texts."""
    real = Int4.dequantize
    monkeypatch.setattr(Int4, "dequantize", lambda self, fields, rank: real(self, fields, rank) * math.nan)
    good, lost = search.evaluate(Cell(12, 8)), search.evaluate(Cell(12, 4))
    assert math.isfinite(good.ppl_delta) and math.isinf(lost.ppl_delta) and "NaN" in lost.details["note"]
    assert lost.record()["ppl_delta"] is None and lost.compression_ratio > good.compression_ratio
    held_on_tuning_text = Trial(lost.candidate, 0.0, 9.0, {})
    chosen, _, failed = confirm_best([held_on_tuning_text, good], 0.9, search.confirm, "")
    assert chosen is good and [trial.candidate for trial, _ in failed] == [lost.candidate]


def test_reconstructions_are_kept_while_scoring_and_not_counted(search, monkeypatch):
    kept = []
    real = CompressedDynamicCache.keep_reconstructed
    monkeypatch.setattr(CompressedDynamicCache, "keep_reconstructed", lambda self: kept.append(1) or real(self))
    trial = search.evaluate(Cell(12, 8))
    assert kept
    own = size.compression_ratio(search.factory(trial.candidate), search.loaded.geometry)
    assert trial.compression_ratio == pytest.approx(own) and own > 1.4
    monkeypatch.setattr(CompressedDynamicCache, "keep_reconstructed", lambda self: self)
    assert search.evaluate(Cell(12, 8)).ppl_delta == pytest.approx(trial.ppl_delta, abs=1e-4)
