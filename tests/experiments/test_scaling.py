"""The script that measures how costs grow, and its tables."""

import json

import pytest
from script_runs import run
from tiny import save_tiny

from gpt2.common.errors import PluginError
from gpt2.compression.presets import get_preset_info
from gpt2.experiments import power_law
from gpt2.models import random_weights
from gpt2.report import tables


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The script's own output, on a tiny model, everything small."""
    folder = tmp_path_factory.mktemp("scaling")
    save_tiny(folder / "m", num_hidden_layers=4)
    config = json.loads((folder / "m" / "config.json").read_text())
    shapes = [folder / f"h{hidden}.json" for hidden in (64, 96, 128)]
    for path, hidden in zip(shapes, (64, 96, 128), strict=True):
        path.write_text(json.dumps(config | {"hidden_size": hidden, "head_dim": hidden // 4}))
    flags = ["--model", folder / "m", "--shapes", shapes[0], "--timed-shapes", ",".join(map(str, shapes)),
             "--cache-shapes", shapes[0], "--timed-presets", "kv4,fast-4x", "--context-lengths", "64,128",
             "--quick", "--repeats", "1", "--output", folder / "scaling.json"]  # fmt: skip
    assert run("benchmarks/scaling", *flags) == 0 and (folder / "scaling.png").is_file()
    return json.loads((folder / "scaling.json").read_text())


def test_script_measures_every_step(record):
    steps = {row["step"] for row in record["slopes"]}
    for word in ("first pass", "gradients", "fit", "statistics", "activations", "compress", "append", "reconstruction",
                 "over codes", "16-bit", "perplexity", "tune", "needle"):  # fmt: skip
        assert any(word in step for step in steps), word
    for row in record["slopes"]:
        if row["unit"] == power_law.BYTES:  # counted to the byte
            assert row["medians"] == row["predicted"] and row["verdict"] == power_law.AGREES
        else:  # one timing
            assert row["verdict"] == power_law.UNKNOWN
    assert {row["shape"] for row in record["caches"]} == {"m", "h64"}


def test_what_is_counted_alone_has_no_times(tmp_path):
    """Also of models whose layers differ; what one can't have is said below the table."""
    shape, output = tmp_path / "latent.json", tmp_path / "paper.json"
    shape.write_text(json.dumps(random_weights.changed(random_weights.read_shapes(["deepseek-v3.json"])["deepseek-v3"],
                                                       1).to_dict()))  # fmt: skip
    flags = ["--model", save_tiny(tmp_path / "m", "gemma3_text"), "--shapes", shape]
    flags += ["--context-lengths", "300", "--presets", "kv4,kv-4x"]
    assert run("benchmarks/scaling", *flags, "--counted-only", "--output", output) == 0
    record = json.loads(output.read_text())
    assert "slopes" not in record and {row["fitting_s"] for row in record["calibrations"]} == {None}
    table = tables.TABLES["scaling"](record, ["bytes"]).markdown()
    codec = get_preset_info("smollm2-135m", "kv-4x")["codec"]
    assert "| latent | kv4 |" in table and f"latent has no kv-4x: layer 0: codec {codec} needs K and V" in table
    assert "| latent |" in tables.TABLES["scaling"](record, ["time"]).markdown()
    assert " – | – |" in tables.TABLES["scaling"](record, ["memory"]).markdown()


def test_tables(record):
    table = tables.TABLES["scaling"]
    for name in ("bytes", "time", "memory", "passes", "slopes"):
        lines = table(record, [name]).markdown().split("\n\n")[0].split("\n")
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1, name
        assert lines[1].count("---") == lines[0].count("|") - 1, name
    text = table(record, ["slopes", "tune", "needle"]).markdown()
    assert "tune" in text and "needle" in text and "calibrate" not in text
    for words, message in ((["sizes"], "give one of bytes"), (["slopes", "nothing"], "no slopes of nothing")):
        with pytest.raises(PluginError, match=message):
            table(record, words)
