"""Caches made from presets: by dict and by path, with the preset's settings in each layer, and presets that are new."""

import pytest
import torch
from presets import PRESET, compressors, write
from sampling import covering, sampled
from tiny import tiny_loaded

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.presets import build, create_cache_from_preset, load_preset
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.compression.presets.preset_files import read_preset
from gpt2.compression.presets.schema import GUIDE_KEYS
from gpt2.models.geometry import Geometry

PROMPT = torch.arange(2, 32)[None]
IDENTITY = "IdentityCompressor(none)"


@pytest.fixture
def preset(space, calibration):
    """A preset whose calibration is given by its full path."""
    return PRESET | {"calibration_file": str(save_calibration(calibration, space / "elsewhere" / "c.pt"))}


def test_from_a_dict_a_path_and_a_parsed_preset(space, preset):
    """Fresh caches, which share their compressors; overrides replace the preset's windows."""
    path, expected = write(space / "p.json", preset), {"K": [IDENTITY] * 3, "V": ["Compressor(int8, rank=9)"] * 3}
    made = [create_cache_from_preset(form) for form in (preset, path, space / "p.json", load_preset(path))]
    made.append(create_cache_from_preset(read_preset(path)))
    for cache in made:
        assert compressors(cache) == expected, "rank from the preset, not the calibration's default"
        assert cache.layers[0].stores["V"].compressor is made[0].layers[0].stores["V"].compressor
    own = {"sink_tokens": 2, "recent_tokens": 3}
    for overrides in ({}, {"sink_tokens": 0}, {"recent_tokens": 7}):
        store = create_cache_from_preset(preset | own, **overrides).layers[1].stores["V"]
        assert {"sink_tokens": store.sink_tokens, "recent_tokens": store.recent_tokens} == own | overrides
    with pytest.raises(PluginError, match="unknown sinks"):
        create_cache_from_preset(preset, sinks=3)


@pytest.mark.parametrize(("target", "codec"), covering(["v", "k", "kv"], ["pca", "identity"]))
@torch.no_grad()
def test_only_the_target_changes(llama, preset, target, codec):
    """The other side is bit for bit what the model made: in layer 0 nothing upstream differs yet."""
    cache = create_cache_from_preset(preset | {"target": target, "codec": codec, "bits": 4})
    exact = create_cache_from_preset(preset | {"codec": "identity", "bits": 16})
    for c in (cache, exact):
        llama.model(PROMPT, past_key_values=c)
    for side in ("K", "V"):
        ours, models = (c.layers[0].stores[side].read() for c in (cache, exact))
        assert torch.equal(ours, models) == (side.lower() not in target)
        assert torch.equal(ours[:, :, :4], models[:, :, :4]), "sinks are exact on both sides"


DTYPES = [(bits, dtype) for bits in (16, 8, 4) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("bits", "dtype"), sampled(DTYPES, 3))
def test_generation_with_it(preset, bits, dtype):
    """Also with a model in another dtype than the one that was calibrated."""
    model = tiny_loaded("llama").model.to(dtype)
    cache = create_cache_from_preset(preset | {"target": "kv", "bits": bits})
    out = model.generate(PROMPT, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 36) and torch.equal(out[:, :30], PROMPT)
    read = cache.layers[2].stores["K"].read()
    assert read.dtype == dtype and torch.isfinite(read).all()


def test_layers_mix_settings(llama, preset):
    layers = {
        "v": [None, {"codec": "ln_nullspace+pca", "rank": 5, "bits": 16}, {"codec": "identity", "rank": 12, "bits": 4}],
        "k": [{"codec": "pca", "rank": 11, "bits": 8}, None, {"codec": "ln_nullspace", "rank": None, "bits": 8}],
    }
    cache = create_cache_from_preset(preset | {"layers": layers}, model=llama)
    assert compressors(cache) == {
        "V": [IDENTITY, "Compressor(none, rank=5)", "Compressor(int4)"],
        "K": ["Compressor(int8, rank=11)", IDENTITY, "Compressor(int8, rank=11)"],
    }
    out = llama.model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 34) and all(torch.isfinite(layer.stores["V"].read()).all() for layer in cache.layers)
    for quantizer, bits in (("mixed", 3.5), ("int4", 4)):
        cache = create_cache_from_preset(preset | {"quantizer": quantizer, "bits": bits})
        found = cache.layers[1].stores["V"].compressor.quantizer
        assert (found.name, found.bits) == (quantizer, bits)


def test_codecs_that_need_no_calibration_need_no_file(space):
    layers = {"v": [{"codec": "identity", "rank": 12, "bits": 4}] * 3}
    for without in ({"codec": "identity", "bits": 4}, {"layers": layers}):
        cache = create_cache_from_preset(PRESET | {"calibration_file": ""} | without)
        assert compressors(cache)["V"] == ["Compressor(int4)"] * 3
    with pytest.raises(PluginError, match="Calibration file not found"):
        one = {"codec": "pca", "rank": 4, "bits": 16}
        create_cache_from_preset(PRESET | {"layers": layers | {"k": [None, None, one]}})


def test_a_new_preset_is_read_back_from_its_file(space, llama, calibration):
    measured = {"baseline_ppl": 20.12345678, "ppl": 21.0, "ppl_delta": 0.0435}
    found = {"target": "v", "rank": 9, "bits": 8, "codec": "pca", "sink_tokens": 2}
    preset = build.new_preset(llama, calibration, "c.pt", compression_ratio=1.23456, measured=measured, **found)
    assert set(GUIDE_KEYS) <= set(preset) and preset["compressed_ppl"] == 21.0 and preset["compression_ratio"] == 1.2346
    assert load_preset(files.write_json(space / "p.json", preset)).items() >= preset.items()
    words = "--model tiny-llama --rank 6 --samples 2 --seq-len 48 --seed 0 --sink-tokens 4 --text words.txt"
    assert f"{words} --output results/calibrations/c.pt" in preset["made_by"]


@pytest.mark.parametrize(("given", "message"), [
    ({"device": "cuda:99"}, "device 'cuda:99' can't be used .*: give 'cpu'"),
    ({"device": "tpu"}, "device 'tpu' can't be used"),
    *(({"sink_tokens": value}, "sink_tokens: expected a number of tokens") for value in ("4", 2.5, True, None, [4])),
    ({"recent_tokens": "4"}, "recent_tokens: expected a number of tokens, got '4'"),
    ({"model": "smollm2-135m"}, "model: expected a loaded model, not its name or folder: .*, got 'smollm2-135m'"),
    ({"config": {}}, "config: expected a model's config"), ({"geometry": 3}, "geometry: expected the layers of"),
    ({"dtype": "float32"}, "dtype: expected a dtype of PyTorch, such as torch.float32, got 'float32'"),
])  # fmt: skip
def test_arguments_of_another_kind_are_rejected(given, message):
    with pytest.raises(PluginError, match=message):
        create_cache_from_preset(PRESET | {"codec": "identity", "calibration_file": ""}, **given)


def test_a_callers_model_stays_as_it_was(preset):
    """In training mode where it is, and with the same parameters that learn."""
    model = tiny_loaded("llama").model
    model.train()
    model.lm_head.eval()
    model.lm_head.requires_grad_(True)
    learning = [parameter.requires_grad for parameter in model.parameters()]
    create_cache_from_preset(preset_for_any_model("kv4", "llama", Geometry.uniform(3, 2, 12)), model=model)
    assert model.training and model.model.training and not model.lm_head.training
    assert [parameter.requires_grad for parameter in model.parameters()] == learning and any(learning)
