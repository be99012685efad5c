"""The grouped basis: one for several heads of K, one for several of V, which queries can be absorbed into."""

import pytest
import torch
from calibrations import TEXT, D, L
from tiny import tiny_loaded, windows

from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.codecs import QUANTIZERS
from gpt2.compression.presets import create_cache_from_preset
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, compare, score
from gpt2.tuning.ratio_presets import compact_calibration, make_ratio_preset


def test_bits_are_shared_out_between_keys_and_values_of_all_layers(made):
    codec = made.fit_of("grouped")
    shares = codec.allocation.bits_of_each(3)
    assert len(shares) == 2 * L and sum(shares) / len(shares) == pytest.approx(3, abs=0.2) and len(set(shares)) > 2
    assert codec.quantizer(QUANTIZERS["mixed"].at(3), 1, "v").bits == shares[3]
    fixed = codec.quantizer(QUANTIZERS["mixed_fixed"].at(3), 1, "k")
    assert torch.equal(fixed.widths, codec.allocation.widths(3)[2])


def test_its_presets_by_ratio_are_read_as_they_are_stored(tmp_path):
    loaded = tiny_loaded("llama")
    made = compact_calibration(
        loaded, TEXT, tmp_path / "g.pt", codec="grouped", samples=4, seq_len=200, seed=0, sink_tokens=4
    )
    found = make_ratio_preset(loaded, made, 3.5)
    assert found.name == "fast-3.5x" and found.compression_ratio >= 3.5
    preset = {
        "model": "tiny-llama", "rank": D, "target": "kv", "bits": found.bits, "codec": "grouped", "quantizer": "mixed",
        "head_dim": D, "num_layers": L, "calibration_file": str(tmp_path / "g.pt"),
    }  # fmt: skip
    segments = windows(2, 200)

    def kl() -> float:
        caches = {BASELINE: baseline_factory(loaded), "ours": lambda: create_cache_from_preset(preset, model=loaded)}
        scores = score(loaded, segments, caches, chunk=7, batch_size=2)
        return compare(scores[BASELINE], scores["ours"], 0)["kl_nats"]

    reconstructed = kl()
    enable_compressed_attention(loaded.model)
    assert 0 < reconstructed == pytest.approx(kl(), rel=1e-2)
