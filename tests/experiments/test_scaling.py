"""The script that measures how costs grow, its tables, and exponents of measured costs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pictures import is_drawn
from script_runs import run
from tiny import save_tiny, write_shape

from gpt2.common.errors import PluginError
from gpt2.compression.presets import get_preset_info
from gpt2.experiments import power_law, scaling
from gpt2.experiments.power_law import Point, Series
from gpt2.models import random_weights
from gpt2.report import plots, tables

SMALLEST = replace(scaling.QUICK, widths=(16, 32, 48, 64), contexts=(128, 192, 256, 320), decoded=1)


def every_fourth_slope(record: dict) -> dict:
    """A figure of all of them takes longer than measuring them."""
    return record | {"slopes": record["slopes"][::4]}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The script's own output, on a tiny model, everything small."""
    folder = tmp_path_factory.mktemp("scaling")
    save_tiny(folder / "m", num_hidden_layers=4)
    shapes = [write_shape(folder / f"h{size}.json", hidden_size=size, head_dim=size // 4) for size in (64, 96, 128)]
    flags = ["--model", folder / "m", "--shapes", shapes[0], "--timed-shapes", ",".join(map(str, shapes)),
             "--cache-shapes", shapes[0], "--timed-presets", "kv4,kv-4x", "--presets", "kv4", "--quick",
             "--context-lengths", "64,128", "--repeats", "1", "--output", folder / "scaling.json"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "QUICK", SMALLEST)
        patch.setattr(plots, "growth", lambda record, growth=plots.growth: growth(every_fourth_slope(record)))
        assert run("benchmarks/scaling", *flags) == 0 and is_drawn(folder / "scaling.png")
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
    latent = random_weights.changed(random_weights.read_shapes(["deepseek-v3.json"])["deepseek-v3"], 1)
    shape.write_text(json.dumps(latent.to_dict()))
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


def series(power: float, factor: float = 3.0, predicted: float = 1.0, noise: float = 0.0) -> Series:
    """Costs that are a power law to some noise."""
    rng = np.random.default_rng(0)

    def point(x: float) -> Point:
        return Point(x, x**predicted, lambda: factor * x**power * float(np.exp(noise * rng.standard_normal())))

    return Series("step", "x", "nothing", [point(x) for x in (8.0, 1.0, 4.0, 2.0, 16.0)])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(power):
    found = power_law.measure(series(power), repeats=3)
    assert found["exponent"] == pytest.approx(power, abs=1e-9)
    assert found["exponent_interval"] == pytest.approx([power, power], abs=1e-9)
    assert found["x"] == [1, 2, 4, 8, 16]  # in order, whatever order they came in
    assert found["farthest_from_line"] == pytest.approx(0, abs=1e-9)
    assert found["verdict"] == (power_law.AGREES if power == 1 else power_law.DIFFERS)
    assert power_law.at(found, 4) == pytest.approx(3 * 4**power)
    assert power_law.at(found, 3) == pytest.approx(3 * 3**power), "between measured sizes"


def test_verdict_is_computed():
    assert power_law.verdict(1.0, (0.9, 0.95)) == power_law.verdict(1.0, (1.05, 1.1)) == power_law.AGREES, "nearly"
    assert power_law.verdict(1.0, (0.6, 0.8)) == power_law.verdict(1.0, (1.2, 1.3)) == power_law.DIFFERS
    assert power_law.verdict(1.0, (0.5, 1.5)) == power_law.UNKNOWN, "it holds the exponent, and many others"


def test_interval_holds_the_exponent_of_noisy_costs_and_narrows_with_repeats():
    wide, narrow = (power_law.measure(series(1.0, noise=0.2), repeats=n)["exponent_interval"] for n in (3, 60))
    assert wide[0] < 1 < wide[1] and narrow[0] < 1 < narrow[1]
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2


def test_expected_exponent_is_that_of_predicted_costs():
    """Terms that grow differently: neither 1 nor 2."""
    points = [Point(x, x + x**2, lambda x=x: 5 * (x + x**2)) for x in (0.25, 0.5, 1, 2, 4)]
    found = power_law.measure(Series("step", "x", "nothing", points), repeats=3)
    assert found["expected_exponent"] == pytest.approx(1.5, abs=0.01)
    assert found["exponent"] == pytest.approx(found["expected_exponent"]) and found["verdict"] == power_law.AGREES


def test_points_take_turns():
    asked = []
    points = [Point(x, x, lambda x=x: asked.append(x) or float(x)) for x in (1, 2, 3, 4)]
    power_law.measure(Series("step", "x", "nothing", points), repeats=2)
    assert asked == [1] + [1, 2, 3, 4] + [4, 3, 2, 1]  # warmed up, then there and back
    asked.clear()
    power_law.measure(Series("step", "x", "nothing", points, power_law.BYTES), repeats=5)
    assert asked == [1, 2, 3, 4]
    with pytest.raises(PluginError, match="expected 4 sizes or more, got 3"):
        power_law.measure(Series("step", "x", "nothing", points[:3]), repeats=1)
