"""One decoder per format: it unpacks a tile of 64 stored tokens into integer codes for a dot product.

A decoder returns codes [64, R], and scale and offset along one axis, such that ẑ = code · scale + offset:

    NONE     the codes are ẑ themselves
    TOKEN    scale and offset [64]: attention applies them to scores and to probabilities
    CHANNEL  scale and offset [R]: attention applies them to the query and to the tile's sum

So the only computation per element is that of the code. Codes have at most ten bits, which float16 holds exactly.

Arguments of every decoder: fields, pointers to the format's tensors, [B · G, room, …], where `room` is the number of
blocks that a chunk of storage has space for; group, an index into B · G; start, the tile's first token in the chunk,
which is negative if the tile begins before it; inside [64], which tokens to read; RANK channels; R slots for them, a
power of two; DTYPE of the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gpt2.compression.codecs import formats
from gpt2.compression.codecs.formats import Format

TILE = tl.constexpr(64)
NONE, TOKEN, CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
OCTAVE, SCALE_ZERO = tl.constexpr(formats.OCTAVE), tl.constexpr(formats.SCALE_ZERO)
PLANES, PLANE = tl.constexpr(formats.MOST_PLANES), tl.constexpr(formats.PLANE)
METADATA = tl.constexpr(formats.METADATA)
CLASSES = tl.constexpr(len(formats.WIDTHS))
WIDTH_TABLE = tl.constexpr(sum(width << 4 * index for index, width in enumerate(formats.WIDTHS)))  # 4 bits each
COUNT_BITS = tl.constexpr(9)  # bits of a count of up to 511 channels: counts of seven classes fit into an int64
MOST_CHANNELS = 384  # of more than 256, a tile's codes take 64 KiB and registers spill


@triton.jit
def as_float(codes, DTYPE: tl.constexpr):
    """Integers from 0 to 1023 as DTYPE."""
    if tl.float16 == DTYPE:
        # Set the bits of the float16 1024 + code, then subtract 1024: a conversion has a quarter of the throughput
        return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    else:
        return codes.to(DTYPE)


@triton.jit
def channels(RANK: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr):
    """The channel of every slot, [R], and whether the slot has one. PAIRED: channels lie in two halves (`Decoder`)."""
    slot = tl.arange(0, R)
    if PAIRED:
        half: tl.constexpr = (RANK + 1) // 2
        place = slot % (R // 2)
        channel = tl.where(slot < R // 2, place, half + place)
        return channel, (place < half) & (channel < RANK)
    else:
        return slot, slot < RANK


@triton.jit
def _rows(room, group, start):
    """Index of every token's row, [64] int64."""
    return group.to(tl.int64) * room + start + tl.arange(0, TILE)


@triton.jit
def plain_tile(fields, room, group, start, inside, RANK: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr):
    channel = tl.arange(0, R)
    places = (_rows(room, group, start) * RANK)[:, None] + channel[None, :]
    z = tl.load(fields[0] + places, mask=inside[:, None] & (channel < RANK)[None, :], other=0.0)
    return z.to(DTYPE), 0.0, 0.0


@triton.jit
def int8_tile(fields, room, group, start, inside, RANK: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr):
    channel = tl.arange(0, R)
    rows = _rows(room, group, start)
    mask = inside[:, None] & (channel < RANK)[None, :]
    codes = tl.load(fields[0] + (rows * RANK)[:, None] + channel[None, :], mask=mask, other=0)
    scale = tl.load(fields[1] + rows, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(fields[2] + rows, mask=inside, other=0.0).to(tl.float32)
    return as_float(codes, DTYPE), scale, offset


@triton.jit
def int4_tile(fields, room, group, start, inside, RANK: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr):
    half: tl.constexpr = (RANK + 1) // 2
    place = tl.arange(0, R // 2)
    rows = _rows(room, group, start)
    mask = inside[:, None] & (place < half)[None, :]
    packed = tl.load(fields[0] + (rows * half)[:, None] + place[None, :], mask=mask, other=0)
    scale = tl.load(fields[1] + rows, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(fields[2] + rows, mask=inside, other=0.0).to(tl.float32)
    nibbles = tl.join(as_float(packed & 15, DTYPE), as_float(packed >> 4, DTYPE))  # [64, R / 2, 2]
    return nibbles.permute(0, 2, 1).reshape(TILE, R), scale, offset


@triton.jit
def _block(room, group, start):
    """Index of the tile's block, int64."""
    return group.to(tl.int64) * room + start // TILE


@triton.jit
def _channel_grid(fields, block, RANK: tl.constexpr, R: tl.constexpr):
    """Step and value of code 0 of a block's channels, [R] each."""
    channel = tl.arange(0, R)
    exponent = tl.load(fields[1] + block * RANK + channel, mask=channel < RANK, other=0).to(tl.float32)
    offset = tl.load(fields[2] + block * RANK + channel, mask=channel < RANK, other=0.0).to(tl.float32)
    return tl.exp2((exponent - SCALE_ZERO) / OCTAVE), offset


@triton.jit
def int8_channel_tile(fields, room, group, start, inside, RANK: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr):
    block, channel = _block(room, group, start), tl.arange(0, R)
    step, offset = _channel_grid(fields, block, RANK, R)
    places = tl.arange(0, TILE)[:, None] * RANK + channel[None, :]
    codes = tl.load(fields[0] + block * (TILE * RANK) + places, mask=(channel < RANK)[None, :], other=0)
    return as_float(codes, DTYPE), step, offset


@triton.jit
def int4_channel_tile(fields, room, group, start, inside, RANK: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr):
    block, channel = _block(room, group, start), tl.arange(0, R)
    step, offset = _channel_grid(fields, block, RANK, R)
    places = tl.arange(0, TILE // 2)[:, None] * RANK + channel[None, :]
    packed = tl.load(fields[0] + block * (TILE // 2 * RANK) + places, mask=(channel < RANK)[None, :], other=0)
    nibbles = tl.join(as_float(packed & 15, DTYPE), as_float(packed >> 4, DTYPE))  # [32, R, 2]
    return nibbles.permute(2, 0, 1).reshape(TILE, R), step, offset


@triton.jit
def planes_tile(fields, room, group, start, inside, RANK: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr):
    """fields: block, packed width indices, number of bytes of a block."""
    block, channel = _block(room, group, start), tl.arange(0, R)
    row_bytes: tl.constexpr = (RANK + 7) // 8
    row = fields[1] + block * (3 * row_bytes)
    classes = tl.zeros([R], tl.int32)
    for plane in tl.static_range(3):
        part = tl.load(row + plane * row_bytes + channel // 8, mask=channel < RANK, other=0).to(tl.int32)
        classes |= ((part >> (channel % 8)) & 1) << plane
    # Blocks of this format consist of whole planes, so every plane is at a multiple of 8 bytes
    return _planes_tile(fields[0] + block * fields[2], classes, R, DTYPE, True, True)


@triton.jit
def fixed_planes_tile(fields, room, group, start, inside, RANK: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr):
    """fields: block, width indices [groups, RANK] uint8, number of bytes of a block, number of groups."""
    block, channel = _block(room, group, start), tl.arange(0, R)
    own = fields[1] + (group % fields[3]) * RANK + channel
    classes = tl.load(own, mask=channel < RANK, other=0).to(tl.int32)
    return _planes_tile(fields[0] + block * fields[2], classes, R, DTYPE, False, False)


@triton.jit
def _planes_tile(row, classes, R: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FAR: tl.constexpr):
    """Decode a block of bit planes at `row`. classes [R]: width index of each channel.

    ALIGNED: planes are aligned to 8 bytes, else to 2. FAR: whether there may be far offsets (see `codecs.mixed`).
    """
    width, planes_before, coded_before, all_planes = channel_places(classes, R)
    metadata = (row + all_planes * PLANE + coded_before * METADATA).to(tl.pointer_type(tl.uint16))
    both = tl.load(metadata, mask=width > 0, other=0).to(tl.int32)
    step = tl.where(width > 0, tl.exp2(((both & 255) - SCALE_ZERO).to(tl.float32) / OCTAVE), 0.0)
    offset = (both >> 8) - 128
    if FAR:
        far = ((width > 0) & (offset == -128)).to(tl.int32)
        behind = (row + all_planes * PLANE + tl.sum((width > 0).to(tl.int32), 0) * METADATA).to(
            tl.pointer_type(tl.int16)
        )
        own = tl.load(behind + tl.cumsum(far, 0) - far, mask=far > 0, other=0)
        offset = tl.where(far > 0, own.to(tl.int32), offset)
    values = (1 << width).to(tl.float32)
    zero = step * (tl.maximum(values / 64, 0.25) * offset.to(tl.float32) - (values - 1) / 2)
    pairs = _transposed(row, planes_before, width, R, ALIGNED)
    if tl.max(width, 0) > 8:
        pairs |= _ninth_bits(row, planes_before, width, ALIGNED)
    codes = tl.join(as_float(pairs & 0xFFFF, DTYPE), as_float(pairs >> 16, DTYPE))  # [R, half, 8, byte % 2, byte // 2]
    codes = codes.permute(0, 1, 4, 3, 2).reshape(R, TILE)
    return tl.trans(codes), step, zero


@triton.jit
def _transposed(row, planes_before, width, R: tl.constexpr, ALIGNED: tl.constexpr):
    """The lowest 8 bits of all codes, [R, 2, 8, 2] uint32, each of two codes, in the low and in the high 16 bits.

    The codes are of the tokens 32 h + 8 b + i for the indices [h, i, b % 2], with b // 2 = 0 low and 1 high. Eight
    planes of four bytes are four matrices of 8 by 8 bits, byte b of each plane a row: three rounds of exchanges
    transpose all four at once, which takes two instructions per code instead of three per code and plane. The loads
    don't depend on each other and so can overlap.
    """
    w0 = _words(row, planes_before, width, 0, ALIGNED)
    w1 = _words(row, planes_before, width, 1, ALIGNED)
    w2 = _words(row, planes_before, width, 2, ALIGNED)
    w3 = _words(row, planes_before, width, 3, ALIGNED)
    w4 = _words(row, planes_before, width, 4, ALIGNED)
    w5 = _words(row, planes_before, width, 5, ALIGNED)
    w6 = _words(row, planes_before, width, 6, ALIGNED)
    w7 = _words(row, planes_before, width, 7, ALIGNED)
    w0, w4 = _exchanged(w0, w4, 4, 0x0F0F0F0F)
    w1, w5 = _exchanged(w1, w5, 4, 0x0F0F0F0F)
    w2, w6 = _exchanged(w2, w6, 4, 0x0F0F0F0F)
    w3, w7 = _exchanged(w3, w7, 4, 0x0F0F0F0F)
    w0, w2 = _exchanged(w0, w2, 2, 0x33333333)
    w1, w3 = _exchanged(w1, w3, 2, 0x33333333)
    w4, w6 = _exchanged(w4, w6, 2, 0x33333333)
    w5, w7 = _exchanged(w5, w7, 2, 0x33333333)
    w0, w1 = _exchanged(w0, w1, 1, 0x55555555)
    w2, w3 = _exchanged(w2, w3, 1, 0x55555555)
    w4, w5 = _exchanged(w4, w5, 1, 0x55555555)
    w6, w7 = _exchanged(w6, w7, 1, 0x55555555)
    even, odd = tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7))
    words = tl.join(even, odd).reshape(R, 2, 8)  # one code in each byte
    return tl.join(words & 0x00FF00FF, (words >> 8) & 0x00FF00FF)


@triton.jit
def _ninth_bits(row, planes_before, width, ALIGNED: tl.constexpr):
    """The bits of all codes from the ninth on, as `_transposed` has the lowest."""
    place = (tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 2)[None, :])[None, None, :, :]
    pairs = (_words(row, planes_before, width, 8, ALIGNED)[:, :, None, None] >> place & 0x00010001) << 8
    for plane in tl.static_range(9, PLANES):
        pairs |= (_words(row, planes_before, width, plane, ALIGNED)[:, :, None, None] >> place & 0x00010001) << plane
    return pairs


@triton.jit
def _exchanged(a, b, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """a and b with a's bits at MASK << SHIFT and b's at MASK exchanged."""
    differ = ((a >> SHIFT) ^ b) & MASK
    return a ^ (differ << SHIFT), b ^ differ


@triton.jit
def _words(row, planes_before, width, plane: tl.constexpr, ALIGNED: tl.constexpr):
    """One plane of every channel, [R, 2] uint32 of 32 tokens each; 0 where the channel has fewer."""
    low, high = _plane(row + (planes_before + plane) * PLANE, plane < width, ALIGNED)
    return tl.join(low, high)


@triton.jit
def _plane(places, taken, ALIGNED: tl.constexpr):
    """The 64 bits of the planes at the addresses `places` [R], as two uint32."""
    if ALIGNED:
        word = tl.load(places.to(tl.pointer_type(tl.uint64)), mask=taken, other=0)
        return word.to(tl.uint32), (word >> 32).to(tl.uint32)
    else:
        quarters = places.to(tl.pointer_type(tl.uint16))
        low = tl.load(quarters, mask=taken, other=0).to(tl.uint32)
        low |= tl.load(quarters + 1, mask=taken, other=0).to(tl.uint32) << 16
        high = tl.load(quarters + 2, mask=taken, other=0).to(tl.uint32)
        high |= tl.load(quarters + 3, mask=taken, other=0).to(tl.uint32) << 16
        return low, high


@triton.jit
def channel_places(classes, R: tl.constexpr):
    """Positions of channels in a block that is sorted by falling width.

    Returns each channel's width, number of planes before it and number of coded channels before it, [R] each, and the
    number of all planes. It is a counting sort in one scan: an int64 holds the counts of all seven widths above 0.
    """
    width = ((tl.full([R], WIDTH_TABLE, tl.uint32) >> (4 * classes).to(tl.uint32)) & 15).to(tl.int32)
    shift = (tl.maximum(classes - 1, 0) * COUNT_BITS).to(tl.int64)
    one = tl.where(classes > 0, tl.full([R], 1, tl.int64) << shift, 0)
    before = (((tl.cumsum(one, 0) - one) >> shift) & 511).to(tl.int32)
    total = tl.sum(one, 0)
    planes_before, all_planes = before * width, 0
    for index in tl.static_range(1, CLASSES):
        count = ((total >> (COUNT_BITS * (index - 1))) & 511).to(tl.int32)
        planes = count * ((WIDTH_TABLE >> (4 * index)) & 15)
        all_planes += planes
        planes_before += tl.where(classes < index, planes, 0)
        before += tl.where(classes < index, count, 0)
    return width, planes_before, before, all_planes


def _planes_arguments(tensors: list[Tensor]) -> tuple:
    block, widths = tensors
    return block, widths, block.shape[-1]


def _fixed_planes_arguments(tensors: list[Tensor]) -> tuple:
    block, widths = tensors
    return block, widths, block.shape[-1], block.shape[1]


class Decoder(NamedTuple):
    """How a format is read: its kernel function, and the axis of scale and offset.

    paired: channels lie in two halves, one in the low and one in the high nibbles of the same bytes. arguments: from
    the format's tensors to the function's `fields`. stages: Triton's num_stages, one more than the tiles that are
    loaded ahead; of bit planes none is, since what is loaded ahead takes shared memory, which their codes need.
    """

    tile: triton.JITFunction
    axis: int
    paired: bool = False
    arguments: Callable[[list[Tensor]], tuple] = tuple
    stages: int = 3


# Quantizers with other formats work through PyTorch
DECODERS: dict[Format, Decoder] = {
    Format(formats.EXACT): Decoder(plain_tile, NONE.value),
    Format(formats.TOKEN, 8): Decoder(int8_tile, TOKEN.value),
    Format(formats.TOKEN, 4): Decoder(int4_tile, TOKEN.value, paired=True),
    Format(formats.CHANNEL, 8): Decoder(int8_channel_tile, CHANNEL.value),
    Format(formats.CHANNEL, 4): Decoder(int4_channel_tile, CHANNEL.value),
    Format(formats.PLANES): Decoder(planes_tile, CHANNEL.value, arguments=_planes_arguments, stages=1),
    Format(formats.FIXED_PLANES): Decoder(
        fixed_planes_tile, CHANNEL.value, arguments=_fixed_planes_arguments, stages=1
    ),
}
