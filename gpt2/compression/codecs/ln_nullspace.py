"""LayerNorm nullspace: drop the all-ones direction of each head's vector (guide, LayerNorm nullspace).

LayerNorm makes vectors whose mean over channels is zero. The guide applies the same to each head's cached vector, which
no norm has made: what the projection loses there is the vector's mean over its channels, and that is for measurement
to say.
"""

import math

import torch

from gpt2.compression.codecs.base import FixedBasis
from gpt2.compression.codecs.transform import Transform


class LayerNormNullspace(FixedBasis):
    """Helmert's orthonormal basis of the complement of (1, …, 1): r = width − 1, no calibration, no mean."""

    name = "ln_nullspace"
    searched = False  # no better than its absence in any measurement

    def full_rank(self, width: int) -> int:
        return width - 1

    def transform(self, width: int) -> Transform:
        E = torch.zeros(width, width - 1, dtype=torch.float64)
        for j in range(1, width):
            E[:j, j - 1] = 1 / math.sqrt(j * (j + 1))
            E[j, j - 1] = -j / math.sqrt(j * (j + 1))
        return Transform(E[None], E.mT[None].contiguous(), torch.zeros(1, width, dtype=torch.float64))
