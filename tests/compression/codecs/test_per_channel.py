"""Quantizers by channel: the error of a code, blocks that don't influence each other, extremes, and bytes by hand."""

import pytest
import torch

from gpt2.compression.codecs import QUANTIZERS, Compressor
from gpt2.compression.codecs.per_channel import Int4Channel


def round_trip(quantizer: str, x: torch.Tensor) -> torch.Tensor:
    c = Compressor(QUANTIZERS[quantizer])
    return c.reconstruct(c.compress(x), x.shape[-1], x.dtype)


@pytest.mark.parametrize(("quantizer", "bits"), [("int8_channel", 8), ("int4_channel", 4)])
@pytest.mark.parametrize("r", [1, 7, 64])
def test_a_code_is_off_by_half_a_step_of_its_own_channel(quantizer, bits, r):
    """The others' ranges, of a thousandth to a thousand times its own, don't matter; nor does where it lies."""
    torch.manual_seed(r)
    spread = torch.logspace(-3, 3, r)
    x = (torch.rand(2, 3, 128, r) + torch.randint(-30, 30, (3, 1, r))) * spread
    encoded = QUANTIZERS[quantizer].quantize(x)
    assert sum(part.nbytes for part in encoded.values()) == 2 * 3 * 2 * r * (8 * bits + 3), "codes, scale, offset"
    error = ((round_trip(quantizer, x) - x) / spread).abs()
    levels = 2**bits - 1
    # A scale is rounded by up to 2^(1/16), and wider by as much where it must reach the extremes
    assert error.max() < (0.6 if quantizer == "int8_channel" else 2.5) / levels + 30 * 2**-11
    assert error.square().mean().sqrt() < 0.36 / levels + 0.01, "a step over √12, and what float16 does to offsets"


def test_the_largest_numbers_stay_finite():
    x = torch.randn(1, 1, 64, 4).to(torch.bfloat16)
    x[0, 0, 3, 1], x[0, 0, 4, 2] = torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min
    for quantizer in ("int8_channel", "int4_channel"):
        back = round_trip(quantizer, x)
        assert torch.isfinite(back).all()
        assert (back - x)[..., [0, 3]].abs().max() < 1, "and the other channels don't notice"


def test_cutting_extremes_off_pays_at_four_bits():
    """Heavy tails on both sides: reaching them would cost the many near the middle their resolution."""

    class Whole(Int4Channel):
        shares = (1.0,)

    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, 4, 640, 16))
    lost = [(q.dequantize(q.quantize(x), 16) - x).square().mean().item() for q in (Int4Channel(), Whole())]
    assert lost[0] < 0.98 * lost[1]


def test_nibbles_hold_the_early_tokens_low():
    x = torch.arange(64.0).view(1, 1, 64, 1) / 64 * 15
    encoded = QUANTIZERS["int4_channel"].quantize(x)
    codes = torch.cat((encoded["codes"] & 15, encoded["codes"] >> 4), dim=3).flatten()
    assert codes.shape == (64,) and (codes.int().diff() >= 0).all() and codes[0] == 0 and codes[-1] == 15
