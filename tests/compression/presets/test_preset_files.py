"""Preset files: read, found by name, listed; and their calibrations, found and checked, or their absence explained."""

import json
import os
from pathlib import Path

import pytest
from presets import PRESET, noting, write
from tiny import tiny_loaded

from gpt2.common.errors import BadArtefact, CalibrationNotFound, PluginError
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.presets import (
    calibration_lookup,
    create_cache_from_preset,
    get_preset_info,
    load_preset,
    preset_files,
    schema,
)
from gpt2.compression.presets.preset_files import read_preset, resolve_preset


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
    """Not by the name of a file, which another model's may have."""
    assert get_preset_info("tiny-llama", "int8-vonly")["bits"] == 8
    assert get_preset_info("tiny-llama", "b-file-name")["bits"] == 4, "without a name, the file's"
    assert {m: set(names) for m, names in preset_files.built_in_presets().items()} == {
        "tiny-llama": {"int8-vonly", "b-file-name"}, "other-model": {"only"},
    }  # fmt: skip
    write(built_in / "tiny-llama-only.json", PRESET | {"model": "other/tiny-llama", "name": "only"})
    with pytest.raises(PluginError, match="no preset 'only' for tiny-llama"):
        get_preset_info("tiny-llama", "only")
    for model in ("other-model", "other/tiny-llama"):
        assert get_preset_info(model, "only")["model"] == model


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


# --- calibrations of presets


LOOKED_AT = ["work/c.pt", "presets/c.pt", "work/results/calibrations/c.pt", "checkout/results/calibrations/c.pt"]


@pytest.fixture
def placed(space, calibration):
    """A function that puts the calibration into places of the working space."""

    def place(*places: str) -> str:
        return [str(save_calibration(calibration, space / name)) for name in places][0]

    return place


def test_where_it_is_looked_for(space, placed, monkeypatch):
    """In a folder beside the preset, in the home folder, and of a file that was made on another machine.

    In order: the working folder, beside the preset, results/calibrations of the working folder, of the checkout.
    """
    monkeypatch.setenv("HOME", str(space))
    for named, lies in (("sub/c.pt", "presets/sub/c.pt"), ("~/mine/c.pt", "mine/c.pt"),
                        ("/no/such/machine/d.pt", "work/results/calibrations/d.pt")):  # fmt: skip
        placed(lies)
        create_cache_from_preset(write(space / "presets" / "p.json", PRESET | {"calibration_file": named}))
    preset = read_preset(write(space / "presets" / "p.json", PRESET))
    for place in reversed(LOOKED_AT):
        placed(place)
        assert calibration_lookup.find_calibration(preset).resolve() == space / place
        create_cache_from_preset(preset)


DEFAULT_COMMAND = (
    "python scripts/calibrate_kv_lowrank.py --model tiny-llama --rank 9 --output results/calibrations/c.pt"
)


MAKES = "python scripts/make_presets.py"
OWN = f"{MAKES} --text ../a+b"
NOT_OURS = [
    f"{DEFAULT_COMMAND} --output ../c.pt", f"{MAKES} --output results/runs", f"{MAKES} --seed 1" + " 1" * 999,
    "python this.py", f"{MAKES}; rm -rf x", f"{MAKES} --text $(rm -rf x)", f"{MAKES}\nrm -rf x", [MAKES],
]  # fmt: skip


def test_calibration_not_found(space):
    """The command that makes it is for people to run: of a preset's own words only a command of ours is printed."""
    places = ["c.pt", str(space / "presets" / "c.pt"), "results/calibrations/c.pt"]
    places += [str(space / "checkout" / "results" / "calibrations" / "c.pt")]
    for made_by in (None, OWN, *NOT_OURS):
        path = write(space / "presets" / "p.json", PRESET | ({"made_by": made_by} if made_by else {}))
        with pytest.raises(CalibrationNotFound, match="^Calibration file not found: c.pt") as error:
            create_cache_from_preset(path)
        message = str(error.value)
        assert f"Looked at: {', '.join(places)}." in message and "\n" not in message
        assert message.endswith(OWN if made_by == OWN else DEFAULT_COMMAND), made_by
    with pytest.raises(CalibrationNotFound) as error:
        create_cache_from_preset(PRESET | {"model": "x; rm -rf y"})
    assert "--model 'x; rm -rf y' --rank" in str(error.value)


def test_reference_survives_a_move(space, placed):
    """A preset and its calibration moved together, or the calibration in results/calibrations, are found again."""
    placed("a/calibrations/c.pt", "work/results/calibrations/d.pt")
    reference = calibration_lookup.reference_to(space / "a/calibrations/c.pt", space / "a/presets/p.json")
    assert reference == os.path.join("..", "calibrations", "c.pt")
    write(space / "a/presets/p.json", PRESET | {"calibration_file": reference})
    (space / "a").rename(space / "b")
    create_cache_from_preset(space / "b/presets/p.json")
    found = calibration_lookup.reference_to(space / "work/results/calibrations/d.pt", space / "b/presets/p.json")
    assert found == "d.pt"


def test_a_calibration_of_another_shape_or_made_otherwise_is_rejected(placed):
    preset = PRESET | {"calibration_file": placed("c.pt")}
    for field in ("head_dim", "num_layers"):
        message = rf"c\.pt: field 'meta.{field}': .*tiny-llama expects 13, found {PRESET[field]}"
        with pytest.raises(BadArtefact, match=message):
            create_cache_from_preset(preset | {field: 13})
    create_cache_from_preset(preset | {"calibrated_with": {"seed": 0}})
    with pytest.raises(BadArtefact, match="field 'meta.seed': the preset was measured with 5, found 0"):
        create_cache_from_preset(preset | {"calibrated_with": {"seed": 5}})


def test_another_model_is_rejected(llama, placed):
    preset, other = PRESET | {"calibration_file": placed("c.pt")}, tiny_loaded("llama", intermediate_size=32)
    assert other.geometry == llama.geometry, "only the fingerprint tells them apart"
    create_cache_from_preset(preset, model=llama)
    with pytest.raises(BadArtefact, match="calibrated on tiny-llama.*calibrate this model"):
        create_cache_from_preset(preset, model=other)
    with pytest.raises(BadArtefact, match="key 'num_layers': expected 4 for tiny-llama, found 3"):
        create_cache_from_preset(preset | {"codec": "identity"}, model=tiny_loaded("llama", num_hidden_layers=4))
