"""One layer of the compressed cache: the methods that transformers calls, over one or two token stores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from gpt2.common.errors import PluginError
from gpt2.compression.cache.repeated_prompts import reject_repeated
from gpt2.compression.cache.token_store import DROPPED, Half, TokenStore, in_autocast, without_autocast
from gpt2.compression.codecs import Compressor


class StoredKV:
    """What `update` returns in place of K and V while the model's attention reads the stores.

    It has no operation of a tensor, so a model that uses K or V before attention does fails at once.
    """

    __slots__ = ("_layer", "_stores")

    def __getattr__(self, name: str):
        raise AttributeError(
            f"K and V aren't tensors while compressed attention reads the cache, so they have no {name!r}: call "
            "disable_compressed_attention on the model that last used this cache, and reset() the cache"
        )

    def __init__(self, layer: CompressedLayer):
        self._layer = layer
        stores = list(layer.stores.values())
        self._stores = tuple(stores) if len(stores) == 2 else (Half(stores[0], 0), Half(stores[0], 1))

    @property
    def reader(self):
        """Who reads the stores: what `attention` set on the layer."""
        return self._layer.reader

    @property
    def kinds(self) -> dict:
        """Kinds of decode steps in this layer, as `crossover` has named them, and what it found of them."""
        return self._layer.kinds

    def stores(self) -> tuple[TokenStore | Half, TokenStore | Half]:
        """Stores of K and of V: halves of one where K and V are stored together."""
        return self._stores

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V, reconstructed."""
        return self._layer.read()


class CompressedLayer(CacheLayerMixin):
    """Storage of one layer. `update` returns reconstructions, so it works with any model and any attention."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False  # shapes and devices are known with the first tokens only

    def __init__(
        self, k: Compressor, v: Compressor, sink_tokens: int, recent_tokens: int, index: int, reach: int | None = None
    ):
        CacheLayerMixin.__init__(self)
        compressors = {"KV": k} if k.joint else {"K": k, "V": v}
        self.stores = {side: TokenStore(c, sink_tokens, recent_tokens, reach) for side, c in compressors.items()}
        self.index = index
        self.reader = None  # set by `attention` while a model runs whose attention reads the stores
        self.kinds = {}  # see StoredKV
        self.begins = 0  # slot of the first token; what a window holds before it are copies that fill a block
        self.inconsistent = False  # True while the stores are being changed, and after such a change was interrupted
        self.rows_changed = 0  # number of batch selections; the same in all layers unless one was interrupted
        if k is not v and (k.joint or v.joint):
            raise PluginError(f"layer {index}: a joint codec is for K and V together, the same object for both")

    @property
    def keys(self) -> Tensor | None:
        """K as attention reads it, reconstructed at each call, for code that looks into a cache's layers (mllama)."""
        return self.read()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """V, as `keys`."""
        return self.read()[1] if self.is_initialized else None

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        """transformers' constructors set None. Raises PluginError for tensors, as where another tool writes K back."""
        if states is not None:
            raise PluginError(
                f"layer {self.index}: K and V of a compressed cache are reconstructed at each reading, so what is "
                "assigned to them would be lost: use crop, batch_select_indices or a new cache; tools that edit the K "
                "and V of a cache (kvpress) need DynamicCache"
            )

    @values.setter
    def values(self, states: Tensor | None) -> None:
        """As of `keys`."""
        CompressedLayer.keys.fset(self, states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if "KV" in self.stores and key_states.shape != value_states.shape:
            shapes = f"{list(key_states.shape)} and {list(value_states.shape)}"
            raise PluginError(
                f"layer {self.index}: a joint codec expects K and V of one shape, got {shapes}: use codecs that "
                "compress K and V separately"
            )
        for (side, store), x in zip(self.stores.items(), self.parts(key_states, value_states), strict=True):
            store.prepare(x, f"layer {self.index}, {side}")
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new tokens, [B, H, n, d] each; return all tokens, [B, H, T, d] each, as they are stored.

        While the model's attention reads the stores themselves, both are a StoredKV instead.
        """
        self.store(key_states, value_states)
        if self.reads_stored(key_states, value_states):
            stored = StoredKV(self)
            return stored, stored
        return straight_through(self.read(), (key_states, value_states))

    def reads_stored(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether the attention that asks reads the stores themselves. Where it learns, it needs tensors."""
        return self.reader is not None and self.reader.enabled and not _learning(key_states, value_states)

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens, [B, H, T, d] each, as they are stored."""
        with without_autocast(self.first_store.sinks):
            read = [store.read() for store in self.stores.values()]
        return tuple(read) if len(read) == 2 else read[0].chunk(2, dim=1)

    def parts(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """K and V as the stores take them: two tensors, or one of 2H heads."""
        return (torch.cat((keys, values), dim=1),) if "KV" in self.stores else (keys, values)

    @property
    def first_store(self) -> TokenStore:
        """The store of K, or of K and V together."""
        return next(iter(self.stores.values()))

    def store(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store new tokens, [B, H, n, d] each, without reading: the cost doesn't depend on how many tokens are held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        with without_autocast(key_states):
            self.check_shapes(key_states, value_states)
            parts = self.parts(key_states, value_states)
            if self.index == 0:
                reject_repeated(self.first_store, parts[0])
            self._begin_change()
            for store, x in zip(self.stores.values(), parts, strict=True):
                store.append(x.detach() if x.requires_grad else x)
            self.inconsistent = False

    def forget(self) -> None:
        """Drop what later queries don't see: nothing, where there is no window."""

    def _begin_change(self) -> None:
        """Call before the stores are changed, and set `inconsistent = False` after it.

        A change that Ctrl-C or a lack of memory interrupts leaves the stores inconsistent. Raises PluginError for such.
        """
        if self.inconsistent:
            raise PluginError(
                f"layer {self.index}: a change of the cache was interrupted, so its contents are inconsistent: reset() "
                "the cache"
            )
        self.inconsistent = True

    def check_shapes(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reject K and V of a batch of another size and of another model's heads, where the layer holds tokens."""
        if not self.is_initialized:
            return
        if key_states.shape[0] != self.first_store.sinks.shape[0]:
            raise PluginError(
                f"the cache holds a batch of {self.first_store.sinks.shape[0]}, got {key_states.shape[0]} sequences: "
                "reset() it, make a new one, or use batch_repeat_interleave before beam search and num_return_sequences"
            )
        new = [(x.shape[1], x.shape[3]) for x in (key_states, value_states)]
        if "KV" in self.stores:  # side by side, as of twice as many heads
            new = [(new[0][0] + new[1][0], new[0][1])]
        for held, (new_heads, new_width) in zip(self.stores.values(), new, strict=True):
            _, heads, _, width = held.sinks.shape
            if (heads, width) != (new_heads, new_width):
                raise PluginError(
                    f"layer {self.index}: the cache holds {heads} KV heads of {width} channels, got {new_heads} of "
                    f"{new_width}: another model filled it, so reset() it or make a new one"
                )

    def set_padding(self, padding: Tensor | None) -> None:
        """Left padding of each row in slots, [B]: known with the first tokens, before they are stored."""
        for store in self.stores.values():
            # A copy for each store; `prepare` moves it to where the first tokens are
            where = None if store.sinks is None else store.sinks.device
            store.own_sinks.set_padding(None if padding is None else padding.to(where, copy=True))

    def get_seq_length(self) -> int:
        return self.first_store.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self._check_query(query_length)
        return self.get_seq_length() + query_length, 0

    def _check_query(self, query_length: int) -> None:
        """Raise PluginError for no tokens: what generate feeds of a prompt much shorter than what a cache holds."""
        if query_length == 0:
            held = self.get_seq_length()
            raise PluginError(
                f"the cache holds {held} tokens and the model is fed none: the prompt is shorter than the conversation "
                "that the cache holds, so reset() the cache or make a new one for another prompt; to go on, give "
                "generate the whole conversation and what follows it"
                if held
                else "the model is fed no tokens: the prompt is empty"
            )

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        for store in self.stores.values():
            store.clear()
        self.kinds, self.begins = {}, 0
        self.is_initialized = self.inconsistent = False
        self.rows_changed = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens. tokens_to_remove: negative, as in transformers; 0 does nothing."""
        removed = self.check_crop(tokens_to_remove)
        if removed and self.is_initialized:
            with without_autocast(self.first_store.sinks):
                self._begin_change()
                for store in self.stores.values():
                    store.crop(removed)
                self.inconsistent = False

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens a call of `crop` removes. Raises its errors, without a change."""
        removed = -int(tokens_to_remove)  # transformers 5.17 passes a tensor in assisted decoding
        if removed < 0:
            raise PluginError(f"crop expects the number of tokens to remove as a negative number, got {-removed}")
        if removed > self.get_seq_length() and self.is_initialized:
            raise PluginError(f"can't crop {removed} tokens from a cache of {self.get_seq_length()}")
        return removed

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        # Rows out of range fail here, before any change
        fn(self.first_store.sinks.new_empty(self.first_store.sinks.shape[0]))
        self._begin_change()
        for store in self.stores.values():
            store.map_(fn)
        self.inconsistent = False

    def _map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._map(fn)
        self.rows_changed += self.is_initialized

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        indices = torch.as_tensor(indices) if isinstance(indices, (list, tuple)) else indices
        self._map_rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))


class CompressedSlidingLayer(CompressedLayer):
    """Storage of a layer with a sliding window: forgets what no later query sees, as DynamicSlidingWindowLayer does.

    Chunked attention is the same to a cache. What is out of reach is dropped in whole blocks.
    """

    is_sliding = True

    def __init__(self, k: Compressor, v: Compressor, sink_tokens: int, recent_tokens: int, index: int, *, window: int):
        reach = window - 1  # a query sees itself and the tokens before it
        super().__init__(k, v, sink_tokens, min(recent_tokens, reach), index, reach)
        self.sliding_window = window
        self.record_past = False  # whether to forget only in `crop`, for decoding that takes tokens back

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        super().reset()
        self.record_past = False  # else it never forgets again after an answer that was speculated

    def store(self, key_states: Tensor, value_states: Tensor) -> None:
        reach, n = self.sliding_window - 1, key_states.shape[2]
        visible = min(self.get_seq_length(), reach) + n
        self.forget()
        super().store(key_states, value_states)
        for store in self.stores.values():
            store.visible = visible

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """As CompressedLayer.update; returns the tokens in reach of the first of the new ones."""
        self.store(key_states, value_states)
        if key_states.shape[2] <= DROPPED and self.reads_stored(key_states, value_states):
            stored = StoredKV(self)
            return stored, stored
        read = straight_through(self.read(), (key_states, value_states))
        self.forget()  # at once: of a long prompt, most is out of reach
        return read

    def forget(self) -> None:
        """Drop what later queries don't see; K and V drop the same tokens."""
        if not self.is_initialized or self.record_past or self.inconsistent:
            return
        held = len(self.first_store)
        dropped = held - (self.sliding_window - 1)
        for store in [*self.stores.values()] * 2:  # twice, for what the second can't drop the first mustn't
            dropped = store.droppable(dropped) if dropped > 0 else 0
        if dropped:
            self._begin_change()
            for store in self.stores.values():
                store.drop_front(dropped)
            self.inconsistent = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self._check_query(query_length)
        length, reach = self.get_seq_length(), self.sliding_window - 1
        return min(length, reach) + query_length, max(length - reach, 0)

    def get_max_length(self) -> int:
        return self.sliding_window

    def check_crop(self, tokens_to_remove: int) -> int:
        if self.get_seq_length() >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                f"crop of layer {self.index}: its sliding window of {self.sliding_window} tokens has forgotten what a "
                "shorter cache would need; call activate_past_recording on the cache before it is filled"
            )
        removed = super().check_crop(tokens_to_remove)
        left = self.get_seq_length() - removed
        first = max(self.first_store.forgotten, self.begins)
        if removed and left - min(left, self.sliding_window - 1) < first:
            raise RuntimeError(
                f"crop of layer {self.index}: its sliding window of {self.sliding_window} tokens has forgotten what "
                f"the {left} tokens that stay would see; call activate_past_recording on the cache before it is filled"
            )
        return removed

    def crop(self, tokens_to_remove: int) -> None:
        """As CompressedLayer.crop; where the past is recorded, it is forgotten now, also with 0."""
        super().crop(tokens_to_remove)
        recording, self.record_past = self.record_past, False
        self.forget()
        self.record_past = recording


def _learning(*states: Tensor) -> bool:
    """Whether gradients are asked for with respect to K or V."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in states)


def as_new(read: tuple[Tensor, Tensor], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """K and V as read in the dtypes of new ones: the model may have been converted since. Autocast does it itself."""
    if in_autocast(new[0]):
        return read
    return tuple(x.to(own.dtype) for x, own in zip(read, new, strict=True))


def straight_through(read: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """K and V as read, with gradients that reach the newest tokens as if these had been stored exactly.

    Straight-through (Bengio, Léonard and Courville 2013): what rounding does to a gradient is left out. Tokens of
    earlier calls get none.
    """
    read = as_new(read, new)
    if not _learning(*new):
        return read

    def through(x: Tensor, own: Tensor) -> Tensor:
        n = own.shape[2]
        return torch.cat((x[:, :, :-n], x[:, :, -n:] + (own - own.detach()).to(x.dtype)), dim=2)

    return through(read[0], new[0]), through(read[1], new[1])
