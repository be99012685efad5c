"""The storage: what is exact, what it costs, and that nothing moves. What is read back: test_cache_machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sampling import covering
from stores import COMPRESSORS, D, H, as_sides, filled, tokens
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.cache import token_store
from gpt2.compression.cache.growing_tensor import GrowingTensor
from gpt2.compression.cache.size import cache_bytes, fill
from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor
from gpt2.compression.codecs.mixed import MixedFixed
from gpt2.compression.codecs.multi_head import JointTransform
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.compressed_cache import CompressedDynamicCache

# Exact sinks and recent tokens: none, the usual, sinks that cut a block, and more of either than a block has
LAYOUTS = [(0, 0), (4, 0), (5, 6), (9, 3)]
every_layout = pytest.mark.parametrize(("name", "layout"), covering(COMPRESSORS, LAYOUTS))


def cache_of(compressor: str | Compressor, layers: int = 1, **how) -> CompressedDynamicCache:
    each = [COMPRESSORS[compressor] if isinstance(compressor, str) else compressor] * layers
    return CompressedDynamicCache(each, each, **how)


def append(cache: CompressedDynamicCache, x: Tensor) -> None:
    """The same tokens as K and as V of every layer."""
    fill(cache, [(x, x)])


def keys(cache: CompressedDynamicCache) -> Tensor:
    return cache.layers[0].stores["K"].read()


@every_layout
def test_sinks_and_the_latest_tokens_are_exact(name, layout):
    """Bit for bit, however the tokens came; and nothing else is exact, or the test would prove nothing."""
    (sinks, recent), x, compressor = layout, tokens(31), COMPRESSORS[name]
    unfinished = (31 - recent) % compressor.block_tokens
    coded = 0 if compressor.exact else 31 - sinks - recent - unfinished
    for chunks in ([x], x.split(4, dim=2)):
        read = filled(compressor, layout, chunks).read()
        exact = (read == x).all(dim=3).all(dim=(0, 1)).tolist()
        assert exact == [True] * sinks + [False] * coded + [True] * (31 - sinks - coded)


@pytest.mark.parametrize(("n", "blocks", "exact"), [(3, 0, 3), (63, 0, 63), (64, 1, 4), (65, 1, 5), (192, 3, 4)])
def test_blocks_of_64_by_hand(n, blocks, exact):
    """The lead takes the place of sinks in the first block: 64 tokens are 4 sinks and one block."""
    cache, x = cache_of(Compressor(QUANTIZERS["int4_channel"])), tokens(n, batch=1)
    k, _ = cache.update(x, x, 0)
    assert cache_bytes(cache) == 2 * H * (blocks * (32 * D + D + 2 * D) + exact * D * 4), "K and V"
    tail = n - exact + 4
    assert torch.equal(k[:, :, :4], x[:, :, :4]) and torch.equal(k[:, :, tail:], x[:, :, tail:])
    assert torch.equal(k, x) == (blocks == 0)


def test_crop_of_nothing_and_of_too_much():
    cache = cache_of("int4")
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    assert cache.get_seq_length() == 0, "empty: nothing to crop or to reorder"
    append(cache, tokens(10))
    before = keys(cache)
    for nothing in (0, torch.tensor(0)):
        cache.crop(nothing)
        assert torch.equal(keys(cache), before)
    with pytest.raises(PluginError, match="11 tokens from a cache of 10"):
        cache.crop(-11)
    cache.crop(torch.tensor(-4))  # transformers 5.17 counts the tokens to remove on the device
    assert torch.equal(keys(cache), before[:, :, :6])


def test_what_is_cropped_is_freed():
    cache = cache_of("int8", recent_tokens=512)
    append(cache, tokens(600, batch=1))
    for removed in (300, 290):  # a part of the tail, then all of it
        cache.crop(-removed)
        exact = [x for store in cache.layers[0].stores.values() for x in (store.sinks, store.tail)]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in exact), "a slice would keep all of it alive"


def test_a_cache_reordered_in_inference_mode_goes_on_without_it():
    """Beam search under inference_mode, then another turn."""
    cache, x = cache_of("int4"), tokens(30)
    with torch.inference_mode():
        append(cache, x[:, :, :20])
        cache.reorder_cache(torch.tensor([1, 0]))
    append(cache, x[[1, 0], :, 20:])
    assert torch.equal(keys(cache), filled(COMPRESSORS["int4"], (4, 0), [x[[1, 0]]]).read())


def test_kept_reconstructions_are_made_once(monkeypatch):
    made, reconstruct = [], Compressor.reconstruct

    def counted(self, encoded, *args):
        made.append(encoded["codes"].shape[2])
        return reconstruct(self, encoded, *args)

    monkeypatch.setattr(Compressor, "reconstruct", counted)
    cache = cache_of("block").keep_reconstructed()
    for token in tokens(40).split(1, dim=2):
        cache.update(token, token, 0)
    assert made == [1] * 2 * (36 // 4), "K and V, each block as it becomes full"
    assert cache_bytes(cache) == cache.nbytes()


# --- nothing moves


def parts_of(store) -> list[tuple[Tensor, int, int, Tensor]]:
    """Every chunk: the tensor, its address, how much of it is in use, and a copy of that."""
    return [
        (part, part.data_ptr(), view.shape[2], view.clone())
        for grown in store.blocks.values()
        for part, view in zip(grown.chunks, grown.views(), strict=True)
    ]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_appending_never_touches_what_is_stored(name):
    store = filled(COMPRESSORS[name], (5, 6), [tokens(40)])
    for step in range(40):
        before = parts_of(store)
        store.append(tokens(1 + step % 7, seed=step))
        held = {id(part) for grown in store.blocks.values() for part in grown.chunks}
        for part, address, used, content in before:
            assert id(part) in held and part.data_ptr() == address, "moved"
            assert torch.equal(part[:, :, :used], content), "changed"
    assert len(parts_of(store)) > len(store.blocks), "it grew beyond its first chunk"


def test_chunks_stay_few():
    """A read joins them: their number grows with the logarithm of the length."""
    grown, counts, token = GrowingTensor(), {}, torch.zeros(1, 1, 1, 1)
    for n in range(1, 4097):
        grown.append(token)
        counts[n] = len(grown.chunks)
    assert counts[1024] <= 32 and counts[4096] - counts[2048] <= counts[2048] - counts[1024] + 1 < 32


# --- what it costs


PER_TOKEN = {  # bytes of one token of one KV head, float16: codes, then scale and offset
    "identity": 2 * D,
    "int8": D + 2 + 2,
    "int4": D // 2 + 2 + 2,
    "low-rank": 2 * 9,
    "low-rank-int4": 3 + 2 + 2,
    "joint-int8": 20 + 2 + 2,  # of both heads
}


@pytest.mark.parametrize(("name", "sinks"), covering(PER_TOKEN, [4, 0]))
def test_bytes_are_what_a_hand_counts(name, sinks):
    cache = cache_of(name, layers=2, sink_tokens=sinks, recent_tokens=8)
    append(cache, tokens(200, batch=3, dtype=torch.float16))
    exact, heads = 0 if name == "identity" else sinks + 8, 1 if name == "joint-int8" else H
    coded = 2 * 2 * 3 * heads * (200 - exact) * PER_TOKEN[name]  # layers, sides, rows
    assert cache.nbytes() == cache_bytes(cache) == coded + 2 * 2 * 3 * H * exact * 2 * D


def test_transforms_are_counted_apart_and_once_where_layers_share_them():
    shared = COMPRESSORS["joint-int8"]
    own = Compressor(shared.quantizer, replace(shared.transform))  # without what other tests let it derive
    assert cache_of(own, layers=2).codec_bytes() == 8 * (2 * (H * D) * 20 + H * D)
    rotary = Rotary(torch.zeros(D // 2))
    each = [JointTransform(*(torch.zeros(1, *shape) for shape in ((D, D), (D, D), (D,))), rotary) for _ in range(2)]
    quantizer = MixedFixed(4.0, torch.ones(1, D, dtype=torch.long))
    both = [Compressor(quantizer, transform) for transform in each]
    basis, angles = 4 * (2 * D * D + D), 4 * D // 2
    assert CompressedDynamicCache(both, both).codec_bytes() == 2 * basis + angles + 8 * D
    rotary.frame_angles(0, 3, 64)
    assert CompressedDynamicCache(both, both).codec_bytes() == 2 * basis + angles + 8 * D + 3 * 2 * angles


@pytest.mark.parametrize(("name", "chunk"), covering(["int4", "identity", "block"], [1, 64, 4]))
def test_unused_room_is_under_5_percent(name, chunk):
    cache, worst = cache_of(name), 0.0
    append(cache, tokens(2048, batch=1, heads=1, dtype=torch.float16))
    for part in tokens(400, batch=1, heads=1, dtype=torch.float16).split(chunk, dim=2):
        append(cache, part)
        (grown, *_) = cache.layers[0].stores["K"].blocks.values()
        worst = max(worst, grown.unused / grown.length)
        if name != "block":
            exact = 0 if name == "identity" else 4
            needed = 2 * (exact * 2 * D + (cache.get_seq_length() - exact) * PER_TOKEN[name])
            assert 0 <= cache_bytes(cache) / needed - 1 < 0.05
    assert 0 < worst < 0.05


@every_layout
def test_slices_of_large_tensors_are_let_go(name, layout):
    """A view that is kept would keep a whole prompt's activations alive."""
    huge, _ = as_sides(COMPRESSORS[name], tokens(4000))
    cache = cache_of(name, sink_tokens=layout[0], recent_tokens=layout[1])
    for chunk in huge[:, :, :120].split(3, dim=2):
        append(cache, chunk)
    kept = 4 * 120 * huge[:, :, :1].nbytes  # two sides, and as much again for room
    assert cache_bytes(cache) <= kept < huge.untyped_storage().nbytes() / 5
    cache.crop(-50)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache_bytes(cache) <= kept / 2


# --- what is rejected


def test_bad_arguments_are_rejected():
    for k, v, name, value in ((2, 3, "", ""), (0, 0, "", ""), (3, 3, "num_layers", 4), (1, 1, "num_layers", 0),
                              (1, 1, "sink_tokens", -1), (1, 1, "recent_tokens", -1)):  # fmt: skip
        sides = ([IdentityCompressor()] * count for count in (k, v))
        with pytest.raises(PluginError, match=f"{name}={value}" if name else f"got {k} and {v}"):
            CompressedDynamicCache(*sides, **({name: value} if name else {}))


@pytest.mark.parametrize(("heads", "d", "side"), [(2, 20, "K"), (2, 12, "V"), (3, 16, "K"), (1, 16, "V"), (4, 16, "K")])
def test_a_transform_of_another_model_is_rejected(side, heads, d):
    identity = [IdentityCompressor()] * 2
    sides = {"K": identity, "V": identity} | {side: [IdentityCompressor(), COMPRESSORS["low-rank"]]}
    cache = CompressedDynamicCache(*sides.values())
    x = tokens(5, heads=heads, d=d)
    cache.update(x, x, 0)
    with pytest.raises(PluginError, match=f"layer 1, {side}.* {H} groups of {D} .* {heads} KV heads of {d}"):
        cache.update(x, x, 1)


def test_looking_at_the_latest_tokens_copies_no_others(monkeypatch):
    """On a GPU, every 64 tokens: not the codes of all tokens, which take gigabytes."""
    monkeypatch.setattr(token_store, "waits", lambda z: True)  # as on a GPU
    monkeypatch.setattr(token_store, "joined", lambda parts: pytest.fail("all chunks were copied"))
    store = TokenStore(Compressor(QUANTIZERS["int8"]), 4, 0)
    x = torch.randn(1, 2, 300, 8, generator=torch.Generator().manual_seed(0))
    store.prepare(x, "test")
    for part in x.split([150, *[1] * 150], dim=2):
        store.append(part)
    assert len(store) == 300 and len(list(store.chunks())) > 1
