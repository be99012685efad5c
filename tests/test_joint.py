"""The joint codec: one basis for K and V, bytes shared at one price, from calibration to beam search."""

from functools import partial

import pytest
import torch
from test_cache import Reference, assert_same
from test_mixed import PRICES, least
from test_scripts import run
from tiny import tiny_loaded, tiny_model, windows, word_text, word_tokenizer
from torch import Tensor

from gpt2.compression import calibration_file
from gpt2.compression import joint as joint_module
from gpt2.compression.calibration import Calibration, calibrate
from gpt2.compression.calibration_file import load_calibration, save_calibration
from gpt2.compression.capture import Moments
from gpt2.compression.codecs import BASES, QUANTIZERS, Compressor, IdentityCompressor, JointTransform, codec_name
from gpt2.compression.codecs.joint import apart, heads_per_group, side_by_side
from gpt2.compression.codecs.metric import fit_in_metric
from gpt2.compression.codecs.mixed import BLOCK, PLANE, WIDTHS, Mixed, MixedFixed, width_bytes
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.joint import JointCodec, fit_joint
from gpt2.compression.plan import Setting, build, compressors_for, uniform
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.rotary import Rotary
from gpt2.compression.storage import TokenStore
from gpt2.data import by_position
from gpt2.errors import BadArtefact, PluginError
from gpt2.models import Geometry

TEXT = by_position("words", "words.txt", word_text(3000))
L, H, D = 3, 2, 12  # of the tiny llama


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def made(llama) -> Calibration:
    return calibrate(llama, TEXT, rank=9, codec="joint", samples=4, seq_len=200)


@pytest.fixture(scope="module")
def codec(made) -> JointCodec:
    return made.measured("joint")


@pytest.fixture
def preset(made, tmp_path):
    return {
        "model": "tiny-llama", "rank": D, "target": "kv", "bits": 3.5, "codec": "joint", "quantizer": "mixed",
        "head_dim": D, "num_layers": L, "calibration_file": str(save_calibration(made, tmp_path / "c.pt")),
    }  # fmt: skip


def vectors(heads: int, tokens: int, d: int = D, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(2, heads, tokens, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- bases in a metric


def moments_of(x: Tensor, metric: Tensor, name: str = "fisher") -> Moments:
    moments = Moments.zeros(Geometry(1, x.shape[1], x.shape[3]))
    moments.update(0, x)
    moments.metrics[name] = metric[None]
    return moments


def metric_and_vectors(rank: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """M [2, 8, 8] of a rank, and x [1, 2, 500, 8] with another covariance."""
    generator = torch.Generator().manual_seed(seed)
    felt, mixing = (torch.randn(2, 8, n, generator=generator, dtype=torch.float64) for n in (rank, 8))
    x = torch.randn(1, 2, 500, 8, generator=generator, dtype=torch.float64) @ mixing.mT + 3
    return felt @ felt.mT, x


def m_norm(error: Tensor, metric: Tensor) -> Tensor:
    """Σ eᵀ M e per head, [H]."""
    return torch.einsum("bhti,hij,bhtj->h", error, metric, error)


@pytest.mark.parametrize("name", ["attention", "fisher"])
def test_squared_error_of_coordinates_is_the_error_in_the_metric(name):
    metric, x = metric_and_vectors()
    transform, variances = BASES[name].fit(moments_of(x, metric, name), 0)
    torch.testing.assert_close(transform.D @ transform.E, torch.eye(8, dtype=torch.float64).expand(2, 8, 8))
    error = vectors(2, 50, d=8)
    torch.testing.assert_close((error @ transform.E).square().sum((0, 2, 3)), m_norm(error, metric))
    z = transform.forward(x)
    torch.testing.assert_close(z.var((0, 2), correction=0), variances, rtol=1e-4, atol=1e-6)
    assert (variances.diff(dim=-1) <= 0).all()


def test_a_cut_rank_loses_less_in_the_metric_than_any_other_basis():
    metric, x = metric_and_vectors()
    for rank in (2, 5):
        lost = {}
        for name in ("fisher", "pca", "random"):
            transform = BASES[name].fit(moments_of(x, metric), 0)[0].truncate(rank)
            lost[name] = m_norm(transform.inverse(transform.forward(x), 8) - x, metric)
        assert (lost["fisher"] < 0.9 * lost["pca"]).all() and (lost["fisher"] < lost["random"]).all()
        _, variances = BASES["fisher"].fit(moments_of(x, metric), 0)
        torch.testing.assert_close(lost["fisher"] / 500, variances[:, rank:].sum(-1), rtol=1e-4, atol=1e-6)


def test_directions_that_nothing_reads_come_back_all_the_same():
    metric, x = metric_and_vectors(rank=3)
    transform, variances = BASES["fisher"].fit(moments_of(x, metric), 0)
    torch.testing.assert_close(transform.inverse(transform.forward(x), 8), x)
    assert (variances[:, 3:].sum(-1) < 1e-3 * variances.sum(-1)).all()


def test_where_nothing_was_felt_the_metric_is_none():
    _, x = metric_and_vectors()
    nothing, alike = (fit_in_metric(x.mean((0, 2)), torch.eye(8).expand(2, 8, 8), m) for m in
                      (torch.zeros(2, 8, 8), torch.eye(8).expand(2, 8, 8)))  # fmt: skip
    torch.testing.assert_close(nothing[1], alike[1])
    assert torch.isfinite(nothing[0].D).all()


@pytest.mark.parametrize("name", ["attention", "fisher"])
def test_a_basis_without_its_statistics_says_what_to_do(name):
    _, x = metric_and_vectors()
    moments = Moments.zeros(Geometry(1, 2, 8))
    with pytest.raises(PluginError, match=f"codec {name} needs statistics .*--metric {name}"):
        BASES[name].fit(moments, 0)


# --- the transform


@pytest.mark.parametrize(("heads", "d", "per_group"), [(3, 64, 3), (4, 64, 4), (8, 64, 4), (8, 128, 2), (4, 256, 1),
                                                       (2, 512, 1), (6, 64, 3), (5, 128, 1), (1, 12, 1)])  # fmt: skip
def test_as_many_heads_share_a_basis_as_fit(heads, d, per_group):
    assert heads_per_group(heads, d) == per_group


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


@pytest.mark.parametrize("start", [0, 9, 5000])
@pytest.mark.parametrize("layer", range(L))
def test_the_round_trip_is_exact_wherever_it_starts(codec, start, layer):
    transform = codec.transform(layer).to("cpu", torch.float64)
    exact = transform.E.inverse()
    transform = JointTransform(transform.E, exact, transform.mean, transform.rotary)
    x = vectors(2 * H, 70)
    torch.testing.assert_close(transform.inverse(transform.forward(x, start), D, start), x)


def test_float32_is_exact_to_rounding(codec):
    """As a cache holds it, D beside E."""
    x = vectors(2 * H, 70, dtype=torch.float32)
    for layer in range(L):
        transform = codec.transform(layer)
        assert transform.D.dtype == torch.float32
        back = transform.inverse(transform.forward(x, 100), D, 100)
        assert (back - x).abs().max() < 1e-3 and not torch.equal(back, x)


def test_keys_that_differ_by_position_alone_have_the_same_coordinates(codec):
    """What makes keys of any position compress alike."""
    transform = codec.transform(1).to("cpu", torch.float64)
    k, v = vectors(H, 1).expand(-1, -1, 40, -1), vectors(H, 1, seed=1).expand(-1, -1, 40, -1)
    x = torch.cat((transform.rotary.turn(k, 300, 1), v), dim=1)
    z = transform.forward(x, 300)
    torch.testing.assert_close(z, z[:, :, :1].expand_as(z), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(transform.forward(x, 301), z, rtol=1e-2), "and elsewhere others"


def test_groups_of_heads_have_a_basis_each(llama, monkeypatch):
    monkeypatch.setattr("gpt2.compression.codecs.joint.MOST_CHANNELS", 24)
    made = calibrate(llama, TEXT, rank=9, codec="joint", samples=4, seq_len=200)
    assert made.joint.E.shape == (L, 2, 24, 24)
    for quantizer in ("mixed", "mixed_fixed", "int8", "none"):
        k, v = compressors_for("kv", 4 if "mixed" in quantizer else {"int8": 8}.get(quantizer, 16), L, made,
                               codec="joint", quantizer=quantizer, dtype=torch.float64)  # fmt: skip
        reads_like_the_reference(llama, CompressedDynamicCache(k, v), windows(2, 150))


# --- one price


def synthetic(demand: Tensor, errors: Tensor | None = None, w: int = 48) -> JointCodec:
    """A codec with a given demand [N, L], at prices from 1 down."""
    nothing = torch.zeros(0)
    N, layers = demand.shape
    E = torch.eye(w).expand(layers, 1, w, w)
    errors = torch.zeros(layers, 1, w, len(WIDTHS)) if errors is None else errors
    return JointCodec(nothing, E, nothing, [Rotary(nothing, "none")] * layers, errors, torch.arange(N) + 1.0, demand)


@pytest.mark.parametrize("bits", [1.5, 2, 3.25, 4, 6])
def test_layers_average_to_the_budget(codec, bits):
    w = 2 * H * D
    found = torch.tensor(codec.layer_bits(bits), dtype=torch.float64)
    assert bits - 8 * PLANE / BLOCK / w < found.mean() <= bits + 1e-6, "less than a plane of each layer is left"
    assert found.unique().numel() == L, "not the same for all"
    for own in found.tolist():
        stored = BLOCK * w * own / 8
        assert Mixed(own)._payload(w) + width_bytes(w) == pytest.approx(stored, abs=1e-3), "what a block really takes"


def test_what_a_layer_gets_is_what_it_buys_at_one_price(codec):
    """Between the same two neighbouring prices for every layer."""
    w = 2 * H * D
    for bits in (2, 4):
        spent = torch.tensor([own * BLOCK * w / 8 - width_bytes(w) for own in codec.layer_bits(bits)])
        inside = (codec.demand[1:] <= spent + PLANE) & (spent <= codec.demand[:-1] + 1e-3)
        assert inside.all(1).any()


def test_a_layer_whose_errors_weigh_more_gets_more():
    """Four times the error at every width is worth a bit more of each coordinate, as theory has it."""
    z = (
        torch.randn(2, 1, 1, 40 * BLOCK, 48, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 2.0])[:, None, None, None, None]
    )
    per_layer = [joint_module.errors(own)[0] for own in z]
    prices, demand = joint_module._demand(per_layer)
    assert (prices.diff() > 0).all() and (demand.diff(dim=0) <= 0).all()
    codec = synthetic(demand)
    one, other = codec.layer_bits(4.0)
    assert other - one == pytest.approx(1, abs=0.15)


def test_a_layer_that_hardly_matters_may_get_less_than_any_preset():
    """Its budget isn't one that a user could ask for, and the cache is made all the same."""
    demand = torch.tensor([[3000.0, 10.0], [1500.0, 0.0], [0.0, 0.0]])
    codec = synthetic(demand)
    rich, poor = codec.layer_bits(2.0)
    assert poor < 0.25 < rich
    z = torch.randn(1, 1, BLOCK, 48)
    quantizer = codec.quantizer(QUANTIZERS["mixed"].at(2.0), 1)
    assert not quantizer.dequantize(quantizer.quantize(z), 48).any(), "nothing is left but the mean"


def test_bits_out_of_reach_name_the_range(codec):
    low, high = codec.bits_range()
    assert 0 < low < 1 and 6 < high < 10.5
    for bits in (low - 0.01, high + 0.1):
        with pytest.raises(PluginError, match=rf"bits {bits:g}: this codec takes {low:.2f} to {high:.2f} bits"):
            codec.layer_bits(bits)
    for bits in (low + 1e-6, high - 1e-6):
        codec.layer_bits(bits)


@pytest.mark.parametrize("bits", [1, 2.5, 4, 7])
def test_fixed_widths_meet_the_budget_and_are_the_best(codec, bits):
    widths = codec.widths(bits)
    assert widths.shape == (L, 1, 2 * H * D)
    budget, spent = bits * BLOCK / 8 * widths.numel(), int(PRICES[widths].sum())
    assert budget - max(PRICES) < spent <= budget
    error = codec.errors.flatten(0, 2)
    total = float(error.double().gather(-1, widths.flatten()[:, None]).sum())
    assert total <= least(error, spent) * (1 + 1e-6) + 1e-12
    assert len(widths.float().mean((1, 2)).unique()) > 1, "layers share one budget"


@pytest.mark.parametrize("quantizer", ["mixed", "mixed_fixed"])
@pytest.mark.parametrize("bits", [2.5, 4])
def test_the_cache_takes_the_bytes_that_were_asked_for(made, quantizer, bits):
    """Everything counted, over all layers: the bits of a setting are those of the memory that it takes."""
    k, v = compressors_for("kv", bits, L, made, codec="joint", quantizer=quantizer)
    cache = CompressedDynamicCache(k, v, sink_tokens=0)
    x = vectors(H, 10 * BLOCK, dtype=torch.float32)
    for layer in cache.layers:
        layer.store(x, x)
    stored = 8 * cache.nbytes() / (2 * L * x.numel())
    assert bits - 0.2 < stored <= bits * 1.0001


def test_other_quantizers_are_the_same_in_every_layer(codec):
    assert codec.quantizer(QUANTIZERS["int8"], 1) is QUANTIZERS["int8"]
    fixed = codec.quantizer(QUANTIZERS["mixed_fixed"].at(3), 2)
    assert isinstance(fixed, MixedFixed) and torch.equal(fixed.widths, codec.widths(3)[2])


def test_errors_are_those_of_the_reservoir(llama):
    from gpt2.compression.capture import collect
    from gpt2.compression.gradients import collect_fisher

    batches = windows(3, 200)
    gradients, _ = collect_fisher(llama, batches, collect(llama, batches, 4), 4)
    codec = fit_joint(gradients)
    for layer in range(L):
        z = (gradients.reservoir[layer].float() - codec.mean[layer, :, None]) @ codec.E[layer]
        torch.testing.assert_close(codec.errors[layer, 0, :, 0], z[0].square().mean(0) * BLOCK, rtol=1e-4, atol=1e-5)
    assert codec.spectrum.mean() == pytest.approx(1, rel=1e-4), "one unit for the whole model"


def test_the_way_back_of_large_bases_with_several_threads():
    """Batches of matrices this large fail in PyTorch 2.13 with MKL and more than one thread."""
    from gpt2.compression.joint import stand_in

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codec = stand_in(8, 3, 64)
        codec.E = torch.randn(8, 1, 384, 384)
        assert (codec.E.double() @ codec.D.double() - torch.eye(384)).abs().max() < 1e-2
    finally:
        torch.set_num_threads(before)


# --- from calibration to generation


def reads_like_the_reference(llama, cache, tokens, tolerance: float = 1e-4, **generation):
    """Generate; then every store reads as its tokens would, coded block by block. Returns the tokens.

    tolerance: share of the numbers that may differ, by codes that rounding tips over.
    """
    chunks, append, crop, map_ = {}, TokenStore.append, TokenStore.crop, TokenStore.map_

    def record(operation, original):
        def recorded(store, argument):
            chunks.setdefault(id(store), []).append((operation, argument))
            return original(store, argument)

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        for name, original in (("append", append), ("crop", crop), ("map_", map_)):
            patch.setattr(TokenStore, name, record(name, original))
        out = llama.model.generate(tokens, past_key_values=cache, do_sample=False, **{"max_new_tokens": 5} | generation)
    for layer in cache.layers:
        for store in layer.stores.values():
            reference = Reference(store.compressor, (store.sink_tokens, store.recent_tokens))
            for operation, argument in chunks[id(store)]:
                getattr(reference, operation)(argument)
            assert len(store) == len(reference.tokens)
            same = torch.isclose(store.read(), reference.read(), rtol=1e-3, atol=1e-3)
            assert same.float().mean() > 1 - tolerance
    return out


def padded(length: int) -> dict[str, Tensor]:
    """Two prompts, the second with padding on the left."""
    tokens = windows(2, length)
    mask = torch.ones_like(tokens)
    tokens[1, :3], mask[1, :3] = 0, 0
    return {"tokens": tokens, "attention_mask": mask}


@pytest.mark.parametrize("quantizer", ["mixed", "mixed_fixed"])
@pytest.mark.parametrize("length", [3, 30, 62, 150])
def test_from_a_file_to_tokens(llama, preset, quantizer, length):
    """Prompts shorter than the sinks, than a block, that fill a block while they go on, and of several blocks."""
    cache = create_cache_from_preset(preset | {"quantizer": quantizer}, model=llama, dtype=torch.float64)
    out = reads_like_the_reference(llama, cache, **padded(length))
    assert out.shape == (2, length + 5)
    stores = [store for layer in cache.layers for store in layer.stores.values()]
    assert len(stores) == L and all(store.compressor.joint for store in stores)
    blocks = (length + 4) // BLOCK
    assert {(len(store), store.compressed_blocks) for store in stores} == {(length + 4, blocks)}
    assert {type(store.compressor.quantizer).name for store in stores} == {quantizer}


def test_without_quantization_it_is_the_model_itself(llama, preset):
    """Also with beams, whose caches are reordered, and with padding."""
    for generation in ({}, {"num_beams": 3}):
        make = partial(create_cache_from_preset, preset | {"quantizer": None, "bits": 16}, dtype=torch.float64)
        prompt = padded(150)
        ours = reads_like_the_reference(llama, make(), **prompt, max_new_tokens=12, **generation)
        plain = llama.model.generate(prompt.pop("tokens"), **prompt, max_new_tokens=12, do_sample=False, **generation)
        assert torch.equal(ours, plain)


def test_beams_at_few_bits(llama, preset):
    cache = create_cache_from_preset(preset, dtype=torch.float64)
    out = reads_like_the_reference(llama, cache, **padded(126), num_beams=2, max_new_tokens=8)
    assert out.shape == (2, 134) and cache.layers[0].get_seq_length() == 133


def test_a_crop_across_blocks(llama, made):
    k, v = compressors_for("kv", 4, L, made, codec="joint", quantizer="mixed", dtype=torch.float64)
    store, reference = TokenStore(k[0], 4, 3), Reference(k[0], (4, 3))
    x = vectors(2 * H, 260, dtype=torch.float32)
    store.prepare(x, "test")
    for side in (store, reference):
        side.append(x[:, :, :200])
    for n in (5, 20, 64, 1):
        for operation, argument in (("crop", n), ("append", x[:, :, 200 : 200 + n // 2])):
            for side in (store, reference):
                getattr(side, operation)(argument)
            assert_same(store, reference)


def test_layers_with_and_without_a_joint_codec(llama, preset):
    setting = {"codec": "joint", "rank": D, "bits": 3.5, "quantizer": "mixed"}
    int8 = {"codec": "identity", "rank": D, "bits": 8}
    layers = {"k": [setting, int8, None], "v": [setting, None, None]}
    cache = create_cache_from_preset(preset | {"layers": layers}, dtype=torch.float64)
    assert [sorted(layer.stores) for layer in cache.layers] == [["KV"], ["K", "V"], ["K", "V"]]
    assert reads_like_the_reference(llama, cache, windows(2, 150)).shape == (2, 155)
    cache.crop(-60)
    assert {layer.get_seq_length() for layer in cache.layers} == {94}
    cache.batch_select_indices(torch.tensor([1]))
    assert llama.model(windows(1, 3), past_key_values=cache).logits.shape[0] == 1


def test_keeping_reconstructions_changes_no_token(llama, preset):
    one, other = (create_cache_from_preset(preset, dtype=torch.float64) for _ in range(2))
    prompt, more = windows(2, 100), {"max_new_tokens": 40, "do_sample": False}
    kept = llama.model.generate(prompt, past_key_values=one.keep_expanded(), **more)
    assert torch.equal(kept, llama.model.generate(prompt, past_key_values=other, **more))
    assert one.nbytes() > other.nbytes()


# --- what is refused


def test_a_joint_codec_is_one_object_for_both_sides(made):
    k, _ = compressors_for("kv", 4, L, made, codec="joint", quantizer="mixed")
    again, _ = compressors_for("kv", 4, L, made, codec="joint", quantizer="mixed")
    for pair in ((k, again), (k, [IdentityCompressor()] * L), ([IdentityCompressor()] * L, k)):
        with pytest.raises(PluginError, match="layer 0: a joint codec is for K and V together"):
            CompressedDynamicCache(*pair)


@pytest.mark.parametrize("target", ["k", "v"])
def test_a_joint_codec_of_one_side_is_refused(made, target):
    with pytest.raises(PluginError, match="layer 0: a joint codec is for K and V together: give both sides the same"):
        build(uniform(target, L, Setting("joint", None, 4, "mixed")), D, made)


def test_values_of_another_shape_than_keys_are_refused(made):
    k, v = compressors_for("kv", 4, L, made, codec="joint", quantizer="mixed")
    cache = CompressedDynamicCache(k, v)
    with pytest.raises(PluginError, match=r"layer 1: .* K and V of one shape, .*\[2, 2, 5, 12\] and \[2, 2, 5, 6\]"):
        cache.update(vectors(2, 5), vectors(2, 5, d=6), 1)


def test_another_models_heads_are_refused(made):
    k, v = compressors_for("kv", 4, L, made, codec="joint", quantizer="mixed")
    with pytest.raises(PluginError, match=r"layer 0, KV: .*1 groups of 48 channels"):
        CompressedDynamicCache(k, v).update(vectors(4, 5), vectors(4, 5), 0)


@pytest.mark.parametrize("name", ["joint+pca", "pca+joint", "ln_nullspace+joint"])
def test_a_joint_basis_combines_with_none(name):
    from gpt2.compression.codecs import basis_of

    with pytest.raises(PluginError, match="a joint basis doesn't combine with another"):
        basis_of(codec_name(name))


def test_a_calibration_without_gradients_has_none(llama):
    plain = calibrate(llama, TEXT, rank=9, samples=2, seq_len=48)
    for ask in (lambda: plain.measured("joint"), plain.compact, lambda: plain.transform("k", 0, codec="joint")):
        with pytest.raises(PluginError, match="joint is not in this calibration, it has no gradients.*--metric fisher"):
            ask()


# --- files


def same_codec(a: JointCodec, b: JointCodec) -> bool:
    left, right = a.record(), b.record()
    lists = all(map(torch.equal, left.pop("frequencies"), right.pop("frequencies")))
    plain = all(left.pop(name) == right.pop(name) for name in ("layouts", "widths"))
    return lists and plain and all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_loaded_is_what_was_saved(made, tmp_path):
    back = load_calibration(save_calibration(made, tmp_path / "c.pt"))
    assert same_codec(back.joint, made.joint) and back.meta == made.meta
    for side in ("k", "v"):
        own, read = (getattr(c.statistics, side).metrics for c in (made, back))
        assert own.keys() == read.keys() == {"attention", "fisher"}
        assert all(torch.equal(own[name], read[name]) for name in own)
    for codec in ("attention", "fisher", "pca", "joint"):
        assert torch.equal(back.transform("v", 1, codec=codec).E, made.transform("v", 1, codec=codec).E)


def test_the_files_own_basis_is_that_of_single_heads(made):
    """What a joint calibration shows as energy, and gives where another codec isn't named."""
    assert made.bases["k"]["E"].shape == (L, H, D, D) and made.energy("v").shape == (L, H, D)
    assert torch.equal(made.transform("k", 0, 9, "fisher").E, made.bases["k"]["E"][0][..., :9])
    assert made.transform("k", 0).joint


def test_a_compact_file_is_small_and_reads_the_same(llama, made, preset, tmp_path):
    whole, path = tmp_path / "c.pt", save_calibration(made.compact(), tmp_path / "small.pt")
    assert path.stat().st_size < whole.stat().st_size / 2
    assert torch.load(path, weights_only=True)["joint"]["E"].dtype == torch.float16
    back = load_calibration(path)
    assert back.meta == made.compact().meta and back.statistics is None and not back.bases
    torch.testing.assert_close(back.joint.E, made.joint.E, rtol=2e-3, atol=1e-4)
    assert back.joint.layer_bits(3) == made.joint.layer_bits(3)
    for layer in range(L):
        transform = back.transform("k", layer).to("cpu", torch.float64)
        x = vectors(2 * H, 20)
        exact = JointTransform(transform.E, transform.E.inverse(), transform.mean, transform.rotary)
        torch.testing.assert_close(transform.inverse(exact.forward(x), D), x, rtol=1e-3, atol=1e-3)
    reads_like_the_reference(
        llama, create_cache_from_preset(preset | {"calibration_file": str(path)}, model=llama, dtype=torch.float64),
        windows(2, 150),
    )  # fmt: skip
    x = vectors(2 * H, 128, dtype=torch.float32) * 3
    lost = []
    for calibration in (made, back):
        k, _ = compressors_for("kv", 4, L, calibration, codec="joint", quantizer="mixed")
        lost.append(float((k[0].expand(k[0].compress(x), D, x.dtype) - x).square().mean()))
    assert lost[1] == pytest.approx(lost[0], rel=0.05)


def test_a_compact_file_has_no_other_codec(made, tmp_path):
    back = load_calibration(save_calibration(made.compact(), tmp_path / "small.pt"))
    for codec in ("pca", "fisher", "random"):
        with pytest.raises(PluginError, match=f"codec {codec}: this is a compact calibration of tiny-llama.*--compact"):
            back.transform("k", 0, codec=codec)


def refused(path, *words: str) -> None:
    with pytest.raises(BadArtefact) as error:
        load_calibration(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message


def spoiled(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[3] = float("inf")
    return t


TENSORS = ("mean", "E", "spectrum", "errors", "prices", "demand")
DAMAGE = {f"{name} gone": (name, lambda t: None) for name in TENSORS}
DAMAGE |= {f"{name} infinite": (name, spoiled) for name in TENSORS}
DAMAGE |= {f"{name} of another shape": (name, lambda t: t[..., :-1] if t.ndim > 1 else t[:1]) for name in TENSORS}
DAMAGE |= {f"{name} a list": (name, lambda t: t.tolist()) for name in TENSORS}
DAMAGE |= {f"{name} gone": (name, lambda x: None) for name in ("layouts", "frequencies", "widths")}
DAMAGE |= {f"{name} too few": (name, lambda x: x[1:]) for name in ("layouts", "frequencies", "widths")}
DAMAGE |= {
    "another layout": ("layouts", lambda x: ["diagonal", *x[1:]]),
    "a layout that can't be hashed": ("layouts", lambda x: [[], *x[1:]]),
    "frequencies of too many channels": ("frequencies", lambda x: [torch.ones(D), *x[1:]]),
    "frequencies infinite": ("frequencies", lambda x: [spoiled(x[0]), *x[1:]]),
    "frequencies of no tensor": ("frequencies", lambda x: [3, *x[1:]]),
    "a basis of other channels": ("E", lambda t: t[:, :, :40, :40]),
    "other widths": ("widths", lambda x: [0, 1, *x[2:]]),
}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("name", "change"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(made, tmp_path, name, change, compact):
    path = save_calibration(made.compact() if compact else made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    record["joint"][name] = change(record["joint"][name])
    torch.save(record, path)
    refused(path, f"'joint.{name}'", "expected", "make the file again")


def test_a_basis_that_has_no_way_back_is_refused(made, tmp_path):
    path = save_calibration(made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    record["joint"]["E"][1, 0, :, 3] = 0
    torch.save(record, path)
    back = load_calibration(path)
    with pytest.raises(BadArtefact, match="basis .* no inverse: make the calibration again"):
        back.transform("k", 1)


@pytest.mark.parametrize("value", [None, 3, [1]])
def test_a_joint_part_that_is_none_is_named(made, tmp_path, value):
    path = save_calibration(made, tmp_path / "c.pt")
    torch.save(torch.load(path, weights_only=True) | {"joint": value}, path)
    refused(path, "'joint'", "expected a dict")


def test_a_joint_file_without_its_codec_is_named(made, tmp_path):
    path = save_calibration(made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    del record["joint"]
    torch.save(record, path)
    refused(path, "'joint'", "a joint codec, as meta.codec says")


@pytest.mark.parametrize(
    ("change", "words"),
    [(3, ["a dict of each side", "int"]), ({"k": [1]}, ["a dict of each side", "list"]),
     ({"k": {"fisher": torch.zeros(2)}}, ["'statistics.metrics.k.fisher'", "[3, 2, 12, 12]"])],
)  # fmt: skip
def test_damaged_metrics_are_named(made, tmp_path, change, words):
    path = save_calibration(made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    record["statistics"]["metrics"] = change
    torch.save(record, path)
    refused(path, *words)


def test_an_older_file_has_neither_metrics_nor_a_joint_codec(llama, tmp_path):
    made = calibrate(llama, TEXT, rank=9, samples=2, seq_len=48)
    path = save_calibration(made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    del record["statistics"]["metrics"], record["meta"]["metric"]
    torch.save(record, path)
    back = load_calibration(path)
    assert torch.equal(back.transform("k", 0).E, made.transform("k", 0).E) and back.joint is None
    with pytest.raises(PluginError, match="codec attention needs statistics that this calibration doesn't have"):
        back.transform("k", 0, codec="attention")


def test_a_calibration_without_gradients_is_not_used_again_for_a_metric(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration_file.results, "RESULTS", tmp_path / "checkout")
    asked = {"given": None, "rank": 9, "samples": 2, "seq_len": 80, "seed": 0, "sink_tokens": 4}
    _, plain = calibration_file.obtain_calibration(llama, TEXT, **asked)
    gradients, fisher = calibration_file.obtain_calibration(llama, TEXT, metric="fisher", **asked)
    assert fisher != plain and gradients.joint is not None
    assert calibration_file.obtain_calibration(llama, TEXT, metric="fisher", **asked)[1] == fisher
    assert calibration_file.obtain_calibration(llama, TEXT, **asked)[1] in (plain, fisher), "either has what pca needs"


# --- the script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "codec", "joint"),
    [([], "pca", False), (["--metric", "attention"], "attention", False), (["--metric", "fisher"], "fisher", True),
     (["--codec", "joint"], "joint", True), (["--codec", "joint", "--compact"], "joint", True),
     (["--codec", "joint", "--gradient-checkpointing"], "joint", True),
     (["--metric", "fisher", "--codec", "pca"], "pca", True), (["--metric", "fisher", "--compact"], "joint", True)],
)  # fmt: skip
def test_the_script_gathers_what_is_asked_for(flags, codec, joint, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(word_text(3000))
    common = ["--model", folder, "--text", "words.txt", "--samples", 2, "--seq-len", 80, "--output", "c.pt"]
    assert run("calibrate_kv_lowrank", *common, *flags) == 0
    made = load_calibration(tmp_path / "c.pt")
    assert made.meta["codec"] == codec and (made.joint is not None) == joint
    assert (made.statistics is None) == ("--compact" in flags)
    assert "need no gradients" not in capsys.readouterr().out


def test_a_compact_file_needs_gradients(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(word_text(3000))
    common = ["--model", folder, "--text", "words.txt", "--samples", 2, "--seq-len", 80, "--output", "c.pt"]
    assert run("calibrate_kv_lowrank", *common, "--compact") == 2
    assert (
        "joint or grouped alone, and both need gradients" in capsys.readouterr().err
        and not (tmp_path / "c.pt").exists()
    )


def test_a_single_compressor_says_that_it_is_joint(made):
    k, _ = compressors_for("kv", 4, L, made, codec="joint", quantizer="mixed")
    assert k[0].joint and not Compressor(QUANTIZERS["int8"]).joint and repr(k[0]) == "Compressor(mixed, rank=48)"
    assert k[0].to(torch.device("cpu")) is k[0] and k[0].to(torch.device("meta")).joint
