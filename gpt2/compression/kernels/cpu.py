"""Kernels for CPUs in C++. PyTorch builds them on first use, which needs a compiler and takes up to a minute.

C++ was chosen by measurement: torch.compile is nearly as fast on plain integers, but it reads no bit planes, takes
longer to build, and compiles again for every shape. Without a compiler, PyTorch computes the same numbers.

KV_CPU_ISA=avx512, avx2 or generic builds for an instruction set below the processor's own (`native`), to test and
measure what other processors run. KV_CPU_PRODUCTS=float multiplies codes as floats, not as integers.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from gpt2.common.errors import PluginError, brief
from gpt2.compression.codecs.base import Encoded, Quantizer
from gpt2.compression.codecs.formats import (
    CHANNEL,
    EXACT,
    FIXED_PLANES,
    PLANES,
    TOKEN,
    Encoding,
    Format,
    TokenRange,
    WidthSearch,
)
from gpt2.compression.codecs.mixed import in_blocks, pack_indices

log = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "cpp"
# Infinities and NaN are respected, and sums aren't reordered (so not -ffast-math): GCC would split the chains of
# multiply-adds that the kernels arrange by hand, and spill. OpenMP uses the threads of the library that PyTorch loaded
FLAGS = ["-O3", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-fopenmp"] * (sys.platform == "linux")
# What GCC and Clang call levels of x86-64, and the features by which Linux says that a processor has them
AVX2 = ("-march=x86-64-v3", {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
AVX512 = ("-march=x86-64-v4", AVX2[1] | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
EXACT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FRAME = 64  # tokens that may have a query of their own: a block
CODED = (TOKEN, CHANNEL, PLANES, FIXED_PLANES)  # kinds of formats of codes that the kernels read


class Part(NamedTuple):
    """Some of the tokens of one layer's K or V: how they are stored, and their place among all tokens.

    kind, bits: of `formats.Format`. rank: coordinates per token. start, length: position of the first token slot, and
    number of slots. skip: number of padding slots at the start. affine: vectors have an additional last coordinate,
    which is 1 for every token. tensors: in the order of the format.
    """

    kind: int
    bits: int
    rank: int
    start: int
    length: int
    skip: int
    affine: bool
    tensors: list[Tensor]


class Values(NamedTuple):
    """What V's coordinates are taken through: v̂ of a group's h heads is [ẑ, 1] @ basis.

    basis [G or 1, h, r + 1, d], in float32, or as 16-bit integer multiples of `units` [G or 1, h, r + 1] float32. The
    basis is read once in a step: as integers in half of the bytes.
    """

    basis: Tensor
    units: Tensor | None


class Frames(NamedTuple):
    """How a decode step absorbs queries by itself, for each frame of FRAME tokens: rotated back, then in a basis.

    basis: of `panels`. constant [G, h, d]: the basis's last line, which `panels` leaves out: for one column more, every
    frame would take as long as for a whole panel. angles: cosines and sines of each frame's rotation, [n, 2, pairs], or
    [B, n, 2, pairs] where rows have their own. interleaved: whether channels 2i and 2i + 1 rotate together, rather than
    i and i + pairs.
    """

    basis: Tensor
    constant: Tensor
    angles: Tensor
    interleaved: bool


def reads(memory_format: Format | None) -> bool:
    """Whether the kernels can read codes in a format."""
    return memory_format is not None and memory_format.kind in CODED


def reads_frames(frame: int | None) -> bool:
    """Whether the kernels take queries that so many tokens share, all of them for None."""
    return frame in (None, FRAME)


def encodes(encoding: Encoding) -> bool:
    """Whether the kernels can encode in this way: by channel takes little time in PyTorch, and once in a block."""
    return isinstance(encoding, (WidthSearch, TokenRange))


def integer_products() -> bool:
    """Whether codes are multiplied as integers where the processor adds them in pairs, unless the environment forbids.

    Raises PluginError for a KV_CPU_PRODUCTS that is neither integer nor float.
    """
    wanted = os.environ.get("KV_CPU_PRODUCTS") or "integer"
    if wanted not in ("integer", "float"):
        raise PluginError(f"KV_CPU_PRODUCTS={wanted!r}: integer or float was expected")
    return wanted == "integer"


def usable(x: Tensor) -> bool:
    """Whether the kernels can serve tensors like x. The first call with a tensor on the CPU builds the kernels."""
    return x.device.type == "cpu" and loaded()


def exact(start: int, x: Tensor) -> Part:
    """A part of exact vectors x [B, H, T, d]."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return Part(EXACT, 0, x.shape[3], start, x.shape[2], 0, False, [x])


def coded(
    quantizer: Quantizer, encoded: Encoded, *, rank: int, start: int, length: int, skip: int, affine: bool
) -> Part:
    """A part of tokens that a quantizer has stored, in a format that the kernels can read (`reads`)."""
    kind, bits = quantizer.memory_format
    tensors = quantizer.kernel_tensors(encoded)
    if kind == FIXED_PLANES:  # as PLANES, but with the same widths in all blocks
        block, widths = tensors
        packed = pack_indices(widths[None, :, None]).expand(*block.shape[:3], -1)
        kind, tensors = PLANES, [block, packed]
    return Part(kind, bits, rank, start, length, skip, affine, tensors)


def scores(parts: list[Part], qs: list[Tensor], out: Tensor) -> None:
    """Write q · ẑ for the tokens of all parts into out [B, H, M, T] float32.

    qs: queries in each part's coordinates, [B, G, H/G · M, r], or r + 1 for an affine part. Where each block of FRAME
    tokens has queries of its own, [B, G, blocks, H/G · M, r].
    """
    torch.ops.kv_compression.scores(_queries(qs), *_arguments(parts), out)


def decodes(memory_format: Format | None) -> bool:
    """Whether `decoded` is faster than PyTorch: it takes long to unpack bit planes, and little time for integers."""
    return memory_format is not None and memory_format.kind in (PLANES, FIXED_PLANES)


def decoded(quantizer: Quantizer, encoded: Encoded, D: Tensor, mean: Tensor) -> Tensor:
    """ẑ @ D + mean of whole blocks, [B, G, T, w] float32; D [G or 1, r, w], mean [G or 1, w].

    Channels are computed as the scores of queries, which are the columns of D.
    """
    B, G, blocks = encoded["block"].shape[:3]
    columns = torch.cat((D, mean[:, None]), dim=1).mT.expand(B, G, -1, -1)  # [B, G, w, r + 1]
    length = blocks * quantizer.block_tokens
    part = coded(quantizer, encoded, rank=D.shape[1], start=0, length=length, skip=0, affine=True)
    out = torch.empty(B, G, D.shape[2], length, dtype=torch.float32, device=D.device)
    scores([part], [columns], out)
    return out.mT


def weighted_sums(parts: list[Part], p: Tensor, outs: list[int]) -> list[Tensor]:
    """Sums Σ p ẑ over tokens, each [B, G, H/G · M, r], or r + 1 for affine parts; p [B, H, M, T] float32.

    outs: for each part the index of the sum to which it is added, in ascending order.
    """
    return torch.ops.kv_compression.weighted_sums(p.contiguous(), *_arguments(parts), outs)


def layer(
    heads: int, ks: list[Part], vs: list[Part], *, values: Values | None = None, frames: Frames | None = None,
    integers: bool = False,
) -> Callable:  # fmt: skip
    """What `attend` is given of a layer of so many KV heads: all that decode steps share until another block is full.

    ks, vs: exact sinks, then blocks. values: where V's parts are affine. frames: how queries are absorbed, where
    K's blocks have frames. integers: whether products may be of integers, of which processors with AVX2 have twice
    as many; queries, weights and the basis of frames are rounded to 16-bit integers.
    """
    summing, absorbing = values or (None, None), frames or (None, None, None, False)
    made = torch.ops.kv_compression.layer(heads, *_arguments(ks), *_arguments(vs), *summing, *absorbing, integers)
    return made.attend


def attend(
    layer: Callable, query: Tensor, absorbed: Tensor | None, tails: tuple[Tensor, ...], tokens: int, *, scaling: float,
    bias: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Σ p v̂ of one query per head, [B, Hq, 1, d] in the query's dtype, p the softmax of its scores, in one pass.

    layer: of `layer`. query [B, Hq, 1, d]. absorbed [B, G, H/G · M, r or r + 1]: as K's blocks are read with it, unless
    frames absorb it or it is the query itself. tails: the exact tails of K and V, or one of both, K's heads first.
    tokens: number of all tokens. scaling: what scores are multiplied with. bias [B, tokens] float32 is added to them
    then. sinks: logits of query heads, [Hq] float32, which take weight without a token of their own. None where blocks
    of K and V overlap so that it takes two passes.
    """
    absorbed = None if absorbed is None else _queries([absorbed])[0]
    found = layer(query, absorbed, tails, tokens, scaling, bias, sinks)
    return found[0] if found else None


def panels(read: Tensor, integers: bool = False) -> Tensor:
    """A basis read [G, h, r + 1, d] without its last line as `Frames` has it; keys of h heads are [ẑ, 1] @ read.

    integers: as of `layer`.
    """
    return torch.ops.kv_compression.panels(read.float(), integers)


def units(basis: Tensor) -> Tensor:
    """What 16-bit integers stand for, if each line of a basis [..., d] shall use their range, [...] float32."""
    return (basis.abs().amax(-1) / torch.iinfo(torch.int16).max).clamp_min(torch.finfo(torch.float32).tiny)


def multiples(basis: Tensor, units: Tensor) -> Tensor:
    """A basis [..., d] as integer multiples of `units` [...], int16."""
    return (basis / units[..., None]).round_().to(torch.int16)


def quantized(encoding: WidthSearch | TokenRange, z: Tensor) -> Encoded | None:
    """z [B, G, T, r] quantized in an encoding; None if it holds numbers that the kernel has no format for.

    Bit planes as `codecs.mixed` chooses them, by the same search: sums are in another order, so that of two nearly
    equal widths the other one may be chosen. Integers by token as `codecs.integer` has them, bit for bit.
    """
    if isinstance(encoding, TokenRange):
        return _by_token(encoding, z)
    y = in_blocks(z)
    block, widths = torch.ops.kv_compression.encode_planes(y.flatten(0, -3), *encoding)
    return {"block": block.unflatten(0, y.shape[:-2]), "widths": widths.unflatten(0, y.shape[:-2])}


def _by_token(encoding: TokenRange, z: Tensor) -> Encoded | None:
    *shape, rank = z.shape
    found = torch.ops.kv_compression.encode_tokens(z.detach().float().reshape(-1, rank).contiguous(), encoding.bits)
    return dict(zip(("codes", "scale", "offset"), (x.view(*shape, -1) for x in found), strict=True)) if found else None


def _queries(qs: list[Tensor]) -> list[Tensor]:
    """Queries in float32, those of each group or block side by side."""
    made: dict[int, Tensor] = {}  # of each tensor once, as parts mostly share theirs
    for q in qs:
        if id(q) not in made:
            x = q.float()
            made[id(q)] = x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()
    return [made[id(q)] for q in qs]


def _arguments(parts: list[Part]) -> tuple[list[Tensor], list[int]]:
    return [tensor for part in parts for tensor in part.tensors], [n for part in parts for n in part[:-1]]


@functools.cache
def loaded() -> bool:
    """Build the kernels unless that is done, and load them. Returns False, with one line in the log, if that fails.

    An instruction set in KV_CPU_ISA that this processor lacks is an error.
    """
    flags = FLAGS + _instruction_set()
    name, built = f"kv_compression_{build_name(flags)}", None
    try:
        from torch.utils import cpp_extension

        folder = Path(cpp_extension._get_build_directory(name, verbose=False))
        built = folder / f"{name}.so"
        if not built.is_file() and sys.stderr.isatty():
            print("building CPU kernels, which takes up to a minute, once on this machine", file=sys.stderr)
        # A killed build leaves PyTorch's own lock file behind, for which the next process would wait forever
        with FileLock(folder / "building"), _ninja_of_this_environment():
            (folder / "lock").unlink(missing_ok=True)
            source, where = str(SOURCES / "kernels.cpp"), str(folder)
            cpp_extension.load(name, [source], extra_cflags=flags, build_directory=where, is_python_module=False)
    except (RuntimeError, OSError, ImportError) as error:
        # Another user has built them, in a folder that only that user can write to
        with suppress(OSError):  # of a library that this system can't load, which `error` says already
            if built is not None and built.is_file() and isinstance(error, OSError):
                torch.ops.load_library(built)
                return True
        log.warning(
            "no CPU kernels (building them needs ninja, and GCC 12 or Clang), so attention over codes is slower: %s",
            _reason(error),
        )
        return False
    return True


@contextmanager
def _ninja_of_this_environment() -> Iterator[None]:
    """Puts the folder of the installed package `ninja` first on PATH, where PyTorch looks for the program.

    A virtual environment's programs are on PATH only where it is activated. And one build by two versions of ninja is
    built anew by each, as neither reads the other's log.
    """
    before = os.environ.get("PATH", "")
    with suppress(ImportError):
        import ninja

        os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, before))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def instruction_sets() -> dict[str, list[str]]:
    """The values of KV_CPU_ISA that this machine can run, with the compiler's flags for each."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"native": ["-march=native"], "generic": []}
    features = set(processor_features().split())
    named = {name: [flag] for name, (flag, needed) in {"avx512": AVX512, "avx2": AVX2}.items() if needed <= features}
    return {"native": ["-march=native"], **named, "generic": ["-march=x86-64"]}


def _instruction_set() -> list[str]:
    """The compiler's flags for the instruction set that KV_CPU_ISA asks for."""
    there, wanted = instruction_sets(), os.environ.get("KV_CPU_ISA") or "native"
    if wanted not in there:
        raise PluginError(f"KV_CPU_ISA={brief(wanted)}: this machine has {', '.join(there)}")
    return there[wanted]


def processor_features() -> str:
    """The processor's features as Linux lists them, elsewhere its name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def build_name(flags: list[str]) -> str:
    """A hash of the source and of everything that a build depends on, for the name of the build.

    It includes the processor, as different machines may share a home folder, and the path of the source, as two
    checkouts would otherwise overwrite each other's build.
    """
    what = f"{SOURCES} {platform.machine()} {processor_features()} {torch.__version__} {flags}".encode()
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    return hashlib.sha256(what + text).hexdigest()[:12]


def _reason(error: Exception) -> str:
    """The compiler's first error, where what went wrong has one; else the first line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if " error: " in line), lines[0])
