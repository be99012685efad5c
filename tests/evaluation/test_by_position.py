"""Loss by position: continuations that are the model's, figures that come from the scores, and the script."""

import json
import math

import numpy as np
import pytest
import torch
from pictures import is_drawn
from script_runs import listing
from tiny import windows
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.compressed_cache import identity_cache
from gpt2.evaluation.by_position import by_position, continuations, divergence
from gpt2.evaluation.perplexity import BASELINE, Scores, score
from gpt2.report import tables


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
    part = slice(29, 39)
    assert rows[2]["kl_nats"] == pytest.approx(kl[:, part].mean())
    assert rows[2]["kl_nats_by_segment"] == pytest.approx(kl[:, part].mean(1).tolist())
    assert rows[2]["top1_agreement"] == pytest.approx(agree[:, part].mean())
    assert rows[2]["ppl_delta"] == pytest.approx(math.expm1(worse[:, part].mean()))
    low, high = rows[2]["kl_nats_interval"]
    assert low <= rows[2]["kl_nats"] <= high
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


FLAGS = ["--text", "prose.txt", "--preset", "p.json", "--segments", 2, "--chunk", 16, "--bins", 8]


def test_the_script_writes_generated_text_and_long_context(script, tmp_path, capsys):
    assert script("eval_by_position", *FLAGS, "--prompt-tokens", 30, "--new-tokens", 64, "--greedy-tokens", 8) == 0
    assert script("eval_by_position", *FLAGS, "--over", "text", "--context-length", 100) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 segments of 64 predictions sampled by the model after prompts of prose.txt" in said and " of 8" in said
    names = ("by_position_tiny", "long_context_tiny")
    assert listing(tmp_path / "results") == {f"{kind}" for n in names for kind in (f"runs/{n}.json", f"plots/{n}.png")}
    generated, text = (json.loads((tmp_path / f"results/runs/{name}.json").read_text()) for name in names)
    assert all(is_drawn(tmp_path / f"results/plots/{name}.png") for name in names)
    (row,) = generated["rows"]
    assert len(row["bins"]) == 8 and sum(cell["tokens"] for cell in row["quarters"]) == 2 * 64
    assert len(row["greedy_tokens_same"]) == 2 and text["rows"][0]["greedy_tokens_same"] == []
    assert tables.table("long_context_tiny", text).rows[0][-1] == "–"


def test_bad_input_is_one_clear_line(script, capsys):
    for flags, message in (
        (["--new-tokens", "600"], "a context of 30 tokens with 600 after it is longer than the 512"),
        (["--over", "text", "--context-length", "600"], "use --context-length 512 or less"),
    ):
        assert script("eval_by_position", *FLAGS, "--prompt-tokens", 30, *flags) == 2
        assert message in capsys.readouterr().err
