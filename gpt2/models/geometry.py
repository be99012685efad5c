"""What a model's cache is made of, layer by layer: its kind, and the shapes of K and V.

Which kinds of layers a cache has is transformers' decision: those of `DynamicCache(config)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from gpt2.common.errors import UnsupportedModel
from gpt2.common.schema import Default, ListOf, Nullable, OneOf, Record, Whole

FULL, SLIDING, INDEXED = "full_attention", "sliding_attention", "indexed_attention"
LINEAR, HYBRID, HYBRID_SLIDING, NOTHING = "linear_attention", "hybrid", "hybrid_sliding", "dummy"
UNUSED = "unused"  # attention that a text gives no K and V, as to another modality: transformers' own layer, as it is
# Kinds that keep K and V of tokens. Chunked attention is sliding attention to a cache: only masks differ
ATTENTION_KINDS = (FULL, SLIDING, INDEXED, HYBRID, HYBRID_SLIDING)
WIDEST = 1024  # KV heads and channels of a head: larger than any model's
KINDS = (*ATTENTION_KINDS, LINEAR, NOTHING, UNUSED)


@dataclass(frozen=True)
class Shape:
    """K or V of one token in one layer: KV heads, None where a preset doesn't say, and channels of each."""

    heads: int | None
    width: int

    @property
    def size(self) -> int:
        """Numbers of one token."""
        return self.heads * self.width


@dataclass(frozen=True)
class LayerGeometry:
    """One layer of a cache. Latent attention has its latent as K and its rotary key as V.

    kind: one of KINDS. k, v: None in layers that keep no K and V. window: of sliding layers, in tokens; a query sees
    the window's last tokens, itself among them. states: recurrent or convolution states of linear and hybrid layers.
    state_bytes, index_width: what stays as it is: bytes of the states of one sequence of a 16-bit model, and channels
    of an indexer's key of each token. They don't tell layers apart.
    """

    kind: str = FULL
    k: Shape | None = None
    v: Shape | None = None
    window: int | None = None
    states: int = 1
    state_bytes: int = field(default=0, compare=False)
    index_width: int = field(default=0, compare=False)

    @property
    def attends(self) -> bool:
        """Whether it keeps K and V of tokens."""
        return self.kind in ATTENTION_KINDS

    def side(self, side: str) -> Shape | None:
        """Shape of K or V, `side` "k" or "v"."""
        return self.k if side == "k" else self.v

    def held(self, tokens: int) -> int:
        """Tokens whose K and V transformers' own cache holds, of `tokens` that were seen."""
        if not self.attends:
            return 0
        return tokens if self.window is None else min(tokens, self.window - 1)

    def uncompressed_bytes(self, tokens: int) -> int:
        """Bytes of one sequence that no codec makes smaller: states, and the keys of an indexer."""
        return self.state_bytes + 2 * self.index_width * tokens

    def bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of K and V of one held token, uncompressed."""
        return sum(shape.size for shape in (self.k, self.v) if shape) * element_bytes

    def record(self) -> dict:
        """As a JSON object without what is None."""
        shapes = {name: [shape.heads, shape.width] for name, shape in (("k", self.k), ("v", self.v)) if shape}
        window = {"window": self.window} if self.window else {}
        more = {"states": self.states} if self.states > 1 else {}
        more |= {name: getattr(self, name) for name in ("state_bytes", "index_width") if getattr(self, name)}
        return {"type": self.kind, **shapes, **window, **more}

    def __str__(self) -> str:
        window = f", window {self.window}" if self.window else ""
        shapes = (f", {name} {shape.heads} x {shape.width}" for name, shape in (("K", self.k), ("V", self.v)) if shape)
        return f"{self.kind}{window}{''.join(shapes)}"


@dataclass(frozen=True)
class Geometry:
    """Every layer of a model's cache, in the model's order.

    drops_at: tokens past which transformers drops the cache that it is given, None where it never does: a fact of the
    model's positions, which doesn't tell layers apart.
    """

    layers: tuple[LayerGeometry, ...]
    drops_at: int | None = field(default=None, compare=False)

    @classmethod
    def uniform(cls, num_layers: int, num_kv_heads: int, head_dim: int) -> Geometry:
        """Full attention in all layers, K and V of the same shape."""
        shape = Shape(num_kv_heads, head_dim)
        return cls((LayerGeometry(FULL, shape, shape),) * num_layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> list[int]:
        """Numbers of the layers that keep K and V."""
        return [index for index, layer in enumerate(self.layers) if layer.attends]

    @property
    def alike(self) -> bool:
        """Whether all layers are full attention with K and V of one shape."""
        return len(set(self.layers)) == 1 and self.layers[0].kind == FULL and self.layers[0].k == self.layers[0].v

    @property
    def head_dim(self) -> int:
        """Channels of a head of K in the first layer that has K: what names and presets of uniform models say."""
        return self._first.k.width

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the first layer that has K."""
        return self._first.k.heads

    @property
    def _first(self) -> LayerGeometry:
        return next(layer for layer in self.layers if layer.k)

    def __str__(self) -> str:
        """In a few words: layers by kind, and by shape."""
        each = Counter(map(str, self.layers))
        return "; ".join(f"{count} layer{'s' * (count > 1)}: {layer}" for layer, count in each.items())

    def bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of K and V of one token over all layers, uncompressed, as long as no window forgets it."""
        return sum(layer.bytes_per_token(element_bytes) for layer in self.layers)

    def without_windows(self) -> Geometry:
        """The same layers if none forgot anything."""
        kinds = {SLIDING: FULL, HYBRID_SLIDING: HYBRID}
        layers = tuple(replace(own, kind=kinds.get(own.kind, own.kind), window=None) for own in self.layers)
        return replace(self, layers=layers)

    def attention_bytes(self, tokens: int) -> int:
        """Bytes of K and V that transformers' own cache holds of one sequence of `tokens` in 16 bits."""
        return sum(layer.held(tokens) * layer.bytes_per_token() for layer in self.layers)

    def uncompressed_bytes(self, tokens: int) -> int:
        """Bytes of one sequence that no codec makes smaller: states, and the keys of indexers."""
        return sum(layer.uncompressed_bytes(tokens) for layer in self.layers)

    def sides(self) -> Iterator[tuple[int, str, Shape]]:
        """Every K and V: layer, "k" or "v", shape."""
        for index in self.attention:
            for side in ("k", "v"):
                yield index, side, self.layers[index].side(side)

    def record(self) -> list[dict]:
        """JSON objects, one per layer, for calibration files and presets: what `from_record` takes."""
        return [layer.record() for layer in self.layers]

    @classmethod
    def from_record(cls, record: list[dict]) -> Geometry:
        """The inverse of `record`, of one that fits `LAYERS`."""
        return cls(tuple(_layer_from(layer) for layer in record))

    def difference(self, other: Geometry) -> str | None:
        """The first layer in which another geometry differs, as "layer N: expected …, found …"; None if none does."""
        for index, (own, its) in enumerate(zip(self.layers, other.layers, strict=False)):
            if own != its:
                return f"layer {index}: expected {own}, found {its}"
        if len(self.layers) != len(other.layers):
            return f"expected {len(self.layers)} layers, found {len(other.layers)}"
        return None


_SHAPE = Default(Nullable(ListOf(Whole(1, WIDEST), 2)))
LAYERS = ListOf(
    Record({
        "type": OneOf(KINDS), "k": _SHAPE, "v": _SHAPE, "window": Default(Nullable(Whole(1))),
        "states": Default(Whole(1, 64), 1), "state_bytes": Default(Whole(0), 0), "index_width": Default(Whole(0), 0),
    })
)  # fmt: skip


def _layer_from(record: dict) -> LayerGeometry:
    k, v = (Shape(*record[side]) if record.get(side) else None for side in ("k", "v"))
    others = (record[name] for name in ("states", "state_bytes", "index_width"))
    return LayerGeometry(record["type"], k, v, record.get("window"), *others)


def layer_kinds(config) -> list[LayerGeometry]:
    """The layers of transformers' own cache for a config, without shapes. Raises UnsupportedModel for unknown kinds."""
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as error:
        raise _unknown(config, str(error)) from error
    found = [_kind_of(layer, config) for layer in layers]
    # Older transformers leave out the last layers where these read K and V of earlier ones
    missing = (config_field(config.get_text_config(decoder=True), "num_hidden_layers") or 0) - len(found)
    return found + [LayerGeometry(NOTHING)] * max(missing, 0)


def _kind_of(layer, config) -> LayerGeometry:
    """One of transformers' own cache layers, by its exact class: subclasses store what we know nothing of."""
    states = getattr(layer, "number_of_states", 1)
    window = getattr(layer, "sliding_window", None)
    name = type(layer).__name__
    if type(layer) is DynamicLayer:
        return LayerGeometry(FULL)
    if type(layer) is DynamicSlidingWindowLayer:
        return LayerGeometry(SLIDING, window=window)
    if type(layer) is LinearAttentionLayer:
        return LayerGeometry(LINEAR, states=states)
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return LayerGeometry(HYBRID, states=states)
    # By name, because older transformers lack some
    if name == "LinearAttentionAndSlidingWindowAttentionLayer":
        return LayerGeometry(HYBRID_SLIDING, window=window, states=states)
    if name == "DynamicIndexedLayer":
        return LayerGeometry(INDEXED)
    if name == "DummyLayer":
        return LayerGeometry(NOTHING)
    raise _unknown(config, name)


def _unknown(config, name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{config.model_type} can't be compressed: its layers of type {name} keep more than K and V of tokens, or keep "
        "them in a way of their own"
    )


def config_field(config, name: str):
    """A config's field, None where it has none; the first layer's where layers differ, and no other may be asked."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError, which older transformers lack
        return getattr(config.per_layer_config[0], name, None)
