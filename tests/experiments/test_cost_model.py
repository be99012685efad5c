"""Arithmetic of large models against hand-made cases and real objects."""

import pytest
import torch
from tiny import tiny_loaded, tiny_model, windows
from transformers import AutoConfig

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import held_bytes
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.statistics import Statistics, collect
from gpt2.compression.codecs import multi_head_bases
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.named_caches import from_preset
from gpt2.experiments import cost_model, predictions
from gpt2.experiments.cost_model import Dimensions
from gpt2.experiments.scaling import measured_bytes, moments_bytes, saved_bytes
from gpt2.models import random_weights
from gpt2.models.geometry import Geometry

# 2 layers, 2 KV heads of 4 under 4 query heads
SMALL = Dimensions(
    Geometry.uniform(2, 2, 4), 4, hidden=16, intermediate=32, vocabulary=100, layer_weights=1000, weights=5200
)


def test_arithmetic_by_hand():
    # 2 layers · (2 · 1000 · 10 + 2 · 4 · 4 · 100); logits 2 · 100 · 16 · 10
    assert cost_model.forward_flops(SMALL, 10) == 2 * (20_000 + 3_200)
    assert cost_model.forward_flops(SMALL, 10, logits=True) == 46_400 + 32_000
    assert cost_model.backward_flops(SMALL, 10) == 2 * (20_000 + 5 * 16 * 100) + 32_000
    assert cost_model.moments_flops(SMALL, 10) == 2 * 2 * 16 * 8 * 10
    # Both heads share a basis of 2 · 2 · 4 = 16 channels
    joint, apart = Geometry.uniform(2, 1, 16), Geometry.uniform(4, 1, 8)
    assert SMALL.multi_head_shapes() == {"joint": joint, "grouped": apart, "framed": joint}
    assert cost_model.gradient_moments_flops(SMALL, 10) == 2 * 10 * (4 * 2 * 16 + 2 * 4 * 256 + 8 * 64)
    assert cost_model.gradient_pass_flops(SMALL, 10) == 78_400 + 88_000 + 53_760
    again = cost_model.gradient_pass_flops(SMALL, 10, checkpointing=True) - cost_model.gradient_pass_flops(SMALL, 10)
    assert again == 46_400
    assert cost_model.bases(SMALL) == {16: 4, 8: 4, 4: 8}
    assert cost_model.logits_bytes(SMALL, 10) == 4_000


def test_bases_are_at_most_512_wide():
    dims = cost_model.dimensions(random_weights.read_shapes(["llama-3.1-8b.json"])["llama-3.1-8b"], "llama-3.1-8b")
    assert dims.multi_head_shapes()["joint"] == Geometry.uniform(32, 4, 512)
    assert dims.weights == pytest.approx(8.03e9, rel=1e-3)
    # q and o 4096², k and v 4096 · 1024, three of 4096 · 14336; norms are 8,192 more
    assert dims.layer_weights == pytest.approx(2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336, rel=1e-4)


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded("llama")


def test_counted_statistics_are_those_that_passes_leave(loaded):
    dims = cost_model.dimensions(loaded.model.config, loaded.spec)
    found = collect(loaded, windows(2, 72), sink_tokens=4)
    assert moments_bytes(found.k) + moments_bytes(found.v) == cost_model.statistics_bytes(dims)
    sides = [Moments.zeros(loaded.geometry) for _ in range(2)]
    statistics = Statistics(*sides)
    found = collect_fisher(loaded, windows(1, 4 + 48 * 64 // 8), statistics, 4, multi_head_bases())
    counted = cost_model.gradient_statistics_bytes(dims)
    assert sum(own.nbytes for side in sides for own in side.metrics["fisher"]) == counted["heads"]
    moments = {name: moments_bytes(own.moments) for name, own in found.items()}
    assert moments == {name: counted[name] for name in moments} and len(moments) >= 2
    # One window of 6 blocks, of the 48 that are kept
    assert sum(map(measured_bytes, found.values())) - sum(moments.values()) == counted["blocks"] // 8


def test_counted_activations_are_those_that_are_kept(loaded):
    dims = cost_model.dimensions(loaded.model.config, loaded.spec)
    assert saved_bytes(loaded, 64) == cost_model.activation_bytes(dims, 64, element=4)
    kept = cost_model.activation_bytes(dims, 64, element=4, checkpointing=True)
    assert 3 * 64 * 48 * 4 < kept < cost_model.activation_bytes(dims, 64, element=4)


@pytest.mark.parametrize("preset", ["kv4", "kv8", "kv-4x", "fast-4x"])
def test_bytes_on_paper_are_those_of_a_real_cache(preset):
    """3 layers of 8 heads of 64: in codecs with a multi-head basis two groups of heads."""
    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=97,
    )  # fmt: skip
    plain, row = predictions.cache_rows({"some": config}, [300], [preset])
    whole = random_weights.from_config(config, "some")
    cache = from_preset(preset, whole)
    assert row["bytes"] == held_bytes(cache.make, Geometry.uniform(3, 8, 64), 300)
    assert row["bytes_per_token"] == row["bytes"] / 300
    assert plain["bytes"] == 300 * Geometry.uniform(3, 8, 64).bytes_per_token()
    assert row["compression_ratio"] == plain["bytes"] / row["bytes"] > 1
    if preset in ("kv-4x", "fast-4x"):
        assert row["basis_bytes"] == cache.make().codec_bytes() > 0


def test_narrow_models_keep_the_shape_of_the_cache():
    config = random_weights.read_shapes(["qwen2.5-7b.json"])["qwen2.5-7b"]
    assert predictions.narrow(config, Geometry.uniform(2, 4, 128)).geometry == Geometry.uniform(2, 4, 128)


def test_calibration_on_paper_adds_up():
    config = random_weights.read_shapes(["qwen2.5-0.5b.json"])["qwen2.5-0.5b"]
    row = predictions.calibration_rows({"q": config}, 10, 100, 1e12, lambda width: float(width))[0]
    dims = cost_model.dimensions(config, "q")
    assert row["forward_flops"] == 10 * cost_model.forward_flops(dims, 100)
    assert row["seconds"]["gradient_pass"] == 10 * cost_model.gradient_pass_flops(dims, 100) / 1e12
    assert row["in_forward_passes"]["first_pass"] == pytest.approx(1, abs=0.1) and "256" in row["bases"]
    assert row["fitting_s"] == sum(width * count for width, count in cost_model.bases(dims).items())


def test_changed_configs_are_cut():
    config = tiny_model("qwen2").config
    cut = random_weights.changed(config, 2, vocab_size=50)
    assert (cut.num_hidden_layers, cut.vocab_size, config.num_hidden_layers) == (2, 50, 3)
    assert torch.is_tensor(random_weights.from_config(cut, "cut").model.lm_head.weight)


@pytest.mark.parametrize("shape", ["qwen3.5-4b", "deepseek-v3"])
def test_layers_that_differ_are_rejected(shape):
    """A hybrid, and latents whose K and V differ in width."""
    configs = random_weights.read_shapes([f"{shape}.json"])
    with pytest.raises(PluginError, match=f"{shape}: costs on paper are for models whose layers"):
        cost_model.dimensions(configs[shape], shape)
    with pytest.raises(PluginError, match="cache_bytes.py"):
        predictions.cache_rows(configs, [100], ["kv4"])
