"""Preset files: read, found by name, listed; one file of a name's own is read and validated once."""

import json
from pathlib import Path

import pytest
from presets import PRESET, noting, write

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.presets import create_cache_from_preset, get_preset_info, load_preset, preset_files, schema
from gpt2.compression.presets.preset_files import resolve_preset


def test_a_binary_file_a_folder_and_no_file(space):
    (space / "p.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadArtefact, match=r"p\.json: not a readable preset"):
        load_preset(space / "p.json")
    with pytest.raises(BadArtefact, match="not a readable preset"):
        load_preset(space)
    (space / "c.pt").touch()
    with pytest.raises(BadArtefact, match=r"c\.pt: a calibration, not a preset: give the preset's \.json file"):
        resolve_preset(space / "c.pt", "tiny-llama")
    with pytest.raises(PluginError, match=r"no preset file .*none\.json: make one with scripts/auto_tune"):
        load_preset(space / "none.json")


# --- built-in presets


@pytest.fixture
def built_in(space):
    (folder,) = preset_files.BUILT_IN
    write(folder / "tiny-llama-int8-vonly.json", PRESET | {"name": "int8-vonly"})
    write(folder / "b-file-name.json", PRESET | {"bits": 4})
    write(folder / "c.json", PRESET | {"model": "other-model", "name": "only"})
    return folder


def test_built_in_presets_by_model_and_name(built_in):
    assert get_preset_info("tiny-llama", "int8-vonly")["bits"] == 8
    assert get_preset_info("tiny-llama", "b-file-name")["bits"] == 4, "without a name, the file's"
    assert {m: set(names) for m, names in preset_files.built_in_presets().items()} == {
        "tiny-llama": {"int8-vonly", "b-file-name"}, "other-model": {"only"},
    }  # fmt: skip


def test_a_file_that_is_named_like_a_preset_and_isnt_it(built_in):
    write(built_in / "tiny-llama-only.json", PRESET | {"model": "other/tiny-llama", "name": "only"})
    assert get_preset_info("other-model", "only")["model"] == "other-model"
    with pytest.raises(PluginError, match="no preset 'only' for tiny-llama"):
        get_preset_info("tiny-llama", "only")
    assert get_preset_info("other/tiny-llama", "only")["model"] == "other/tiny-llama"


def test_two_lines_read_two_files_and_validate_once(built_in, calibration):
    save_calibration(calibration, built_in / "c.pt")
    with noting(schema.parse) as (opened, validations):
        create_cache_from_preset(get_preset_info("tiny-llama", "int8-vonly"))
    own = {Path(path).name for path in opened if Path(path).is_relative_to(built_in)}
    assert own == {"tiny-llama-int8-vonly.json", "c.pt"} and len(validations) == 1


def test_a_built_in_preset_is_the_callers_own(built_in, calibration, tmp_path):
    """To change, as the guide does with `calibration_file`, and to write."""
    preset = get_preset_info("tiny-llama", "int8-vonly")
    preset["calibration_file"] = str(save_calibration(calibration, tmp_path / "mine" / "c.pt"))
    preset["rank"] = 1
    assert create_cache_from_preset(json.loads(json.dumps(preset))).layers[0].stores["V"].compressor.transform.rank == 1
    assert get_preset_info("tiny-llama", "int8-vonly")["rank"] == 9


UNKNOWN = [
    ("tiny-lama", "int8-vonly", r"model 'tiny-lama', did you mean 'tiny-llama'\? \(there are some for: "),
    ("zzz", "int8-vonly", r"model 'zzz' \(there are some for: tiny-llama, other-model\)|other-model, tiny-llama\)"),
    ("tiny-llama", "int8-v", r"'int8-v' for tiny-llama, .*mean 'int8-vonly'\? .*int8-vonly, kv8, kv4\)"),
    ("other-model", "zzz", r"no preset 'zzz' for other-model \(there are: only, kv8, kv4\)"),
]


def test_resolve_takes_a_file_or_a_name_and_unknown_names_list_what_exists(built_in, space):
    for model, name, message in UNKNOWN:
        with pytest.raises(PluginError, match=message):
            get_preset_info(model, name)
    for path in (space / "work" / "mine.json", space / "work" / "mine"):
        assert resolve_preset(write(path, PRESET | {"rank": 3}), "tiny-llama").record["rank"] == 3
    assert resolve_preset("int8-vonly", "tiny-llama").record["rank"] == 9
    with pytest.raises(PluginError, match="no preset file none.json"):
        resolve_preset("none.json", "tiny-llama")


def test_shipped_presets_are_valid_and_named_after_model_and_preset():
    for model, names in preset_files.built_in_presets().items():
        for name, path in names.items():
            with noting(schema.parse) as (opened, _):
                assert schema.parse(get_preset_info(model, name)).model == model
            assert opened == {str(path)}, "found without looking into the others"
