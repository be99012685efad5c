"""The script that counts parked conversations and times waking them, and its tables."""

import json

import pytest
import torch
from kept import cache_of
from kinds import feed, ids_of
from script_runs import run
from tiny import tiny_model, write_shape

from gpt2.common.errors import PluginError
from gpt2.experiments import parking
from gpt2.report import tables

CONTEXTS = [150, 400, 700]  # the model was trained for 512


@pytest.fixture(scope="module")
def record(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("parking")
    shape = write_shape(folder / "shape.json")
    flags = ["--model", model_folder, "--shapes", shape, "--presets", "kv4,kv8", "--memory-gb", 0.001, "--repeats", 2]
    flags += ["--shape-tokens", 150, "--context-lengths", ",".join(map(str, CONTEXTS)), "--output", folder / "p.json"]
    assert run("benchmarks/parking", *flags) == 0
    return json.loads((folder / "p.json").read_text())


def test_a_shape_reads_no_more_than_the_longest_context(model_folder, tmp_path, monkeypatch):
    subjects = []
    monkeypatch.setattr(parking, "waking_rows", lambda own, *args: subjects.append(own) or [])
    monkeypatch.setattr(tables, "show", lambda *args: None)
    flags = ["--model", model_folder, "--shapes", write_shape(tmp_path / "shape.json"), "--presets", "kv8"]
    assert run("benchmarks/parking", *flags, "--context-lengths", 130, "--output", tmp_path / "p.json") == 0
    assert [own.reads for own in subjects] == [(130,), (130,)]


def test_contexts_that_are_all_beyond_the_models_are_rejected_before_anything_is_counted(
    model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(parking, "fitting_rows", lambda *args: pytest.fail("counted"))
    flags = ["--model", model_folder, "--shapes", "none", "--presets", "kv4", "--output", tmp_path / "p.json"]
    assert run("benchmarks/parking", *flags, "--context-lengths", "700,600") == 2
    err = capsys.readouterr().err
    assert "a context of 600 tokens is longer than the 512" in err and "use --context-lengths 512 or less" in err


def test_what_fits_and_the_basis_takes_its_room_once(record):
    rows = record["parked"]
    assert [row["cache"] for row in rows] == 2 * ["16-bit", "kv4", "kv8"]
    assert all(row["fit"] == (1_000_000 - row["basis_bytes"]) // row["bytes"] for row in rows)
    assert rows[1]["fit"] > rows[2]["fit"] > rows[0]["fit"] > 0
    configs = {"tiny": tiny_model("llama").config}
    row = parking.fitting_rows(configs, 300, ["kv4"], 0)[1]
    needed = row["basis_bytes"] + 2 * row["bytes"]
    found = [parking.fitting_rows(configs, 300, ["kv4"], memory)[1]["fit"] for memory in (needed - 1, needed)]
    assert row["basis_bytes"] and found == [1, 2]


def test_what_wakes(record):
    """A prompt beyond the model's context isn't read, and neither is that of a shape."""
    rows = record["woken"]
    own, shape = rows[:6], rows[6:]
    assert [(row["cache"], row["context_tokens"]) for row in own] == [(c, n) for c in ("kv4", "kv8") for n in CONTEXTS]
    assert [row["read"] for row in own] == 2 * ["measured", "measured", "counted"]
    assert own[0]["read_s"] == own[3]["read_s"], "a prompt is read once for all caches"
    assert {row["read"] for row in shape} == {"counted"} and {row["context_tokens"] for row in shape} == {700}
    assert {(row["layers"], row["whole_layers"]) for row in shape} == {(1, 3)}
    for row in rows:
        pairs = zip(row["load_ms"], row["first_token_ms"], strict=True)
        assert row["wake_ms_median"] == pytest.approx(sum(map(sum, pairs)) / 2)
        assert row["times_faster"] == pytest.approx(1000 * row["read_s"] / row["wake_ms_median"])
    assert own[2]["held_bytes"] > 1.5 * own[1]["held_bytes"]
    assert own[2]["held_bytes"] == 3 * shape[0]["held_bytes"], "of three layers like the model's, one is run"


@pytest.mark.parametrize("name", ["kv4", "kv8"])
def test_a_grown_cache_repeats_its_codes(name):
    """A fork with more tokens, which reads as the codes of the cache do; the cache stays as it is."""
    model = tiny_model("llama")
    cache = cache_of(model, name)
    feed(model, cache, ids_of(200))
    grown, store = parking.grown(cache, 500), cache.layers[1].stores["V"]
    assert 500 - 64 < grown.get_seq_length() <= 500 and cache.get_seq_length() == 200
    v, more, coded = cache.layers[1].read()[1], grown.layers[1].read()[1], store.compressed_tokens + store.lead
    repeated = coded // 64 * 64  # tokens between a code and its copy; the first block has padding in place of sinks
    assert torch.equal(more[:, :, 64:128], v[:, :, 64:128]) and coded >= 128
    if name == "kv4":
        assert torch.equal(more[:, :, 128 + repeated : 192 + repeated], v[:, :, 128:192])
    assert feed(model, grown, ids_of(3)).isfinite().all()
    assert parking.grown(cache, 100).get_seq_length() == 200


def test_tables(record):
    parked, woken = tables.TABLES["parking"](record, ["parked"]), tables.TABLES["parking"](record, ["woken", "700"])
    assert len(parked.rows) == 6 and "fit in 0.001 GB" in parked.columns
    assert len(woken.rows) == 4 and all(row[6].startswith("≈ ") for row in woken.rows)
    assert "1 of 3 layers were run" in woken.note and len(tables.TABLES["parking"](record, []).rows) == 8
    with pytest.raises(PluginError, match="one of parked, woken, got 'asleep'"):
        tables.TABLES["parking"](record, ["asleep"])
