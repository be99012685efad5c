"""Arithmetic of large models against hand-made cases and real objects."""

import pytest
from sampling import sampled
from tiny import windows
from transformers import AutoConfig, PretrainedConfig

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import held_bytes, plain_bytes
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.statistics import Statistics, collect
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.named_caches import from_preset
from gpt2.compression.presets import get_preset_info
from gpt2.experiments import cost_model, predictions
from gpt2.experiments.cost_model import Dimensions, Layer
from gpt2.experiments.miniatures import tiny_family
from gpt2.experiments.scaling import measured_bytes, moments_bytes
from gpt2.models import random_weights
from gpt2.models.geometry import FULL, LINEAR, SLIDING, Geometry, LayerGeometry, Shape
from gpt2.models.loading import wrap

# 2 layers, 2 KV heads of 4 under 4 query heads
PLAIN = Layer(Geometry.uniform(1, 2, 4).layers[0], 1000, 4, 4, 4)
SMALL = Dimensions((PLAIN, PLAIN), hidden=16, intermediate=32, vocabulary=100, weights=5200)
# So many layers have one of each kind, and so many tokens are more than a window; the last two have windows
MIXED = {"qwen3.5-4b": (4, 200), "deepseek-v3": (4, 200), "gpt-oss-20b": (2, 200), "gemma-3-4b": (6, 1100)}


def config_of(shape: str, layers: int | None = None) -> PretrainedConfig:
    return random_weights.changed(random_weights.read_shapes([f"{shape}.json"])[shape], layers)


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


def test_layers_of_each_kind_by_hand():
    """A window of 6 reads 6 · 10 − 18 pairs; a state of 50 numbers, three products a token; a latent has no metric."""
    shapes = Shape(1, 8), Shape(1, 2)
    window = Layer(LayerGeometry(SLIDING, Shape(2, 4), Shape(2, 4), window=6), 1000, 4, 4, 4)
    state = Layer(LayerGeometry(LINEAR, state_bytes=100), 500)
    latent = Layer(LayerGeometry(FULL, *shapes), 200, 4, 6, 3, latent=True)
    dims = Dimensions((window, state, latent), hidden=16, intermediate=32, vocabulary=100, weights=0, llama_like=False)
    products = 2 * 4 * 8 * 42 + 2 * 4 * 9 * 50
    assert cost_model.forward_flops(dims, 10) == 2 * 1700 * 10 + products + 6 * 50 * 10
    assert cost_model.backward_flops(dims, 10) == 2 * 1700 * 10 + 2.5 * products + 12 * 50 * 10 + 32_000
    assert cost_model.moments_flops(dims, 10) == 2 * 10 * (2 * 2 * 16 + 64 + 4 + 4 * 16)
    assert cost_model.statistics_bytes(dims) == 8 * (2 * 3 + 2 * 8 + 10 + 2 * 64 + 68 + 0)
    assert cost_model.bases(dims) == {8: 3 + 1, 2: 1 + 1, 4: 4}, "of grouped, and of heads: joint needs one shape"
    assert cost_model.activation_bytes(dims, 10) is None


def test_a_token_meets_the_experts_that_are_chosen_for_it():
    """What OpenAI and DeepSeek say: 3.6 of 20.9 billion, with embeddings, and 37 of 671."""
    for shape, weights, met, embedded in (("gpt-oss-20b", 20.9e9, 3.6e9, 0.58e9), ("deepseek-v3", 671e9, 37e9, 1.85e9)):
        dims = cost_model.dimensions(config_of(shape), shape)
        assert dims.weights == pytest.approx(weights, rel=0.01)
        assert sum(own.weights for own in dims.layers) + embedded == pytest.approx(met, rel=0.02)


def test_bases_are_at_most_512_wide():
    dims = cost_model.dimensions(config_of("llama-3.1-8b"), "llama")
    assert dims.multi_head_shapes()["joint"] == Geometry.uniform(32, 4, 512)
    assert dims.weights == pytest.approx(8.03e9, rel=1e-3)
    # q and o 4096², k and v 4096 · 1024, three of 4096 · 14336; norms are 8,192 more
    assert dims.layers[5].weights == pytest.approx(2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336, rel=1e-4)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_5_text", "deepseek_v3", "mimo_v2_flash"])
def test_counted_statistics_are_those_that_passes_leave(family):
    """With windows, with recurrent layers, of latents, and of several shapes; of one shape, test_scaling."""
    loaded = wrap(tiny_family(family), None, family)
    dims = cost_model.dimensions(loaded.model.config, loaded.spec)
    assert dims.geometry == loaded.geometry
    found = collect(loaded, windows(2, 72), sink_tokens=4)
    assert moments_bytes(found.k) + moments_bytes(found.v) == cost_model.statistics_bytes(dims)
    sides = [Moments.zeros(loaded.geometry, side) for side in "kv"]
    statistics, bases = Statistics(*sides), cost_model.fitting_bases(loaded.geometry)
    found = collect_fisher(loaded, windows(1, 4 + 48 * 64 // 8), statistics, 4, bases)
    counted = cost_model.gradient_statistics_bytes(dims)
    assert sum(own.nbytes for side in sides for own in side.metrics["fisher"] if own is not None) == counted["heads"]
    moments = {name: moments_bytes(own.moments) for name, own in found.items()}
    assert moments == {name: counted[name] for name in moments} and len(moments) >= 1
    # One window of 6 blocks, of the 48 that are kept
    assert sum(map(measured_bytes, found.values())) - sum(moments.values()) == counted["blocks"] // 8


def test_checkpointing_keeps_few_activations(llama):
    """All that are kept without it, test_scaling counts."""
    dims = cost_model.dimensions(llama.model.config, llama.spec)
    kept = cost_model.activation_bytes(dims, 64, element=4, checkpointing=True)
    assert 3 * 64 * 48 * 4 < kept < cost_model.activation_bytes(dims, 64, element=4)


@pytest.mark.parametrize("preset", ["kv4", *sampled(["kv-4x", "kv8", "fast-4x"], 1)])
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


@pytest.mark.parametrize("shape", ["qwen2.5-7b", "gemma-3-4b", "gpt-oss-20b"])
def test_narrow_models_keep_the_layers_of_the_cache(shape):
    config = config_of(shape, 8)
    fields = config.to_dict()
    narrow = predictions.narrow(config, shape)
    assert narrow.geometry == cost_model.dimensions(config, shape).geometry and narrow.geometry.num_layers == 8
    assert narrow.model.num_parameters() < 5e6 and config.to_dict() == fields, "the given config stays"


def test_calibration_on_paper_adds_up():
    config = config_of("qwen2.5-0.5b")
    row = predictions.calibration_rows({"q": config}, 10, 100, 1e12, lambda width: float(width))[0]
    dims = cost_model.dimensions(config, "q")
    assert row["forward_flops"] == 10 * cost_model.forward_flops(dims, 100)
    assert row["seconds"]["gradient_pass"] == 10 * cost_model.gradient_pass_flops(dims, 100) / 1e12
    assert row["in_forward_passes"]["first_pass"] == pytest.approx(1, abs=0.1) and "256" in row["bases"]
    assert row["fitting_s"] == sum(width * count for width, count in cost_model.bases(dims).items())


@pytest.mark.parametrize("shape", [*list(MIXED)[:2], *sampled(list(MIXED)[2:], 1)])
def test_costs_of_mixed_layers_are_those_of_a_real_cache(shape):
    """Windows have forgotten, states count on both sides, and a codec that latents can't have is left out by name."""
    layers, tokens = MIXED[shape]
    config, presets = config_of(shape, layers), ["kv4", "kv-4x"][: 1 + ("deep" in shape)]
    plain, coded, *others = predictions.cache_rows({shape: config}, [tokens], presets)
    outline = random_weights.outline_of(config, shape)
    assert plain["bytes"] == plain_bytes(outline.geometry, tokens) and plain["compression_ratio"] == 1
    assert coded["bytes"] == held_bytes(from_preset("kv4", outline).make, outline.geometry, tokens) < plain["bytes"]
    assert [row.keys() for row in others] == [{"shape", "cache", "reason"}] * ("deep" in shape)
    codec = get_preset_info("smollm2-135m", "kv-4x")["codec"]
    assert all(f"codec {codec} needs K and V of one shape" in row["reason"] for row in others)
    row = predictions.calibration_rows({shape: config}, 2, 1024, 1e12, lambda width: 1.0)[0]
    assert row["layers"] == layers and 1 < row["in_forward_passes"]["first_pass"] < 1.1
    assert 2 < row["in_forward_passes"]["gradient_pass"] == row["in_forward_passes"]["gradient_pass_checkpointing"] - 1
    assert row["activation_bytes"] is None and row["statistics_bytes"] > 0


def test_what_is_not_counted_is_rejected_by_name():
    reused = "attention over an earlier layer's K"
    for family, words in (("deepseek_v32", "layers of kind indexed_attention"), ("gemma4_text", reused)):
        with pytest.raises(PluginError, match=f"{family}: costs on paper don't count {words}"):
            cost_model.dimensions(tiny_family(family).config, family)
