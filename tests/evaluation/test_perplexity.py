"""Perplexity through a real cache, its interval, and bytes: figures that are checked against arithmetic."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_loaded
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import cache_bytes, compression_ratio
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor, Transform
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.settings import compressors_for
from gpt2.evaluation.perplexity import BASELINE, Scores, baseline_factory, compare, score
from gpt2.evaluation.statistics import paired_bootstrap
from gpt2.models.geometry import Geometry

SEGMENTS = torch.randint(2, 97, (3, 65), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


def identity():
    return identity_cache(3)


def lossy(bits: int = 4, target: str = "kv"):
    return lambda: CompressedDynamicCache(*compressors_for(target, bits, 3, None))


@torch.no_grad()
def direct_nll(loaded, segments):
    """One forward pass without any cache, in float64 after the logits."""
    log_p = loaded.model(segments, use_cache=False).logits.double().log_softmax(-1)[:, :-1]
    return -log_p.gather(-1, segments[:, 1:, None])[..., 0].numpy()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 65, 1000])
def test_streaming_equals_one_forward_pass(llama, family, chunk):
    """65 tokens: chunks of 7 leave a remainder, chunks of 64 a last token that predicts nothing."""
    loaded = llama if family == "llama" else tiny_loaded(family)
    segments = SEGMENTS[: 1 if chunk == 1 else 3]
    nll = score(loaded, segments, {BASELINE: baseline_factory(loaded)}, chunk=chunk)[BASELINE].nll
    assert nll.shape == (len(segments), 64) and np.abs(nll - direct_nll(loaded, segments)).max() < 1e-4


@pytest.mark.parametrize("chunk", [7, 64])
def test_the_identity_cache_moves_no_token(llama, chunk):
    scores = score(llama, SEGMENTS, {"ours": identity, BASELINE: baseline_factory(llama)}, chunk=chunk)
    ours = scores["ours"]
    assert np.array_equal(ours.nll, scores[BASELINE].nll) and not ours.kl.any() and ours.agree.all()
    record = compare(scores[BASELINE], ours)
    assert record["ppl_delta"] == 0 and record["ppl_delta_interval"] == [0, 0]
    assert record["kl_nats"] == 0 and record["top1_agreement"] == 1


def test_a_lossy_cache_moves_tokens_and_fewer_bits_move_them_more(llama):
    caches = {BASELINE: baseline_factory(llama), "8": lossy(8), "4": lossy(4)}
    scores = score(llama, SEGMENTS, caches, chunk=16)
    records = {bits: compare(scores[BASELINE], scores[bits]) for bits in ("8", "4")}
    assert 0 < records["8"]["kl_nats"] < records["4"]["kl_nats"]
    assert records["8"]["top1_agreement"] > records["4"]["top1_agreement"] and records["4"]["top1_agreement"] < 1
    assert all(np.abs(scores[bits].nll - scores[BASELINE].nll).max() > 1e-3 for bits in ("8", "4"))
    # KL is a sum that float32 may round below zero, by no more than its own rounding
    assert all(scores[bits].kl.min() > -1e-5 for bits in ("8", "4"))


def test_sinks_and_what_precedes_the_first_code_are_exact(llama):
    """Token 4 is the first that is coded, so the predictions made at tokens 0 to 3 can't move, and later ones do."""
    scores = score(llama, SEGMENTS, {BASELINE: baseline_factory(llama), "x": lossy()}, chunk=65)
    moved = np.abs(scores["x"].nll - scores[BASELINE].nll)
    assert moved[:, :4].max() < 1e-5 < moved[:, 4:].max(axis=1).min(), "also within one chunk: what is stored is read"


def test_kl_is_from_the_baseline(llama):
    """KL(baseline ‖ cache), computed apart; the other direction differs."""
    scores = score(llama, SEGMENTS[:1], {BASELINE: baseline_factory(llama), "x": lossy()}, chunk=65)["x"]
    with torch.no_grad():
        p, q = (
            llama.model(SEGMENTS[:1], past_key_values=c).logits[0, :-1].double().log_softmax(-1)
            for c in (DynamicCache(), lossy()())
        )
    assert np.abs(scores.kl[0] - (p.exp() * (p - q)).sum(-1).numpy()).max() < 1e-5
    assert np.abs(scores.kl[0] - (q.exp() * (q - p)).sum(-1).numpy()).max() > 1e-3
    assert np.array_equal(scores.agree[0], (p.argmax(-1) == q.argmax(-1)).numpy())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batch_size_doesnt_matter(llama, batch_size):
    caches = {BASELINE: baseline_factory(llama), "x": lossy()}
    together = score(llama, SEGMENTS, caches, chunk=16, batch_size=3)
    other = score(llama, SEGMENTS, caches, chunk=16, batch_size=batch_size)
    for name in caches:
        assert np.abs(together[name].nll - other[name].nll).max() < 1e-3
    batches = []
    score(llama, SEGMENTS, caches, batch_size=batch_size, progress=lambda items: batches.extend(items) or batches)
    assert len(batches) == math.ceil(3 / batch_size), "progress wraps the batches"


def test_every_batch_gets_a_fresh_cache(llama):
    same = SEGMENTS[:1].expand(3, -1)
    nll = score(llama, same, {"x": lossy()}, batch_size=1)["x"].nll
    assert np.array_equal(nll[0], nll[1]) and np.array_equal(nll[0], nll[2])


def test_the_baseline_runs_first_whatever_the_order_and_may_be_left_out(llama):
    scores = score(llama, SEGMENTS, {"a": lossy(), BASELINE: baseline_factory(llama)})
    assert scores["a"].kl is not None and scores[BASELINE].kl is None
    alone = score(llama, SEGMENTS, {"a": lossy()})["a"]
    assert alone.kl is None and alone.agree is None and np.array_equal(alone.nll, scores["a"].nll)
    assert "kl_nats" not in compare(scores[BASELINE], alone)


def test_a_loss_that_is_not_finite_is_refused_by_cache(llama):
    class Broken(type(QUANTIZERS["int8"])):
        def dequantize(self, fields, rank):
            return super().dequantize(fields, rank) * float("nan")

    def broken():
        return CompressedDynamicCache([Compressor(Broken())] * 3, [IdentityCompressor()] * 3)

    with pytest.raises(PluginError, match="loss with cache 'broken' is NaN or infinite: try --dtype float32"):
        score(llama, SEGMENTS, {BASELINE: baseline_factory(llama), "broken": broken})


def test_perplexity_and_delta_by_hand():
    baseline, other = (Scores(np.log(np.array([[2.0, 8.0], [4.0, 4.0]]) * factor)) for factor in (1, 1.1))
    record = compare(baseline, other)
    assert record["baseline_ppl"] == pytest.approx(4) and record["ppl"] == pytest.approx(4.4)
    assert record["ppl_delta"] == pytest.approx(0.1) and record["ppl_delta_interval"] == pytest.approx([0.1, 0.1])
    assert record["tokens"] == 4


# --- bootstrap


@pytest.mark.parametrize("shape", [(1, 10), (3, 64), (4, 200), (2, 2047)])
@pytest.mark.parametrize("shift", [0.0, 0.05, -0.3])
def test_a_constant_shift_has_no_width(shape, shift):
    """Also where the last block of a segment is shorter than the others."""
    assert paired_bootstrap(np.full(shape, shift)) == pytest.approx([math.expm1(shift)] * 2, abs=1e-9)


def test_the_interval_covers_the_mean_and_narrows_with_tokens():
    noise = np.random.default_rng(0).normal(0, 1, (16, 2047))
    noise -= noise.mean()
    low, high = paired_bootstrap(noise)
    assert low < 0 < high
    # ± 1.96 σ / √n for independent tokens
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(noise.size), rel=0.2)
    few_low, few_high = paired_bootstrap(noise[:2])
    assert few_high - few_low > 2 * (high - low)
    assert paired_bootstrap(noise, level=0.5)[1] < high


def test_tokens_of_a_block_move_together():
    """Neighbours that agree are one observation, not 64: the interval is eight times as wide."""
    blocks = np.random.default_rng(0).normal(0, 1, (4, 32))
    together, apart = np.repeat(blocks, 64, axis=1), np.random.default_rng(0).normal(0, 1, (4, 2048))
    widths = [np.subtract(*paired_bootstrap(x)) for x in (together, apart)]
    assert widths[0] / widths[1] == pytest.approx(8, rel=0.25)


def test_the_bootstrap_repeats_by_seed():
    noise = np.random.default_rng(0).normal(0, 1, (4, 200))
    assert paired_bootstrap(noise, 1) == paired_bootstrap(noise, 1) != paired_bootstrap(noise, 2)


# --- bytes

SHAPE = Geometry(2, 3, 64)


def with_codecs(target: str, bits: int, **windows):
    return lambda: CompressedDynamicCache(*compressors_for(target, bits, SHAPE.num_layers, None), **windows)


@pytest.mark.parametrize("tokens", [512, 2048, 3000])
def test_the_identity_cache_is_no_smaller_and_hardly_larger(tokens):
    ratio = compression_ratio(lambda: identity_cache(2), SHAPE, tokens)
    assert 0.95 <= ratio <= 1


@pytest.mark.parametrize(("bits", "per_vector"), [(16, 128), (8, 64 + 4), (4, 32 + 4)])
@pytest.mark.parametrize("target", ["v", "k", "kv"])
@pytest.mark.parametrize("windows", [{}, {"sink_tokens": 0}, {"sink_tokens": 64, "recent_tokens": 128}])
def test_the_ratio_is_arithmetic(target, bits, per_vector, windows):
    """16-bit vectors of 64 channels are 128 bytes; codes have a scale and an offset of two bytes each beside them."""
    exact = (windows | {"sink_tokens": windows.get("sink_tokens", 4)}).values()
    coded_side = 2048 * 128 if bits == 16 else sum(exact) * 128 + (2048 - sum(exact)) * per_vector
    held = len(target) * coded_side + (2 - len(target)) * 2048 * 128
    assert compression_ratio(with_codecs(target, bits, **windows), SHAPE) == pytest.approx(
        2 * 2048 * 128 / held, rel=0.01
    )


@pytest.mark.parametrize("rank", [48, 13])
def test_low_rank_stores_rank_coordinates(rank):
    E = torch.eye(64).expand(3, 64, 64)
    low = [Compressor(QUANTIZERS["none"], Transform(E, E.mT, torch.zeros(3, 64)).truncate(rank))] * 2

    def make():
        return CompressedDynamicCache([IdentityCompressor()] * 2, low)

    held = 2048 * 128 + 4 * 128 + 2044 * 2 * rank
    assert compression_ratio(make, SHAPE) == pytest.approx(2 * 2048 * 128 / held, rel=0.01)
    assert make().codec_bytes() == 2 * 4 * (2 * 3 * 64 * rank + 3 * 64), "beside the ratio, never in it"


def test_the_ratio_is_of_a_16_bit_model_at_a_stated_length():
    """At 64 tokens the sinks weigh more, and room that is allocated but unused counts."""
    short, long = (compression_ratio(with_codecs("kv", 4), SHAPE, tokens) for tokens in (64, 2048))
    assert short < long - 0.2
    assert compression_ratio(lambda: identity_cache(2), SHAPE, 64, torch.float32) == pytest.approx(0.5, rel=0.3)


def test_bytes_count_storages_once_and_whole():
    cache = DynamicCache()
    large = torch.zeros(1, 1, 100, 8)
    cache.update(large[:, :, :2], large[:, :, :2], 0)
    first = cache_bytes(cache)
    cache.layers[0].keys = cache.layers[0].values = large[:, :, :1]
    assert first >= 2 * 2 * 8 * 4 and cache_bytes(cache) == 100 * 8 * 4


@torch.no_grad()
def test_bytes_of_a_cache_that_a_model_filled(llama):
    ours, models = identity_cache(3), DynamicCache()
    for cache in (ours, models):
        llama.model(SEGMENTS, past_key_values=cache)
    assert cache_bytes(models) == 3 * 65 * llama.geometry.bytes_per_token(4)
    assert 1 <= cache_bytes(ours) / cache_bytes(models) < 1.05


def test_the_ratio_knows_that_transformers_drops_what_a_window_hides():
    """Mistral's own cache keeps 7 tokens of its window of 8: storing all of them is no compression."""
    loaded = tiny_loaded("mistral")
    ratio = compression_ratio(lambda: identity_cache(3), loaded.geometry, 512, config=loaded.model.config)
    assert 7 / 512 <= ratio < 0.2
