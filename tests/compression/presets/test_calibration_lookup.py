"""A preset's calibration: found where people keep it, checked against preset and model, or its absence explained."""

import os

import pytest
from presets import PRESET, write
from tiny import tiny_loaded

from gpt2.common.errors import BadArtefact, CalibrationNotFound
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.presets import calibration_lookup, create_cache_from_preset
from gpt2.compression.presets.preset_files import read_preset

LOOKED_AT = ["work/c.pt", "presets/c.pt", "work/results/calibrations/c.pt", "checkout/results/calibrations/c.pt"]


@pytest.fixture
def placed(space, calibration):
    """A function that puts the calibration into places of the working space."""

    def place(*places: str) -> str:
        return [str(save_calibration(calibration, space / name)) for name in places][0]

    return place


@pytest.mark.parametrize("first", range(4))
def test_look_up_order(space, placed, first):
    """From the working folder, beside the preset, in results/calibrations of the working folder, of the checkout."""
    placed(*LOOKED_AT[first:])
    preset = read_preset(write(space / "presets" / "p.json", PRESET))
    assert calibration_lookup.find_calibration(preset).resolve() == space / LOOKED_AT[first]
    create_cache_from_preset(preset)


@pytest.mark.parametrize(
    ("named", "lies"),
    [("sub/c.pt", "presets/sub/c.pt"), ("~/mine/c.pt", "mine/c.pt"),
     ("/no/such/machine/c.pt", "work/results/calibrations/c.pt")],
    ids=["in a folder beside the preset", "in the home folder", "made on another machine"],
)  # fmt: skip
def test_look_up_by_path(space, placed, monkeypatch, named, lies):
    monkeypatch.setenv("HOME", str(space))
    placed(lies)
    create_cache_from_preset(write(space / "presets" / "p.json", PRESET | {"calibration_file": named}))


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
    """The command that makes it is for people to run: of a preset's own words only a command of ours is printed."""
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
