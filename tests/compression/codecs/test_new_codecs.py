"""A new quantizer, metric and multi-head bases: one small class and one registry entry each, and everything takes them.

None has a kernel. Each goes from calibration to a preset, a cache, generation and direct attention, into the tuner's
search space, and through scripts.
"""

import calibrations
import pytest
import torch
from calibrations import OF_HEADS, SINKS, TEXT, D, H, L, close, identical, preset_of
from direct import both
from multi_head import reads_like_the_reference, vectors
from sampling import covering
from script_runs import run
from tiny import windows
from torch import Tensor

from gpt2.compression.calibration import calibrate as calibrate_module
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit, fit_multi_head
from gpt2.compression.calibration.stand_in import stand_in
from gpt2.compression.codecs import BASES, QUANTIZERS, MultiHead, Quantizer
from gpt2.compression.codecs.metric import MetricBasis
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.multi_head import side_by_side
from gpt2.compression.codecs.transform import join_heads
from gpt2.compression.presets import create_cache_from_preset
from gpt2.models.geometry import Geometry
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


class AsCached(MultiHead):
    """K and V together, keys as they are cached."""

    name = preset_prefix = "as_cached"
    joint = True


NEW_BASES = {basis.name: basis for basis in (Pairs(), AsCached())}
# Registry, entry; codec, quantizer and bits of a preset with it; its name in the search space
CASES = {
    "quantizer": (QUANTIZERS, Steps(), ("grouped", "steps", 4.5), "grouped+steps"),
    "metric": (BASES, LargeKeys(), ("large", None, 8), "large"),
    **{name: (BASES, basis, (name, "mixed", 5.0), f"{name}+mixed") for name, basis in NEW_BASES.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_one_class_and_one_registry_entry(case, llama, made, monkeypatch, tmp_path):
    registry, own, (codec, quantizer, bits), family = CASES[case]
    monkeypatch.setitem(registry, own.name, own)
    whole = calibrate(llama, TEXT, codec=codec, **OF_HEADS)
    preset = preset_of(whole, tmp_path / "c.pt") | {"bits": bits, "quantizer": quantizer}
    if case in NEW_BASES:
        preset["calibration_file"] = compact_file(llama, own, whole, made, monkeypatch, tmp_path)
    cache = create_cache_from_preset(preset, dtype=torch.float64)
    reads_like_the_reference(llama, cache, windows(2, 100))
    assert sorted(cache.layers[0].stores) == (["KV"] if case == "as_cached" else ["K", "V"])

    @torch.no_grad()
    def run(cache):
        out = llama.model.generate(windows(2, 100), past_key_values=cache, do_sample=False, max_new_tokens=6)
        assert cache.readable and all(store.compressed_tokens for store in cache.layers[0].stores.values())
        return out, llama.model(windows(2, 1, seed=9), past_key_values=cache).logits

    reconstructed, direct = both(llama.model, lambda: create_cache_from_preset(preset, model=llama), run)
    assert torch.equal(reconstructed[0], direct[0])
    torch.testing.assert_close(reconstructed[1], direct[1], rtol=1e-3, atol=1e-3)

    assert family in search_space.families()
    space, _ = search_space.space_for(load_calibration(tmp_path / "c.pt"), D, [family])
    assert space.families == (family,) and space.starts()[0]["family"] == family
    assert space.bits[1] <= 7.0 or case != "quantizer"


def same_codec(a: MultiHeadFit, b: MultiHeadFit) -> bool:
    return identical(*(fit.record(Geometry.uniform(L, H, D)) for fit in (a, b)))


def compact_file(llama, basis, whole, made, monkeypatch, tmp_path) -> str:
    """A whole calibration has every registered codec, which know nothing of each other; a compact one fits only one.

    Returns the path of the compact one. made: a whole one without this basis.
    """
    assert list(whole.multi_head) == ["framed", "grouped", "joint", basis.name]
    assert same_codec(whole.multi_head["joint"], made.multi_head["joint"])
    back = load_calibration(tmp_path / "c.pt")
    assert all(same_codec(back.multi_head[name], codec) for name, codec in whole.multi_head.items())
    assert back.multi_head[basis.name].basis is basis
    expected, fitted, fit = whole.compact(basis.name), [], fit_multi_head
    shapes, zeros = [], Moments.zeros
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_module, "fit_multi_head", lambda own: fitted.append(own.basis.name) or fit(own))
        patch.setattr(calibrate_module, "collect", None)  # no first pass
        patch.setattr(Moments, "zeros", lambda shape: shapes.append(shape) or zeros(shape))
        compact = calibrate(llama, TEXT, codec=basis.name, compact=True, **OF_HEADS)
    assert fitted == [basis.name] and shapes == [basis.shape(llama.geometry)]
    assert compact.meta == expected.meta and compact.statistics is None and not compact.bases
    assert same_codec(compact.multi_head[basis.name], expected.multi_head[basis.name])
    path = save_calibration(compact, tmp_path / "small.pt")
    assert torch.load(path, weights_only=True).keys() == {"format", "meta", basis.name}
    stored = load_calibration(path).multi_head[basis.name]
    torch.testing.assert_close(stored.E, compact.multi_head[basis.name].E, rtol=0, atol=0)
    return str(path)


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


# Channels of a group: all heads in one, or one for each head
@pytest.mark.parametrize(("name", "most"), covering([*NEW_BASES, "joint", "grouped", "framed"], [512, 24]))
def test_statistics_are_of_k_and_v_as_a_basis_arranges_them(llama, name, most, monkeypatch):
    basis, batches = (BASES | NEW_BASES)[name], windows(3, 40)
    monkeypatch.setattr(type(basis), "most_channels", most)
    gathered = collect_fisher(llama, batches, None, SINKS, {"own": basis, "joint": BASES["joint"]})
    own, rotary = gathered["own"], gathered["joint"].rotary
    assert own.rotary == (rotary if basis.unrotated else [])
    groups = 1 if most == 512 or name == "pairs" else H

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


@pytest.mark.parametrize("name", [*NEW_BASES, "joint", "grouped"])
def test_coordinates_follow_positions_where_keys_keep_them(llama, name, made, monkeypatch):
    """Without positions keys of any place are compressed alike."""
    codec, basis = made.multi_head.get(name), (BASES | NEW_BASES)[name]
    if name in NEW_BASES:
        monkeypatch.setitem(BASES, name, basis)
        codec = calibrate(llama, TEXT, codec=name, compact=True, **OF_HEADS).multi_head[name]
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
