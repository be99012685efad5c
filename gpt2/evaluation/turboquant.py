"""TurboQuant (Zandieh et al. 2025, arXiv:2504.19874) as a cache to compare with, written from the paper.

Every vector is stored alone and at once. Its norm is kept in float16; the unit vector is rotated by a random orthogonal
matrix, after which each coordinate has the density of one coordinate of a random point on the sphere, whatever the
vector was; and each coordinate is rounded to the nearest value of the Lloyd-Max codebook of that density (the paper's
TurboQuant_mse). Nothing is calibrated. The rotation is the same for all layers and heads of a width and follows from a
seed, so it isn't counted; norms are.

Not here: the residual of one bit per coordinate that makes inner products unbiased (TurboQuant_prod), and the channels
of more bits that the paper's 2.5 and 3.5 bits are made of, since those have to be chosen from data.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gpt2.common.errors import PluginError
from gpt2.evaluation.packed_layers import PackedLayer, PackedSide, pack, unpack

SEED = 0  # of the rotation
POINTS, STEPS = 200_001, 1000  # of the grid on which the density is integrated, and of Lloyd's algorithm


@functools.cache
def codebook(width: int, bits: int) -> Tensor:
    """The 2**bits values, ascending, with the least squared error for a coordinate of a random unit vector [width].

    A coordinate x has the density (1 - x²)^((width - 3) / 2), up to a factor. Lloyd's algorithm finds the values: each
    is the mean of what is nearest to it.
    """
    x = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
    density = (1 - x**2).clamp(min=0) ** ((width - 3) / 2)
    mass = torch.cat((density.new_zeros(1), density.cumsum(0)))
    moment = torch.cat((density.new_zeros(1), (x * density).cumsum(0)))
    shares = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    values = x[torch.searchsorted(mass[1:], shares * mass[-1])]
    for _ in range(STEPS):
        ends = torch.searchsorted(x, (values[1:] + values[:-1]) / 2)
        edges = torch.cat((ends.new_zeros(1), ends, ends.new_tensor([POINTS])))
        values = moment[edges].diff() / mass[edges].diff()
    return values.float()


@functools.cache
def rotation(width: int) -> Tensor:
    """A random orthogonal matrix [width, width], uniformly distributed: from the QR decomposition of Gaussian noise."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return (q * r.diagonal().sign()).float()  # without the signs, the distribution would depend on the algorithm


class TurboSide(PackedSide):
    """K or V of one layer: a norm and packed codes for each token and head."""

    def grouped(self, x: Tensor) -> Tensor:
        if x.shape[3] % 8:
            raise PluginError(
                f"TurboQuant's codes are packed by 8 channels: head_dim {x.shape[3]} isn't a multiple of 8"
            )
        return x

    def quantize(self, groups: Tensor) -> dict[str, Tensor]:
        x = groups.float()
        norm = x.norm(dim=-1, keepdim=True).half()
        unit = x / norm.float().clamp(min=torch.finfo(torch.float16).smallest_normal)
        values = codebook(x.shape[-1], self.bits).to(x.device)
        codes = torch.bucketize(unit @ rotation(x.shape[-1]).to(x.device), (values[1:] + values[:-1]) / 2)
        return {"codes": pack(codes, self.bits), "norm": norm}

    def dequantize(self, fields: dict[str, Tensor]) -> Tensor:
        codes = unpack(fields["codes"], self.bits)
        width, device = codes.shape[-1], codes.device
        return fields["norm"].float() * (codebook(width, self.bits).to(device)[codes] @ rotation(width).to(device).mT)


def turboquant_cache(num_layers: int, bits: int, sink_tokens: int = 0) -> Cache:
    """An empty cache whose codes have 1 to 4 bits. sink_tokens: first tokens kept exact, none in the paper."""
    sides = [[TurboSide(bits, sink_tokens) for _ in range(2)] for _ in range(num_layers)]
    return Cache(layers=[PackedLayer(k, v) for k, v in sides])
