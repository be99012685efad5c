"""Bytes of caches against arithmetic: whole storages, exact tokens, unused room, and ratios to 16 bits."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from gpt2.compression.cache import size
from gpt2.compression.cache.size import cache_bytes, compression_ratio, exact_and_unused_bytes, filled, held_bytes
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.settings import Setting, build, compressors_for
from gpt2.models.geometry import FULL, SLIDING, Geometry, LayerGeometry, Shape

SHAPE = Geometry.uniform(2, 3, 64)


def with_codecs(target: str, bits: int, **windows):
    return lambda: CompressedDynamicCache(*compressors_for(target, bits, SHAPE), **windows)


@pytest.mark.parametrize(("target", "bits", "windows"), [
    ("v", 4, {}), ("k", 8, {"sink_tokens": 0}), ("kv", 4, {"sink_tokens": 64, "recent_tokens": 128}), ("kv", 16, {}),
])  # fmt: skip
def test_the_ratio_is_arithmetic(target, bits, windows):
    """16-bit vectors of 64 channels are 128 bytes; codes have a scale and an offset of two bytes each beside them."""
    exact = 2048 if bits == 16 else sum((windows | {"sink_tokens": windows.get("sink_tokens", 4)}).values())
    coded_side = exact * 128 + (2048 - exact) * (64 * bits // 8 + 4)
    held = len(target) * coded_side + (2 - len(target)) * 2048 * 128
    ratio = compression_ratio(with_codecs(target, bits, **windows), SHAPE)
    assert ratio == pytest.approx(2 * 2048 * 128 / held, rel=0.01)


def test_the_ratio_is_of_a_16_bit_model_at_a_stated_length():
    """At 64 tokens the sinks weigh more, and room that is allocated but unused counts, as in an exact cache."""
    short, long = (compression_ratio(with_codecs("kv", 4), SHAPE, tokens) for tokens in (64, 2048))
    assert short < long - 0.2
    assert compression_ratio(lambda: identity_cache(2), SHAPE, 64, torch.float32) == pytest.approx(0.5, rel=0.3)
    assert all(0.95 <= compression_ratio(lambda: identity_cache(2), SHAPE, tokens) <= 1 for tokens in (512, 2048, 3000))
    small = Geometry((LayerGeometry(SLIDING, Shape(2, 12), Shape(2, 12), window=8),))
    ratio = compression_ratio(lambda: identity_cache(1), small, 512)
    assert 7 / 512 <= ratio < 0.2, "of its window of 8 transformers keeps 7 tokens: storing all is no compression"


def test_bytes_count_storages_once_and_whole():
    cache = DynamicCache()
    large = torch.zeros(1, 1, 100, 8)
    cache.update(large[:, :, :2], large[:, :, :2], 0)
    assert cache_bytes(cache) >= 2 * 2 * 8 * 4
    cache.layers[0].keys = cache.layers[0].values = large[:, :, :1]
    assert cache_bytes(cache) == 100 * 8 * 4


def test_exact_and_unused_bytes_are_those_of_sinks_tail_and_room():
    cache = filled(with_codecs("kv", 8, recent_tokens=9), SHAPE, 100)
    exact, unused = exact_and_unused_bytes(cache)
    assert exact == 2 * 2 * 3 * 64 * 2 * (4 + 9), "layers, sides, heads, channels, bytes"
    whole = cache_bytes(cache)
    assert 0 < unused < whole - exact
    for store in (store for layer in cache.layers for store in layer.stores.values()):
        for stored in store.blocks.values():
            stored.chunks = [view.clone() for view in stored.views()]
            stored.unused = 0
    assert cache_bytes(cache) == whole - unused and exact_and_unused_bytes(cache) == (exact, 0)


# --- bytes at lengths beyond those that are really stored: counted without values, they are those of a filled cache


LONGEST, LONGER = 1000, 2501
HEAD = Shape(1, 16)
FULL_LAYER = LayerGeometry(FULL, HEAD, HEAD)
WINDOW = LayerGeometry(SLIDING, HEAD, HEAD, window=130)
STATES = LayerGeometry(FULL, HEAD, HEAD, state_bytes=5000, index_width=8)
INT4, BLOCKS = Setting("identity", 16, 4), Setting("hadamard", 16, 4, "int4_channel")


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    monkeypatch.setattr(size, "LONGEST_MEASURED", LONGEST)


def factory(geometry: Geometry, settings: list[Setting | None], **exact: int):
    return partial(CompressedDynamicCache, *build({"k": settings, "v": settings}, geometry), geometry=geometry, **exact)


def assert_as_filled(make, geometry: Geometry, **how) -> None:
    """Bytes that are worked out are those of a cache that is really filled, and of states."""
    real = cache_bytes(filled(make, geometry, LONGER, **how)) + geometry.uncompressed_bytes(LONGER)
    assert held_bytes(make, geometry, LONGER, **how) == real


@pytest.mark.parametrize(("settings", "exact", "how"), [
    ([None] * 2, {}, {}), ([INT4] * 2, {}, {}), ([BLOCKS] * 2, {}, {}),
    ([BLOCKS] * 2, {"sink_tokens": 0}, {"dtype": torch.float32}),
    ([BLOCKS] * 2, {"sink_tokens": 7, "recent_tokens": 100}, {"dtype": torch.float32, "chunk": 300}),
    ([INT4, None, INT4], {}, {}),
])  # fmt: skip
def test_bytes_of_a_long_sequence_are_those_of_a_real_cache(settings, exact, how):
    """Layers of different kinds and codecs count each as its own."""
    geometry = Geometry((STATES, WINDOW) if len(settings) == 2 else (FULL_LAYER,) * 3)
    make = factory(geometry, settings, **exact)
    if len(settings) == 3:
        assert size.layers_alike(make, geometry) == {0: 2, 1: 1}
    assert_as_filled(make, geometry, **how)


def test_nothing_longer_than_that_is_stored(monkeypatch):
    """Which would take minutes for a large model."""
    geometry, lengths, real = Geometry.uniform(1, 1, 16), [], size.noise
    monkeypatch.setattr(size, "noise", lambda *shape, **how: lengths.append(shape[1]) or real(*shape, **how))
    for tokens in (LONGEST, LONGER):
        held_bytes(factory(geometry, [INT4]), geometry, tokens)
    assert lengths == [LONGEST]


@pytest.mark.parametrize("window", [None, 1500])
def test_other_caches_are_taken_to_grow_in_proportion_unless_a_window_ends_on_the_way(window):
    second = LayerGeometry(SLIDING, HEAD, HEAD, window=window) if window else FULL_LAYER

    def make() -> Cache:
        return Cache(layers=[DynamicLayer(), DynamicSlidingWindowLayer(window) if window else DynamicLayer()])

    assert_as_filled(make, Geometry((FULL_LAYER, second)))
