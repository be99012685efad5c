"""Bases that heads share: of K and V of several neighbouring heads, kept whole, with what each width of code costs.

Heads of a layer share structure: their joint covariance is far from block-diagonal, and its principal axes take fewer
bits than those of single heads. Which heads share a basis, and whether keys are un-rotated first, a basis says by two
attributes and one method; everything else follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpt2.compression.codecs.metric import Fisher, fit_in_metric
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.codecs.transform import Transform, join_heads
from gpt2.models.geometry import Geometry

MOST_CHANNELS = 512


class MultiHead(Fisher):
    """A Fisher basis that neighbouring KV heads of a layer share, of its K and V together or of each.

    It is fitted to statistics of its own: of vectors as `arrange` puts them side by side, and of blocks of tokens on
    which quantization is tried out, so that bits can be shared out over layers and channels.
    """

    multi_head = True
    ranked = False
    unrotated = False  # whether rotary positions are taken off keys first
    preset_prefix: str  # presets by ratio are named after it: PREFIX-4x

    def heads_per_group(self, num_kv_heads: int, head_dim: int) -> int:
        """Neighbouring KV heads that share a basis."""
        return heads_per_group(num_kv_heads, head_dim)

    @property
    def per_head(self) -> str:
        return self.metric

    @property
    def bases_per_layer(self) -> int:
        """1 where K and V of a layer share one, else 2: K's and V's."""
        return 1 if self.joint else 2

    def basis_index(self, layer: int, side: str) -> int:
        """Where the basis of a layer's K or V, `side` "k" or "v", is among those of all layers."""
        return layer if self.joint else 2 * layer + "kv".index(side)

    def shape(self, geometry: Geometry) -> Geometry:
        """Number of bases, groups of heads in each and channels of a group, as num_layers, num_kv_heads, head_dim."""
        L, H, d = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
        groups = H // self.heads_per_group(H, d)
        return Geometry.uniform(L * self.bases_per_layer, groups, 2 * H * d // groups // self.bases_per_layer)

    def arrange(self, k: Tensor, v: Tensor, rotary: Rotary, start: int) -> list[Tensor]:
        """A layer's k, v [B, H, T, d] from position `start` on, as its bases take them: [B, G, T, w] each.

        Un-rotating and arranging are orthogonal, so that gradients are arranged in the same way.
        """
        _, H, _, d = k.shape
        heads = self.heads_per_group(H, d)
        k = rotary.unrotate(k, start) if self.unrotated else k
        return [side_by_side(k, v, H // heads)] if self.joint else [join_heads(x, heads * d) for x in (k, v)]

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        """Fit basis number `layer` of `shape`; coordinates of all bases in one unit, so that bits can be shared out."""
        return fit_in_metric(moments.mean[layer], moments.covariance(layer), self.metric_of(moments, layer))

    def transform(self, side: str, E: Tensor, D: Tensor, mean: Tensor, rotary: Rotary) -> Transform:
        """The transform of a layer's K or V from matrices that were fitted; rotary: the layer's rotation."""
        if self.joint:
            return JointTransform(E, D, mean, rotary=rotary)
        if self.unrotated and side == "k":
            return UnrotatedTransform(E, D, mean, rotary=rotary)
        return Transform(E, D, mean)


def heads_per_group(num_kv_heads: int, head_dim: int) -> int:
    """Neighbouring KV heads of which K and V together have at most `MOST_CHANNELS`."""
    fits = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and 2 * n * head_dim <= MOST_CHANNELS]
    return max(fits, default=1)


def side_by_side(k: Tensor, v: Tensor, groups: int) -> Tensor:
    """k, v [B, H, T, d] → [B, G, T, w]: K of a group's heads, then V of them."""
    B, H, T, d = k.shape
    pair = torch.stack((k.unflatten(1, (groups, -1)), v.unflatten(1, (groups, -1))), dim=2)  # [B, G, 2, H/G, T, d]
    return pair.permute(0, 1, 4, 2, 3, 5).reshape(B, groups, T, -1)


def apart(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """[B, G, T, w] → k, v [B, H, T, d] each, the inverse of `side_by_side`."""
    B, G, T, w = x.shape
    pair = x.reshape(B, G, T, 2, w // head_dim // 2, head_dim).permute(0, 3, 1, 4, 2, 5)
    return tuple(part.reshape(B, -1, T, head_dim) for part in pair.unbind(1))


@dataclass(frozen=True)
class UnrotatedTransform(Transform):
    """Transform of keys [B, H, T, d] that `rotary` un-rotates first."""

    rotary: Rotary = None

    absorbable = False  # a key is rotated by its own position, which no single matrix does

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        return super().forward(self.rotary.unrotate(x.to(self.E.dtype), start))

    def inverse(self, z: Tensor, head_dim: int, start: int = 0) -> Tensor:
        return self.rotary.rotate(super().inverse(z, head_dim), start)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Transform:
        return replace(super().to(device, dtype), rotary=self.rotary.to(device))


@dataclass(frozen=True)
class JointTransform(UnrotatedTransform):
    """Transform of x [B, 2H, T, d], K's heads before V's, with keys that `rotary` un-rotates first."""

    joint = True

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        k, v = x.to(self.E.dtype).chunk(2, dim=1)
        grouped = side_by_side(self.rotary.unrotate(k, start), v, groups=self.E.shape[0])
        return (grouped - self.mean[:, None]) @ self.E

    def inverse(self, z: Tensor, head_dim: int, start: int = 0) -> Tensor:
        k, v = apart(z.to(self.D.dtype) @ self.D + self.mean[:, None], head_dim)
        return torch.cat((self.rotary.rotate(k, start), v), dim=1)
