"""A compressed KV cache that drops into `model.generate(past_key_values=cache)`.

    k_comp, v_comp, metadata = load_calibrated_compressors("calibration.pt", quantize_bits=8)
    cache = CompressedDynamicCache(k_comp, v_comp)

The cache is a list of layers, as every cache of transformers is; its layers only store K and V in another way. A cache
holds one conversation: make a new one, or `reset()` it, for the next. It can be copied and pickled. Other versions of
this code than the one that made a pickle reject it, because the same bytes may mean something else to them.
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
    sink_tokens: number of first tokens kept exact, because attention sinks have activations far from all others; with
    left padding, add the length of the longest. recent_tokens: number of latest tokens kept exact, besides those of an
    unfinished block. Raises PluginError for lists of different lengths and negative numbers.

    direct: whether compressed attention, where it is enabled, reads this cache; with False it gets reconstructions.
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
                f"expected one K and one V compressor per layer, got {len(k_compressors)} and {len(v_compressors)} for "
                f"num_layers={num_layers}"
            )
        if sink_tokens < 0 or recent_tokens < 0:
            raise PluginError(f"expected 0 or more, got sink_tokens={sink_tokens} and recent_tokens={recent_tokens}")
        pairs = zip(k_compressors, v_compressors, strict=True)
        super().__init__(
            layers=[CompressedLayer(k, v, sink_tokens, recent_tokens, i) for i, (k, v) in enumerate(pairs)]
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"stored_by": _version()}

    def __setstate__(self, state: dict) -> None:
        if state.pop("stored_by", None) != _version():
            raise PluginError("this cache was pickled by another version of the code: run its tokens through the model "
                              "again, with a new cache")  # fmt: skip
        self.__dict__.update(state)

    @torch.compiler.disable  # in a compiled model, storing is left out of its graphs: it changes shapes at each step
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
        """Reject a cache whose first layers hold tokens that the last don't, as after Ctrl-C or an error in a run."""
        if self.layers[0].rows_changed != self.layers[-1].rows_changed:
            raise PluginError("a batch selection was interrupted between layers: reset() the cache")
        first, last = (self.layers[i].get_seq_length() for i in (0, -1))
        if first != last:
            raise PluginError(
                f"the first layer holds {first} tokens and the last {last}: a run was interrupted between layers, so "
                f"crop({last - first}) or reset() the cache; or the model has fewer layers than the cache"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """As `CompressedLayer.crop`, counted from the first layer's length: also after an interrupted run all agree."""
        length = self.get_seq_length() + min(int(tokens_to_remove), 0)
        if shorter := [layer.index for layer in self.layers if layer.get_seq_length() < length]:
            raise PluginError(
                f"layer {shorter[0]} has fewer than the {length} tokens that crop({int(tokens_to_remove)}) would leave "
                "in the first: a run was interrupted between layers, so crop more or reset() the cache"
            )
        for layer in self.layers:
            layer.crop(max(int(tokens_to_remove), 0) or length - layer.get_seq_length())

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds tokens: some models give bidirectional attention to the first that it gets."""
        return any(layer.is_initialized for layer in self.layers)

    def keep_reconstructed(self) -> CompressedDynamicCache:
        """Keep reconstructions beside the codes, for evaluations that read all of them at every step; returns self.

        What is read is the same. The memory that compression saves is used again, and `nbytes` counts it.
        """
        for layer in self.layers:
            for store in layer.stores.values():
                store.keep_reconstructed = True
        return self

    @property
    def readable(self) -> bool:
        """Whether compressed attention can read all layers; it can't read K of a joint codec."""
        return all(c.readable for layer in self.layers for c in (s.compressor for s in layer.stores.values()))

    def nbytes(self) -> int:
        """Bytes held for the cached tokens: exact tokens, codes with their scales, and memory allocated but unused."""
        return sum(store.nbytes() for layer in self.layers for store in layer.stores.values())

    def codec_bytes(self) -> int:
        """Bytes of the transforms. Caches that are made from the same compressors share them, as they share weights."""
        return sum(store.compressor.nbytes() for layer in self.layers for store in layer.stores.values())


@functools.cache
def _version() -> str:
    """A digest of all sources that define how tokens are stored."""
    here = Path(__file__).parent
    sources = (*sorted(here.glob("*.py")), *sorted((here.parent / "codecs").glob("*.py")))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def identity_cache(num_layers: int) -> CompressedDynamicCache:
    """A compressed cache that stores tokens exactly: the control of measurements."""
    identity = [IdentityCompressor() for _ in range(num_layers)]
    return CompressedDynamicCache(identity, identity)
