"""Caches filled with noise, for measurements of decoding alone: values change neither size nor speed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.cache_utils import Cache

from gpt2.common.errors import PluginError
from gpt2.compression.cache import size
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.models.loading import LoadedModel

CHUNK_VALUES = 1 << 28  # numbers of K or V appended at a time: half a gigabyte in 16 bits
LEAST_CHUNK = 64  # tokens


@torch.no_grad()
def fill(cache: Cache, loaded: LoadedModel, context: int, batch: int, seed: int = 0) -> None:
    """Put `context` tokens of noise into every layer with K and V, the same in all of one shape.

    States of recurrent layers stay empty, as before a first token. Raises PluginError for a model on several devices.
    """
    if len({parameter.device for parameter in loaded.model.parameters()}) > 1:
        raise PluginError(f"{loaded.spec} is spread over several devices, and noise fills caches on one: leave --noise "
                          "out, or give --device one of them")  # fmt: skip
    layers = [(index, loaded.geometry.layers[index]) for index in loaded.geometry.attention]
    shapes = {shape for _, layer in layers for shape in (layer.k, layer.v)}
    generator = torch.Generator(loaded.device).manual_seed(seed)
    how = {"generator": generator, "device": loaded.device, "dtype": loaded.model.dtype}
    for tokens in chunks(context, batch * max(shape.size for shape in shapes)):
        x = {shape: torch.randn(batch, shape.heads, tokens, shape.width, **how) for shape in shapes}
        for index, layer in layers:
            if index == 0 and isinstance(cache, CompressedDynamicCache):
                cache.look_for_padding(x[layer.k], x[layer.v])
            if index < len(cache.layers):
                size.store(cache.layers[index], x[layer.k], x[layer.v])
            else:  # a cache that makes its layers as they come
                cache.update(x[layer.k], x[layer.v], index)


def chunks(context: int, values_per_token: int) -> Iterator[int]:
    """Tokens to append at a time, so that a chunk takes a small part of memory."""
    most = max(CHUNK_VALUES // values_per_token // LEAST_CHUNK, 1) * LEAST_CHUNK
    for start in range(0, context, most):
        yield min(most, context - start)
