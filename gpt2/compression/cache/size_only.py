"""Caches without values, to count the bytes of contexts that would take minutes to store: tensors have shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.codecs import Compressor
from gpt2.compression.codecs.base import Encoded, Quantizer
from gpt2.models.geometry import Geometry


class SizeOnly(Quantizer):
    """Stands for a compressor of tokens on the meta device: what it stores has the size of what that one stores.

    Every block takes the same bytes. heads, width, dtype: of its tokens.
    """

    name = "size only"
    lossless = True  # so that nobody looks for values to warn of

    def __init__(self, compressor: Compressor, heads: int, width: int, dtype: torch.dtype):
        self.bits, self.block_tokens = compressor.quantizer.bits, compressor.block_tokens
        self.fields = compressor.block_layout(heads, width, dtype)

    @property
    def signature(self) -> tuple:
        """Equal for compressors of tokens of one shape that store the same bytes."""
        return self.block_tokens, *((field.shape[1:], field.dtype) for field in self.fields.values())

    def quantize(self, z: Tensor) -> Encoded:
        blocks = z.shape[2] // self.block_tokens
        return {
            name: field.new_empty((z.shape[0], field.shape[1], blocks, *field.shape[3:]), device="meta")
            for name, field in self.fields.items()
        }

    def dequantize(self, encoded: Encoded, rank: int) -> Tensor:
        raise NotImplementedError("a cache without values can't be read")


def without_values(cache: CompressedDynamicCache, geometry: Geometry, dtype: torch.dtype) -> dict[int, tuple]:
    """Make an empty cache one that takes K and V of `dtype` on the meta device, and can't be read.

    Returns a signature of each attention layer, by its number: layers of one signature hold the same bytes.
    """
    known: dict[tuple, SizeOnly] = {}
    signatures = {}
    for index in geometry.attention:
        layer, own, found = cache.layers[index], geometry.layers[index], [geometry.layers[index]]
        layer.index = max(index, 1)  # the first layer compares new keys with those that it holds
        for side, store in layer.stores.items():
            if not store.compressor.exact:
                heads, width = (2 * own.k.heads, own.k.width) if side == "KV" else _shape(own.side(side.lower()))
                key = id(store.compressor), heads, width
                if key not in known:
                    known[key] = SizeOnly(store.compressor, heads, width, dtype)
                store.compressor = Compressor(known[key])
                found.append(known[key].signature)
        signatures[index] = tuple(found)
    return signatures


def _shape(shape) -> tuple[int, int]:
    return shape.heads, shape.width
