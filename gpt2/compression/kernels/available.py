"""Whether kernels can run: everything works without them, so they are never a reason to fail."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt2.compression.codecs.base import Fields, Quantizer

log = logging.getLogger(__name__)
AMPERE = (8, 0)  # the first NVIDIA GPUs with bfloat16 and TF32 products; kernels are compiled for those and later


def usable(x: Tensor) -> bool:
    """Whether a kernel can take a tensor: it is on an NVIDIA GPU, Ampere or later, and Triton is installed.

    With TRITON_INTERPRET=1 Triton runs kernels without a GPU, slowly: for tests.
    """
    if x.is_cuda:
        return _installed(True) and _recent(x.device)
    return x.device.type == "cpu" and interpreted() and _installed(False)


def quantized(quantizer: Quantizer, z: Tensor) -> Fields | None:
    """What `quantizer` stores of z [B, G, T, r], from a kernel; None where there is none for it."""
    if not usable(z):
        return None
    from gpt2.compression.kernels import triton_quantize  # imports Triton, and the quantizers

    return triton_quantize.quantized(quantizer, z)


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
