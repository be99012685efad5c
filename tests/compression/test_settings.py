"""Settings of each layer: plans, their records in presets, and the compressors that are built of them."""

import json

import pytest
import torch
from calibrations import TEXT
from layer_shapes import MODELS, lost, made, model_of, vectors
from presets import PRESET
from sampling import covering, sampled

from gpt2.common.errors import PluginError
from gpt2.compression.cache import dynamic_cache
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.stand_in import stand_in
from gpt2.compression.codecs import BASES, QUANTIZERS, multi_head_bases
from gpt2.compression.presets.schema import parse
from gpt2.compression.settings import Setting, build, compressors_for, needs_calibration_file, plan_record, uniform
from gpt2.models.geometry import FULL, LINEAR, Geometry, LayerGeometry, Shape

INT4, INT8 = Setting("identity", 12, 4), Setting("identity", 12, 8)


def test_plans_come_back_from_their_records():
    plans = (
        uniform("kv", 3, Setting("pca", 7, 8), layers=[1]) | {"k": [INT4, None, INT8]},
        uniform("v", 3, Setting("pca", 7, 3.5, "mixed"), layers=[1]) | {"k": [INT4, None, None]},
    )
    for plan in plans:
        assert parse(PRESET | {"layers": json.loads(json.dumps(plan_record(plan)))}).plan == plan
        assert needs_calibration_file(plan)
    assert not needs_calibration_file(uniform("v", 3, INT4))
    record = plan_record(plans[1])
    assert record["v"][1] == {"codec": "pca", "rank": 7, "bits": 3.5, "quantizer": "mixed"}
    assert record["k"][0] == {"codec": "identity", "rank": 12, "bits": 4}, "as older versions read it"


def test_a_setting_as_text_and_without_its_calibration():
    settings = Setting("pca", 7, 8), Setting("pca", 7, 3.5, "mixed"), Setting("joint", 12, 3, "mixed"), INT4
    texts = ["pca rank 7, 8 bits", "pca rank 7, 3.5 bits mixed", "joint, 3 bits mixed", "identity, 4 bits"]
    assert list(map(str, settings)) == texts
    with pytest.raises(PluginError, match="layer 1, V: codec pca needs a calibration"):
        build(uniform("v", 3, Setting("pca", 4), layers=[1]), Geometry.uniform(3, 2, 12))


# --- compressors of models whose layers differ: each in its own shape, and bits where they count

MIXED = QUANTIZERS["mixed"]
SETTINGS = {
    "rotated": (Setting("pca"), 1e-4),
    "pca, 8 bits": (Setting("pca", None, 8), 0.05),
    "hadamard, 8 bits": (Setting("hadamard", None, 8, "int8_channel"), 0.02),
    "identity, 8 bits": (Setting(bits=8), 0.02),
    "grouped": (Setting("grouped"), 1e-3),
    "grouped, 8 bits": (Setting("grouped", None, 8, "mixed"), 0.06),
    "grouped, 8 bits, fixed": (Setting("grouped", None, 8, "mixed_fixed"), 0.1),
    "joint": (Setting("joint"), 1e-3),
    "joint, 8 bits": (Setting("joint", None, 8, "mixed"), 0.06),
}


def most_lost(k, v, family: str) -> float:
    """The largest relative error of any layer's K and V, or of both together."""
    errors = []
    for layer, (keys, values) in vectors(family).items():
        if k[layer].joint:
            assert k[layer] is v[layer]
            errors.append(lost(k[layer], torch.cat((keys, values), dim=1)))
        else:
            errors += [lost(k[layer], keys), lost(v[layer], values)]
    return max(errors)


@pytest.mark.parametrize(("name", "family"), covering(SETTINGS, MODELS))
def test_compressors_of_every_layer(family, name, tmp_path):
    calibration = load_calibration(save_calibration(made(family), tmp_path / "c.pt"))
    geometry, (setting, most) = calibration.geometry, SETTINGS[name]
    if setting.codec in multi_head_bases() and setting.codec not in calibration.multi_head:
        with pytest.raises(PluginError, match=r"layer 0: codec joint needs K and V of one shape, got .*: use grouped"):
            compressors_for("kv", setting.bits, None, calibration, codec="joint", quantizer=setting.quantizer)
        return
    calibration.meta["rank"] = 1024  # all coordinates of every layer
    k, v = compressors_for("kv", setting.bits, None, calibration, codec=setting.codec, quantizer=setting.quantizer)
    assert [c is None for c in k] == [c is None for c in v] == [not layer.attends for layer in geometry.layers]
    assert most_lost(k, v, family) < most
    for layer, (keys, _) in vectors(family).items():
        assert k[layer].rank(keys.shape[-1]) % keys.shape[-1] == 0, "all coordinates of its own width"


def test_only_layers_with_k_and_v_have_settings():
    geometry = model_of("qwen3_next").geometry
    setting = Setting(bits=8)
    assert uniform("kv", geometry, setting) == {side: [None, None, setting, setting] for side in "kv"}
    assert uniform("v", 2, setting) == {"k": [None, None], "v": [setting, setting]}
    k, v = build({"k": [None] * 4, "v": [None] * 4}, geometry)
    assert k[:2] == v[:2] == [None, None] and all(c.exact for c in (*k[2:], *v[2:]))
    with pytest.raises(PluginError, match=r"layer 1: it keeps no K and V \(linear_attention\)"):
        build({"k": [None] * 4, "v": [None, setting, None, None]}, geometry)
    with pytest.raises(PluginError, match="the plan has 2 and 2 settings of K and V, but the cache has 4 layers"):
        build({"k": [None] * 2, "v": [None] * 2}, geometry)


def test_a_rank_that_a_layer_is_too_narrow_for_is_named():
    calibration = made("gemma4_text")
    with pytest.raises(PluginError, match="layer 0, K: rank 16 is out of range: codec pca has 8 coordinates there"):
        compressors_for("kv", 16, None, calibration, rank=16, codec="pca")
    k, _ = compressors_for("kv", 16, None, calibration, rank=16, codec="pca", layers=[1])
    assert k[0].exact and k[1].transform.rank == 16
    with pytest.raises(PluginError, match="layer 0, V: rank 9 is out of range: codec hadamard"):
        build(uniform("v", calibration.geometry, Setting("hadamard", 9)), calibration.geometry)


def test_layers_of_one_width_share_a_fixed_transform():
    layers = [LayerGeometry(FULL, Shape(2, width), Shape(2, width)) for width in (8, 16, 8)]
    k, v = build(uniform("kv", geometry := Geometry(tuple(layers)), Setting("hadamard", None, 8)), geometry)
    assert k[0] is k[2] is v[0] and k[1] is v[1] and k[1].transform.rank == 16


def test_joint_where_k_and_v_differ_is_rejected_layer_by_layer():
    calibration = made("deepseek_v3")
    message = "layer 0: codec joint needs K and V of one shape, got 1 x 16 and 1 x 8: use grouped"
    with pytest.raises(PluginError, match=message):
        calibrate(model_of("deepseek_v3"), TEXT, rank=4, codec="joint", samples=2, seq_len=80)
    with pytest.raises(PluginError, match=message):
        calibration.transform("k", 2, None, "joint")
    with pytest.raises(PluginError, match=message.replace("layer 0", "layer 2")):
        build(uniform("kv", calibration.geometry, Setting("joint"), layers=[2]), calibration.geometry, calibration)


def test_calibrations_on_noise_for_models_without_weights():
    for family in sampled(MODELS, 2):
        calibration = stand_in(model_of(family))
        assert calibration.geometry == model_of(family).geometry
        for codec in ("pca", *calibration.multi_head):
            framed = codec == "framed"  # its keys are coded in blocks, which takes a quantizer of blocks
            bits, quantizer, bound = (10, "mixed", 1e-2) if framed else (16, None, 1e-3)
            k, v = compressors_for("kv", bits, None, calibration, codec=codec, quantizer=quantizer)
            assert most_lost(k, v, family) < bound, codec
        bits = [own.quantizer(MIXED.at(3.0), layer).bits for own in calibration.multi_head.values()
                for layer in calibration.geometry.attention]  # fmt: skip
        assert all(1 < b < 5 for b in bits)


def test_groups_of_heads_are_chosen_layer_by_layer():
    layers = (LayerGeometry(FULL, Shape(4, 192), Shape(4, 128)), LayerGeometry(LINEAR),
              LayerGeometry(FULL, Shape(1, 512), Shape(1, 64)))  # fmt: skip
    bases = BASES["grouped"].shape(Geometry(layers)).layers
    assert [base.k for base in bases] == [
        Shape(4, 192), Shape(2, 256), None, None, Shape(1, 512), Shape(1, 64),
    ]  # fmt: skip
    assert BASES["joint"].shape(Geometry.uniform(2, 8, 128)) == Geometry.uniform(2, 4, 512)


# --- bits where they count


def test_windowed_layers_get_more_bits_at_a_context_length():
    calibration = made("mimo_v2_flash")
    assert [layer.window for layer in calibration.geometry.layers] == [None, 16]

    def bits(context_length: int | None) -> list[float]:
        k, v = compressors_for(
            "kv", 3, None, calibration, codec="grouped", quantizer="mixed", context_length=context_length
        )
        return [c.quantizer.bits for layer in (0, 1) for c in (k[layer], v[layer])]

    alike, short, long = bits(None), bits(10), bits(2000)
    assert alike == short, "no layer has forgotten a token"
    assert sum(long[2:]) > sum(alike[2:]) and sum(long[:2]) <= sum(alike[:2]) + 1e-9


def test_beyond_the_positions_of_a_calibration_bases_of_cached_keys_are_said_once_to_hold_less(calibration, caplog):
    """In PCA as in every basis of keys as they are cached; V has no positions, and some bases take them off keys."""
    assert {name for name, basis in BASES.items() if basis.calibrated and not basis.bound_to_positions} == {
        name for name, basis in multi_head_bases().items() if basis.unrotated
    }
    dynamic_cache.warn_beyond_calibration.cache_clear()

    def fed(target: str, tokens: int) -> CompressedDynamicCache:
        cache = CompressedDynamicCache(*compressors_for(target, 8, None, calibration))
        for _ in range(tokens):
            for layer, own in enumerate(calibration.geometry.layers):
                cache.update(*torch.randn(2, 1, own.k.heads, 1, own.k.width), layer)
        return cache

    fed("v", 50), fed("kv", 48)
    assert not caplog.records
    fed("kv", 50), fed("k", 50)
    (record,) = caplog.records
    assert "calibrated on texts of 48 tokens" in record.message
