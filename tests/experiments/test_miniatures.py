"""Small random models of any family: the same every time, with a layer of every kind."""

import pytest
import torch

from gpt2.experiments import miniatures
from gpt2.experiments.architectures import reference
from gpt2.models.probe import probe_geometry


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


def test_shrinking_keeps_layers_that_attend_and_those_that_share_their_keys():
    kinds = ["linear_attention", "linear_attention", "full_attention"] * 3
    assert miniatures.shrunk({"num_hidden_layers": 9, "layer_types": kinds})["layer_types"] == kinds[:3] + kinds[5:6]
    assert miniatures.shrunk({"num_hidden_layers": 9, "full_attn_idxs": [2, 5, 8]})["full_attn_idxs"] == [2, 3]
    fields = {"num_hidden_layers": 9, "num_kv_shared_layers": 4, "layer_types": ["a", "a", "f"] * 3}
    small = {"num_hidden_layers": 5, "num_kv_shared_layers": 2, "layer_types": ["a", "a", "f", "f", "a"]}
    assert miniatures.shrunk(fields) == small


def test_widths_of_keys_and_values_keep_their_proportions():
    assert miniatures.shrunk({"head_dim": 192, "v_head_dim": 128}) == {"head_dim": 24, "v_head_dim": 16}
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256}
    small = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 32}
    assert miniatures.shrunk(latent) == small
    assert miniatures.shrunk({**latent, "head_dim": 64, "num_key_value_heads": 9}) == {
        **small, "head_dim": 8, "num_key_value_heads": 4,
    }  # fmt: skip


LAYERS = {
    "deepseek_v3": ["full_attention, K 1 x 16, V 1 x 8"] * 2,
    "gemma4_text": [*["sliding_attention, window 130, K 2 x 16, V 2 x 16"] * 2, "full_attention, K 2 x 32, V 2 x 32",
                    "dummy", "dummy"],
    "jamba": ["linear_attention", "full_attention, K 2 x 16, V 2 x 16"] * 2,
    "mimo_v2_flash": ["full_attention, K 2 x 24, V 2 x 16", "sliding_attention, window 129, K 4 x 24, V 4 x 16"],
    "recurrent_gemma": [*["linear_attention"] * 2, "sliding_attention, window 130, K 2 x 16, V 2 x 16"] * 2,
    "zamba2": ["linear_attention", "linear_attention", *["hybrid, K 2 x 32, V 2 x 32"] * 2],
}  # fmt: skip


@pytest.mark.parametrize("family", LAYERS)
def test_miniatures_have_layers_of_every_kind_and_run(family):
    model = miniatures.tiny_family(family)
    logits, _ = reference(model)
    assert logits.isfinite().all()
    assert [str(layer) for layer in probe_geometry(model, family).layers] == LAYERS[family]


def test_what_is_not_small_is_not_built(monkeypatch):
    monkeypatch.setattr(miniatures, "MOST_PARAMETERS", 1000)
    with pytest.raises(miniatures.NotTried, match="the miniature has 65,856 weights"):
        miniatures.tiny_family("llama")
