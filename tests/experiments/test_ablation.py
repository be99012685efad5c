"""The ablation's rows on models whose layers differ: each cache is one of the model's."""

import pytest
import torch
from calibrations import TEXT
from kinds import MODELS
from tiny import windows

from gpt2.compression.calibration.calibrate import calibrate
from gpt2.experiments.ablation import Ablation


@pytest.mark.parametrize("name", ["alike", "windowed", "hybrid"])
def test_rows_without_a_direction_are_of_the_models_layers(name):
    loaded = MODELS[name]()
    calibration = calibrate(loaded, TEXT, rank=2, samples=2, seq_len=48)
    rows = Ablation(loaded, calibration, [2], [16], 4, 1).rows("nullspace")
    projected = [row for row in rows if row.key == (row.label,)]
    assert [row.label.partition(",")[2] for row in projected] == [" about the mean", "", " about the mean"]
    prompt = windows(1, 200)
    expected = loaded.model(prompt).logits
    for row in projected:
        cache = row.make()
        assert cache.geometry == loaded.geometry
        found = loaded.model(prompt, past_key_values=cache, use_cache=True).logits
        assert torch.isfinite(found).all() and not torch.equal(found, expected), "a direction is lost"
