"""Stability: runs that differ in one named thing, honest spreads, and a verdict that can fail."""

import pytest
import torch
from tiny import tiny_loaded, word_text

from gpt2.compression.calibration import calibrate, recalibrate
from gpt2.data import by_position
from gpt2.errors import PluginError
from gpt2.evaluation import stability
from gpt2.evaluation.stability import METRICS, Run


def test_each_run_changes_one_factor_and_every_value_is_another():
    runs = stability.schedule(["text", "calibration", "seed"], num_runs=3, seed=5)
    first, *others = runs
    assert first == Run("as given", 0, 0, 5) and len(others) == 6
    fields = ("text_window", "calibration", "seed")
    assert len({tuple(getattr(run, name) for name in fields) for run in runs}) == 7, "no two runs are the same"
    for run in others:
        changed = {name for name in fields if getattr(run, name) != getattr(first, name)}
        assert changed == {"text_window" if run.factor == "text" else run.factor}
    assert stability.schedule(["text"], 1) == [Run("as given")]


def test_windows_do_not_overlap():
    segments = torch.arange(7 * 4).view(7, 4)
    taken = stability.windows_of(segments, num_runs=3, segments_per_run=2)
    assert taken.shape == (3, 2, 4) and len(taken.flatten().unique()) == 24
    with pytest.raises(PluginError, match="7 segments of 4 tokens, but 4 runs of 2 need 8"):
        stability.windows_of(segments, 4, 2)


def row(factor: str, value: float) -> dict:
    return {"factor": factor} | dict.fromkeys(METRICS, value)


def test_summary_is_mean_sample_deviation_and_range():
    rows = [row("as given", 0.01), row("text", 0.02), row("text", 0.06), row("seed", 0.01)]
    by = {(r["factor"], r["metric"]): r for r in stability.summarize(rows)}
    text = by["text", "ppl_delta"]
    assert (text["runs"], text["min"], text["max"]) == (3, 0.01, 0.06)
    assert text["mean"] == pytest.approx(0.03) and text["std"] == pytest.approx(0.0264575, rel=1e-4)
    assert by["seed", "kl_nats"]["std"] == 0 and by["all", "kl_nats"]["runs"] == 4
    assert len(by) == 3 * len(METRICS)


@pytest.mark.parametrize(
    ("deltas", "stable"), [((0.01, 0.012), True), ((0.01, 0.06), False), ((0.0, 0.04), False), ((-0.04, 0.0), False)]
)
def test_verdict_needs_both_limits(deltas, stable):
    summary = stability.summarize([row("as given", deltas[0]), row("text", deltas[1])])
    verdict = stability.verdict(summary, max_delta=0.05, max_std=0.01)
    assert verdict["stable"] is stable and ("NOT" in verdict["line"]) is not stable
    assert "limit +5.00%" in verdict["line"] and "limit 1.00%" in verdict["line"] and "by text" in verdict["line"]


def test_factors_that_move_nothing_do_not_hide_one_that_does():
    rows = [row("as given", 0.0), row("text", 0.02), *[row("seed", 0.0)] * 20]
    verdict = stability.verdict(stability.summarize(rows), max_delta=0.05, max_std=0.01)
    assert not verdict["stable"] and "deviation 1.41%" in verdict["line"]


def test_a_single_run_has_no_spread():
    assert stability.verdict(stability.summarize([row("as given", 0.01)]), 0.05, 0.01)["stable"]


def test_recalibration_draws_other_samples_also_where_all_were_used(loaded):
    """100 samples of a text that has 12 are all of it: any seed would draw the same."""
    text = by_position("words", "words.txt", word_text(1000))
    given = calibrate(loaded, text, rank=6, samples=100, seq_len=48)
    others = [recalibrate(given, loaded, text, number) for number in (1, 2)]
    means = [c.statistics.v.mean for c in (given, *others)]
    assert not any(torch.allclose(a, b) for i, a in enumerate(means) for b in means[:i])
    assert all(c.meta["tokens"] == given.meta["tokens"] // 2 for c in others)
    assert {c.meta["seq_len"] for c in others} == {48} and others[0].meta["seed"] != others[1].meta["seed"]
    with pytest.raises(PluginError, match="no other samples"):
        recalibrate(given, loaded, by_position("w", "w", word_text(130)), 1)


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded("llama")
