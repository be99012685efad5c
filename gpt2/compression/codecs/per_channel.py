"""Uniform integers with a scale and an offset per channel, in blocks of 64 tokens (KIVI, Liu et al. 2024).

Keys have channels that are large in every token, or far from zero (Qwen2.5's have a bias of many times their spread).
Coded by token, those set the step of all others; by channel each has a step and an offset of its own. A block holds

    codes   uint8 [B, G, n, 64 · bits / 8, r]: at 4 bits the first 32 tokens in the low nibbles, the others above
    scale   uint8 [B, G, n, 1, r]: step = 2^(byte / 8 − 17)
    offset  float16 [B, G, n, 1, r], the value of code 0

ẑ = code · step + offset: 24 bits of metadata over 64 codes. Offsets are in float32 where coordinates exceed float16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2.compression.codecs.base import HALF_MAX, WIDE_MAX, Encoded, Quantizer, beyond_half
from gpt2.compression.codecs.formats import BLOCK, CHANNEL, OCTAVE, SCALE_ZERO, ChannelGrid, Format
from gpt2.compression.codecs.mixed import NARROW

Stored = Callable[[Tensor], Tensor]  # offsets in the dtype in which they are stored


class Int8Channel(Quantizer):
    """8 bits per coordinate, and 24 per channel and block."""

    name = "int8_channel"
    bits = 8
    block_tokens = BLOCK
    memory_format = Format(CHANNEL, 8)
    # Shares of the range to try. Half a step of the scales' grid above 1: rounded down, it still reaches the extremes
    shares: tuple[float, ...] = (2 ** (0.5 / OCTAVE),)
    # Steps of the scales' grid to try where one outlier takes the range of a block. With 8 bits it costs too little
    wider = 0

    @property
    def largest(self) -> float:
        """A range of twice this is what the widest step reaches."""
        return (2**self.bits - 1) * 2 ** ((255 - SCALE_ZERO) / OCTAVE) / 2

    def encoding(self, rank: int) -> ChannelGrid:
        return ChannelGrid(self.bits, self.shares, self.wider)

    def quantize(self, z: Tensor) -> Encoded:
        stored = _in_float32 if beyond_half(z) else _in_half
        y = z.float().unflatten(2, (-1, BLOCK))
        low, high = y.amin(-2, keepdim=True), y.amax(-2, keepdim=True)
        scale, offset = self._grid(low, high, self.shares[0], stored)
        least = self._error(y, scale, offset)
        for share in self.shares[1:]:
            narrower = self._grid(low, high, share, stored)
            error = self._error(y, *narrower)
            better = error < least
            least = torch.where(better, error, least)
            scale, offset = torch.where(better, narrower[0], scale), torch.where(better, narrower[1], offset)
        if self.wider:
            away = (y - y.mean(-2, keepdim=True)).abs_().mean(-2, keepdim=True)
            own = (step_of(scale) > away)[..., 0, :]
            if own.any():
                few = (x.mT[own][..., None] for x in (y, scale, offset, least))  # [N, 64 or 1, 1]
                for x, moved in zip((scale, offset), self._on_the_bulk(*few, stored), strict=True):
                    x.mT[own] = moved[..., 0]
        codes = self._codes(y, scale, offset).to(torch.uint8)
        return {"codes": self.pack(codes), "scale": scale, "offset": offset}

    def dequantize(self, encoded: Encoded, rank: int) -> Tensor:
        codes = self.unpack(encoded["codes"]).float()
        return torch.addcmul(encoded["offset"].float(), codes, step_of(encoded["scale"])).flatten(2, 3)

    def _grid(self, low: Tensor, high: Tensor, share: float, stored: Stored) -> tuple[Tensor, Tensor]:
        """Scale and offset, as they are stored, of codes over the middle share `share` of a range."""
        levels = 2**self.bits - 1
        # An offset far from zero is rounded to a thousandth of itself, which may be more than a step
        spread = high - low + low.abs() * 2**-10
        exponent = (spread * (share / levels)).clamp_min(1e-30).log2() * OCTAVE
        scale = (exponent.round() + SCALE_ZERO).clamp(0, 255).to(torch.uint8)
        offset = (low + high) / 2 - step_of(scale) * (levels / 2)
        return scale, stored(offset)

    def _on_the_bulk(
        self, y: Tensor, scale: Tensor, offset: Tensor, least: Tensor, stored: Stored
    ) -> tuple[Tensor, Tensor]:
        """Scale and offset that put a code on the mean of most tokens, where that halves the error `least`.

        One outlier may take the range of a whole block: all other tokens then lie between two codes. Moved, the grid
        has a code where most tokens are; with a slightly wider step also one near the outlier. Constants become exact.
        On ordinary data the condition never holds.
        """
        mean = y.mean(-2, keepdim=True)
        away = (y - mean).abs()
        bulk = away <= 2 * away.mean(-2, keepdim=True)
        mean = (y * bulk).sum(-2, keepdim=True) / bulk.sum(-2, keepdim=True)
        first, origin, least = scale, offset.float(), least / 2
        for wider in range(self.wider):
            own = (first.int() + wider).clamp(max=255).to(torch.uint8)
            step = step_of(own)
            code = ((mean - origin) / step).round().clamp(0, 2**self.bits - 1)
            moved = stored(mean - code * step)
            error = self._error(y, own, moved)
            better = error < least
            least = torch.where(better, error, least)
            scale, offset = torch.where(better, own, scale), torch.where(better, moved, offset)
        return scale, offset

    def _codes(self, y: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return ((y - offset.float()) / step_of(scale)).round_().clamp_(0, 2**self.bits - 1)

    def _error(self, y: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Squared error of every channel of a block, [..., 1, r]."""
        back = self._codes(y, scale, offset).mul_(step_of(scale)).add_(offset.float())
        return (y - back).square_().sum(-2, keepdim=True)

    def pack(self, codes: Tensor) -> Tensor:
        """[..., 64, r] uint8 → the bytes that are stored."""
        return codes

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return packed


class Int4Channel(Int8Channel):
    """4 bits per coordinate, and 24 per channel and block. Cutting extremes off may cost less than reaching them."""

    name = "int4_channel"
    bits = 4
    memory_format = Format(CHANNEL, 4)
    shares = NARROW
    wider = 4

    def pack(self, codes: Tensor) -> Tensor:
        low, high = codes.chunk(2, dim=-2)
        return low | high << 4

    def unpack(self, packed: Tensor) -> Tensor:
        return torch.cat((packed & 15, packed >> 4), dim=-2)


def _in_half(offset: Tensor) -> Tensor:
    return offset.clamp(-HALF_MAX, HALF_MAX).half()


def _in_float32(offset: Tensor) -> Tensor:
    return offset.clamp(-WIDE_MAX, WIDE_MAX)


def step_of(scale: Tensor) -> Tensor:
    """Steps of scales in bytes, float32."""
    return ((scale.float() - SCALE_ZERO) / OCTAVE).exp2()
