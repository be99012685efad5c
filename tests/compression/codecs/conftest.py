"""A calibration of the tiny Llama with every basis that heads share."""

import pytest
from calibrations import OF_HEADS, TEXT, preset_of

from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.fit import Calibration


@pytest.fixture(scope="session")
def made(llama) -> Calibration:
    return calibrate(llama, TEXT, codec="joint", **OF_HEADS)


@pytest.fixture
def preset(made, tmp_path) -> dict:
    return preset_of(made, tmp_path / "c.pt")
