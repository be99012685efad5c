"""Presets by ratio, on a tiny model: bytes, files, and the caches that come out of them."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calibrations import TEXT
from layer_shapes import model_of
from sampling import ALL, sampled
from script_runs import listing, run
from tiny import save_tiny, tiny_loaded, tiny_model, word_tokenizer

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.cache.size import attention_ratio, cache_bytes, filled, held_bytes, plain_bytes
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.presets import create_cache_from_preset, load_preset
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.loading import wrap
from gpt2.tuning import ratio_presets

SMALL = {"samples": 3, "seq_len": 100, "seed": 0, "sink_tokens": 4}
TINY_RUN = ["--samples", 2, "--seq-len", 100, "--eval-tokens", 256, "--eval-seq-len", 128, "--ratios", "4",
            "--output", "out"]  # fmt: skip


@pytest.fixture(scope="module")
def calibration(llama):
    return calibrate(llama, TEXT, rank=12, codec="framed", **SMALL)


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
    path = save_calibration(calibration, tmp_path / "framed.pt")  # with statistics: not a compact one
    made = ratio_presets.compact_calibration(llama, TEXT, path, codec="framed", **SMALL)
    assert "will be replaced" in capsys.readouterr().out
    assert made.statistics is None and load_calibration(path).statistics is None
    again = ratio_presets.compact_calibration(llama, TEXT, path, codec="framed", **SMALL)
    assert "using" in capsys.readouterr().out
    assert all(map(torch.equal, again.multi_head["framed"].E, made.multi_head["framed"].E))
    ratio_presets.compact_calibration(llama, TEXT, path, codec="framed", **SMALL | {"seed": 1})
    assert "will be replaced" in capsys.readouterr().out and load_calibration(path).meta["seed"] == 1


def test_the_script_makes_presets_that_work(tiny_flags, tmp_path, capsys):
    slug, model = Path(tiny_flags[1]).name, tiny_model("llama")
    flags = [*tiny_flags, "--samples", 3, "--seq-len", 100, "--eval-tokens", 256, "--eval-seq-len", 128]
    flags += ["--ratios", "2,6.4", "--output", "out"]
    before = listing(tmp_path)
    assert run("make_presets", *flags) == 0
    names = {f"runs/ratio_presets_{slug}.json", f"plots/ratio_presets_{slug}.png", f"calibrations/kv_framed_{slug}.pt"}
    names |= {f"presets/{slug}-kv-2x.json", f"presets/{slug}-kv-6.4x.json"}
    assert listing(tmp_path) - before == {f"out/{name}" for name in names}
    for row in json.loads((tmp_path / f"out/runs/ratio_presets_{slug}.json").read_text())["rows"]:
        preset = load_preset(tmp_path / f"out/presets/{slug}-{row['label']}.json")
        assert preset["compression_ratio"] == pytest.approx(row["compression_ratio_2048"], abs=1e-3)
        assert preset["ppl_delta"] == pytest.approx(row["ppl_delta"], abs=1e-6)
        assert "--codec framed" in preset["made_by"] and preset["bits"] == row["bits"]
        prompt = (torch.arange(100) % 20 + 2)[None]
        out = model.generate(prompt, past_key_values=create_cache_from_preset(preset), max_new_tokens=4)
        assert out.shape == (1, 104)
    one, two = (create_cache_from_preset(preset).layers[0].stores["KV"].compressor for _ in range(2))
    assert one is two, "caches made one after another share the basis"
    with pytest.raises(BadArtefact, match="'meta.seed': the preset was measured with 5, found 0"):
        create_cache_from_preset(preset | {"calibrated_with": {"seed": 5}})
    before = listing(tmp_path)
    capsys.readouterr()
    assert run("make_presets", *flags, "--tag", "b", "--whole-cache", 512) == 0
    assert "bits per coordinate, 2.0" in (out := capsys.readouterr().out) and "the whole cache at 512 tokens" in out
    names = {f"runs/ratio_presets_whole_{slug}_b.json", f"plots/ratio_presets_whole_{slug}_b.png"}
    names |= {f"calibrations/kv_framed_{slug}_b.pt"}
    assert listing(tmp_path) - before == {f"out/{name}" for name in names}, "a tag measures only"
    assert run("make_presets", *flags, "--ratios", "0.5") == 2
    assert "lies between 1 and 64" in capsys.readouterr().err


@pytest.mark.parametrize(("codec", "prefix"), [("joint", "store"), ("grouped", "fast")])
def test_another_basis_gives_other_names(tiny_flags, codec, prefix, tmp_path, capsys):
    """Of presets, of the calibration and of the results; a basis that was asked for comes without a note."""
    slug = Path(tiny_flags[1]).name
    before = listing(tmp_path)
    assert run("make_presets", *tiny_flags, *TINY_RUN, "--codec", codec) == 0
    names = {f"runs/ratio_presets_{codec}_{slug}.json", f"plots/ratio_presets_{codec}_{slug}.png"}
    names |= {f"presets/{slug}-{prefix}-4x.json", f"calibrations/kv_{codec}_{slug}.pt"}
    assert listing(tmp_path) - before == {f"out/{name}" for name in names}
    assert load_preset(tmp_path / f"out/presets/{slug}-{prefix}-4x.json")["codec"] == codec
    assert "note: " not in capsys.readouterr().out


def test_layers_without_the_usual_basis_get_the_first_that_fits(tiny_flags, tmp_path, capsys):
    """Of latent attention, K and V have two shapes: framed can't be made, and grouped is next."""
    save_tiny(tmp_path / "latent", model=model_of("deepseek_v3").model)
    flags = ["--model", tmp_path / "latent", *tiny_flags[2:], *TINY_RUN]
    before = listing(tmp_path)
    assert run("make_presets", *flags) == 0
    note = "note: layer 0: codec framed needs K and V of one shape, got 1 x 16 and 1 x 8: use grouped; "
    note += "presets are called fast-*"
    assert note in capsys.readouterr().out.splitlines()
    names = {"runs/ratio_presets_grouped_latent.json", "plots/ratio_presets_grouped_latent.png"}
    names |= {"presets/latent-fast-4x.json", "calibrations/kv_grouped_latent.pt"}
    assert listing(tmp_path) - before == {f"out/{name}" for name in names}
    preset = load_preset(tmp_path / "out/presets/latent-fast-4x.json")
    assert (preset["codec"], preset["name"]) == ("grouped", "fast-4x") and "--codec grouped" in preset["made_by"]
    loaded, prompt = model_of("deepseek_v3"), (torch.arange(140) % 20 + 2)[None]
    cache = create_cache_from_preset(preset)
    assert loaded.model.generate(prompt, past_key_values=cache, max_new_tokens=4).shape == (1, 144)
    assert run("make_presets", *flags, "--codec", "framed") == 2, "a basis that was asked for isn't exchanged"
    assert "codec framed needs K and V of one shape" in capsys.readouterr().err


WINDOW = {"sliding_window": 130, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
# Bases: framed and joint need K and V of one shape
PREFIXES = {"framed": "kv", "joint": "store", "grouped": "fast"}
MIXED = {
    "windowed": (lambda: tiny_loaded("gemma3_text", **WINDOW), tuple(PREFIXES)),
    "hybrid": (lambda: wrap(tiny_family("qwen3_next"), word_tokenizer(), "tiny-hybrid"), tuple(PREFIXES)),
    "shapes": (lambda: wrap(tiny_family("mimo_v2_flash"), word_tokenizer(), "tiny-shapes"), ("grouped",)),
}


KINDS = [("windowed", "framed"), ("windowed", "joint"), ("hybrid", "grouped"), ("shapes", "grouped")]
if ALL:
    KINDS = [(name, codec) for name, (_, codecs) in MIXED.items() for codec in codecs]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def mixed(request):
    """A model whose layers differ, and a compact calibration of it."""
    name, codec = request.param
    loaded = MIXED[name][0]()
    return loaded, calibrate(loaded, TEXT, rank=loaded.geometry.head_dim, codec=codec, compact=True, **SMALL)


def held_bits(geometry, make, tokens: int) -> list[float]:
    """Bits per coordinate of every layer with K and V, by the bytes that it holds and the numbers it stands for."""
    cache, bits = filled(make, geometry, tokens), []
    for index in geometry.attention:
        layer = geometry.layers[index]
        numbers = layer.held(tokens) * (layer.k.size + layer.v.size)
        bits.append(8 * cache_bytes(SimpleNamespace(layers=[cache.layers[index]])) / numbers)
    return bits


@pytest.mark.parametrize(
    ("ratio", "quantizer"), sampled([(2.0, "mixed"), (4.0, "mixed"), (4.0, "mixed_fixed"), (8.0, "mixed")], 1)
)
def test_layers_that_differ_have_the_ratio_over_k_and_v(mixed, ratio, quantizer):
    loaded, calibration = mixed
    geometry, tokens = loaded.geometry, ratio_presets.TOKENS
    preset = ratio_presets.make_ratio_preset(loaded, calibration, ratio, quantizer=quantizer)
    assert preset.name == f"{PREFIXES[preset.codec]}-{ratio:g}x"
    held, states = held_bytes(preset.make, geometry, tokens), geometry.uncompressed_bytes(tokens)
    assert preset.attention_ratio == pytest.approx(geometry.attention_bytes(tokens) / (held - states))
    assert preset.compression_ratio == pytest.approx(plain_bytes(geometry, tokens) / held)
    full, windowed = geometry.without_windows(), any(layer.window for layer in geometry.layers)
    by_layer = attention_ratio(partial(preset.make, geometry=full), full, tokens)
    assert ratio <= by_layer < 1.05 * ratio and (preset.attention_ratio != by_layer) == windowed
    # States that no preset makes smaller count for the whole cache only
    assert (preset.compression_ratio < preset.attention_ratio) == bool(states)
    each = held_bits(full, partial(preset.make, geometry=full), tokens)
    numbers = [full.layers[i].held(tokens) * full.layers[i].bytes_per_token() for i in full.attention]
    average = sum(n * b for n, b in zip(numbers, each, strict=True)) / sum(numbers)
    assert 0.95 * 16 / ratio < average <= 16 / ratio + 1e-6
    assert 0.95 * 16 / ratio - 0.1 < preset.bits < 16 / ratio
    assert all(bits < 15.5 for bits in each), "every layer that keeps K and V is compressed"
    cache = preset.make()
    assert [index for index, layer in enumerate(cache.layers) if layer in cache.compressed] == geometry.attention


MEASURED = {"baseline_ppl": 1.0, "ppl": 1.0, "ppl_delta": 0.0}


def test_a_ratio_of_the_whole_cache(mixed, tmp_path):
    """With windows and states as they are at a context length; out of reach, the highest is named and is in reach."""
    loaded, calibration = mixed
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
    assert preset.reached == pytest.approx(plain_bytes(geometry, tokens) / held) and preset.reached >= ratio - 1e-9
    assert preset.reached < 1.1 * ratio and preset.name.endswith("-whole")
    path = save_calibration(calibration, tmp_path / "c.pt")
    record = preset.preset(loaded, calibration, str(path), measured=MEASURED)
    assert record["whole_cache"] == {"ratio": pytest.approx(preset.reached, abs=1e-4), "context_length": tokens}
    assert str(preset).startswith(f"{preset.name}: {preset.bits:g} bits per coordinate")


def test_a_preset_of_layers_that_differ_says_both_ratios(mixed, tmp_path):
    loaded, calibration = mixed
    path = save_calibration(calibration, tmp_path / "c.pt")
    made = ratio_presets.make_ratio_preset(loaded, calibration, 4.0)
    record = made.preset(loaded, calibration, str(path), measured=MEASURED)
    assert record.get("context_length") is None, "bits don't depend on one"
    assert record["attention_ratio"] == pytest.approx(made.attention_ratio) and record["attention_ratio"] > 2
    assert record["compression_ratio"] == pytest.approx(made.compression_ratio, abs=1e-4)
    (tmp_path / "p.json").write_text(json.dumps(record))
    preset = load_preset(tmp_path / "p.json")
    assert preset["attention_ratio"] == record["attention_ratio"]

    def make(**changes):
        return create_cache_from_preset(preset | changes, model=loaded)

    def bits(cache) -> list[float]:
        return [store.compressor.quantizer.bits for layer in cache.compressed for store in layer.stores.values()]

    assert bits(make()) == bits(made.make()), "shared out as when it was measured"
    assert held_bits(loaded.geometry, make, 2048) == held_bits(loaded.geometry, made.make, 2048)
    windowed = any(layer.window for layer in loaded.geometry.layers)
    assert (bits(make(context_length=2048)) != bits(make())) == windowed, "as the tuner shares them out"
    prompt = (torch.arange(140) % 20 + 2)[None]
    assert loaded.model.generate(prompt, past_key_values=make(), max_new_tokens=4, pad_token_id=0).shape == (1, 144)


def test_where_all_layers_are_alike_a_preset_says_one_ratio(llama, calibration):
    made = ratio_presets.make_ratio_preset(llama, calibration, 4.0)
    record = made.preset(llama, calibration, "c.pt", measured=MEASURED)
    assert made.attention_ratio == made.compression_ratio
    assert record.get("attention_ratio") is record.get("context_length") is None
