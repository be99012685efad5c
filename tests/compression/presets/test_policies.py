"""Policies: the guide's names, sizes by KV heads, a choice that is explained, and caches made of it."""

import functools
import json
import re

import pytest
import torch
from sampling import sampled
from tiny import FAMILIES, tiny_loaded, tiny_model
from transformers import AutoConfig, DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import cache_bytes, compression_ratio
from gpt2.compression.kv_policies import (
    KVPolicyName,
    build_compressor_config_for_policy,
    choose_policy_for_run,
    create_cache_from_policy,
)
from gpt2.compression.named_caches import from_policy
from gpt2.compression.presets import create_cache_from_preset, policies
from gpt2.compression.presets.policies import GIB, geometry_of
from gpt2.experiments import miniatures
from gpt2.models.loading import wrap

QWEN = AutoConfig.for_model(
    "qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768,
)  # fmt: skip
MEASURED_ONCE = functools.cache(policies.policy_bytes)  # each takes half a second
PROMPT = torch.arange(2, 42)[None]


@pytest.fixture(autouse=True)
def figures(tmp_path, monkeypatch):
    """What policies cost, as a results file has it: the choice must follow the file."""
    rows = [{"policy": name, "ppl_delta": delta} for name, delta in zip(KVPolicyName, (0.001, 0.02, 0.1), strict=True)]
    (tmp_path / "v.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(policies, "MEASURED", tmp_path / "v.json")
    monkeypatch.setattr(policies, "policy_bytes", MEASURED_ONCE)


def test_the_guides_snippet():
    """Plain data in the model's shape."""
    config = build_compressor_config_for_policy(
        tiny_model("llama").config, model_id="tiny", policy_name=KVPolicyName.MEMORY_EMERGENCY
    )
    assert config["use_ln_nullspace_v"] is True and config["use_ln_nullspace_k"] is False
    assert json.loads(json.dumps(config)) == config
    assert (config["num_layers"], config["num_kv_heads"], config["head_dim"]) == (3, 2, 12)
    assert config["v"] == {"codec": "ln_nullspace", "rank": 11, "bits": 4}
    small = AutoConfig.for_model("llama", hidden_size=128, num_attention_heads=1, num_hidden_layers=2)
    default, high, emergency = (build_compressor_config_for_policy(small, "q", str(name)) for name in KVPolicyName)
    assert default["use_ln_nullspace_v"] is high["use_ln_nullspace_v"] is False
    ratios = [policy["compression_ratio"] for policy in (default, high, emergency)]
    assert 1.5 < ratios[0] < ratios[1] < ratios[2] < 4, "stronger in order"
    with pytest.raises(PluginError, match="unknown policy 'fast': use default, high_compression, memory_emergency"):
        build_compressor_config_for_policy(QWEN, "q", "fast")


@pytest.mark.parametrize(
    ("family", "name"), sampled([(family, name) for family in FAMILIES for name in KVPolicyName], 3)
)
def test_a_cache_in_one_call_for_every_family(family, name):
    model = tiny_model(family)
    cache = create_cache_from_policy(model.config, name)
    out = model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 44) and cache.get_seq_length() == 43
    preset = policies.preset_for_policy(model.config, family, name).record
    measured = compression_ratio(lambda: create_cache_from_preset(preset), geometry_of(model.config, family)[0])
    assert preset["compression_ratio"] == pytest.approx(measured, rel=0.01), "against what transformers keeps"


def test_scripts_take_a_policy_as_a_cache():
    loaded = tiny_loaded("llama")
    choice = from_policy("high_compression", loaded)
    assert choice.label == "high_compression" and json.loads(json.dumps(choice.record()))["target"] == "kv"
    held, plain = choice.make(), DynamicCache(config=loaded.model.config)
    for cache in (held, plain):
        loaded.model(PROMPT.repeat(1, 8), past_key_values=cache)
    assert cache_bytes(held) < cache_bytes(plain) / 2
    assert {repr(layer.stores["V"].compressor) for layer in held.layers} == {"Compressor(int4)"}


def test_where_a_config_does_not_tell_the_shape_the_loaded_model_does():
    """JetMoe reads how many tokens each of its experts has: there are none without weights."""
    model = miniatures.tiny_family("jetmoe")
    with pytest.raises(PluginError, match="its config alone doesn't tell the shape.*from_policy"):
        create_cache_from_policy(model.config, "default", model_id="jetmoe")
    cache = from_policy("default", wrap(model, None, "jetmoe")).make()
    assert model.generate(PROMPT, past_key_values=cache, max_new_tokens=3).shape == (1, 43)


# --- choosing


def chosen(**how):
    """For a run of 8 sequences of 32,768 tokens, where a test doesn't say otherwise."""
    return choose_policy_for_run(QWEN, "q", **{"batch_size": 8, "max_context": 32768} | how)


def test_the_cache_is_sized_by_kv_heads():
    """Seven query heads share a KV head here: by query heads the cache would be taken for seven times its size."""
    geometry, weights = geometry_of(QWEN, "q")
    assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim) == (28, 4, 128)
    assert geometry.bytes_per_token() == 57_344
    assert 7.5e9 < weights / 2 < 7.7e9, "Qwen2.5-7B has 7.6 billion parameters"
    choice, plain = chosen(vram_gb=80), 57_344 * 8 * 32768 / GIB
    assert "would take 14.00 GiB" in choice.explanation
    default = choice.estimates[0]
    assert default.kv_gib == pytest.approx(plain / default.compression_ratio + 4 * plain / 28), "and one layer expanded"
    assert default.total_gib == pytest.approx(default.kv_gib + weights / GIB)


def test_the_mildest_that_fits_is_chosen(monkeypatch, tmp_path):
    """By what each costs; where nothing was measured, by what it is meant for."""
    assert chosen(vram_gb=80).policy == KVPolicyName.DEFAULT
    tight = chosen(vram_gb=25.5)
    assert tight.policy == KVPolicyName.HIGH_COMPRESSION and tight.fits
    assert [e.fits_memory for e in tight.estimates] == [False, True, True]
    assert chosen(vram_gb=23, ppl_budget=0.15).policy == KVPolicyName.MEMORY_EMERGENCY
    monkeypatch.setattr(policies, "MEASURED", tmp_path / "none.json")
    choice = chosen(vram_gb=80)
    assert choice.policy == KVPolicyName.DEFAULT and "perplexity not measured" in choice.explanation


def test_windows_count_as_what_both_caches_hold_of_them():
    """Layers with short windows stay exact: five of six save nothing, and hold little at 2,048 tokens."""
    config = AutoConfig.for_model("gemma3_text", hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
                                  num_key_value_heads=1, head_dim=64, sliding_window=64, vocab_size=1000)  # fmt: skip
    long, short = (
        choose_policy_for_run(config, "g", vram_gb=8, max_context=n, ppl_budget=0.2).estimates[0].compression_ratio
        for n in (2048, 128)
    )
    assert 1 < short < 1.5 < long < 2


NONE = [
    ({"vram_gb": 80, "ppl_budget": 0.0001, "batch_size": 1}, "cache fits: use DynamicCache"),
    ({"vram_gb": 25.5, "ppl_budget": 0.01}, r"\+2.00% perplexity.*over the perplexity budget"),
    ({"vram_gb": 12, "batch_size": 1}, "the weights alone"),
    ({"vram_gb": 20}, r"about [\d,]+ tokens"),
]


def test_where_no_policy_does_it_is_said_why():
    for run, message in NONE:
        choice = chosen(**run)
        assert choice.policy is None and not choice.fits
        assert re.search(message, choice.explanation, re.DOTALL), choice.explanation
    for bad in ({"vram_gb": 0}, {"batch_size": 0}, {"max_context": 0}, {"ppl_budget": 0}):
        with pytest.raises(PluginError, match="all must be positive"):
            chosen(**{"vram_gb": 8} | bad)


def test_when_nothing_fits_what_is_said_to_fit_does():
    """So many whole sequences fit, and one more does not."""
    for vram_gb in (18, 18.5, 19, 19.5, 20, 20.5, 21, 21.5):
        would = int(chosen(vram_gb=vram_gb).explanation.split("about ")[1].split(" tokens")[0].replace(",", ""))
        sequences = would // 32768
        assert 1 <= sequences < 8
        for batch_size in (sequences, sequences + 1):
            assert chosen(vram_gb=vram_gb, batch_size=batch_size, ppl_budget=0.5).fits == (batch_size == sequences)
