"""Codecs without calibration, and the presets that any model has because of them."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import FAMILIES, tiny_loaded, tiny_model, windows, word_tokenizer

from gpt2.common import files
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.cache.size import cache_bytes, compression_ratio
from gpt2.compression.codecs import QUANTIZERS, Compressor, basis_of, full_rank, needs_calibration
from gpt2.compression.codecs.hadamard import Hadamard
from gpt2.compression.codecs.per_channel import Int4Channel
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.named_caches import from_preset
from gpt2.compression.presets import (
    create_cache_from_preset,
    get_preset_info,
    load_preset,
    preset_files,
    resolve_preset,
)
from gpt2.compression.presets.any_model import ANY_MODEL
from gpt2.compression.presets.build import preset_for_shape
from gpt2.compression.presets.schema import parse
from gpt2.models import geometry, loading
from gpt2.models.geometry import Geometry

CHANNEL = {"int8_channel": 8, "int4_channel": 4}
PROMPT = torch.arange(2, 32)[None]


def round_trip(quantizer: str, x: torch.Tensor, codec: str = "identity") -> torch.Tensor:
    basis = basis_of(codec)
    c = Compressor(QUANTIZERS[quantizer], basis and basis.transform(x.shape[-1]).to("cpu", torch.float32))
    return c.reconstruct(c.compress(x), x.shape[-1], x.dtype)


# --- the rotation


@pytest.mark.parametrize("d", [1, 2, 7, 12, 16, 20, 32, 40, 48, 64, 80, 96, 112, 120, 128, 160, 192, 256])
def test_the_rotation_is_orthonormal_and_takes_no_mean_off(d):
    transform = Hadamard().transform(d)
    assert transform.E.shape == transform.D.shape == (1, d, d) and full_rank("hadamard", d) == d
    assert torch.allclose(transform.E[0].T @ transform.E[0], torch.eye(d, dtype=torch.float64), atol=1e-12)
    assert torch.equal(transform.D[0], transform.E[0].T) and not transform.mean.any()
    assert not needs_calibration("hadamard")


@pytest.mark.parametrize(("d", "power"), [(64, 64), (128, 128), (80, 16), (96, 32), (12, 4), (45, 1)])
def test_a_channel_is_spread_over_all_its_power_of_two(d, power):
    """Evenly over the Hadamard factor; over the rest, as a cosine basis spreads."""
    energy = Hadamard().transform(d).E[0].square().view(power, d // power, power, d // power).sum((1, 3)) * power
    assert torch.allclose(energy / (d // power), torch.ones(power, power, dtype=torch.float64))


def test_it_takes_the_edge_off_one_large_channel():
    """Coded by token, a channel of a hundred times the rest sets their step; rotated it is shared by all."""
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 100
    lost = {codec: (round_trip("int4", x, codec) - x).square().mean().item() for codec in ("identity", "hadamard")}
    assert lost["hadamard"] < 0.6 * lost["identity"]


# --- by channel


@pytest.mark.parametrize("quantizer", CHANNEL)
@pytest.mark.parametrize("r", [1, 7, 12, 64])
def test_a_code_is_off_by_half_a_step_of_its_own_channel(quantizer, r):
    """The others' ranges, of a thousandth to a thousand times its own, don't matter; nor does where it lies."""
    torch.manual_seed(r)
    spread = torch.logspace(-3, 3, r)
    x = (torch.rand(2, 3, 128, r) + torch.randint(-30, 30, (3, 1, r))) * spread
    error = ((round_trip(quantizer, x) - x) / spread).abs()
    levels = 2 ** CHANNEL[quantizer] - 1
    # A scale is rounded by up to 2^(1/16), and wider by as much where it must reach the extremes
    assert error.max() < (0.6 if quantizer == "int8_channel" else 2.5) / levels + 30 * 2**-11
    assert error.square().mean().sqrt() < 0.36 / levels + 0.01, "a step over √12, and what float16 does to offsets"


@pytest.mark.parametrize("quantizer", CHANNEL)
def test_blocks_stand_for_themselves(quantizer):
    x = torch.randn(1, 2, 192, 5)
    far = x.clone()
    far[:, :, 64:128] *= 1000
    there, here = round_trip(quantizer, far), round_trip(quantizer, x)
    assert torch.equal(there[:, :, :64], here[:, :, :64]) and torch.equal(there[:, :, 128:], here[:, :, 128:])


@pytest.mark.parametrize("quantizer", CHANNEL)
@pytest.mark.parametrize("value", [0.0, 3.25, -1000.0, 1e-9, 60000.0])
def test_a_constant_channel_comes_back(quantizer, value):
    x = torch.full((1, 1, 64, 3), value)
    assert torch.allclose(round_trip(quantizer, x), x, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("quantizer", CHANNEL)
def test_the_largest_numbers_stay_finite(quantizer):
    x = torch.randn(1, 1, 64, 4).to(torch.bfloat16)
    x[0, 0, 3, 1], x[0, 0, 4, 2] = torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min
    back = round_trip(quantizer, x)
    assert torch.isfinite(back).all()
    assert (back - x)[..., [0, 3]].abs().max() < 1, "and the other channels don't notice"


def test_cutting_extremes_off_pays_at_four_bits():
    """Heavy tails on both sides: reaching them would cost the many near the middle their resolution."""

    class Whole(Int4Channel):
        shares = (1.0,)

    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, 4, 640, 16))
    lost = [(q.dequantize(q.quantize(x), 16) - x).square().mean().item() for q in (Int4Channel(), Whole())]
    assert lost[0] < 0.98 * lost[1]


@pytest.mark.parametrize(("quantizer", "codes"), [("int8_channel", 64 * 7), ("int4_channel", 32 * 7)])
def test_bytes_by_hand(quantizer, codes):
    """Codes, a byte of scale and two of offset per channel and block; an odd number of channels wastes nothing."""
    fields = QUANTIZERS[quantizer].quantize(torch.randn(2, 3, 128, 7))
    assert sum(field.nbytes for field in fields.values()) == 2 * 3 * 2 * (codes + 7 + 2 * 7)


def test_nibbles_hold_the_early_tokens_low():
    x = torch.arange(64.0).view(1, 1, 64, 1) / 64 * 15
    fields = QUANTIZERS["int4_channel"].quantize(x)
    codes = torch.cat((fields["codes"] & 15, fields["codes"] >> 4), dim=3).flatten()
    assert codes.shape == (64,) and (codes.int().diff() >= 0).all() and codes[0] == 0 and codes[-1] == 15


@pytest.mark.parametrize(("tokens", "blocks", "exact"), [(3, 0, 3), (63, 0, 63), (64, 1, 4), (65, 1, 5), (192, 3, 4)])
def test_a_cache_holds_blocks_at_multiples_of_64_and_the_rest_exact(tokens, blocks, exact):
    """Sinks that don't fill a block leave the first one with a lead: 64 tokens are 4 sinks and one block."""
    d, heads = 12, 2
    c = Compressor(QUANTIZERS["int4_channel"])
    cache = CompressedDynamicCache([c], [c])
    x = torch.randn(1, heads, tokens, d, generator=torch.Generator().manual_seed(0))
    k, _ = cache.update(x, x, 0)
    held = blocks * (32 * d + d + 2 * d) + exact * d * 4
    assert cache_bytes(cache) == 2 * heads * held, "K and V"
    tail = tokens - exact + 4
    assert torch.equal(k[:, :, :4], x[:, :, :4]) and torch.equal(k[:, :, tail:], x[:, :, tail:])
    assert torch.equal(k, x) == (blocks == 0)


# --- presets of any model


@pytest.fixture
def space(tmp_path, monkeypatch):
    """An empty working folder, and no built-in presets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preset_files, "BUILT_IN", (tmp_path / "presets",))
    return tmp_path


def folder_of(space, family: str = "llama", **overrides) -> str:
    """A tiny model's config alone, without weights or tokenizer."""
    tiny_model(family, **overrides).config.save_pretrained(space / "config-only")
    return str(space / "config-only")


@pytest.mark.parametrize("name", ANY_MODEL)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_a_config_is_enough(space, family, name):
    folder = folder_of(space, family)
    preset = get_preset_info(folder, name)
    model = tiny_model(family)
    shape = geometry.probe_geometry(model, family)
    assert (preset["num_layers"], preset["head_dim"]) == (shape.num_layers, shape.head_dim)
    assert preset["model"] == folder and preset["name"] == name and preset["target"] == "kv"
    out = model.generate(PROMPT.repeat(1, 4), past_key_values=create_cache_from_preset(preset), max_new_tokens=4)
    assert out.shape == (1, 124)


def test_its_figures_are_null_but_for_the_ratio_which_is_exact(space):
    folder = folder_of(space)
    for name, least in (("kv8", 1.5), ("kv4", 2.5)):
        preset = get_preset_info(folder, name)
        assert [preset.get(key) for key in ("baseline_ppl", "compressed_ppl", "ppl_delta")] == [None] * 3
        measured = compression_ratio(lambda p=preset: create_cache_from_preset(p), Geometry(3, 2, 12))
        assert preset["compression_ratio"] == pytest.approx(measured, abs=1e-4) and measured > least


def test_the_ratio_counts_that_transformers_forgets_behind_a_window(space):
    folder = folder_of(space, "mistral")
    assert get_preset_info(folder, "kv4")["compression_ratio"] < 0.2, "a window of 8 tokens"


@pytest.mark.parametrize(("d", "least"), [(64, 3.6), (80, 3.6), (96, 3.6), (128, 3.6)])
def test_ratios_at_usual_head_dims(space, d, least):
    folder = folder_of(space, hidden_size=4 * d, head_dim=d)
    kv8, kv4 = (get_preset_info(folder, name)["compression_ratio"] for name in ("kv8", "kv4"))
    assert 1.85 < kv8 < 2 and kv4 >= least


@pytest.mark.parametrize("name", ANY_MODEL)
def test_a_hub_model_that_is_not_here_is_said_as_loading_says_it(space, monkeypatch, name):
    with pytest.raises(PluginError) as at_loading:
        loading.load("no-such-org/no-such-model", "cpu")
    with pytest.raises(PluginError) as asking:
        get_preset_info("no-such-org/no-such-model", name)
    assert str(asking.value) == str(at_loading.value) and "\n" not in str(asking.value)
    assert str(asking.value).startswith("can't load model 'no-such-org/no-such-model'")


def test_an_unsupported_model_is_refused_by_its_config(space):
    from transformers import AutoConfig

    AutoConfig.for_model("t5").save_pretrained(space / "t5")
    with pytest.raises(PluginError, match="encoder-decoder"):
        get_preset_info(str(space / "t5"), "kv4")


def test_a_models_own_preset_of_that_name_wins(space):
    folder, loaded = folder_of(space), tiny_loaded("llama")
    own = get_preset_info(folder, "kv4") | {"model": loaded.spec, "ppl_delta": 0.0123}
    files.write_json(space / "presets" / "own.json", own)
    for found in (get_preset_info(loaded.spec, "kv4"), resolve_preset("kv4", loaded).record):
        assert found["ppl_delta"] == 0.0123
    assert resolve_preset("kv8", loaded).record["name"] == "kv8", "the other is still made"
    assert resolve_preset("kv4", tiny_loaded("qwen2")).record.get("ppl_delta") is None, "it is no other model's"


def test_other_names_still_list_what_there_is(space):
    with pytest.raises(PluginError, match=r"no built-in presets for model 'any'.*only those of any: kv8, kv4"):
        get_preset_info("any", "kv5")
    own = get_preset_info(folder_of(space), "kv8") | {"model": "a", "name": "x"}
    files.write_json(space / "presets" / "a.json", own)
    with pytest.raises(PluginError, match=r"no preset 'kv5' for a, did you mean 'kv[48]'\? \(there are: x, kv8, kv4\)"):
        get_preset_info("a", "kv5")


@pytest.mark.parametrize("name", ANY_MODEL)
def test_a_loaded_model_needs_no_config_file(space, name):
    loaded = tiny_loaded("gpt2")
    choice = from_preset(name, loaded)
    assert choice.label == name and json.loads(json.dumps(choice.record()))["model"] == loaded.spec
    assert len(choice.make().layers) == 3


@pytest.mark.parametrize("name", ANY_MODEL)
def test_on_a_shape_without_weights(space, name):
    loaded = tiny_loaded("llama", num_hidden_layers=2)
    loaded.random_weights = True
    choice = from_preset(name, loaded)
    assert choice.label == name and "compression_ratio" not in choice.record()
    out = loaded.model.generate(PROMPT, past_key_values=choice.make(), max_new_tokens=3)
    assert out.shape == (1, 33)


def test_one_setting_per_side_goes_to_any_number_of_layers(space):
    preset = parse(get_preset_info(folder_of(space), "kv4"))
    other = tiny_loaded("llama", num_hidden_layers=5, hidden_size=80)
    moved = preset_for_shape(preset, other).plan
    assert {s.rank for side in moved.values() for s in side} == {20}
    assert {side: len(settings) for side, settings in moved.items()} == {"k": 5, "v": 5}


@pytest.mark.parametrize("name", ANY_MODEL)
def test_saved_and_loaded_again(space, name):
    preset = get_preset_info(folder_of(space), name)
    back = load_preset(files.write_json(space / "mine.json", preset))
    assert back.items() >= preset.items() and parse(back).plan == parse(preset).plan
    create_cache_from_preset(space / "mine.json")


def test_a_setting_for_all_layers_is_what_a_list_of_it_is(space):
    preset = get_preset_info(folder_of(space), "kv8")
    listed = preset | {"layers": {side: [setting] * 3 for side, setting in preset["layers"].items()}}
    assert parse(listed).plan == parse(preset).plan
    alone = parse(preset | {"layers": {"k": preset["layers"]["k"]}}).plan
    assert alone["v"] == [None] * 3 and alone["k"] == parse(preset).plan["k"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [({}, r"layers\.k: expected null or codec, rank and bits"), ("int4", r"layers\.k': expected a list of 3"),
     ({"codec": "hadamar", "rank": 12, "bits": 4}, r"layers\.k: key 'codec'.*did you mean 'hadamard'"),
     ({"codec": "hadamard", "rank": 13, "bits": 4}, r"layers\.k: key 'rank': expected 1 to head_dim 12"),
     ({"codec": "hadamard", "rank": 12, "bits": 8, "quantizer": "int4_channel"}, r"layers\.k: keys 'quantizer'"),
     ({"codec": "hadamard", "rank": 12, "bits": 4, "quantizer": "int4_chanel"}, "did you mean 'int4_channel'")],
)  # fmt: skip
def test_bad_settings_for_all_layers_are_named(space, setting, message):
    preset = get_preset_info(folder_of(space), "kv4")
    with pytest.raises(BadArtefact, match=message):
        parse(preset | {"layers": {"k": setting}})


@pytest.mark.parametrize("name", ANY_MODEL)
@pytest.mark.parametrize(("family", "head_dim"), [("qwen3", 15 * 2), ("gemma3_text", 22), ("llama", 6)])
@pytest.mark.parametrize("prompt", [3, 50, 130])
def test_batches_odd_head_dims_and_prompts_shorter_than_a_block(space, name, family, head_dim, prompt):
    model = tiny_model(family, head_dim=head_dim)
    tokens = windows(3, prompt)
    cache = create_cache_from_preset(get_preset_info(folder_of(space, family, head_dim=head_dim), name))
    kept = {"max_new_tokens": 80, "do_sample": False}
    out = model.generate(tokens, past_key_values=cache, **kept)
    assert out.shape == (3, prompt + 80) and cache.get_seq_length() == prompt + 79
    plain = model.generate(tokens, **kept)
    # By channel nothing is compressed before a block is full; values by token are, behind the sinks
    agreed = 63 if name == "kv4" else prompt
    assert torch.equal(out[:, :agreed], plain[:, :agreed])


@torch.no_grad()
def test_more_bits_are_closer_to_the_model(space):
    loaded = tiny_loaded("llama")
    tokens = windows(2, 256)
    plain = loaded.model(tokens).logits

    def off(name: str) -> float:
        cache = from_preset(name, loaded).make()
        loaded.model(tokens[:, :192], past_key_values=cache)
        return (loaded.model(tokens[:, 192:], past_key_values=cache).logits - plain[:, 192:]).abs().mean().item()

    kv8, kv4 = off("kv8"), off("kv4")
    assert 0 < kv8 < 0.2 * kv4


def test_a_script_takes_it_for_any_model(space):
    tiny_model("llama").save_pretrained(space / "m")
    word_tokenizer().save_pretrained(space / "m")
    script = files.ROOT / "scripts" / "generate_with_preset.py"
    command = [sys.executable, str(script), "--model", str(space / "m"), "--preset", "kv4", "--prompt", "w3 w4 w5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=space, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "smaller than the float32 cache" in done.stdout
