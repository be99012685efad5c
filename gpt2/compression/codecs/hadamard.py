"""Hadamard rotation: every channel spread evenly over all coordinates, for any model at once.

A few channels of a head are far larger than the rest, and their range sets the step of a token that all of them share.
Rotated, no coordinate stands out (QuaRot, Ashkboos et al. 2024). Nothing is fitted and no mean is taken off.
"""

import math

import torch
from torch import Tensor

from gpt2.compression.codecs.base import FixedBasis
from gpt2.compression.codecs.transform import Transform


class Hadamard(FixedBasis):
    """Sylvester's Hadamard matrix of the largest power of two in the width, ⊗ the cosine basis of what is left of it.

    80 channels: 16 ⊗ 5. Both factors are orthonormal, so D = Eᵀ is the inverse. No coordinate is worth more than
    another: a rank can be cut, at a loss that is the same share.
    """

    name = "hadamard"

    def full_rank(self, width: int) -> int:
        return width

    def transform(self, width: int) -> Transform:
        power = width & -width
        E = torch.kron(sylvester(power), cosines(width // power))
        return Transform(E[None], E.mT[None].contiguous(), torch.zeros(1, width, dtype=torch.float64))


def sylvester(size: int) -> Tensor:
    """Orthonormal Hadamard matrix of a power of two, [size, size] float64: all entries ±1 / √size."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < size:
        H = torch.cat((torch.cat((H, H), dim=1), torch.cat((H, -H), dim=1)))
    return H / math.sqrt(size)


def cosines(size: int) -> Tensor:
    """Orthonormal DCT-II, [size, size] float64, a basis vector per column: it exists for every size."""
    place = torch.arange(size, dtype=torch.float64)
    C = torch.cos(math.pi / size * (place[:, None] + 0.5) * place) * math.sqrt(2 / size)
    C[:, 0] = 1 / math.sqrt(size)
    return C
