"""Asymmetric uniform integers, one scale and one offset per token and group (the guide's int8 and int4).

ẑ = code · scale + offset, both in float16: 32 bits of metadata over r coordinates. The offset, which is the value of
code 0, is rounded down and the codes are taken against the rounded values: a large common bias widens the range by one
float16 step, no more. Both are in float32 where coordinates exceed float16.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from gpt2.compression.codecs.base import WIDE_MAX, Encoded, Quantizer, beyond_half
from gpt2.compression.codecs.formats import TOKEN, Format, TokenRange

HALF = torch.finfo(torch.float16)
# Smallest scale: below it float16 steps by more than a hundredth of itself, and zero would divide
SMALLEST = 2.0**-17


class Int8(Quantizer):
    """8 bits per coordinate, one code a byte."""

    name = "int8"
    bits = 8
    by_bits = True
    memory_format = Format(TOKEN, 8)
    largest = WIDE_MAX

    def encoding(self, rank: int) -> TokenRange:
        return TokenRange(self.bits)

    def quantize(self, z: Tensor) -> Encoded:
        levels, wide = 2**self.bits - 1, beyond_half(z)
        z = z.float()
        low, high = z.aminmax(dim=-1, keepdim=True)
        offset = low.clamp(-WIDE_MAX, WIDE_MAX) if wide else _half_not_above(low.clamp(HALF.min, HALF.max))
        scale = (high - offset.float()) / levels
        scale = scale.clamp(SMALLEST, WIDE_MAX) if wide else scale.clamp(SMALLEST, HALF.max).half()
        codes = ((z - offset.float()) / scale.float()).round_().clamp_(0, levels).to(torch.uint8)
        return {"codes": self.pack(codes), "scale": scale, "offset": offset}

    def dequantize(self, encoded: Encoded, rank: int) -> Tensor:
        codes = self.unpack(encoded["codes"], rank)
        return torch.addcmul(encoded["offset"].float(), codes.float(), encoded["scale"].float())

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [..., r] uint8 → the bytes that are stored."""
        return codes

    def unpack(self, packed: Tensor, rank: int) -> Tensor:
        """The inverse of `pack`, [..., rank]."""
        return packed


class Int4(Int8):
    """4 bits per coordinate, two codes a byte: the first half of the channels in the low nibbles, the others above."""

    name = "int4"
    bits = 4
    memory_format = Format(TOKEN, 4)

    def pack(self, codes: Tensor) -> Tensor:
        """[..., r] uint8 below 16 → [..., ⌈r / 2⌉]."""
        codes = pad(codes, (0, codes.shape[-1] % 2))
        low, high = codes.chunk(2, dim=-1)
        return low | high << 4

    def unpack(self, packed: Tensor, rank: int) -> Tensor:
        return torch.cat((packed & 15, packed >> 4), dim=-1)[..., :rank]


def _half_not_above(x: Tensor) -> Tensor:
    """The nearest float16 that is not above x: an offset above the lowest value would leave it without a code."""
    rounded = x.half()
    # float16 has no nextafter on every device; the next lower number is one bit pattern away
    bits = rounded.view(torch.int16)
    below = torch.where(rounded > 0, bits - 1, bits + 1).view(torch.float16)
    below = torch.where(rounded == 0, torch.full_like(rounded, -HALF.smallest_normal), below)
    return torch.where(rounded.float() > x, below, rounded)
