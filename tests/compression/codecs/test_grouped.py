"""The grouped codec: one basis for several heads of K, one for several of V, which queries can be folded into."""

import pytest
import torch
from test_fisher import SINKS, close, direct
from tiny import tiny_loaded, windows, word_text

from gpt2.common.errors import PluginError
from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fisher import CROSS_HEAD_SHARE, collect_fisher
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.codecs import BASES, basis_of
from gpt2.compression.codecs.transform import join_heads
from gpt2.compression.presets import create_cache_from_preset
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, compare, score
from gpt2.text.sources import by_position
from gpt2.tuning.ratio_presets import compact_calibration, make_ratio_preset

TEXT = by_position("words", "words.txt", word_text(3000))
L, H, D = 3, 2, 12  # of the tiny llama


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def made(llama) -> Calibration:
    return calibrate(llama, TEXT, rank=9, codec="grouped", samples=4, seq_len=200)


@pytest.mark.parametrize("most", [512, 24], ids=["one group", "a group for each head"])
def test_statistics_are_of_keys_as_cached_and_of_values(llama, most, monkeypatch):
    monkeypatch.setattr("gpt2.compression.codecs.multi_head.MOST_CHANNELS", most)
    groups, batches = 1 if most == 512 else 2, windows(3, 40)
    grouped = collect_fisher(llama, batches, None, SINKS, {"grouped": BASES["grouped"]})["grouped"]
    for layer, (k, v, gk, gv) in enumerate(direct(llama, batches)):
        for entry, x, g in ((2 * layer, k, gk), (2 * layer + 1, v, gv)):
            x, g = (join_heads(part[None], H * D // groups)[0] for part in (x, g))
            centred = x - x.mean(1, keepdim=True)
            within = torch.block_diag(*[torch.ones(D, D)] * (H // groups)) > 0
            assert close(grouped.moments.scatter[entry], centred.mT @ centred)
            shares = torch.where(within, 1.0, CROSS_HEAD_SHARE)
            assert close(grouped.moments.metrics["fisher"][entry], shares * (g.mT @ g / g.shape[1]))
    assert [len(blocks) for blocks in grouped.blocks] == [groups] * 2 * L and not grouped.rotary


def test_it_is_measured_and_not_joint(made):
    assert basis_of("grouped").multi_head and not basis_of("grouped").joint
    k, v = made.transform("k", 1), made.transform("v", 1)
    assert k.absorbable and k.E.shape == v.E.shape == (1, H * D, H * D) and not torch.equal(k.E, v.E)
    x = torch.randn(2, H, 20, D)
    torch.testing.assert_close(k.inverse(k.forward(x), D), x, rtol=1e-3, atol=1e-3)


def test_bits_are_shared_out_between_keys_and_values_of_all_layers(made):
    codec = made.fit_of("grouped")
    shares = codec.allocation.bits_of_each(3)
    assert len(shares) == 2 * L and sum(shares) / len(shares) == pytest.approx(3, abs=0.2) and len(set(shares)) > 2
    mixed = codec.quantizer(codec_quantizer("mixed", 3), 1, "v")
    assert mixed.bits == shares[3]
    fixed = codec.quantizer(codec_quantizer("mixed_fixed", 3), 1, "k")
    assert torch.equal(fixed.widths, codec.allocation.widths(3)[2])


def codec_quantizer(name: str, bits: float):
    from gpt2.compression.codecs import QUANTIZERS

    return QUANTIZERS[name].at(bits)


@pytest.mark.parametrize("compact", [False, True])
def test_a_file_holds_it(made, compact, tmp_path):
    saved = made.compact("grouped") if compact else made
    back = load_calibration(save_calibration(saved, tmp_path / "c.pt"))
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if compact else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(back.multi_head["grouped"].E, made.multi_head["grouped"].E, **tolerance)
    own, read = (c.multi_head["grouped"].allocation.bits_of_each(3) for c in (made, back))
    assert own == read
    assert ("joint" in back.multi_head) != compact
    if compact:
        with pytest.raises(PluginError, match="codec joint is not in this calibration, it has codec grouped alone"):
            back.fit_of("joint")


def test_its_presets_by_ratio_are_read_as_they_are_stored(llama, tmp_path):
    made = compact_calibration(
        llama, TEXT, tmp_path / "g.pt", codec="grouped", samples=4, seq_len=200, seed=0, sink_tokens=4
    )
    found = make_ratio_preset(llama, made, 3.5)
    assert found.name == "fast-3.5x" and found.compression_ratio >= 3.5
    preset = {
        "model": "tiny-llama", "rank": D, "target": "kv", "bits": found.bits, "codec": "grouped", "quantizer": "mixed",
        "head_dim": D, "num_layers": L, "calibration_file": str(tmp_path / "g.pt"),
    }  # fmt: skip
    segments, own = windows(2, 200), tiny_loaded("llama")  # the other tests' model stays as it is

    def kl() -> float:
        caches = {BASELINE: baseline_factory(own), "ours": lambda: create_cache_from_preset(preset, model=own)}
        scores = score(own, segments, caches, chunk=7, batch_size=2)
        return compare(scores[BASELINE], scores["ours"], 0)["kl_nats"]

    reconstructed = kl()
    enable_compressed_attention(own.model)
    assert 0 < reconstructed == pytest.approx(kl(), rel=1e-2)
