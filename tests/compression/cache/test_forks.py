"""Forks of a cache hold what is common once and go on by themselves; caches coded anew, and parked ones."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from generation import assistant_of, generate
from kept import cache_of
from kinds import KINDS, WINDOWED, cut, feed, geometry_of, ids_of, model_of
from sampling import covering, sampled
from tiny import tiny_model
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.cache import keeping
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.compression.settings import compressors_for
from gpt2.models.geometry import Geometry

WIDE = Geometry.uniform(2, 3, 64)
HELD = 150


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_eight_forks_hold_a_prefix_once():
    """Of 4,096 tokens, at most 1.05 times one; and once they go on, their own tokens more."""
    cache = CompressedDynamicCache(*compressors_for("kv", 4, WIDE, quantizer="int4_channel"), geometry=WIDE)
    for layer in range(2):
        cache.update(*torch.randn(2, 1, 3, 4096, 64), layer)
    one = cache_bytes(cache)
    forks = [cache.fork() for _ in range(8)]
    assert cache_bytes(cache, *forks) <= 1.05 * one
    assert all(fork.nbytes() == cache.nbytes() == one for fork in forks), "each would take as much alone"
    for fork in forks:
        for layer in range(2):
            fork.update(*torch.randn(2, 1, 3, 70, 64), layer)
    blocks = 8 * 2 * 2 * 3 * (64 * 64 + 70 * 64 * 4)  # their own: less than 70 exact tokens and a block each
    assert one < cache_bytes(cache, *forks) < one + 2 * blocks


OPERATIONS = {
    "append": lambda model, cache: feed(model, cache, ids_of(90, batch=cache.rows, seed=1)),
    "crop into codes": lambda model, cache: (cache.crop(-70), feed(model, cache, ids_of(99, batch=cache.rows, seed=1))),
    "crop in the tail": lambda model, cache: (cache.crop(-2), feed(model, cache, ids_of(70, batch=cache.rows))),
    "reorder": lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda model, cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda model, cache: cache.batch_repeat_interleave(2),
    "reset": lambda model, cache: cache.reset(),
    "offload": lambda model, cache: cache.offload(),
    "keep": lambda model, cache: (cache.keep_reconstructed(), feed(model, cache, ids_of(90, batch=2))),
}


@pytest.mark.parametrize(("what", "name"), covering(OPERATIONS, ["kv4", "exact"]))
def test_what_happens_to_one_does_not_happen_to_the_other(what, name, model):
    """Both ways, and each is what a copy of its own would be."""
    for changed_one in ("fork", "origin"):
        cache = cache_of(model, name)
        feed(model, cache, ids_of(HELD, batch=2))
        copied, expected = copy.deepcopy(cache), copy.deepcopy(cache)
        changed, other = (cache.fork(), cache) if changed_one == "fork" else (cache, cache.fork())
        OPERATIONS[what](model, changed)
        OPERATIONS[what](model, copied)
        more = ids_of(80, batch=2, seed=2)
        assert torch.equal(feed(model, other, more), feed(model, expected, more))
        if changed.rows:
            more = ids_of(80, batch=changed.rows, seed=3)
            assert torch.equal(feed(model, changed, more), feed(model, copied, more))


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_layer_is_forked(family):
    model = model_of(family)
    cache = cache_of(model, "kv4", family, geometry_of(family))
    held, one, other = (cut(family, ids) for ids in (ids_of(HELD), ids_of(80, seed=1), ids_of(80, seed=2)))
    feed(model, cache, held)
    fork, expected = cache.fork(), copy.deepcopy(cache)
    feed(model, fork, one)
    wanted = feed(model, expected, other)
    for each in (cache, cache.fork()):
        assert torch.equal(feed(model, each.fork(), other), wanted)


@pytest.mark.parametrize("how", sampled(["beams", "assisted", "lookup"], 2))
def test_forks_generate_as_the_cache_does(how, model):
    """From one document, with no copy of it for each answer."""
    ids, new = ids_of(HELD - 1), ids_of(9, seed=1)
    whole = torch.cat((ids, new), dim=1)
    ways = {"beams": {"num_beams": 3}, "assisted": {"assistant_model": assistant_of(model)}}
    how = ways.get(how, {"prompt_lookup_num_tokens": 3})
    cache = cache_of(model)
    feed(model, cache, ids)
    before = cache.layers[0].read()[0]
    answers = []
    for one in (cache.fork(), cache.fork(), copy.deepcopy(cache)):
        if "num_beams" in how:
            one.batch_repeat_interleave(3)
        answers.append(generate(model, one, whole, **how))
    assert all(torch.equal(answer, answers[-1]) for answer in answers)
    assert torch.equal(cache.layers[0].read()[0], before)


# --- coded anew


@pytest.mark.parametrize(("family", "name"), covering(KINDS, ["kv4", "kv8"]))
def test_from_an_exact_cache_the_loss_is_that_of_one_codec(family, name, caplog):
    """What transformers' own cache holds, coded, is what the codec makes of the same K and V; states are the same."""
    model, geometry = model_of(family), geometry_of(family)
    preset = cache_of(model, name, family, geometry).recipe.preset
    exact, own = cache_of(model, "exact", family, geometry), DynamicCache(config=model.config)
    for cache in (exact, own):
        feed(model, cache, ids_of(200, batch=2))
    with caplog.at_level(logging.WARNING, keeping.log.name):
        both = [exact.to_preset(preset), keeping.from_cache(own, preset, geometry=geometry)]
    assert not [record for record in caplog.records if record.name == keeping.log.name], "nothing was lost before"
    straight = cache_of(model, name, family, geometry)
    for index in geometry.attention:
        if geometry.layers[index].window is None:
            k, v = exact.layers[index].read()
            straight.layers[index].store(k, v)
            for cache in both:
                assert all(map(torch.equal, cache.layers[index].read(), straight.layers[index].read())), index
    more = ids_of(9, batch=2, seed=1)
    found = [feed(model, cache, more) for cache in both]
    if family not in WINDOWED:  # where transformers' own has forgotten more, the first block is another
        assert torch.equal(*found)
    assert both[0].get_seq_length() == both[1].get_seq_length() == 209 and exact.get_seq_length() == 200
    wanted = feed(model, exact, more)
    for logits in found:
        assert 0 < (logits - wanted).norm() < 0.9 * (wanted - wanted.mean()).norm()


def test_from_a_lossy_cache_it_is_said(model, caplog):
    cache = cache_of(model, "kv4")
    feed(model, cache, ids_of(HELD))
    with caplog.at_level(logging.WARNING, keeping.log.name):
        again = cache.to_preset(preset_for_any_model("kv8", "llama", cache.geometry))
    (record,) = caplog.records
    assert "lossy already (kv4)" in record.message and again.recipe.fingerprint == cache.recipe.fingerprint
    with pytest.raises(PluginError, match="another model"):
        cache.to_preset(preset_for_any_model("kv8", "llama", Geometry.uniform(4, 2, 12)))
    with pytest.raises(PluginError, match="of different models"):
        keeping.from_cache(DynamicCache(), preset_for_any_model("kv8", "llama", Geometry.uniform(3, 2, 12)))


# --- parked


def test_on_the_cpu_nothing_is_parked_and_that_is_said(model, caplog):
    cache = cache_of(model)
    feed(model, cache, ids_of(HELD))
    with caplog.at_level(logging.WARNING, keeping.log.name):
        assert cache.offload() == 0 and cache.prefetch() == 0
    assert [record.message.split(":")[0] for record in caplog.records] == ["offload", "prefetch"]
    feed(model, cache, ids_of(3, seed=1))
    cache.parked = True
    with pytest.raises(PluginError, match="prefetch"):
        feed(model, cache, ids_of(3, seed=1))
