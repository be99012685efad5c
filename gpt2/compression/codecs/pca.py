"""Low rank by principal components, one basis per KV head (guide, step 1)."""

import torch
from torch import Tensor

from gpt2.compression.codecs.base import Basis
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.transform import Transform


class PCA(Basis):
    """Eigenvectors of the centred covariance, largest variance first; D = Eᵀ."""

    name = "pca"

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        values, vectors = torch.linalg.eigh(moments.covariance(layer))  # ascending
        E = vectors.flip(-1)
        return Transform(E, E.mT, moments.mean[layer]), values.flip(-1).clamp_min(0)
