"""Which models may use a calibration: its own, and with a warning copies whose weights differ a little."""

import copy
import dataclasses
import logging

import pytest
from tiny import tiny_loaded, tiny_model

from gpt2.common.errors import BadArtefact
from gpt2.models.loading import wrap
from gpt2.models.probe import likeness, sketch


def rounded(loaded, bits: int):
    """A copy whose matrices have so many bits a weight, with one scale for each row."""
    model = copy.deepcopy(loaded.model)
    for weight in model.parameters():
        if weight.dim() > 1:
            step = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            weight.data = (weight / step).round() * step
    return wrap(model, loaded.tokenizer, "a copy")


def test_a_quantized_copy_may_use_it_with_a_warning(calibration, llama, caplog):
    other = rounded(llama, 8)
    assert other.fingerprint != llama.fingerprint
    with caplog.at_level(logging.WARNING):
        calibration.check_model(llama, "own.pt")
        assert not caplog.records
        for _ in range(2):
            calibration.check_model(other, "copy.pt")
    assert len(caplog.records) == 1, "once for each file and model"
    assert "copy.pt: calibrated on tiny-llama with other weights than those of a copy" in caplog.text


OTHER_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}


def test_other_models_are_rejected(calibration):
    """Of other weights, and of the same weights at other positions, where a file says them.

    Older files don't, and keep their model's fingerprint, which has only scaled positions.
    """
    for change in ({"seed": 1}, LINEAR):
        with pytest.raises(BadArtefact, match=r"calibrated on tiny-llama .*calibrate this model"):
            calibration.check_model(tiny_loaded("llama", **change), "c.pt")
    other = tiny_loaded("llama", **OTHER_THETA)
    theta = (
        r"calibrated on tiny-llama .*other rotary positions .*\(rope_theta 10000, not 500000\).*calibrate this model"
    )
    with pytest.raises(BadArtefact, match=theta):
        calibration.check_model(other, "c.pt")
    older = {key: value for key, value in calibration.meta.items() if key != "rotary"}
    dataclasses.replace(calibration, meta=older).check_model(other, "c.pt")


def test_likeness_is_the_share_of_signs_in_common(llama):
    own = sketch(llama.model)
    model = copy.deepcopy(llama.model)
    model.lm_head.weight.data.flatten()[:16].neg_()
    signs = 4 * len(own["signs"])
    assert likeness(own, own) == 1
    assert likeness(own, sketch(model)) == pytest.approx(1 - 16 / signs)
    assert likeness(own, sketch(tiny_model("llama", hidden_size=96))) == 0
