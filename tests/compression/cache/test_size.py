"""Bytes of caches against arithmetic: whole storages, exact tokens, unused room, and ratios to 16 bits."""

from functools import partial

import pytest
import torch
from sampling import ALL, sampled
from tiny import tiny_loaded, windows
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from gpt2.compression.cache import size
from gpt2.compression.cache.size import cache_bytes, compression_ratio
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor, Transform
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.named_caches import from_preset
from gpt2.compression.settings import Setting, build, compressors_for, uniform
from gpt2.models.geometry import FULL, SLIDING, Geometry, LayerGeometry, Shape

LAYERS, HEADS, WIDTH = 3, 2, 12  # of the tiny model
TOKEN = 2 * LAYERS * HEADS * WIDTH * 2  # bytes of a token, K and V, in 16 bits
SHAPE = Geometry.uniform(2, 3, 64)


def with_codecs(target: str, bits: int, **windows):
    return lambda: CompressedDynamicCache(*compressors_for(target, bits, SHAPE), **windows)


RATIOS = [
    (target, bits, per_vector, windows)
    for target in ("v", "k", "kv")
    for windows in ({}, {"sink_tokens": 0}, {"sink_tokens": 64, "recent_tokens": 128})
    for bits, per_vector in ((16, 128), (8, 64 + 4), (4, 32 + 4))
]


@pytest.mark.parametrize(("target", "bits", "per_vector", "windows"), sampled(RATIOS, 5))
def test_the_ratio_is_arithmetic(target, bits, per_vector, windows):
    """16-bit vectors of 64 channels are 128 bytes; codes have a scale and an offset of two bytes each beside them."""
    exact = (windows | {"sink_tokens": windows.get("sink_tokens", 4)}).values()
    coded_side = 2048 * 128 if bits == 16 else sum(exact) * 128 + (2048 - sum(exact)) * per_vector
    held = len(target) * coded_side + (2 - len(target)) * 2048 * 128
    assert compression_ratio(with_codecs(target, bits, **windows), SHAPE) == pytest.approx(
        2 * 2048 * 128 / held, rel=0.01
    )


@pytest.mark.parametrize("rank", [48, 13])
def test_low_rank_stores_rank_coordinates(rank):
    E = torch.eye(64).expand(3, 64, 64)
    low = [Compressor(QUANTIZERS["none"], Transform(E, E.mT, torch.zeros(3, 64)).truncate(rank))] * 2

    def make():
        return CompressedDynamicCache([IdentityCompressor()] * 2, low)

    held = 2048 * 128 + 4 * 128 + 2044 * 2 * rank
    assert compression_ratio(make, SHAPE) == pytest.approx(2 * 2048 * 128 / held, rel=0.01)
    assert make().codec_bytes() == 4 * (2 * 3 * 64 * rank + 3 * 64), "beside the ratio, never in it"


def test_the_ratio_is_of_a_16_bit_model_at_a_stated_length():
    """At 64 tokens the sinks weigh more, and room that is allocated but unused counts, as in an exact cache."""
    short, long = (compression_ratio(with_codecs("kv", 4), SHAPE, tokens) for tokens in (64, 2048))
    assert short < long - 0.2
    assert compression_ratio(lambda: identity_cache(2), SHAPE, 64, torch.float32) == pytest.approx(0.5, rel=0.3)
    assert all(0.95 <= compression_ratio(lambda: identity_cache(2), SHAPE, tokens) <= 1 for tokens in (512, 2048, 3000))
    mistral = tiny_loaded("mistral").geometry
    ratio = compression_ratio(lambda: identity_cache(3), mistral, 512)
    assert 7 / 512 <= ratio < 0.2, "of its window of 8 transformers keeps 7 tokens: storing all is no compression"


def test_bytes_count_storages_once_and_whole():
    cache = DynamicCache()
    large = torch.zeros(1, 1, 100, 8)
    cache.update(large[:, :, :2], large[:, :, :2], 0)
    first = cache_bytes(cache)
    cache.layers[0].keys = cache.layers[0].values = large[:, :, :1]
    assert first >= 2 * 2 * 8 * 4 and cache_bytes(cache) == 100 * 8 * 4


@torch.no_grad()
def test_bytes_of_a_cache_that_a_model_filled():
    llama, tokens = tiny_loaded("llama"), windows(3, 65)
    ours, models = identity_cache(3), DynamicCache()
    for cache in (ours, models):
        llama.model(tokens, past_key_values=cache)
    assert cache_bytes(models) == 3 * 65 * llama.geometry.bytes_per_token(4)
    assert 1 <= cache_bytes(ours) / cache_bytes(models) < 1.05


def test_exact_and_unused_bytes_are_those_of_sinks_tail_and_room():
    llama = tiny_loaded("llama")
    cache = size.filled(from_preset("kv8", llama).make, llama.geometry, 100)
    stores = [store for layer in cache.layers for store in layer.stores.values()]
    tokens = [store.sinks.shape[2] + store.tail.shape[2] for store in stores]
    exact, unused = size.exact_and_unused_bytes(cache)
    assert (
        exact == sum(TOKEN // (2 * LAYERS) * (s.sinks.shape[2] + s.tail.shape[2]) for s in stores) and max(tokens) > 4
    )
    assert 0 < unused < size.cache_bytes(cache) - exact
    whole = size.cache_bytes(cache)
    for store in stores:
        for stored in store.blocks.values():
            stored.chunks = [view.clone() for view in stored.views()]
            stored.unused = 0
    assert size.cache_bytes(cache) == whole - unused and size.exact_and_unused_bytes(cache) == (exact, 0)


# --- bytes at lengths beyond those that are really stored: counted without values, they are those of a filled cache


LENGTHS = (9_001, 20_000)
HEAD = Shape(1, 16)
FULL_LAYER = LayerGeometry(FULL, HEAD, HEAD)
WINDOW = LayerGeometry(SLIDING, HEAD, HEAD, window=130)
GEOMETRY = Geometry((LayerGeometry(FULL, HEAD, HEAD, state_bytes=5000, index_width=8), WINDOW))
SETTINGS = {
    "none": None,
    "int4": Setting("identity", 16, 4),
    "blocks": Setting("hadamard", 16, 4, "int4_channel"),
}


def factory(geometry: Geometry, setting: Setting | None, **exact: int):
    plan = uniform("kv", geometry, setting) if setting else dict.fromkeys("kv", [None] * geometry.num_layers)
    return partial(CompressedDynamicCache, *build(plan, geometry), geometry=geometry, **exact)


def measured(make, geometry: Geometry, tokens: int) -> int:
    return size.cache_bytes(size.filled(make, geometry, tokens)) + geometry.uncompressed_bytes(tokens)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
def test_bytes_of_a_long_sequence_are_those_of_a_real_cache(setting):
    assert min(LENGTHS) > size.LONGEST_MEASURED
    make = factory(GEOMETRY, setting)
    for tokens in LENGTHS if ALL else LENGTHS[:1]:
        assert size.held_bytes(make, GEOMETRY, tokens) == measured(make, GEOMETRY, tokens)


@pytest.mark.parametrize("exact", [{"sink_tokens": 0}, {"sink_tokens": 7, "recent_tokens": 100}])
def test_exact_tokens_and_chunks_count_as_in_a_real_cache(exact):
    geometry = Geometry((FULL_LAYER, WINDOW))
    make, how = factory(geometry, SETTINGS["blocks"], **exact), {"dtype": torch.float32, "chunk": 500}
    real = size.cache_bytes(size.filled(make, geometry, LENGTHS[0], **how))
    assert size.held_bytes(make, geometry, LENGTHS[0], **how) == real


def test_layers_of_different_codecs_count_each_as_its_own():
    geometry = Geometry((FULL_LAYER,) * 3)
    plan = {side: [SETTINGS["int4"], None, SETTINGS["int4"]] for side in "kv"}
    make = partial(CompressedDynamicCache, *build(plan, geometry), geometry=geometry)
    assert size.layers_alike(make, geometry) == {0: 2, 1: 1}
    assert size.held_bytes(make, geometry, LENGTHS[0]) == measured(make, geometry, LENGTHS[0])


def test_nothing_longer_than_that_is_stored(monkeypatch):
    """Which would take minutes for a large model."""
    geometry, lengths, real = Geometry.uniform(1, 1, 16), [], size.noise
    monkeypatch.setattr(size, "noise", lambda *shape, **how: lengths.append(shape[1]) or real(*shape, **how))
    for tokens in (size.LONGEST_MEASURED, LENGTHS[0]):
        size.held_bytes(factory(geometry, SETTINGS["int4"]), geometry, tokens)
    assert lengths == [size.LONGEST_MEASURED]


@pytest.mark.parametrize("window", [None, 9000])
def test_other_caches_are_taken_to_grow_in_proportion_unless_a_window_ends_on_the_way(window):
    second = LayerGeometry(SLIDING, HEAD, HEAD, window=window) if window else FULL_LAYER
    geometry = Geometry((FULL_LAYER, second))

    def make() -> Cache:
        return Cache(layers=[DynamicLayer(), DynamicSlidingWindowLayer(window) if window else DynamicLayer()])

    assert size.held_bytes(make, geometry, LENGTHS[1]) == measured(make, geometry, LENGTHS[1])
