"""A cache that was made for other layers than the model's says so, and says what to do."""

from __future__ import annotations

import pytest
from kinds import feed, geometry_of, ids_of, model_of, ours
from presets import PRESET
from sampling import covering, sampled

from gpt2.common.errors import PluginError
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.models.geometry import LINEAR, NOTHING, Geometry, LayerGeometry

ADVICE = "give model= or config= to create_cache_from_preset"


def bare_preset(family: str) -> dict:
    """The guide's keys alone, which say nothing of kinds of layers."""
    geometry = geometry_of(family)
    own = {"num_layers": geometry.num_layers, "head_dim": geometry.head_dim, "rank": geometry.head_dim}
    return PRESET | own | {"model": family, "target": "kv", "codec": "identity", "calibration_file": ""}


LINEAR_FIRST = "the model has linear attention in layer 0, but this cache was made for attention alone"
HYBRID = {
    **dict.fromkeys(sampled(("qwen3_next", "lfm2", "jamba", "falcon_h1", "inkling_text"), 3), LINEAR_FIRST),
    "recurrent_gemma": "the model has no attention in layer 0, where this cache expects it",
    "glm_moe_dsa": "the model has an indexer in layer 0, for which this cache has no place",
}


@pytest.mark.parametrize(("family", "message"), HYBRID.items())
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


@pytest.mark.parametrize(
    ("family", "kind"), covering(["mistral", "qwen3_next", "deepseek_v3", "glm_moe_dsa"], [NOTHING, LINEAR])
)
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


@pytest.mark.parametrize("family", sampled(["mistral", "gemma3_text", "falcon_h1", "qwen3_next", "glm_moe_dsa"], 3))
def test_a_model_with_more_layers_than_the_cache(family):
    fewer = Geometry(geometry_of(family).layers[:-1])
    with pytest.raises(PluginError, match=rf"layer {fewer.num_layers}\b"):
        feed(model_of(family), identity_cache(fewer), ids_of(20))


def test_a_compressor_that_is_missing_is_named():
    geometry = geometry_of("gemma3_text")
    with pytest.raises(PluginError, match=r"layer 1 \(sliding_attention\) keeps K and V: expected a compressor"):
        exact = [layer.stores["K"].compressor for layer in ours("gemma3_text").layers]
        CompressedDynamicCache(exact, [exact[0], None, exact[2]], geometry=geometry)
