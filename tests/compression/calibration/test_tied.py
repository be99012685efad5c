"""Models whose values are their keys before norm and rotation (Gemma 4's `attention_k_eq_v`)."""

import torch
from tiny import word_text, word_tokenizer
from transformers import AutoModelForCausalLM

from gpt2.compression.calibration.calibrate import calibrate
from gpt2.experiments.miniatures import tiny_config
from gpt2.models.loading import wrap
from gpt2.text.sources import by_position


def share_of_the_last_half(tied: bool) -> float:
    """Of what varies in K and V of the full-attention layer, how much a joint basis has in its last coordinates."""
    config = tiny_config("gemma4_text")
    config.attention_k_eq_v = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded = wrap(AutoModelForCausalLM.from_config(config), word_tokenizer(), "gemma4")
    text = by_position("words", "words.txt", word_text(2000))
    calibration = calibrate(loaded, text, rank=16, samples=4, seq_len=192, codec="joint", compact=True)
    full = next(i for i in loaded.geometry.attention if loaded.geometry.layers[i].window is None)
    spectrum = calibration.multi_head["joint"].spectra()["kv"][full].double()
    return float(spectrum[..., spectrum.shape[-1] // 2 :].sum() / spectrum.sum())


def test_a_joint_basis_stores_keys_and_values_once_where_they_are_tied():
    """Un-rotated keys are values times the norm's weights: half of the coordinates is constant, and takes no bits."""
    assert share_of_the_last_half(tied=True) < 1e-6
    assert share_of_the_last_half(tied=False) > 1e-4
