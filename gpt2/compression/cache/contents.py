"""What a cache holds, as plain values and named tensors, and a cache filled with them again.

Everything that tokens left is in here: sinks, codes, tails and states of every layer, what is known of padding, and
marks such as how many tokens a window forgot. How tokens are coded isn't: the cache that is filled must have the same
codecs. A file may claim anything, so every shape and number is checked before it is used, and the last tokens of every
store must read as they did when they were saved: that also finds a codec whose basis has changed since.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, LinearAttentionCacheLayerMixin

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.common.schema import Default, ListOf, Nullable, Number, OneOf, Record, String, Whole
from gpt2.compression.cache.layers import CompressedLayer
from gpt2.compression.cache.token_store import TokenStore, without_autocast
from gpt2.models.geometry import Geometry, LayerGeometry

STATES = ("conv_states", "recurrent_states")
# Of each state of a linear layer
MARKS = {"is_conv_states_initialized": OneOf((True, False)), "is_recurrent_states_initialized": OneOf((True, False)),
         "has_previous_state": OneOf((True, False)), "conv_kernel_size": Nullable(Whole(1, 2**20))}  # fmt: skip
FLOATING = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
DTYPE = OneOf(tuple(FLOATING))
SKETCHED = 64  # tokens whose reading is compared
ALIKE = 0.01  # of their size: what another processor rounds otherwise is less, and another basis is more

MOST = Whole(0, 2**40)
STORE = Record({
    "forgotten": MOST, "dropped_blocks": MOST, "visible": Nullable(MOST), "fields": ListOf(String(64)),
    "sketch": ListOf(Number()), "end": MOST, "complete": OneOf((True, False)),
})  # fmt: skip
LAYER = Record({
    "dtype": Default(DTYPE), "stores": Default(Record(others=STORE)), "record_past": Default(OneOf((True, False))),
    "begins": Default(MOST), "states": Default(Record({name: ListOf(kind) for name, kind in MARKS.items()})),
})  # fmt: skip
CONTENTS = Record({"layers": ListOf(LAYER), "padded": OneOf((True, False))})
Named = dict[str, list[Tensor]]


def taken_apart(cache: Cache) -> tuple[dict, Named]:
    """Plain values that fit CONTENTS, and tensors in parts along their third dimension, by name; nothing is copied."""
    tensors: Named = {}
    layers = [_layer_record(layer, f"layers.{index}", tensors) for index, layer in enumerate(cache.layers)]
    found = cache.padding_finder
    if found.open is not None:
        _put(tensors, "padding", {"rows": found.rows, "open": found.open})
        _put(tensors, "padding.first", dict(enumerate(found.first)))
    return {"layers": layers, "padded": found.open is not None}, tensors


def fill(
    cache: Cache, record: dict, tensors: dict[str, Tensor], geometry: Geometry, device_of: Callable[[int], torch.device]
) -> None:
    """Fill an empty cache with what `taken_apart` gave of one with the same codecs.

    device_of: where the tensors of a layer go. Raises BadArtefact, without the file's name, for what doesn't fit.
    """
    count = len(record["layers"])
    _expect(count == len(cache.layers), f"it has {count} layers, not {len(cache.layers)}")
    left = dict(tensors)
    for index, (layer, own) in enumerate(zip(cache.layers, record["layers"], strict=True)):
        take = _Taken(left, f"layers.{index}", device_of(index))
        _fill_layer(layer, own, take, geometry.layers[index])
    if record["padded"]:
        _fill_padding(cache.padding_finder, _Taken(left, "padding", device_of(0)), geometry.layers[0])
    _expect(not left, f"tensors that no layer has: {', '.join(sorted(left)[:3])}")
    ours = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
    held = {(layer.is_initialized, layer.get_seq_length()) for layer in ours}
    rows = {store.sinks.shape[0] for layer in ours if layer.is_initialized for store in layer.stores.values()}
    _expect(len(held) == 1 and len(rows) <= 1, "its layers hold different numbers of tokens or rows")


class _Taken:
    """Tensors of one part of a cache, each taken once and moved to the part's device."""

    def __init__(self, left: dict[str, Tensor], prefix: str, device: torch.device):
        self.left, self.prefix, self.device = left, prefix, device

    def __call__(self, name, *, optional: bool = False) -> Tensor | None:
        name = f"{self.prefix}.{name}"
        if name not in self.left:
            _expect(optional, f"no tensor {name!r}")
            return None
        return self.left.pop(name).to(self.device)

    def under(self, name) -> _Taken:
        return _Taken(self.left, f"{self.prefix}.{name}", self.device)


def _expect(fits: bool, otherwise: str) -> None:
    if not fits:
        raise BadArtefact(otherwise)


def _put(tensors: Named, prefix: str, named: dict) -> None:
    tensors |= {f"{prefix}.{name}": [x] for name, x in named.items() if x is not None}


def _layer_record(layer, name: str, tensors: Named) -> dict:
    record = {}
    if isinstance(layer, CompressedLayer) and layer.is_initialized:
        stores = layer.stores.items()
        record = {
            "dtype": str(layer.dtype),
            "stores": {side: _store_record(store, f"{name}.{side}", tensors) for side, store in stores},
        }
    if hasattr(layer, "record_past"):
        record["record_past"] = bool(layer.record_past)
    if getattr(layer, "begins", 0):
        record["begins"] = layer.begins
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for kind in STATES:
            _put(tensors, f"{name}.{kind}", getattr(layer, kind))
        record["states"] = {mark: [getattr(layer, mark)[i] for i in range(layer.number_of_states)] for mark in MARKS}
    if isinstance(indexer := getattr(layer, "indexer", layer), DynamicIndexedLayer):
        positions = getattr(indexer, "indexer_position_ids", None)  # older transformers have none
        _put(tensors, f"{name}.indexer", {"keys": indexer.indexer_keys, "positions": positions})
    if type(layer) is DynamicLayer and layer.is_initialized:
        _put(tensors, name, {"keys": layer.keys, "values": layer.values})
    return record


def _store_record(store: TokenStore, name: str, tensors: Named) -> dict:
    own = store.own_sinks
    _put(tensors, name, {"sinks": store.sinks, "tail": store.tail})
    _put(tensors, f"{name}.own", {"padding": own.padding, "tokens": own.tokens, "kept": own.kept})
    held = {field: stored for field, stored in store.blocks.items() if stored.length}
    tensors |= {f"{name}.blocks.{field}": stored.views() for field, stored in held.items()}
    return {
        "forgotten": store.forgotten, "dropped_blocks": store.dropped_blocks, "visible": store.visible,
        "fields": list(held), "sketch": _sketch(store), "end": own.end, "complete": own.complete,
    }  # fmt: skip


def _sketch(store: TokenStore) -> list[float]:
    """Size of the last coded tokens as they read, and three sums of them; nothing where none can be compared."""
    blocks = min(max(SKETCHED // store.compressor.block_tokens, 1), store.compressed_blocks)
    if not blocks or store.compressor.exact:
        return []
    encoded = {name: stored.last(blocks) for name, stored in store.blocks.items()}
    with without_autocast(store.sinks):
        x = store.reconstruct(encoded, store.compressed_blocks - blocks).double().flatten().cpu()
    sums = torch.cat((x.norm()[None], _waves(len(x)) @ x)).tolist()
    return sums if all(map(math.isfinite, sums)) else []


@lru_cache(maxsize=4)  # layers of a model have few shapes
def _waves(count: int) -> Tensor:
    """Three weights for each of so many numbers, [3, count]."""
    return torch.cos(torch.arange(1, 4, dtype=torch.float64)[:, None] * torch.arange(count, dtype=torch.float64))


def _fill_layer(layer, own: dict, take: _Taken, geometry: LayerGeometry) -> None:
    if isinstance(layer, CompressedLayer) and "stores" in own:
        _expect(own["stores"].keys() == layer.stores.keys() and "dtype" in own, f"{take.prefix}: other sides than K, V")
        for side, store in layer.stores.items():
            shapes = [geometry.k, geometry.v] if side == "KV" else [geometry.side(side.lower())]
            known = all(shape and shape.heads for shape in shapes)
            heads = sum(shape.heads for shape in shapes) if known else None
            part = take.under(side)
            _fill_store(store, own["stores"][side], part, heads, f"layer {layer.index}, {side}")
        lengths = {(store.forgotten, len(store)) for store in layer.stores.values()}
        _expect(len(lengths) == 1, f"{take.prefix}: K and V of different lengths")
        layer.dtype, layer.device, layer.is_initialized = FLOATING[own["dtype"]], take.device, True
        layer.begins = own.get("begins", 0)
    if hasattr(layer, "record_past"):
        layer.record_past = own.get("record_past", False)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        _fill_states(layer, own, take)
    if isinstance(indexer := getattr(layer, "indexer", layer), DynamicIndexedLayer):
        keys, positions = (take.under("indexer")(name, optional=True) for name in ("keys", "positions"))
        if keys is not None:
            indexer.lazy_initialization_indexer(keys)
            indexer.indexer_keys = keys
        if positions is not None:
            indexer.indexer_position_ids = positions
    if type(layer) is DynamicLayer and (keys := take("keys", optional=True)) is not None:
        layer.lazy_initialization(keys, keys)
        layer.keys, layer.values = keys, take("values")


def _fill_states(layer, own: dict, take: _Taken) -> None:
    _expect("states" in own, f"{take.prefix}: no states")
    for mark, values in own["states"].items():
        _expect(len(values) == layer.number_of_states, f"{take.prefix}: {len(values)} states")
        setattr(layer, mark, dict(enumerate(values)))
    for kind in STATES:
        for i in range(layer.number_of_states):
            state = take.under(kind)(i, optional=True)
            _expect((state is None) != own["states"][f"is_{kind}_initialized"][i], f"{take.prefix}: {kind} missing")
            if state is not None:  # transformers writes into its states
                getattr(layer, kind)[i] = state.clone()
                if layer.device is None or not isinstance(layer, CompressedLayer):
                    layer.dtype, layer.device = state.dtype, state.device


def _fill_store(store: TokenStore, own: dict, take: _Taken, heads: int | None, where: str) -> None:
    sinks, tail = take("sinks"), take("tail")
    at, shape = take.prefix, list(sinks.shape)
    fits = len(shape) == 4 and shape[:2] == list(tail.shape[:2]) and shape[3:] == list(tail.shape[3:])
    _expect(fits and str(sinks.dtype) in FLOATING and sinks.dtype == tail.dtype, f"{at}: sinks and tail don't match")
    _expect(heads in (None, shape[1]), f"{at}: {shape[1]} KV heads, the model has {heads}")
    try:
        store.prepare(sinks, where)
    except PluginError as error:  # of a codec for other heads
        raise BadArtefact(str(error)) from error
    dropped, block = own["dropped_blocks"], store.compressor.block_tokens
    first = store.sink_tokens - store.sink_tokens % block + dropped * block
    forgotten = own["forgotten"]
    _expect(store.tail_only or forgotten == (first if dropped else 0), f"{at}: {forgotten} forgotten tokens")
    _expect(shape[2] <= (0 if dropped else store.sink_tokens), f"{at}: {shape[2]} sinks")
    store.sinks, store.tail = sinks, tail
    store.forgotten, store.dropped_blocks, store.visible = forgotten, dropped, own["visible"]
    _fill_blocks(store, own["fields"], take.under("blocks"))
    _fill_own_sinks(store, own, take.under("own"))
    _check_sketch(store, own["sketch"], at)


def _fill_blocks(store: TokenStore, fields: list[str], take: _Taken) -> None:
    """Codes of the shapes and kinds that the store's codec makes."""
    if not fields:
        return
    rows, heads, _, width = store.sinks.shape
    made = store.compressor.block_layout(heads, width, store.sinks.dtype)
    _expect(list(made) == fields, f"{take.prefix}: its codec stores {', '.join(made)}, found {', '.join(fields)}")
    count = None
    for name, example in made.items():
        stored = take(name)
        same = stored.dtype == example.dtype or (stored.is_floating_point() and example.is_floating_point())
        shape = [rows, example.shape[1], stored.shape[2] if stored.dim() > 2 else 0, *example.shape[3:]]
        _expect(same and list(stored.shape) == shape and count in (None, shape[2]) and shape[2] > 0,
                f"{take.prefix}.{name}: {str(stored.dtype)[6:]} {list(stored.shape)} where its codec stores "
                f"{str(example.dtype)[6:]} {shape}")  # fmt: skip
        count = shape[2]
        store.blocks[name] = store.growing()
        store.blocks[name].chunks, store.blocks[name].length = [stored], count
    encoded = {name: stored.chunks[0] for name, stored in store.blocks.items()}
    transform = store.compressor.transform
    fits = store.compressor.quantizer.fits(encoded, width if transform is None else transform.rank)
    _expect(fits, f"{take.prefix}: codes that reach beyond their blocks")


def _fill_own_sinks(store: TokenStore, own: dict, take: _Taken) -> None:
    sinks = store.own_sinks
    padding, tokens, kept = (take(name, optional=True) for name in ("padding", "tokens", "kept"))
    B, H, _, d = store.sinks.shape
    whole = padding is None or (padding.dtype == torch.long and list(padding.shape) == [B])
    _expect(whole and (padding is None or 0 <= int(padding.min()) <= int(padding.max()) <= store.seen),
            f"{take.prefix}: padding out of range")  # fmt: skip
    both = (tokens is None) == (kept is None) and (tokens is None or padding is not None)
    fits = tokens is None or (
        list(tokens.shape) == [B, H, sinks.count + 1, d] and kept.dtype == torch.bool and tokens.is_floating_point()
        and list(kept.shape) == [B, sinks.count]
    )  # fmt: skip
    fits = fits and own["end"] <= store.seen + sinks.count
    _expect(both and fits, f"{take.prefix}: sinks of padded rows don't match")
    sinks.padding, sinks.complete, sinks.end = padding, own["complete"], own["end"]
    # Both are written to as tokens come, and a store of a fork has its own
    sinks.tokens, sinks.kept = (None if x is None else x.clone() for x in (tokens, kept))


def _check_sketch(store: TokenStore, saved: list[float], at: str) -> None:
    found = _sketch(store) if saved else []
    tolerance = ALIKE * max(saved[:1], default=0) + 1e-12
    if len(found) != len(saved) or any(abs(a - b) > tolerance for a, b in zip(found, saved, strict=True)):
        raise BadArtefact(
            f"{at}: its codes don't read as they did when they were saved: the preset's calibration is another one "
            "than then, or the codec has changed; give the calibration that it was made with, or read the tokens again"
        )


def _fill_padding(finder, take: _Taken, geometry: LayerGeometry) -> None:
    rows, finder.open = take("rows", optional=True), take("open").cpu()
    finder.first = take("first.0"), take("first.1")
    finder.rows = None if rows is None else rows.cpu()
    shapes = {finder.open.shape, *(() if rows is None else (rows.shape,))}
    _expect(len(shapes) == 1 and finder.open.dtype == torch.bool and finder.open.dim() == 1, "padding doesn't match")
    for x, shape in zip(finder.first, (geometry.k, geometry.v), strict=True):
        sizes = list(x.shape[1::2]) if shape is None or shape.heads is None else [shape.heads, shape.width]
        expected = [len(finder.open), sizes[0], 1, sizes[-1]] if x.dim() == 4 else None
        _expect(list(x.shape) == expected and x.is_floating_point(), "padding doesn't match")
    _expect(rows is None or (rows.dtype == torch.long and int(rows.min()) >= 0), "padding doesn't match")
