"""A cache that was made for other layers than the model's says so, and says what to do."""

from __future__ import annotations

import pytest
from kinds import feed, geometry_of, ids_of, model_of, ours

from gpt2.common.errors import PluginError
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.models.geometry import LINEAR, NOTHING, Geometry, LayerGeometry

ADVICE = "give model= or config= to create_cache_from_preset"


def bare_preset(family: str) -> dict:
    """The guide's keys alone, which say nothing of kinds of layers."""
    geometry = geometry_of(family)
    return {
        "model": family, "rank": geometry.head_dim, "target": "kv", "bits": 8, "codec": "identity",
        "compression_ratio": 2.0, "baseline_ppl": 20.0, "compressed_ppl": 21.0, "calibration_file": "",
        "head_dim": geometry.head_dim, "num_layers": geometry.num_layers,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen3_next", "the model has linear attention in layer 0, but this cache was made for attention alone"),
        ("lfm2", "the model has linear attention in layer 0, but this cache was made for attention alone"),
        ("jamba", "the model has linear attention in layer 0, but this cache was made for attention alone"),
        ("falcon_h1", "the model has linear attention in layer 0, but this cache was made for attention alone"),
        ("inkling_text", "the model has linear attention in layer 0, but this cache was made for attention alone"),
        ("recurrent_gemma", "the model has no attention in layer 0, where this cache expects it"),
        ("glm_moe_dsa", "the model has an indexer in layer 0, for which this cache has no place"),
    ],
)
def test_a_bare_preset_with_a_hybrid_model(family, message):
    model = model_of(family)
    with pytest.raises(PluginError, match=message) as error:
        feed(model, create_cache_from_preset(bare_preset(family)), ids_of(20))
    assert str(error.value).endswith(ADVICE)
    if family != "glm_moe_dsa":  # its V is narrower than the preset says
        for tells in ({"model": model}, {"config": model.config}):
            assert feed(model, create_cache_from_preset(bare_preset(family), **tells), ids_of(20)).isfinite().all()


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_a_bare_cache_with_a_model_whose_last_layers_keep_nothing(family):
    """It can't be seen before the second step."""
    cache = identity_cache(geometry_of(family).num_layers)
    feed(model_of(family), cache, ids_of(20))
    with pytest.raises(PluginError, match=f"the first layer holds 20 tokens and the last 0: .*{ADVICE}"):
        feed(model_of(family), cache, ids_of(1))


@pytest.mark.parametrize("kind", [NOTHING, LINEAR])
@pytest.mark.parametrize("family", ["mistral", "qwen3_next", "deepseek_v3", "glm_moe_dsa"])
def test_a_layer_that_attends_where_the_cache_keeps_nothing(family, kind):
    geometry = geometry_of(family)
    for index in geometry.attention:
        layers = list(geometry.layers)
        layers[index] = LayerGeometry(kind)
        if not Geometry(tuple(layers)).attention:
            continue
        with pytest.raises(
            PluginError, match=f"attention in layer {index}, where this cache keeps no K and V.*{ADVICE}"
        ):
            feed(model_of(family), identity_cache(Geometry(tuple(layers))), ids_of(20))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "qwen3_next", "falcon_h1", "glm_moe_dsa"])
def test_a_model_with_more_layers_than_the_cache(family):
    fewer = Geometry(geometry_of(family).layers[:-1])
    with pytest.raises(PluginError, match=rf"layer {fewer.num_layers}\b"):
        feed(model_of(family), identity_cache(fewer), ids_of(20))


def test_a_compressor_that_is_missing_is_named():
    geometry = geometry_of("gemma3_text")
    with pytest.raises(PluginError, match=r"layer 1 \(sliding_attention\) keeps K and V: expected a compressor"):
        exact = [layer.stores["K"].compressor for layer in ours("gemma3_text").layers]
        CompressedDynamicCache(exact, [exact[0], None, exact[2]], geometry=geometry)
