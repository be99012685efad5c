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


def test_look_up_order(space, placed):
    """From the working folder, beside the preset, in results/calibrations of the working folder, of the checkout."""
    preset = read_preset(write(space / "presets" / "p.json", PRESET))
    for place in reversed(LOOKED_AT):
        placed(place)
        assert calibration_lookup.find_calibration(preset).resolve() == space / place
        create_cache_from_preset(preset)


def test_look_up_by_path(space, placed, monkeypatch):
    """In a folder beside the preset, in the home folder, and of a file that was made on another machine."""
    monkeypatch.setenv("HOME", str(space))
    for named, lies in (("sub/c.pt", "presets/sub/c.pt"), ("~/mine/c.pt", "mine/c.pt"),
                        ("/no/such/machine/d.pt", "work/results/calibrations/d.pt")):  # fmt: skip
        placed(lies)
        create_cache_from_preset(write(space / "presets" / "p.json", PRESET | {"calibration_file": named}))


DEFAULT_COMMAND = (
    "python scripts/calibrate_kv_lowrank.py --model tiny-llama --rank 9 --output results/calibrations/c.pt"
)


MAKES = "python scripts/make_presets.py"
OWN = f"{MAKES} --text ../a+b"
NOT_OURS = [
    f"{DEFAULT_COMMAND} --output ../c.pt", f"{MAKES} --output results/runs", f"{MAKES} --seed 1" + " 1" * 999,
    "python this.py", f"{MAKES}; rm -rf x", f"{MAKES} --text $(rm -rf x)", f"{MAKES}\nrm -rf x", [MAKES],
]  # fmt: skip


@pytest.mark.parametrize("made_by", [None, OWN, *NOT_OURS], ids=lambda made_by: str(made_by)[:60])
def test_calibration_not_found(space, made_by):
    """The command that makes it is for people to run: of a preset's own words only a command of ours is printed."""
    path = write(space / "presets" / "p.json", PRESET | ({"made_by": made_by} if made_by else {}))
    with pytest.raises(CalibrationNotFound, match="^Calibration file not found: c.pt") as error:
        create_cache_from_preset(path)
    message = str(error.value)
    places = ["c.pt", str(space / "presets" / "c.pt"), "results/calibrations/c.pt"]
    places += [str(space / "checkout" / "results" / "calibrations" / "c.pt")]
    assert f"Looked at: {', '.join(places)}." in message and "\n" not in message
    assert message.endswith(OWN if made_by == OWN else DEFAULT_COMMAND)


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
