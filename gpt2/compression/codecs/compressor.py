"""The codec of one layer's K or V as a cache uses it: a transform, where there is one, and a quantizer."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.base import HALF_MAX, Encoded, Quantizer
from gpt2.compression.codecs.none import Unquantized
from gpt2.compression.codecs.transform import Transform

SHORTEST_FRAME = 8  # tokens; to absorb a query for fewer takes as long as to reconstruct them


class Compressor:
    """Codec of one layer's K or V; shapes as in `base`. Holds no cached token, so that caches share it.

    calibrated_tokens: the length of text up to which keys are at positions that a calibration had; None where it
    doesn't matter. Raises PluginError for a quantizer whose blocks don't hold whole frames of the transform.
    """

    def __init__(self, quantizer: Quantizer, transform: Transform | None = None, calibrated_tokens: int | None = None):
        if transform is not None and transform.frame and quantizer.block_tokens % transform.frame:
            raise PluginError(
                f"quantizer {quantizer.name} codes {quantizer.block_tokens} tokens together, but keys of this codec "
                f"are un-rotated in frames of {transform.frame}: use mixed, or another with blocks of as many tokens"
            )
        self.quantizer = quantizer
        self.transform = transform
        self.calibrated_tokens = calibrated_tokens
        self._elsewhere: dict[torch.device, Compressor] = {}

    def __deepcopy__(self, memo: dict) -> Compressor:
        """A copied cache shares its compressors, as every other cache does."""
        return self

    @property
    def exact(self) -> bool:
        """Whether what comes back is bit for bit what went in."""
        return self.transform is None and self.quantizer.lossless

    @property
    def joint(self) -> bool:
        """Whether it takes K and V of a layer as one tensor of 2H heads."""
        return self.transform is not None and self.transform.joint

    @property
    def block_tokens(self) -> int:
        return self.quantizer.block_tokens

    @property
    def readable(self) -> bool:
        """Whether attention reads what is stored, through `absorb_query` and `reconstruct_sum`, in less time."""
        return self.frame is None or self.frame >= SHORTEST_FRAME

    @property
    def frame(self) -> int | None:
        """As `Transform.frame`."""
        return None if self.transform is None else self.transform.frame

    @property
    def affine(self) -> bool:
        """Whether absorbed queries and sums have a last coordinate more, which stands for the mean."""
        return self.transform is not None

    def coordinates(self, x: Tensor, start: int = 0) -> Tensor:
        """x [B, H, T, d] from position `start` on → z [B, G, T, r], as the quantizer takes them."""
        z = x if self.transform is None else self.transform.forward(x, start)
        # What isn't quantized is held in the model's dtype, not in the basis's
        return z.to(x.dtype) if self.quantizer.lossless else z

    def compress(self, x: Tensor, start: int = 0) -> Encoded:
        """x [B, H, T, d] from position `start` on → what is stored; T a multiple of `block_tokens`."""
        return self.quantizer.quantize(self.coordinates(x, start))

    def reconstruct(self, encoded: Encoded, head_dim: int, dtype: torch.dtype, start: int = 0) -> Tensor:
        """What `compress` returned → x̂ [B, H, T, d] in `dtype`; start: position of the first token."""
        z = self.quantizer.dequantize(encoded, self.rank(head_dim))
        return in_dtype(z if self.transform is None else self.transform.inverse(z, head_dim, start), dtype)

    def block_layout(self, heads: int, head_dim: int, dtype: torch.dtype) -> Encoded:
        """What `compress` stores of one block of x [1, H, block_tokens, d], without values: on the meta device."""
        return self.quantizer.block_layout(self.groups(heads, head_dim), self.rank(head_dim), dtype)

    def absorb_query(self, q: Tensor, starts: Tensor | None = None) -> Tensor:
        """As `Transform.absorb_query`, q itself where there is no transform."""
        return q if self.transform is None else self.transform.absorb_query(q, starts)

    def scores(self, q: Tensor, encoded: Encoded, out: Tensor) -> None:
        """Write q · k̂ of encoded tokens into out [B, G, M, T] float32; q as `absorb_query` returns it."""
        rank = q.shape[-1] - self.affine
        self.quantizer.scores(q[..., :rank], encoded, out)
        if self.affine and q.ndim == 4:
            out += q[..., rank:]
        elif self.affine:
            by_frame = out.unflatten(-1, (q.shape[2], -1))  # [B, G, M, n, frame]
            by_frame += q[..., rank:].transpose(2, 3)

    def reconstruct_sum(self, y: Tensor, head_dim: int) -> Tensor:
        """As `Transform.reconstruct_sum`, y itself where there is no transform."""
        return y if self.transform is None else self.transform.reconstruct_sum(y, head_dim)

    def rank(self, head_dim: int) -> int:
        """Coordinates that a group of heads has in a cache of `head_dim` channels per head."""
        return head_dim if self.transform is None else self.transform.rank

    def groups(self, heads: int, head_dim: int) -> int:
        """Groups that so many heads make: one each where every head has a basis, or all have the same."""
        if self.joint:
            return self.transform.E.shape[0]
        return heads if self.transform is None else heads * head_dim // self.transform.mean.shape[-1]

    def to(self, device: torch.device) -> Compressor:
        """This compressor on a device: itself if it is there already, else a copy that all caches there share."""
        if self.transform is None or self.transform.E.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Compressor(self.quantizer, self.transform.to(device), self.calibrated_tokens)
        return self._elsewhere[device]

    def check_shape(self, heads: int, head_dim: int, where: str) -> None:
        """Raise PluginError unless the transform fits a cache of `heads` KV heads of `head_dim` channels."""
        if self.transform is None:
            return
        groups, width, _ = self.transform.E.shape
        shared = width == head_dim and groups == 1
        if not shared and (groups * width != heads * head_dim or width % head_dim):
            raise PluginError(
                f"{where}: the codec was calibrated for {groups} groups of {width} channels, but the model has "
                f"{heads} KV heads of {head_dim}: calibrate this model"
            )

    def parts(self) -> dict[int, int]:
        """Bytes of quantizer, transform and rotation, each by its id: compressors share them, as sequences do."""
        parts = (self.quantizer, self.transform, getattr(self.transform, "rotary", None))
        return {id(part): part.nbytes() for part in parts if part is not None}

    def __repr__(self) -> str:
        rank = f", rank={self.transform.rank}" if self.transform else ""
        return f"{type(self).__name__}({self.quantizer.name}{rank})"


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Reconstructed numbers in a cache's dtype."""
    if dtype == torch.float16 and x.dtype != dtype:  # a step beyond the largest number would be infinite
        x = x.clamp(-HALF_MAX, HALF_MAX)
    return x.to(dtype)


class IdentityCompressor(Compressor):
    """Stores K or V as the model made them."""

    def __init__(self):
        super().__init__(Unquantized())
