"""Bases that heads share: bytes shared out at one price, their files, and the script that gathers them."""

import calibrations
import pytest
import torch
from calibrations import OF_HEADS, TEXT, D, H, L
from multi_head import PRICES, least, reads_like_the_reference, vectors
from sampling import covering, sampled
from script_runs import run
from tiny import windows

from gpt2.common.errors import PluginError
from gpt2.compression.calibration import reuse, stand_in
from gpt2.compression.calibration.bit_allocation import BitAllocation
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit, fit_multi_head
from gpt2.compression.codecs import BASES, QUANTIZERS
from gpt2.compression.codecs.mixed import BLOCK, PLANE, WIDTHS, Mixed, errors, width_bytes
from gpt2.compression.codecs.rope import NONE
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.settings import compressors_for
from gpt2.models.geometry import Geometry

# --- one price


@pytest.mark.parametrize(("bits", "name"), covering([1.5, 2, 3.25, 4, 6], ["joint", "grouped"]))
def test_bases_average_to_the_budget_at_one_price(made, name, bits):
    """Those of all layers, of keys and of values; bits out of reach are rejected with the range."""
    fit = made.fit_of(name)
    allocation, (_, w) = fit.allocation, fit.mean[0].shape
    found = torch.tensor(allocation.bits_of_each(bits), dtype=torch.float64)
    assert bits - 8 * PLANE / BLOCK / w < found.mean() <= bits + 1e-6, "less than a plane of each basis is left"
    assert found.unique().numel() > L - 1 and len(found) == L * (1 if name == "joint" else 2), "not the same for all"
    for own in found.tolist():
        stored = Mixed(own).block_bytes(w) + width_bytes(w)
        assert stored == pytest.approx(BLOCK * w * own / 8, abs=1e-3), "what a block really takes"
    spent = found * BLOCK * w / 8 - width_bytes(w)
    inside = (allocation.demand[1:] <= spent + PLANE) & (spent <= allocation.demand[:-1] + 1e-3)
    assert inside.all(1).any(), "between the same two neighbouring prices for every basis"
    assert fit.quantizer(QUANTIZERS["mixed"].at(bits), 1, "v").bits == found[1 if name == "joint" else 3]
    low, high = allocation.bits_range()
    assert 0 < low < 1 and 6 < high < 10.5
    for wanted in (low - 0.01, high + 0.1):
        with pytest.raises(PluginError, match=rf"bits {wanted:g}: this codec takes {low:.2f} to {high:.2f} bits"):
            allocation.bits_of_each(wanted)
    for wanted in (low + 1e-6, high - 1e-6):
        allocation.bits_of_each(wanted)


def test_a_layer_whose_errors_weigh_more_gets_more():
    """Four times the error at every width is worth a bit more of each coordinate, as theory has it."""
    z = torch.randn(2, 1, 1, 40 * BLOCK, 48, generator=torch.Generator().manual_seed(0))
    allocation = BitAllocation.measured([errors(size * own)[0] for size, own in zip((1, 2), z, strict=True)])
    assert (allocation.prices.diff() > 0).all() and (allocation.demand.diff(dim=0) <= 0).all()
    one, other = allocation.bits_of_each(4.0)
    assert other - one == pytest.approx(1, abs=0.15)


def test_a_layer_that_hardly_matters_may_get_less_than_any_preset():
    """Its budget isn't one that a user could ask for, and the cache is made all the same."""
    demand, none = torch.tensor([[3000.0, 10.0], [1500.0, 0.0], [0.0, 0.0]]), torch.zeros(0)
    allocation = BitAllocation(torch.zeros(2, 1, 48, len(WIDTHS)), torch.arange(3) + 1.0, demand)
    E = torch.eye(48).expand(2, 1, 48, 48)
    codec = MultiHeadFit(BASES["joint"], none, E, none, [NONE] * 2, allocation)
    assert codec.allocation.bits_of_each(2.0)[1] < 0.25
    z, quantizer = torch.randn(1, 1, BLOCK, 48), codec.quantizer(QUANTIZERS["mixed"].at(2.0), 1)
    assert not quantizer.dequantize(quantizer.quantize(z), 48).any(), "nothing is left but the mean"
    assert codec.quantizer(QUANTIZERS["int8"], 1) is QUANTIZERS["int8"], "others are the same in every layer"


@pytest.mark.parametrize("bits", [1, 2.5, 4, 7])
def test_widths_of_a_budget_are_the_best_and_a_cache_takes_its_bytes(made, bits):
    """Of fixed widths. Everything counted, over all layers: the bits of a setting are those of the memory it takes."""
    codec = made.fit_of("joint")
    widths = torch.stack(codec.allocation.widths(bits))
    assert widths.shape == (L, 1, 2 * H * D)
    budget, spent = bits * BLOCK / 8 * widths.numel(), int(PRICES[widths].sum())
    assert budget - max(PRICES) < spent <= budget
    error = torch.stack(tuple(codec.allocation.errors)).flatten(0, 2)
    total = float(error.double().gather(-1, widths.flatten()[:, None]).sum())
    assert total <= least(error, spent) * (1 + 1e-6) + 1e-12
    assert len(widths.float().mean((1, 2)).unique()) > 1, "layers share one budget"
    assert torch.equal(codec.quantizer(QUANTIZERS["mixed_fixed"].at(bits), 1).widths, widths[1])
    x = vectors(H, 10 * BLOCK, dtype=torch.float32)
    for quantizer in ("mixed", "mixed_fixed"):
        sides = compressors_for("kv", bits, None, made, codec="joint", quantizer=quantizer)
        cache = CompressedDynamicCache(*sides, sink_tokens=0)
        for layer in cache.layers:
            layer.store(x, x)
        assert bits - 0.2 < 8 * cache.nbytes() / (2 * L * x.numel()) <= bits * 1.0001


def test_errors_are_those_of_the_reservoir(llama):
    batches = windows(3, 200)
    gradients = collect_fisher(llama, batches, None, 4, {"joint": BASES["joint"]})["joint"]
    codec = fit_multi_head(gradients)
    for layer in range(L):
        z = (gradients.blocks[layer].float() - codec.mean[layer][:, None]) @ codec.E[layer]
        error = codec.allocation.errors[layer][0, :, 0]
        torch.testing.assert_close(error, z[0].square().mean(0) * BLOCK, rtol=1e-4, atol=1e-5)
    assert torch.stack(codec.spectrum).mean() == pytest.approx(1, rel=1e-4), "one unit for the whole model"


def test_the_inverse_of_large_bases_with_several_threads():
    """Batches of matrices this large fail in PyTorch 2.13 with MKL and more than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codec = stand_in.multi_head_stand_in(BASES["joint"], Geometry.uniform(8, 3, 64))
        codec.E = torch.randn(8, 1, 384, 384)
        assert (codec.E.double() @ torch.stack(codec.D).double() - torch.eye(384)).abs().max() < 1e-2
    finally:
        torch.set_num_threads(before)


# --- files


def test_the_files_own_basis_is_that_of_single_heads(made):
    """What a joint calibration shows as kept variance, and gives where another codec isn't named."""
    assert [E.shape for E in made.bases["k"]["E"]] == [(H, D, D)] * L
    assert [kept.shape for kept in made.kept_variance()["v"]] == [(H, D)] * L
    assert torch.equal(made.transform("k", 0, 9, "fisher").E, made.bases["k"]["E"][0][..., :9])
    assert made.transform("k", 0).joint
    assert made.statistics.k.metrics.keys() == made.statistics.v.metrics.keys() == {"attention", "fisher"}


def test_a_compact_file_of_one_codec_that_heads_share_is_small_and_reads_the_same(llama, made, preset, tmp_path):
    """Its numbers and their rounding are in calibration/test_multi_head_fit.py."""
    with pytest.raises(PluginError, match=r"\(framed, grouped, joint\), and codec fisher is of single heads"):
        calibrate(llama, TEXT, codec="fisher", compact=True, **OF_HEADS)
    whole, path = tmp_path / "c.pt", save_calibration(made.compact("joint"), tmp_path / "small.pt")
    assert path.stat().st_size < whole.stat().st_size / 2
    back = load_calibration(path)
    assert back.meta == made.compact("joint").meta and back.statistics is None and not back.bases
    assert list(back.multi_head) == ["joint"]
    with pytest.raises(PluginError, match="is not in this calibration, it has codec joint alone"):
        back.fit_of("grouped")
    for codec in ("pca", "fisher", "random"):
        with pytest.raises(PluginError, match=f"codec {codec}: this is a compact calibration of tiny-llama.*--compact"):
            back.transform("k", 0, codec=codec)
    cache = create_cache_from_preset(preset | {"calibration_file": str(path)}, model=llama, dtype=torch.float64)
    reads_like_the_reference(llama, cache, windows(2, 150))


def test_an_older_file_has_neither_metrics_nor_a_joint_codec(llama, calibration, tmp_path):
    path = save_calibration(calibration, tmp_path / "c.pt")
    calibrations.change(path, "statistics", "metrics", value=...)
    calibrations.change(path, "meta", "metric", value=...)
    back = load_calibration(path)
    assert torch.equal(back.transform("k", 0).E, calibration.transform("k", 0).E) and "joint" not in back.multi_head
    with pytest.raises(PluginError, match="codec attention needs statistics that this calibration doesn't have"):
        back.transform("k", 0, codec="attention")


def test_a_calibration_without_gradients_is_not_used_again_for_a_metric(llama, space):
    asked = {"given": None, "rank": 9, "samples": 2, "seq_len": 80, "seed": 0, "sink_tokens": 4}
    _, plain = reuse.obtain_calibration(llama, TEXT, **asked)
    gradients, fisher = reuse.obtain_calibration(llama, TEXT, metric="fisher", **asked)
    assert fisher != plain and "joint" in gradients.multi_head
    assert reuse.obtain_calibration(llama, TEXT, metric="fisher", **asked)[1] == fisher
    assert reuse.obtain_calibration(llama, TEXT, **asked)[1] in (plain, fisher), "either has what pca needs"


# --- the script


GATHERED = [
    ([], "pca", False), (["--metric", "attention"], "attention", False), (["--metric", "fisher"], "fisher", True),
    (["--metric", "fisher", "--compact"], "framed", False), (["--metric", "fisher", "--codec", "pca"], "pca", True),
    (["--codec", "joint", "--compact"], "joint", True), (["--compact"], "framed", False),
    (["--codec", "joint", "--gradient-checkpointing"], "joint", True),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "codec", "joint"), sampled(GATHERED, 2))
def test_the_script_gathers_what_is_asked_for(flags, codec, joint, tiny_flags, tmp_path, capsys):
    common = [*tiny_flags, "--samples", 2, "--seq-len", 80]
    assert run("calibrate_kv_lowrank", *common, "--output", "c.pt", *flags) == 0
    made = load_calibration("c.pt")
    assert made.meta["codec"] == codec and ("joint" in made.multi_head) == joint
    assert (made.statistics is None) == ("--compact" in flags)
    assert "need no gradients" not in capsys.readouterr().out
    if not flags:
        assert run("calibrate_kv_lowrank", *common, "--output", "other.pt", "--compact", "--metric", "pca") == 2
        message = "--metric pca is none that goes with it: give --codec framed or grouped or joint, or leave"
        assert message in capsys.readouterr().err and not (tmp_path / "other.pt").exists()
