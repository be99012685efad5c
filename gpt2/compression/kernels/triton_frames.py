"""Queries that a basis of un-rotated keys absorbs on a GPU: for every frame of tokens one of its own.

One launch for all frames of a layer rotates queries back, multiplies them with the basis, and writes them as attention
reads them. PyTorch would write rotated queries, their products and a copy of these, and its product in float32 has no
tensor cores: by operations it would take longer than all else but unpacking codes. What is written is read again at
once, as many bytes as codes of four bits take: so it has 16 bits where that suffices (`dispatch.rounds_queries`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64  # queries of frames, and columns of the basis, of a program
DEPTH = 32  # channels that are multiplied at a time: three products keep two halves of both sides in registers


@triton.jit(do_not_specialize=["frames", "angles_b", "M"])
def absorb_frames(
    q_ptr, basis_ptr, angles_ptr, out, bias_out, frames, angles_b, M, H,
    GROUP: tl.constexpr, RANK: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries of ROWS pairs of a frame and a query, of one KV head, times COLUMNS columns of its basis.

    q [B, H, M, HEAD_DIM], basis [H, RANK + 1, HEAD_DIM], angles [B or 1, frames, 2, PAIRS] → out [B · H / GROUP,
    frames, GROUP · M, RANK], and bias_out without the last dimension: the product with the last row of the basis, which
    is the mean. GROUP: heads that share a code. DEPTH: channels that are multiplied at a time. PRECISION: of products,
    as `tl.dot` has it.
    """
    head, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    frame, m = row // M, row % M
    there, used = (frame < frames)[:, None], (column < RANK)[:, None]
    own_q = q_ptr + (head * M + m)[:, None] * HEAD_DIM
    own_basis = basis_ptr + (head % H) * (RANK + 1) * HEAD_DIM
    own_angles = angles_ptr + (head // H).to(tl.int64) * angles_b + (frame * 2 * PAIRS)[:, None]
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias = tl.zeros([ROWS], tl.float32)
    for first in range(0, HEAD_DIM, DEPTH):
        c = first + tl.arange(0, DEPTH)
        is_channel, turned = (c < HEAD_DIM)[None, :], (c < 2 * PAIRS)[None, :]
        if INTERLEAVED:
            pair, other, sign = c // 2, c ^ 1, tl.where(c % 2 == 0, 1.0, -1.0)
        else:
            pair, other, sign = c % PAIRS, (c + PAIRS) % (2 * PAIRS), tl.where(c < PAIRS, 1.0, -1.0)
        q = tl.load(own_q + c[None, :], mask=there & is_channel, other=0.0).to(tl.float32)
        partner = tl.load(own_q + other[None, :], mask=there & turned, other=0.0).to(tl.float32)
        cos = tl.load(own_angles + pair[None, :], mask=there & turned, other=1.0)
        sin = tl.load(own_angles + PAIRS + pair[None, :], mask=there & turned, other=0.0)
        q = q * cos + partner * sin * sign[None, :]
        basis = tl.load(own_basis + column[:, None] * HEAD_DIM + c[None, :], mask=used & is_channel, other=0.0)
        x = tl.dot(q, tl.trans(basis), x, input_precision=PRECISION)
        # The mean may be far larger than all else, and is summed in float32
        mean = tl.load(own_basis + RANK * HEAD_DIM + c, mask=c < HEAD_DIM, other=0.0)
        bias += tl.sum(q * mean[None, :], 1)
    place = ((head // GROUP).to(tl.int64) * frames + frame) * (GROUP * M) + (head % GROUP) * M + m
    places = out + place[:, None] * RANK + column[None, :]
    tl.store(places, x.to(out.dtype.element_ty), mask=there & (column < RANK)[None, :])
    if tl.program_id(2) == 0:
        tl.store(bias_out + place, bias, mask=frame < frames)


def absorbed(
    q: Tensor, basis: Tensor, angles: Tensor, interleaved: bool, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries q [B, H, M, d] as codes are compared with them in each of n frames, and what the mean adds to scores.

    basis [G, h, r + 1, d] of `Transform.read_basis`, angles [n, 2, pairs] or [B, n, 2, pairs] of
    `Transform.frame_rotation`, both float32 → [B, G, n, h · M, r] and [B, G, n, h · M], float32. rounded: the first in
    bfloat16, of products with about 11 bits of precision rather than 22.
    """
    (B, H, M, d), (G, h, rank) = q.shape, basis.shape[:3]
    rank, frames, angles = rank - 1, angles.shape[-3], angles.contiguous()
    out = q.new_empty(B, G, frames, h * M, rank, dtype=torch.bfloat16 if rounded else torch.float32)
    bias = q.new_empty(B, G, frames, h * M, dtype=torch.float32)
    grid = B * H, triton.cdiv(frames * M, ROWS), triton.cdiv(rank, COLUMNS)
    absorb_frames[grid](
        q.contiguous(), basis, angles, out, bias, frames, angles.stride(0) if angles.ndim == 4 else 0, M, H,
        GROUP=h, RANK=rank, HEAD_DIM=d, PAIRS=angles.shape[-1], INTERLEAVED=interleaved, ROWS=ROWS, COLUMNS=COLUMNS,
        DEPTH=DEPTH, PRECISION="tf32" if rounded else "tf32x3", num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out, bias
