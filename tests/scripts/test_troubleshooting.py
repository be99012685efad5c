"""Every trouble that the guide knows, made on purpose: message, advice, a non-zero exit, nothing half-written."""

import json
import re
import shutil

import pytest
import script_runs
import torch
from calibrations import TEXT
from sampling import covering
from script_runs import CALIBRATE, GENERATE, NEEDLE, PROFILE, SMALL, SMALL_EVAL, STABILITY, TUNE, VALIDATE, listing
from tiny import save_tiny, tiny_model

from gpt2.compression.calibration import calibrate
from gpt2.compression.calibration.file import save_calibration
from gpt2.models.loading import load

WITH_PRESET = (NEEDLE, STABILITY, PROFILE, GENERATE)  # scripts that take --preset
WITH_TEXT = (CALIBRATE, TUNE, VALIDATE, NEEDLE, STABILITY)  # scripts that take --text
EVERY = (*WITH_TEXT, PROFILE, GENERATE)
SHORT_NEEDLE = ["--needle-length", "128", "--needle-trials", "1"]
# What keeps each script small; a preset that needs no calibration where one is asked for
FLAGS = {
    CALIBRATE: SMALL,
    TUNE: [*SMALL, *SMALL_EVAL, "--rank-grid", "9", "--bits", "8", "--target-ppl-delta", "0.9", "--study", "s.db"],
    VALIDATE: [*SMALL, *SMALL_EVAL, "--groups", "control"],
    NEEDLE: ["--preset", "free.json", "--context-lengths", "128", "--num-trials", "1", "--needle-positions", "0.5"],
    STABILITY: ["--preset", "free.json", *SMALL_EVAL, "--num-runs", "2", *SHORT_NEEDLE],
    PROFILE: ["--preset", "free.json", "--context-lengths", "32", "--batch-sizes", "1", "--repeats", "1"],
    GENERATE: ["--preset", "free.json", "--prompt", "w2 w3 w4", "--max-new-tokens", "4"],
}
OUTPUT = {CALIBRATE: "o.pt"}  # a JSON file of the others


def saved(folder, change) -> None:
    change(model := tiny_model())
    save_tiny(folder, model=model)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, model_folder):
    """A good calibration of the tiny model."""
    made = calibrate.calibrate(load(str(model_folder)), TEXT, rank=9, samples=3, seq_len=64)
    return save_calibration(made, tmp_path_factory.mktemp("made") / "c.pt")


@pytest.fixture
def space(tmp_path, tiny_flags):
    """The working folder, with a text and a preset that needs no calibration."""
    (tmp_path / "free.json").write_text(json.dumps(script_runs.FREE_PRESET))
    return tmp_path


def fails(capsys, space, script: str, *flags, code: int = 2, model=None) -> str:
    """Run a script that must fail with one clear error and leave nothing; returns what it printed."""
    before = listing(space)
    given = ["--model", model] if model else []
    given += ["--text", "words.txt"] if script in WITH_TEXT and "--text" not in flags else []
    assert script_runs.run(script, *given, *FLAGS[script], *flags) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("error: ") == 1, err
    assert listing(space) - before <= {"s.db", "s.db.lock"}, "nothing may be left behind"
    return err


@pytest.mark.parametrize("script", WITH_PRESET)
def test_calibration_file_not_found(script, space, capsys, model_folder):
    (space / "p.json").write_text(json.dumps(script_runs.PRESET | {"calibration_file": "lost.pt"}))
    err = fails(capsys, space, script, "--preset", "p.json", model=model_folder)
    assert "Calibration file not found: lost.pt" in err and "Looked at: " in err
    assert "python scripts/calibrate_kv_lowrank.py --model tiny --rank 9" in err, "the command that makes it"


def test_ppl_degradation_too_high(space, capsys, model_folder, calibration):
    """An earlier preset stays as it was when the next search finds nothing."""
    shutil.copy(space / "free.json", space / "p.json")
    before = (space / "p.json").read_bytes()
    tight = ["--calibration", calibration, "--rank-grid", "1", "--bits", "4", "--target-ppl-delta", "0.0001"]
    err = fails(capsys, space, TUNE, *tight, "--target", "kv", "--output", "p.json", code=3, model=model_folder)
    assert "PPL degradation too high" in err and "No preset was written" in err and "Nearest: rank" in err
    remedies = ("increase the rank", "V only", "--target v", "int8 instead of int4")
    assert all(remedy in err for remedy in remedies), "the guide's"
    assert (space / "p.json").read_bytes() == before


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 10 bytes")


@pytest.mark.parametrize(("script", "error"), [(CALIBRATE, CUDA), (TUNE, CPU), (VALIDATE, CUDA)])
def test_out_of_memory_during_calibration(script, error, space, capsys, monkeypatch, model_folder):
    def explode(*args, **kwargs):
        raise error

    monkeypatch.setattr(calibrate, "collect", explode)
    err = fails(capsys, space, script, "--output", OUTPUT.get(script, "o.json"), code=4, model=model_folder)
    assert "--samples" in err and "--seq-len 512" in err
    assert ("--gradient-checkpointing" in err) == (script == CALIBRATE), "only flags that the script has"


@pytest.mark.parametrize("script", EVERY)
def test_model_without_a_cache(script, space, capsys):
    saved(space / "no-cache", lambda model: setattr(model.config, "use_cache", False))
    flag = "--output" if script != GENERATE else "--prompt"
    err = fails(capsys, space, script, flag, OUTPUT.get(script, "o.json"), model="no-cache")
    assert "Model doesn't have past_key_values" in err and "use_cache is False" in err and "supported: " in err


@pytest.mark.parametrize(
    ("script", "value"), covering([CALIBRATE, TUNE, VALIDATE, STABILITY], [float("nan"), float("inf")])
)
def test_activations_that_are_not_numbers(script, value, space, capsys):
    def poison(model):
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = value

    saved(space / "poisoned", poison)
    err = fails(capsys, space, script, "--output", OUTPUT.get(script, "o.json"), model="poisoned")
    assert re.search("NaN or infinit", err) and "--dtype float32" in err


@pytest.mark.parametrize("script", [TUNE, VALIDATE, *WITH_PRESET])
def test_a_calibration_of_another_model(script, space, capsys, calibration):
    saved(space / "other", lambda model: [weight.neg_() for weight in model.parameters()])
    (space / "p.json").write_text(json.dumps(script_runs.PRESET | {"calibration_file": str(calibration)}))
    flags = ["--preset", "p.json"] if script in WITH_PRESET else ["--calibration", calibration, "--output", "o.json"]
    err = fails(capsys, space, script, *flags, model="other")
    assert "calibrated on" in err and "but the model is other" in err
    assert script in WITH_PRESET or (str(calibration) in err and "calibrate this model" in err)


@pytest.mark.parametrize("script", EVERY)
def test_bad_flags(script, space, capsys, model_folder):
    for flag, value in {"--device": "tpu", "--dtype": "int3", "--model": "no/such"}.items():
        model = None if flag == "--model" else model_folder
        assert f"'{value}'" in fails(capsys, space, script, flag, value, model=model)
