"""What tests of compression share: a tiny model, a calibration of it, and a working folder with no results in reach."""

import pytest
from calibrations import TEXT

from gpt2.common import files
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.presets import preset_files


@pytest.fixture(scope="session")
def calibration(llama):
    return calibrate(llama, TEXT, rank=6, samples=2, seq_len=48)


@pytest.fixture
def space(tmp_path, monkeypatch):
    """An empty working folder `work` beside an empty checkout; nothing of this machine's own results."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(files, "RESULTS", tmp_path / "checkout" / "results")
    monkeypatch.setattr(preset_files, "BUILT_IN", (tmp_path / "checkout" / "presets",))
    return tmp_path


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """A working folder where nothing may change or appear but the files that the tests themselves make."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim").write_text("as it was")
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"victim", "bad.pt", "p.json", "folder", "pipe"}
    assert (tmp_path / "victim").read_text() == "as it was"
