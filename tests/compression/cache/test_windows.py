"""Layers with a sliding window: what they forget is what no query sees, at any codec, and their size stays the same."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from direct import both, close
from generation import generate
from sampling import ALL, covering, sampled
from stores import COMPRESSORS, D, H
from tiny import tiny_model, windows
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer
from work import Work

from gpt2.compression.cache import direct_attention
from gpt2.compression.cache.size import cache_bytes, noise
from gpt2.compression.codecs import QUANTIZERS, Compressor
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.presets.any_model import ANY_MODEL
from gpt2.compression.settings import build
from gpt2.models.geometry import SLIDING, Geometry, LayerGeometry, Shape

BLOCK = 64  # tokens that a store forgets together


def any_model(name: str) -> tuple[Compressor, Compressor]:
    k, v = ANY_MODEL[name]
    return tuple(side[0] for side in build({"k": [k], "v": [v]}, Geometry.uniform(1, H, D)))


# K and V: coded by channel in blocks of 64, by token, in blocks of 4, each side otherwise, both sides together
CODECS = {
    "kv4": any_model("kv4"),
    "kv8": any_model("kv8"),
    "int4": (COMPRESSORS["int4"],) * 2,
    "blocks-of-4": (COMPRESSORS["low-rank-block"],) * 2,
    "heads-together": (COMPRESSORS["joint-int8"],) * 2,
    "k-exact": (COMPRESSORS["identity"], any_model("kv4")[1]),
    "k-blocks-of-4": (COMPRESSORS["block"], Compressor(QUANTIZERS["int8_channel"])),
    "joint": (COMPRESSORS["kv-int8"],) * 2,
    "joint-blocks": (COMPRESSORS["kv-block"],) * 2,
}
WINDOWS = [128, 130, 200, 300]
LAYOUTS = [(0, 0), (4, 0), (70, 0), (0, 100), (4, 100), (70, 100)]  # exact sinks, exact latest tokens
PARTS = [90, 64, 1, 1, 130, 7, 63, 1, 65, 1, 1]


@functools.cache
def model_of(window: int, heads: int):
    return tiny_model("mistral", head_dim=D, num_key_value_heads=heads, sliding_window=window, num_hidden_layers=2)


def geometry_of(window: int | None, heads: int, layers: int = 1) -> Geometry:
    kind = {} if window is None else {"kind": SLIDING, "window": window}
    return Geometry((LayerGeometry(k=Shape(heads, D), v=Shape(heads, D), **kind),) * layers)


def cache_of(codec: str, window: int | None, layout: tuple[int, int], layers: int = 1) -> CompressedDynamicCache:
    k, v = CODECS[codec]
    how = {"sink_tokens": layout[0], "recent_tokens": layout[1], "geometry": geometry_of(window, heads(codec), layers)}
    return CompressedDynamicCache([k] * layers, [v] * layers, **how)


def heads(codec: str) -> int:
    return H // 2 if CODECS[codec][0].joint else H


@torch.no_grad()
def streamed(model, cache, parts=PARTS) -> Tensor:
    ids = windows(2, sum(parts))
    return torch.cat([model(x, past_key_values=cache).logits for x in ids.split(parts, dim=1)], dim=1)


# --- the same as a cache that keeps everything


@pytest.mark.parametrize(
    ("codec", "window", "layout"),
    [*covering(CODECS, WINDOWS, LAYOUTS), *((codec, 100, (4, 0)) for codec in sampled(["joint-blocks", "kv4"], 1))],
)
def test_logits_are_those_of_a_cache_that_keeps_everything(codec, window, layout, monkeypatch):
    """By reconstruction and by compressed attention; also of a window that is stored exactly."""
    model, attended, attend = model_of(window, heads(codec)), [], direct_attention.attend
    monkeypatch.setattr(
        direct_attention, "attend", lambda *args, **how: attended.append(args[2].shape[2]) or attend(*args, **how)
    )
    everything = streamed(model, cache_of(codec, None, layout if window > 127 else (10**6, 0), layers=2))
    make = lambda: cache_of(codec, window, layout, layers=2)  # noqa: E731

    def run(cache) -> Tensor:
        attended.clear()  # enabling attends too
        return streamed(model, cache)

    reconstructed, read = both(model, make, run)
    assert close(everything, reconstructed) and close(everything, read)
    if make().readable:
        assert attended.count(1) == 2 * PARTS.count(1) and max(attended) == 7, "it is what read the stores"


# --- tokens and bytes held


@pytest.mark.parametrize(
    ("codec", "window", "layout", "n", "reads"),
    covering(CODECS, WINDOWS, LAYOUTS, [7, 64, 200, 1, 30], [True, False]),
)
def test_a_window_holds_what_it_needs_and_a_block(codec, window, layout, n, reads):
    """Read at each step, or only stored, as while attention reads the stores."""
    cache, theirs = cache_of(codec, window, layout), DynamicSlidingWindowLayer(window)
    (layer,), held_bytes = cache.layers, []
    layer.reader = None if reads else SimpleNamespace(enabled=True)  # as set while such a model runs
    x = noise(heads(codec), 2 * (window + n) + 300, D).float()
    for step, part in enumerate(x.split(n, dim=2)):
        sizes = layer.get_mask_sizes(part.shape[2])
        assert sizes == theirs.get_mask_sizes(part.shape[2])
        found, shown = layer.update(part, part), theirs.update(part, part)
        assert layer.get_seq_length() == theirs.get_seq_length() == min(n * (step + 1), x.shape[2])
        if reads:
            assert found[0].shape == shown[0].shape == (1, heads(codec), sizes[0], D)
        held = {len(store) for store in layer.stores.values()}
        later = 0 if reads or n > BLOCK else n  # are forgotten when the next are stored
        sinks = layout[0] // BLOCK * BLOCK if layer.get_seq_length() < window + 3 * BLOCK + n else 0
        assert len(held) == 1 and window - 1 <= max(held.pop(), window - 1) <= window - 1 + BLOCK - 1 + later + sinks
        held_bytes.append(cache_bytes(cache))
    first, second = (max(held_bytes[len(held_bytes) * a // 8 : len(held_bytes) * b // 8]) for a, b in ((2, 5), (5, 8)))
    assert second <= first + BLOCK * 2 * x[:, :, 0].nbytes, "a block more or less waits to be compressed"


@pytest.mark.parametrize(("codec", "n", "window"), covering(CODECS, [1, 7, 64, 200], [2, 64, 127]))
def test_a_small_window_is_stored_exactly_and_holds_no_token_more(codec, window, n):
    cache, theirs = cache_of(codec, window, (4, 100)), DynamicSlidingWindowLayer(window)
    for x, y in zip(*torch.randn(2, 6, 1, heads(codec), n, D), strict=True):
        assert all(map(torch.equal, cache.update(x, y, 0), theirs.update(x, y)))
        (layer,) = cache.layers
        assert torch.equal(layer.keys[:, :, 1 - window :], theirs.keys)
        assert torch.equal(layer.values[:, :, 1 - window :], theirs.values)
        assert {len(store) for store in layer.stores.values()} <= {theirs.keys.shape[2], 2 * window}
        assert cache_bytes(cache) == cache.nbytes() == 2 * theirs.keys.nbytes


def test_a_window_of_one_token_holds_none():
    cache = cache_of("kv4", 1, (4, 0))
    for n in (5, 1, 3):
        assert cache.get_mask_sizes(n, 0) == (n, cache.get_seq_length())
        assert cache.update(*[torch.ones(1, H, n, D)] * 2, 0)[0].shape[2] == n
        assert cache.nbytes() == 0
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("codec", sampled(["kv4", "joint", "int4"], 2))
def test_a_long_prompt_leaves_no_more_than_its_window(codec):
    at_once, slowly = cache_of(codec, 300, (4, 0)), cache_of(codec, 300, (4, 0))
    x = noise(heads(codec), 1200, D)
    at_once.update(x, x, 0)
    for part in x.split(100, dim=2):
        slowly.update(part, part, 0)
    assert cache_bytes(at_once) <= 1.1 * cache_bytes(slowly)
    assert all(map(torch.equal, at_once.layers[0].read(), slowly.layers[0].read()))


def test_after_a_reset_windows_forget_again():
    """Also where an answer before it was speculated, for which the past is recorded."""
    model = model_of(200, H)
    used, fresh = (cache_of("kv8", 200, (4, 0), layers=2) for _ in range(2))
    generate(model, used, windows(1, 40).repeat(1, 2), prompt_lookup_num_tokens=3)
    used.reset()
    for each in (used, fresh):
        streamed(model, each, [90] * 10)
    assert used.nbytes() == fresh.nbytes()


# --- work per token


@pytest.mark.parametrize(("codec", "n"), sampled([("kv4", 1), ("int4", 1), ("int4", 64), ("k-exact", 1)], 3))
def test_work_per_token_does_not_grow_with_what_was_seen(codec, n):
    """Numbers written per number of new K and V while tokens are stored, `n` at a time."""
    (layer,), work, steps = cache_of(codec, 1000, (4, 0)).layers, [], 192 if n == 1 else 8
    for seen in (4096, 16384 if ALL else 8192):
        while layer.get_seq_length() < seen:
            x = noise(H, 2048, D).float() + layer.get_seq_length()  # else it looks like a prompt that is fed again
            layer.store(x, x)
        x = noise(H, n * steps, D).float()
        with Work() as count:
            for part in x.split(n, dim=2):
                layer.store(part, part)
        work.append(count.numbers / (2 * x.numel()))
    assert max(work) <= 1.01 * min(work)
    assert max(work) < 100, "what is copied of a window when it forgets a block is shared by the block's tokens"
