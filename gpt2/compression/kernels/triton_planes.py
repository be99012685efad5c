"""Bit planes on a GPU: the search for each channel's width, and the codes, as `codecs.mixed` has them.

Three launches for any number of blocks, where PyTorch takes several hundred: one tries every width's grids, one chooses
widths block by block and places what is stored, and one writes codes. The arithmetic is that of `codecs.mixed`,
operation by operation, with two exceptions. Sums of squared errors are in another order, so that of two choices that
are equally good the other may be taken; and logarithms are approximate on GPUs, so that a scale halfway between two
bytes may become the other one.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2.compression.codecs import formats, mixed
from gpt2.compression.codecs.base import Encoded
from gpt2.compression.codecs.formats import WidthSearch
from gpt2.compression.kernels.triton_tiles import COUNT_BITS, OCTAVE, PLANE, SCALE_ZERO, WIDTH_TABLE, channel_places

BLOCK, MENU = tl.constexpr(formats.BLOCK), tl.constexpr(len(formats.WIDTHS))
METADATA, FAR, MOST_PLANES = (tl.constexpr(n) for n in (formats.METADATA, formats.FAR, formats.MOST_PLANES))
REACH, FAR_REACH, FAR_FROM = (tl.constexpr(float(n)) for n in (mixed.REACH, mixed.FAR_REACH, mixed.FAR_FROM))
WIDER = tl.constexpr(2 ** (0.5 / formats.OCTAVE))  # a step that is rounded down still reaches the offset
ROUNDING = tl.constexpr(1.5 * 2**23)  # added and taken away, it leaves a float32 rounded to even
OFFSET = tl.constexpr(2**15)  # added to offsets beside a scale in one number
STEPS = tl.constexpr(40)  # of the bisection
LANES = 64  # channels of a program
MOST_CHANNELS = 2**COUNT_BITS.value - 1


@triton.jit
def _rounded(x):
    """Numbers below 2²² rounded to even; larger ones, which are cut off afterwards, as they are."""
    return tl.where(tl.abs(x) < 4194304.0, (x + ROUNDING) - ROUNDING, x)


@triton.jit
def _width(index):
    """Bits of a width by its index, int32."""
    return ((tl.full([], WIDTH_TABLE, tl.uint32) >> (4 * index).to(tl.uint32)) & 15).to(tl.int32)


@triton.jit
def _unit(bits):
    """Steps per unit of an offset, for codes of so many bits."""
    return tl.maximum((1 << bits).to(tl.float32) * 0.015625, 0.25)


@triton.jit
def _codes(y, step, origin, last):
    """Codes of y [tokens, channels] as float32, 0 to `last`."""
    code = _rounded(tl.div_rn(y - origin[None, :], step[None, :]))
    return tl.minimum(tl.maximum(code, 0.0), last)


@triton.jit
def _error(y, step, origin, last):
    """Squared error of codes, summed over the tokens of y [tokens, channels]."""
    rest = y - (_codes(y, step, origin, last) * step[None, :] + origin[None, :])
    return tl.sum(rest * rest, 0)


@triton.jit
def _halves(z, block, channel, RANK: tl.constexpr):
    """The first and the last 32 tokens of a block's channels, [32, LANES] float32 each."""
    token = tl.arange(0, BLOCK // 2)
    places = z + block * (BLOCK * RANK) + token[:, None] * RANK + channel[None, :]
    mask = (channel < RANK)[None, :] & (token >= 0)[:, None]
    first = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(places + BLOCK // 2 * RANK, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def measure_grids(z, errors, grids, steps, factors, RANK: tl.constexpr, LANES: tl.constexpr, SHARES: tl.constexpr):
    """The best grid of one width for channels of a block: squared error, and scale and offset.

    z [blocks, 64, RANK]; errors [blocks, MENU, RANK] float32; grids, of the same shape, int32: the scale's byte in the
    lowest 8 bits, offset + OFFSET above. steps [256]: step of every scale. factors [MENU, SHARES]: share / last code of
    the shares to try; of equal errors the first counts, and a negative one isn't tried.
    """
    block, index = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)
    first, second = _halves(z, block, channel, RANK)
    least = tl.sum(first * first, 0) + tl.sum(second * second, 0)
    grid = tl.full([LANES], 0, tl.int32)
    if index > 0:
        low = tl.minimum(tl.min(first, 0), tl.min(second, 0))
        high = tl.maximum(tl.max(first, 0), tl.max(second, 0))
        bits = _width(index)
        last, unit, middle = ((1 << bits) - 1).to(tl.float32), _unit(bits), (low + high) * 0.5
        away = tl.div_rn(tl.abs(middle), tl.full([LANES], REACH, tl.float32) * unit)
        far = away > tl.div_rn(tl.full([LANES], FAR_FROM, tl.float32), last + tl.zeros([LANES], tl.float32)) * (
            high - low
        )
        reach = tl.where(far, FAR_REACH, REACH)
        needed = tl.div_rn(tl.abs(middle), reach * unit) * WIDER
        least = tl.full([LANES], float("inf"), tl.float32)
        for i in range(SHARES):
            factor = tl.load(factors + index * SHARES + i)
            if factor > 0:
                wanted = tl.maximum(tl.maximum((high - low) * factor, needed), 1e-30)
                scale = tl.minimum(tl.maximum(_rounded(tl.log2(wanted) * OCTAVE) + SCALE_ZERO, 0.0), 255.0).to(tl.int32)
                step = tl.load(steps + scale)
                offset = _rounded(tl.div_rn(tl.div_rn(middle, step), tl.full([LANES], 1.0, tl.float32) * unit))
                offset = tl.minimum(tl.maximum(offset, -reach), reach)
                origin = step * (unit * offset - last * 0.5)
                error = _error(first, step, origin, last) + _error(second, step, origin, last)
                better = error < least
                least = tl.where(better, error, least)
                grid = tl.where(better, ((offset.to(tl.int32) + OFFSET) << 8) | scale, grid)
    own = (block * MENU + index) * RANK + channel
    tl.store(errors + own, least, mask=channel < RANK)
    tl.store(grids + own, grid, mask=channel < RANK)


@triton.jit
def choose_widths(errors, grids, blocks, widths, chosen, payload, RANK: tl.constexpr, R: tl.constexpr):
    """Widths of a block of least total error within its payload, and all that is stored of it but codes.

    errors, grids: of `measure_grids` → metadata and far offsets in blocks [blocks, payload], packed indices in widths
    [blocks, 3 · ⌈RANK / 8⌉], and for the codes chosen [blocks, 2, RANK] int32: the grid, and the first plane with the
    width in the lowest 8 bits.
    """
    block = tl.program_id(0).to(tl.int64)
    index, channel = tl.arange(0, MENU), tl.arange(0, R)
    places = (block * MENU + index)[:, None] * RANK + channel[None, :]
    there = (channel < RANK)[None, :] & (index >= 0)[:, None]
    error = tl.load(errors + places, mask=there, other=0.0)
    grid = tl.load(grids + places, mask=there, other=0)
    bits = _width(index)
    is_far = tl.abs(((grid >> 8) - OFFSET).to(tl.float32)) > REACH
    size = PLANE * bits[:, None] + METADATA + tl.where(is_far, FAR, 0)
    size = tl.where((index > 0)[:, None], size, 0)
    few = tl.full([], 1e-30, tl.float64)
    many = tl.sum(tl.sum(error.to(tl.float64), 1), 0) + 1e-30
    for _ in range(STEPS):
        price = tl.sqrt(few * many)
        choice = tl.argmin(error + price.to(tl.float32) * size.to(tl.float32), 0, tie_break_left=True)
        spent = tl.sum(tl.sum(tl.where(index[:, None] == choice[None, :], size, 0), 1), 0)
        fits = spent <= payload
        few, many = tl.where(fits, few, price), tl.where(fits, price, many)
    choice = tl.argmin(error + many.to(tl.float32) * size.to(tl.float32), 0, tie_break_left=True)
    # Where coordinates are NaN, costs are too, and any index may be the least: nothing may be written beyond the block
    spent = tl.sum(tl.sum(tl.where(index[:, None] == choice[None, :], size, 0), 1), 0)
    choice = tl.where((channel < RANK) & (spent <= payload), choice, 0).to(tl.int32)
    is_chosen = index[:, None] == choice[None, :]
    own_grid = tl.sum(tl.where(is_chosen, grid, 0), 0)
    far = (tl.sum((is_chosen & is_far).to(tl.int32), 0) > 0) & (choice > 0)
    width, planes_before, coded_before, all_planes = channel_places(choice, R)
    row, coded = blocks + block * payload, width > 0
    offset = (own_grid >> 8) - OFFSET
    metadata = row + all_planes * PLANE + coded_before * METADATA
    tl.store(metadata, (own_grid & 255).to(tl.uint8), mask=coded)
    tl.store(metadata + 1, tl.where(far, 0, offset + 128).to(tl.uint8), mask=coded)
    behind = row + all_planes * PLANE + tl.sum(coded.to(tl.int32), 0) * METADATA
    far_place = behind + (tl.cumsum(far.to(tl.int32), 0) - far.to(tl.int32)) * FAR
    tl.store(far_place, (offset & 255).to(tl.uint8), mask=far)
    tl.store(far_place + 1, ((offset >> 8) & 255).to(tl.uint8), mask=far)
    own = chosen + block * 2 * RANK + channel
    tl.store(own, own_grid, mask=channel < RANK)
    tl.store(own + RANK, (planes_before << 8) | width, mask=channel < RANK)
    row_bytes: tl.constexpr = (RANK + 7) // 8
    byte = tl.arange(0, R // 8)
    for plane in tl.static_range(3):
        packed = tl.sum((((choice >> plane) & 1) << (channel % 8)).reshape(R // 8, 8), 1)
        tl.store(
            widths + block * (3 * row_bytes) + plane * row_bytes + byte, packed.to(tl.uint8), mask=byte < row_bytes
        )


@triton.jit
def write_planes(z, blocks, chosen, steps, payload, RANK: tl.constexpr, LANES: tl.constexpr):
    """Codes of channels of a block, each with the width and grid that `choose_widths` chose, as planes."""
    block = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)
    first, second = _halves(z, block, channel, RANK)
    own = chosen + block * 2 * RANK + channel
    grid = tl.load(own, mask=channel < RANK, other=0)
    placed = tl.load(own + RANK, mask=channel < RANK, other=0)
    width, plane_place = placed & 255, placed >> 8
    step = tl.load(steps + (grid & 255))
    last = ((1 << width) - 1).to(tl.float32)
    origin = step * (_unit(width) * ((grid >> 8) - OFFSET).to(tl.float32) - last * 0.5)
    low = _codes(first, step, origin, last[None, :]).to(tl.int32)
    high = _codes(second, step, origin, last[None, :]).to(tl.int32)
    token = tl.arange(0, BLOCK // 2)[:, None]
    row = (blocks + block * payload + plane_place * PLANE).to(tl.pointer_type(tl.int32))
    for plane in tl.static_range(MOST_PLANES):
        taken = plane < width
        tl.store(row + 2 * plane, tl.sum(((low >> plane) & 1) << token, 0), mask=taken)
        tl.store(row + 2 * plane + 1, tl.sum(((high >> plane) & 1) << token, 0), mask=taken)


def encoded(encoding: WidthSearch, z: Tensor, steps: Tensor) -> Encoded | None:
    """z [B, G, T, r] as `codecs.mixed.Mixed` stores it; None for more channels than the kernels take.

    steps [256] float32: step of every scale's byte, on the device of z.
    """
    B, G, T, rank = z.shape
    if rank > MOST_CHANNELS:
        return None
    n, lanes, R = T // formats.BLOCK, triton.cdiv(rank, LANES), max(triton.next_power_of_2(rank), 16)
    block = z.new_zeros(B, G, n, encoding.block_bytes, dtype=torch.uint8)
    widths = z.new_empty(B, G, n, mixed.width_bytes(rank), dtype=torch.uint8)
    errors = z.new_empty(B * G * n, MENU.value, rank, dtype=torch.float32)
    grids, chosen = torch.empty_like(errors, dtype=torch.int32), z.new_empty(B * G * n, 2, rank, dtype=torch.int32)
    factors = share_factors(encoding, z.device)
    measure_grids[(B * G * n, lanes, MENU.value)](
        z, errors, grids, steps, factors, RANK=rank, LANES=LANES, SHARES=factors.shape[1], enable_fp_fusion=False
    )
    choose_widths[(B * G * n,)](
        errors, grids, block, widths, chosen, encoding.block_bytes, RANK=rank, R=R, enable_fp_fusion=False
    )
    write_planes[(B * G * n, lanes)](
        z, block, chosen, steps, encoding.block_bytes, RANK=rank, LANES=LANES, enable_fp_fusion=False
    )
    return {"block": block, "widths": widths}


@cache
def share_factors(encoding: WidthSearch, device: torch.device) -> Tensor:
    """Share of a range / last code of the shares to try for every width, [MENU, most shares]; -1 for none."""
    most = max(len(encoding.narrow), len(encoding.wide))
    rows = []
    for bits in formats.WIDTHS:
        shares = encoding.narrow if bits <= mixed.WIDEST_NARROW else encoding.wide
        rows.append([share / max(2**bits - 1, 1) for share in shares] + [-1.0] * (most - len(shares)))
    return torch.tensor(rows, dtype=torch.float32, device=device)  # not PyTorch's default dtype, which users change
