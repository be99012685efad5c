"""Bytes at lengths beyond those that are really stored: counted without values, they are those of a filled cache."""

from functools import partial

import pytest
import torch
from sampling import ALL
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from gpt2.compression.cache import size
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.settings import Setting, build, uniform
from gpt2.models.geometry import FULL, SLIDING, Geometry, LayerGeometry, Shape

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
