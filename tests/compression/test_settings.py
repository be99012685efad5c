"""Settings of each layer: plans, their records in presets, and the compressors that are built of them."""

import json

import pytest
import torch
from presets import PRESET, compressors

from gpt2.common.errors import PluginError
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.compressed_cache import CompressedDynamicCache, IdentityCompressor, load_calibrated_compressors
from gpt2.compression.presets.schema import parse
from gpt2.compression.settings import Setting, build, needs_calibration_file, plan_record, uniform
from gpt2.models.geometry import Geometry

PROMPT = torch.arange(2, 42)[None]
INT4, INT8 = Setting("identity", 12, 4), Setting("identity", 12, 8)


def test_the_guides_per_layer_snippet(llama, calibration, tmp_path):
    k_comp, v_comp, metadata = load_calibrated_compressors(
        str(save_calibration(calibration, tmp_path / "c.pt")), device=torch.device("cpu"), quantize_bits=8
    )
    for i in range(2):
        k_comp[i] = IdentityCompressor()
        v_comp[i] = IdentityCompressor()
    cache = CompressedDynamicCache(k_comp, v_comp, num_layers=metadata["num_layers"])
    out = llama.model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 44)
    assert compressors(cache)["V"] == ["IdentityCompressor(none)"] * 2 + ["Compressor(int8, rank=6)"]
    plain = CompressedDynamicCache([IdentityCompressor()] * 3, [IdentityCompressor()] * 3)
    llama.model(out[:, :-1], past_key_values=plain)
    same = [
        torch.allclose(ours.stores["V"].read(), models.stores["V"].read(), atol=1e-4)
        for ours, models in zip(cache.layers, plain.layers, strict=True)
    ]
    assert same[0] and not same[2]


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


@pytest.mark.parametrize(
    ("setting", "text"),
    [(Setting("pca", 7, 8), "pca rank 7, 8 bits"), (Setting("pca", 7, 3.5, "mixed"), "pca rank 7, 3.5 bits mixed"),
     (Setting("joint", 12, 3, "mixed"), "joint, 3 bits mixed"), (INT4, "identity, 4 bits")],
)  # fmt: skip
def test_a_setting_as_text(setting, text):
    assert str(setting) == text


def test_a_calibrated_codec_without_a_calibration_is_named():
    with pytest.raises(PluginError, match="layer 1, V: codec pca needs a calibration"):
        build(uniform("v", 3, Setting("pca", 4), layers=[1]), Geometry.uniform(3, 2, 12))
