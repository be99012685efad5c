"""Presets: the guide's keys, every slip named, the calibration found or its absence explained."""

import json
import os

import pytest
import torch
from tiny import tiny_loaded, word_text

from gpt2.common import files
from gpt2.common.errors import BadArtefact, CalibrationNotFound, PluginError
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.presets import (
    build,
    calibration_lookup,
    create_cache_from_preset,
    get_preset_info,
    load_preset,
    preset_files,
    schema,
)
from gpt2.compression.presets.schema import GUIDE_KEYS
from gpt2.text.sources import by_position

# The guide's eleven keys and nothing else, as older files have them
PRESET = {
    "model": "tiny-llama", "rank": 9, "target": "v", "bits": 8, "compression_ratio": 1.5, "baseline_ppl": 20.0,
    "compressed_ppl": 21, "ppl_delta": 0.05, "calibration_file": "c.pt", "head_dim": 12, "num_layers": 3,
}  # fmt: skip
PROMPT = torch.arange(2, 32)[None]


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def made(llama):
    text = by_position("words", "words.txt", word_text(3000))
    return calibrate(llama, text, rank=6, samples=2, seq_len=48)


@pytest.fixture
def space(tmp_path, monkeypatch):
    """An empty working folder `work` beside an empty checkout; nothing of this machine's own results."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(files, "RESULTS", tmp_path / "checkout" / "results")
    monkeypatch.setattr(preset_files, "BUILT_IN", (tmp_path / "checkout" / "presets",))
    return tmp_path


@pytest.fixture
def preset(space, made):
    """A preset whose calibration is given by its full path."""
    return PRESET | {"calibration_file": str(save_calibration(made, space / "elsewhere" / "c.pt"))}


def write(path, preset) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(preset if isinstance(preset, str) else json.dumps(preset))
    return str(path)


def codecs(cache) -> dict[str, list[str]]:
    """What compresses K and V in each layer."""
    return {side: [repr(layer.stores[side].compressor) for layer in cache.layers] for side in ("K", "V")}


# --- making a cache


def test_the_guides_keys_are_exactly_these():
    assert tuple(GUIDE_KEYS) == tuple(PRESET)


@pytest.mark.parametrize("as_path", [str, lambda p: p])
def test_from_a_dict_and_from_a_path(space, preset, as_path):
    path = space / "p.json"
    write(path, preset)
    expected = {"K": ["IdentityCompressor(none)"] * 3, "V": ["Compressor(int8, rank=9)"] * 3}
    assert codecs(create_cache_from_preset(preset)) == expected, "rank from the preset, not the calibration's default"
    assert codecs(create_cache_from_preset(as_path(path))) == expected


def test_older_presets_get_the_defaults(preset):
    assert preset.keys() == GUIDE_KEYS.keys()
    store = create_cache_from_preset(preset).layers[0].stores["V"]
    assert (store.sink_tokens, store.recent_tokens) == (4, 0)
    assert schema.parse(preset).record["codec"] == "pca"


def test_figures_may_be_unknown(preset):
    unknown = dict.fromkeys(schema.FIGURES)
    create_cache_from_preset(preset | unknown)
    create_cache_from_preset({key: value for key, value in preset.items() if key not in unknown})


@pytest.mark.parametrize("overrides", [{}, {"sink_tokens": 0}, {"recent_tokens": 7}, {"sink_tokens": 9}])
def test_overrides_replace_the_presets_windows(preset, overrides):
    own = {"sink_tokens": 2, "recent_tokens": 3}
    store = create_cache_from_preset(preset | own, **overrides).layers[1].stores["V"]
    assert {"sink_tokens": store.sink_tokens, "recent_tokens": store.recent_tokens} == own | overrides


def test_an_unknown_override_is_named(preset):
    with pytest.raises(PluginError, match="unknown sinks"):
        create_cache_from_preset(preset, sinks=3)


@pytest.mark.parametrize(("target", "kept"), [("v", "K"), ("k", "V"), ("kv", "")])
@pytest.mark.parametrize("codec", ["pca", "identity"])
@torch.no_grad()
def test_only_the_target_changes(llama, preset, target, kept, codec):
    """The other side is bit for bit what the model made: in layer 0 nothing upstream differs yet."""
    cache = create_cache_from_preset(preset | {"target": target, "codec": codec, "bits": 4})
    exact = create_cache_from_preset(preset | {"codec": "identity", "bits": 16})
    for c in (cache, exact):
        llama.model(PROMPT, past_key_values=c)
    for side in ("K", "V"):
        ours, models = (c.layers[0].stores[side].read() for c in (cache, exact))
        assert torch.equal(ours, models) == (side == kept)
        assert torch.equal(ours[:, :, :4], models[:, :, :4]), "sinks are exact on both sides"


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generation_with_it(preset, bits, dtype):
    """Also with a model in another dtype than the one that was calibrated."""
    model = tiny_loaded("llama").model.to(dtype)
    cache = create_cache_from_preset(preset | {"target": "kv", "bits": bits})
    out = model.generate(PROMPT, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 36) and torch.equal(out[:, :30], PROMPT)
    read = cache.layers[2].stores["K"].read()
    assert read.dtype == dtype and torch.isfinite(read).all()


def test_a_codec_without_a_basis_needs_no_calibration_file(space):
    preset = PRESET | {"codec": "identity", "bits": 4, "calibration_file": ""}
    assert codecs(create_cache_from_preset(preset))["V"] == ["Compressor(int4)"] * 3


def test_caches_are_fresh(llama, preset):
    first, second = create_cache_from_preset(preset), create_cache_from_preset(preset)
    llama.model(PROMPT, past_key_values=first)
    assert first.get_seq_length() == 30 and second.get_seq_length() == 0


# --- finding the calibration


def placed(space, made, *places):
    for place in places:
        save_calibration(made, space / place)


LOOKED_AT = ["work/c.pt", "presets/c.pt", "work/results/calibrations/c.pt", "checkout/results/calibrations/c.pt"]


@pytest.mark.parametrize("first", range(4))
def test_look_up_order(space, made, first):
    """From the working folder, beside the preset, in results/calibrations of the working folder, of the checkout."""
    placed(space, made, *LOOKED_AT[first:])
    preset = preset_files.read_preset(write(space / "presets" / "p.json", PRESET))
    assert calibration_lookup.find_calibration(preset).resolve() == space / LOOKED_AT[first]
    create_cache_from_preset(preset)


def test_look_up_of_a_relative_folder_beside_the_preset(space, made):
    placed(space, made, "presets/sub/c.pt")
    create_cache_from_preset(write(space / "presets" / "p.json", PRESET | {"calibration_file": "sub/c.pt"}))


def test_look_up_in_the_home_folder(space, made, monkeypatch):
    monkeypatch.setenv("HOME", str(space))
    placed(space, made, "mine/c.pt")
    create_cache_from_preset(PRESET | {"calibration_file": "~/mine/c.pt"})


def test_a_preset_made_on_another_machine_finds_the_file_by_name(space, made):
    placed(space, made, "work/results/calibrations/c.pt")
    create_cache_from_preset(PRESET | {"calibration_file": "/no/such/machine/c.pt"})


DEFAULT_COMMAND = (
    "python scripts/calibrate_kv_lowrank.py --model tiny-llama --rank 9 --output results/calibrations/c.pt"
)


@pytest.mark.parametrize(
    ("made_by", "command"),
    [
        (None, DEFAULT_COMMAND),
        ("python scripts/make_presets.py --text ../a+b", "python scripts/make_presets.py --text ../a+b"),
        (f"{DEFAULT_COMMAND} --output ../c.pt", DEFAULT_COMMAND),
        ("python scripts/make_presets.py --output results/runs", DEFAULT_COMMAND),
        ("python scripts/make_presets.py --seed 1" + " 1" * 999, DEFAULT_COMMAND),
        ("python this.py", DEFAULT_COMMAND),
        ("python scripts/make_presets.py; rm -rf x", DEFAULT_COMMAND),
        ("python scripts/make_presets.py --text $(rm -rf x)", DEFAULT_COMMAND),
        ("python scripts/make_presets.py\nrm -rf x", DEFAULT_COMMAND),
        (["python scripts/make_presets.py"], DEFAULT_COMMAND),
    ],
)
def test_calibration_not_found(space, made_by, command):
    """The command that makes it is for people to run: from a stranger's preset only one of ours is shown."""
    path = write(space / "presets" / "p.json", PRESET | ({"made_by": made_by} if made_by else {}))
    with pytest.raises(CalibrationNotFound, match="^Calibration file not found: c.pt") as error:
        create_cache_from_preset(path)
    message = str(error.value)
    places = ["c.pt", str(space / "presets" / "c.pt"), "results/calibrations/c.pt"]
    places += [str(space / "checkout" / "results" / "calibrations" / "c.pt")]
    assert f"Looked at: {', '.join(places)}." in message and "\n" not in message
    assert message.endswith(command)


def test_a_model_name_is_quoted_where_it_becomes_part_of_a_command(space):
    with pytest.raises(CalibrationNotFound) as error:
        create_cache_from_preset(PRESET | {"model": "x; rm -rf y"})
    assert "--model 'x; rm -rf y' --rank" in str(error.value)


def test_reference_survives_a_move(space, made):
    """A preset and its calibration moved together, or the calibration in results/calibrations, are found again."""
    placed(space, made, "a/calibrations/c.pt", "work/results/calibrations/d.pt")
    reference = calibration_lookup.reference_to(space / "a/calibrations/c.pt", space / "a/presets/p.json")
    assert reference == os.path.join("..", "calibrations", "c.pt")
    write(space / "a/presets/p.json", PRESET | {"calibration_file": reference})
    (space / "a").rename(space / "b")
    create_cache_from_preset(space / "b/presets/p.json")
    found = calibration_lookup.reference_to(space / "work/results/calibrations/d.pt", space / "b/presets/p.json")
    assert found == "d.pt"


# --- refusals


@pytest.mark.parametrize("field", ["head_dim", "num_layers"])
def test_a_calibration_of_another_shape_is_refused(preset, field):
    with pytest.raises(
        BadArtefact, match=rf"c\.pt: field 'meta.{field}': .*tiny-llama expects 13, found {PRESET[field]}"
    ):
        create_cache_from_preset(preset | {field: 13})


def test_a_foreign_model_is_refused(llama, preset):
    other = tiny_loaded("llama", intermediate_size=32)
    assert other.geometry == llama.geometry, "only the fingerprint tells them apart"
    create_cache_from_preset(preset, model=llama)
    with pytest.raises(BadArtefact, match="calibrated on tiny-llama.*calibrate this model"):
        create_cache_from_preset(preset, model=other)


def test_a_foreign_model_is_refused_without_a_calibration_too(preset):
    with pytest.raises(PluginError):
        create_cache_from_preset(preset | {"codec": "identity"}, model=tiny_loaded("llama", num_hidden_layers=4))


@pytest.mark.parametrize("key", [key for key in GUIDE_KEYS if key not in schema.FIGURES])
def test_each_missing_key_is_named(space, preset, key):
    del preset[key]
    path = write(space / "p.json", preset)
    kind = "4 or 8 or 16" if key == "bits" else GUIDE_KEYS[key].__name__
    with pytest.raises(BadArtefact, match=rf"p\.json: key '{key}': expected {kind}, found None"):
        create_cache_from_preset(path)


ABSURD = [
    ("model", 3), ("model", None), ("rank", "9"), ("rank", 9.0), ("rank", True), ("rank", 0), ("rank", -1),
    ("rank", 13), ("target", "kvv"), ("target", "V"), ("target", 1), ("bits", 5), ("bits", "8"), ("bits", 8.0),
    ("bits", True), ("bits", None), ("compression_ratio", "2x"), ("compression_ratio", True), ("baseline_ppl", [1]),
    ("compressed_ppl", {}), ("ppl_delta", "5 %"), ("calibration_file", 3), ("calibration_file", ["c.pt"]),
    ("head_dim", 0), ("head_dim", -12), ("head_dim", True), ("num_layers", 0), ("num_layers", -3), ("num_layers", 3.0),
    ("num_layers", True), ("sink_tokens", -1), ("sink_tokens", 1.5), ("sink_tokens", True), ("sink_tokens", None),
    ("recent_tokens", -1), ("recent_tokens", "64"), ("codec", "pcaa"), ("codec", None), ("codec", ["pca"]),
    ("format", "kv-plugin-preset/2"), ("format", None),
]  # fmt: skip


ABSURD_QUANTIZERS = [
    ("mixd", 4, "unknown quantizer 'mixd', did you mean 'mixed'"), ("mixed", 0, "takes 0.25 to"),
    ("mixed", 99.5, "takes 0.25 to"), ("mixed", "4", "expected a number, found '4'"),
    ("mixed", None, "expected a number"), ("mixed", True, "expected a number, found True"),
    ("mixed", [4], "expected a number"), ("int4", 8, "bits 8: quantizer int4 has 4"),
    ("int8", 7.5, "quantizer int8 has 8"),
    (3, 4, "unknown quantizer"), (["mixed"], 4, "unknown quantizer"), (None, 3.5, "expected 4 or 8 or 16"),
]  # fmt: skip


@pytest.mark.parametrize(("quantizer", "bits", "message"), ABSURD_QUANTIZERS)
def test_absurd_quantizers_are_named(preset, quantizer, bits, message):
    absurd = {"quantizer": quantizer, "bits": bits}
    with pytest.raises(BadArtefact, match=f"key.*bits'.*{message}") as error:
        create_cache_from_preset(preset | absurd)
    assert "\n" not in str(error.value)
    with pytest.raises(BadArtefact, match=r"layers.v\[1\]: key"):
        layers = {"v": [None, absurd | {"codec": "identity", "rank": 12}, None]}
        create_cache_from_preset(preset | {"layers": layers})


@pytest.mark.parametrize(("quantizer", "bits"), [("mixed", 3.5), ("mixed", 4), ("int4", 4), ("none", 16)])
def test_a_quantizer_is_named_beside_its_bits(preset, quantizer, bits):
    cache = create_cache_from_preset(preset | {"quantizer": quantizer, "bits": bits})
    found = cache.layers[1].stores["V"].compressor.quantizer
    assert (found.name, found.bits) == (quantizer, bits)


@pytest.mark.parametrize(("key", "value"), ABSURD, ids=lambda x: str(x))
def test_each_absurd_value_is_refused(preset, key, value):
    """A boolean is an int to Python, and not to a preset."""
    with pytest.raises(PluginError) as error:
        create_cache_from_preset(preset | {key: value})
    assert key in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("bits", 5), ("codec", "pcaa")])
def test_the_file_is_named_for_every_key(space, key, value):
    with pytest.raises(BadArtefact, match="p.json"):
        create_cache_from_preset(write(space / "p.json", PRESET | {key: value}))


NOT_PRESETS = {
    "not JSON": "{rank: 9}",
    "empty": "",
    "cut off": json.dumps(PRESET)[:-9],
    "NaN": json.dumps(PRESET | {"ppl_delta": float("nan")}),
    "infinity": json.dumps(PRESET | {"baseline_ppl": float("inf")}),
    "list": json.dumps([PRESET]),
    "number": "3",
    "null": "null",
}


@pytest.mark.parametrize("content", NOT_PRESETS.values(), ids=NOT_PRESETS)
def test_what_is_no_preset_is_refused_by_file(space, content):
    with pytest.raises(BadArtefact, match=r"p\.json: (not a readable preset|expected a JSON object)"):
        load_preset(write(space / "p.json", content))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.5])
def test_a_figure_that_cannot_be_is_refused(value):
    with pytest.raises(BadArtefact, match="compression_ratio"):
        schema.parse(PRESET | {"compression_ratio": value})


def test_a_binary_file_a_folder_and_no_file(space):
    (space / "p.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadArtefact, match=r"p\.json: not a readable preset"):
        load_preset(space / "p.json")
    with pytest.raises(BadArtefact, match="not a readable preset"):
        load_preset(space)
    with pytest.raises(PluginError, match=r"no preset file .*none\.json: make one with scripts/auto_tune"):
        load_preset(space / "none.json")


# --- built-in presets


@pytest.fixture
def built_in(space):
    folder = preset_files.BUILT_IN[0]
    write(folder / "a.json", PRESET | {"name": "int8-vonly"})
    write(folder / "b-file-name.json", PRESET | {"bits": 4})
    write(folder / "c.json", PRESET | {"model": "other-model", "name": "only"})
    return folder


def test_built_in_presets_by_model_and_name(built_in):
    assert get_preset_info("tiny-llama", "int8-vonly")["bits"] == 8
    assert get_preset_info("tiny-llama", "b-file-name")["bits"] == 4, "without a name, the file's"
    assert {m: list(names) for m, names in preset_files.built_in_presets().items()} == {
        "tiny-llama": ["int8-vonly", "b-file-name"],
        "other-model": ["only"],
    }


def test_a_built_in_preset_is_the_callers_own(built_in):
    get_preset_info("tiny-llama", "int8-vonly")["rank"] = 1
    assert get_preset_info("tiny-llama", "int8-vonly")["rank"] == 9


def test_a_built_in_presets_calibration_is_looked_for_beside_it(built_in, space, made):
    save_calibration(made, built_in / "c.pt")
    create_cache_from_preset(get_preset_info("tiny-llama", "int8-vonly"))


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("tiny-lama", "int8-vonly", r"model 'tiny-lama', did you mean 'tiny-llama'\? \(there are some for: tiny-"),
        ("zzz", "int8-vonly", r"model 'zzz' \(there are some for: tiny-llama, other-model\)"),
        ("tiny-llama", "int8-v", r"'int8-v' for tiny-llama, .*mean 'int8-vonly'\? .*: int8-vonly, b-.*, kv8, kv4\)"),
        ("other-model", "zzz", r"no preset 'zzz' for other-model \(there are: only, kv8, kv4\)"),
    ],
)  # fmt: skip
def test_unknown_names_list_what_exists(built_in, model, name, message):
    with pytest.raises(PluginError, match=message):
        get_preset_info(model, name)


def test_resolve_takes_a_file_or_a_name(built_in, space):
    path = write(space / "work" / "mine.json", PRESET | {"rank": 3})
    extensionless = write(space / "work" / "mine", PRESET | {"rank": 4})
    assert preset_files.resolve_preset(path, "tiny-llama").record["rank"] == 3
    assert preset_files.resolve_preset(extensionless, "tiny-llama").record["rank"] == 4
    assert preset_files.resolve_preset("int8-vonly", "tiny-llama").record["rank"] == 9
    with pytest.raises(PluginError, match="no preset file none.json"):
        preset_files.resolve_preset("none.json", "tiny-llama")


def test_the_shipped_presets_load():
    """Whatever configs/presets and results/presets hold is valid, or nobody's preset can be listed."""
    for model, names in preset_files.built_in_presets().items():
        for name in names:
            assert schema.parse(get_preset_info(model, name)).model == model


# --- new presets


def test_new_preset_round_trips_through_json(space, llama, made):
    measured = {"baseline_ppl": 20.12345678, "ppl": 21.0, "ppl_delta": 0.0435}
    found = {"target": "v", "rank": 9, "bits": 8, "codec": "pca", "sink_tokens": 2}
    preset = build.new_preset(llama, made, "c.pt", compression_ratio=1.23456, measured=measured, **found)
    assert set(GUIDE_KEYS) <= set(preset) and preset["compressed_ppl"] == 21.0 and preset["compression_ratio"] == 1.2346
    back = load_preset(files.write_json(space / "p.json", preset))
    assert back.items() >= preset.items()
    words = "--model tiny-llama --rank 6 --samples 2 --seq-len 48 --seed 0 --sink-tokens 4 --text words.txt"
    assert f"{words} --output results/calibrations/c.pt" in preset["made_by"]
