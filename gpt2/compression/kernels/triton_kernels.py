"""Attention over tiles of 64 stored tokens: partial results of many splits, which `triton_merge` merges.

A program handles all queries of one group of KV heads and some consecutive tiles (split-K, as in flash-decoding).
Tokens are the rows of both products and queries their columns: then codes are the first operand, which tensor cores
can take from registers, and few queries suffice to fill a tile of 16. For each token and group only the stored bytes
are read, once for all queries: with 128 channels K and V take 136 bytes at int4, 140 at int4_channel, 512 at 16 bits.
Each split writes 4 · M · (r + 2) bytes.

Every operation of PyTorch beside a kernel takes the host's time, in each layer and step. So scaling is done here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpt2.compression.kernels.triton_tiles import NONE, TILE, TOKEN, channels

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
TOP = tl.constexpr(10)  # float16 queries are scaled so that their largest entry is at most 2^TOP


@triton.jit
def _dot(a, b, SPLIT: tl.constexpr):
    """a @ b in float32, on tensor cores. SPLIT: if a has 16 bits, use 32 bits of b, in two products."""
    if a.dtype == tl.float32:
        # About 22 bits of precision. Full float32 has no tensor cores, and its operands spill out of registers
        return tl.dot(a, b, input_precision="tf32x3")
    high = b.to(a.dtype)
    total = tl.dot(a, high)
    if SPLIT:
        total = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), total)
    return total


@triton.jit
def _scores(codes, scale, offset, q, total, AXIS: tl.constexpr, SPLIT: tl.constexpr):
    """q · ẑ of a tile, [64, M]; q [R, M], total [M]: sums of q over channels."""
    if AXIS == NONE:
        return _dot(codes, q, SPLIT)
    elif AXIS == TOKEN:
        return _dot(codes, q, SPLIT) * scale[:, None] + offset[:, None] * total[None, :]
    else:
        # Scales span several orders of magnitude: relative to the largest, they fit into float16
        largest = tl.maximum(tl.max(scale, 0), 1e-30)
        x = _dot(codes, q * (scale / largest)[:, None], SPLIT)
        return x * largest + tl.sum(q * offset[:, None], 0)[None, :]


@triton.jit
def _add_values(acc, shift, codes, scale, offset, p, AXIS: tl.constexpr, SPLIT: tl.constexpr):
    """Add Σ p ẑ of a tile to acc [R, M] and, for terms that are equal in all channels, to shift [M]; p [64, M]."""
    codes = tl.trans(codes)
    if AXIS == NONE:
        acc += _dot(codes, p, SPLIT)
    elif AXIS == TOKEN:
        largest = tl.maximum(tl.max(scale, 0), 1e-30)
        acc += _dot(codes, p * (scale / largest)[:, None], SPLIT) * largest
        shift += tl.sum(p * offset[:, None], 0)
    else:
        acc += _dot(codes, p, SPLIT) * scale[:, None] + offset[:, None] * tl.sum(p, 0)[None, :]
    return acc, shift


@triton.jit
def _queries(q_ptr, bias_ptr, entry, M, scaling, RANK: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
             PAIRED: tl.constexpr, DTYPE: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Queries of an entry, of a group or of a group's frame, divided by a unit each: [R, ROWS] float32; and of each,
    [ROWS], the sum over channels, what its scores are multiplied by, and what is added to them then.

    BIAS: 0 no bias, 1 an array of its own, 2 the coordinate behind the query's last."""
    m = tl.arange(0, ROWS)
    channel, there = channels(RANK, R, PAIRED)
    stride: tl.constexpr = RANK + 1 if BIAS == 2 else RANK
    row = q_ptr + (entry * M + m).to(tl.int64) * stride
    q = tl.load(row[None, :] + channel[:, None], mask=(m < M)[None, :] & there[:, None], other=0.0).to(tl.float32)
    unit = tl.full([ROWS], 1.0, tl.float32)
    if tl.float16 == DTYPE:
        # A power of two, so that float16 queries stay exact, away from float16's largest and smallest numbers
        unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(q), 0), 1e-30))) - TOP)
    q = q / unit[None, :]
    bias = tl.zeros([ROWS], tl.float32)
    if BIAS == 1:
        bias = tl.load(bias_ptr + entry * M + m, mask=m < M, other=0.0) * scaling
    elif BIAS == 2:
        bias = tl.load(row + RANK, mask=m < M, other=0.0) * scaling
    return q, tl.sum(q, 0), unit * scaling, bias


@triton.jit
def capped(x, softcap):
    """softcap · tanh(x / softcap)"""
    return softcap * (1 - 2 / (1 + tl.exp2(x * (2 * LOG2E / softcap))))


@triton.jit
def _masked(x, mask_ptr, group, position, inside, M, heads, queries, mask_b, mask_h, mask_q, mask_t, groups,
            MASK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Scores x [64, M] with the mask applied. MASK: 0 no mask, 1 depends on the token, 2 on query and token."""
    if MASK == 0:
        return x
    row = mask_ptr + (group // groups).to(tl.int64) * mask_b
    if MASK == 1:
        seen = tl.load(row + position * mask_t, mask=inside, other=0)[:, None]
    else:
        m = tl.arange(0, ROWS)
        own = ((group % groups) * heads + m // queries).to(tl.int64) * mask_h + (m % queries) * mask_q
        places = own[None, :] + (position * mask_t)[:, None]
        seen = tl.load(row + places, mask=inside[:, None] & (m < M)[None, :], other=0)
    if mask_ptr.dtype.element_ty == tl.uint8:  # a boolean mask
        return tl.where(seen != 0, x, LOWEST)
    return x + seen.to(tl.float32)


# Arguments that change from step to step; Triton must not compile a version for each of their values
_CHANGING = ["splits", "k_room", "v_room", "base", "first", "end", "k_start", "v_start", "first_split", "tiles",
             "tiles_each", "frames", "first_slot", "M", "heads", "queries", "mask_b", "mask_h", "mask_q",
             "mask_t"]  # fmt: skip


@triton.jit(do_not_specialize=_CHANGING)
def attend_tiles(
    q_ptr, bias_ptr, mask_ptr, partial, splits, k_fields, v_fields, k_room, v_room, base, first, end, k_start, v_start,
    first_split, tiles, tiles_each, frames, first_slot, M, groups, heads, queries, mask_b, mask_h, mask_q, mask_t,
    scaling, softcap,
    K_TILE: tl.constexpr, V_TILE: tl.constexpr, K_AXIS: tl.constexpr, V_AXIS: tl.constexpr, K_PAIRED: tl.constexpr,
    V_PAIRED: tl.constexpr, K_RANK: tl.constexpr, V_RANK: tl.constexpr, K_R: tl.constexpr, V_R: tl.constexpr,
    K_DTYPE: tl.constexpr, V_DTYPE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, SPLIT_P: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, FRAMED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Partial attention of a group's queries over one split of a storage chunk of K and of V.

    q [B · G, M, K_RANK], and bias [B · G, M] float32 as `_queries` has it → partial: of each split sums of values,
    [splits, B · G, M, V_RANK], then largest scores, then sums of exponentials, [splits, B · G, M] each.
    FRAMED: each tile has queries of its own, q [B · G, frames, M, K_RANK] and bias [B · G, frames, M], of which the
    first are of the tile at position first_slot. SHARED: V has K's codes, which are then unpacked once for both.
    Positions in the sequence: base, of the first tile; first and end, of the tokens to attend to; k_start and v_start,
    of the first tokens of the chunks. M = heads · queries. Scores are multiplied by `scaling`.
    """
    group, split = tl.program_id(0), tl.program_id(1)
    m, t = tl.arange(0, ROWS), tl.arange(0, TILE)
    q, total_q, unit, bias = _queries(
        q_ptr, bias_ptr, group * frames, M, scaling, K_RANK, K_R, ROWS, K_PAIRED, K_DTYPE, BIAS
    )
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    shift = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([V_R, ROWS], tl.float32)
    for tile in range(split * tiles_each, tl.minimum((split + 1) * tiles_each, tiles)):
        start = base + tile * TILE
        position = start + t
        inside = (position >= first) & (position < end)
        if FRAMED:
            own_q = group * frames + (start - first_slot) // TILE
            q, total_q, unit, bias = _queries(
                q_ptr, bias_ptr, own_q, M, scaling, K_RANK, K_R, ROWS, K_PAIRED, K_DTYPE, BIAS
            )
        codes, scale, offset = K_TILE(k_fields, k_room, group, start - k_start, inside, K_RANK, K_R, K_DTYPE)
        x = _scores(codes, scale, offset, q, total_q, K_AXIS, SPLIT) * unit[None, :] + bias[None, :]
        if SOFTCAP:
            x = capped(x, softcap)
        x = _masked(x, mask_ptr, group, position, inside, M, heads, queries, mask_b, mask_h, mask_q, mask_t, groups,
                    MASK, ROWS)  # fmt: skip
        x = tl.where(inside[:, None], x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        p = tl.exp2((x - higher[None, :]) * LOG2E)
        fade = tl.exp2((top - higher) * LOG2E)
        top = higher
        total = total * fade + tl.sum(p, 0)
        if not SHARED:
            codes, scale, offset = V_TILE(v_fields, v_room, group, start - v_start, inside, V_RANK, V_R, V_DTYPE)
        acc, shift = _add_values(acc * fade[None, :], shift * fade, codes, scale, offset, p, V_AXIS, SPLIT_P)
    rows = tl.num_programs(0) * M
    own = (first_split + split).to(tl.int64) * rows + group * M + m
    channel, there = channels(V_RANK, V_R, V_PAIRED)
    places = partial + own[None, :] * V_RANK + channel[:, None]
    tl.store(places, acc + shift[None, :], mask=there[:, None] & (m < M)[None, :])
    maxima = partial + splits.to(tl.int64) * rows * V_RANK + own
    tl.store(maxima, top, mask=m < M)
    tl.store(maxima + splits * rows, total, mask=m < M)
