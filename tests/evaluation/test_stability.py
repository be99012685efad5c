"""Stability: runs that differ in one named thing, honest spreads, and a verdict that can fail."""

import json
from functools import partial

import pytest
import torch
from pictures import draw_nothing
from script_runs import CALIBRATE, INT4_PRESET, STABILITY
from tiny import word_text

from gpt2.common.errors import PluginError
from gpt2.compression.calibration.calibrate import calibrate, recalibrate
from gpt2.evaluation import stability
from gpt2.evaluation.stability import METRICS, Run
from gpt2.text.sources import by_position


def test_each_run_changes_one_factor_and_every_value_is_another():
    runs = stability.schedule(["text", "calibration", "seed"], num_runs=3, seed=5)
    first, *others = runs
    assert first == Run("as given", 0, 0, 5) and len(others) == 6
    fields = ("text_window", "calibration", "seed")
    assert len({tuple(getattr(one, name) for name in fields) for one in runs}) == 7, "no two runs are the same"
    for one in others:
        changed = {name for name in fields if getattr(one, name) != getattr(first, name)}
        assert changed == {"text_window" if one.factor == "text" else one.factor}
    assert stability.schedule(["text"], 1) == [Run("as given")]
    segments = torch.arange(7 * 4).view(7, 4)
    taken = stability.windows_of(segments, num_runs=3, segments_per_run=2)
    assert taken.shape == (3, 2, 4) and len(taken.flatten().unique()) == 24
    with pytest.raises(PluginError, match="7 segments of 4 tokens, but 4 runs of 2 need 8"):
        stability.windows_of(segments, 4, 2)


def row(factor: str, value: float) -> dict:
    return {"factor": factor} | dict.fromkeys(METRICS, value)


def by_factor_and_metric(*rows: dict) -> dict:
    return {(row["factor"], row["metric"]): row for row in stability.summarize(rows)}


def test_summary_is_mean_sample_deviation_and_range():
    first, text, seed = row("as given", 0.01), row("text", 0.02), row("seed", 0.5)
    by = by_factor_and_metric(first, text, row("text", 0.06), seed)
    found = by["text", "ppl_delta"]
    assert (found["runs"], found["min"], found["max"]) == (3, 0.01, 0.06)
    assert found["mean"] == pytest.approx(0.03) and found["std"] == pytest.approx(0.0264575, rel=1e-4)
    assert by["all", "needle_accuracy"]["runs"] == 4 and by["seed", "needle_accuracy"]["max"] == 0.5
    # What a seed can't change has no rows of it: copies of run 0 would make every spread look smaller
    by = by_factor_and_metric(first, text, *[seed] * 20)
    assert ("seed", "ppl_delta") not in by and ("seed", "speed_ratio") in by
    assert by["all", "ppl_delta"]["runs"] == 2 and by["all", "speed_ratio"]["runs"] == 22
    # A needle that the baseline misses says nothing
    by = by_factor_and_metric(first, text | {"needle_accuracy_change": None})
    assert by["all", "needle_accuracy_change"]["runs"] == 1 and by["all", "needle_accuracy"]["runs"] == 2


@pytest.mark.parametrize(("deltas", "stable"), [
    ({"text": [0.01, 0.012]}, True), ({"text": [0.01, 0.06]}, False), ({"text": [0.0, 0.04]}, False),
    ({"text": [-0.04, 0.0]}, False), ({"text": [0.0, 0.02], "calibration": [0.0] * 20}, False), ({}, None),
    ({"seed": [0.01, 0.01]}, None),
])  # fmt: skip
def test_verdict_needs_both_limits(deltas, stable):
    """And a factor that was varied and counts; a steady one doesn't hide another."""
    given = next(iter(deltas.values()), [0.01])[0]
    rows = [row("as given", given), *(row(name, x) for name, (_, *rest) in deltas.items() for x in rest)]
    verdict = stability.verdict(stability.summarize(rows), max_delta=0.05, max_std=0.01)
    assert verdict["stable"] is stable and ("NOT" in verdict["line"]) == (stable is False)
    if stable is None:
        assert verdict["line"].startswith("no verdict")
    else:
        assert "limit +5.00%" in verdict["line"] and "limit 1.00%" in verdict["line"] and "by text" in verdict["line"]


FLAGS = ["--text", "prose.txt", "--preset", "p.json", "--num-runs", 2, "--output", "s.json"]
FLAGS += ["--needle-length", 160, "--needle-trials", 1, "--eval-tokens", 64, "--eval-seq-len", 64, "--chunk", 32]
NEVER_UNSTABLE, ALWAYS_UNSTABLE = (["--max-ppl-delta", limit, "--max-std", limit] for limit in (0.9, 0.0001))


@pytest.fixture(autouse=True)
def short_speed_test(monkeypatch, asked_for):
    """Two tokens, once: what is made of more is shown by test_timing."""
    cell, short = stability.measure_cell, {"decode_tokens": 2, "repeats": 1}
    monkeypatch.setattr(stability, "measure_cell", lambda *args, **how: cell(*args, **how | short))


def test_the_script_varies_what_there_is(script, tmp_path, capsys):
    assert script(STABILITY, *FLAGS, *NEVER_UNSTABLE) == 0
    said = capsys.readouterr().out
    assert "note: the calibration is not varied" in said and "\nstable: worst" in said
    record = json.loads((tmp_path / "s.json").read_text())
    first, text, seed = record["rows"]
    assert [row["factor"] for row in record["rows"]] == ["as given", "text", "seed"] and (tmp_path / "s.png").exists()
    assert text["baseline_ppl"] != first["baseline_ppl"] == seed["baseline_ppl"], "other text, and the same text"
    assert seed["ppl_delta"] == first["ppl_delta"] != text["ppl_delta"]
    assert all(row["kl_nats"] > 0 and row["speed_ratio"] > 0 for row in record["rows"])
    assert all(row["needle_accuracy_change"] is None for row in record["rows"]), "a random model answers nothing"
    assert "which fails" in said


def test_the_script_calibrates_anew(script, tmp_path, capsys, monkeypatch):
    draw_nothing(monkeypatch)
    flags = ["--text", "prose.txt", "--samples", 2, "--seq-len", 64, "--rank", 6, "--output", "c.pt"]
    assert script(CALIBRATE, *flags) == 0
    preset = INT4_PRESET | {"codec": "pca", "rank": 6, "bits": 16, "target": "v", "calibration_file": "c.pt"}
    (tmp_path / "p.json").write_text(json.dumps(preset))
    code = script(STABILITY, *FLAGS, "--vary", "calibration", *ALWAYS_UNSTABLE)
    said = capsys.readouterr().out
    assert code == 3 and "NOT stable" in said and "newly drawn tokens" in said
    first, other = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert other["factor"] == "calibration" and other["baseline_ppl"] == first["baseline_ppl"]
    assert other["ppl"] != first["ppl"], "another calibration, another cache"
    (tmp_path / "other.txt").write_text((tmp_path / "prose.txt").read_text().swapcase())
    assert script(STABILITY, *FLAGS, "--vary", "calibration", "--text", "other.txt") == 0
    said = capsys.readouterr().out
    assert "made from another text than 'other.txt': give --text prose.txt" in said and "no verdict" in said


def test_bad_flags_stop_before_the_first_run(script, rejects, monkeypatch):
    monkeypatch.setattr(stability, "measure", lambda *args: pytest.fail("measured"))
    rejects(partial(script, STABILITY, *FLAGS), [
        (["--num-runs", "1"], "varies nothing"), (["--num-runs", "99"], "use fewer --num-runs"),
        (["--needle-length", "510"], "use --needle-length 504 or less"),
        (["--needle-length", "513"], "use --needle-length 504 or less"), (["--vary", "weather"], "unknown weather"),
        (["--max-std", "2"], "out of range"),
    ])  # fmt: skip


def test_recalibration_draws_other_samples_also_where_all_were_used(llama):
    """100 samples of a text that has 12 are all of it: any seed would draw the same."""
    text = by_position("words", "words.txt", word_text(1000))
    given = calibrate(llama, text, rank=6, samples=100, seq_len=48)
    others = [recalibrate(given, llama, text, number) for number in (1, 2)]
    means = [c.statistics.v.mean[0] for c in (given, *others)]
    assert not any(torch.allclose(a, b) for i, a in enumerate(means) for b in means[:i])
    assert all(c.meta["tokens"] == given.meta["tokens"] // 2 for c in others)
    assert {c.meta["seq_len"] for c in others} == {48} and others[0].meta["seed"] != others[1].meta["seed"]
    compact = calibrate(llama, text, rank=12, samples=2, seq_len=96, codec="joint", metric="fisher", compact=True)
    assert recalibrate(compact, llama, text, 1).meta["compact"] is True
    short = by_position("w", "w", word_text(130))
    with pytest.raises(PluginError, match="no other samples"):
        recalibrate(calibrate(llama, short, rank=6, samples=9, seq_len=48), llama, short, 1)
    with pytest.raises(PluginError, match="another text"):
        recalibrate(given, llama, short, 1)
