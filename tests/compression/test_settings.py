"""Per-layer compression: plans, presets that carry one, and the choice of settings layer by layer."""

import json

import pytest
import torch
from tiny import tiny_loaded, word_text

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.compressed_cache import CompressedDynamicCache, IdentityCompressor, load_calibrated_compressors
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.schema import parse
from gpt2.compression.settings import Setting, build, needs_calibration_file, plan_record, uniform
from gpt2.text.sources import by_position

PROMPT = torch.arange(2, 42)[None]
INT4, INT8 = Setting("identity", 12, 4), Setting("identity", 12, 8)


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def made(llama):
    return calibrate(llama, by_position("words", "w", word_text(3000)), rank=6, samples=2, seq_len=48)


@pytest.fixture
def preset(tmp_path, made):
    return {
        "model": "tiny-llama", "rank": 6, "target": "v", "bits": 4, "head_dim": 12, "num_layers": 3,
        "calibration_file": str(save_calibration(made, tmp_path / "c.pt")),
    }  # fmt: skip


def shown(cache) -> dict[str, list[str]]:
    return {side: [repr(layer.stores[side].compressor) for layer in cache.layers] for side in ("K", "V")}


def test_the_guides_per_layer_snippet(llama, preset):
    k_comp, v_comp, metadata = load_calibrated_compressors(
        preset["calibration_file"], device=torch.device("cpu"), quantize_bits=8
    )
    for i in range(2):
        k_comp[i] = IdentityCompressor()
        v_comp[i] = IdentityCompressor()
    cache = CompressedDynamicCache(k_comp, v_comp, num_layers=metadata["num_layers"])
    out = llama.model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 44)
    assert shown(cache)["V"] == ["IdentityCompressor(none)"] * 2 + ["Compressor(int8, rank=6)"]
    plain = CompressedDynamicCache([IdentityCompressor()] * 3, [IdentityCompressor()] * 3)
    llama.model(out[:, :-1], past_key_values=plain)
    same = [
        torch.allclose(ours.stores["V"].read(), models.stores["V"].read(), atol=1e-4)
        for ours, models in zip(cache.layers, plain.layers, strict=True)
    ]
    assert same[0] and not same[2]


def test_a_preset_with_layers_mixes_them(llama, preset):
    layers = {
        "v": [None, {"codec": "ln_nullspace+pca", "rank": 5, "bits": 16}, {"codec": "identity", "rank": 12, "bits": 4}],
        "k": [{"codec": "pca", "rank": 11, "bits": 8}, None, {"codec": "ln_nullspace", "rank": None, "bits": 8}],
    }
    cache = create_cache_from_preset(preset | {"layers": layers}, model=llama)
    assert shown(cache) == {
        "V": ["IdentityCompressor(none)", "Compressor(none, rank=5)", "Compressor(int4)"],
        "K": ["Compressor(int8, rank=11)", "IdentityCompressor(none)", "Compressor(int8, rank=11)"],
    }
    out = llama.model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 44) and all(torch.isfinite(layer.stores["V"].read()).all() for layer in cache.layers)


def test_a_side_that_layers_leave_out_stays_as_it_is(preset):
    cache = create_cache_from_preset(preset | {"layers": {"v": [None, None, {"codec": "pca", "rank": 4, "bits": 4}]}})
    assert shown(cache)["K"] == ["IdentityCompressor(none)"] * 3
    assert shown(cache)["V"][2] == "Compressor(int4, rank=4)"


def test_layers_that_need_no_calibration_need_no_file(preset):
    layers = {"v": [{"codec": "identity", "rank": 12, "bits": 4}] * 3}
    create_cache_from_preset(preset | {"calibration_file": "", "layers": layers})
    with pytest.raises(PluginError, match="Calibration file not found"):
        create_cache_from_preset(preset | {"calibration_file": "nowhere.pt", "layers": layers | {"k": [None] * 2 + [
            {"codec": "pca", "rank": 4, "bits": 16}]}})  # fmt: skip


SOME = {"codec": "pca", "rank": 4, "bits": 8}
BAD_LAYERS = [
    ([SOME] * 3, "key 'layers': expected an object"),
    ({}, "key 'layers': expected an object"),
    ({"q": [SOME] * 3}, "key 'layers': expected an object"),
    ({"v": [SOME] * 2}, "key 'layers.v': expected a list of 3 entries, found 2"),
    ({"v": "all"}, "key 'layers.v': expected a list of 3 entries, found str"),
    ({"v": [SOME, SOME, 4]}, r"layers.v\[2\]: expected null or codec, rank and bits, found 4"),
    ({"v": [SOME, {"codec": "pca"}, SOME]}, r"layers.v\[1\]: expected null or codec, rank and bits"),
    ({"v": [SOME | {"rank": 13}, SOME, SOME]}, r"layers.v\[0\]: key 'rank': expected 1 to head_dim 12, found 13"),
    ({"v": [SOME | {"rank": 0}, SOME, SOME]}, r"layers.v\[0\]: key 'rank': .*found 0"),
    ({"v": [SOME | {"rank": {}}, SOME, SOME]}, r"layers.v\[0\]: key 'rank': .*found {}"),
    ({"v": [SOME | {"bits": 5}, SOME, SOME]}, r"layers.v\[0\]: key 'bits': expected 4 or 8 or 16, found 5"),
    ({"v": [SOME | {"codec": "pac"}, SOME, SOME]}, r"layers.v\[0\]: key 'codec': .*did you mean 'pca'"),
    ({"k": [SOME | {"codec": "ln_nullspace", "rank": 12}, None, None]}, r"layers.k\[0\]: key 'rank': expected 1 to 11"),
    ({"v": [SOME | {"codec": ["pca"]}, SOME, SOME]}, r"layers.v\[0\]: key 'codec'"),
]


@pytest.mark.parametrize(("layers", "message"), BAD_LAYERS)
def test_absurd_layers_are_named(preset, layers, message):
    with pytest.raises(BadArtefact, match=message):
        create_cache_from_preset(preset | {"layers": layers})


def test_plan_records_come_back_the_same(preset):
    plan = uniform("kv", 3, Setting("pca", 7, 8), layers=[1]) | {"k": [INT4, None, INT8]}
    again = parse(preset | {"layers": json.loads(json.dumps(plan_record(plan)))}).plan
    assert again == plan and needs_calibration_file(plan) and not needs_calibration_file(uniform("v", 3, INT4))


def test_a_named_quantizer_comes_back_and_others_keep_their_record(preset):
    plan = uniform("v", 3, Setting("pca", 7, 3.5, "mixed"), layers=[1]) | {"k": [INT4, None, None]}
    record = json.loads(json.dumps(plan_record(plan)))
    assert record["v"][1] == {"codec": "pca", "rank": 7, "bits": 3.5, "quantizer": "mixed"}
    assert record["k"][0] == {"codec": "identity", "rank": 12, "bits": 4}, "as older versions read it"
    assert parse(preset | {"layers": record}).plan == plan
    cache = create_cache_from_preset(preset | {"layers": record})
    assert shown(cache)["V"][1] == "Compressor(mixed, rank=7)"
    assert cache.layers[1].stores["V"].compressor.quantizer.bits == 3.5


@pytest.mark.parametrize(
    ("setting", "text"),
    [(Setting("pca", 7, 8), "pca rank 7, 8 bits"), (Setting("pca", 7, 3.5, "mixed"), "pca rank 7, 3.5 bits mixed"),
     (Setting("joint", 12, 3, "mixed"), "joint, 3 bits mixed"), (INT4, "identity, 4 bits")],
)  # fmt: skip
def test_a_setting_says_what_it_is(setting, text):
    assert str(setting) == text


def test_a_calibrated_codec_without_a_calibration_is_named():
    with pytest.raises(PluginError, match="layer 1, V: codec pca needs a calibration"):
        build(uniform("v", 3, Setting("pca", 4), layers=[1]), head_dim=12)
