"""The profiling script, its table and its figure."""

import json

import pytest
from pictures import is_drawn
from script_runs import PROFILE, run
from tiny import write_shape

from gpt2.common import machine
from gpt2.common.errors import PluginError
from gpt2.compression.cache import crossover
from gpt2.compression.cache.crossover import Crossover, Crossovers
from gpt2.evaluation import lineup, timing
from gpt2.evaluation.instruments import PARTS
from gpt2.evaluation.perplexity import BASELINE
from gpt2.report import plots, tables

SMALL = ["--context-lengths", 16, "--batch-sizes", "1,2", "--decode-tokens", 2, "--repeats", 1]
LOST = {"cache": "baseline", "context_tokens": 1024, "batch_size": 4, "out_of_memory": True}


@pytest.fixture
def shape(script, tmp_path, monkeypatch):
    """Flags for a shape without weights, in the folder of `script`."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # before each measurement it takes longer than the tiny model
    return ["--model", write_shape(tmp_path / "tiny-shape.json"), "--preset", "p.json", "--device", "cpu"]


def test_the_script_writes_figures_a_plot_and_a_table(shape, tmp_path, capsys):
    assert run(PROFILE, *shape, *SMALL, "--context-lengths", "16,24", "--identity", "--output", "out/r.json") == 0
    said = capsys.readouterr().out
    assert said.count("tokens/s") == 4 and "compress  expand" in said and "the weights are random" in said
    assert said.count("parking: nothing is moved") == 1
    record = json.loads((tmp_path / "out/r.json").read_text())
    assert is_drawn(tmp_path / "out/r.png")
    assert record["weights"] == "random" and record["model"] == "tiny-shape.json (random weights, 3 layers)"
    assert record["peak_memory"].startswith("resident size") and record["caches"][0]["bits"] == 4
    cells = [(row["batch_size"], row["context_tokens"], row["cache"]) for row in record["rows"]]
    assert cells == [(b, c, name) for b in (1, 2) for c in (16, 24) for name in (BASELINE, "identity", "int4")]
    for rows in ([*record["rows"][::-1], LOST], [LOST]):
        axes = plots.profiles(rows, "title").axes
        assert sum(len(axis.patches) for axis in axes) == len(PARTS) * (len(rows) - 1)
        assert not rows[1:] or list(axes[0].lines[0].get_xdata()) == [16, 24]
    table = tables.profile(record, ["2"]).markdown()
    assert table.count("\n| 2 |") == 6 and "| 1 |" not in table and "Weights are random" in table
    row = next(row for row in record["rows"] if row["batch_size"] == 2 and row["cache"] == "int4")
    assert f"| {row['ratio_to_baseline']['tokens_per_s_median']:.2f}x (" in table
    with pytest.raises(PluginError, match="no rows of batch size 3"):
        tables.profile(record, ["3"])


def test_the_script_measures_a_model_with_weights(shape, script, tmp_path):
    assert script(PROFILE, *shape[2:], *SMALL, "--batch-sizes", 1) == 0
    name = machine.named("profile_tiny", machine.tag())
    record = json.loads((tmp_path / f"results/runs/{name}.json").read_text())
    assert record["weights"] == "trained" and (tmp_path / f"results/plots/{name}.png").exists()
    assert record["machine"]["processor"] and "busy_cores_before" in record["machine"]
    assert "Weights" not in tables.profile(record, []).note


@pytest.mark.parametrize(("busy", "flags", "batches"), [(0.0, [], 2), (1.0, ["--noise", "--batch-sizes", "1"], 1)])
def test_codes_read_directly_are_measured_for_later_and_slower_ones_named(
    busy, flags, batches, shape, monkeypatch, tmp_path, capsys
):
    """For later only where nothing else is running: what is kept is asked for ever after. Noise has no first token."""
    monkeypatch.setattr(machine, "busy_cores", lambda: busy)
    monkeypatch.setattr(crossover, "KNOWN", Crossovers(lambda: tmp_path / "kept.json"))
    monkeypatch.setattr(crossover, "measure", lambda *args: Crossover([8], [2.0], [1.0]))
    rows = []
    monkeypatch.setattr(lineup, "slower_directly", lambda found: rows.extend(found) or "note: it was slower")
    assert run(PROFILE, *shape, *SMALL, "--direct", *flags, "--output", "out/r.json") == 0
    said = capsys.readouterr().out
    assert ("isn't measured now, as other work is running" in said) == bool(busy) != (tmp_path / "kept.json").exists()
    assert busy or len(json.loads((tmp_path / "kept.json").read_text())["crossovers"]) == batches
    assert said.count("note: it was slower\n") == 1 and said.index("memory") < said.index("note: it was slower")
    assert [row["cache"] for row in rows] == [BASELINE, "int4", "int4, direct"] * batches
    table, noise = tables.profile(json.loads((tmp_path / "out/r.json").read_text()), []).markdown(), "--noise" in flags
    assert table.count(" | – | ") == (3 if noise else 0) and ("no first token" in table) == noise
    assert is_drawn(tmp_path / "out/r.png")


def test_bad_input_is_one_clear_line_before_any_work(shape, capsys, monkeypatch):
    monkeypatch.setattr(timing, "run_once", lambda *args: pytest.fail("measured"))
    for flags, message, advice in (
        (["--context-lengths", "510"], "510 tokens with 16 more is longer than the 512", "--context-lengths 496"),
        (["--context-lengths", "64,1024"], "1024 tokens with 16 more is longer", "or less"),
        (["--context-lengths", "0"], "0 is not a positive number", "--context-lengths"),
        (["--preset", "p.json", "p.json"], "two caches are called 'int4'", "another name"),
        (["--layers", "9"], "--layers 9: tiny-shape.json has 3 layers", "error"),
    ):
        assert run(PROFILE, *shape, "--context-lengths", 16, *flags) == 2
        err = capsys.readouterr().err
        assert message in err and advice in err and "Traceback" not in err


def test_parked_caches_and_those_without_room_have_rows():
    own = {"cache": "int4", "context_tokens": 512, "token_ms_median": 40.0, "tokens_per_s_median": 25.0}
    own |= {"tokens_per_s_quartiles": [24.0, 27.0], "cache_bytes": 1 << 20, "share_of_step": dict.fromkeys(PARTS, 0.2)}
    own |= {"ttft_ms_median": 1.0, "peak_memory_bytes": 1 << 20}
    parking = {"moved_bytes": 3 << 20, "offload_ms": 2.0, "prefetch_ms": 1.0}
    record = {"rows": [own | {"batch_size": 2}, own | {"batch_size": 2, "parking": parking}], "device": "cuda"}
    lines = tables.TABLES["profile_parking"](record, ["2"]).markdown().splitlines()
    assert lines[2] == "| 2 | 512 | int4 | 3.0 MiB | 2.0 ms, 1.6 GB/s | 1.0 ms, 3.1 GB/s |" and not lines[3]
    record = {"rows": [LOST, own | {"batch_size": 4}], "args": {"decode_tokens": 3, "repeats": 2}, "weights": "trained"}
    record |= {"model": "m", "dtype": "float32", "device": "cpu", "peak_memory": "sampled"}
    lines = tables.profile(record, []).markdown().splitlines()
    assert lines[2] == "| 4 | 1,024 | baseline | out of memory | | | | | |"
    assert {line.count("|") for line in lines[:4]} == {10}, "every row has every column"
