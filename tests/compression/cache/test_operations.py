"""Operations on caches whose layers differ in kind: rows, crops, resets, copies, for K and V and for states alike.

What they do to codes is tried in test_cache_machine.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kinds import KINDS, RECURRENT, WINDOWED, cut, feed, ids_of, model_of, ours, theirs
from sampling import covering, sampled
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.compressed_cache import identity_cache
from gpt2.models.geometry import Geometry, LayerGeometry, Shape

CONVOLUTIONS = ("lfm2", "inkling_text")  # linear layers without recurrent states, so transformers can crop them


def streamed(family: str, cache, ids: Tensor) -> None:
    """A prompt, then token by token behind it."""
    ids = cut(family, ids)
    for part in ids.split([ids.shape[1] - 3, 1, 1, 1], dim=1):
        feed(model_of(family), cache, part)


def tensors(cache) -> dict[str, Tensor]:
    """All that a cache of either kind holds for later queries, by name."""
    held = {}
    for index, layer in enumerate(cache.layers):
        window = getattr(layer, "sliding_window", None)
        for name in ("keys", "values"):
            x = getattr(layer, name, None)
            if x is not None and x.numel():
                held[f"{index}.{name}"] = x[:, :, -(window - 1) :] if window else x
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, {})
            held |= {f"{index}.{name}.{i}": state for i, state in states.items() if state is not None}
        for name in ("indexer_keys", "indexer_position_ids"):
            if getattr(layer, name, None) is not None:
                held[f"{index}.{name}"] = getattr(layer, name)
    return held


def assert_same(a, b, exactly: bool = True) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and a
    for name in a:
        if exactly:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)


ROWS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select-one": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize(("family", "operation"), covering(KINDS, ROWS))
def test_rows(family, operation):
    """As in a cache that was filled with these rows; and as in transformers' own cache after it, where it can."""
    change, rows = ROWS[operation]
    ids, more = ids_of(145, batch=3), ids_of(4, batch=len(rows), seed=1)
    cache, fresh = ours(family), theirs(family)
    streamed(family, cache, ids)
    streamed(family, fresh, ids[rows])
    change(cache)
    assert_same(cache, fresh, exactly=False)
    torch.testing.assert_close(
        feed(model_of(family), cache, more), feed(model_of(family), fresh, more), rtol=1e-3, atol=1e-3
    )
    if operation == "reorder":
        own, cache = theirs(family), ours(family)
        for each in (own, cache):
            streamed(family, each, ids)
            change(each)
        assert_same(cache, own)


@pytest.mark.parametrize(
    ("family", "how"), covering(KINDS, [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
)
def test_copies_and_what_was_moved_go_their_own_way(family, how):
    """And after a reset any batch is welcome: transformers' own linear layers keep states of the old batch size."""
    cache, own, model = ours(family), theirs(family), model_of(family)
    for each in (cache, own):
        for layer in each.layers:  # before there is anything to move
            layer.offload()
            layer.prefetch()
        streamed(family, each, ids_of(145, batch=2))
        for layer in each.layers:
            layer.offload()
            layer.prefetch()
    copied = how(cache)
    feed(model, cache, ids_of(7, batch=2, seed=5))
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized and not tensors(cache)
    assert_same(copied, own)
    more = ids_of(3, batch=2, seed=1)
    assert torch.equal(feed(model, copied, more), feed(model, own, more))
    for batch in (1, 3):
        ids, own = cut(family, ids_of(140, batch=batch, seed=batch)), theirs(family)
        assert torch.equal(feed(model, cache, ids), feed(model, own, ids))
        assert_same(cache, own)
        cache.reset()


@pytest.mark.parametrize(("family", "removed"), covering(KINDS, [1, 0, 60]))
def test_crop_of_a_recorded_past(family, removed):
    """Fed in parts, cropped after each, as assisted decoding does it."""
    cache, own = ours(family), theirs(family)
    for each in (cache, own):
        each.activate_past_recording()
    if family in RECURRENT:
        feed(model_of(family), cache, ids_of())
        if removed:
            with pytest.raises(PluginError, match="recurrent states can't be put back"):
                cache.crop(-removed)
        return
    for n, seed in ((100, 0), (160, 1), (40, 2), (64, 3), (1, 4)):
        found, wanted = (feed(model_of(family), each, ids_of(n, batch=2, seed=seed)) for each in (cache, own))
        assert torch.equal(found, wanted)
        for each in (cache, own):
            each.crop(-min(removed, n))
        assert cache.get_seq_length() == own.get_seq_length()
        assert_same(cache, own)
        for layer in cache.layers:
            if getattr(layer, "is_sliding", False):
                held = {len(store) for store in layer.stores.values()}
                assert max(held) < layer.sliding_window - 1 + 64, "what was recorded is forgotten"


@pytest.mark.parametrize(("family", "length"), [*((f, 140) for f in KINDS), *((f, 100) for f in sampled(WINDOWED, 2))])
def test_crop_of_a_past_that_was_not_recorded(family, length):
    """What transformers refuses is refused, and nothing has changed by it."""
    cache, own = ours(family), theirs(family)
    for each in (cache, own):
        feed(model_of(family), each, cut(family, ids_of(length)))
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
        before = own
    assert_same(cache, before)
    more = ids_of(5, seed=1)
    assert torch.equal(feed(model_of(family), cache, more), feed(model_of(family), before, more))
    assert bool(refused) == (family in (*RECURRENT, *CONVOLUTIONS) or (family in WINDOWED and length == 140))


@pytest.mark.parametrize("family", [*sampled(WINDOWED, 3), "lfm2"])
def test_crop_of_more_than_was_recorded(family):
    """transformers' own cache would go on with a window of too few tokens."""
    cache = ours(family)
    feed(model_of(family), cache, ids_of(400))
    cache.activate_past_recording()
    for part in ids_of(4, seed=1).split(1, dim=1):
        feed(model_of(family), cache, part)
    before = copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match="call activate_past_recording on the cache"):
        cache.crop(-200)
    assert_same(cache, before)
    cache.crop(-3)
    own = theirs(family)
    feed(model_of(family), own, ids_of(400))
    feed(model_of(family), own, ids_of(4, seed=1)[:, :1])
    more = ids_of(5, seed=2)
    torch.testing.assert_close(
        feed(model_of(family), cache, more), feed(model_of(family), own, more), rtol=1e-3, atol=1e-3
    )


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
