"""The least time that a GPU needs for one decode step's attention, from bytes and operations: computed, not measured.

A kernel takes at least the time of its bytes at the speed of memory, of its products at that of tensor cores, and of
its other arithmetic at that of vector units; with all three overlapped, the longest counts. What is counted, for T
tokens, G groups of KV heads in the batch, M queries per group and r channels, is what the Triton kernels do:

    scores         reads codes of K; 2 T r' M' per group on tensor cores, twice where queries need more than 16 bits:
                   in a bfloat16 model, which is assumed, codes of up to six bits meet queries in 16
    weighted sums  reads codes of V; 2 T r' M' per group on tensor cores. One launch does both (`attend_tiles`)
    absorb         where blocks have queries of their own (frames): every query times the basis for every block, 2 d r
                   per query and block, in TF32 at half the speed of 16 bits, three times where queries need more than
                   16; and rotated back, d per query, block and COLUMNS of the basis. Written and read again, in as many
                   bits as queries need (`absorb_frames`)
    split decode   writes, reads and merges 4 M (r + 2) bytes per group and split (`merge_splits`)
    quantize       of a prompt: reads 16-bit K and V, writes codes, searches scales (`triton_quantize`)

r' and M' are rounded up to a power of two of at least 16, which tensor cores take. A code costs DECODE instructions and
a score SCORE of them, a lower bound from the kernels' source with 16-bit operations in pairs. 16-bit attention is given
the same bound without any rounding up. Partial results of splits count as memory traffic, though they may stay in a
cache. Codes that K and V share are read and unpacked once. Exact sinks and tail, a few dozen tokens, launches,
and products with a basis that are needed once per step aren't counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from gpt2.compression.cache.size import noise
from gpt2.compression.codecs import Compressor
from gpt2.compression.codecs.formats import (
    CHANNEL,
    EXACT,
    FIXED_PLANES,
    MOST_PLANES,
    PLANES,
    TOKEN,
    WIDTHS,
    ChannelGrid,
    TokenRange,
    WidthSearch,
)
from gpt2.compression.codecs.mixed import WIDEST_NARROW
from gpt2.compression.kernels import dispatch
from gpt2.experiments.attention_speed import AttentionShape, compressors

TILE = 64
TOKENS = 16 * TILE  # that bytes per token are measured on
PROGRAMS = 4  # splits per multiprocessor, as `triton_attention` launches them
HALF = 2  # bytes
# Instructions per code: setting exponent bits and subtracting, for two codes at once; before that nibbles are masked or
# shifted; of bit planes the lowest eight are transposed by 12 exchanges of 5 instructions for 32 codes, then masked or
# shifted. A block with a channel of ten bits takes three more, which aren't counted
DECODE = {(EXACT, 0): 0, (TOKEN, 8): 1, (TOKEN, 4): 2, (CHANNEL, 8): 1, (CHANNEL, 4): 2}
DECODE |= {(kind, 0): 12 * 5 / 32 + 3 / 4 + 1 for kind in (PLANES, FIXED_PLANES)}
SCORE = 8  # per score: scale and bias, the largest so far, difference, exponential, sum
MERGE = 4  # per number of a split
COLUMNS, TURN = 64, 6  # of `triton_frames`: columns of a program; per channel: rotating, splitting, the mean's product
CODING, SHARE = 12, 8  # per coordinate: range, division, rounding, clamping; and for the error of each further scale
PLANES_WRITTEN = 3 * MOST_PLANES  # per coordinate: a bit is taken out, put in its place and added, of every plane
SIXTEEN = "16-bit attention"


@dataclass(frozen=True)
class Device:
    """A GPU's speed as its data sheet says: bytes per second; operations per second, where a multiply-add counts two.

    tensor16, tensor8: dense products of 16 bits (what the kernels use) and of 8. vector: float32. None where only
    memory is known, which was then measured.
    """

    name: str
    bytes_per_s: float
    tensor16: float | None = None
    tensor8: float | None = None
    vector: float | None = None
    multiprocessors: int = 132

    def record(self) -> dict:
        return {"gpu": self.name, "bytes_per_s": self.bytes_per_s, "tensor16_ops_per_s": self.tensor16,
                "tensor8_ops_per_s": self.tensor8, "vector_ops_per_s": self.vector}  # fmt: skip


# NVIDIA's data sheets: "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM), "L40S GPU", "A100 80GB Tensor Core
# GPU" (SXM). Their figures with sparsity are halved
DEVICES = {
    "H100": Device("H100", 3.35e12, 989e12, 1979e12, 67e12, 132),
    "H200": Device("H200", 4.8e12, 989e12, 1979e12, 67e12, 132),
    "L40S": Device("L40S", 864e9, 362e12, 733e12, 91.6e12, 142),
    "A100": Device("A100", 2.039e12, 312e12, 624e12, 19.5e12, 108),
}
# What PyTorch calls the very variants above; others have other memory
VARIANTS = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA L40S": "L40S",
            "NVIDIA A100-SXM4-80GB": "A100"}  # fmt: skip


def device_of(name: str, copy_bytes_per_s: float) -> Device:
    """The data sheet of a GPU that PyTorch calls so; for any other device its memory alone, as measured by copying."""
    known = VARIANTS.get(name)
    return DEVICES[known] if known else Device(name, copy_bytes_per_s)


@dataclass(frozen=True)
class Work:
    """Bytes moved, operations on tensor cores, and instructions of vector units."""

    nbytes: float = 0.0
    tensor: float = 0.0
    vector: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.nbytes + other.nbytes, self.tensor + other.tensor, self.vector + other.vector)

    def seconds(self, device: Device) -> dict[str, float]:
        """Seconds by what takes them. An instruction of a vector unit does at most one multiply-add: two operations."""
        found = {"memory": self.nbytes / device.bytes_per_s}
        if device.tensor16 and device.vector:
            found |= {"tensor cores": self.tensor / device.tensor16, "vector units": 2 * self.vector / device.vector}
        return found

    def bound(self, device: Device) -> dict:
        """Microseconds by what takes them, the largest as `bound_us`, and which it is."""
        each = self.seconds(device)
        limit = max(each, key=each.__getitem__)
        return {"bytes": self.nbytes, "us": {part: 1e6 * s for part, s in each.items()},
                "bound_us": 1e6 * each[limit], "bound_by": limit}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """K or V of one layer as it is stored.

    groups: of KV heads with a basis each. rank: coordinates per token and group. nbytes: per token and group. decode:
    instructions per coordinate. coding: the same to quantize, None without a kernel.
    """

    groups: int
    rank: int
    nbytes: float
    decode: float
    coding: float | None


def step_works(
    pair: tuple[Compressor, Compressor], shape: AttentionShape, tokens: int, multiprocessors: int
) -> dict[str, Work] | None:
    """The work of each kernel for one step over codes, and of quantizing a prompt; None where no kernel reads them."""
    k, v = (_side(compressor, shape) for compressor in pair)
    if v is not None and pair[1].joint:
        v = replace(v, nbytes=0.0, decode=0, coding=v.coding and 0.0)  # K's codes, which kernels read and write once
    if k is None or v is None or k.groups != v.groups:
        return None
    groups, queries = shape.batch * k.groups, shape.heads // k.groups
    rounded = dispatch.rounds_queries(torch.bfloat16, pair[0])
    split = 1 if rounded or pair[0].quantizer.memory_format.kind == EXACT and pair[0].transform is None else 2
    each, rows = float(tokens * groups), padded(queries)
    splits = max(min(PROGRAMS * multiprocessors // groups, tokens // (2 * TILE)), 1)
    partial = float(groups * queries * (v.rank + 2) * splits)
    works = {
        "scores": Work(
            each * k.nbytes, split * 2 * each * padded(k.rank) * rows, each * (k.rank * k.decode + SCORE * rows)
        ),
        "weighted sums": Work(each * v.nbytes, 2 * each * padded(v.rank) * rows, each * v.rank * v.decode),
        "split decode": Work(2 * 4 * partial, 0.0, MERGE * partial),
    }
    if frame := pair[0].frame:
        absorbing = shape.batch * shape.heads * (tokens / frame)  # queries
        turned = absorbing * math.ceil(k.rank / COLUMNS) * shape.head_dim * TURN
        size, products = (HALF, 1) if rounded else (4, 3)
        works["absorb"] = Work(
            2 * absorbing * (size * k.rank + 4), products * 2 * 2 * absorbing * k.rank * shape.head_dim, turned
        )
    if k.coding is not None and v.coding is not None:
        moved = sum(side.rank * HALF + side.nbytes for side in (k, v) if side.coding)
        works["quantize"] = Work(each * moved, 0.0, each * sum(side.rank * side.coding for side in (k, v)))
    return works


def plain_work(shape: AttentionShape, tokens: int) -> Work:
    """The work of a step over 16-bit K and V, no more than it needs: every number read once, no padding, no splits."""
    each = float(tokens * shape.batch)
    return Work(each * 2 * shape.kv_heads * shape.head_dim * HALF, each * 4 * shape.heads * shape.head_dim,
                each * SCORE * shape.heads)  # fmt: skip


def attend_bound(works: dict[str, Work], device: Device) -> dict:
    """The bound of a whole step: scores and sums share a launch; before it queries are absorbed, then splits merged."""
    attend = (works["scores"] + works["weighted sums"]).bound(device)
    others = sum(works[name].bound(device)["bound_us"] for name in ("absorb", "split decode") if name in works)
    return attend | {"bound_us": attend["bound_us"] + others}


def rows(
    devices: Sequence[Device],
    shape: AttentionShape,
    contexts: Sequence[int],
    codecs: Sequence[str],
    bits: Sequence[float],
) -> Iterator[dict]:
    """One results record per GPU, context length and codec, and one for 16-bit attention before the codecs'."""
    pairs = dict(named for codec in codecs for named in compressors(codec, bits, shape))
    for device in devices:
        for tokens in contexts:
            cell = {"gpu": device.name, "context_tokens": tokens}
            plain = plain_work(shape, tokens).bound(device)
            yield cell | {"row": SIXTEEN, **plain, "speed_against_16_bit": 1.0}
            for label, pair in pairs.items():
                works = step_works(pair, shape, tokens, device.multiprocessors)
                if works is not None:
                    bound = attend_bound(works, device)
                    kernels = {name: work.bound(device) for name, work in works.items()}
                    speed = plain["bound_us"] / bound["bound_us"]
                    yield cell | {"row": label, **bound, "speed_against_16_bit": speed, "kernels": kernels}


def add_bounds(
    measured: list[dict], device: Device, shape: AttentionShape, codecs: Sequence[str], bits: Sequence[float]
) -> None:
    """Give each measured row of `attention_speed` its bound on the device, in ms, and the share of it that was reached.

    A row without kernels, or on a device of which only memory is known, is bound by the bytes that it holds.
    """
    pairs = dict(named for codec in codecs for named in compressors(codec, bits, shape))
    for row in measured:
        tokens, bound = row["tokens_held"], Work(row["bytes_held"]).bound(device)
        if row["row"] in pairs and (works := step_works(pairs[row["row"]], shape, tokens, device.multiprocessors)):
            bound = attend_bound(works, device) if device.vector else bound
        elif row["kind"] == "16-bit":
            bound = plain_work(shape, tokens).bound(device)
        row |= {"bound_ms": bound["bound_us"] / 1000, "bound_by": bound["bound_by"]}
        row["share_of_bound"] = row["bound_ms"] / row["ms_median"]


def padded(n: int) -> int:
    """The next power of two, at least 16, which is the least that a product on tensor cores takes."""
    return max(16, 1 << (n - 1).bit_length())


def _grids_tried(encoding: WidthSearch) -> int:
    """Grids that a search for widths tries of each channel in a block."""
    return sum(len(encoding.narrow if bits <= WIDEST_NARROW else encoding.wide) for bits in WIDTHS if bits)


def _side(compressor: Compressor, shape: AttentionShape) -> Side | None:
    """How K or V is stored, from a stored sample; None for a format that no kernel reads."""
    held = compressor.quantizer.memory_format
    if held is None or tuple(held) not in DECODE or not compressor.readable:
        return None
    groups, rank = compressor.groups(shape.kv_heads, shape.head_dim), compressor.rank(shape.head_dim)
    generator = torch.Generator().manual_seed(0)
    heads = shape.kv_heads * (2 if compressor.joint else 1)
    x = noise(heads, TOKENS, shape.head_dim, batch=1, dtype=torch.float32, generator=generator)
    nbytes = sum(part.nbytes for part in compressor.compress(x).values()) / (TOKENS * groups)
    encoding = compressor.quantizer.encoding(rank)
    coding = {TokenRange: lambda: CODING, ChannelGrid: lambda: CODING + SHARE * (len(encoding.shares) - 1),
              WidthSearch: lambda: CODING + PLANES_WRITTEN + (CODING + SHARE) * _grids_tried(encoding)}  # fmt: skip
    known = coding.get(type(encoding))
    return Side(groups, rank, nbytes, DECODE[tuple(held)], float(known()) if known else None)
