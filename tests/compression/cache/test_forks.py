"""Forks of a cache hold what is common once; caches coded anew, and parked ones.

That forks go on by themselves is tried in test_cache_machine, and for every kind of layer in test_saved.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from generation import assistant_of, generate
from kept import cache_of
from kinds import KINDS, WINDOW, WINDOWED, feed, geometry_of, ids_of, model_of
from sampling import covering, sampled
from tiny import tiny_model
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.cache import keeping
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.compression.settings import compressors_for
from gpt2.models.geometry import Geometry

MORE = ids_of(9, seed=1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def filled(model):
    cache = cache_of(model)
    feed(model, cache, ids_of(150))
    return cache


@pytest.fixture
def warnings(caplog):
    """What was said of caches that are kept."""
    caplog.set_level(logging.WARNING, keeping.log.name)
    return lambda: [record.message for record in caplog.records if record.name == keeping.log.name]


def test_eight_forks_hold_a_prefix_once():
    """Of 4,096 tokens, at most 1.05 times one; and once they go on, their own tokens more."""
    wide = Geometry.uniform(1, 3, 64)
    cache = CompressedDynamicCache(*compressors_for("kv", 4, wide, quantizer="int4_channel"), geometry=wide)
    cache.update(*torch.randn(2, 1, 3, 4096, 64), 0)
    one = cache_bytes(cache)
    forks = [cache.fork() for _ in range(8)]
    assert cache_bytes(cache, *forks) <= 1.05 * one
    assert all(fork.nbytes() == cache.nbytes() == one for fork in forks), "each would take as much alone"
    for fork in forks:
        fork.layers[0].store(*torch.randn(2, 1, 3, 70, 64))
    blocks = 8 * 2 * 3 * (64 * 64 + 70 * 64 * 4)  # their own: less than 70 exact tokens and a block each
    assert one < cache_bytes(cache, *forks) < one + 2 * blocks


@pytest.mark.parametrize("how", sampled(["beams", "assisted", "lookup"], 2))
def test_forks_generate_as_the_cache_does(how, model, filled):
    """From one document, with no copy of it for each answer."""
    whole = torch.cat((ids_of(150), MORE), dim=1)
    ways = {"beams": {"num_beams": 3}, "assisted": {"assistant_model": assistant_of(model)}}
    how = ways.get(how, {"prompt_lookup_num_tokens": 3})
    before = filled.layers[0].read()[0]
    answers = []
    for one in (filled.fork(), filled.fork(), copy.deepcopy(filled)):
        if "num_beams" in how:
            one.batch_repeat_interleave(3)
        answers.append(generate(model, one, whole, **how))
    assert all(torch.equal(answer, answers[-1]) for answer in answers)
    assert torch.equal(filled.layers[0].read()[0], before)


# --- coded anew


@pytest.mark.parametrize(("family", "name"), covering(KINDS, ["kv4", "kv8"]))
def test_from_an_exact_cache_the_loss_is_that_of_one_codec(family, name, warnings):
    """What transformers' own cache holds, coded, is what the codec makes of the same K and V; states are the same."""
    model, geometry = model_of(family), geometry_of(family)
    straight = cache_of(model, name, family, geometry)
    exact, own = cache_of(model, "exact", family, geometry), DynamicCache(config=model.config)
    for cache in (exact, own):
        feed(model, cache, ids_of(150))
    preset = straight.recipe.preset
    both = [exact.to_preset(preset), keeping.from_cache(own, preset, geometry=geometry)]
    assert not warnings(), "nothing was lost before"
    for index in geometry.attention:
        if geometry.layers[index].window is None:
            straight.layers[index].store(*exact.layers[index].read())
            for cache in both:
                assert all(map(torch.equal, cache.layers[index].read(), straight.layers[index].read())), index
    found = [feed(model, cache, MORE) for cache in both]
    if family not in WINDOWED:  # where transformers' own has forgotten more, the first block is another
        assert torch.equal(*found)
    assert both[0].get_seq_length() == both[1].get_seq_length() == 159 and exact.get_seq_length() == 150
    wanted = feed(model, exact, MORE)
    for logits in found:
        assert 0 < (logits - wanted).norm() < 0.9 * (wanted - wanted.mean()).norm()


def test_from_a_lossy_cache_it_is_said(filled, warnings):
    again = filled.to_preset(preset_for_any_model("kv8", "llama", filled.geometry))
    (said,) = warnings()
    assert "lossy already (kv4)" in said and again.recipe.fingerprint == filled.recipe.fingerprint
    with pytest.raises(PluginError, match="another model"):
        filled.to_preset(preset_for_any_model("kv8", "llama", Geometry.uniform(4, 2, 12)))
    with pytest.raises(PluginError, match="of different models"):
        keeping.from_cache(DynamicCache(), preset_for_any_model("kv8", "llama", Geometry.uniform(3, 2, 12)))


@pytest.mark.parametrize("read", [True, False])
def test_a_cache_of_a_number_of_layers_is_coded_anew(model, read):
    """Its geometry has no shapes: what it holds tells them."""
    cache, direct = identity_cache(3), cache_of(None)
    if read:
        for each in (cache, direct):
            feed(model, each, ids_of(150))
    found = cache.to_preset(direct.recipe.preset)
    assert found.get_seq_length() == cache.get_seq_length()
    if read:  # deeper layers read what the first one lost
        assert all(map(torch.equal, found.layers[0].read(), direct.layers[0].read()))


def test_a_window_that_is_coded_anew_twice_knows_where_it_begins():
    model, geometry = model_of("mistral"), geometry_of("mistral")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    feed(model, cache, ids_of(333))
    cache.crop(0)
    once = keeping.from_cache(cache, preset_for_any_model("kv8", "mistral", geometry), model=model)
    twice = once.to_preset(preset_for_any_model("kv4", "mistral", geometry), model=model)
    for each in (once, twice):
        with pytest.raises(RuntimeError, match="has forgotten what the 330 tokens that stay would see"):
            copy.deepcopy(each).crop(-3)


# --- parked


def test_on_the_cpu_nothing_is_parked_and_that_is_said(model, filled, warnings):
    assert filled.offload() == 0 and filled.prefetch() == 0
    assert [said.split(":")[0] for said in warnings()] == ["offload", "prefetch"]
    feed(model, filled, MORE)
    filled.parked = True
    with pytest.raises(PluginError, match="prefetch"):
        feed(model, filled, MORE)


def test_a_window_that_is_coded_anew_shows_no_stand_ins():
    """Blocks are filled with copies of the first token that its window holds; no crop may bring them into sight."""
    model, geometry = model_of("mistral"), geometry_of("mistral")
    exact = cache_of(model, "exact", "mistral", geometry)
    feed(model, exact, ids_of(200))
    for layer in exact.layers:
        layer.record_past = True
    again = exact.to_preset(cache_of(model, "kv4", "mistral", geometry).recipe.preset)
    layer = again.layers[0]
    spare = layer.get_seq_length() - (WINDOW - 1) - layer.begins
    again.crop(-spare)
    with pytest.raises(RuntimeError, match="has forgotten what"):
        again.crop(-1)
    again.reset()
    assert layer.begins == 0
