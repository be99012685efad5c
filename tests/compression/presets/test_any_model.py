"""Presets that any model has, made from its config alone: `kv8` and `kv4`."""

import json

import pytest
import torch
from sampling import covering, sampled
from tiny import FAMILIES, tiny_loaded, tiny_model, windows
from transformers import AutoConfig

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import compression_ratio
from gpt2.compression.named_caches import from_preset
from gpt2.compression.presets import create_cache_from_preset, get_preset_info, load_preset, preset_files
from gpt2.compression.presets.any_model import ANY_MODEL
from gpt2.compression.presets.build import preset_for_shape
from gpt2.compression.presets.preset_files import resolve_preset
from gpt2.compression.presets.schema import parse
from gpt2.models import loading, probe
from gpt2.models.geometry import Geometry

PROMPT = torch.arange(2, 32)[None]


def folder_of(space, family: str = "llama", **overrides) -> str:
    """A tiny model's config alone, without weights or tokenizer."""
    AutoConfig.for_model(family, **FAMILIES[family] | overrides).save_pretrained(space / "config-only")
    return str(space / "config-only")


@pytest.mark.parametrize(("family", "name"), sampled([(family, name) for family in FAMILIES for name in ANY_MODEL], 3))
def test_a_folder_with_a_config_is_enough(space, family, name):
    folder, model = folder_of(space, family), tiny_model(family)
    preset = get_preset_info(folder, name)
    shape = probe.probe_geometry(model, family)
    assert (preset["num_layers"], preset["head_dim"]) == (shape.num_layers, shape.head_dim)
    assert preset["model"] == folder and preset["name"] == name and preset["target"] == "kv"
    out = model.generate(PROMPT.repeat(1, 4), past_key_values=create_cache_from_preset(preset), max_new_tokens=4)
    assert out.shape == (1, 124)
    back = load_preset(files.write_json(space / "mine.json", preset))
    assert back.items() >= preset.items() and parse(back).plan == parse(preset).plan


def test_its_figures_are_unknown_but_for_the_ratio_which_is_exact(space):
    preset = get_preset_info(folder_of(space), "kv4")
    assert [preset.get(key) for key in ("baseline_ppl", "compressed_ppl", "ppl_delta")] == [None] * 3
    measured = compression_ratio(lambda: create_cache_from_preset(preset), Geometry.uniform(3, 2, 12))
    assert preset["compression_ratio"] == pytest.approx(measured, abs=1e-4) and measured > 2.5
    for d in sampled([128, 64, 80, 96], 1):
        folder = folder_of(space, head_dim=d, num_key_value_heads=1)
        kv8, kv4 = (get_preset_info(folder, name)["compression_ratio"] for name in ("kv8", "kv4"))
        assert 1.85 < kv8 < 2 and kv4 >= 3.6
    for window, least, most in ((8, 1, 1), (128, 2.5, 3.7)):  # which transformers keeps of it
        folder = folder_of(space, "mistral", sliding_window=window)
        assert least <= get_preset_info(folder, "kv4")["compression_ratio"] <= most


def test_models_that_are_not_here_or_not_supported(space):
    with pytest.raises(PluginError) as at_loading:
        loading.load("no-such-org/no-such-model", "cpu")
    for name in ANY_MODEL:
        with pytest.raises(PluginError, match="^can't load model 'no-such-org/no-such-model'") as asking:
            get_preset_info("no-such-org/no-such-model", name)
        assert str(asking.value) == str(at_loading.value) and "\n" not in str(asking.value)
    AutoConfig.for_model("t5").save_pretrained(space / "t5")
    with pytest.raises(PluginError, match="encoder-decoder"):
        get_preset_info(str(space / "t5"), "kv4")


def test_a_models_own_preset_of_that_name_wins(space):
    folder, loaded = folder_of(space), tiny_loaded("llama")
    own = get_preset_info(folder, "kv4") | {"model": loaded.spec, "ppl_delta": 0.0123}
    files.write_json(preset_files.BUILT_IN[0] / "own.json", own)
    for found in (get_preset_info(loaded.spec, "kv4"), resolve_preset("kv4", loaded).record):
        assert found["ppl_delta"] == 0.0123
    assert resolve_preset("kv8", loaded).record["name"] == "kv8", "the other is still made"
    assert resolve_preset("kv4", tiny_loaded("qwen2")).record.get("ppl_delta") is None, "it is no other model's"


def test_on_loaded_models_and_shapes_without_weights(space):
    """Without a config file."""
    gpt2 = tiny_loaded("gpt2")
    choice = from_preset("kv4", gpt2)
    assert choice.label == "kv4" and json.loads(json.dumps(choice.record()))["model"] == gpt2.spec
    assert len(choice.make().layers) == 3
    loaded = tiny_loaded("llama", num_hidden_layers=2)
    loaded.random_weights = True
    for name in ANY_MODEL:
        choice = from_preset(name, loaded)
        assert choice.label == name and "compression_ratio" not in choice.record()
        out = loaded.model.generate(PROMPT, past_key_values=choice.make(), max_new_tokens=3)
        assert out.shape == (1, 33)
    moved = preset_for_shape(choice.preset, tiny_loaded("llama", num_hidden_layers=5, hidden_size=80)).plan
    assert {setting.rank for side in moved.values() for setting in side} == {20}
    assert {side: len(settings) for side, settings in moved.items()} == {"k": 5, "v": 5}


# Odd head dims, and prompts shorter than a block
@pytest.mark.parametrize(
    ("name", "shape", "prompt"),
    covering(["kv4", "kv8"], [("qwen3", 30), ("gemma3_text", 22), ("llama", 6)], [50, 3, 130]),
)
def test_what_is_compressed_of_a_batch(space, name, shape, prompt):
    """By channel nothing is before a block is full; values by token are, after the sinks."""
    family, overrides = shape[0], {"head_dim": shape[1], "num_hidden_layers": 2}
    model, tokens = tiny_model(family, **overrides), windows(3, prompt)
    cache = create_cache_from_preset(get_preset_info(folder_of(space, family, **overrides), name))
    new = 66 - prompt if prompt < 60 else 5
    out = model.generate(tokens, past_key_values=cache, max_new_tokens=new, do_sample=False)
    assert out.shape == (3, prompt + new) and cache.get_seq_length() == prompt + new - 1
    agreed = 63 if name == "kv4" else prompt
    plain = model.generate(tokens, max_new_tokens=max(agreed - prompt, 1), do_sample=False)
    assert torch.equal(out[:, :agreed], plain[:, :agreed])


@torch.no_grad()
def test_more_bits_are_closer_to_the_model(space):
    loaded, tokens = tiny_loaded("llama"), windows(2, 256)
    plain = loaded.model(tokens).logits

    def error(name: str) -> float:
        cache = from_preset(name, loaded).make()
        loaded.model(tokens[:, :192], past_key_values=cache)
        return (loaded.model(tokens[:, 192:], past_key_values=cache).logits - plain[:, 192:]).abs().mean().item()

    kv8, kv4 = error("kv8"), error("kv4")
    assert 0 < kv8 < 0.2 * kv4
