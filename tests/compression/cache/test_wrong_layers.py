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
LINEAR_FIRST = "the model has linear attention in layer 0, but this cache was made for attention alone"
HYBRID = {
    **dict.fromkeys(sampled(("qwen3_next", "lfm2", "jamba", "falcon_h1", "inkling_text"), 3), LINEAR_FIRST),
    "recurrent_gemma": "the model has no attention in layer 0, where this cache expects it",
    "glm_moe_dsa": "the model has an indexer in layer 0, for which this cache has no place",
}


def rejected(family: str, cache, message: str, tokens: int = 20) -> None:
    """Assert that feeding a model of the family with this cache raises the message."""
    with pytest.raises(PluginError, match=message):
        feed(model_of(family), cache, ids_of(tokens))


@pytest.mark.parametrize(("family", "message"), HYBRID.items())
def test_a_bare_preset_with_a_hybrid_model(family, message):
    """The guide's keys alone say nothing of kinds of layers."""
    model, geometry = model_of(family), geometry_of(family)
    own = {"num_layers": geometry.num_layers, "head_dim": geometry.head_dim, "rank": geometry.head_dim}
    preset = PRESET | own | {"model": family, "target": "kv", "codec": "identity", "calibration_file": ""}
    rejected(family, create_cache_from_preset(preset), f"{message}.*{ADVICE}$")
    if family != "glm_moe_dsa":  # its V is narrower than the preset says
        for tells in ({"model": model}, {"config": model.config}):
            assert feed(model, create_cache_from_preset(preset, **tells), ids_of(20)).isfinite().all()


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_a_bare_cache_with_a_model_whose_last_layers_keep_nothing(family):
    """It can't be seen before the second step."""
    cache = identity_cache(geometry_of(family).num_layers)
    feed(model_of(family), cache, ids_of(20))
    rejected(family, cache, f"the first layer holds 20 tokens and the last 0: .*{ADVICE}", tokens=1)


ATTENDING = ["mistral", "qwen3_next", "deepseek_v3", "falcon_h1", "glm_moe_dsa"]


@pytest.mark.parametrize(("family", "kind"), covering(ATTENDING, [NOTHING, LINEAR]))
def test_a_layer_that_attends_where_the_cache_keeps_nothing_or_ends(family, kind):
    geometry = geometry_of(family)
    for index in geometry.attention:
        layers = list(geometry.layers)
        layers[index] = LayerGeometry(kind)
        if (wrong := Geometry(tuple(layers))).attention:
            message = f"attention in layer {index}, where this cache keeps no K and V.*{ADVICE}"
            rejected(family, identity_cache(wrong), message)
    fewer = Geometry(geometry.layers[:-1])
    rejected(family, identity_cache(fewer), rf"layer {fewer.num_layers}\b")


def test_a_compressor_that_is_missing_is_named():
    exact = [layer.stores["K"].compressor for layer in ours("gemma3_text").layers]
    with pytest.raises(PluginError, match=r"layer 1 \(sliding_attention\) keeps K and V: expected a compressor"):
        CompressedDynamicCache(exact, [exact[0], None, exact[2]], geometry=geometry_of("gemma3_text"))
