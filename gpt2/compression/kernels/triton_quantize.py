"""Quantization in kernels: integers by token, integers by channel of a block, and bit planes (`triton_planes`).

The arithmetic is that of `codecs.integer` and `codecs.per_channel`, operation by operation: IEEE division, rounding to
even, no fused multiply-add, and steps from a table that PyTorch computes. By token the result is the same bit for bit.
By channel it may differ in three nearly equal choices: the step, if its logarithm lies halfway between two bytes; the
share of the range, if two have the same squared error up to the order of the sum; and an offset on the bulk, if its
rounding to float16 is a tie.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

from gpt2.compression.codecs import formats, integer, per_channel
from gpt2.compression.codecs.base import HALF_MAX, Encoded
from gpt2.compression.codecs.formats import ChannelGrid, Encoding, TokenRange, WidthSearch
from gpt2.compression.kernels import triton_planes

log = logging.getLogger(__name__)
without_kernel: set[tuple] = set()  # encodings, dtypes and devices for which Triton can't compile one
BLOCK = tl.constexpr(formats.BLOCK)
OCTAVE, SCALE_ZERO = tl.constexpr(formats.OCTAVE), tl.constexpr(formats.SCALE_ZERO)
LARGEST, SMALLEST = tl.constexpr(HALF_MAX), tl.constexpr(integer.SMALLEST)
SMALLEST_NORMAL = tl.constexpr(integer.HALF.smallest_normal)
ROUNDING = tl.constexpr(1.5 * 2**23)  # added and taken away, it leaves a float32 rounded to even
ELEMENTS = 4096  # numbers per program, by token
MOST_CHANNELS = 16384
LANES = 64  # channels per program, by channel


def quantized(encoding: Encoding, z: Tensor) -> Encoded | None:
    """z [B, G, T, r] quantized in an encoding; None if there is no kernel for it."""
    kernel = KERNELS.get(type(encoding))
    if kernel is None or not z.is_floating_point() or not z.numel() or z.shape[-1] > MOST_CHANNELS:
        return None
    asked = (type(encoding), z.dtype, z.device)
    if asked in without_kernel:
        return None
    try:
        with torch.cuda.device_of(z):
            return kernel(encoding, (z.float() if z.dtype == torch.float64 else z).contiguous())
    except InterpreterError:
        raise
    except TritonError as error:  # of Triton's compiler or of ptxas, which may not know a newer GPU
        log.warning("Triton can't compile a kernel for %s, so PyTorch takes its place, slower: %s", asked, error)
        without_kernel.add(asked)
        return None


@triton.jit
def _code(z, offset, step, LEVELS: tl.constexpr):
    """Codes as float32, 0 to LEVELS."""
    code = tl.div_rn(z - offset, step)
    return (tl.minimum(tl.maximum(code, 0.0), LEVELS) + ROUNDING) - ROUNDING


@triton.jit
def _half_not_above(x):
    """The nearest float16 that is not above x."""
    rounded = x.to(tl.float16)
    bits = rounded.to(tl.int16, bitcast=True)
    below = tl.where(rounded > 0, bits - 1, bits + 1).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    below = tl.where(rounded == 0, -SMALLEST_NORMAL, below)
    return tl.where(rounded.to(tl.float32) > x, below, rounded.to(tl.float32))


@triton.jit(do_not_specialize=["tokens"])
def quantize_tokens(z, codes, scales, offsets, tokens, RANK: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr,
                    ROWS: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """z [tokens, RANK] → codes [tokens, HALF], scales and offsets [tokens]; if HALF < RANK, a byte has two codes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, R)
    first_mask = (row < tokens)[:, None] & (channel < HALF)[None, :]
    places = z + row[:, None] * RANK + channel[None, :]
    first = tl.load(places, mask=first_mask, other=0.0).to(tl.float32)
    low = tl.min(tl.where(first_mask, first, float("inf")), 1)
    high = tl.max(tl.where(first_mask, first, float("-inf")), 1)
    if HALF < RANK:
        second_mask = (row < tokens)[:, None] & (channel < RANK - HALF)[None, :]
        second = tl.load(places + HALF, mask=second_mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(second_mask, second, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(second_mask, second, float("-inf")), 1))
    offset = _half_not_above(tl.minimum(tl.maximum(low, -LARGEST), LARGEST))
    step = tl.div_rn(high - offset, tl.full([ROWS], LEVELS, tl.float32))
    step = tl.minimum(tl.maximum(step, SMALLEST), LARGEST).to(tl.float16)
    tl.store(scales + row, step, mask=row < tokens)
    tl.store(offsets + row, offset.to(tl.float16), mask=row < tokens)
    offset, step = offset[:, None], step.to(tl.float32)[:, None]
    packed = _code(first, offset, step, LEVELS).to(tl.uint8)
    if HALF < RANK:
        # With an odd rank the last upper nibble is 0
        above = tl.where(second_mask, _code(second, offset, step, LEVELS), 0.0).to(tl.uint8)
        packed = packed | (above << 4)
    tl.store(codes + row[:, None] * HALF + channel[None, :], packed, mask=first_mask)


@triton.jit
def _grid(low, high, factor, steps, LEVELS: tl.constexpr):
    """Byte of the scale, step and offset of each channel, for a share of its range; factor: share / LEVELS."""
    spread = high - low + tl.abs(low) * 0.0009765625  # 2^-10
    exponent = tl.log2(tl.maximum(spread * factor, 1e-30)) * OCTAVE
    exponent = (exponent + ROUNDING) - ROUNDING + SCALE_ZERO
    scale = tl.minimum(tl.maximum(exponent, 0.0), 255.0).to(tl.int32)
    step = tl.load(steps + scale)
    offset = (low + high) / 2 - step * (LEVELS / 2)
    return scale, step, tl.minimum(tl.maximum(offset, -LARGEST), LARGEST).to(tl.float16).to(tl.float32)


@triton.jit
def _squared_error(z, step, offset, LEVELS: tl.constexpr):
    """Squared error of codes, summed over the tokens of z [tokens, channels]."""
    error = z - (_code(z, offset[None, :], step[None, :], LEVELS) * step[None, :] + offset[None, :])
    return tl.sum(error * error, 0)


@triton.jit
def _both_errors(first, second, step, offset, LEVELS: tl.constexpr):
    return _squared_error(first, step, offset, LEVELS) + _squared_error(second, step, offset, LEVELS)


@triton.jit
def _total(first, second):
    return tl.sum(first, 0) + tl.sum(second, 0)


@triton.jit
def _on_the_bulk(first, second, scale, step, offset, mean, spread, apart, steps, LEVELS: tl.constexpr,
                 WIDER: tl.constexpr):  # fmt: skip
    """As `Int8Channel._on_the_bulk`, for the channels marked in `apart`; mean and spread: of all tokens."""
    near_first = (tl.abs(first - mean[None, :]) <= 2 * spread[None, :]).to(tl.float32)
    near_second = (tl.abs(second - mean[None, :]) <= 2 * spread[None, :]).to(tl.float32)
    count = _total(near_first, near_second)
    bulk = tl.div_rn(_total(first * near_first, second * near_second), count)
    least = _both_errors(first, second, step, offset, LEVELS) / 2
    start, origin = scale, offset
    for wider in range(WIDER):
        own_scale = tl.minimum(start + wider, 255)
        own_step = tl.load(steps + own_scale)
        code = (tl.div_rn(bulk - origin, own_step) + ROUNDING) - ROUNDING
        moved = bulk - tl.minimum(tl.maximum(code, 0.0), LEVELS) * own_step
        moved = tl.minimum(tl.maximum(moved, -LARGEST), LARGEST).to(tl.float16).to(tl.float32)
        error = _both_errors(first, second, own_step, moved, LEVELS)
        better = apart & (error < least)
        least = tl.where(better, error, least)
        scale, step = tl.where(better, own_scale, scale), tl.where(better, own_step, step)
        offset = tl.where(better, moved, offset)
    return scale, step, offset


@triton.jit
def quantize_blocks(z, codes, scales, offsets, steps, factors, RANK: tl.constexpr, LANES: tl.constexpr,
                    LEVELS: tl.constexpr, SHARES: tl.constexpr, WIDER: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """z [blocks, 64, RANK] → codes [blocks, 64 or 32, RANK], scales and offsets [blocks, RANK].

    steps [256]: step of every scale. factors: share / LEVELS of the shares to try; of equal errors the first counts.
    """
    block = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)
    half: tl.constexpr = BLOCK // 2
    token = tl.arange(0, half)
    mask = (channel < RANK)[None, :] & (token >= 0)[:, None]
    places = token[:, None] * RANK + channel[None, :]
    first = tl.load(z + block * (BLOCK * RANK) + places, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(z + block * (BLOCK * RANK) + half * RANK + places, mask=mask, other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(first, 0), tl.min(second, 0))
    high = tl.maximum(tl.max(first, 0), tl.max(second, 0))
    scale, step, offset = _grid(low, high, factors[0], steps, LEVELS)
    if SHARES > 1:
        least = _both_errors(first, second, step, offset, LEVELS)
        for i in tl.static_range(1, SHARES):
            own_scale, own_step, own_offset = _grid(low, high, factors[i], steps, LEVELS)
            error = _both_errors(first, second, own_step, own_offset, LEVELS)
            better = error < least
            least = tl.where(better, error, least)
            scale, step = tl.where(better, own_scale, scale), tl.where(better, own_step, step)
            offset = tl.where(better, own_offset, offset)
    if WIDER:
        mean = _total(first, second) / BLOCK
        spread = _total(tl.abs(first - mean[None, :]), tl.abs(second - mean[None, :])) / BLOCK
        apart = (step > spread) & (channel < RANK)
        if tl.max(apart.to(tl.int32), 0) > 0:
            scale, step, offset = _on_the_bulk(
                first, second, scale, step, offset, mean, spread, apart, steps, LEVELS, WIDER
            )
    own = block * RANK + channel
    tl.store(scales + own, scale.to(tl.uint8), mask=channel < RANK)
    tl.store(offsets + own, offset.to(tl.float16), mask=channel < RANK)
    first = _code(first, offset[None, :], step[None, :], LEVELS).to(tl.uint8)
    second = _code(second, offset[None, :], step[None, :], LEVELS).to(tl.uint8)
    if PACKED:
        tl.store(codes + block * (half * RANK) + places, first | (second << 4), mask=mask)
    else:
        tl.store(codes + block * (BLOCK * RANK) + places, first, mask=mask)
        tl.store(codes + block * (BLOCK * RANK) + half * RANK + places, second, mask=mask)


def _by_token(encoding: TokenRange, z: Tensor) -> Encoded:
    *shape, rank = z.shape
    half = rank if encoding.bits == 8 else -(-rank // 2)
    codes = z.new_empty(*shape, half, dtype=torch.uint8)
    scale, offset = (z.new_empty(*shape, 1, dtype=torch.float16) for _ in range(2))
    tokens, R = scale.numel(), triton.next_power_of_2(half)
    rows = max(ELEMENTS // R, 1) if tokens > 1 else 1
    quantize_tokens[(triton.cdiv(tokens, rows),)](
        z, codes, scale, offset, tokens, RANK=rank, HALF=half, R=R, ROWS=rows, LEVELS=2**encoding.bits - 1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return {"codes": codes, "scale": scale, "offset": offset}


def _by_channel(encoding: ChannelGrid, z: Tensor) -> Encoded:
    B, G, T, rank = z.shape
    packed, levels = encoding.bits == 4, 2**encoding.bits - 1
    n = T // formats.BLOCK
    codes = z.new_empty(B, G, n, formats.BLOCK * encoding.bits // 8, rank, dtype=torch.uint8)
    scale = z.new_empty(B, G, n, 1, rank, dtype=torch.uint8)
    offset = z.new_empty(B, G, n, 1, rank, dtype=torch.float16)
    factors = tuple(share / levels for share in encoding.shares)
    quantize_blocks[(B * G * n, triton.cdiv(rank, LANES))](
        z, codes, scale, offset, _steps(z.device), factors, RANK=rank, LANES=LANES, LEVELS=levels,
        SHARES=len(factors), WIDER=encoding.wider, PACKED=packed, enable_fp_fusion=False,
    )  # fmt: skip
    return {"codes": codes, "scale": scale, "offset": offset}


@cache
def _steps(device: torch.device) -> Tensor:
    """Step of every scale's byte, [256] float32."""
    return per_channel.step_of(torch.arange(256, device=device))


def _by_width(encoding: WidthSearch, z: Tensor) -> Encoded | None:
    return triton_planes.encoded(encoding, z, _steps(z.device))


# Encoding to its kernel; other encodings are quantized by PyTorch
KERNELS = {TokenRange: _by_token, ChannelGrid: _by_channel, WidthSearch: _by_width}
