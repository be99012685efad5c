"""Kernels for CPUs: C++ that PyTorch builds the first time it is wanted, which takes a few seconds and a compiler.

Chosen by measurement (README, "Speed"): compiled PyTorch is nearly as fast on plain integers, but reads no bit planes,
takes longer to build, and is compiled anew for other shapes. Without a compiler the same numbers come from PyTorch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from gpt2.compression.codecs.formats import EXACT

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")
# Sums in any order, so that they can be vectorised; but infinities and NaN stay what they are. OpenMP is PyTorch's own
# threads: the library is the one that it has loaded
FLAGS = ["-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-fopenmp"] * (sys.platform == "linux")
EXACT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Part(NamedTuple):
    """Some of the tokens of one layer's K or V: how they are stored, and where they stand among all tokens.

    skip: of the first places, which are no tokens. affine: queries and sums have a last coordinate more, which takes
    every token's 1.
    """

    kind: int
    bits: int
    rank: int
    start: int
    length: int
    skip: int
    affine: bool
    fields: list[Tensor]


def usable(x: Tensor) -> bool:
    """Whether the kernels can serve tensors like x; builds them at the first that they could."""
    return x.device.type == "cpu" and loaded()


def exact(start: int, x: Tensor) -> Part:
    """A part of vectors as the model made them, [B, H, T, d]."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return Part(EXACT, 0, x.shape[3], start, x.shape[2], 0, False, [x])


def scores(parts: list[Part], qs: list[Tensor], out: Tensor) -> None:
    """Write q · ẑ of every part's tokens into out [B, H, M, T] float32; qs: of each, [B, G, H/G · M, r or r + 1]."""
    torch.ops.kv_compression.scores([q.float().contiguous() for q in qs], *_arguments(parts), out)


def weighted_sums(parts: list[Part], p: Tensor, outs: list[int]) -> list[Tensor]:
    """Σ p ẑ over tokens, [B, G, H/G · M, r or r + 1] each; p [B, H, M, T] float32.

    outs: of each part which sum it goes into, in ascending order.
    """
    return torch.ops.kv_compression.weighted_sums(p.contiguous(), *_arguments(parts), outs)


def encode_planes(y: Tensor, payload: int, narrow: Sequence[float], wide: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Blocks y [..., r, 64] float32 as `codecs.mixed` stores them: [..., payload] and width indices [..., bytes].

    The same search as there; sums in another order may decide between two that are as good.
    """
    block, widths = torch.ops.kv_compression.encode_planes(y.flatten(0, -3), payload, narrow, wide)
    return block.unflatten(0, y.shape[:-2]), widths.unflatten(0, y.shape[:-2])


def _arguments(parts: list[Part]) -> tuple[list[Tensor], list[int]]:
    return [field for part in parts for field in part.fields], [n for part in parts for n in part[:-1]]


@functools.cache
def loaded() -> bool:
    """Build the kernels if need be, and load them; False, with one line in the log, where that can't be done."""
    name = f"kv_compression_{_built_for()}"
    try:
        from torch.utils import cpp_extension

        folder = Path(cpp_extension._get_build_directory(name, verbose=False))
        # PyTorch's own lock outlives a build that was killed, and whoever comes next would wait forever
        with FileLock(folder / "building"):
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name, [str(SOURCE)], extra_cflags=FLAGS, build_directory=str(folder), is_python_module=False
            )
    except (RuntimeError, OSError, ImportError) as error:
        log.warning(
            "no CPU kernels (they take ninja, and GCC 12 or Clang), so attention over codes is slower: %s",
            _first_line(error),
        )
        return False
    return True


def _built_for() -> str:
    """Names a build by its source and what it relies on: machines with other processors may share a home folder.

    And by where the source lies, or two checkouts would build theirs over each other's again and again.
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
