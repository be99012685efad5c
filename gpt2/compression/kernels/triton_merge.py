"""The end of a decode step's attention in one kernel: exact tokens, splits of compressed ones, and the basis of values.

A program handles one query. Exact tokens, sinks and tail, are a few dozen, and `attend_tiles` has left partial results
of all others. One softmax is over both; of compressed tokens it gives Σ p ẑ, which is multiplied with the basis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpt2.compression.kernels.triton_kernels import LOG2E, LOWEST, capped

CHUNK = tl.constexpr(16)  # splits merged at a time
TOKENS = tl.constexpr(16)  # exact tokens at a time
COLUMNS = 64  # coordinates that are multiplied with the basis at a time


@triton.jit
def _add_exact(
    top, total, acc, q, k, v, n, mask, mask_t, softcap, HEAD_DIM: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attention of a query q [D] over n exact tokens k, v [n, HEAD_DIM], added to what the softmax has so far.

    top: largest score; total: sum of exponentials; acc [D]: sum of values. mask: of the first token.
    """
    c, t = tl.arange(0, D), tl.arange(0, TOKENS)
    for begin in range(0, n, TOKENS):
        inside = begin + t < n
        there = inside[:, None] & (c < HEAD_DIM)[None, :]
        places = (begin + t)[:, None] * HEAD_DIM + c[None, :]
        x = tl.sum(tl.load(k + places, mask=there, other=0.0).to(tl.float32) * q[None, :], 1)
        if SOFTCAP:
            x = capped(x, softcap)
        if MASK:
            seen = tl.load(mask + (begin + t) * mask_t, mask=inside, other=0)
            if mask.dtype.element_ty == tl.uint8:  # a boolean mask
                x = tl.where(seen != 0, x, LOWEST)
            else:
                x = x + seen.to(tl.float32)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        p = tl.exp2((x - higher) * LOG2E)
        fade = tl.exp2((top - higher) * LOG2E)
        total = total * fade + tl.sum(p, 0)
        acc = acc * fade + tl.sum(p[:, None] * tl.load(v + places, mask=there, other=0.0).to(tl.float32), 0)
        top = higher
    return top, total, acc


_CHANGING = ["splits", "n_first", "n_last", "n_own", "last", "k_first_b", "v_first_b", "k_last_b", "v_last_b", "M",
             "queries", "mask_b", "mask_h", "mask_q", "mask_t", "own_mask_b", "own_mask_h",
             "own_mask_q", "own_mask_t"]  # fmt: skip


@triton.jit(do_not_specialize=_CHANGING)
def merge_splits(
    partial, out, q_ptr, basis, k_first, v_first, k_last, v_last, k_own, v_own, mask_ptr, own_mask_ptr, logits,
    splits, n_first, n_last, n_own, last, k_first_b, v_first_b, k_last_b, v_last_b, H, M, queries, bases,
    mask_b, mask_h, mask_q, mask_t, own_mask_b, own_mask_h, own_mask_q, own_mask_t, scaling, softcap,
    RANK: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BASIS: tl.constexpr,
    MASK: tl.constexpr, OWN: tl.constexpr, LOGITS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attention of a query over all tokens, of partial results of `attend_tiles` and of exact tokens.

    partial: as `attend_tiles` writes it; q [B · H · M, HEAD_DIM], M queries per KV head → out, of the same shape.
    Exact tokens, [B, H, n, HEAD_DIM] each with any stride of the batch: K and V of the first n_first tokens, and of the
    n_last from position `last` on; if OWN, also [B, H, n_own, HEAD_DIM] of rows with left padding. mask: of all tokens,
    [B, Hq, queries, T]; own_mask [B, Hq, queries, n_own]; whoever is masked by uint8 is seen where that isn't 0.
    basis: if BASIS, [D; mean] of the first heads, which further ones repeat, [bases, RANK + 1, HEAD_DIM] float32.
    logits [Hq]: if LOGITS, sink logits, which take part in the softmax without a token of their own (gpt-oss).
    """
    row, rows = tl.program_id(0), tl.num_programs(0)
    head, m = (row // M) % H, row % M
    batch = (row // (H * M)).to(tl.int64)
    query_head, query = head * (M // queries) + m // queries, m % queries
    c = tl.arange(0, D)
    q = tl.load(q_ptr + row.to(tl.int64) * HEAD_DIM + c, mask=c < HEAD_DIM, other=0.0).to(tl.float32) * scaling
    top, total, acc = tl.full([], LOWEST, tl.float32), tl.zeros([], tl.float32), tl.zeros([D], tl.float32)
    mask = mask_ptr + batch * mask_b + query_head.to(tl.int64) * mask_h + query * mask_q
    first = head * n_first * HEAD_DIM
    top, total, acc = _add_exact(top, total, acc, q, k_first + batch * k_first_b + first,
                                 v_first + batch * v_first_b + first, n_first, mask, mask_t, softcap, HEAD_DIM, D, MASK,
                                 SOFTCAP)  # fmt: skip
    latest = head * n_last * HEAD_DIM
    top, total, acc = _add_exact(top, total, acc, q, k_last + batch * k_last_b + latest,
                                 v_last + batch * v_last_b + latest, n_last, mask + last * mask_t, mask_t, softcap,
                                 HEAD_DIM, D, MASK, SOFTCAP)  # fmt: skip
    if OWN:
        beside = (batch * H + head) * n_own * HEAD_DIM
        own_mask = own_mask_ptr + batch * own_mask_b + query_head * own_mask_h + query * own_mask_q
        top, total, acc = _add_exact(top, total, acc, q, k_own + beside, v_own + beside, n_own, own_mask, own_mask_t,
                                     softcap, HEAD_DIM, D, True, SOFTCAP)  # fmt: skip
    s = tl.arange(0, CHUNK)
    maxima = partial + splits.to(tl.int64) * rows * RANK + row
    inside_top, inside = tl.full([], LOWEST, tl.float32), tl.zeros([], tl.float32)
    for begin in range(0, splits, CHUNK):
        there = begin + s < splits
        own = maxima + (begin + s).to(tl.int64) * rows
        maximum = tl.load(own, mask=there, other=LOWEST)
        higher = tl.maximum(inside_top, tl.max(maximum, 0))
        weight = tl.where(there, tl.exp2((maximum - higher) * LOG2E), 0.0)
        inside = inside * tl.exp2((inside_top - higher) * LOG2E)
        inside += tl.sum(weight * tl.load(own + splits * rows, mask=there, other=0.0), 0)
        inside_top = higher
    highest = tl.maximum(top, inside_top)
    whole = total * tl.exp2((top - highest) * LOG2E) + inside * tl.exp2((inside_top - highest) * LOG2E)
    scale = 1.0
    if LOGITS:
        logit = tl.load(logits + query_head).to(tl.float32)
        above = tl.maximum(highest, logit)
        scale = tl.exp2((highest - above) * LOG2E)
        whole = whole * scale + tl.exp2((logit - above) * LOG2E)
    scale = scale / tl.where(whole > 0, whole, 1.0)  # 0 if the mask hides all tokens
    acc = acc * (scale * tl.exp2((top - highest) * LOG2E))
    share = scale * tl.exp2((inside_top - highest) * LOG2E)
    own_basis = basis + (head % bases) * ((RANK + 1) * HEAD_DIM)
    for start in tl.static_range(0, RANK, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        y = tl.zeros([COLUMNS], tl.float32)
        for begin in range(0, splits, CHUNK):
            there = begin + s < splits
            split = (begin + s).to(tl.int64) * rows
            maximum = tl.load(maxima + split, mask=there, other=LOWEST)
            weight = tl.where(there, tl.exp2((maximum - inside_top) * LOG2E), 0.0)
            places = partial + (split + row)[:, None] * RANK + column[None, :]
            part = tl.load(places, mask=there[:, None] & (column < RANK)[None, :], other=0.0)
            y += tl.sum(weight[:, None] * part, 0)
        y *= share
        if BASIS:
            used = (column < RANK)[:, None] & (c < HEAD_DIM)[None, :]
            D_rows = tl.load(own_basis + column[:, None] * HEAD_DIM + c[None, :], mask=used, other=0.0)
            acc += tl.sum(y[:, None] * D_rows, 0)
        else:
            acc += y  # COLUMNS is D
    if BASIS:
        mean = tl.load(own_basis + RANK * HEAD_DIM + c, mask=c < HEAD_DIM, other=0.0)
        acc += (share * inside) * mean
    tl.store(out + row.to(tl.int64) * HEAD_DIM + c, acc.to(out.dtype.element_ty), mask=c < HEAD_DIM)
