"""Which kernel does what, and whether kernels can run.

Everything works without them, so they are never a reason to fail.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

from gpt2.compression.codecs.base import Compressor, Encoded, Quantizer
from gpt2.compression.codecs.mixed import in_blocks
from gpt2.compression.kernels import cpu

log = logging.getLogger(__name__)
AMPERE = (8, 0)  # the first NVIDIA GPUs with bfloat16 and TF32 products; kernels are compiled for those and later


def usable(x: Tensor) -> bool:
    """Whether a kernel can take a tensor: it is on an NVIDIA GPU, Ampere or later, and Triton is installed.

    With TRITON_INTERPRET=1 Triton runs kernels without a GPU, slowly: for tests.
    """
    if x.is_cuda:
        return _installed(True) and _recent(x.device)
    return x.device.type == "cpu" and interpreted() and _installed(False)


def compress(compressor: Compressor, x: Tensor, start: int = 0) -> Encoded:
    """As `compressor.compress`, by a kernel where there is one."""
    return quantize(compressor.quantizer, compressor.coordinates(x, start))


def quantize(quantizer: Quantizer, z: Tensor) -> Encoded:
    """What `quantizer` stores of z [B, G, T, r], by a kernel where there is one, else by the quantizer itself."""
    if usable(z):
        from gpt2.compression.kernels import triton_quantize  # imports Triton

        if (fields := triton_quantize.quantized(quantizer, z)) is not None:
            return fields
    search = quantizer.plane_search(z.shape[-1])
    if search is not None and cpu.usable(z):
        block, widths = cpu.encode_planes(in_blocks(z), *search)
        return {"block": block, "widths": widths}
    return quantizer.quantize(z)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _recent(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= AMPERE


@cache
def _installed(wanted: bool) -> bool:
    found = importlib.util.find_spec("triton") is not None
    if wanted and not found:
        log.warning("Triton isn't installed: the compressed cache works on CUDA without its kernels, slower")
    return found
