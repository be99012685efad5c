"""Presets that say what each layer of the cache is, and the guide's bare form, which leaves it to a model or config."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from kinds import KINDS, feed, geometry_of, ids_of, model_of
from presets import PRESET
from sampling import covering, sampled

from gpt2.common.errors import BadArtefact
from gpt2.compression.cache.layers import CompressedSlidingLayer
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.compression.presets.schema import parse
from gpt2.models.loading import wrap

WHERE = ["model", "config", "loaded"]


measured = functools.cache(lambda family: preset_for_any_model("kv4", family, geometry_of(family)))


def preset_of(family: str) -> dict:
    """kv4, measured once."""
    return copy.deepcopy(measured(family))


def told(family: str, where: str) -> dict:
    """What tells the layers: a model, a config, or a model as scripts load it."""
    model = model_of(family)
    if where == "config":
        return {"config": model.config}
    return {"model": model if where == "model" else wrap(model, None, family)}


def bare(family: str) -> dict:
    """The guide's keys alone."""
    geometry = geometry_of(family)
    own = {"num_layers": geometry.num_layers, "head_dim": geometry.head_dim, "rank": geometry.head_dim}
    return PRESET | own | {"model": family, "codec": "identity", "calibration_file": ""}


@pytest.mark.parametrize("family", sampled(KINDS, 3))
def test_layers_go_through_json_and_make_a_cache_that_runs(family):
    back = json.loads(json.dumps(preset_of(family)))
    assert parse(back).geometry == geometry_of(family) and parse(back).says_layers
    assert parse(parse(back).record).record == parse(back).record, "a record says all there is"
    assert back["cache_layers"] == geometry_of(family).record()
    cache = create_cache_from_preset(back)
    parts = ids_of(18).split([10, 8], dim=1)
    assert all(feed(model_of(family), cache, x).isfinite().all() for x in parts) and cache.get_seq_length() == 18
    same = create_cache_from_preset(back, model=model_of(family))
    assert list(map(type, cache.layers)) == list(map(type, same.layers))


OTHERS = [
    ("gemma3_text", "gemma3n_text", "expected 3 layers, found 6"),
    ("deepseek_v3", "mimo_v2_flash",
     "layer 0: expected full_attention, K 1 x 16, V 1 x 8, found full_attention, K 2 x 24, V 2 x 16"),
    ("qwen3_next", "lfm2", "layer 1: expected linear_attention, found full_attention, K 2 x 16, V 2 x 16"),
    ("falcon_h1", "gemma4_text",
     "layer 0: expected hybrid, K 2 x 16, V 2 x 16, found sliding_attention, window 130, K 2 x 16, V 2 x 16"),
    ("glm_moe_dsa", "deepseek_v3",  # of which older transformers cache keys and values of all heads
     f"layer 0: expected {geometry_of('glm_moe_dsa').layers[0]}, found full_attention, K 1 x 16, V 1 x 8"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "where"), covering(OTHERS, WHERE))
def test_a_preset_of_other_layers_is_rejected_with_the_first_that_differs(case, where):
    family, other, message = case
    with pytest.raises(BadArtefact) as error:
        create_cache_from_preset(preset_of(other), **told(family, where))
    assert str(error.value).startswith(f"preset for {other}: {message}, in the cache of {family}: ")


@pytest.mark.parametrize("where", sampled(WHERE, 2))
def test_other_windows_lengths_and_shapes(where):
    preset, how = preset_of("gemma3_text"), told("gemma3_text", where)
    shorter = preset | {"cache_layers": preset["cache_layers"][:2]}
    with pytest.raises(BadArtefact, match="key 'cache_layers': expected a list of 3, found 2"):
        create_cache_from_preset(shorter)
    with pytest.raises(BadArtefact, match="expected 3 layers, found 2"):
        create_cache_from_preset(shorter | {"num_layers": 2}, **how)
    preset["cache_layers"][1]["window"] = 200
    with pytest.raises(BadArtefact, match="layer 1: expected sliding_attention, window 130, .*, found .*, window 200"):
        create_cache_from_preset(preset, **how)
    for key, value in (("num_layers", 4), ("head_dim", 8)):
        with pytest.raises(BadArtefact, match=f"key '{key}': expected .* found {value}"):
            create_cache_from_preset(bare("gemma3_text") | {key: value, "rank": 8}, **how)


@pytest.mark.parametrize(("family", "where"), covering(["gemma3_text", "mistral", "qwen3_next", "falcon_h1"], WHERE))
def test_the_bare_form_gets_the_layers_of_the_model(family, where):
    cache = create_cache_from_preset(bare(family), **told(family, where))
    assert parse(bare(family)).says_layers is False
    slides = [layer.window for layer in geometry_of(family).layers if layer.window]
    found = [layer.sliding_window for layer in cache.layers if isinstance(layer, CompressedSlidingLayer)]
    assert found == slides
    assert not any(isinstance(layer, CompressedSlidingLayer) for layer in create_cache_from_preset(bare(family)).layers)
    feed(model_of(family), cache, ids_of(140))
    assert cache.get_seq_length() == 140
    for layer in (layer for layer in cache.compressed if layer.is_sliding):
        assert {len(store) for store in layer.stores.values()} == {layer.sliding_window - 1 + 11}


WRONG = [
    (0, {"k": None}, r"cache_layers\[0\].*'k' and 'v' of type sliding_attention"),
    (2, {"v": None}, r"cache_layers\[2\].*'k' and 'v' of type full_attention"),
    (1, {"window": None}, r"cache_layers\[1\]\.window': expected a number of tokens, found none"),
    *((1, {"window": value}, r"cache_layers\[1\]\.window") for value in (0, 1.5)),
    *((2, {"type": value}, r"cache_layers\[2\]\.type") for value in ("unheard_of", None)),
    (0, {"k": [2]}, r"cache_layers\[0\]\.k"),
    *((0, {"v": value}, r"cache_layers\[0\]\.v") for value in ([2, 0], [2, 10**6])),
    (0, {"states": 0}, r"cache_layers\[0\]\.states"), (0, {"colour": "red"}, r"cache_layers\[0\]"),
    *((1, key, r"cache_layers\[1\]" + (r"\.type|.*'type'" if key == "type" else ""))
      for key in ("k", "v", "window", "type")),
]  # fmt: skip


def test_what_is_no_layer_is_rejected_by_name():
    """Other values of its keys, or a key that is missing; and what is no list of layers."""
    for index, change, message in WRONG:
        preset = preset_of("gemma3_text")
        if isinstance(change, str):
            del preset["cache_layers"][index][change]
        else:
            preset["cache_layers"][index] |= change
        with pytest.raises(BadArtefact, match=message):
            create_cache_from_preset(preset)
    for wrong in ({}, [], "layers", 3, [None], [3]):
        with pytest.raises(BadArtefact, match="cache_layers"):
            create_cache_from_preset(preset_of("gemma3_text") | {"cache_layers": wrong})


def test_layers_that_keep_nothing_have_no_setting_and_states_dont_tell_them_apart():
    """Bytes of states depend on the dtype that a model was loaded in."""
    preset = preset_of("qwen3_next")
    one = preset["layers"]["v"]
    preset["layers"] = {"v": [None, None, one, one]}
    for layer in preset["cache_layers"]:
        layer["state_bytes"] = 7
    cache = create_cache_from_preset(preset, model=model_of("qwen3_next"))
    assert cache.layers[2].stores["V"].compressor.quantizer.bits == 4
    assert torch.isfinite(feed(model_of("qwen3_next"), cache, ids_of(9))).all()
    with pytest.raises(BadArtefact, match=r"layers\.v\[1\]: expected null for a layer of type linear_attention"):
        create_cache_from_preset(preset | {"layers": {"v": [None, one, one, one]}})
