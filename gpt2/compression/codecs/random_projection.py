"""Low rank by a random orthonormal basis: the control that shows what calibration is worth."""

import torch
from torch import Tensor

from gpt2.compression.codecs.base import Basis
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.transform import Transform


class RandomProjection(Basis):
    """Q of the QR decomposition of a Gaussian matrix, seeded by the layer; centred on the calibrated mean as PCA is."""

    name = "random"
    searched = False  # a control

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        C = moments.covariance(layer)
        gaussian = torch.randn(C.shape, generator=torch.Generator().manual_seed(layer), dtype=C.dtype)
        E = torch.linalg.qr(gaussian).Q
        return Transform(E, E.mT, moments.mean[layer]), (E.mT @ C @ E).diagonal(dim1=-2, dim2=-1)
