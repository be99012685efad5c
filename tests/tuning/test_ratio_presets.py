"""Presets by ratio, on a tiny model: bytes, files, and the caches that come out of them."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from calibrations import TEXT
from kinds import MODELS
from layer_shapes import model_of
from pictures import draw_nothing
from sampling import ALL, sampled
from script_runs import listing, run
from searches import search_of
from tiny import save_tiny

from gpt2.common import files, tensor_file
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.cache.size import cache_bytes, filled, held_bytes, plain_bytes
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.presets import create_cache_from_preset, load_preset
from gpt2.compression.settings import Setting
from gpt2.tuning import ratio_presets
from gpt2.tuning.codec_search import CodecSearch
from gpt2.tuning.search_space import Choice

SMALL = {"samples": 3, "seq_len": 100, "seed": 0, "sink_tokens": 4}
MEASURED = {"baseline_ppl": 1.0, "ppl": 1.0, "ppl_delta": 0.0}


@pytest.fixture(scope="module")
def calibration(llama):
    """With statistics: not a compact one."""
    return calibrate(llama, TEXT, rank=12, codec="framed", **SMALL)


def test_sinks_are_counted_and_a_ratio_out_of_reach_is_named(llama, calibration):
    few, many = (ratio_presets.make_ratio_preset(llama, calibration, 4.0, sink_tokens=n) for n in (0, 64))
    assert many.bits < few.bits - 0.4, "64 of 2048 tokens in 16 bits are half a bit of all"
    for ratio in (1.2, 60.0):
        with pytest.raises(PluginError, match=f"ratio {ratio:g} is out of range"):
            ratio_presets.make_ratio_preset(llama, calibration, ratio)


def test_the_calibration_is_compact_and_used_again(llama, calibration, tmp_path, capsys):
    path = save_calibration(calibration, tmp_path / "framed.pt")

    def made(**changes):
        return ratio_presets.compact_calibration(llama, TEXT, path, codec="framed", **SMALL | changes)

    first, file = made()
    assert "will be replaced" in capsys.readouterr().out
    assert first.statistics is None and load_calibration(path).statistics, "what is there stays until all is measured"
    again, waiting = made()
    assert f"using {waiting}" in capsys.readouterr().out and file == waiting
    assert all(map(torch.equal, again.multi_head["framed"].E, first.multi_head["framed"].E))
    ratio_presets.put_in_place(waiting, path)
    assert made()[1] == path and load_calibration(path).statistics is None
    capsys.readouterr()
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    _, file = ratio_presets.compact_calibration(llama, TEXT, link, codec="framed", **SMALL | {"seed": 1})
    assert "will be replaced" in capsys.readouterr().out and load_calibration(path).meta["seed"] == 0
    ratio_presets.put_in_place(file, link)
    assert link.is_symlink() and load_calibration(path).meta["seed"] == 1
    assert sorted(tmp_path.iterdir()) == [path, link]


def test_a_users_file_is_not_replaced_by_a_calibration(llama, tmp_path):
    """Such as a preset: what other scripts read is called --calibration."""
    (tmp_path / "preset.json").write_text("{}")
    tensor_file.write(tmp_path / "model.pt", {"weight": torch.zeros(2)})
    for path in (tmp_path / "preset.json", tmp_path / "model.pt"):
        before = path.read_bytes()
        with pytest.raises(PluginError, match="is no calibration and would be replaced"):
            ratio_presets.compact_calibration(llama, TEXT, path, codec="framed", **SMALL)
        assert path.read_bytes() == before


@pytest.fixture
def make_presets(tiny_flags, tmp_path):
    """Runs the script on the tiny Llama; returns its exit code and the files that it has added to `out`."""
    small = ["--samples", 2, "--seq-len", 100, "--eval-tokens", 256, "--eval-seq-len", 128]

    def call(*flags, output: str | None = "out") -> tuple[int, set[str]]:
        before = listing(tmp_path)
        code = run("make_presets", *tiny_flags, *small, *flags, *(["--output", output] if output else []))
        return code, {name.removeprefix("out/") for name in listing(tmp_path) - before}

    return call


def generates(model, cache) -> bool:
    """Whether a model writes four tokens with a cache, behind a prompt that fills a block of codes."""
    prompt = (torch.arange(140) % 20 + 2)[None]
    return model.generate(prompt, past_key_values=cache, max_new_tokens=4, pad_token_id=0).shape == (1, 144)


def test_the_script_makes_presets_that_work(make_presets, llama, model_folder, tmp_path, capsys, monkeypatch):
    slug = model_folder.name
    code, made = make_presets("--ratios", "2,6.4")
    assert code == 0 and made == {
        f"runs/ratio_presets_{slug}.json", f"plots/ratio_presets_{slug}.png", f"calibrations/kv_framed_{slug}.pt",
        f"presets/{slug}-kv-2x.json", f"presets/{slug}-kv-6.4x.json",
    }  # fmt: skip
    for row in json.loads((tmp_path / f"out/runs/ratio_presets_{slug}.json").read_text())["rows"]:
        preset = load_preset(tmp_path / f"out/presets/{slug}-{row['label']}.json")
        assert preset["compression_ratio"] == pytest.approx(row["compression_ratio_2048"], abs=1e-3)
        assert preset["ppl_delta"] == pytest.approx(row["ppl_delta"], abs=1e-6)
        assert "--codec framed" in preset["made_by"] and preset["bits"] == row["bits"]
        assert "--eval-tokens" in preset["made_by"] and "--chunk" not in preset["made_by"], "what isn't the default"
        assert generates(llama.model, create_cache_from_preset(preset))
    one, two = (create_cache_from_preset(preset).layers[0].stores["KV"].compressor for _ in range(2))
    assert one is two, "caches made one after another share the basis"
    with pytest.raises(BadArtefact, match="'meta.seed': the preset was measured with 5, found 0"):
        create_cache_from_preset(preset | {"calibrated_with": {"seed": 5}})
    assert preset["calibrated_with"]["dtype"] == "float32", "gradients in bfloat16 give another basis"

    draw_nothing(monkeypatch)
    # A tag measures only; another basis gives other names, without a note where it was asked for
    capsys.readouterr()
    monkeypatch.setattr(files, "RESULTS", tmp_path / "checkout")  # without --output
    code, made = make_presets("--ratios", "2", "--codec", "joint", "--tag", "b", "--whole-cache", 512, output=None)
    assert code == 0 and made == {
        f"checkout/runs/ratio_presets_joint_whole_{slug}_b.json",
        f"checkout/plots/ratio_presets_joint_whole_{slug}_b.png", f"checkout/calibrations/kv_joint_{slug}_b.pt",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "store-2x-whole: " in said and "of the whole cache at 512 tokens" in said and "note: " not in said
    kept = tmp_path / f"out/calibrations/kv_framed_{slug}.pt"
    before = kept.read_bytes()
    code, made = make_presets("--ratios", "60", "--seed", "3")  # found to be out of reach after calibrating
    assert code and made == {f"calibrations/.{kept.stem}.new.pt"} and kept.read_bytes() == before
    assert generates(llama.model, create_cache_from_preset(preset)), "presets that were made before still work"
    code, made = make_presets("--ratios", "4", "--seed", "3")
    assert code == 0 and made == {f"presets/{slug}-kv-4x.json"} and load_calibration(kept).meta["seed"] == 3
    assert not kept.with_name(f".{kept.stem}.new.pt").exists()
    capsys.readouterr()
    assert make_presets("--ratios", "0.5") == (2, set())
    assert "lies between 1 and 64" in capsys.readouterr().err


def test_layers_without_the_usual_basis_get_the_first_that_fits(make_presets, tmp_path, capsys, monkeypatch):
    """Of latent attention, K and V have two shapes: framed can't be made, and grouped is next."""
    draw_nothing(monkeypatch)
    model = model_of("deepseek_v3").model
    flags = ["--model", save_tiny(tmp_path / "latent", model=model), "--ratios", "4"]
    code, made = make_presets(*flags)
    assert code == 0 and made == {
        "runs/ratio_presets_grouped_latent.json", "plots/ratio_presets_grouped_latent.png",
        "presets/latent-fast-4x.json", "calibrations/kv_grouped_latent.pt",
    }  # fmt: skip
    note = "note: layer 0: codec framed needs K and V of one shape, got 1 x 16 and 1 x 8: use grouped; "
    assert f"{note}presets are called fast-*" in capsys.readouterr().out.splitlines()
    preset = load_preset(tmp_path / "out/presets/latent-fast-4x.json")
    assert (preset["codec"], preset["name"]) == ("grouped", "fast-4x") and "--codec grouped" in preset["made_by"]
    assert generates(model, create_cache_from_preset(preset))
    assert make_presets(*flags, "--codec", "framed")[0] == 2, "a basis that was asked for isn't exchanged"
    assert "codec framed needs K and V of one shape" in capsys.readouterr().err


@pytest.mark.parametrize("most", [16.0, 7.0])
def test_the_most_bits_that_reach_a_ratio(most):
    """Also where the codec takes no more than some."""

    def ratio_at(bits: float) -> float:
        if bits > most:
            raise PluginError("too many")
        return 40 / bits

    for wanted in (8.0, 4.0):
        found = ratio_presets.most_bits(ratio_at, 2.0, wanted)
        assert found == pytest.approx(min(40 / wanted, most), abs=ratio_presets.STEP) and ratio_at(found) >= wanted


PREFIXES = {"framed": "kv", "joint": "store", "grouped": "fast"}
KINDS = [("alike", "framed"), ("windowed", "joint"), ("hybrid", "grouped"), ("shapes", "grouped")]
if ALL:  # framed and joint need K and V of one shape
    KINDS = [(name, codec) for name in MODELS for codec in PREFIXES if name != "shapes" or codec == "grouped"]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def calibrated(request):
    """A model whose layers are alike or differ, and a compact calibration of it."""
    name, codec = request.param
    loaded = MODELS[name]()
    return loaded, calibrate(loaded, TEXT, rank=loaded.geometry.head_dim, codec=codec, compact=True, **SMALL)


def held_bits(geometry, make, tokens: int) -> list[float]:
    """Bits per coordinate of every layer with K and V, by the bytes that it holds and the numbers it stands for."""
    cache, bits = filled(make, geometry, tokens), []
    for index in geometry.attention:
        layer = geometry.layers[index]
        numbers = layer.held(tokens) * (layer.k.size + layer.v.size)
        bits.append(8 * cache_bytes(SimpleNamespace(layers=[cache.layers[index]])) / numbers)
    return bits


RATIOS = [(8.0, "mixed"), (2.0, "mixed"), (4.6, "mixed_fixed")]
CASES = [(kind, *ratio) for kind in KINDS for ratio in sampled(RATIOS, 2 if kind[0] == "alike" else 1)]


@pytest.mark.parametrize(("calibrated", "ratio", "quantizer"), CASES, indirect=["calibrated"], ids=str)
def test_a_preset_has_its_ratio_over_k_and_v_and_wastes_little(calibrated, ratio, quantizer):
    loaded, calibration = calibrated
    geometry, tokens = loaded.geometry, ratio_presets.TOKENS
    preset = ratio_presets.make_ratio_preset(loaded, calibration, ratio, quantizer=quantizer)
    assert preset.name == f"{PREFIXES[preset.codec]}-{ratio:g}x"
    held, states = held_bytes(preset.make, geometry, tokens), geometry.uncompressed_bytes(tokens)
    assert preset.attention_ratio == pytest.approx(geometry.attention_bytes(tokens) / (held - states))
    assert preset.compression_ratio == pytest.approx(plain_bytes(geometry, tokens) / held)
    # States that no preset makes smaller count for the whole cache only
    assert (preset.compression_ratio < preset.attention_ratio) == bool(states)
    full, windowed = geometry.without_windows(), any(layer.window for layer in geometry.layers)
    each = held_bits(full, partial(preset.make, geometry=full), tokens)
    numbers = [full.layers[i].held(tokens) * full.layers[i].bytes_per_token() for i in full.attention]
    by_layer = 16 * sum(numbers) / sum(n * b for n, b in zip(numbers, each, strict=True))
    assert ratio - 1e-9 <= by_layer < 1.05 * ratio and (abs(preset.attention_ratio - by_layer) > 1e-6) == windowed
    assert 0.95 * 16 / ratio - 0.1 < preset.bits < 16 / ratio
    assert all(bits < 15.5 for bits in each), "every layer that keeps K and V is compressed"
    cache = preset.make()
    assert [index for index, layer in enumerate(cache.layers) if layer in cache.compressed] == geometry.attention


def test_a_ratio_of_the_whole_cache(calibrated):
    """With windows and states as they are at a context length; out of reach, the highest is named and is in reach."""
    loaded, calibration = calibrated
    geometry, tokens = loaded.geometry, 512

    def made(ratio: float):
        return ratio_presets.make_ratio_preset(loaded, calibration, ratio, whole_at=tokens)

    with pytest.raises(PluginError, match=f"ratio 60 of the whole cache at {tokens} tokens is out of range") as error:
        made(60.0)
    highest = float(re.search(r"reaches ([\d.]+) at most", str(error.value))[1])
    states = geometry.uncompressed_bytes(tokens)
    assert 1 < highest < (plain_bytes(geometry, tokens) / states if states else 60)
    ratio = min(highest, 3.0)
    preset = made(ratio)
    held = held_bytes(preset.make, geometry, tokens)
    assert preset.reached == pytest.approx(plain_bytes(geometry, tokens) / held)
    assert ratio - 1e-9 <= preset.reached < 1.1 * ratio
    record = preset.preset(loaded, calibration, "c.pt", measured=MEASURED)
    assert record["whole_cache"] == {"ratio": pytest.approx(preset.reached, abs=1e-4), "context_length": tokens}
    assert str(preset).startswith(f"{preset.name}: {preset.bits:g} bits per coordinate")


def test_a_preset_says_both_ratios_where_layers_differ_and_makes_the_caches_that_were_measured(calibrated, tmp_path):
    loaded, calibration = calibrated
    alike, windowed = loaded.geometry.alike, any(layer.window for layer in loaded.geometry.layers)
    path = save_calibration(calibration, tmp_path / "c.pt")
    made = ratio_presets.make_ratio_preset(loaded, calibration, 4.0)
    record = made.preset(loaded, calibration, str(path), measured=MEASURED)
    assert record.get("context_length") is None, "bits don't depend on one"
    assert record["compression_ratio"] == pytest.approx(made.compression_ratio, abs=1e-4)
    assert record.get("attention_ratio") == (None if alike else pytest.approx(made.attention_ratio))
    assert made.attention_ratio > 2 and (made.attention_ratio == made.compression_ratio or not alike)
    (tmp_path / "p.json").write_text(json.dumps(record))
    preset = load_preset(tmp_path / "p.json")
    assert preset.get("attention_ratio") == record.get("attention_ratio")

    def make(**changes):
        return create_cache_from_preset(preset | changes, model=loaded)

    def bits(cache) -> list[float]:
        return [store.compressor.quantizer.bits for layer in cache.compressed for store in layer.stores.values()]

    assert bits(make()) == bits(made.make()), "shared out as when it was measured"
    assert held_bits(loaded.geometry, make, 2048) == held_bits(loaded.geometry, made.make, 2048)
    if windowed:  # bits are shared out for a context length where a preset says one, as the tuner has done it
        setting = Setting(preset["codec"], preset["rank"], preset["bits"], "mixed")
        search = search_of(loaded, CodecSearch, calibration=calibration, context_length=1024)
        tuned = search.factory(Choice(f"{preset['codec']}+mixed", setting, "kv", 4))()
        assert bits(tuned) == bits(make(context_length=1024)) != bits(make())
    assert generates(loaded.model, make())
