"""Perplexity through a real cache, its interval, and bytes: figures that are checked against arithmetic."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_loaded
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.settings import compressors_for
from gpt2.evaluation.perplexity import BASELINE, Scores, baseline_factory, compare, score, segment_sums
from gpt2.models.geometry import Geometry

SEGMENTS = torch.randint(2, 97, (3, 65), generator=torch.Generator().manual_seed(0))


def lossy(bits: int = 4, target: str = "kv"):
    return lambda: CompressedDynamicCache(*compressors_for(target, bits, Geometry.uniform(3, 2, 12)))


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
def test_the_identity_cache_changes_nothing(llama, chunk):
    scores = score(llama, SEGMENTS, {"ours": lambda: identity_cache(3), BASELINE: baseline_factory(llama)}, chunk=chunk)
    ours = scores["ours"]
    assert np.array_equal(ours.nll, scores[BASELINE].nll) and not ours.kl.any() and ours.agree.all()
    record = compare(scores[BASELINE], ours)
    assert record["ppl_delta"] == 0 and record["ppl_delta_interval"] == [0, 0]
    assert record["kl_nats"] == 0 and record["top1_agreement"] == 1


def test_a_lossy_cache_changes_predictions_and_fewer_bits_change_them_more(llama):
    caches = {BASELINE: baseline_factory(llama), "8": lossy(8), "4": lossy(4)}
    scores = score(llama, SEGMENTS, caches, chunk=16)
    records = {bits: compare(scores[BASELINE], scores[bits]) for bits in ("8", "4")}
    assert 0 < records["8"]["kl_nats"] < records["4"]["kl_nats"]
    assert records["8"]["top1_agreement"] > records["4"]["top1_agreement"] and records["4"]["top1_agreement"] < 1
    assert all(np.abs(scores[bits].nll - scores[BASELINE].nll).max() > 1e-3 for bits in ("8", "4"))
    # KL is a sum that float32 may round below zero, by no more than its own rounding
    assert all(scores[bits].kl.min() > -1e-5 for bits in ("8", "4"))


def test_kl_is_from_the_baseline_and_sinks_are_exact(llama):
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
    # Token 4 is the first that is coded: predictions made at tokens 0 to 3 can't change, later ones do
    scores = score(llama, SEGMENTS, {BASELINE: baseline_factory(llama), "x": lossy()}, chunk=65)
    changed = np.abs(scores["x"].nll - scores[BASELINE].nll)
    assert changed[:, :4].max() < 1e-5 < changed[:, 4:].max(axis=1).min(), "also within one chunk"


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batch_size_doesnt_matter_and_every_batch_has_a_fresh_cache(llama, batch_size):
    caches, batches = {BASELINE: baseline_factory(llama), "x": lossy()}, []
    together = score(llama, SEGMENTS, caches, chunk=16, batch_size=3)
    same = SEGMENTS[[0, 1, 2, 0, 1, 2]]
    other = score(llama, same, caches, chunk=16, batch_size=batch_size,
                  progress=lambda items: batches.extend(items) or batches)  # fmt: skip
    for name in caches:
        assert np.abs(together[name].nll - other[name].nll[:3]).max() < 1e-3
        assert batch_size > 1 or np.array_equal(other[name].nll[:3], other[name].nll[3:])
    assert len(batches) == math.ceil(6 / batch_size), "progress wraps the batches"


def test_the_baseline_runs_first_whatever_the_order_and_may_be_left_out(llama):
    scores = score(llama, SEGMENTS, {"a": lossy(), BASELINE: baseline_factory(llama)})
    assert scores["a"].kl is not None and scores[BASELINE].kl is None
    alone = score(llama, SEGMENTS, {"a": lossy()})["a"]
    assert alone.kl is None and alone.agree is None and np.array_equal(alone.nll, scores["a"].nll)
    assert "kl_nats" not in compare(scores[BASELINE], alone)


def test_a_loss_that_is_not_finite_is_rejected_by_cache(llama):
    class Broken(type(QUANTIZERS["int8"])):
        def dequantize(self, parts, rank):
            return super().dequantize(parts, rank) * float("nan")

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


def test_figures_follow_from_the_sums_of_segments():
    nll = np.random.default_rng(0).random((3, 3, 20))
    baseline, other = Scores(nll[0]), Scores(nll[1], nll[2], nll[2] < 0.5)
    record, sums = compare(baseline, other), segment_sums(baseline, other)
    assert len(sums["nll"]) == 3 and sums["predictions"] == 20
    assert np.exp(sum(sums["nll"]) / record["tokens"]) == pytest.approx(record["ppl"])
    assert np.exp(sum(sums["baseline_nll"]) / record["tokens"]) == pytest.approx(record["baseline_ppl"])
    assert sum(sums["kl_nats"]) / record["tokens"] == pytest.approx(record["kl_nats"])
    assert "kl_nats" not in segment_sums(baseline, baseline)
