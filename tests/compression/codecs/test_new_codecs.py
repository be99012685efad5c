"""A new quantizer, metric and multi-head basis: one small class and one registry entry each, and everything takes it.

None has a kernel. Each goes from calibration to a preset, a cache, generation and direct attention, into the tuner's
search space, and through scripts.
"""

import pytest
import torch
from calibrations import TEXT
from script_runs import run
from tiny import tiny_loaded, windows

from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.stand_in import stand_in
from gpt2.compression.codecs import BASES, QUANTIZERS, MultiHead, Quantizer
from gpt2.compression.codecs.metric import MetricBasis
from gpt2.compression.presets import create_cache_from_preset
from gpt2.tuning import search_space


class Steps(Quantizer):
    """One scale per token and as many levels as `bits` asks for, fractions of a bit included."""

    name, bits, bits_range = "steps", 4.0, (1.0, 7.0)

    def allocated(self, allocation, index):
        return self.at(min(max(allocation.bits_of_each(self.bits)[index], 1.0), 7.0))

    def quantize(self, z):
        scale = (z.abs().amax(-1, keepdim=True) / (2 ** (self.bits - 1))).clamp_min(1e-6).float()
        return {"codes": (z / scale).round().clamp(-127, 127).to(torch.int8), "scale": scale}

    def dequantize(self, encoded, rank):
        return encoded["codes"] * encoded["scale"]


class LargeKeys(MetricBasis):
    """Errors weigh as much as the vectors are large: gathered in the forward pass."""

    name = metric = "large"

    def metric_vectors(self, seen):
        return {"k": seen.keys[0].float(), "v": seen.values[0].float()}


class Pairs(MultiHead):
    """K and V apart, two heads share a basis, keys as they are cached."""

    name = preset_prefix = "pairs"

    def heads_per_group(self, num_kv_heads, head_dim):
        return 2


# Registry, entry; codec, quantizer and bits of a preset with it; its name in the search space
CASES = {
    "quantizer": (QUANTIZERS, Steps(), ("grouped", "steps", 4.5), "grouped+steps"),
    "metric": (BASES, LargeKeys(), ("large", None, 8), "large"),
    "multi-head basis": (BASES, Pairs(), ("pairs", "mixed", 5.0), "pairs+mixed"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_class_and_one_registry_entry(case, monkeypatch, tmp_path):
    registry, own, (codec, quantizer, bits), family = CASES[case]
    monkeypatch.setitem(registry, own.name, own)
    loaded = tiny_loaded("llama")  # its own, as its attention is changed
    d, prompt = loaded.geometry.head_dim, windows(2, 100)
    made = calibrate(loaded, TEXT, rank=d, codec=codec, samples=3, seq_len=140)
    path = save_calibration(made, tmp_path / "c.pt")
    preset = {
        "model": "tiny-llama", "rank": d, "target": "kv", "bits": bits, "codec": codec, "quantizer": quantizer,
        "head_dim": d, "num_layers": loaded.geometry.num_layers, "calibration_file": str(path),
    }  # fmt: skip

    def tokens():
        cache = create_cache_from_preset(preset, model=loaded)
        out = loaded.model.generate(prompt, past_key_values=cache, do_sample=False, max_new_tokens=6)
        assert cache.readable and cache.layers[0].stores["K"].compressed_tokens
        with torch.no_grad():
            return out, loaded.model(windows(2, 1, seed=9), past_key_values=cache).logits

    reconstructed = tokens()
    enable_compressed_attention(loaded.model)
    direct = tokens()
    disable_compressed_attention(loaded.model)
    assert torch.equal(reconstructed[0], direct[0])
    torch.testing.assert_close(reconstructed[1], direct[1], rtol=1e-3, atol=1e-3)

    assert family in search_space.families()
    space, _ = search_space.space_for(load_calibration(path), d, [family])
    assert space.families == (family,) and space.starts()[0]["family"] == family
    assert space.bits[1] <= 7.0 or case != "quantizer"


def test_scripts_and_models_without_weights_know_a_new_multi_head_basis(
    llama, tiny_flags, model_folder, monkeypatch, tmp_path
):
    monkeypatch.setitem(BASES, "pairs", Pairs())
    made_up = stand_in(llama).multi_head["pairs"]
    assert made_up.transform(2, "v").rank == Pairs().shape(llama.geometry).head_dim
    common = [*tiny_flags, "--samples", 2, "--seq-len", 80, "--codec", "pairs"]
    assert run("calibrate_kv_lowrank", *common, "--output", "c.pt", "--compact") == 0
    made = load_calibration("c.pt")
    assert list(made.multi_head) == ["pairs"]
    low, high = made.multi_head["pairs"].allocation.bits_range()
    made.multi_head["pairs"].allocation.bits_range = lambda: (2.5, high)
    assert low < 2.5 == search_space.bits_range(made)[0]
    sizes = ["--eval-tokens", 128, "--eval-seq-len", 64, "--ratios", "3"]
    assert run("make_presets", *common, *sizes, "--output", "out") == 0
    names, slug = {path.name for path in (tmp_path / "out").rglob("*.*")}, model_folder.name
    assert {f"{slug}-pairs-3x.json", f"kv_pairs_{slug}.pt", f"ratio_presets_pairs_{slug}.json"} <= names
