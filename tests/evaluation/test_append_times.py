"""Times of appending: every token is timed, and rows stand for the caches that the script names."""

import json

import pytest
import torch
from script_runs import run

from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.compressed_cache import identity_cache
from gpt2.evaluation import append_times
from gpt2.models.geometry import Shape


def test_every_appended_token_is_timed_and_counted(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(append_times.time, "perf_counter", lambda: next(clock) ** 2 / 1e6)
    made = []
    row = append_times.measure(
        lambda: made.append(identity_cache(2)) or made[-1], Shape(2, 8), 30, 4, torch.device("cpu")
    )
    assert made[0].get_seq_length() == row["tokens_held"] + 4 == 34
    # Steps between squares: 1, 5, 9 and 13 microseconds
    assert (row["append_ms_median"], row["append_ms_mean"]) == pytest.approx((0.007, 0.007))
    assert row["cache_bytes"] == cache_bytes(made[0]) == pytest.approx(34 * row["bytes_per_token"])


def test_the_script_has_a_row_for_every_codec_and_number_of_tokens(tmp_path):
    flags = ["--tokens", "16,32", "--layers", 2, "--repeats", 4, "--output", tmp_path / "a.json"]
    assert run("benchmarks/append", *flags, "--window", 20) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["tokens_held"] for row in rows] == [16, 32] * 5 and len({row["codec"] for row in rows}) == 5
    assert (tmp_path / "a.png").exists()
