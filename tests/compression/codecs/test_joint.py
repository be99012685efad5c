"""The joint basis: bases in a metric, one for K and V, from calibration to beam search."""

import pytest
import torch
from calibrations import OF_HEADS, TEXT, D, H, L
from multi_head import prompts, reads_like_the_reference, vectors
from sampling import covering
from tiny import windows
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression import codecs
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.codecs import BASES, QUANTIZERS, Compressor, MultiHead, Transform
from gpt2.compression.codecs.metric import fit_in_metric
from gpt2.compression.codecs.mixed import BLOCK
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.multi_head import apart, heads_per_group, side_by_side
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.settings import Setting, build, compressors_for, uniform
from gpt2.models.geometry import Geometry

# --- bases in a metric


def metric_and_vectors(rank: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """M [2, 8, 8] of a rank, and x [1, 2, 500, 8] with another covariance."""
    generator = torch.Generator().manual_seed(seed)
    weights, mixing = (torch.randn(2, 8, n, generator=generator, dtype=torch.float64) for n in (rank, 8))
    x = torch.randn(1, 2, 500, 8, generator=generator, dtype=torch.float64) @ mixing.mT + 3
    return weights @ weights.mT, x


def fitted(name: str, x: Tensor, metric: Tensor) -> tuple[Transform, Tensor]:
    """A basis of x in a metric, and its variances."""
    moments = Moments.zeros(Geometry.uniform(1, x.shape[1], x.shape[3]))
    moments.update(0, x)
    moments.metrics[BASES[name].metric] = metric[None]
    return BASES[name].fit(moments, 0)


def m_norm(error: Tensor, metric: Tensor) -> Tensor:
    """Σ eᵀ M e per head, [H]."""
    return torch.einsum("bhti,hij,bhtj->h", error, metric, error)


@pytest.mark.parametrize("name", ["attention", "fisher"])
def test_squared_error_of_coordinates_is_the_error_in_the_metric(name):
    with pytest.raises(PluginError, match=f"codec {name} needs statistics .*--metric {name}"):
        BASES[name].fit(Moments.zeros(Geometry.uniform(1, 2, 8)), 0)
    metric, x = metric_and_vectors()
    transform, variances = fitted(name, x, metric)
    torch.testing.assert_close(transform.D @ transform.E, torch.eye(8, dtype=torch.float64).expand(2, 8, 8))
    error = vectors(2, 50, d=8)
    torch.testing.assert_close((error @ transform.E).square().sum((0, 2, 3)), m_norm(error, metric))
    z = transform.forward(x)
    torch.testing.assert_close(z.var((0, 2), correction=0), variances, rtol=1e-4, atol=1e-6)
    assert (variances.diff(dim=-1) <= 0).all()


def test_a_cut_rank_loses_less_in_the_metric_than_any_other_basis():
    metric, x = metric_and_vectors()
    bases = {name: fitted(name, x, metric) for name in ("fisher", "pca", "random")}
    variances = bases["fisher"][1]
    for rank in (2, 5):
        cut = {name: transform.truncate(rank) for name, (transform, _) in bases.items()}
        lost = {name: m_norm(basis.inverse(basis.forward(x), 8) - x, metric) for name, basis in cut.items()}
        assert (lost["fisher"] < 0.9 * lost["pca"]).all() and (lost["fisher"] < lost["random"]).all()
        torch.testing.assert_close(lost["fisher"] / 500, variances[:, rank:].sum(-1), rtol=1e-4, atol=1e-6)


def test_directions_that_nothing_reads_come_back_all_the_same():
    metric, x = metric_and_vectors(rank=3)
    transform, variances = fitted("fisher", x, metric)
    torch.testing.assert_close(transform.inverse(transform.forward(x), 8), x)
    assert (variances[:, 3:].sum(-1) < 1e-3 * variances.sum(-1)).all()
    alike = torch.eye(8).expand(2, 8, 8)
    nothing, expected = (fit_in_metric(x.mean((0, 2)), alike, metric) for metric in (0 * alike, alike))
    torch.testing.assert_close(nothing[1], expected[1])
    assert torch.isfinite(nothing[0].D).all(), "where nothing reads any of them"


# --- the transform


FITS = {(3, 64): 3, (4, 64): 4, (8, 64): 4, (8, 128): 2, (4, 256): 1, (2, 512): 1, (6, 64): 3, (5, 128): 1, (1, 12): 1}
FITS_FRAMED = {(3, 64): 3, (8, 64): 2, (8, 128): 1, (4, 96): 2, (2, 512): 1}


def test_as_many_heads_share_a_basis_as_fit_and_fewer_of_framed():
    for heads, fits in ((heads_per_group, FITS), (BASES["framed"].heads_per_group, FITS_FRAMED)):
        assert {shape: heads(*shape) for shape in fits} == fits


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_side_by_side_and_apart_are_inverse(groups):
    k, v = vectors(6, 5), vectors(6, 5, seed=1)
    x = side_by_side(k, v, groups)
    assert x.shape == (2, groups, 5, 12 * D // groups)
    per = 6 // groups
    for group in range(groups):
        own = [side[:, head] for side in (k, v) for head in range(group * per, (group + 1) * per)]
        assert torch.equal(x[:, group], torch.cat(own, dim=-1)), "K of its heads, then V of them"
    assert all(map(torch.equal, apart(x, D), (k, v)))


def test_groups_of_heads_have_a_basis_each(llama, monkeypatch):
    monkeypatch.setattr(MultiHead, "most_channels", 24)
    made = calibrate(llama, TEXT, codec="joint", **OF_HEADS)
    assert [E.shape for E in made.multi_head["joint"].E] == [(2, 24, 24)] * L
    for quantizer, bits in {"mixed": 4, "mixed_fixed": 4, "int8": 8}.items():
        k, v = compressors_for("kv", bits, None, made, codec="joint", quantizer=quantizer, dtype=torch.float64)
        reads_like_the_reference(llama, CompressedDynamicCache(k, v), windows(2, 150))


# --- from calibration to generation


@pytest.mark.parametrize(
    ("length", "quantizer", "beams"), covering([3, 150, 30, 126, 62], ["mixed", "mixed_fixed"], [1, 2])
)
def test_from_a_file_to_tokens(llama, preset, quantizer, length, beams):
    """Prompts shorter than the sinks, than a block, that fill a block while they go on, and of several blocks."""
    cache = create_cache_from_preset(preset | {"quantizer": quantizer}, model=llama, dtype=torch.float64)
    out = reads_like_the_reference(llama, cache, **prompts(length), num_beams=beams)
    assert out.shape == (2, length + 5)
    stores = [store for layer in cache.layers for store in layer.stores.values()]
    assert len(stores) == L and all(store.compressor.joint for store in stores)
    blocks = (length + 4) // BLOCK
    assert {(len(store), store.compressed_blocks) for store in stores} == {(length + 4, blocks)}
    assert {type(store.compressor.quantizer).name for store in stores} == {quantizer}


def test_without_quantization_it_is_the_model_itself(llama, preset):
    """Also with beams, whose caches are reordered, and with padding; and beside layers of other codecs."""
    for generation in ({}, {"num_beams": 3}):
        cache = create_cache_from_preset(preset | {"quantizer": None, "bits": 16}, dtype=torch.float64)
        prompt = prompts(150)
        ours = reads_like_the_reference(llama, cache, **prompt, max_new_tokens=12, **generation)
        plain = llama.model.generate(prompt.pop("tokens"), **prompt, max_new_tokens=12, do_sample=False, **generation)
        assert torch.equal(ours, plain)
    setting = {"codec": "joint", "rank": D, "bits": 3.5, "quantizer": "mixed"}
    layers = {"k": [setting, {"codec": "identity", "rank": D, "bits": 8}, None], "v": [setting, None, None]}
    cache = create_cache_from_preset(preset | {"layers": layers}, dtype=torch.float64)
    assert [sorted(layer.stores) for layer in cache.layers] == [["KV"], ["K", "V"], ["K", "V"]]
    assert reads_like_the_reference(llama, cache, windows(2, 150)).shape == (2, 155)


# --- what is rejected


def test_a_joint_codec_is_one_object_for_both_sides(made):
    how = {"codec": "joint", "quantizer": "mixed"}
    compressors, (again, _) = (compressors_for("kv", 4, None, made, **how) for _ in range(2))
    k, exact = compressors[0], [codecs.IdentityCompressor()] * L
    for pair in ((k, again), (k, exact), (exact, k)):
        with pytest.raises(PluginError, match="layer 0: a joint codec is for K and V together"):
            CompressedDynamicCache(*pair)
    for side in "kv":
        with pytest.raises(PluginError, match="layer 0: .* K and V together: give both sides the same"):
            build(uniform(side, L, Setting("joint", None, 4, "mixed")), made.geometry, made)
    assert k[0].joint and not Compressor(QUANTIZERS["int8"]).joint and repr(k[0]) == "Compressor(mixed, rank=48)"
    assert k[0].to(torch.device("cpu")) is k[0] and k[0].to(torch.device("meta")).joint
    for name in ("joint+pca", "pca+joint", "ln_nullspace+joint", "grouped+pca"):
        with pytest.raises(PluginError, match="a basis that heads share doesn't combine with another"):
            codecs.basis_of(codecs.codec_name(name))
    cache, x = CompressedDynamicCache(*compressors), vectors(H, 5)
    cache.update(x, x, 0)
    with pytest.raises(PluginError, match=r"layer 1: .* K and V of one shape, .*\[2, 2, 5, 12\] and \[2, 2, 5, 6\]"):
        cache.update(x, x[..., :6], 1)
    with pytest.raises(PluginError, match=r"layer 0, KV: .*1 groups of 48 channels"):
        CompressedDynamicCache(*compressors).update(vectors(4, 5), vectors(4, 5), 0)


def test_a_calibration_without_gradients_has_none(calibration):
    for call in (calibration.fit_of, calibration.compact, lambda codec: calibration.transform("k", 0, codec=codec)):
        with pytest.raises(PluginError, match="joint is not in this calibration, it has no gradients.*--metric fisher"):
            call("joint")
