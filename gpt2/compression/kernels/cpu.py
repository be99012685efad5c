"""Kernels for CPUs: C++ that PyTorch builds the first time it is used, which takes a few seconds and a compiler.

Chosen by measurement: compiled PyTorch is nearly as fast on plain integers, but it reads no bit planes, takes longer to
build, and is compiled anew for other shapes. Without a compiler PyTorch computes the same numbers.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from gpt2.compression.codecs.base import Encoded, Quantizer
from gpt2.compression.codecs.formats import (
    CHANNEL,
    EXACT,
    FIXED_PLANES,
    PLANES,
    TOKEN,
    Encoding,
    Format,
    WidthSearch,
)
from gpt2.compression.codecs.mixed import in_blocks, pack_indices

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")
# Sums in any order, so that they can be vectorised; but infinities and NaN stay what they are. OpenMP is PyTorch's own
# threads: the library is the one that it has loaded
FLAGS = ["-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-fopenmp"] * (sys.platform == "linux")
EXACT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODED = (TOKEN, CHANNEL, PLANES, FIXED_PLANES)  # kinds of format that the kernels read


class Part(NamedTuple):
    """Some of the tokens of one layer's K or V: how they are stored, and where they are among all tokens.

    kind, bits: as `formats.Format` has them. skip: how many of the first token slots are padding. affine: queries and
    sums have a last coordinate more, which meets a 1 in every token. tensors: in the order of the format.
    """

    kind: int
    bits: int
    rank: int
    start: int
    length: int
    skip: int
    affine: bool
    tensors: list[Tensor]


def reads(memory_format: Format | None) -> bool:
    """Whether the kernels read codes in a format."""
    return memory_format is not None and memory_format.kind in CODED


def encodes(encoding: Encoding) -> bool:
    """Whether the kernels can choose codes in this way. The others take no time to speak of in PyTorch."""
    return isinstance(encoding, WidthSearch)


def usable(x: Tensor) -> bool:
    """Whether the kernels can serve tensors like x; builds them at the first that they could."""
    return x.device.type == "cpu" and loaded()


def exact(start: int, x: Tensor) -> Part:
    """A part of vectors as the model made them, [B, H, T, d]."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return Part(EXACT, 0, x.shape[3], start, x.shape[2], 0, False, [x])


def coded(
    quantizer: Quantizer, encoded: Encoded, *, rank: int, start: int, length: int, skip: int, affine: bool
) -> Part:
    """A part of tokens that a quantizer has stored, in a format that `reads` knows."""
    kind, bits = quantizer.memory_format
    tensors = quantizer.kernel_tensors(encoded)
    if kind == FIXED_PLANES:  # the same as PLANES, but for the widths
        block, widths = tensors
        packed = pack_indices(widths[None, :, None]).expand(*block.shape[:3], -1)
        kind, tensors = PLANES, [block, packed]
    return Part(kind, bits, rank, start, length, skip, affine, tensors)


def scores(parts: list[Part], qs: list[Tensor], out: Tensor) -> None:
    """Write q · ẑ of every part's tokens into out [B, H, M, T] float32; qs: of each, [B, G, H/G · M, r or r + 1]."""
    torch.ops.kv_compression.scores([q.float().contiguous() for q in qs], *_arguments(parts), out)


def weighted_sums(parts: list[Part], p: Tensor, outs: list[int]) -> list[Tensor]:
    """Σ p ẑ over tokens, [B, G, H/G · M, r or r + 1] each; p [B, H, M, T] float32.

    outs: of each part which sum it goes into, in ascending order.
    """
    return torch.ops.kv_compression.weighted_sums(p.contiguous(), *_arguments(parts), outs)


def quantized(encoding: WidthSearch, z: Tensor) -> Encoded:
    """What `codecs.mixed` stores of z [B, G, T, r], by the same search.

    Sums are in another order, which may decide between two widths that are as good.
    """
    y = in_blocks(z)
    block, widths = torch.ops.kv_compression.encode_planes(y.flatten(0, -3), *encoding)
    return {"block": block.unflatten(0, y.shape[:-2]), "widths": widths.unflatten(0, y.shape[:-2])}


def _arguments(parts: list[Part]) -> tuple[list[Tensor], list[int]]:
    return [tensor for part in parts for tensor in part.tensors], [n for part in parts for n in part[:-1]]


@functools.cache
def loaded() -> bool:
    """Build the kernels where they aren't built, and load them; False, with one line in the log, where that fails."""
    name = f"kv_compression_{_built_for()}"
    try:
        from torch.utils import cpp_extension

        folder = Path(cpp_extension._get_build_directory(name, verbose=False))
        # PyTorch's own lock file stays when a build is killed, and the next process would wait for it forever
        with FileLock(folder / "building"):
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name, [str(SOURCE)], extra_cflags=FLAGS, build_directory=str(folder), is_python_module=False
            )
    except (RuntimeError, OSError, ImportError) as error:
        log.warning(
            "no CPU kernels (building them takes ninja, and GCC 12 or Clang), so attention over codes is slower: %s",
            _first_line(error),
        )
        return False
    return True


def _built_for() -> str:
    """Name of a build, by its source and what it relies on: machines with other processors may share a home folder.

    The path of the source is part of it, or two checkouts would overwrite each other's build again and again.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
        processor = next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        processor = platform.processor()
    what = f"{SOURCE} {platform.machine()} {processor} {torch.__version__} {FLAGS}".encode() + SOURCE.read_bytes()
    return hashlib.sha256(what).hexdigest()[:12]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
