"""The largest batch that fits: the search, what is filled, what is said when memory runs out. Times of appending."""

import json
from functools import partial

import pytest
import torch
from script_runs import run

from gpt2.common.errors import is_out_of_memory
from gpt2.compression.attention import is_enabled
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.compressed_cache import identity_cache
from gpt2.compression.named_caches import from_preset
from gpt2.evaluation import append_times, largest_batch, noise
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.models.geometry import Shape
from gpt2.report import tables


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 21, 100, 999, 5000])
def test_the_search_finds_the_limit_and_ends_at_the_most(limit):
    asked = []
    found = largest_batch.search(lambda batch: asked.append(batch) or batch <= limit, most=1000)
    expected = min(limit, 1000)
    inexact = expected // largest_batch.RESOLUTION if limit < 1000 else 0
    assert expected - inexact <= found <= expected
    assert len(asked) == len(set(asked)) <= 18 and max(asked) <= 1000
    assert largest_batch.search(lambda batch: True, most=limit) == limit


@pytest.fixture
def caches(llama):
    return {BASELINE: baseline_factory(llama), "kv4": from_preset("kv4", llama).make}


def failing_above(monkeypatch, most: int, error: Exception) -> set[bool]:
    """Filling a cache for more sequences fails; returns whether codes were read directly."""
    enabled, fill = set(), largest_batch.fill

    def small(cache, loaded, context, batch, seed):
        enabled.add(is_enabled(loaded.model))
        if batch > most:
            raise error
        fill(cache, loaded, context, batch, seed)

    monkeypatch.setattr(largest_batch, "fill", small)
    return enabled


@pytest.mark.parametrize("name", [BASELINE, "kv4"])
def test_memory_that_runs_out_ends_the_search(name, llama, caches, monkeypatch):
    """A machine with room for 5 sequences; codes of our caches are read directly, the baseline as ever."""
    monkeypatch.setattr(noise, "CHUNK_VALUES", 1)
    enabled = failing_above(monkeypatch, 5, torch.OutOfMemoryError("CUDA out of memory"))
    row = largest_batch.measure(llama, name, caches[name], 70, decode_tokens=2)
    assert (row["largest_batch"], row["at_limit"]) == (5, False) and enabled == {name != BASELINE}
    assert [(run["batch_size"], run["fits"]) for run in row["tried"]] == [
        (1, True), (2, True), (4, True), (8, False), (6, False), (5, True)
    ]  # fmt: skip
    assert row["tokens_per_s"] == row["tried"][-1]["tokens_per_s"] > 0
    whole = 5 * (70 + 1 + 2) * llama.geometry.bytes_per_token(4)  # a token to warm up
    assert row["cache_bytes"] == whole if name == BASELINE else 0 < row["cache_bytes"] < whole
    assert list(noise.chunks(150, 1000)) == [64, 64, 22]
    assert row["tokens_per_s"] == pytest.approx(5000 / row["token_ms"]) and not is_enabled(llama.model)


def test_other_errors_than_lack_of_memory_are_raised(llama, caches, monkeypatch):
    failing_above(monkeypatch, 0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        largest_batch.measure(llama, "kv4", caches["kv4"], 70)
    assert not is_enabled(llama.model)
    for message in ("Triton Error [CUDA]: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"):
        assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("shapes don't match"))


def test_the_script_and_its_table(model_folder, tmp_path, capsys, monkeypatch, rejects):
    flags = ["--model", model_folder, "--device", "cpu", "--preset", "kv4", "--context-length", 80]
    flags += ["--decode-tokens", 2, "--output", tmp_path / "out/x.json"]
    assert run("benchmarks/largest_batch", *flags, "--most", 2) == 0
    record = json.loads((tmp_path / "out/x.json").read_text())
    assert [row["cache"] for row in record["rows"]] == [BASELINE, "kv4"]
    assert "at least 2" in capsys.readouterr().out
    record["rows"].append({"cache": "kv8", "largest_batch": 0})
    table = tables.largest_batch(record, []).markdown()
    assert "| baseline | at least 2 | 1.00x |" in table and "| kv8 | not even one | | | | |" in table
    assert {line.count("|") for line in table.splitlines()[:5]} == {7}
    assert "sequences of 80 tokens, 2 tokens decoded" in table
    monkeypatch.setattr(largest_batch, "attempt", lambda *args: None)
    rejects(partial(run, "benchmarks/largest_batch", *flags), [
        ([], "not one sequence of 80 tokens fits: use a shorter --context-length"),
        (["--context-length", 510], "--context-length"),
    ])  # fmt: skip


def test_every_appended_token_is_timed_and_counted(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(append_times.time, "perf_counter", lambda: next(clock) ** 2 / 1e6)
    made = []
    make = lambda: made.append(identity_cache(2)) or made[-1]  # noqa: E731
    row = append_times.measure(make, Shape(2, 8), 30, 4, torch.device("cpu"))
    assert made[0].get_seq_length() == row["tokens_held"] + 4 == 34
    # Steps between squares: 1, 5, 9 and 13 microseconds
    assert row["append_ms_quartiles"] == pytest.approx([0.004, 0.010])
    assert (row["append_ms_median"], row["append_ms_mean"]) == pytest.approx((0.007, 0.007))
    assert row["cache_bytes"] == cache_bytes(made[0]) == pytest.approx(34 * row["bytes_per_token"])


def test_the_script_has_a_row_for_every_codec_and_number_of_tokens(tmp_path):
    flags = ["--tokens", "16,32", "--layers", 2, "--repeats", 1, "--output", tmp_path / "a.json"]
    assert run("benchmarks/append", *flags, "--window", 20) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["tokens_held"] for row in rows] == [16, 32] * 5 and len({row["codec"] for row in rows}) == 5
    assert (tmp_path / "a.png").exists()
