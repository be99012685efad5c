"""How codes lie in memory and how they are chosen: what a quantizer declares, and kernels look up.

Kernels know these declarations and no quantizer. One that declares a known format is read by kernels, one that declares
a known encoding is written by them, and one that declares neither works through PyTorch.

kind           tensors, in this order; [B, G, n, …] have n blocks of the quantizer's `block_tokens`
EXACT          vectors as the model made them, [B, H, T, d], or unquantized coordinates, [B, G, T, r]
TOKEN          codes [B, G, T, bytes], scale and offset [B, G, T, 1] float16 (`integer`)
CHANNEL        codes [B, G, n, bytes, r], scale [B, G, n, 1, r] uint8, offset [B, G, n, 1, r] float16 (`per_channel`)
PLANES         bit planes with metadata [B, G, n, bytes], packed width indices [B, G, n, bytes] (`mixed`)
FIXED_PLANES   the same planes, without far offsets; width indices [G, r] uint8, the same in every block

Where coordinates exceed float16, TOKEN and CHANNEL have float32 in its place, which PyTorch reads and kernels don't.
"""

from __future__ import annotations

from typing import NamedTuple

EXACT, TOKEN, CHANNEL, PLANES, FIXED_PLANES = range(5)  # the first four as kernels/cpp/codecs.h numbers them
BLOCK = 64  # tokens of CHANNEL, PLANES and FIXED_PLANES that are coded together
OCTAVE = 8  # scales in a byte lie on a grid of so many steps per doubling
SCALE_ZERO = 17 * OCTAVE  # byte of scale 1: scales go from 2^-17, the least of TOKEN's as well, to 30,000
# Bits that a channel of PLANES may have. Ten are for the few channels with most of the variance; without one bit, which
# these have in its place, KL at 3 bits is a little higher than it could be (results/runs/explore_codecs_*)
WIDTHS = (0, 2, 3, 4, 5, 6, 8, 10)
MOST_PLANES = max(WIDTHS)
PLANE = BLOCK // 8  # bytes of a plane: one bit of each of a channel's 64 codes
METADATA = 2  # bytes of a channel that has codes: scale and offset
FAR = 2  # bytes more of a channel whose offset needs them


class Format(NamedTuple):
    """A layout of memory. bits: of a code, 0 where there are none or their widths differ."""

    kind: int
    bits: int = 0


class TokenRange(NamedTuple):
    """Integers over the range of each token's coordinates, as `integer` chooses them."""

    bits: int


class ChannelGrid(NamedTuple):
    """Integers over a part of the range of each channel in a block, as `per_channel` chooses them.

    shares: parts of the range to try. wider: steps of the scales' grid to try for a block with an outlier.
    """

    bits: int
    shares: tuple[float, ...]
    wider: int


class WidthSearch(NamedTuple):
    """A width for every channel of a block, as `mixed` chooses them.

    block_bytes: for codes and metadata of a block. narrow, wide: parts of the range to try for narrow and wide codes.
    """

    block_bytes: int
    narrow: tuple[float, ...]
    wide: tuple[float, ...]


Encoding = TokenRange | ChannelGrid | WidthSearch
