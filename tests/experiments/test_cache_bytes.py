"""Bytes by context length: what is exact, what is unused, and the script's figures."""

import json
import runpy
import sys

import pytest
from tiny import tiny_loaded, tiny_model, word_tokenizer

from gpt2.common import files
from gpt2.compression.cache import size
from gpt2.compression.named_caches import from_preset
from gpt2.report import tables

LAYERS, HEADS, WIDTH = 3, 2, 12  # of the tiny model
TOKEN = 2 * LAYERS * HEADS * WIDTH * 2  # bytes of a token, K and V, in 16 bits


def test_exact_and_unused_bytes_are_those_of_sinks_tail_and_room():
    llama = tiny_loaded("llama")
    cache = size.filled(from_preset("kv8", llama).make, llama.geometry, 100)
    stores = [store for layer in cache.layers for store in layer.stores.values()]
    tokens = [store.sinks.shape[2] + store.tail.shape[2] for store in stores]
    exact, unused = size.exact_and_unused_bytes(cache)
    assert (
        exact == sum(TOKEN // (2 * LAYERS) * (s.sinks.shape[2] + s.tail.shape[2]) for s in stores) and max(tokens) > 4
    )
    assert 0 < unused < size.cache_bytes(cache) - exact
    whole = size.cache_bytes(cache)
    for store in stores:
        for stored in store.blocks.values():
            stored.chunks = [view.clone() for view in stored.views()]
            stored.unused = 0
    assert size.cache_bytes(cache) == whole - unused and size.exact_and_unused_bytes(cache) == (exact, 0)


def test_the_script_and_its_table(tmp_path, monkeypatch, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    words = ["x", "--model", str(tmp_path / "model"), "--preset", "kv4", "--context-lengths", "70,300"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / "runs" / "cache_bytes_x.json")])
    runpy.run_path(str(files.ROOT / "scripts" / "benchmarks" / "cache_bytes.py"), run_name="__main__")
    assert (tmp_path / "plots" / "cache_bytes_x.png").is_file(), "pictures of results lie beside the runs"
    record = json.loads((tmp_path / "runs" / "cache_bytes_x.json").read_text())
    short, long = record["rows"]
    assert short["plain_bytes"] == 70 * TOKEN and long["plain_bytes"] == 300 * TOKEN
    assert long["compression_ratio"] == pytest.approx(300 * TOKEN / long["bytes"])
    assert all(row["compression_ratio"] >= row["ratio_with_codec"] > 0 for row in (short, long))
    assert record["git_commit"] and record["inputs"] == {}
    assert f"| kv4 | 300 | {long['bytes']:,} |" in tables.table("cache_bytes_x", record).markdown()
