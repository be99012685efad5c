"""The script that counts bytes by context length, and its table."""

import json

import pytest
from script_runs import run

from gpt2.report import tables

TOKEN = 2 * 3 * 2 * 12 * 2  # bytes of a token of the tiny model, K and V, in 16 bits


def test_the_script_and_its_table(tmp_path, model_folder):
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
