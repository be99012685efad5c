"""The script that counts bytes by context length, its table, and one layer that stands for all like it."""

import json

import pytest
import torch
from script_runs import run
from tiny import tiny_loaded

from gpt2.compression.cache import size, size_only
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.named_caches import from_preset
from gpt2.compression.presets.any_model import ANY_MODEL
from gpt2.compression.settings import build
from gpt2.evaluation.bytes_by_context import measure
from gpt2.models import random_weights
from gpt2.models.geometry import FULL, SLIDING, Geometry, LayerGeometry, Shape
from gpt2.report import plots, tables

TOKEN = 2 * 3 * 2 * 12 * 2  # bytes of a token of the tiny model, K and V, in 16 bits


def assert_smaller(rows: list[dict], has_states: bool) -> None:
    """Also 63 tokens into a block, where most of them are exact; and what stays as it is counts on both sides."""
    for row, least in zip(rows, (3.5, 2.8), strict=True):
        assert row["attention_ratio"] > least and row["compression_ratio"] > 1
        states, less = row["uncompressed_bytes"] > 0, row["compression_ratio"] < row["attention_ratio"]
        assert states == less == has_states


def test_the_script_and_its_table(tmp_path, model_folder):
    """A shape needs no weights; where a model has states, K and V alone have a ratio beside theirs."""
    output = tmp_path / "runs" / "cache_bytes_x.json"

    def counted(model, preset: str, contexts: str) -> tuple[dict, str, list[str]]:
        """The record, and the table and the legend of the picture made of it."""
        flags = ["--model", model, "--preset", preset, "--context-lengths", contexts, "--output", output]
        assert run("benchmarks/cache_bytes", *flags) == 0
        record = json.loads(output.read_text())
        legend = plots.ratios_by_context(record["rows"], "x").legends[0].get_texts()
        return record, tables.table("cache_bytes_x", record).markdown(), [text.get_text() for text in legend]

    record, table, legend = counted(model_folder, "kv4", "70,300")
    assert (tmp_path / "plots" / "cache_bytes_x.png").is_file(), "pictures of results lie beside the runs"
    short, long = record["rows"]
    assert short["plain_bytes"] == 70 * TOKEN and long["plain_bytes"] == 300 * TOKEN
    assert long["compression_ratio"] == pytest.approx(300 * TOKEN / long["bytes"])
    assert all(row["compression_ratio"] >= row["ratio_with_codec"] > 0 for row in (short, long))
    assert record["git_commit"] and record["inputs"] == {}
    assert f"| kv4 | 300 | {long['bytes']:,} |" in table
    assert "K and V alone" not in table and "K and V alone, without states" not in legend, "it is all"
    record, table, legend = counted("qwen3.5-4b.json", "kv4", "1024,1087")
    assert record["model"] == "qwen3.5-4b" and len(record["cache_layers"]) == 32
    assert_smaller(record["rows"], has_states=True)
    assert "K and V alone" in table and "with the basis" not in table and "K and V alone, without states" in legend


@pytest.mark.parametrize("shape", ["deepseek-v3", "gemma-3-4b", "gpt-oss-20b"])
def test_caches_of_real_shapes_are_smaller_than_transformers(shape, monkeypatch):
    monkeypatch.setattr(size, "LONGEST_MEASURED", 0)  # counted without values, which is the same: see below
    loaded = random_weights.outline(f"{shape}.json")
    make = from_preset("kv4", loaded).make
    assert_smaller([measure(make, loaded.geometry, tokens) for tokens in (1024, 1087)], has_states=False)


@pytest.mark.parametrize("window", [None, 128, 200])
def test_kv4_is_never_larger_than_transformers(window):
    """At every length, token by token; least just before a second block is full, or a window's waiting block."""
    shape = Shape(2, 64)
    geometry = Geometry((LayerGeometry(SLIDING if window else FULL, shape, shape, window=window),))
    settings = ANY_MODEL["kv4"]
    cache = CompressedDynamicCache(*build({"k": [settings[0]], "v": [settings[1]]}, geometry), geometry=geometry)
    size_only.without_values(cache, geometry, torch.bfloat16)
    x, ratios = torch.empty(1, 2, 1, 64, dtype=torch.bfloat16, device="meta"), {}
    for tokens in range(1, 400):
        size.store(cache.layers[0], x, x)
        ratios[tokens] = geometry.attention_bytes(tokens) / size.cache_bytes(cache)
    assert {ratios[tokens] for tokens in range(1, 64)} == {1}
    least = min(range(64, 400), key=ratios.get)
    assert (least, round(ratios[least], 2)) == ((190, 1.26) if window == 128 else (127, 1.5))


@pytest.mark.parametrize("kinds", [None, ["sliding_attention", "full_attention", "full_attention"]])
def test_a_layer_stands_for_all_that_are_like_it_with_values_and_without(kinds, monkeypatch):
    loaded = tiny_loaded("gemma3_text", layer_types=kinds) if kinds else tiny_loaded("llama")
    for preset, tokens in (("kv8", 100), ("kv4", 1499)):
        make = from_preset(preset, loaded).make
        cache, row = size.filled(make, loaded.geometry, tokens), measure(make, loaded.geometry, tokens)
        assert row["attention_bytes"] == row["bytes"] == size.cache_bytes(cache)
        assert (row["exact_bytes"], row["unused_bytes"]) == size.exact_and_unused_bytes(cache)
        assert row["unused_bytes"] > 0 or preset == "kv4"
        assert row["codec_bytes"] == cache.codec_bytes()
    monkeypatch.setattr(size, "LONGEST_MEASURED", 1024)
    monkeypatch.delattr(size, "noise")
    assert measure(make, loaded.geometry, 1499) == row


@pytest.mark.parametrize("preset", ["kv4", "kv8"])
def test_a_batch_has_the_ratio_of_one_sequence(preset, llama):
    def held(batch: int) -> int:
        parts = [[size.noise(2, tokens, 12, batch=batch)] * 2 for tokens in (150, 64, 64)]
        return size.cache_bytes(size.fill(from_preset(preset, llama).make(), parts))

    assert held(3) == 3 * held(1)
