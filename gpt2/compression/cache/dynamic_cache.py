"""A compressed KV cache that drops into `model.generate(past_key_values=cache)`.

    k_comp, v_comp, metadata = load_calibrated_compressors("calibration.pt", quantize_bits=8)
    cache = CompressedDynamicCache(k_comp, v_comp)

The cache is a list of layers, as every cache of transformers is: those of `DynamicCache(config)`. The ones that keep K
and V of tokens store them in another way. A cache holds one conversation: make a new one, or `reset()` it, for the
next. It can be saved, forked and copied (`keeping`), and pickled. Other versions of this code than the one that made a
pickle reject it, because the same bytes may mean something else to them.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from gpt2.common.errors import NotInThisCache, PluginError
from gpt2.compression.cache.held_tokens import HeldTokens
from gpt2.compression.cache.keeping import Keeping
from gpt2.compression.cache.layers import CompressedLayer
from gpt2.compression.cache.mixed_layers import check_states_crop, clear_states, has_states, make_layer, map_states
from gpt2.compression.cache.padding import PaddingFinder
from gpt2.compression.cache.recipe import Recipe
from gpt2.compression.cache.storages import storages_of
from gpt2.compression.codecs import Compressor, IdentityCompressor
from gpt2.models.geometry import Geometry, LayerGeometry

log = logging.getLogger(__name__)
NEAR = 16  # tokens before transformers drops a cache, from which on that is said
OF_ANOTHER_MODEL = (
    "its preset or calibration is of another model, or says nothing of the layers: give model= or config= to "
    "create_cache_from_preset"
)


class CompressedDynamicCache(Keeping):
    """Drop-in for DynamicCache that stores K and V through one compressor per layer and side.

    k_compressors, v_compressors: one per layer, None for layers that keep no K and V. num_layers: checked against them
    when given. geometry: the model's layers; without it, all are full attention. A cache for full attention works with
    models whose layers slide too, but keeps what they forget.
    sink_tokens: number of first tokens kept exact, because attention sinks have activations far from all others; with
    left padding, of each row its own. recent_tokens: number of latest tokens kept exact, besides those of an
    unfinished block. recipe: the preset that it is made from, which `save` writes down. Raises PluginError for lists of
    different lengths and negative numbers.

    direct: whether compressed attention, where it is enabled, reads this cache; with False it gets reconstructions.
    """

    direct = True

    def __init__(
        self,
        k_compressors: Sequence[Compressor],
        v_compressors: Sequence[Compressor],
        num_layers: int | None = None,
        *,
        geometry: Geometry | None = None,
        sink_tokens: int = 4,
        recent_tokens: int = 0,
        recipe: Recipe | None = None,
    ):
        layers = geometry.layers if geometry else (LayerGeometry(),) * len(k_compressors)
        expected = len(layers) if num_layers is None else num_layers
        if len({len(layers), len(k_compressors), len(v_compressors), expected}) > 1 or not layers:
            raise PluginError(
                f"expected one K and one V compressor per layer, got {len(k_compressors)} and {len(v_compressors)} for "
                f"num_layers={len(layers) if geometry else num_layers}"
            )
        if sink_tokens < 0 or recent_tokens < 0:
            raise PluginError(f"expected 0 or more, got sink_tokens={sink_tokens} and recent_tokens={recent_tokens}")
        sink_tokens, recent_tokens = int(sink_tokens), int(recent_tokens)  # NumPy's make lengths that are no int
        each = zip(layers, k_compressors, v_compressors, strict=True)
        super().__init__(
            layers=[make_layer(own, i, k, v, sink_tokens, recent_tokens) for i, (own, k, v) in enumerate(each)]
        )
        self._first = next((i for i, layer in enumerate(self.layers) if isinstance(layer, CompressedLayer)), None)
        self.padding_finder = PaddingFinder()
        self.held_tokens = HeldTokens()
        self.geometry, self.recipe = geometry or Geometry(layers), recipe
        self._drops_at = self.geometry.drops_at  # None also after it was said
        calibrated = (k.calibrated_tokens for k in k_compressors if k and k.calibrated_tokens)
        self._calibrated_tokens = min(calibrated, default=None)  # likewise

    @property
    def compressed(self) -> list[CompressedLayer]:
        """The layers that keep K and V."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"stored_by": storage_version()}

    def __setstate__(self, state: dict) -> None:
        if state.pop("stored_by", None) != storage_version():
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
        layer = self.layers[layer_idx]
        if type(layer) is DynamicLayer:  # of a modality that isn't compressed
            return layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, CompressedLayer):
            raise PluginError(
                f"the model has attention in layer {layer_idx}, where this cache keeps no K and V: {OF_ANOTHER_MODEL}"
            )
        if layer_idx == self._first:
            self.check_awake()
            self._check_layers()
        elif not self.layers[self._first].is_initialized:  # the length of the cache is the first layer's
            raise PluginError(
                f"the model has no attention in layer {self._first}, where this cache expects it: {OF_ANOTHER_MODEL}"
            )
        if layer_idx == 0:  # deeper, K and V of padding differ
            layer.check_shapes(key_states, value_states)  # before what is rejected counts as padding
            self.look_for_padding(key_states, value_states)
        if self.padding_finder.changing:
            layer.set_padding(self.padding_finder.found)
        if layer_idx == self._first and (self._drops_at or self._calibrated_tokens):
            self._warn_of_length(layer.get_seq_length() + key_states.shape[2])
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except PluginError:  # what is rejected tells nothing of padding
            if layer_idx == 0 and self.padding_finder.changing:
                self.padding_finder.unsee()
                layer.set_padding(self.padding_finder.found)
            raise

    def look_for_padding(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take in the first layer's new K and V [B, H, n, d], which tell how much padding rows begin with."""
        self.padding_finder.see(key_states, value_states)

    def _warn_of_length(self, length: int) -> None:
        """Say once that bases of K hold less from here on, and, before it happens, that transformers drops this cache.

        A prompt beyond the length at which it is dropped keeps it.
        """
        if self._calibrated_tokens and length > self._calibrated_tokens:
            warn_beyond_calibration(self._calibrated_tokens)
            self._calibrated_tokens = None
        if self._drops_at and self._drops_at - NEAR <= length <= self._drops_at:
            log.warning(
                "this cache holds %d tokens, and transformers drops it for an uncompressed one where the text grows "
                "past %d: end the answer there, or give the longer text to a new cache", length, self._drops_at,
            )  # fmt: skip
            self._drops_at = None

    def _check_layers(self) -> None:
        """Reject a cache whose first layers hold tokens that the last don't, as after Ctrl-C or an error in a run."""
        first, last = self.compressed[0], self.compressed[-1]
        if first.rows_changed != last.rows_changed:
            raise PluginError("a batch selection was interrupted between layers: reset() the cache")
        lengths = first.get_seq_length(), last.get_seq_length()
        if lengths[0] != lengths[1]:
            raise PluginError(
                f"the first layer holds {lengths[0]} tokens and the last {lengths[1]}: a run was interrupted between "
                f"layers, so crop({lengths[1] - lengths[0]}) or reset() the cache; or the model has fewer layers than "
                "the cache, or other ones: give model= or config= to create_cache_from_preset; or it is an "
                "encoder-decoder, which needs EncoderDecoderCache(this cache, DynamicCache())"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """As `CompressedLayer.crop`, counted from the first layer's length: also after an interrupted run all agree.

        Raises the errors of transformers' own layers, and of ours, before any layer is changed.
        """
        self.check_awake()  # copies to the CPU may still be under way: what is read there now isn't what was stored
        ours, removed = self.compressed, int(tokens_to_remove)
        length = self.get_seq_length() + min(removed, 0)
        if shorter := [layer.index for layer in ours if layer.get_seq_length() < length]:
            raise PluginError(
                f"layer {shorter[0]} has fewer than the {length} tokens that crop({removed}) would leave "
                "in the first: a run was interrupted between layers, so crop more or reset() the cache"
            )
        each = [(layer, max(removed, 0) or length - layer.get_seq_length()) for layer in ours]
        for layer, own in each:
            layer.check_crop(own)
        others = [(i, layer) for i, layer in enumerate(self.layers) if not isinstance(layer, CompressedLayer)]
        for index, layer in others:
            check_states_crop(layer, max(-removed, 0), length, index)
        for _, layer in others:
            if has_states(layer) or not isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.crop(removed)
        for layer, own in each:
            layer.crop(own)
        for known in (self.padding_finder, self.held_tokens):
            known.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows `beam_idx` in the place of all."""
        self.check_awake()
        super().reorder_cache(beam_idx)
        for known in (self.padding_finder, self.held_tokens):
            known.map_(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def reset(self) -> None:
        """Forget everything: the next conversation may have another batch size and padding."""
        super().reset()
        self.padding_finder, self.held_tokens, self.parked = PaddingFinder(), HeldTokens(), False
        self._drops_at = self.geometry.drops_at
        for layer in self.layers:
            clear_states(layer)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, also of recurrent states, which transformers' own cache can't select."""
        indices = torch.as_tensor(indices) if isinstance(indices, (list, tuple)) else indices
        self._map_rows("batch_select_indices", indices, lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, also of recurrent states, which transformers' own cache can't repeat."""
        self._map_rows("batch_repeat_interleave", repeats, lambda t: t.repeat_interleave(repeats, dim=0))

    def _map_rows(self, operation: str, argument, on_states: Callable[[Tensor], Tensor]) -> None:
        self.check_awake()
        for layer in self.layers:
            if hasattr(layer, operation):
                getattr(layer, operation)(argument)
            else:
                map_states(layer, on_states)
        for known in (self.padding_finder, self.held_tokens):
            known.map_(on_states)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args, **kwargs) -> Tensor:
        """As transformers' own; raises PluginError where this cache was made for other layers."""
        self._check_states(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args, **kwargs) -> Tensor:
        """As `update_conv_state`."""
        self._check_states(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args, **kwargs) -> Tensor | None:
        """As `update_conv_state`."""
        self._check_states(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args, **kwargs) -> Tensor | None:
        """As `update_conv_state`."""
        self._check_states(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """As `update_conv_state`."""
        if not any(hasattr(layer, "update_indexer") for layer in self.layers[layer_idx : layer_idx + 1]):
            raise PluginError(
                f"the model has an indexer in layer {layer_idx}, for which this cache has no place: {OF_ANOTHER_MODEL}"
            )
        return super().update_indexer(indexer_key_states, layer_idx)

    def has_previous_state(self, layer_idx: int | None = None, *args, **kwargs) -> bool:
        """As `update_conv_state`."""
        self._check_states(layer_idx)
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def _check_states(self, layer_idx: int | None) -> None:
        layers = self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]
        if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
            where = "linear attention" if layer_idx is None else f"linear attention in layer {layer_idx}"
            raise PluginError(f"the model has {where}, but this cache was made for attention alone: {OF_ANOTHER_MODEL}")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """K, V and the window of each layer as DynamicCache gives them, K and V reconstructed."""
        for layer in self.layers:
            window = getattr(layer, "sliding_window", None)
            yield layer.keys, layer.values, None if window is None else torch.tensor(window)

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds tokens: some models give bidirectional attention to the first that it gets."""
        return any(layer.is_initialized for layer in self.compressed)

    def keep_reconstructed(self) -> CompressedDynamicCache:
        """Keep reconstructions beside the codes, for evaluations that read all of them at every step; returns self.

        What is read is the same. The memory that compression saves is used again, and `nbytes` counts it.
        """
        for layer in self.compressed:
            for store in layer.stores.values():
                store.keep_reconstructed = True
        return self

    @property
    def readable(self) -> bool:
        """Whether compressed attention reads all layers; keys without positions it doesn't (`Compressor.readable`)."""
        return all(c.readable for layer in self.compressed for c in (s.compressor for s in layer.stores.values()))

    def __bool__(self) -> bool:
        """Whether it holds tokens, as of transformers' growing cache: Phi-3 drops one that is true, empty or not."""
        return self.is_initialized and self.get_seq_length() > 0

    @property
    def max_cache_len(self) -> int:
        """Asked for by PEFT's prefix tuning alone, before it replaces the cache. Raises NotInThisCache."""
        raise NotInThisCache(
            "a compressed cache has no max_cache_len. If PEFT's prefix tuning asks: it gives the model an uncompressed "
            "cache of its own in the place of this one, so leave past_key_values out"
        )

    @property
    def is_exact(self) -> bool:
        """Whether all layers store K and V as the model made them."""
        return all(s.compressor.exact for layer in self.compressed for s in layer.stores.values())

    def nbytes(self) -> int:
        """Bytes of all that is held: exact tokens, codes with their scales, states, and memory allocated but unused."""
        return sum(storages_of(self.layers).values())

    def codec_bytes(self) -> int:
        """Bytes of the codecs: bases, rotations with the angles that they keep, and widths that a calibration chose.

        Each counts once. Caches of the same compressors share them, as they share weights.
        """
        each = (store.compressor.parts() for layer in self.compressed for store in layer.stores.values())
        return sum({part: size for parts in each for part, size in parts.items()}.values())


@functools.cache
def warn_beyond_calibration(tokens: int) -> None:
    """Say that bases of K hold less past the length that was calibrated: once, as evaluations make many caches."""
    log.warning(
        "the cache's bases of keys were calibrated on texts of %d tokens and hold less and less at positions beyond: "
        "calibrate with a longer --seq-len, or use what make_presets.py gives, which takes positions off keys",
        tokens,
    )  # fmt: skip


@functools.cache
def storage_version() -> str:
    """A digest of all sources that define how tokens are stored."""
    here = Path(__file__).parent
    sources = (*sorted(here.glob("*.py")), *sorted((here.parent / "codecs").glob("*.py")))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def identity_cache(layers: int | Geometry) -> CompressedDynamicCache:
    """A compressed cache that stores tokens exactly: the control of measurements.

    layers: a number of layers with full attention, or the model's geometry.
    """
    geometry = layers if isinstance(layers, Geometry) else Geometry((LayerGeometry(),) * layers)
    identity = [IdentityCompressor() for _ in geometry.layers]
    return CompressedDynamicCache(identity, identity, geometry=geometry)
