"""Presets by ratio, on a tiny model: bytes, files, and the caches that come out of them."""

import json
from pathlib import Path

import pytest
import torch
from script_runs import listing, run
from tiny import tiny_loaded, tiny_model, word_text

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.cache.size import held_bytes, plain_bytes
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.presets import create_cache_from_preset, load_preset
from gpt2.text.sources import by_position
from gpt2.tuning import ratio_presets

TEXT = by_position("words", "words.txt", word_text(3000))
SMALL = {"samples": 3, "seq_len": 100, "seed": 0, "sink_tokens": 4}


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def calibration(llama):
    return calibrate(llama, TEXT, rank=12, codec="joint", **SMALL)


@pytest.mark.parametrize(("ratio", "quantizer"), [(2.0, "mixed"), (8.0, "mixed"), (4.6, "mixed_fixed")])
def test_a_preset_has_its_ratio_and_wastes_little(llama, calibration, ratio, quantizer):
    preset = ratio_presets.make_ratio_preset(llama, calibration, ratio, quantizer=quantizer)
    shape, tokens = llama.geometry, ratio_presets.TOKENS
    held = plain_bytes(shape, tokens) / held_bytes(preset.make, shape, tokens)
    assert preset.compression_ratio == pytest.approx(held) and ratio <= held < 1.05 * ratio
    assert preset.name == f"kv-{ratio:g}x" and preset.bits < 16 / ratio


def test_sinks_are_counted_and_a_ratio_out_of_reach_is_named(llama, calibration):
    few, many = (ratio_presets.make_ratio_preset(llama, calibration, 4.0, sink_tokens=n) for n in (0, 64))
    assert many.bits < few.bits - 0.4, "64 of 2048 tokens in 16 bits are half a bit of all"
    for ratio in (1.2, 60.0):
        with pytest.raises(PluginError, match=f"ratio {ratio:g} is out of range"):
            ratio_presets.make_ratio_preset(llama, calibration, ratio)


def test_the_calibration_is_compact_and_used_again(llama, calibration, tmp_path, capsys):
    path = save_calibration(calibration, tmp_path / "joint.pt")  # with statistics: not a compact one
    made = ratio_presets.compact_calibration(llama, TEXT, path, codec="joint", **SMALL)
    assert "will be replaced" in capsys.readouterr().out
    assert made.statistics is None and load_calibration(path).statistics is None
    again = ratio_presets.compact_calibration(llama, TEXT, path, codec="joint", **SMALL)
    assert "using" in capsys.readouterr().out
    assert all(map(torch.equal, again.multi_head["joint"].E, made.multi_head["joint"].E))
    ratio_presets.compact_calibration(llama, TEXT, path, codec="joint", **SMALL | {"seed": 1})
    assert "will be replaced" in capsys.readouterr().out and load_calibration(path).meta["seed"] == 1


def test_the_script_makes_presets_that_work(tiny_flags, tmp_path, capsys):
    slug, model = Path(tiny_flags[1]).name, tiny_model("llama")
    flags = [*tiny_flags, "--samples", 3, "--seq-len", 100, "--eval-tokens", 256, "--eval-seq-len", 128]
    flags += ["--ratios", "2,6.4", "--output", "out"]
    before = listing(tmp_path)
    assert run("make_presets", *flags) == 0
    names = {f"runs/ratio_presets_{slug}.json", f"plots/ratio_presets_{slug}.png", f"calibrations/kv_joint_{slug}.pt"}
    names |= {f"presets/{slug}-kv-2x.json", f"presets/{slug}-kv-6.4x.json"}
    assert listing(tmp_path) - before == {f"out/{name}" for name in names}
    for row in json.loads((tmp_path / f"out/runs/ratio_presets_{slug}.json").read_text())["rows"]:
        preset = load_preset(tmp_path / f"out/presets/{slug}-{row['label']}.json")
        assert preset["compression_ratio"] == pytest.approx(row["compression_ratio_2048"], abs=1e-3)
        assert preset["ppl_delta"] == pytest.approx(row["ppl_delta"], abs=1e-6)
        assert "make_presets.py" in preset["made_by"] and preset["bits"] == row["bits"]
        prompt = (torch.arange(100) % 20 + 2)[None]
        out = model.generate(prompt, past_key_values=create_cache_from_preset(preset), max_new_tokens=4)
        assert out.shape == (1, 104)
    one, two = (create_cache_from_preset(preset).layers[0].stores["KV"].compressor for _ in range(2))
    assert one is two, "caches made one after another share the basis"
    with pytest.raises(BadArtefact, match="'meta.seed': the preset was measured with 5, found 0"):
        create_cache_from_preset(preset | {"calibrated_with": {"seed": 5}})
    before = listing(tmp_path)
    assert run("make_presets", *flags, "--tag", "b") == 0
    names = {f"runs/ratio_presets_{slug}_b.json", f"plots/ratio_presets_{slug}_b.png"}
    names |= {f"calibrations/kv_joint_{slug}_b.pt"}
    assert listing(tmp_path) - before == {f"out/{name}" for name in names}, "a tag measures only"
    assert run("make_presets", *flags, "--ratios", "0.5") == 2
    assert "lies between 1 and 64" in capsys.readouterr().err
