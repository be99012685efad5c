"""Presets by ratio, on a tiny model: bytes, files, and the caches that come out of them."""

import json

import pytest
import torch
from script_runs import listing, run
from tiny import tiny_loaded, tiny_model, word_text, word_tokenizer

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


@pytest.mark.parametrize("quantizer", ["mixed", "mixed_fixed"])
@pytest.mark.parametrize("ratio", [2.0, 4.6, 8.0])
def test_a_rung_holds_its_ratio_and_wastes_little(llama, calibration, ratio, quantizer):
    preset = ratio_presets.make_ratio_preset(llama, calibration, ratio, quantizer=quantizer)
    held = plain_bytes(llama.geometry, ratio_presets.TOKENS) / held_bytes(
        preset.make, llama.geometry, ratio_presets.TOKENS
    )
    assert preset.compression_ratio == pytest.approx(held) and ratio <= held < 1.05 * ratio
    assert preset.name == f"kv-{ratio:g}x" and preset.bits < 16 / ratio


def test_sinks_are_paid_for(llama, calibration):
    few, many = (ratio_presets.make_ratio_preset(llama, calibration, 4.0, sink_tokens=n) for n in (0, 64))
    assert many.bits < few.bits - 0.4, "64 of 2048 tokens in 16 bits are half a bit of all"


@pytest.mark.parametrize("ratio", [1.2, 60.0])
def test_a_ratio_out_of_reach_is_named(llama, calibration, ratio):
    with pytest.raises(PluginError, match=f"ratio {ratio:g} is out of range"):
        ratio_presets.make_ratio_preset(llama, calibration, ratio)


def test_the_calibration_is_compact_and_used_again(llama, tmp_path, capsys):
    path = tmp_path / "joint.pt"
    made = ratio_presets.compact_calibration(llama, TEXT, path, codec="joint", **SMALL)
    assert made.statistics is None and path.is_file() and "using" not in capsys.readouterr().out
    again = ratio_presets.compact_calibration(llama, TEXT, path, codec="joint", **SMALL)
    assert "using" in capsys.readouterr().out and torch.equal(again.multi_head["joint"].E, made.multi_head["joint"].E)
    ratio_presets.compact_calibration(llama, TEXT, path, codec="joint", **SMALL | {"seed": 1})
    assert "will be replaced" in capsys.readouterr().out
    assert load_calibration(path).meta["seed"] == 1


def test_a_whole_calibration_is_not_mistaken_for_a_compact_one(llama, calibration, tmp_path, capsys):
    path = save_calibration(calibration, tmp_path / "joint.pt")
    ratio_presets.compact_calibration(llama, TEXT, path, codec="joint", **SMALL)
    assert "using" not in capsys.readouterr().out and load_calibration(path).statistics is None


def test_the_script_makes_presets_that_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    model.save_pretrained("tiny")
    word_tokenizer().save_pretrained("tiny")
    (tmp_path / "words.txt").write_text(word_text(3000))
    flags = ["--model", "tiny", "--text", "words.txt", "--samples", 3, "--seq-len", 100, "--eval-tokens", 256]
    flags += ["--eval-seq-len", 128, "--ratios", "2,6.4"]
    before = listing(tmp_path)
    assert run("make_presets", *flags, "--output", "out") == 0
    names = {"runs/ratio_presets_tiny.json", "plots/ratio_presets_tiny.png", "calibrations/kv_joint_tiny.pt"}
    names |= {"presets/tiny-kv-2x.json", "presets/tiny-kv-6.4x.json"}
    assert listing(tmp_path) - before == {f"out/{name}" for name in names}
    for row in json.loads((tmp_path / "out/runs/ratio_presets_tiny.json").read_text())["rows"]:
        preset = load_preset(tmp_path / f"out/presets/tiny-{row['label']}.json")
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
    assert run("make_presets", *flags, "--output", "out", "--tag", "other") == 0
    assert {name for name in listing(tmp_path) if "other" in name} == {
        "out/runs/ratio_presets_tiny_other.json",
        "out/plots/ratio_presets_tiny_other.png",
        "out/calibrations/kv_joint_tiny_other.pt",
    }
    assert len(list((tmp_path / "out/presets").iterdir())) == 2, "a tag measures only"
    assert run("make_presets", *flags, "--ratios", "0.5") == 2
    assert "lies between 1 and 64" in capsys.readouterr().err
