"""Bytes at lengths beyond those that are measured: what is taken to grow is what a real cache of that length holds."""

from functools import partial

import pytest

from gpt2.compression.cache import size
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.settings import Setting, build, uniform
from gpt2.models.geometry import FULL, SLIDING, Geometry, LayerGeometry, Shape

LENGTH = 20_000
HEAD = Shape(1, 16)
FULL_LAYER = LayerGeometry(FULL, HEAD, HEAD)
GEOMETRIES = {
    "full": (FULL_LAYER,),
    "window": (FULL_LAYER, LayerGeometry(SLIDING, HEAD, HEAD, window=130)),
    "indexer": (LayerGeometry(FULL, HEAD, HEAD, state_bytes=5000, index_width=8),),
}
SETTINGS = {
    "none": None,
    "int4": Setting("identity", 16, 4),
    "int8": Setting("identity", 16, 8),
}


def factory(geometry: Geometry, setting: Setting | None, **exact: int):
    plan = uniform("kv", geometry, setting) if setting else dict.fromkeys("kv", [None] * geometry.num_layers)
    return partial(CompressedDynamicCache, *build(plan, geometry), geometry=geometry, **exact)


def measured(make, geometry: Geometry, tokens: int) -> int:
    return size.cache_bytes(size.filled(make, geometry, tokens)) + geometry.uncompressed_bytes(tokens)


@pytest.mark.parametrize("layers", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_bytes_of_a_long_sequence_are_those_of_a_real_cache(layers, setting):
    assert LENGTH > 2 * size.LONGEST_MEASURED
    geometry = Geometry(layers)
    make = factory(geometry, setting)
    assert size.held_bytes(make, geometry, LENGTH) == pytest.approx(measured(make, geometry, LENGTH), rel=0.01)


def test_no_longer_cache_than_that_is_filled(monkeypatch):
    """Which would take minutes for a large model."""
    geometry, lengths, real = Geometry.uniform(1, 1, 16), [], size.filled
    monkeypatch.setattr(size, "filled", lambda make, geometry, n, *more, **rest: (
        lengths.append(n) or real(make, geometry, n, *more, **rest)
    ))  # fmt: skip
    for tokens in (size.LONGEST_MEASURED, LENGTH):
        size.held_bytes(factory(geometry, SETTINGS["int4"]), geometry, tokens)
    assert max(lengths) == size.LONGEST_MEASURED and lengths[0] == size.LONGEST_MEASURED


def test_where_a_window_ends_on_the_way_the_length_itself_is_measured():
    geometry = Geometry((FULL_LAYER, LayerGeometry(SLIDING, HEAD, HEAD, window=9000)))
    make = factory(geometry, SETTINGS["int4"])
    assert size.held_bytes(make, geometry, LENGTH) == measured(make, geometry, LENGTH)
