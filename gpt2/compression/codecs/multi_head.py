"""Bases that heads share: of K and V of several neighbouring heads, kept whole, with what each width of code costs.

Heads of a layer share structure: their joint covariance is far from block-diagonal, and its principal axes take fewer
bits than those of single heads. Which heads share a basis, and whether keys are un-rotated first, a basis says by two
attributes and one method; everything else follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.metric import Fisher, fit_in_metric
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.rope import NONE, Rotary
from gpt2.compression.codecs.transform import Transform, join_heads
from gpt2.models.geometry import FULL, NOTHING, Geometry, LayerGeometry, Shape


class MultiHead(Fisher):
    """A Fisher basis that neighbouring KV heads of a layer share, of its K and V together or of each.

    It is fitted to statistics of its own: of vectors as `arrange` puts them side by side, and of blocks of tokens on
    which quantization is tried out, so that bits can be shared out over layers and channels.
    """

    multi_head = True
    ranked = False
    frame = 1  # neighbouring tokens of which one position, that of their middle, is taken off
    most_channels = 512  # of K and V of the heads that share a basis
    preset_prefix: str  # presets by ratio are named after it: PREFIX-4x

    def heads_per_group(self, num_kv_heads: int, head_dim: int) -> int:
        """Neighbouring KV heads that share a basis."""
        return heads_per_group(num_kv_heads, head_dim, self.most_channels)

    @property
    def per_head(self) -> str:
        return self.metric

    def misfit(self, geometry: Geometry) -> str | None:
        """Why a model's layers can't have such a basis, None where all can."""
        reasons = (self.misfit_of(index, layer) for index, layer in enumerate(geometry.layers))
        return next(filter(None, reasons), None)

    def misfit_of(self, index: int, layer: LayerGeometry) -> str | None:
        """Why a layer, number `index`, can't have such a basis, None where it can."""
        if not self.joint or layer.k == layer.v:
            return None
        shapes = " and ".join(f"{shape.heads} x {shape.width}" for shape in (layer.k, layer.v))
        return f"layer {index}: codec {self.name} needs K and V of one shape, got {shapes}: use grouped"

    @property
    def bases_per_layer(self) -> int:
        """1 where K and V of a layer share one, else 2: K's and V's."""
        return 1 if self.joint else 2

    def basis_index(self, layer: int, side: str) -> int:
        """Where the basis of a layer's K or V, `side` "k" or "v", is among those of all layers."""
        return layer if self.joint else 2 * layer + "kv".index(side)

    def shape(self, geometry: Geometry) -> Geometry:
        """The bases of all layers as layers: groups of heads in place of KV heads, channels of a group as their width.

        Layers without K and V keep their places among them. Raises PluginError where a layer can't have such a basis.
        """
        if reason := self.misfit(geometry):
            raise PluginError(reason)
        return Geometry(tuple(base for layer in geometry.layers for base in self._bases_of(layer)))

    def _bases_of(self, layer: LayerGeometry) -> list[LayerGeometry]:
        if not layer.attends:
            return [LayerGeometry(NOTHING)] * self.bases_per_layer
        bases = []
        for side in (layer.k,) if self.joint else (layer.k, layer.v):
            groups = side.heads // self.heads_per_group(side.heads, side.width)
            shape = Shape(groups, (2 if self.joint else 1) * side.size // groups)
            bases.append(LayerGeometry(FULL, shape, shape))
        return bases

    def head_widths(self, geometry: Geometry) -> list[int | None]:
        """Channels of a single head in each basis of `shape`, None for layers without K and V."""
        sides = ("k",) if self.joint else ("k", "v")
        shapes = [layer.side(side) for layer in geometry.layers for side in sides]
        return [shape and shape.width for shape in shapes]

    def arrange(self, k: Tensor, v: Tensor, rotary: Rotary, start: int) -> list[Tensor]:
        """A layer's k, v [B, H, T, d] from position `start` on, as its bases take them: [B, G, T, w] each.

        Un-rotating and arranging are orthogonal, so that gradients are arranged in the same way. k and v may differ in
        H and d unless the basis is joint.
        """
        k = rotary.unrotate(k, start, self.frame) if self.unrotated else k
        shapes = [(x.shape[1], x.shape[3]) for x in (k, v)]
        if self.joint:
            return [side_by_side(k, v, k.shape[1] // self.heads_per_group(*shapes[0]))]
        return [join_heads(x, self.heads_per_group(*own) * own[1]) for x, own in zip((k, v), shapes, strict=True)]

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        """Fit basis number `layer` of `shape`; coordinates of all bases in one unit, so that bits can be shared out."""
        return fit_in_metric(moments.mean[layer], moments.covariance(layer), self.metric_of(moments, layer))

    def transform(self, side: str, E: Tensor, D: Tensor, mean: Tensor, rotary: Rotary) -> Transform:
        """The transform of a layer's K or V from matrices that were fitted; rotary: the layer's rotation."""
        how = {"rotary": rotary if self.unrotated else NONE, "shared": self.frame}
        if self.joint:
            return JointTransform(E, D, mean, **how)
        if self.unrotated and side == "k":
            return UnrotatedTransform(E, D, mean, **how)
        return Transform(E, D, mean)


def heads_per_group(num_kv_heads: int, head_dim: int, most_channels: int = MultiHead.most_channels) -> int:
    """Neighbouring KV heads of which K and V together have at most `most_channels`."""
    fits = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and 2 * n * head_dim <= most_channels]
    return max(fits, default=1)


def side_by_side(k: Tensor, v: Tensor, groups: int) -> Tensor:
    """k, v [B, H, T, d] → [B, G, T, w]: K of a group's heads, then V of them."""
    heads = (head for x in (k, v) for head in x.unflatten(1, (groups, -1)).unbind(2))
    return torch.cat(tuple(heads), dim=-1)


def apart(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """[B, G, T, w] → k, v [B, H, T, d] each, the inverse of `side_by_side`."""
    B, G, T, w = x.shape
    pair = x.reshape(B, G, T, 2, w // head_dim // 2, head_dim).permute(0, 3, 1, 4, 2, 5)
    return tuple(part.reshape(B, -1, T, head_dim) for part in pair.unbind(1))


@dataclass(frozen=True)
class UnrotatedTransform(Transform):
    """Transform of keys [B, H, T, d] that `rotary` un-rotates first.

    shared: neighbouring tokens that are un-rotated by one position, that of their middle.
    """

    rotary: Rotary = NONE
    shared: int = 1

    @property
    def frame(self) -> int | None:
        return self.shared if self.rotary.rotates else None

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        return super().forward(self.rotary.unrotate(x.to(self.E.dtype), start, self.shared))

    def heads_of(self, x: Tensor, head_dim: int, start: int | Tensor = 0) -> Tensor:
        return self.rotary.rotate(super().heads_of(x, head_dim), start, frame=self.shared)

    def absorb_query(self, q: Tensor, starts: Tensor | None = None) -> Tensor:
        """As Transform's: a key is rotated by the position of its frame, or the query back by it.

        One batched product for all frames, [H/G] of (frames · M) × d by d × (r + 1) in each group.
        """
        if self.frame is None:
            return super().absorb_query(q)
        D = self.read_basis(q.shape[-1])
        middle = self._middles(starts.to(q.device))
        middle = middle[..., None] if middle.ndim == 1 else middle[:, None, :, None]  # [n, 1], or [B, 1, n, 1]
        rotated = self.rotary.rotate_by(q.to(D.dtype)[:, :, None], middle, -1)  # [B, H, n, M, d]
        absorbed = rotated.flatten(2, 3).unflatten(1, (-1, D.shape[1])) @ D.mT  # [B, G, H/G, n · M, r + 1]
        return absorbed.unflatten(3, (-1, q.shape[2])).transpose(2, 3).flatten(3, 4)

    def frame_rotation(self, first: int | Tensor, frames: int) -> tuple[Tensor, bool] | None:
        return self.rotary.frame_angles(first, frames, self.shared), self.rotary.layout == "interleaved"

    def _middles(self, starts: Tensor) -> Tensor:
        """Positions of the middles of frames whose first tokens are at `starts`."""
        return starts.float() + (self.shared - 1) / 2

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Transform:
        return replace(super().to(device, dtype), rotary=self.rotary.to(device))


@dataclass(frozen=True)
class JointTransform(UnrotatedTransform):
    """Transform of x [B, 2H, T, d], K's heads before V's, with keys that `rotary` un-rotates first."""

    joint = True

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        k, v = x.to(self.E.dtype).chunk(2, dim=1)
        grouped = side_by_side(self.rotary.unrotate(k, start, self.shared), v, groups=self.E.shape[0])
        return grouped.sub_(self.mean[:, None]) @ self.E

    def heads_of(self, x: Tensor, head_dim: int, start: int | Tensor = 0) -> Tensor:
        k, v = apart(x, head_dim)
        return torch.cat((self.rotary.rotate(k, start, frame=self.shared), v), dim=1)

    def read_basis(self, head_dim: int, keep: bool = True) -> Tensor:
        both = self._affine(head_dim, keep)
        return both[:, : both.shape[1] // 2]

    def summed_basis(self, head_dim: int, keep: bool = True) -> Tensor:
        both = self._affine(head_dim, keep)
        return both[:, both.shape[1] // 2 :]
