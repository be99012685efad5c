"""KIVI (Liu et al. 2024, arXiv:2402.02750) as a cache to compare with, written from the paper.

K is quantized per channel over 32 tokens, V per token over 32 channels, asymmetrically, with scale and zero point in
float16. Only the first tokens and K's unfinished group stay exact; attention reads a new chunk already quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gpt2.common.errors import PluginError
from gpt2.evaluation.packed_layers import PackedLayer, PackedSide, pack, unpack

KIVI_GROUP = 32


def quantize(x: Tensor, bits: int) -> dict[str, Tensor]:
    """Groups x [..., g] as packed codes [..., g · bits / 8] with float16 scale and zero point, [..., 1] each."""
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    zero = low.half()
    scale = ((high - low) / (2**bits - 1)).half().clamp(min=torch.finfo(torch.float16).smallest_normal)
    codes = ((x.float() - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return {"codes": pack(codes, bits), "scale": scale, "zero": zero}


def dequantize(fields: Mapping[str, Tensor], bits: int) -> Tensor:
    """The groups that `quantize` stored, float32 [..., g]."""
    return unpack(fields["codes"], bits) * fields["scale"].float() + fields["zero"].float()


class KiviSide(PackedSide):
    """K or V of one layer. block: tokens in a group of one channel; with 1 a group is 32 channels of one token."""

    def quantize(self, groups: Tensor) -> dict[str, Tensor]:
        return quantize(groups, self.bits)

    def dequantize(self, fields: dict[str, Tensor]) -> Tensor:
        return dequantize(fields, self.bits)

    def grouped(self, x: Tensor) -> Tensor:
        if self.block > 1:
            return x.unflatten(2, (-1, self.block)).mT
        group = math.gcd(x.shape[3], KIVI_GROUP)
        if group % 8:
            raise PluginError(f"KIVI's codes are packed by 8 channels: head_dim {x.shape[3]} isn't a multiple of 8")
        return x.unflatten(3, (-1, group))


def kivi_cache(num_layers: int, bits: int, sink_tokens: int = 4) -> Cache:
    """An empty KIVI cache of 2, 3 or 4 bits that keeps the first `sink_tokens` tokens exact."""

    def side(block: int) -> KiviSide:
        return KiviSide(bits, sink_tokens, block)

    return Cache(layers=[PackedLayer(side(KIVI_GROUP), side(1)) for _ in range(num_layers)])
