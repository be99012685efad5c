"""Affine maps between a layer's K or V and coordinates in a basis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gpt2.common.errors import PluginError


@dataclass(frozen=True)
class Transform:
    """An affine map into r coordinates per group of heads and back; shapes as in `base`.

    E, D: encoder and decoder, [G, w, r] and [G, r, w]; mean [G, w].
    """

    E: Tensor
    D: Tensor
    mean: Tensor

    joint = False  # whether x is K and V of a layer together
    frame: ClassVar[int | None] = None  # tokens of K that share an absorbed query; None: all, of any position

    @property
    def rank(self) -> int:
        return self.E.shape[-1]

    def truncate(self, rank: int) -> Transform:
        """Keep the first `rank` coordinates, which lose least. Raises PluginError for a rank that there isn't."""
        if not 1 <= rank <= self.rank:
            raise PluginError(
                f"rank {rank} is out of range: this basis has {self.rank} coordinates, use 1 to {self.rank}"
            )
        return replace(self, E=self.E[..., :rank].contiguous(), D=self.D[:, :rank].contiguous())

    def then(self, second: Transform) -> Transform:
        """This transform followed by one of its coordinates, as a single product. Needs D @ E = I."""
        return Transform(self.E @ second.E, second.D @ self.D, self.mean + (second.mean[:, None] @ self.D)[:, 0])

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x [B, H, T, d] from position `start` on → z [B, G, T, r], in the basis's own dtype."""
        grouped = join_heads(x, width=self.E.shape[1]).to(self.E.dtype)
        return (grouped - self.mean[:, None]) @ self.E

    def inverse(self, z: Tensor, head_dim: int, start: int = 0) -> Tensor:
        """z [B, G, T, r] → x̂ [B, H, T, d]."""
        return self.heads_of(z.to(self.D.dtype) @ self.D + self.mean[:, None], head_dim, start)

    def heads_of(self, x: Tensor, head_dim: int, start: int = 0) -> Tensor:
        """ẑ @ D + mean of each group, [B, G, T, w] → x̂ [B, H, T, d]: the last step of `inverse`."""
        return _split_heads(x, head_dim)

    def absorb_query(self, q: Tensor, starts: Tensor | None = None) -> Tensor:
        """q [B, H, M, d] → q' [B, G, H/G · M, r + 1], such that q · k̂ = q' · [ẑ, 1].

        Where tokens of a `frame` share an absorbed query, each of n frames has its own, [B, G, n, H/G · M, r + 1].
        starts: position of the first token of each, [n], or [B, n] where rows have their own. k̂ of a joint transform
        are the keys, and H their heads.
        """
        D = self.read_basis(q.shape[-1])
        return (q.to(D.dtype).unflatten(1, (-1, D.shape[1])) @ D.mT).flatten(2, 3)

    def frame_rotation(self, first: int | Tensor, frames: int) -> tuple[Tensor, bool] | None:
        """How `absorb_query` rotates queries for each of n frames before it multiplies them with `read_basis`.

        Cosines and sines, [n, 2, pairs] or [B, n, 2, pairs], and whether channels 2i and 2i + 1 rotate together, rather
        than i and i + pairs. first: position of the first frame's first token, [B] where rows have their own. None
        where it does something else: kernels then take what it returns.
        """
        return None

    def reconstruct_sum(self, y: Tensor, head_dim: int) -> Tensor:
        """Weighted sums of [ẑ, 1], y [B, G, H/G · M, r + 1] → the same sums of v̂, [B, H, M, d]."""
        D = self.summed_basis(head_dim)
        return (y.to(D.dtype).unflatten(2, (D.shape[1], -1)) @ D).flatten(1, 2)

    def read_basis(self, head_dim: int, keep: bool = True) -> Tensor:
        """`_affine` of what queries are compared with: keys of h heads are [ẑ, 1] @ it, [G, h, r + 1, d]."""
        return self._affine(head_dim, keep)

    def summed_basis(self, head_dim: int, keep: bool = True) -> Tensor:
        """`_affine` of what attention sums, [G, h, r + 1, d]."""
        return self._affine(head_dim, keep)

    def _affine(self, head_dim: int, keep: bool = True) -> Tensor:
        """[D; mean] of the h heads of each group, [G, h, r + 1, d]: x̂ = [ẑ, 1] @ it.

        keep: whether it is kept for the next caller. Those who make something else of it, once, don't ask again.
        """

        def make() -> Tensor:
            whole = torch.cat((self.D, self.mean[:, None]), dim=1).unflatten(-1, (-1, head_dim))
            return whole.transpose(1, 2).contiguous()

        return self.derived("by head", head_dim, make, keep)

    def __getstate__(self) -> dict:
        # What kernels made of the basis is as this machine's kernels read it, and another's may read it otherwise
        return {name: value for name, value in self.__dict__.items() if name != "_derived"}

    def derived(self, name: str, head_dim: int, make: Callable[[], Tensor], keep: bool = True) -> Tensor:
        """What is made of the basis for heads of `head_dim` channels: by `make` at first, then as it is kept."""
        kept = self.__dict__.setdefault("_derived", {})  # the dataclass is frozen, and this is not one of its fields
        if (name, head_dim) not in kept:
            made = make()
            if not keep:
                return made
            kept[name, head_dim] = made
        return kept[name, head_dim]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Transform:
        E, D, mean = (part.to(device=device, dtype=dtype) for part in (self.E, self.D, self.mean))
        return replace(self, E=E, D=D, mean=mean)

    def nbytes(self) -> int:
        """Bytes held, with what queries absorb once that is made."""
        return sum(part.nbytes for part in (self.E, self.D, self.mean, *self.__dict__.get("_derived", {}).values()))


def join_heads(x: Tensor, width: int) -> Tensor:
    """[B, H, T, d] → [B, G, T, w]: the heads of a group side by side."""
    B, H, T, d = x.shape
    if width == d:
        return x
    groups = H * d // width
    return x.view(B, groups, H // groups, T, d).transpose(2, 3).reshape(B, groups, T, -1)


def _split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, G, T, w] → [B, H, T, d], the inverse of `join_heads`."""
    B, G, T, w = x.shape
    if w == head_dim:
        return x
    return x.view(B, G, T, w // head_dim, head_dim).transpose(2, 3).reshape(B, -1, T, head_dim)
