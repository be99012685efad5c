"""One Fisher basis for K and V of a layer together, with rotary positions taken off the keys.

K before its rotation and V are both linear in the same hidden state, and the heads of a layer share structure: their
joint covariance is far from block-diagonal, and its principal axes take about a bit per channel less than those of
single heads (KVTC takes rotary positions off as well; MLA stores one latent for K and V by training). A group holds K
and V of as many neighbouring KV heads as fit into `MOST_CHANNELS`.

The price is arithmetic: the way back is a w × w product per token, and keys must be turned to their positions before
a query can read them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpt2.compression.codecs.base import Transform
from gpt2.compression.codecs.metric import Fisher
from gpt2.compression.rotary import Rotary

MOST_CHANNELS = 512


def beside(x: Tensor, groups: int) -> Tensor:
    """x [B, H, T, d] → [B, G, T, H/G · d]: the heads of a group side by side."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(-2)


def heads_per_group(num_kv_heads: int, head_dim: int) -> int:
    """Neighbouring KV heads whose K and V share a basis."""
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
class JointTransform(Transform):
    """Transform of x [B, 2H, T, d], K's heads before V's, with keys turned back by `rotary`."""

    rotary: Rotary = None

    joint = True
    linear = False  # keys turn with their positions

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        k, v = x.to(self.E.dtype).chunk(2, dim=1)
        grouped = side_by_side(self.rotary.turn(k, start, -1), v, groups=self.E.shape[0])
        return (grouped - self.mean[:, None]) @ self.E

    def inverse(self, z: Tensor, head_dim: int, start: int = 0) -> Tensor:
        k, v = apart(z.to(self.D.dtype) @ self.D + self.mean[:, None], head_dim)
        return torch.cat((self.rotary.turn(k, start, 1), v), dim=1)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Transform:
        return replace(super().to(device, dtype), rotary=self.rotary.to(device))


class Joint(Fisher):
    """The Fisher basis, fitted to moments whose "heads" are groups of K and V."""

    name = "joint"
    joint = True
    measured = True


class Grouped(Fisher):
    """One Fisher basis for K of neighbouring heads as it is cached, and one for V of them.

    It takes about half a bit per channel more than `Joint`, and in return is the same matrix for every token: a query
    reads what is stored, as with any basis of single heads.
    """

    name = "grouped"
    measured = True
