"""Bases that heads share: bytes shared out at one price, their files, the script; and one that only a test knows."""

import calibrations
import pytest
import torch
from calibrations import OF_HEADS, SINKS, TEXT, D, H, L, close, identical, preset_of
from multi_head import PRICES, least, reads_like_the_reference, vectors
from sampling import covering, sampled
from script_runs import run
from tiny import windows
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.calibration import calibrate as calibrate_module
from gpt2.compression.calibration import reuse, stand_in
from gpt2.compression.calibration.bit_allocation import BitAllocation
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit, fit_multi_head
from gpt2.compression.codecs import BASES, QUANTIZERS, MultiHead
from gpt2.compression.codecs.mixed import BLOCK, PLANE, WIDTHS, Mixed, errors, width_bytes
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.multi_head import side_by_side
from gpt2.compression.codecs.rope import NONE
from gpt2.compression.codecs.transform import join_heads
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.settings import compressors_for
from gpt2.models.geometry import Geometry

# --- one price


@pytest.mark.parametrize(("bits", "name"), covering([1.5, 2, 3.25, 4, 6], ["joint", "grouped"]))
def test_bases_average_to_the_budget_at_one_price(made, name, bits):
    """Those of all layers, of keys and of values."""
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


def test_bits_out_of_reach_name_the_range(codec):
    low, high = codec.allocation.bits_range()
    assert 0 < low < 1 and 6 < high < 10.5
    for bits in (low - 0.01, high + 0.1):
        with pytest.raises(PluginError, match=rf"bits {bits:g}: this codec takes {low:.2f} to {high:.2f} bits"):
            codec.allocation.bits_of_each(bits)
    for bits in (low + 1e-6, high - 1e-6):
        codec.allocation.bits_of_each(bits)


@pytest.mark.parametrize("bits", [1, 2.5, 4, 7])
def test_fixed_widths_meet_the_budget_and_are_the_best(codec, bits):
    widths = torch.stack(codec.allocation.widths(bits))
    assert widths.shape == (L, 1, 2 * H * D)
    budget, spent = bits * BLOCK / 8 * widths.numel(), int(PRICES[widths].sum())
    assert budget - max(PRICES) < spent <= budget
    error = torch.stack(tuple(codec.allocation.errors)).flatten(0, 2)
    total = float(error.double().gather(-1, widths.flatten()[:, None]).sum())
    assert total <= least(error, spent) * (1 + 1e-6) + 1e-12
    assert len(widths.float().mean((1, 2)).unique()) > 1, "layers share one budget"
    assert torch.equal(codec.quantizer(QUANTIZERS["mixed_fixed"].at(bits), 1).widths, widths[1])


@pytest.mark.parametrize(("quantizer", "bits"), [("mixed", 2.5), ("mixed_fixed", 4)])
def test_the_cache_takes_the_bytes_that_were_asked_for(made, quantizer, bits):
    """Everything counted, over all layers: the bits of a setting are those of the memory that it takes."""
    k, v = compressors_for("kv", bits, None, made, codec="joint", quantizer=quantizer)
    cache = CompressedDynamicCache(k, v, sink_tokens=0)
    x = vectors(H, 10 * BLOCK, dtype=torch.float32)
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


def same_codec(a: MultiHeadFit, b: MultiHeadFit) -> bool:
    return identical(*(fit.record(Geometry.uniform(L, H, D)) for fit in (a, b)))


def test_the_files_own_basis_is_that_of_single_heads(made):
    """What a joint calibration shows as kept variance, and gives where another codec isn't named."""
    assert [E.shape for E in made.bases["k"]["E"]] == [(H, D, D)] * L
    assert [kept.shape for kept in made.kept_variance()["v"]] == [(H, D)] * L
    assert torch.equal(made.transform("k", 0, 9, "fisher").E, made.bases["k"]["E"][0][..., :9])
    assert made.transform("k", 0).joint
    assert made.statistics.k.metrics.keys() == made.statistics.v.metrics.keys() == {"attention", "fisher"}


def test_a_compact_file_is_small_and_reads_the_same(llama, made, preset, tmp_path):
    """Its numbers and their rounding are in calibration/test_multi_head_fit.py."""
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
    with pytest.raises(PluginError, match=r"\(framed, grouped, joint\), and codec fisher is of single heads"):
        calibrate(llama, TEXT, codec="fisher", compact=True, **OF_HEADS)


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


# --- one more codec: a class and a line in the registry, here for as long as a test runs


class OneHead(MultiHead):
    """K and V apart, a basis for each head, keys without positions."""

    name = preset_prefix = "third"
    unrotated = True

    def heads_per_group(self, num_kv_heads: int, head_dim: int) -> int:
        return 1


class AsCached(MultiHead):
    """K and V together, keys with their positions."""

    name = preset_prefix = "third"
    joint = True


THIRD = {"apart, rotated": OneHead(), "together, as cached": AsCached()}


@pytest.fixture(params=THIRD.values(), ids=THIRD)
def third(request, monkeypatch) -> MultiHead:
    monkeypatch.setitem(BASES, "third", request.param)
    return request.param


def test_whole_and_compact_calibrations(llama, third, made, monkeypatch, tmp_path):
    """A whole one has every registered codec, which know nothing of each other; a compact one gathers and fits one."""
    whole = calibrate(llama, TEXT, codec="third", **OF_HEADS)
    assert list(whole.multi_head) == ["framed", "grouped", "joint", "third"]
    assert same_codec(whole.multi_head["joint"], made.multi_head["joint"])
    back = load_calibration(save_calibration(whole, tmp_path / "c.pt"))
    assert all(same_codec(back.multi_head[name], codec) for name, codec in whole.multi_head.items())
    assert back.multi_head["third"].basis is third
    expected, fitted, fit = whole.compact("third"), [], fit_multi_head
    monkeypatch.setattr(calibrate_module, "fit_multi_head", lambda own: (fitted.append(own.basis.name), fit(own))[1])
    monkeypatch.setattr(calibrate_module, "collect", None)  # no first pass
    shapes, zeros = [], Moments.zeros
    monkeypatch.setattr(Moments, "zeros", lambda shape: (shapes.append(shape), zeros(shape))[1])
    made = calibrate(llama, TEXT, codec="third", compact=True, **OF_HEADS)
    assert fitted == ["third"] and shapes == [third.shape(llama.geometry)]
    assert made.meta == expected.meta and made.statistics is None and not made.bases
    path = save_calibration(made, tmp_path / "small.pt")
    assert torch.load(path, weights_only=True).keys() == {"format", "meta", "third"}
    assert same_codec(made.multi_head["third"], expected.multi_head["third"])
    torch.testing.assert_close(load_calibration(path).multi_head["third"].E, made.multi_head["third"].E, rtol=0, atol=0)
    cache = create_cache_from_preset(preset_of(made, path), dtype=torch.float64)
    reads_like_the_reference(llama, cache, windows(2, 150), max_new_tokens=8)
    assert sorted(cache.layers[0].stores) == (["KV"] if third.joint else ["K", "V"])


# Channels of a group: all heads in one, or one for each head
@pytest.mark.parametrize(("name", "most"), covering([*THIRD, "joint", "grouped", "framed"], [512, 24]))
def test_statistics_are_of_k_and_v_as_a_basis_arranges_them(llama, name, most, monkeypatch):
    basis, batches = THIRD.get(name) or BASES[name], windows(3, 40)
    monkeypatch.setattr(type(basis), "most_channels", most)
    gathered = collect_fisher(llama, batches, None, SINKS, {"own": basis, "joint": BASES["joint"]})
    own, rotary = gathered["own"], gathered["joint"].rotary
    assert own.rotary == (rotary if basis.unrotated else [])
    groups = 1 if most == 512 and not isinstance(basis, OneHead) else H

    def arranged(layer: int, k: Tensor, v: Tensor) -> list[Tensor]:
        if basis.unrotated:
            each = k.split(40 - SINKS, dim=1)
            k = torch.cat([rotary[layer].unrotate(window, SINKS, basis.frame) for window in each], dim=1)
        if basis.joint:
            return [side_by_side(k[None], v[None], groups)[0]]
        return [join_heads(side[None], H * D // groups)[0] for side in (k, v)]

    for layer, (k, v, gk, gv) in calibrations.direct_gradients(llama, batches).items():
        entries = list(zip(arranged(layer, k, v), arranged(layer, gk, gv), strict=True))
        for entry, (x, g) in enumerate(entries, start=len(entries) * layer):
            assert close(own.moments.mean[entry], x.mean(1))
            assert close(own.moments.scatter[entry], calibrations.scatter(x))
            assert close(own.moments.metrics["fisher"][entry], calibrations.between_heads(g, D))
    assert (own.moments.count == 3 * (40 - SINKS)).all()


@pytest.mark.parametrize("name", [*THIRD, "joint", "grouped"])
def test_coordinates_follow_positions_where_keys_keep_them(llama, name, made, monkeypatch):
    """Without positions keys of any place are compressed alike."""
    codec, basis = made.multi_head.get(name), THIRD.get(name) or BASES[name]
    if name in THIRD:
        monkeypatch.setitem(BASES, basis.name, basis)
        codec = calibrate(llama, TEXT, codec=basis.name, compact=True, **OF_HEADS).multi_head[basis.name]
    transform = codec.transform(1, "k").to("cpu", torch.float64)
    rotary = made.multi_head["joint"].rotary[1]
    k, v = (vectors(H, 1, seed=seed).expand(-1, -1, 40, -1) for seed in (0, 1))
    keys = rotary.rotate(k, 300)
    x = torch.cat((keys, v), dim=1) if basis.joint else keys
    z = transform.forward(x, 300)
    assert torch.allclose(z, z[:, :, :1].expand_as(z), rtol=1e-4, atol=1e-4) == basis.unrotated
    assert torch.allclose(transform.forward(x, 301), z, rtol=1e-2) != basis.unrotated
    turned = basis.joint and basis.unrotated
    assert codec.transform(1, "v").frame == (1 if turned else None), "values never turn"
    assert transform.frame == (1 if basis.unrotated else None)
    torch.testing.assert_close(codec.transform(1, "v").E, codec.E[1 if basis.joint else 3])
