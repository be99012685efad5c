"""Perplexity through a real cache, loss by position, intervals and tests: figures checked against arithmetic."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from pictures import is_drawn
from sampling import sampled
from script_runs import listing
from tiny import tiny_loaded, windows
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.compressed_cache import identity_cache
from gpt2.evaluation.asking import greedy
from gpt2.evaluation.by_position import by_position, continuations, divergence
from gpt2.evaluation.perplexity import BASELINE, Scores, baseline_factory, compare, score, segment_sums
from gpt2.evaluation.statistics import mean_interval, paired_bootstrap, sign_test, spread
from gpt2.report import tables

SEGMENTS = torch.randint(2, 97, (3, 65), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def caches(llama, lossy):
    return {BASELINE: baseline_factory(llama), "x": lossy(4, sink_tokens=4)}


@torch.no_grad()
def direct_nll(loaded, segments):
    """One forward pass without any cache, in float64 after the logits."""
    log_p = loaded.model(segments, use_cache=False).logits.double().log_softmax(-1)[:, :-1]
    return -log_p.gather(-1, segments[:, 1:, None])[..., 0].numpy()


@pytest.mark.parametrize(("family", "chunk"), [
    *sampled([("llama", 1), ("gpt2", 64), ("llama", 65), ("gpt2", 1000), ("llama", 7)], 3), ("mistral", 7),
    ("gemma3_text", 64),
])  # fmt: skip
def test_streaming_equals_one_forward_pass_also_through_a_cache_that_loses_nothing(llama, family, chunk):
    """65 tokens: chunks of 7 leave a remainder, chunks of 64 a last token that predicts nothing."""
    loaded = llama if family == "llama" else tiny_loaded(family)
    segments = SEGMENTS[: 1 if chunk == 1 else 3]
    made = {"ours": lambda: identity_cache(loaded.geometry), BASELINE: baseline_factory(loaded)}
    scores = score(loaded, segments, made, chunk=chunk)
    nll = scores[BASELINE].nll
    assert nll.shape == (len(segments), 64) and np.abs(nll - direct_nll(loaded, segments)).max() < 1e-4
    ours = scores["ours"]
    assert np.abs(ours.nll - nll).max() < 1e-4 and np.abs(ours.kl).max() < 1e-5 and ours.agree.all()
    if family == "llama":  # without a window that forgets, not even rounding differs
        assert np.array_equal(ours.nll, nll) and not ours.kl.any()


def test_kl_is_from_the_baseline_and_sinks_are_exact(llama, caches):
    """KL(baseline ‖ cache), computed apart; the other direction differs."""
    both = score(llama, SEGMENTS, caches, chunk=65, batch_size=1)
    scores = both["x"]
    with torch.no_grad():
        exact, coded = (llama.model(SEGMENTS[:1], past_key_values=c).logits for c in (DynamicCache(), caches["x"]()))
    p, q = (logits[0, :-1].double().log_softmax(-1) for logits in (exact, coded))
    assert np.abs(scores.kl[0] - (p.exp() * (p - q)).sum(-1).numpy()).max() < 1e-5
    assert np.abs(scores.kl[0] - (q.exp() * (q - p)).sum(-1).numpy()).max() > 1e-3
    assert np.array_equal(scores.agree[0], (p.argmax(-1) == q.argmax(-1)).numpy())
    # Token 4 is the first that is coded: predictions made at tokens 0 to 3 can't change, later ones do
    changed = np.abs(scores.nll - both[BASELINE].nll)
    assert changed[:, :4].max() < 1e-5 < changed[:, 4:].max(axis=1).min(), "also within one chunk"


def test_batch_size_doesnt_matter_and_every_batch_has_a_fresh_cache(llama, caches):
    same, batches = SEGMENTS[[0, 1, 2, 0, 1, 2]], []
    how = {"chunk": 16, "progress": lambda items: batches.append(len(items)) or items}
    one, four = (score(llama, same, caches, batch_size=n, **how) for n in (1, 4))
    assert batches == [6, 2], "progress wraps the batches"
    for name in caches:
        assert np.abs(one[name].nll - four[name].nll).max() < 1e-3
        assert np.array_equal(one[name].nll[:3], one[name].nll[3:])


def test_the_baseline_runs_first_and_may_be_left_out_and_segments_have_two_tokens(llama, caches):
    scores = score(llama, SEGMENTS, dict(reversed(caches.items())))
    assert scores["x"].kl is not None and scores[BASELINE].kl is None
    alone = score(llama, SEGMENTS, {"x": caches["x"]})["x"]
    assert alone.kl is None and alone.agree is None and np.array_equal(alone.nll, scores["x"].nll)
    assert "kl_nats" not in compare(scores[BASELINE], alone)
    with pytest.raises(PluginError, match="a segment has 1 tokens: expected at least 2"):
        score(llama, windows(2, 1), caches)


def test_figures_by_hand_and_from_the_sums_of_segments():
    baseline, other = (Scores(np.log(np.array([[2.0, 8.0], [4.0, 4.0]]) * factor)) for factor in (1, 1.1))
    record = compare(baseline, other)
    assert record["baseline_ppl"] == pytest.approx(4) and record["ppl"] == pytest.approx(4.4)
    assert record["ppl_delta"] == pytest.approx(0.1) and record["ppl_delta_interval"] == pytest.approx([0.1, 0.1])
    assert record["tokens"] == 4
    nll = np.random.default_rng(0).random((3, 3, 20))
    baseline, other = Scores(nll[0]), Scores(nll[1], nll[2], nll[2] < 0.5)
    record, sums = compare(baseline, other), segment_sums(baseline, other)
    assert len(sums["nll"]) == 3 and sums["predictions"] == 20
    assert np.exp(sum(sums["nll"]) / record["tokens"]) == pytest.approx(record["ppl"])
    assert np.exp(sum(sums["baseline_nll"]) / record["tokens"]) == pytest.approx(record["baseline_ppl"])
    assert sum(sums["kl_nats"]) / record["tokens"] == pytest.approx(record["kl_nats"])
    assert "kl_nats" not in segment_sums(baseline, baseline)


@pytest.mark.parametrize("shape", [(1, 10), (3, 64), (2, 2047)])
def test_a_constant_shift_has_no_width(shape):
    """Also where the last block of a segment is shorter than the others."""
    for shift in (0.0, -0.3):
        assert paired_bootstrap(np.full(shape, shift)) == pytest.approx([math.expm1(shift)] * 2, abs=1e-9)
        assert mean_interval(np.full(7, shift)) == pytest.approx((shift, shift))


def test_the_interval_covers_the_mean_and_narrows_with_tokens():
    noise = np.random.default_rng(0).normal(0, 1, (16, 1087))
    noise -= noise.mean()
    low, high = paired_bootstrap(noise)
    assert low < 0 < high
    # ± 1.96 σ / √n for independent tokens
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(noise.size), rel=0.2)
    few_low, few_high = paired_bootstrap(noise[:2])
    assert few_high - few_low > 2 * (high - low)
    assert paired_bootstrap(noise, level=0.5)[1] < high
    few = noise[:4, :200]
    assert paired_bootstrap(few, 1) == paired_bootstrap(few, 1) != paired_bootstrap(few, 2), "by seed"
    assert mean_interval(few[0], 1) == mean_interval(few[0], 1) != mean_interval(few[0], 2)
    rng = np.random.default_rng(0)
    covered = [low <= 1 <= high for low, high in (mean_interval(rng.normal(1, 2, 60), seed) for seed in range(200))]
    assert 0.88 < np.mean(covered) <= 0.99


@pytest.mark.parametrize("shape", [(1, 64), (1, 40), (3, 20), (1, 5)])
def test_few_tokens_have_an_interval_too(shape):
    """One block of 64 would leave no width, as if the figure were exact."""
    noise = np.random.default_rng(0).normal(0, 1, shape)
    low, high = paired_bootstrap(noise)
    assert low < math.expm1(noise.mean()) < high


def test_tokens_of_a_block_move_together():
    """Neighbours that agree are one observation, not 64: the interval is eight times as wide."""
    blocks = np.random.default_rng(0).normal(0, 1, (4, 32))
    together, apart = np.repeat(blocks, 64, axis=1), np.random.default_rng(0).normal(0, 1, (4, 2048))
    widths = [np.subtract(*paired_bootstrap(x)) for x in (together, apart)]
    assert widths[0] / widths[1] == pytest.approx(8, rel=0.25)


def test_the_sign_test_and_quartiles_are_exact():
    assert sign_test(0, 0) == 1 and sign_test(5, 5) == 1 and sign_test(0, 1) == 1
    assert sign_test(0, 6) == sign_test(6, 0) == pytest.approx(2 / 64)
    assert sign_test(1, 8) == pytest.approx(2 * (1 + 9) / 512)
    assert spread("ms", [4, 1, 3, 2, 5]) == {"ms_median": 3, "ms_quartiles": [2, 4]}


def test_continuations_are_sampled_from_the_model_and_repeat(llama):
    prompts = windows(2, 10)
    sampled = continuations(llama, prompts, 12, seed=3)
    assert sampled.shape == (2, 22) and torch.equal(sampled[:, :10], prompts)
    assert torch.equal(continuations(llama, prompts, 12, seed=3), sampled)
    assert not torch.equal(continuations(llama, prompts, 12, seed=4), sampled)
    with torch.no_grad():
        log_p = llama.model(sampled).logits.log_softmax(-1)[:, 9:-1]
    chosen = log_p.gather(-1, sampled[:, 10:, None]).mean()
    assert chosen > log_p.mean() + 1, "what is sampled is likelier than the average token"
    with pytest.raises(PluginError, match="use --prompt-tokens 12 or less"):
        continuations(llama, windows(1, 20), 500)


def test_bins_are_those_of_the_scores():
    rng = np.random.default_rng(0)
    nll, kl, agree = rng.random((3, 49)), rng.random((3, 49)), rng.random((3, 49)) < 0.5
    worse = rng.random((3, 49))
    base, other = Scores(nll), Scores(nll + worse, kl, agree)
    rows = by_position(base, other, 4, first=9)
    assert [row["position"] for row in rows] == [0, 10, 20, 30] and {row["tokens"] for row in rows} == {30}
    third, part = rows[2], slice(29, 39)
    assert third["kl_nats"] == pytest.approx(kl[:, part].mean())
    assert third["kl_nats_by_segment"] == pytest.approx(kl[:, part].mean(1).tolist())
    assert third["top1_agreement"] == pytest.approx(agree[:, part].mean())
    assert third["ppl_delta"] == pytest.approx(math.expm1(worse[:, part].mean()))
    low, high = third["kl_nats_interval"]
    assert low <= third["kl_nats"] <= high
    (row,) = by_position(base, Scores(nll[:1], kl[:1], agree[:1]), 1)
    assert row["kl_nats_interval"] is None and row["tokens"] == 49


class Drifting(DynamicCache):
    """Wrong by ever more: what it gives back is scaled with the number of tokens held, from 24 on."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return k, v * (1 + max(0, k.shape[2] - 24) / 8)


def test_drift_shows_where_it_begins(llama, caches):
    """Both in KL by position and in greedy decoding, which a cache that loses nothing never leaves."""
    compared = {BASELINE: caches[BASELINE], "identity": lambda: identity_cache(3), "drifting": Drifting}
    scores = score(llama, windows(2, 64), compared, chunk=8, batch_size=1)
    kl = [row["kl_nats"] for row in by_position(scores[BASELINE], scores["drifting"], 4)]
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[1] < kl[3]
    same = divergence(llama, windows(2, 20), compared, 12)
    assert same["identity"] == [12, 12] and all(4 <= count < 12 for count in same["drifting"])


def test_an_end_token_is_a_token_of_greedy_decoding_like_others(llama, caches, monkeypatch):
    compared, decoded = {BASELINE: caches[BASELINE]}, []
    spy = lambda *args, **how: decoded.append(greedy(*args, **how)) or decoded[-1]  # noqa: E731
    monkeypatch.setattr("gpt2.evaluation.by_position.greedy", spy)
    divergence(llama, windows(1, 20), compared, 12)
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", decoded[0][0, 3:4].tolist())
    divergence(llama, windows(1, 20), compared, 12)
    assert decoded[0].shape == (1, 12) and torch.equal(*decoded)


FLAGS = ["--text", "prose.txt", "--preset", "p.json", "--segments", 2, "--chunk", 32, "--bins", 8]


def test_the_script_writes_generated_text_and_long_context(script, tmp_path, capsys):
    assert script("eval_by_position", *FLAGS, "--prompt-tokens", 30, "--new-tokens", 32, "--greedy-tokens", 8) == 0
    assert script("eval_by_position", *FLAGS, "--over", "text", "--context-length", 100) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 segments of 32 predictions sampled by the model after prompts of prose.txt" in said and " of 8" in said
    names = ("by_position_tiny", "long_context_tiny")
    assert listing(tmp_path / "results") == {file for n in names for file in (f"runs/{n}.json", f"plots/{n}.png")}
    generated, text = (json.loads((tmp_path / f"results/runs/{name}.json").read_text()) for name in names)
    assert all(is_drawn(tmp_path / f"results/plots/{name}.png") for name in names)
    (row,) = generated["rows"]
    assert len(row["bins"]) == 8 and sum(cell["tokens"] for cell in row["quarters"]) == row["tokens"] == 2 * 32
    assert len(row["greedy_tokens_same"]) == 2 and text["rows"][0]["greedy_tokens_same"] == []
    assert tables.table("long_context_tiny", text).rows[0][-1] == "–"


def test_bad_input_is_one_clear_line(script, rejects):
    rejects(partial(script, "eval_by_position", *FLAGS, "--prompt-tokens", 30), [
        (["--new-tokens", "600"], "with 600 more is longer than the 512 that"),
        (["--new-tokens", "9", "--greedy-tokens", "600"], "with 600 more is longer than the 512 that"),
        (["--over", "text", "--context-length", "600"], "use --context-length 512 or less"),
    ])  # fmt: skip
