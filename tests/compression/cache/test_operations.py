"""Operations on caches whose layers differ in kind: rows, crops, resets, copies, for K and V and for states alike.

What they do to codes is tried in test_cache_machine.
"""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from kinds import KINDS, RECURRENT, WINDOWED, cut, feed, ids_of, model_of, ours, theirs
from sampling import covering, sampled
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import QUANTIZERS, Compressor
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.evaluation.humaneval.completions import select_rows
from gpt2.models.geometry import Geometry, LayerGeometry, Shape

CONVOLUTIONS = ("lfm2", "inkling_text")  # linear layers without recurrent states, so transformers can crop them
STATEFUL = (*RECURRENT, *CONVOLUTIONS, "glm_moe_dsa")  # the last for its indexers
FAMILIES = (*STATEFUL, *sampled([family for family in KINDS if family not in STATEFUL], 3))
IDS = ids_of(145, batch=3)


def streamed(family: str, cache, ids: Tensor = IDS):
    """The cache with a prompt, and then token by token behind it."""
    ids = cut(family, ids)
    for part in ids.split([ids.shape[1] - 3, 1, 1, 1], dim=1):
        feed(model_of(family), cache, part)
    return cache


@functools.cache
def _filled(family: str) -> tuple:
    return streamed(family, ours(family)), streamed(family, theirs(family))


def filled(family: str) -> tuple:
    """A cache of ours and one of transformers' own, both of `IDS`."""
    return copy.deepcopy(_filled(family))


def tensors(cache) -> dict[str, Tensor]:
    """All that a cache of either kind holds for later queries, by name."""
    held = {}
    for index, layer in enumerate(cache.layers):
        for name in ("keys", "values", "indexer_keys", "indexer_position_ids"):
            held[f"{index}.{name}"] = getattr(layer, name, None)
        if window := getattr(layer, "sliding_window", None):
            for name in (f"{index}.keys", f"{index}.values"):
                held[name] = None if held[name] is None else held[name][:, :, -(window - 1) :]
        for name in ("conv_states", "recurrent_states"):
            held |= {f"{index}.{name}.{i}": state for i, state in getattr(layer, name, {}).items()}
    return {name: x for name, x in held.items() if x is not None and x.numel()}


def assert_same(family: str, ours, theirs, more: Tensor, exactly: bool = True) -> None:
    """Both caches hold the same, and the model goes on alike with more tokens."""
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys() and a
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-3, "atol": 1e-4}
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name, **tolerance)
    found, wanted = (feed(model_of(family), each, more) for each in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=tolerance["rtol"], atol=0 if exactly else 1e-3)


ROWS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: select_rows(cache, torch.tensor([2, 0])), [2, 0]),
    "select-list": (lambda cache: cache.batch_select_indices([1]), [1]),
    "select-mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize(("family", "operation"), covering(FAMILIES, ROWS))
def test_rows(family, operation):
    """As in a cache that was filled with these rows; and as in transformers' own, by its operation and by ours.

    Its operations, but for a reorder, leave recurrent states out or raise.
    """
    change, rows = ROWS[operation]
    cache, own = filled(family)
    change(cache)
    if operation == "reorder":
        reordered = copy.deepcopy(own)
        change(reordered)
        assert_same(family, copy.deepcopy(cache), reordered, ids_of(1, batch=3))
    select_rows(own, torch.tensor(rows))
    assert_same(family, copy.deepcopy(cache), own, ids_of(1, batch=len(rows)))
    fresh = streamed(family, theirs(family), IDS[rows])
    assert_same(family, cache, fresh, ids_of(4, batch=len(rows), seed=1), exactly=False)


@pytest.mark.parametrize(
    ("family", "how"), covering(FAMILIES, [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
)
def test_copies_and_what_was_moved_go_their_own_way(family, how):
    """And after a reset any batch is welcome: transformers' own linear layers keep states of the old batch size."""
    cache, own = filled(family)
    for layer in (*ours(family).layers, *cache.layers):  # also where there is nothing to move
        layer.offload()
        layer.prefetch()
    assert cache.is_initialized
    copied = how(cache)
    feed(model_of(family), cache, ids_of(7, batch=3, seed=5))
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized and not tensors(cache)
    assert_same(family, copied, own, ids_of(3, batch=3, seed=1))
    other = ids_of(40, seed=1)
    assert_same(family, streamed(family, cache, other), streamed(family, theirs(family), other), ids_of(1))


@pytest.mark.parametrize(("family", "removed"), covering(KINDS, [1, 0, 60]))
def test_crop_of_a_recorded_past(family, removed):
    """Fed in parts, cropped after each, as assisted decoding does it."""
    cache, own = ours(family), theirs(family)
    for each in (cache, own):
        each.activate_past_recording()
    if family in RECURRENT:
        feed(model_of(family), cache, cut(family, ids_of()))
        if removed:
            with pytest.raises(PluginError, match="recurrent states can't be put back"):
                cache.crop(-min(removed, 30))
        return
    for n, seed in ((100, 0), (160, 1), (64, 3), (1, 4)):
        assert torch.equal(*(feed(model_of(family), each, ids_of(n, seed=seed)) for each in (cache, own)))
        for each in (cache, own):
            each.crop(-min(removed, n))
        assert cache.get_seq_length() == own.get_seq_length()
        for layer in cache.layers:
            if getattr(layer, "is_sliding", False):
                held = {len(store) for store in layer.stores.values()}
                assert max(held) < layer.sliding_window - 1 + 64, "what was recorded is forgotten"
    assert_same(family, cache, own, ids_of(2, seed=5))


@pytest.mark.parametrize(("family", "length"), [*((f, 145) for f in KINDS), *((f, 100) for f in sampled(WINDOWED, 2))])
def test_crop_of_a_past_that_was_not_recorded(family, length):
    """What transformers refuses is refused, and nothing has changed by it."""
    if length == 145:
        cache, own = filled(family)
    else:
        cache, own = (streamed(family, make(family), IDS[:, :length]) for make in (ours, theirs))
    before, refused = copy.deepcopy(cache), None
    try:
        own.crop(-3)
    except Exception as error:
        refused = type(error)
    if refused:
        with pytest.raises((refused, PluginError)):
            cache.crop(-3)
    else:
        cache.crop(-3)
    assert_same(family, cache, before if refused else own, ids_of(5, batch=3, seed=1))
    assert bool(refused) == (family in (*RECURRENT, *CONVOLUTIONS) or (family in WINDOWED and length == 145))


@pytest.mark.parametrize("family", [*sampled(WINDOWED, 3), "lfm2"])
def test_crop_of_more_than_was_recorded(family):
    """transformers' own cache would go on with a window of too few tokens."""
    cache, own = ours(family), theirs(family)
    for each in (cache, own):
        feed(model_of(family), each, ids_of(300))
    cache.activate_past_recording()
    parts = ids_of(4, seed=1).split(1, dim=1)
    for part in parts:
        feed(model_of(family), cache, part)
    with pytest.raises(RuntimeError, match="call activate_past_recording on the cache"):
        cache.crop(-200)
    cache.crop(-3)
    feed(model_of(family), own, parts[0])
    assert_same(family, cache, own, ids_of(5, seed=2), exactly=False)


def test_a_crop_that_one_layer_refuses_leaves_the_others_as_they_are():
    """Also where the layer that refuses is behind one that can be cropped."""
    shape = Shape(2, 8)
    kinds = [LayerGeometry("full_attention", shape, shape), LayerGeometry("hybrid", shape, shape),
             LayerGeometry("linear_attention")]  # fmt: skip
    for last in (2, 3):
        cache = identity_cache(Geometry(tuple(kinds[:last])))
        for index in range(2):
            cache.update(torch.ones(1, 2, 9, 8), torch.ones(1, 2, 9, 8), index)
        cache.update_conv_state(torch.ones(1, 4, 3), last - 1)
        with pytest.raises(RuntimeError, match=f"layer {last - 1}: it hasn't kept past states"):
            cache.crop(-2)
        assert {cache.get_seq_length(0), cache.get_seq_length(1)} == {9}


@pytest.mark.parametrize("change", [
    lambda cache: cache.crop(-3), lambda cache: cache.reorder_cache(torch.tensor([0])),
    lambda cache: cache.batch_select_indices(torch.tensor([0])), lambda cache: cache.batch_repeat_interleave(2),
    lambda cache: cache.fork(), lambda cache: cache.to_preset("kv4"),
])  # fmt: skip
def test_a_parked_cache_is_not_changed(change):
    """Its copies may still be on their way to the CPU."""
    cache = CompressedDynamicCache([Compressor(QUANTIZERS["int8"])], [Compressor(QUANTIZERS["int8"])])
    x = torch.randn(1, 2, 100, 8, generator=torch.Generator().manual_seed(0))
    cache.update(x, x, 0)
    cache.parked = True
    with pytest.raises(PluginError, match="prefetch"):
        change(cache)
