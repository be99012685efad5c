"""Ctrl-C, or a lack of memory, in the middle of a run: the cache says so, and `crop` or `reset` mends it."""

from __future__ import annotations

import pytest
import torch
from sampling import covering
from tiny import tiny_model, windows

from gpt2.common.errors import PluginError
from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.codecs import QUANTIZERS, Compressor
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache

HELD = 10


@pytest.fixture(params=[False, True], ids=["reconstruction", "direct"], scope="module")
def model(request):
    model = tiny_model("llama")
    return enable_compressed_attention(model) if request.param else model


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@torch.no_grad()
def fed(model, cache, ids):
    return model(ids, past_key_values=cache).logits


def coded() -> CompressedDynamicCache:
    return CompressedDynamicCache(*[[Compressor(QUANTIZERS["int8"])] * 3] * 2)


def filled(model) -> CompressedDynamicCache:
    """A cache with codes and two rows."""
    cache = coded()
    fed(model, cache, windows(2, HELD))
    return cache


def stop(*args, error=KeyboardInterrupt):
    raise error


def cut_off(model, cache, ids, layer: int = 1) -> None:
    """A run that ends before a layer of the model."""
    hook = model.model.layers[layer].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        fed(model, cache, ids)
    hook.remove()


def assert_reset_mends(model, cache) -> None:
    cache.reset()
    assert torch.equal(fed(model, cache, windows(2, 3)), fed(model, coded(), windows(2, 3)))


@pytest.mark.parametrize(("held", "n", "layer"), [(HELD, 1, 1), (HELD, 3, 2), (0, HELD, 1)])
def test_a_run_cut_off_between_layers(model, held, n, layer):
    """To go on would attend to its tokens twice in the first layers, and once in the others. Also the first prompt."""
    more, whole, cache = windows(1, n, seed=1), identity_cache(3), identity_cache(3)
    cut_off(model, cache, more, layer)
    cache.reset()
    for each in (whole, cache) if held else ():
        fed(model, each, windows(1, held))
    cut_off(model, cache, more, layer)
    with pytest.raises(PluginError, match=rf"holds {held + n} tokens and the last {held}: .*crop\(-{n}\)"):
        fed(model, cache, more)
    if n > 1:
        with pytest.raises(PluginError, match="crop more or reset"):
            cache.crop(-1)
    cache.crop(-n)
    assert torch.equal(fed(model, cache, more), fed(model, whole, more))
    assert {layer.get_seq_length() for layer in cache.layers} == {held + n}


ROWS = torch.tensor([1, 0])
CHANGES = {
    "append": lambda model, cache: fed(model, cache, windows(2, 1)),
    "crop": lambda model, cache: cache.crop(-1),
    "map_": lambda model, cache: cache.reorder_cache(ROWS),
}


@pytest.mark.parametrize(("change", "error"), covering(CHANGES, [KeyboardInterrupt, MemoryError]))
def test_a_change_cut_off_halfway(change, error, llama, monkeypatch):
    """K has it and V hasn't: nothing that is held can be told from what isn't."""
    cache, method = filled(llama), getattr(TokenStore, change)
    of_values = cache.layers[0].stores["V"]
    with monkeypatch.context() as patch:
        patch.setattr(TokenStore, change, lambda s, *args: stop(error=error) if s is of_values else method(s, *args))
        with pytest.raises(error):
            CHANGES[change](llama, cache)
    for way in CHANGES.values():
        with pytest.raises(PluginError, match="interrupted"):
            way(llama, cache)
    assert_reset_mends(llama, cache)


def test_rows_changed_in_the_first_layers_only(llama, monkeypatch):
    """Beams of one layer would read those of another."""
    cache = filled(llama)
    for change, how in ((cache.reorder_cache, ROWS), (cache.batch_select_indices, ROWS),
                        (cache.batch_repeat_interleave, 1)):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(cache.layers[1].first_store, "map_", stop)
            with pytest.raises(KeyboardInterrupt):
                change(how)
        with pytest.raises(PluginError, match="batch selection was interrupted"):
            fed(llama, cache, windows(2, 1))
        assert_reset_mends(llama, cache)


def test_what_is_refused_changes_nothing(llama):
    """A single KV head of another model would spread over all that are held."""
    cache, other = filled(llama), filled(llama)
    wrong = (
        lambda: cache.reorder_cache(torch.tensor([0, 7])), lambda: cache.crop(-HELD - 1),
        lambda: cache.batch_select_indices(torch.tensor([2])), lambda: cache.batch_repeat_interleave(-1),
    )  # fmt: skip
    for call in wrong:
        with pytest.raises((IndexError, PluginError, RuntimeError)):
            call()
    with pytest.raises(PluginError, match="holds 2 KV heads of 12 channels, got 1 of 12"):
        fed(tiny_model("llama", num_key_value_heads=1), cache, windows(2, 3))
    assert torch.equal(fed(llama, cache, windows(2, 3)), fed(llama, other, windows(2, 3)))
