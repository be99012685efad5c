"""Exponents, arithmetic of large models against hand-made cases and real objects, and the script that joins them."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from tiny import tiny_loaded, tiny_model, windows, word_tokenizer
from transformers import AutoConfig

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import held_bytes
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.statistics import Statistics, collect
from gpt2.compression.codecs import multi_head_bases
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.named_caches import from_preset
from gpt2.experiments import cost_model, power_law, predictions
from gpt2.experiments.cost_model import Dimensions
from gpt2.experiments.power_law import Point, Series
from gpt2.experiments.scaling import measured_bytes, moments_bytes, saved_bytes
from gpt2.models import random_weights
from gpt2.models.geometry import Geometry
from gpt2.report import tables

# 2 layers, 2 KV heads of 4 under 4 query heads
SMALL = Dimensions(
    Geometry.uniform(2, 2, 4), 4, hidden=16, intermediate=32, vocabulary=100, layer_weights=1000, weights=5200
)


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


def test_verdict_is_computed():
    assert power_law.verdict(1.0, (0.9, 0.95)) == power_law.AGREES  # within the tolerance
    assert power_law.verdict(1.0, (0.6, 0.8)) == power_law.DIFFERS
    assert power_law.verdict(1.0, (1.2, 1.3)) == power_law.DIFFERS
    assert power_law.verdict(1.0, (0.5, 1.5)) == power_law.UNKNOWN  # it holds the exponent, and many others


def test_points_take_turns():
    asked = []
    points = [Point(x, x, lambda x=x: asked.append(x) or float(x)) for x in (1, 2, 3, 4)]
    power_law.measure(Series("step", "x", "nothing", points), repeats=2)
    assert asked == [1] + [1, 2, 3, 4] + [4, 3, 2, 1]  # warmed up, then there and back
    asked.clear()
    power_law.measure(Series("step", "x", "nothing", points, power_law.BYTES), repeats=5)
    assert asked == [1, 2, 3, 4]


def test_few_points_are_refused():
    with pytest.raises(PluginError, match="expected 4 sizes or more, got 3"):
        power_law.measure(Series("step", "x", "nothing", series(1.0).points[:3]), repeats=1)


def test_cost_between_measured_sizes():
    found = power_law.measure(series(2.0, factor=1.0), repeats=1)
    assert power_law.at(found, 4) == pytest.approx(16)
    assert power_law.at(found, 3) == pytest.approx(9)


def test_arithmetic_by_hand():
    # 2 layers · (2 · 1000 · 10 + 2 · 4 · 4 · 100); logits 2 · 100 · 16 · 10
    assert cost_model.forward_flops(SMALL, 10) == 2 * (20_000 + 3_200)
    assert cost_model.forward_flops(SMALL, 10, logits=True) == 46_400 + 32_000
    assert cost_model.backward_flops(SMALL, 10) == 2 * (20_000 + 5 * 16 * 100) + 32_000
    assert cost_model.moments_flops(SMALL, 10) == 2 * 2 * 16 * 8 * 10
    # Both heads share a basis of 2 · 2 · 4 = 16 channels
    assert SMALL.multi_head_shapes() == {"joint": Geometry.uniform(2, 1, 16), "grouped": Geometry.uniform(4, 1, 8)}
    assert cost_model.gradient_moments_flops(SMALL, 10) == 2 * 10 * (4 * 2 * 16 + 4 * 256 + 8 * 64)
    assert cost_model.gradient_pass_flops(SMALL, 10) == 78_400 + 88_000 + 33_280
    again = cost_model.gradient_pass_flops(SMALL, 10, checkpointing=True) - cost_model.gradient_pass_flops(SMALL, 10)
    assert again == 46_400
    assert cost_model.bases(SMALL) == {16: 2, 8: 4, 4: 8}
    assert cost_model.logits_bytes(SMALL, 10) == 4_000


def test_bases_are_at_most_512_wide():
    dims = cost_model.dimensions(random_weights.read_shapes(["llama-3.1-8b.json"])["llama-3.1-8b"], "llama-3.1-8b")
    assert dims.multi_head_shapes()["joint"] == Geometry.uniform(32, 4, 512)
    assert dims.weights == pytest.approx(8.03e9, rel=1e-3)
    # q and o 4096², k and v 4096 · 1024, three of 4096 · 14336; norms are 8,192 more
    assert dims.layer_weights == pytest.approx(2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336, rel=1e-4)


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded("llama")


def test_counted_statistics_are_those_that_passes_leave(loaded):
    dims = cost_model.dimensions(loaded.model.config, loaded.spec)
    found = collect(loaded, windows(2, 72), sink_tokens=4)
    assert moments_bytes(found.k) + moments_bytes(found.v) == cost_model.statistics_bytes(dims)
    sides = [Moments.zeros(loaded.geometry) for _ in range(2)]
    statistics = Statistics(*sides)
    found = collect_fisher(loaded, windows(1, 4 + 48 * 64 // 8), statistics, 4, multi_head_bases())
    counted = cost_model.gradient_statistics_bytes(dims)
    assert sum(own.nbytes for side in sides for own in side.metrics["fisher"]) == counted["heads"]
    moments = {name: moments_bytes(own.moments) for name, own in found.items()}
    assert moments == {name: counted[name] for name in moments} and len(moments) >= 2
    # One window of 6 blocks, of the 48 that are kept
    assert sum(map(measured_bytes, found.values())) - sum(moments.values()) == counted["blocks"] // 8


def test_counted_activations_are_those_that_are_kept(loaded):
    dims = cost_model.dimensions(loaded.model.config, loaded.spec)
    assert saved_bytes(loaded, 64) == cost_model.activation_bytes(dims, 64, element=4)
    kept = cost_model.activation_bytes(dims, 64, element=4, checkpointing=True)
    assert 3 * 64 * 48 * 4 < kept < cost_model.activation_bytes(dims, 64, element=4)


@pytest.mark.parametrize("preset", ["kv4", "kv8", "kv-4x", "fast-4x"])
def test_bytes_on_paper_are_those_of_a_real_cache(preset):
    """3 layers of 8 heads of 64: in the measured codecs two groups of heads."""
    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=97,
    )  # fmt: skip
    plain, row = predictions.cache_rows({"some": config}, [300], [preset])
    whole = random_weights.from_config(config, "some")
    cache = from_preset(preset, whole)
    assert row["bytes"] == held_bytes(cache.make, Geometry.uniform(3, 8, 64), 300)
    assert row["bytes_per_token"] == row["bytes"] / 300
    assert plain["bytes"] == 300 * Geometry.uniform(3, 8, 64).bytes_per_token()
    assert row["compression_ratio"] == plain["bytes"] / row["bytes"] > 1
    if preset in ("kv-4x", "fast-4x"):
        assert row["basis_bytes"] == cache.make().codec_bytes() > 0


def test_narrow_models_keep_the_shape_of_the_cache():
    config = random_weights.read_shapes(["qwen2.5-7b.json"])["qwen2.5-7b"]
    assert predictions.narrow(config, Geometry.uniform(2, 4, 128)).geometry == Geometry.uniform(2, 4, 128)


def test_calibration_on_paper_adds_up():
    config = random_weights.read_shapes(["qwen2.5-0.5b.json"])["qwen2.5-0.5b"]
    row = predictions.calibration_rows({"q": config}, 10, 100, 1e12, lambda width: float(width))[0]
    dims = cost_model.dimensions(config, "q")
    assert row["forward_flops"] == 10 * cost_model.forward_flops(dims, 100)
    assert row["seconds"]["gradient_pass"] == 10 * cost_model.gradient_pass_flops(dims, 100) / 1e12
    assert row["in_forward_passes"]["first_pass"] == pytest.approx(1, abs=0.1) and "256" in row["bases"]
    assert row["fitting_s"] == sum(width * count for width, count in cost_model.bases(dims).items())


# --- the script and its tables


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The script's own output, on a tiny model, everything small."""
    folder = tmp_path_factory.mktemp("scaling")
    tiny_model("llama", num_hidden_layers=4).save_pretrained(folder / "m")
    word_tokenizer().save_pretrained(folder / "m")
    (folder / "other.json").write_text((folder / "m" / "config.json").read_text())
    fields = json.loads((folder / "other.json").read_text())
    for hidden in (64, 96, 128):
        other = fields | {"hidden_size": hidden, "head_dim": hidden // 4}
        (folder / f"h{hidden}.json").write_text(json.dumps(other))
    timed = ",".join(str(folder / f"h{hidden}.json") for hidden in (64, 96, 128))
    argv = ["measure_scaling", "--model", folder / "m", "--shapes", folder / "h64.json", "--timed-shapes", timed,
            "--cache-shapes", folder / "h64.json", "--timed-presets", "kv4,fast-4x", "--context-lengths", "128,256",
            "--quick", "--repeats", "1", "--output", folder / "scaling.json"]  # fmt: skip
    before, sys.argv = sys.argv, [str(word) for word in argv]
    try:
        runpy.run_path(str(files.ROOT / "scripts" / "benchmarks" / "scaling.py"), run_name="__main__")
    finally:
        sys.argv = before
    assert (folder / "scaling.png").is_file()
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


@pytest.mark.parametrize("name", ["bytes", "time", "memory", "passes", "slopes"])
def test_tables(record, name):
    lines = tables.TABLES["scaling"](record, [name]).markdown().split("\n\n")[0].split("\n")
    assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1
    assert lines[1].count("---") == lines[0].count("|") - 1


def test_tables_of_some_steps(record):
    text = tables.TABLES["scaling"](record, ["slopes", "tune", "needle"]).markdown()
    assert "tune" in text and "needle" in text and "calibrate" not in text
    for words, message in ((["sizes"], "give one of bytes"), (["slopes", "nothing"], "no slopes of nothing")):
        with pytest.raises(PluginError, match=message):
            tables.TABLES["scaling"](record, words)


def test_changed_configs_are_cut():
    config = tiny_model("qwen2").config
    cut = random_weights.changed(config, 2, vocab_size=50)
    assert (cut.num_hidden_layers, cut.vocab_size, config.num_hidden_layers) == (2, 50, 3)
    assert torch.is_tensor(random_weights.from_config(cut, "cut").model.lm_head.weight)
