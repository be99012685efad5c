"""Bases in which squared error is what the model feels: PCA in a metric, eigenvectors of M^½ C M^½.

attention  M of K is E[qqᵀ] over the queries that read the head, so that (q·(k−k̂))² is least; M of V is Σ W_oᵀW_o over
           the query heads that share it, so that the error of the layer's output is least.
fisher     M is E[ggᵀ], the gradient of the loss with respect to K or V with labels that the model itself draws: half of
           the squared error is the change of the loss, in nats, to second order. K, V and all layers in one currency.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.base import Basis, Transform
from gpt2.compression.codecs.moments import Moments

SMALLEST_WEIGHT = 1e-6  # of the largest: directions that nothing reads still need a finite way back
LARGEST_FACTOR = 2.0**8  # between coordinates and channels, and its inverse, for which quantizers have steps to spare


def fit_in_metric(mean: Tensor, covariance: Tensor, metric: Tensor) -> tuple[Transform, Tensor]:
    """Transform whose coordinates' squared error is the error's M-norm, largest weighted variance first; float64.

    mean [G, w], covariance and metric [G, w, w]. Returns E [G, w, w] = M^½ U, D = Uᵀ M^-½ and the variances [G, w].
    """
    weights, axes = torch.linalg.eigh(metric.double())
    largest = weights.amax(-1, keepdim=True)
    # Where nothing at all was felt every direction counts the same
    weights = torch.where(largest > 0, weights.maximum(SMALLEST_WEIGHT * largest), torch.ones_like(weights))
    root = axes * weights.sqrt()[..., None, :] @ axes.mT
    inverse_root = axes * weights.rsqrt()[..., None, :] @ axes.mT
    variances, vectors = torch.linalg.eigh(root @ covariance.double() @ root)  # ascending
    U = vectors.flip(-1)
    return Transform(root @ U, U.mT @ inverse_root, mean.double()), variances.flip(-1).clamp_min(0)


def within_reach(metric: Tensor) -> Tensor:
    """A metric [G, w, w] by a power of four where it would make coordinates of a size that no step is made for.

    Gradients may be 1e-8 in every token, and a step of so little is none. Each head has its own factor.
    """
    weight = metric.diagonal(dim1=-2, dim2=-1).mean(-1).double().sqrt()
    outside = (weight > 0) & ((weight < 1 / LARGEST_FACTOR) | (weight > LARGEST_FACTOR))
    unit = torch.where(outside, weight.log2().round().exp2(), torch.ones_like(weight))
    return metric / unit.square()[:, None, None]


class Attention(Basis):
    """Query-aware K, output-aware V."""

    name = metric = "attention"

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        if self.metric not in moments.metrics:
            raise PluginError(
                f"codec {self.name} needs statistics that this calibration doesn't have: calibrate with "
                f"--metric {self.metric}, on a model whose attention can be read"
            )
        metric = moments.metrics[self.metric][layer]
        metric = metric if self.multi_head else within_reach(metric)  # measured ones have one unit for all layers
        return fit_in_metric(moments.mean[layer], moments.covariance(layer), metric)


class Fisher(Attention):
    """Squared error is loss."""

    name = metric = "fisher"
