"""Small random models of any family: the same every time, with a layer of every kind."""

import pytest
import torch

from gpt2.experiments import miniatures


def test_a_miniature_is_the_same_each_time_and_leaves_the_dice_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a, b = miniatures.tiny_family("qwen2"), miniatures.tiny_family("qwen2")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_shrinking_keeps_a_layer_of_every_kind():
    fields = {
        "hidden_size": 4096, "num_hidden_layers": 6, "head_dim": 256, "num_key_value_heads": None, "vocab_size": 50,
        "layer_types": ["s", "s", "s", "f", "g", "f"], "rope": [1, 1, 1, 0, 1, 0], "moe": [0, 1, 3, 5], "flag": True,
        "sparse": [2, 5], "dims": [3, 80],
        "eos_token_id": 7, "image_token_id": 9999, "boi_token_id": None, "use_cache": False, "id2label": {"0": "a"},
        "vision": {"hidden_size": 1024, "depth": 3}, "per_layer_config": {"03": {"head_dim": 512, "x": 3}, "5": {}},
    }  # fmt: skip
    assert miniatures.shrunk(fields) == fields | {
        "hidden_size": 64, "num_hidden_layers": 5, "head_dim": 16, "num_key_value_heads": 2,
        "layer_types": ["s", "s", "s", "f", "g"], "rope": [1, 1, 1, 0, 1], "moe": [0, 1, 3], "sparse": [2],
        "eos_token_id": None,
        "image_token_id": 120, "use_cache": True, "vision": {"hidden_size": 64, "depth": 3},
        "per_layer_config": {3: {"head_dim": 32, "x": 3}},
    }  # fmt: skip


def test_what_is_not_small_is_not_built(monkeypatch):
    monkeypatch.setattr(miniatures, "MOST_PARAMETERS", 1000)
    with pytest.raises(miniatures.NotTried, match="the miniature has 65,856 weights"):
        miniatures.tiny_family("llama")
