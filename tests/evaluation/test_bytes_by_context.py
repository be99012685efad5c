"""The script that counts bytes by context length, its table, and one layer that stands for all like it."""

import functools
import json
from functools import partial

import pytest
import torch
from script_runs import run
from tiny import tiny_loaded

from gpt2.compression.cache import size, size_only
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.codecs import Compressor, quantizer_for_bits
from gpt2.compression.named_caches import from_preset
from gpt2.compression.presets import get_preset_info
from gpt2.compression.presets.any_model import ANY_MODEL
from gpt2.compression.settings import build
from gpt2.evaluation.bytes_by_context import measure
from gpt2.models import random_weights
from gpt2.models.geometry import FULL, SLIDING, Geometry, LayerGeometry, Shape
from gpt2.report import plots, tables

outline = functools.cache(random_weights.outline)
TOKEN = 2 * 3 * 2 * 12 * 2  # bytes of a token of the tiny model, K and V, in 16 bits


def test_the_script_and_its_table(tmp_path, model_folder):
    """A shape needs no weights: 671 billion of them would fit nowhere. K and V have a ratio where it differs."""
    output = tmp_path / "runs" / "cache_bytes_x.json"
    flags = ["--model", model_folder, "--preset", "kv4", "--context-lengths", "70,300", "--output", output]
    assert run("benchmarks/cache_bytes", *flags) == 0
    assert (tmp_path / "plots" / "cache_bytes_x.png").is_file(), "pictures of results lie beside the runs"
    record = json.loads(output.read_text())
    short, long = record["rows"]
    assert short["plain_bytes"] == 70 * TOKEN and long["plain_bytes"] == 300 * TOKEN
    assert long["compression_ratio"] == pytest.approx(300 * TOKEN / long["bytes"])
    assert all(row["compression_ratio"] >= row["ratio_with_codec"] > 0 for row in (short, long))
    assert record["git_commit"] and record["inputs"] == {}
    assert f"| kv4 | 300 | {long['bytes']:,} |" in tables.table("cache_bytes_x", record).markdown()
    for shape, other in (("deepseek-v3", False), ("qwen3.5-4b", True)):
        flags = ["--model", f"{shape}.json", "--preset", "kv8", "--context-lengths", "128", "--output", output]
        assert run("benchmarks/cache_bytes", *flags) == 0
        record = json.loads(output.read_text())
        assert record["model"] == shape
        assert len(record["cache_layers"]) == len(outline(f"{shape}.json").geometry.layers)
        table = tables.table("cache_bytes_x", record).markdown()
        assert ("K and V alone" in table) == other and "with the basis" not in table
        labels = [text.get_text() for text in plots.ratios_by_context(record["rows"], shape).legends[0].get_texts()]
        assert ("K and V alone, without states" in labels) == other


SHAPES = ["deepseek-v3", "gemma-3-4b", "gpt-oss-20b", "qwen3.5-4b"]


@pytest.mark.parametrize("shape", SHAPES)
def test_caches_of_real_shapes_are_smaller_than_transformers(shape):
    """Also 63 tokens into a block, where most of them are exact; and what stays as it is counts on both sides."""
    loaded = outline(f"{shape}.json")
    make = from_preset("kv4", loaded).make
    for tokens, least in ((1024, 3.5), (1087, 2.8)):
        row = measure(make, loaded.geometry, tokens)
        assert row["attention_ratio"] > least
        assert row["compression_ratio"] > 1
        states, less = row["uncompressed_bytes"] > 0, row["compression_ratio"] < row["attention_ratio"]
        assert states == less == (shape == "qwen3.5-4b")


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


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_layer_stands_for_all_that_are_like_it(family):
    loaded = tiny_loaded(family)
    make = from_preset("kv4", loaded).make
    for tokens in (70, 400, 1499):
        cache, row = size.filled(make, loaded.geometry, tokens), measure(make, loaded.geometry, tokens)
        assert row["attention_bytes"] == row["bytes"] == size.cache_bytes(cache)
        assert (row["exact_bytes"], row["unused_bytes"]) == size.exact_and_unused_bytes(cache)
        assert row["codec_bytes"] == cache.codec_bytes()


def test_longer_contexts_are_counted_without_values(monkeypatch):
    loaded = tiny_loaded("gemma3_text", layer_types=["sliding_attention", "full_attention", "full_attention"])
    make = from_preset("kv4", loaded).make
    stored = measure(make, loaded.geometry, 1499)
    monkeypatch.setattr(size, "LONGEST_MEASURED", 1024)
    monkeypatch.delattr(size, "noise")
    assert measure(make, loaded.geometry, 1499) == stored


def test_layers_of_different_bits_are_not_alike_and_a_batch_has_the_ratio_of_one_sequence(llama):
    bits, geometry = [Compressor(quantizer_for_bits(b)) for b in (8, 4, 8)], llama.geometry
    make = partial(CompressedDynamicCache, bits, bits, geometry=geometry)
    assert size.layers_alike(make, geometry) == {0: 2, 1: 1}
    assert measure(make, geometry, 300)["bytes"] == size.held_bytes(make, geometry, 300)
    for name in ("kv4", "kv8"):
        make = from_preset(name, llama).make
        one, three = (
            size.fill(make(), [[size.noise(2, n, 12, batch=batch)] * 2 for n in (150, 64, 64)]) for batch in (1, 3)
        )
        assert size.cache_bytes(three) == 3 * size.cache_bytes(one)


def test_a_basis_that_latents_cant_have_is_refused():
    loaded = random_weights.outline("deepseek-v3.json", layers=2)
    codec = get_preset_info("smollm2-135m", "kv-4x")["codec"]
    with pytest.raises(Exception, match=f"codec {codec} needs K and V of one shape, got 1 x 512 and 1 x 64"):
        from_preset("kv-4x", loaded)
    measured = measure(from_preset("int4-vonly", loaded).make, loaded.geometry, 256)
    assert 1 < measured["compression_ratio"] < 1.2, "V is the short rotary key"
