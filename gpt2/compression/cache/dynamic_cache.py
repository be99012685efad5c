"""A compressed KV cache that drops into `model.generate(past_key_values=cache)`.

    k_comp, v_comp, metadata = load_calibrated_compressors("calibration.pt", quantize_bits=8)
    cache = CompressedDynamicCache(k_comp, v_comp)

The cache is a list of layers, as every transformers cache is; a layer only replaces how K and V are stored. A cache
holds one conversation: make a new one, or `reset()` it, for the next. It can be copied and pickled; a pickle is refused
by any other version than made it, for the same bytes may mean something else there.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gpt2.common.errors import PluginError
from gpt2.compression.cache.layers import CompressedLayer
from gpt2.compression.codecs import Compressor, IdentityCompressor


class CompressedDynamicCache(Cache):
    """Drop-in for DynamicCache that stores K and V through one compressor per layer and side.

    k_compressors, v_compressors: one per layer. num_layers: checked against them when given.
    sink_tokens: first tokens kept exact; attention sinks carry activations no codec should touch. With left padding
    the padding comes first: add the longest padding to it. recent_tokens: latest tokens kept exact, beside what is
    left of an unfinished block.

    direct: whether a model that attends over what is stored may do so; with False it gets reconstructions all the same.
    """

    direct = True

    def __init__(
        self,
        k_compressors: Sequence[Compressor],
        v_compressors: Sequence[Compressor],
        num_layers: int | None = None,
        *,
        sink_tokens: int = 4,
        recent_tokens: int = 0,
    ):
        counts = {len(k_compressors), len(v_compressors), len(k_compressors) if num_layers is None else num_layers}
        if len(counts) > 1 or not len(k_compressors):
            raise PluginError(
                f"one K and one V compressor per layer: got {len(k_compressors)} and {len(v_compressors)} for "
                f"num_layers={num_layers}"
            )
        if sink_tokens < 0 or recent_tokens < 0:
            raise PluginError(f"sink_tokens={sink_tokens}, recent_tokens={recent_tokens}: neither can be negative")
        pairs = zip(k_compressors, v_compressors, strict=True)
        super().__init__(
            layers=[CompressedLayer(k, v, sink_tokens, recent_tokens, i) for i, (k, v) in enumerate(pairs)]
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"stored_by": _version()}

    def __setstate__(self, state: dict) -> None:
        if state.pop("stored_by", None) != _version():
            raise PluginError("this cache was pickled by another version of the code: run its tokens through the model "
                              "again, into a new one")  # fmt: skip
        self.__dict__.update(state)

    @torch.compiler.disable  # a model may be compiled: what is stored, where, is none of its graphs' matter
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """As `CompressedLayer.update`, for one layer of the model."""
        if layer_idx >= len(self.layers):
            raise PluginError(
                f"the model has a layer {layer_idx}, but this cache was made for {len(self.layers)} layers: "
                "its preset or calibration is of another model"
            )
        if layer_idx == 0:
            self._check_layers()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_layers(self) -> None:
        """Refuse what Ctrl-C or an error within a run has left: the first layers hold its tokens, the last don't."""
        if self.layers[0].rows_changed != self.layers[-1].rows_changed:
            raise PluginError("a change of the cache's rows was cut off between layers: reset() the cache")
        first, last = (self.layers[i].get_seq_length() for i in (0, -1))
        if first != last:
            raise PluginError(
                f"the first layer holds {first} tokens and the last {last}: a run was cut off between layers, so crop "
                f"what it left with crop({last - first}), or reset() the cache; or the model has fewer layers than it"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """As `CompressedLayer.crop`, of the first layer's tokens; all hold as many then, also after a run cut off."""
        length = self.get_seq_length() + min(int(tokens_to_remove), 0)
        if shorter := [layer.index for layer in self.layers if layer.get_seq_length() < length]:
            raise PluginError(
                f"layer {shorter[0]} has fewer than the {length} tokens that crop({int(tokens_to_remove)}) would leave "
                "in the first: a run was cut off between layers, crop more or reset() the cache"
            )
        for layer in self.layers:
            layer.crop(max(int(tokens_to_remove), 0) or length - layer.get_seq_length())

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have come: some models take the first for a prefix that sees all of itself."""
        return any(layer.is_initialized for layer in self.layers)

    def keep_expanded(self) -> CompressedDynamicCache:
        """Hold reconstructions beside the codes, for evaluations that read all of them at every step; returns self.

        What is read is the same; the memory that compression saves is taken again, and counted.
        """
        for layer in self.layers:
            for store in layer.stores.values():
                store.keep_expanded = True
        return self

    @property
    def readable(self) -> bool:
        """Whether attention can read every layer as it is stored; a joint codec's keys it can't."""
        return all(c.readable for layer in self.layers for c in (s.compressor for s in layer.stores.values()))

    def nbytes(self) -> int:
        """Bytes held for the cached tokens, all of them: exact parts, codes, scales, and allocated room."""
        return sum(store.nbytes() for layer in self.layers for store in layer.stores.values())

    def codec_bytes(self) -> int:
        """Bytes of the transforms, which all sequences share as they share weights."""
        return sum(store.compressor.nbytes() for layer in self.layers for store in layer.stores.values())


@functools.cache
def _version() -> str:
    """Changes with any source that says how tokens are stored."""
    here = Path(__file__).parent
    sources = (*sorted(here.glob("*.py")), *sorted((here.parent / "codecs").glob("*.py")))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def identity_cache(num_layers: int) -> CompressedDynamicCache:
    """A cache of ours that stores everything as it comes: the control for all measurements."""
    identity = [IdentityCompressor() for _ in range(num_layers)]
    return CompressedDynamicCache(identity, identity)
