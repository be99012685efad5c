"""Presets that say what each layer of the cache is, and the guide's bare form, which leaves it to a model or config."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from kinds import KINDS, feed, geometry_of, ids_of, model_of
from presets import PRESET

from gpt2.common.errors import BadArtefact
from gpt2.compression.cache.layers import CompressedSlidingLayer
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.compression.presets.schema import parse
from gpt2.models.loading import wrap

WHERE = ["model", "config", "loaded"]


def preset_of(family: str, name: str = "kv4") -> dict:
    return preset_for_any_model(name, family, geometry_of(family))


def told(family: str, where: str) -> dict:
    """What tells the layers: a model, a config, or a model as scripts load it."""
    model = model_of(family)
    return {
        "model": lambda: {"model": model},
        "config": lambda: {"config": model.config},
        "loaded": lambda: {"model": wrap(model, None, family)},
    }[where]()


def bare(family: str) -> dict:
    """The guide's keys alone."""
    keys = ("num_layers", "head_dim")
    return PRESET | {key: getattr(geometry_of(family), key) for key in keys} | {
        "model": family, "rank": geometry_of(family).head_dim, "codec": "identity", "calibration_file": "",
    }  # fmt: skip


@pytest.mark.parametrize("family", KINDS)
def test_layers_go_through_json_and_make_a_cache_that_runs(family):
    preset = preset_of(family)
    back = json.loads(json.dumps(preset))
    assert parse(back).geometry == geometry_of(family) and parse(back).says_layers == ("cache_layers" in preset)
    assert parse(parse(back).record).record == parse(back).record, "a record says all there is"
    assert back["cache_layers"] == geometry_of(family).record()
    cache = create_cache_from_preset(back)
    logits = [feed(model_of(family), cache, x) for x in ids_of(150).split([140, 1, 9], dim=1)]
    assert all(x.isfinite().all() for x in logits) and cache.get_seq_length() == 150
    assert [type(layer) for layer in cache.layers] == [
        type(layer) for layer in create_cache_from_preset(back, model=model_of(family)).layers
    ]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("family", "other", "message"),
    [
        ("gemma3_text", "gemma3n_text", "expected 3 layers, found 6"),
        ("deepseek_v3", "mimo_v2_flash", "layer 0: expected full_attention, K 1 x 16, V 1 x 8, "
         "found full_attention, K 2 x 24, V 2 x 16"),
        ("qwen3_next", "lfm2", "layer 1: expected linear_attention, found full_attention, K 2 x 16, V 2 x 16"),
        ("falcon_h1", "gemma4_text", "layer 0: expected hybrid, K 2 x 16, V 2 x 16, found sliding_attention, "
         "window 130, K 2 x 16, V 2 x 16"),
        ("glm_moe_dsa", "deepseek_v3", "layer 0: expected indexed_attention, K 1 x 16, V 1 x 8, "
         "found full_attention, K 1 x 16, V 1 x 8"),
    ],
)  # fmt: skip
def test_a_preset_of_other_layers_is_rejected_with_the_first_that_differs(family, other, message, where):
    with pytest.raises(BadArtefact) as error:
        create_cache_from_preset(preset_of(other), **told(family, where))
    assert str(error.value).startswith(f"preset for {other}: {message}, in the cache of {family}: ")


@pytest.mark.parametrize("where", WHERE)
def test_another_window_is_another_layer(where):
    preset = preset_of("gemma3_text")
    preset["cache_layers"][1]["window"] = 200
    with pytest.raises(BadArtefact, match="layer 1: expected sliding_attention, window 130, .*, found .*, window 200"):
        create_cache_from_preset(preset, **told("gemma3_text", where))


@pytest.mark.parametrize("where", WHERE)
def test_a_list_of_another_length(where):
    preset = preset_of("gemma3_text")
    shorter = preset | {"cache_layers": preset["cache_layers"][:2]}
    with pytest.raises(BadArtefact, match="key 'cache_layers': expected a list of 3, found 2"):
        create_cache_from_preset(shorter)
    with pytest.raises(BadArtefact, match="expected 3 layers, found 2"):
        create_cache_from_preset(shorter | {"num_layers": 2}, **told("gemma3_text", where))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "qwen3_next", "falcon_h1"])
def test_the_bare_form_gets_the_layers_of_the_model(family, where):
    cache = create_cache_from_preset(bare(family), **told(family, where))
    assert parse(bare(family)).says_layers is False
    slides = [layer.window for layer in geometry_of(family).layers if layer.window]
    found = [layer.sliding_window for layer in cache.layers if isinstance(layer, CompressedSlidingLayer)]
    assert found == slides
    assert not any(isinstance(layer, CompressedSlidingLayer) for layer in create_cache_from_preset(bare(family)).layers)
    model, ids = model_of(family), ids_of(140)
    feed(model, cache, ids)
    assert cache.get_seq_length() == 140
    for layer in cache.compressed:
        if layer.is_sliding:
            assert {len(store) for store in layer.stores.values()} == {layer.sliding_window - 1 + 11}


@pytest.mark.parametrize(("key", "value"), [("num_layers", 4), ("head_dim", 8)])
@pytest.mark.parametrize("where", WHERE)
def test_the_bare_form_of_another_shape(key, value, where):
    preset = bare("gemma3_text") | {key: value, "rank": 8}
    with pytest.raises(BadArtefact, match=f"key '{key}': expected .* found {value}"):
        create_cache_from_preset(preset, **told("gemma3_text", where))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {"k": None}, r"cache_layers\[0\].*'k' and 'v' of type sliding_attention"),
        (2, {"v": None}, r"cache_layers\[2\].*'k' and 'v' of type full_attention"),
        (1, {"window": None}, r"cache_layers\[1\]\.window': expected a number of tokens, found none"),
        (1, {"window": 0}, r"cache_layers\[1\]\.window"),
        (1, {"window": 1.5}, r"cache_layers\[1\]\.window"),
        (2, {"type": "unheard_of"}, r"cache_layers\[2\]\.type"),
        (2, {"type": None}, r"cache_layers\[2\]\.type"),
        (0, {"k": [2]}, r"cache_layers\[0\]\.k"),
        (0, {"v": [2, 0]}, r"cache_layers\[0\]\.v"),
        (0, {"v": [2, 10**6]}, r"cache_layers\[0\]\.v"),
        (0, {"states": 0}, r"cache_layers\[0\]\.states"),
        (0, {"colour": "red"}, r"cache_layers\[0\]"),
    ],
)
def test_what_is_no_layer_is_rejected_by_name(index, change, message):
    preset = copy.deepcopy(preset_of("gemma3_text"))
    preset["cache_layers"][index] |= change
    with pytest.raises(BadArtefact, match=message):
        create_cache_from_preset(preset)


@pytest.mark.parametrize("gone", ["k", "v", "window", "type"])
def test_a_layer_without_a_key_is_rejected_by_name(gone):
    preset = copy.deepcopy(preset_of("gemma3_text"))
    del preset["cache_layers"][1][gone]
    with pytest.raises(BadArtefact, match=r"cache_layers\[1\]" + (r"\.type|.*'type'" if gone == "type" else "")):
        create_cache_from_preset(preset)


@pytest.mark.parametrize("wrong", [{}, [], "layers", 3, [None], [3]])
def test_what_is_no_list_of_layers(wrong):
    with pytest.raises(BadArtefact, match="cache_layers"):
        create_cache_from_preset(preset_of("gemma3_text") | {"cache_layers": wrong})


def test_a_setting_for_a_layer_that_keeps_nothing_is_rejected():
    preset = preset_of("qwen3_next")
    one = preset["layers"]["v"]
    preset["layers"] = {"v": [None, None, one, one]}
    assert create_cache_from_preset(preset).layers[2].stores["V"].compressor.quantizer.bits == 4
    with pytest.raises(BadArtefact, match=r"layers\.v\[1\]: expected null for a layer of type linear_attention"):
        create_cache_from_preset(preset | {"layers": {"v": [None, one, one, one]}})


def test_states_and_indexers_do_not_tell_layers_apart():
    """Their bytes depend on the dtype that a model was loaded in."""
    preset = preset_of("qwen3_next")
    for layer in preset["cache_layers"]:
        layer["state_bytes"] = 7
    cache = create_cache_from_preset(preset, model=model_of("qwen3_next"))
    assert torch.isfinite(feed(model_of("qwen3_next"), cache, ids_of(9))).all()
