"""Choose the kernel for a quantizer, if one can run on this machine.

A kernel serves formats and encodings (`codecs.formats`), independent of the quantizer that declares them. Everything
also works through PyTorch, so a missing kernel or compiler is never an error.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from gpt2.compression.codecs.base import Encoded, Quantizer, beyond_half
from gpt2.compression.codecs.compressor import Compressor, in_dtype
from gpt2.compression.kernels import cpu

log = logging.getLogger(__name__)
AMPERE = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16 and TF32, which the kernels need
ROUNDED_BITS = 6  # of codes, up to which queries in 16 bits cost less than a tenth of what the codes lose


def usable(x: Tensor) -> bool:
    """Whether a Triton kernel can take a tensor: it is on an NVIDIA GPU, Ampere or later, and Triton is installed.

    With TRITON_INTERPRET=1, which is for tests, Triton interprets kernels on the CPU.
    """
    if x.is_cuda:
        return _installed(True) and _recent(x.device) and launches()
    return x.device.type == "cpu" and interpreted() and _installed(False)


def rounds_queries(dtype: torch.dtype, k: Compressor) -> bool:
    """Whether Triton's kernels may round absorbed queries to 16 bits: those of a bfloat16 model had no more.

    dtype: of the queries. k: what they are compared with.
    """
    return dtype == torch.bfloat16 and k.quantizer.bits <= ROUNDED_BITS


def compress(compressor: Compressor, x: Tensor, start: int = 0) -> Encoded:
    """As `compressor.compress` of x [B, H, T, d], with a kernel if there is one. start: position of the first token."""
    return quantize(compressor.quantizer, compressor.coordinates(x, start))


def quantize(quantizer: Quantizer, z: Tensor) -> Encoded:
    """As `quantizer.quantize` of z [B, G, T, r], with a kernel if there is one."""
    encoding = quantizer.encoding(z.shape[-1])
    if encoding is None:
        return quantizer.quantize(z)
    if usable(z) and not beyond_half(z):  # which Triton's kernels would cut off
        from gpt2.compression.kernels import triton_quantize  # imports Triton

        if (encoded := triton_quantize.quantized(encoding, z)) is not None:
            return encoded
    here = cpu.encodes(encoding) and cpu.usable(z) and not isinstance(z, FakeTensor)
    if here and (encoded := cpu.quantized(encoding, z)) is not None:
        return encoded
    return quantizer.quantize(z)


def reconstruct(
    compressor: Compressor, encoded: Encoded, head_dim: int, dtype: torch.dtype, start: int | Tensor = 0
) -> Tensor:
    """As `compressor.reconstruct` of what is stored, with a kernel if there is one that is faster."""
    quantizer, transform = compressor.quantizer, compressor.transform
    known = transform is not None and transform.D.dtype == torch.float32 and cpu.decodes(quantizer.memory_format)
    codes = next(iter(encoded.values()))
    here = known and transform.D.device == codes.device  # of a parked cache the codes alone are on the CPU
    if not here or isinstance(codes, FakeTensor) or not cpu.usable(codes):
        return compressor.reconstruct(encoded, head_dim, dtype, start)
    x = cpu.decoded(quantizer, encoded, transform.D, transform.mean)
    return in_dtype(transform.heads_of(x, head_dim, start), dtype)


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _recent(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= AMPERE


@cache
def launches() -> bool:
    """Whether Triton can launch kernels: before the first it builds a C module, by a compiler with Python's headers."""
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018  this builds it
    except Exception as error:  # whatever a compiler, a linker or a missing library raises
        log.warning(
            "Triton can't launch kernels here, so PyTorch takes their place, slower: %s", str(error).partition("\n")[0]
        )
        return False
    return True


@cache
def _installed(wanted: bool) -> bool:
    found = importlib.util.find_spec("triton") is not None
    if wanted and not found:
        log.warning("Triton isn't installed: the compressed cache works on CUDA without its kernels, slower")
    return found
